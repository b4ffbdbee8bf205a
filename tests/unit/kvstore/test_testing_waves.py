"""Claims of random faults in simulated tests: they come in waves, each of its own, and end with all that they did, and with
nothing else."""

from __future__ import annotations

import asyncio

import pytest

from kvstore import Database
from kvstore.sim import kinds
from kvstore.sim.adapters import WALL_EPOCH_S
from kvstore.testing import SimCluster, seeds, simulate


@pytest.fixture(autouse=True)
def _no_wishes(monkeypatch):
    """What this run of pytest was told is not for these tests."""
    monkeypatch.setattr(seeds, "command_lines", [])
    monkeypatch.delenv("KVORUM_SEED", raising=False)
    monkeypatch.delenv("KVORUM_SEEDS", raising=False)


@simulate(seeds=1, faults=False)
async def test_chaos_comes_in_waves_and_leaves_everything_running(
    cluster: SimCluster, db: Database
) -> None:
    async with cluster.chaos("crash", "partition", mean_s=0.05):
        for number in range(10):
            await db.put(b"n", b"%d" % number)
            await asyncio.sleep(0.5)
    assert cluster.running == cluster.nodes
    assert any("crash" in line for line in cluster.story())
    assert await db.get(b"n", timeout=5.0) == b"9"


@simulate(seeds=1, faults=False)
async def test_each_wave_is_another(cluster: SimCluster) -> None:
    """`mean_s` 1: a wave of ten seconds, and five of peace."""

    def told() -> list[str]:
        return [line.partition(" s  ")[2] for line in cluster.story() if " fault " in line]

    cluster.begin_chaos(("break",), mean_s=1.0, waves=2)
    await asyncio.sleep(12.0)
    first = told()
    await asyncio.sleep(15.0)
    second = told()[len(first) :]
    assert min(len(first), len(second)) > 3
    assert first[:4] != second[:4]


@simulate(seeds=1, faults=False)
async def test_waves_that_are_over_leave_nothing_in_the_cluster(cluster: SimCluster) -> None:
    inner = cluster._cluster()

    def attached() -> list[int]:
        looks = [len(server.machine.on_io) for server in inner.servers.values()]
        return [*looks, len(inner.on_open), len(inner.on_failure)]

    before = attached()
    cluster.begin_chaos(("crash",), mean_s=0.01, waves=3)
    await asyncio.sleep(20.0)
    async with cluster.chaos("crash", mean_s=0.01):
        await asyncio.sleep(7.0)
    assert attached() == before


@simulate(seeds=3, faults=False)
async def test_at_the_end_of_a_wave_every_fault_of_it_ends(
    cluster: SimCluster, db: Database
) -> None:
    cluster.begin_chaos(("pause", "blackout"), mean_s=0.02, hold_s=1000.0)  # 8 s each by themselves
    await asyncio.sleep(1.0)
    assert cluster.running == cluster.nodes
    await db.put(b"k", b"1", timeout=5.0)


@simulate(seeds=2, faults=False)
async def test_clocks_go_wrong_on_nodes_alone_and_go_right_after_the_wave(
    cluster: SimCluster,
) -> None:
    """By a timer that drifts, `asyncio.sleep(1.0)` would end before a second has passed on the loop's clock."""
    inner, loop = cluster._cluster(), asyncio.get_running_loop()
    machines = [server.machine for server in inner.servers.values()]

    async def rests(_own: Database | None = None) -> float:
        wrong = 0.0
        for _ in range(20):
            began = loop.time()
            await asyncio.sleep(1.0)
            wrong = max(wrong, abs(loop.time() - began - 1.0))
        return wrong

    await cluster.connect()  # of this process, as `test`
    worker = await cluster.spawn(rests)
    cluster.begin_chaos(("drift", "wall_jump"), mean_s=0.4)
    assert max(await rests(), await worker.wait()) < 1e-5
    assert all(any(kind in line for line in cluster.story()) for kind in ("drift", "wall_jump"))
    before = [machine.monotonic() for machine in machines]
    await asyncio.sleep(10.0)
    after = [machine.monotonic() for machine in machines]
    assert [b - a for a, b in zip(before, after, strict=True)] == pytest.approx([10.0] * 3, 1e-6)
    now_ms = int((WALL_EPOCH_S + loop.time()) * 1000)
    assert [machine.wall_ms() for machine in machines] == [now_ms] * 3
    cluster.begin_chaos(("drift", "wall_jump"), mean_s=0.1)
    await asyncio.sleep(1.0)
    assert [machine.wall_ms() for machine in machines] != [now_ms + 1000] * 3
    await cluster.recover()
    now_ms = int((WALL_EPOCH_S + loop.time()) * 1000)
    assert [machine.wall_ms() for machine in machines] == [now_ms] * 3


def test_random_faults_that_die_are_not_taken_for_their_end(monkeypatch):
    def broken(_fault: kinds.Kinds) -> None:
        raise LookupError("a fault that fails")

    monkeypatch.setattr("kvstore.sim.faults.KINDS", {**kinds.KINDS, "break": broken})

    @simulate(seeds=1, faults=False)
    async def recovers(cluster: SimCluster) -> None:
        cluster.begin_chaos(("break",), mean_s=0.01)
        await asyncio.sleep(1.0)
        await cluster.recover()

    with pytest.raises(LookupError, match="a fault that fails"):
        recovers()


@simulate(seeds=2, faults=("crash", "pause", "partition", "slow_path", "client_pause"))
async def test_what_the_test_did_by_name_outlasts_random_faults(
    cluster: SimCluster, db: Database
) -> None:
    async def forever(own: Database) -> None:
        while True:
            await own.increment(b"n")

    await cluster.spawn(forever, "teller")
    other = await cluster.connect("other", timeout_s=2.0)
    cluster.kill("n3")
    cluster.partition("other")
    cluster.slow("test", delay_s=(0.3, 0.4))
    cluster.pause("teller")
    before = await db.get(b"n")
    await asyncio.sleep(11.0)  # the wave has ended
    assert cluster.running == ["n1", "n2"]
    began = asyncio.get_running_loop().time()
    assert await db.get(b"n") == before
    assert asyncio.get_running_loop().time() - began > 0.5
    with pytest.raises(TimeoutError):
        await other.get(b"k")
    cluster.heal()
    cluster.resume("teller")
    await cluster.restart("n3")
    await other.get(b"k", timeout=20.0)
    await asyncio.sleep(1.0)
    assert await db.get(b"n") != before
    assert cluster.running == cluster.nodes


@simulate(seeds=1, faults=False)
async def test_recover_undoes_what_was_done_by_name(cluster: SimCluster, db: Database) -> None:
    cluster.kill("n1")
    cluster.pause("n2")
    cluster.partition("test")
    cluster.slow("n3")
    await cluster.recover()
    assert cluster.running == cluster.nodes
    await db.put(b"k", b"1", timeout=10.0)
    cluster.partition("n1", "n2")  # the next is an ordinary one again
    cluster.heal()
    await db.put(b"k", b"2", timeout=5.0)
