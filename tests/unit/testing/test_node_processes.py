"""Claims of LocalCluster that need no real process: what one node does at its end is not the others' business."""

from __future__ import annotations

import signal
from pathlib import Path

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
