"""Claims of `@simulate`: one seed is one run, the first that fails is named and plays again alone, the test runs as a process
beside real faults, other arguments stay pytest's, and what the real world has is refused."""

from __future__ import annotations

import asyncio
import logging
import traceback
import unittest
import uuid

import pytest
from _pytest.outcomes import Skipped

from kvstore import Database, logs
from kvstore.errors import KVError
from kvstore.sim.loop import SimError, SimTimeout
from kvstore.sim.process import PROCESS, ProcessDied
from kvstore.testing import FAULTS, SimCluster, SimulationFailed, seeds, simulate
from kvstore.testing.seeds import Wish, chosen, replay_line


@pytest.fixture(autouse=True)
def _no_wishes(monkeypatch):
    """What this run of pytest was told is not for these tests."""
    monkeypatch.setattr(seeds, "command_lines", [])
    monkeypatch.delenv("KVORUM_SEED", raising=False)
    monkeypatch.delenv("KVORUM_SEEDS", raising=False)


@pytest.fixture
def number() -> int:
    return 5


def note_of(error: BaseException) -> str:
    return "\n".join(error.__notes__)


# --- seeds ----------------------------------------------------------------------------------------


def test_it_stops_at_the_first_seed_that_fails_and_names_it():
    played: list[int] = []

    @simulate(seeds=10, faults=False)
    async def fails(cluster: SimCluster) -> None:
        played.append(cluster.seed)
        assert cluster.seed < 4

    with pytest.raises(AssertionError) as caught:
        fails()
    assert played == [1, 2, 3, 4]
    note = note_of(caught.value)
    assert "seed 4 fails" in note
    assert "::test_it_stops_at_the_first_seed_that_fails_and_names_it --kvorum-seed 4" in note


def test_the_traceback_begins_in_the_test():
    @simulate(seeds=1, faults=False)
    async def fails(db: Database) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        fails()
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert frames[-1] == "fails"
    assert len(frames) == 3  # this test, the decorator, the test


def test_the_command_line_goes_over_the_environment_and_that_over_the_test(monkeypatch):
    assert chosen(3, {}) == [1, 2, 3]
    assert chosen((7, 3), {"KVORUM_SEEDS": "2"}) == [7, 3]
    assert chosen(3, {"KVORUM_SEEDS": "2"}) == [1, 2]
    assert chosen((7, 3), {"KVORUM_SEEDS": "2", "KVORUM_SEED": "9"}) == [9]
    monkeypatch.setattr(seeds, "command_lines", [Wish(seed=4), Wish(seeds=1)])
    assert chosen(3, {"KVORUM_SEEDS": "2"}) == [1]
    monkeypatch.setattr(seeds, "command_lines", [Wish(seed=4)])
    assert chosen(3, {"KVORUM_SEED": "9"}) == [4]
    monkeypatch.setattr(seeds, "command_lines", [])
    with pytest.raises(ValueError, match="no seeds"):
        chosen((), {"KVORUM_SEEDS": "2"})
    for wrong in ({"KVORUM_SEED": "x"}, {"KVORUM_SEEDS": "0"}):
        with pytest.raises(ValueError, match="seeds|number"):
            chosen(3, wrong)


def test_without_pytest_the_environment_plays_a_seed_again():
    assert replay_line(4, {}) == "set KVORUM_SEED=4 and run the same again"
    line = replay_line(4, {"PYTEST_CURRENT_TEST": "a/test_b.py::test_c[x y] (call)"})
    assert line == "pytest 'a/test_b.py::test_c[x y]' --kvorum-seed 4"


def test_one_seed_is_one_run_and_two_are_two():
    def fingerprint(seed: int) -> list[str]:
        seen: list[str] = []

        @simulate(seeds=[seed])
        async def test(cluster: SimCluster, db: Database) -> None:
            async def add() -> None:
                await asyncio.sleep(cluster.rng.random())
                await db.put(uuid.uuid4().bytes, b"%d" % cluster.rng.randrange(100))

            await asyncio.gather(*(add() for _ in range(10)))
            await cluster.recover()
            seen.extend((cluster.fingerprint(), *cluster.story()))

        test()
        return seen

    first = fingerprint(3)
    ballast = [bytearray(1000 + each) for each in range(5_000)]  # other addresses
    assert fingerprint(3) == first
    assert fingerprint(4) != first
    assert ballast


# --- around it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", ["a", "b"])
@simulate(seeds=2, faults=False)
async def test_fixtures_and_parameters_stay_pytests(
    db: Database, number: int, letter: str, cluster: SimCluster
) -> None:
    assert number == 5
    assert letter in {"a", "b"}
    assert await db.get(letter.encode()) is None
    await db.put(letter.encode(), b"each seed has its own cluster")
    assert len(cluster.nodes) == 3


class TestMethods:
    @simulate(seeds=2, faults=False, nodes=1, splits=())
    async def test_a_method_is_played_too(self, db: Database, number: int) -> None:
        assert isinstance(self, TestMethods)
        assert number == 5
        await db.put(b"k", b"v")


class TestOfUnittest(unittest.TestCase):
    @simulate(seeds=1, faults=False)
    async def test_and_one_of_unittest(self, db: Database) -> None:
        await db.put(b"k", b"v")
        self.assertEqual(await db.get(b"k"), b"v")  # noqa: PT009


@simulate
async def test_without_a_cluster_there_is_virtual_time_alone() -> None:
    await asyncio.sleep(100.0)


@simulate(seeds=2)
async def test_a_test_may_make_clusters_of_its_own() -> None:
    async with SimCluster(nodes=1) as one, SimCluster(nodes=2, splits=()) as two:
        first, second = await one.connect(), await two.connect()
        await first.put(b"k", b"1")
        assert await second.get(b"k") is None
        assert one.seed == two.seed


def test_what_is_skipped_is_skipped_and_makes_no_sense_is_refused():
    @simulate
    async def skips(db: Database) -> None:
        pytest.skip("for a reason")

    with pytest.raises(Skipped) as caught:
        skips()
    assert not hasattr(caught.value, "__notes__")
    with pytest.raises(TypeError, match="async def"):
        simulate(lambda: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="no fault 'fire'"):
        simulate(faults=["fire"])
    with pytest.raises(SimError, match="@simulate"):
        asyncio.run(SimCluster().start())

    async def calls() -> None:
        skips()

    with pytest.raises(SimError, match="its own event loop"):
        asyncio.run(calls())


@pytest.mark.parametrize(
    ("name", "decorate"),
    [
        ("faults", simulate(faults=["crash"])),
        ("nodes", simulate(nodes=5)),
        ("splits", simulate(splits=[])),
        ("call_timeout_s", simulate(call_timeout_s=1.0)),
    ],
)
def test_what_would_be_ignored_without_a_cluster_is_refused(name, decorate):
    async def test() -> None: ...

    with pytest.raises(TypeError, match=f"{name}= is .*neither `cluster` nor `db`"):
        decorate(test)


@pytest.mark.parametrize("wanted", [False, True])
def test_nodes_log_to_nobody_but_who_has_set_a_level(wanted, caplog):
    @simulate(seeds=1, faults=False)
    async def test(db: Database) -> None:
        logs.logger("kvstore.node").warning("as a node would")

    if wanted:
        caplog.set_level(logging.WARNING, "kvstore")
    test()
    heard = [each for each in caplog.records if each.getMessage() == "as a node would"]
    assert len(heard) == wanted


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_test_that_never_ends_is_told_where_it_waits():
    @simulate(seeds=1, timeout_s=30)
    async def waits(db: Database) -> None:
        await asyncio.Event().wait()

    with pytest.raises(SimTimeout, match="no end within 30 virtual seconds") as caught:
        waits()
    outer, inner = caught.value.args[0].splitlines()[1:]
    assert outer.endswith("in test_a_test_that_never_ends_is_told_where_it_waits.<locals>.waits")
    assert inner.endswith("in Event.wait")


def test_a_task_that_fails_unseen_fails_the_test():
    async def broken() -> None:
        raise KeyError("unseen")

    @simulate(seeds=1, faults=False)
    async def passes(db: Database) -> None:
        task = asyncio.create_task(broken())
        await asyncio.sleep(1.0)
        del task

    with pytest.raises(SimulationFailed, match="unseen"):
        passes()

    @simulate(seeds=1)
    async def passes_without_a_cluster() -> None:
        task = asyncio.create_task(broken())
        await asyncio.sleep(1.0)
        del task

    with pytest.raises(SimulationFailed, match="unseen"):
        passes_without_a_cluster()


def test_a_task_that_fails_unseen_and_is_still_kept_fails_the_test():
    class Owner:
        """Its task's exception keeps the frame, that its owner, and that the task."""

        def __init__(self) -> None:
            self.task = asyncio.create_task(self.work())

        async def work(self) -> None:
            raise KeyError("unseen")

    kept: list[asyncio.Task[None]] = []

    @simulate(seeds=1)
    async def passes_with_a_cycle() -> None:
        Owner()
        await asyncio.sleep(1.0)

    @simulate(seeds=1, faults=False)
    async def passes_and_keeps(db: Database) -> None:
        kept.append(Owner().task)
        await asyncio.sleep(1.0)

    @simulate(seeds=1, faults=False)
    async def passes_beside_another_process(cluster: SimCluster) -> None:
        async def leaves(own: Database) -> None:
            Owner()
            await asyncio.sleep(1.0)

        await (await cluster.spawn(leaves)).wait()

    for test in (passes_with_a_cycle, passes_and_keeps, passes_beside_another_process):
        with pytest.raises(SimulationFailed, match="unseen"):
            test()
    assert kept


@simulate(seeds=1)
async def test_a_task_whose_failure_was_seen_may_be_kept() -> None:
    async def broken() -> None:
        raise KeyError("seen")

    task = asyncio.create_task(broken())
    with pytest.raises(KeyError, match="seen"):
        await task
    test_a_task_whose_failure_was_seen_may_be_kept.task = task  # type: ignore[attr-defined]


def test_a_process_that_fails_unseen_fails_the_test():
    async def broken(own: Database) -> None:
        raise KeyError("unseen")

    @simulate(seeds=1, faults=False)
    async def passes(cluster: SimCluster) -> None:
        await cluster.spawn(broken)
        await asyncio.sleep(1.0)

    with pytest.raises(KeyError, match="unseen"):
        passes()


def test_a_process_that_fails_after_its_waiter_gave_up_fails_the_test():
    async def broken(own: Database) -> None:
        await asyncio.sleep(2.0)
        raise KeyError("unseen")

    @simulate(seeds=1, faults=False)
    async def gives_up(cluster: SimCluster) -> None:
        worker = await cluster.spawn(broken)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(worker.wait(), 1.0)
        await asyncio.sleep(2.0)

    @simulate(seeds=1, faults=False)
    async def waits(cluster: SimCluster) -> None:
        worker = await cluster.spawn(broken)
        with pytest.raises(KeyError, match="unseen"):
            await worker.wait()

    with pytest.raises(KeyError, match="unseen"):
        gives_up()
    waits()


def test_a_process_that_fails_with_the_death_of_another_fails_the_test():
    """Its own death is no failure."""

    async def forever(own: Database) -> None:
        await asyncio.sleep(1000.0)

    @simulate(seeds=1, faults=False)
    async def passes(cluster: SimCluster) -> None:
        async def waits(own: Database) -> None:
            await (await cluster.spawn(forever, "short-lived")).wait()

        await cluster.spawn(waits)
        await asyncio.sleep(1.0)
        cluster.kill("short-lived")
        await asyncio.sleep(1.0)

    with pytest.raises(ProcessDied, match="short-lived"):
        passes()


def test_what_starts_side_by_side_has_names_of_its_own_and_is_known():
    names: list[str] = []

    async def first_fails(own: Database) -> None:
        names.append("")
        if len(names) == 1:
            raise KeyError("unseen")

    @simulate(seeds=1, faults=False)
    async def passes(cluster: SimCluster) -> None:
        workers = await asyncio.gather(*(cluster.spawn(first_fails) for _ in range(3)))
        clients = await asyncio.gather(cluster.connect(), cluster.connect())
        cluster.partition(cluster.nodes)  # from everybody else
        for client in clients:
            with pytest.raises(KVError):
                await client.get(b"k", timeout=1.0)
        with pytest.raises(ValueError, match="there is a 'mine' already"):
            await asyncio.gather(cluster.connect("mine"), cluster.connect("mine"))
        names[:] = [worker.name for worker in workers]

    with pytest.raises(KeyError, match="unseen"):
        passes()
    assert names == ["worker1", "worker2", "worker3"]


def test_every_fault_has_its_effect_somewhere_and_the_note_tells_of_it():
    @simulate(seeds=2, faults=FAULTS)
    async def fails(cluster: SimCluster, db: Database) -> None:
        async def forever(own: Database) -> None:
            while True:
                await own.increment(b"n")

        await cluster.spawn(forever)
        await asyncio.sleep(5.0)
        assert cluster.seed != 2

    with pytest.raises(AssertionError) as caught:
        fails()
    note = note_of(caught.value)
    assert "What was done to the cluster" in note
    assert "fault" in note
    assert "crash" in note


# --- faults by name -------------------------------------------------------------------------------


@simulate(seeds=2, faults=False)
async def test_a_killed_leader_is_followed_by_another_and_comes_back(
    cluster: SimCluster, db: Database
) -> None:
    await db.put(b"m", b"1")
    leader = cluster.leader_of(b"m")
    assert leader is not None
    cluster.kill(leader, power=True)
    assert leader not in cluster.running
    assert await db.get(b"m") == b"1"
    assert cluster.leader_of(b"m") not in {leader, None}
    await cluster.restart(leader)
    assert cluster.running == cluster.nodes


@simulate(seeds=2, faults=False)
async def test_a_partition_is_felt_until_it_is_healed(cluster: SimCluster, db: Database) -> None:
    other = await cluster.connect("other", timeout_s=2.0)
    cluster.partition("other")
    with pytest.raises(TimeoutError):
        await other.get(b"k")
    await db.put(b"k", b"1")
    cluster.heal()
    assert await other.get(b"k", timeout=20.0) == b"1"
    cluster.partition(["n1", "n2"], ["test", "n3"], one_way=True)
    cluster.slow("n3")
    await cluster.recover()
    assert await db.get(b"k") == b"1"


@simulate(seeds=1, faults=False)
async def test_nobody_is_not_everybody_else(cluster: SimCluster, db: Database) -> None:
    cluster.partition(cluster.nodes, [])
    cluster.slow(cluster.nodes, [], delay_s=(5.0, 5.0))
    cluster.partition([], "test")
    for client in (db, await cluster.connect()):
        await client.get(b"k", timeout=2.0)


@simulate(seeds=2, faults=False)
async def test_everybody_else_is_also_who_comes_later(cluster: SimCluster, db: Database) -> None:
    """Of a partition, and of a slow network: clients, and processes that take the place of one that was killed."""

    async def takes(own: Database) -> float:
        began = asyncio.get_running_loop().time()
        await own.get(b"k")
        return asyncio.get_running_loop().time() - began

    cluster.slow(cluster.nodes[:1], delay_s=(0.3, 0.4))
    cluster.slow(cluster.nodes, delay_s=(0.2, 0.3))
    late = await cluster.connect("late")
    assert await takes(late) > 0.4
    cluster.heal()
    cluster.partition(cluster.nodes)
    cluster.slow(cluster.nodes)
    connecting = asyncio.create_task(cluster.connect())
    spawning = asyncio.create_task(cluster.spawn(takes))
    await asyncio.wait([connecting, spawning], timeout=20.0)
    assert not connecting.done()
    assert not spawning.done()
    cluster.heal()
    last, worker = await connecting, await spawning
    await last.put(b"k", b"1")
    assert await takes(last) < 0.3
    await worker.wait()
    assert await takes(await cluster.connect()) < 0.3


@simulate(seeds=2, faults=False)
async def test_who_comes_later_is_cut_off_one_way_or_not_at_all_as_it_was_said(
    cluster: SimCluster, db: Database
) -> None:
    cluster.partition("test", one_way=True)
    cluster.partition("n1", "n2", one_way=True)
    network, nodes = cluster._cluster().network, cluster.nodes
    late = await cluster.connect("late")  # the majority is whole, for it
    host = cluster._names["late"]
    assert network.blocked_until("test.1", host) == float("inf")
    assert network.blocked_until(host, "test.1") == 0.0
    assert [network.blocked_until(node, host) for node in nodes] == [0.0, 0.0, 0.0]
    await late.put(b"k", b"1")


@simulate(seeds=2, faults=False)
async def test_a_slow_network_takes_its_time_until_it_is_healed(
    cluster: SimCluster, db: Database
) -> None:
    async def took() -> float:
        began = asyncio.get_running_loop().time()
        await db.get(b"k")
        return asyncio.get_running_loop().time() - began

    await took()
    cluster.slow("test", delay_s=(0.3, 0.4))
    assert await took() > 0.5
    cluster.heal()
    await took()
    assert await took() < 0.5


@simulate(seeds=1, faults=False)
async def test_a_spawned_process_is_its_own_and_dies_without_finally(
    cluster: SimCluster, db: Database
) -> None:
    cleaned: list[str] = []
    mine = PROCESS.get()

    async def forever(own: Database) -> None:
        assert PROCESS.get() is not mine
        try:
            while True:
                await own.increment(b"n")
        finally:
            cleaned.append("up")

    async def sums(own: Database) -> int:
        return int(await own.get(b"n", b"0"))

    worker = await cluster.spawn(forever, "teller")
    await asyncio.sleep(1.0)
    cluster.pause("teller")
    await asyncio.sleep(0.5)
    before = await db.get(b"n")
    await asyncio.sleep(1.0)
    assert await db.get(b"n") == before
    cluster.resume("teller")
    await asyncio.sleep(1.0)
    assert await db.get(b"n") != before
    assert worker.running
    cluster.kill("teller")
    assert not worker.running
    await asyncio.sleep(1.0)
    assert cleaned == []
    assert await (await cluster.spawn(sums)).wait() == int(await db.get(b"n", b"0"))


@simulate(seeds=2)
async def test_names_that_nobody_has_are_refused(cluster: SimCluster) -> None:
    for wrong in (
        lambda: cluster.kill("n9"),
        lambda: cluster.kill("test"),
        lambda: cluster.pause("nobody"),
        lambda: cluster.partition("n1", "nobody"),
        lambda: cluster.slow(["n1", "nobody"]),
    ):
        with pytest.raises(ValueError, match="n9|test|nobody"):
            wrong()
    with pytest.raises(ValueError, match="there is a 'test' already"):
        await cluster.connect("test")
    with pytest.raises(ValueError, match="no node"):
        await cluster.restart("test")


@simulate(seeds=5, faults=False)
async def test_when_it_has_started_every_range_has_a_leader(cluster: SimCluster) -> None:
    """The system's own, too, before and behind those of the splits."""
    inner = cluster._cluster()
    hosts = [server.node.host for server in inner.running() if server.node is not None]
    groups = dict.fromkeys(group for host in hosts if host is not None for group in host.groups())
    assert len(groups) == len(inner.splits) + 3
    assert [group for group in groups if inner.leader_of(group) is None] == []
