"""How `kvstore start` runs a node: signals, and what ends it."""

from __future__ import annotations

import asyncio

import pytest

from kvstore import config as configuration
from kvstore.cli import server
from kvstore.errors import ConfigError, DataDirectoryError
from replication.errors import LogWriteFailed


class FakeRunNode:
    """A node that starts and stops as it is told; `events` tells what was asked of it."""

    def __init__(self, *_, **__):
        self.address = "127.0.0.1:1"
        self.events: list[str] = []
        self.fatal: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.hangs_at = ""
        self.state = "ready"

    async def start(self):
        self.events.append("start")
        if self.hangs_at == "start":
            await self.never

    async def stop(self, drain=True):
        self.events.append(f"stop drain={drain}")
        self.state = "stopped" if self.hangs_at == "end" else "draining"
        if drain and self.hangs_at in ("stop", "end"):
            await self.never


@pytest.fixture
def served(monkeypatch, tmp_path):
    """Run `kvstore start`'s loop with a fake node; `signals` are (what happened, futures) hooks in between."""
    import kvstore.node

    def run(hangs_at="", after=()):
        made = []

        async def script():
            def make(*arguments, **options):
                node = FakeRunNode()
                node.hangs_at = hangs_at
                made.append(node)
                return node

            monkeypatch.setattr(kvstore.node, "Node", make)
            monkeypatch.setattr(kvstore.node, "production_adapters", lambda settings: None)
            futures: list[asyncio.Future[str]] = []

            def watch(loop, stop):
                futures.extend([stop, loop.create_future()])
                return futures[1]

            monkeypatch.setattr(server, "_watch_signals", watch)
            asked = server.Start(tmp_path / "address", None)
            serving = asyncio.ensure_future(server._serve(configuration.NodeConfig(), asked))
            for step in after:
                for _ in range(5):
                    await asyncio.sleep(0)
                step(made[0], *futures)
            return await serving

        return asyncio.run(script()), made[0].events

    return run


@pytest.mark.parametrize(
    ("error", "status"), [(ConfigError("no --join"), 2), (DataDirectoryError("in use"), 1)]
)
def test_what_a_node_finds_wrong_with_its_configuration_has_the_status_of_that(
    monkeypatch, capsys, error, status
):
    import kvstore.node

    class Refusing(FakeRunNode):
        async def start(self):
            raise error

    monkeypatch.setattr(kvstore.node, "Node", Refusing)
    monkeypatch.setattr(kvstore.node, "production_adapters", lambda settings: None)
    monkeypatch.setattr(server, "_tune_interpreter", lambda: None)
    monkeypatch.setattr(server, "_raise_open_files_limit", lambda: None)
    assert server._run(configuration.NodeConfig(), server.Start(None, None)) == status
    assert error.message in capsys.readouterr().err


def first_signal(_node, stop, _again):
    stop.set_result("SIGTERM")


def second_signal(_node, _stop, again):
    again.set_result("SIGTERM")


def test_a_signal_drains_and_stops(served, tmp_path):
    assert served(after=[first_signal]) == (0, ["start", "stop drain=True"])
    assert (tmp_path / "address").read_text() == "127.0.0.1:1"


def test_a_second_signal_does_not_wait_for_the_drain(served):
    status, events = served(hangs_at="stop", after=[first_signal, second_signal])
    assert (status, events) == (0, ["start", "stop drain=True", "stop drain=False"])


def test_a_second_signal_behind_the_drain_leaves_the_rest_of_the_stop_alone(served):
    def ends(node, _stop, _again):
        node.never.set_result(None)

    status, events = served(hangs_at="end", after=[first_signal, second_signal, ends])
    assert (status, events) == (0, ["start", "stop drain=True"])


def test_a_signal_ends_a_node_that_still_starts(served):
    status, events = served(hangs_at="start", after=[first_signal])
    assert (status, events) == (0, ["start", "stop drain=False"])


@pytest.mark.parametrize("before", [[], [first_signal]])  # also of a node that drains
def test_a_failed_log_ends_the_process_at_once_with_one_line(served, monkeypatch, capfd, before):
    def exit_(status):
        raise SystemExit(status)

    def fails(node, _stop, _again):
        node.fatal.set_exception(LogWriteFailed("write failed: EIO"))

    monkeypatch.setattr("kvstore.cli.server.os._exit", exit_)
    with pytest.raises(SystemExit) as ended:
        served(hangs_at="stop", after=[*before, fails])
    assert ended.value.code == 1
    assert "error: log_write_failed: write failed: EIO: the disk failed" in capfd.readouterr().err
