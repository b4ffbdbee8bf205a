"""Claims about what is seen: whatever goes wrong in a simulated cluster becomes a problem of its seed.

Exceptions of the product that nobody looked at, records that it logs as errors, codes that no fault explains, nodes that
stop for no good reason, and a cluster that does not serve when it must.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from kvstore import connections, logs, streams
from kvstore.client import Database
from kvstore.config import NodeConfig, TxnSection
from kvstore.errors import CODES, KVError, NoQuorum, OutcomeExpired, SnapshotTooOld
from kvstore.router import Router
from kvstore.sim import loop as simulated
from kvstore.sim import scenario
from kvstore.sim.cluster import SimCluster
from kvstore.sim.scenario import Options, Result, run
from kvstore.testing.history import TxnOp
from kvstore.testing.simulation import SimulationFailed, simulate
from kvstore.testing.workloads import WORKLOADS
from kvstore.testing.workloads.base import FORESEEN, TOO_OLD
from kvstore.transactions import Transaction

SHORT = Options(seconds=3.0, clients=2, ops=10, faults=False)


def told(result: Result, text: str) -> bool:
    return any(text in problem for problem in result.problems)


def failing(method: Callable[..., Any], times: int, after: int = 100) -> Callable[..., Any]:
    """The method, of which some calls raise what nobody foresaw."""
    calls = 0

    def called(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if after < calls <= after + times:
            raise KeyError("planted")
        return method(*args, **options)

    return called


@pytest.mark.parametrize("owner", [Router, connections.ClientConnection])
def test_an_exception_while_a_message_is_handled_is_a_problem_of_the_seed(
    monkeypatch: pytest.MonkeyPatch, owner: Any
) -> None:
    name = "_on_message" if owner is Router else "on_message"
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), times=2))
    result = run(3, SHORT)
    assert [each for each in result.problems if "KeyError('planted')" in each]


def test_it_is_one_although_its_process_is_killed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    on_message = connections.ClientConnection.on_message
    monkeypatch.setattr(connections.ClientConnection, "on_message", failing(on_message, times=1))
    options = Options(seconds=6.0, clients=2, ops=20, kinds=("blackout",), mean_s=1.0)
    result = run(3, options)
    assert result.faults["blackout"]
    assert told(result, "KeyError('planted')")


def test_what_kvorum_logs_as_an_error_is_a_problem_of_the_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody foresaw why a peer's link, or a client's dial, failed: it is done again, and the record alone tells."""
    attend = failing(streams.PeerLink._attend, times=1, after=2)
    monkeypatch.setattr(streams.PeerLink, "_attend", attend)
    assert told(run(3, SHORT), "logged: link failed unexpectedly address='n")
    monkeypatch.undo()
    dial = failing(Database._dial, times=1, after=2)
    monkeypatch.setattr(Database, "_dial", dial)
    result = run(3, SHORT)
    assert told(result, "logged: dial failed unexpectedly address='n")
    assert told(result, "KeyError('planted')"), "with what it was"


def test_a_failure_whose_process_dies_at_once_is_nobodys() -> None:
    """Who waits for the task dies with it, before he could learn of it."""

    async def main(loop: simulated.SimLoop) -> list[BaseException]:
        cluster = SimCluster("1")
        await cluster.start()
        client = await cluster.client("c")

        async def fails() -> None:
            raise KeyError("planted")

        tasks = [client.process.spawn(fails()) for _ in range(2)]
        await asyncio.sleep(0.1)
        cluster.crash_client(client.name)
        assert len(tasks) == 2
        assert cluster.problems == []
        return loop.unseen()

    assert simulated.run(main, 1, time_limit_s=60.0) == []


def test_a_test_of_a_user_fails_for_a_task_of_a_node_and_for_a_logged_error() -> None:
    @simulate(seeds=1, faults=False)
    async def passes_with_a_node_that_does_not(cluster: Any) -> None:
        async def fails() -> None:
            raise KeyError("planted")

        process = cluster._cluster().servers["n1"].process
        passes_with_a_node_that_does_not.task = process.spawn(fails())  # type: ignore[attr-defined]
        await asyncio.sleep(0.1)

    with pytest.raises(SimulationFailed, match="planted"):
        passes_with_a_node_that_does_not()

    @simulate(seeds=1)
    async def passes_and_logs() -> None:
        logs.logger("kvstore.somewhere").error("this is wrong", address="n1")

    with pytest.raises(SimulationFailed, match="this is wrong address='n1'"):
        passes_and_logs()


@pytest.mark.parametrize("workload", ["bank", "exactly-once"])
def test_a_failure_that_no_fault_explains_is_a_problem_with_its_code(
    monkeypatch: pytest.MonkeyPatch, workload: str
) -> None:
    async def refused(_tx: Transaction, **_: Any) -> int:
        raise KVError("planted", code="internal_error")

    commit = Transaction.commit
    calls = 0

    async def sometimes(tx: Transaction, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return await (commit(tx, **options) if calls % 4 else refused(tx))

    monkeypatch.setattr(Transaction, "commit", sometimes)
    result = run(3, replace(SHORT, workloads=(workload,)))
    assert told(result, f"Unforeseen: {workload}: internal_error: ")
    assert result.failed or workload == "exactly-once", "where it is tried again, none need fail"


def test_what_is_kept_for_seconds_may_be_too_old_and_what_is_kept_for_long_may_not() -> None:
    error = SnapshotTooOld()
    for foreseen, problems in ((set(FORESEEN), 1), ({*FORESEEN, *TOO_OLD}, 0)):
        workload = WORKLOADS["bank"](random.Random(1), [b"a/"])
        workload.foreseen = foreseen
        workload.settle(TxnOp("c", b"look", 1), error, "look")
        assert len(workload.problems) == problems
    assert {*FORESEEN, *TOO_OLD} <= set(CODES)


def test_a_cluster_that_reads_and_does_not_write_in_peace_is_a_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put = Database.put

    async def refused_at_the_end(db: Database, key: bytes, *rest: Any, **options: Any) -> int:
        if key.startswith(b"s/peace/"):
            raise NoQuorum("planted")
        return await put(db, key, *rest, **options)

    monkeypatch.setattr(Database, "put", refused_at_the_end)
    result = run(3, SHORT)
    assert told(result, "in peace a new client is not served: NoQuorum('planted')")
    assert not result.finished


def test_an_exception_that_ends_the_run_leaves_a_verdict_and_what_was_found_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fails(self: scenario._Scenario, _name: str, _where: str) -> bool:
        self._cluster.problem("found before")
        raise TypeError("a mistake of a client")

    monkeypatch.setattr(scenario._Scenario, "_served", fails)
    result = run(1, replace(SHORT, ops=2))
    assert told(result, "found before")
    assert told(result, "TypeError: a mistake of a client")
    assert result.digest


@pytest.mark.parametrize(("retention_s", "seen"), [(3.0, False), (600.0, True)])
def test_a_new_client_is_told_that_its_write_is_too_old_only_where_that_may_be(
    monkeypatch: pytest.MonkeyPatch, retention_s: float, seen: bool
) -> None:
    """Seed 3324: an election took as long as the seed kept outcomes, and the client was right to be told so."""
    write, calls = scenario._write_and_read, 0

    async def expired_once(database: Database, keys: Sequence[bytes]) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OutcomeExpired
        await write(database, keys)

    monkeypatch.setattr(scenario, "_write_and_read", expired_once)
    config = NodeConfig(txn=TxnSection(retention_s=retention_s))
    result = run(1, replace(SHORT, ops=2, config=config))
    assert told(result, "is not served: OutcomeExpired") == seen
    assert bool(result.problems) == seen
