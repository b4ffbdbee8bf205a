"""Claims of LocalCluster that need no real process: what one node does at its end is not the others' business, and whatever
becomes of a start, neither processes nor a temporary directory are left behind."""

from __future__ import annotations

import asyncio
import signal
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvstore.errors import Unavailable
from kvstore.testing.cluster import LocalCluster, NodeProcess


class Stubborn(NodeProcess):
    """Does not heed SIGTERM. `just_ended`: it is there when asked, and gone when it is to be killed."""

    def __init__(self, number: int, directory: Path, *, just_ended: bool) -> None:
        super().__init__(number, directory, {})
        self.just_ended = just_ended
        self.signals: list[signal.Signals] = []

    @property
    def running(self) -> bool:
        return signal.SIGKILL not in self.signals

    def signal(self, number: signal.Signals) -> None:
        self.signals.append(number)
        if number is signal.SIGKILL and self.just_ended:
            raise Unavailable(f"node {self.number} does not run")

    def wait(self, timeout_s: float) -> int | None:
        return None if self.running else -9


def cluster_of(directory: Path) -> tuple[LocalCluster, list[Stubborn]]:
    cluster = LocalCluster(2, directory=directory, stop_timeout_s=0.0)
    nodes = [Stubborn(n, directory / f"{n}", just_ended=n == 0) for n in range(2)]
    cluster.nodes = [*nodes]
    return cluster, nodes


def test_a_node_that_ends_before_it_is_killed_does_not_leave_the_others_running(
    tmp_path: Path,
) -> None:
    cluster, nodes = cluster_of(tmp_path)
    cluster.stop()
    assert [node.signals for node in nodes] == [[signal.SIGTERM, signal.SIGKILL]] * 2


def test_a_node_that_ends_before_it_is_killed_is_terminated(tmp_path: Path) -> None:
    cluster, nodes = cluster_of(tmp_path)
    assert cluster.terminate(0) is None
    assert not nodes[0].running


class Docile(NodeProcess):
    """Runs from `spawn` on, until it is told to end."""

    def __init__(self, number: int, directory: Path) -> None:
        super().__init__(number, directory, {})
        self.spawned = 0
        self._runs = False

    @property
    def running(self) -> bool:
        return self._runs

    def spawn(self) -> None:
        self.directory.mkdir(parents=True)
        self.spawned += 1
        self._runs = True

    def wait_address(self, deadline: float) -> None:
        pass

    def signal(self, number: signal.Signals) -> None:
        self._runs = False

    def wait(self, timeout_s: float) -> int | None:
        return None if self._runs else 0


class Held(LocalCluster):
    """A temporary one whose `init` tells that it is there, and lasts until it is let go."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__(2)
        self.docile = [Docile(n, self.directory / f"{n}") for n in range(2)]
        self.nodes = [*self.docile]
        self.reached, self.go_on = threading.Event(), threading.Event()
        self._fails = fails

    def init(self) -> None:
        self.reached.set()
        assert self.go_on.wait(10.0)
        if self._fails:
            raise Unavailable("no")

    def wait_ready(
        self, numbers: Sequence[int] | None = None, timeout_s: float | None = None
    ) -> None:
        pass

    def wait_leaders(self, timeout_s: float | None = None) -> None:
        pass


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary directories are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def left_in(directory: Path) -> list[Path]:
    return list(directory.iterdir())


def test_a_cluster_that_is_never_started_leaves_nothing(temporary: Path) -> None:
    LocalCluster(2)
    assert left_in(temporary) == []


def test_a_temporary_directory_is_there_while_the_cluster_is_and_nobody_elses(
    temporary: Path,
) -> None:
    cluster = Held()
    cluster.go_on.set()
    with cluster:
        (made,) = temporary.iterdir()
        assert made == cluster.directory
        assert made.stat().st_mode & 0o777 == 0o700
    assert left_in(temporary) == []
    with cluster:
        assert [node.spawned for node in cluster.docile] == [2, 2]
        cluster.keep = True
    assert cluster.directory.is_dir()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("times", [1, 2])
async def test_a_start_that_is_cancelled_leaves_nothing(
    temporary: Path, fails: bool, times: int
) -> None:
    """`times`: who cancels may be impatient."""
    cluster = Held(fails=fails)
    starting = asyncio.create_task(cluster.start_async())
    await asyncio.to_thread(cluster.reached.wait, 10.0)
    for _ in range(times):
        starting.cancel()
        await asyncio.wait([starting], timeout=0)
    assert not starting.done()  # a thread cannot be stopped
    cluster.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert [node.spawned for node in cluster.docile] == [1, 1]
    assert not any(node.running for node in cluster.nodes)
    assert left_in(temporary) == []


async def test_a_restart_that_outlives_the_cluster_starts_nothing(temporary: Path) -> None:
    """Its thread goes on when who waits for it is cancelled."""
    cluster = Held()
    cluster.go_on.set()
    async with cluster:
        cluster.kill(0)
    with pytest.raises(Unavailable, match="the cluster is stopped"):
        await cluster.restart_async(0)
    assert [node.spawned for node in cluster.docile] == [1, 1]
    assert left_in(temporary) == []


def test_where_no_node_runs_none_is_the_busiest(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no node runs"):
        LocalCluster(2, directory=tmp_path).busiest()


def test_a_cluster_says_whether_it_was_stopped(tmp_path: Path) -> None:
    cluster, _ = cluster_of(tmp_path)
    assert not cluster.stopped
    cluster.stop()
    assert cluster.stopped
