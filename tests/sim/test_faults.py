"""Claims of the faults: each kind does what it says, ends, and leaves a cluster that serves.

The bugs that these faults have shown are here by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from kvstore.errors import KVError, StorageError
from kvstore.holds import LEASE_S
from kvstore.sim import loop as simulated
from kvstore.sim.adapters import DRIFT_MAX, QUICK_S
from kvstore.sim.cluster import SimCluster
from kvstore.sim.core import NEVER
from kvstore.sim.faults import RARE_SHARE, SHARE, Nemesis
from kvstore.sim.kinds import APART, FAULT_S_MAX, KINDS, RARE, Trap, drawn_apart
from kvstore.sim.messages import Astray
from kvstore.sim.process import ProcessDied
from kvstore.sim.scenario import Options, run
from tests.sim.harmed import World, play, with_sync
from tests.sim.plants import planted
from tests.sim.plants.base import first_of


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_says_what_it_does_and_after_it_the_cluster_serves(kind: str) -> None:
    async def test(world: World) -> None:
        for server in world.cluster.servers.values():
            server.machine.directory.flushed()  # rot is of what is
        for number in range(1, 4):
            world.inflict(kind, number)
            try:
                await asyncio.wait_for(world.write(2, 3.0), 4.0)
            except (KVError, TimeoutError, RuntimeError):
                pass  # it was in the way, or the client is dead
        assert world.nemesis.counts[kind] >= 1
        assert all(fault.details for fault in world.nemesis.happened.values())
        await world.nemesis.heal()
        world.client = await world.cluster.client("after")
        await world.write(3)

    play(test)


@pytest.mark.parametrize("kind", ["pause", "pause_leader", "client_pause"])
def test_some_pauses_are_longer_than_every_lease(kind: str) -> None:
    async def test(world: World) -> None:
        leases_s = (LEASE_S, world.cluster.config.txn.lock_lease_s)
        lasted: list[float] = []
        for number in range(1, 61):
            name, _, rest = world.inflict(kind, number).partition(" for ")
            lasted.append(float(rest.removesuffix(" s")))
            world.cluster.resume(name)
        long = [seconds for seconds in lasted if seconds > FAULT_S_MAX]
        assert 4 <= len(long) <= 16
        assert min(long) > (1.0 + 2 * DRIFT_MAX) * max(leases_s)

    play(test)


def test_a_pause_lasts_until_the_last_of_those_that_overlap_is_over() -> None:
    async def test(world: World) -> None:
        def is_paused() -> bool:
            process = world.cluster.servers["n2"].process
            assert process is not None
            return process.paused

        world.nemesis.pause("n2", 12.0)
        world.nemesis.pause("n2", 3.0)
        await asyncio.sleep(11.9)
        assert is_paused()
        await asyncio.sleep(0.2)
        assert not is_paused()
        world.nemesis.pause("n2", 12.0)
        world.cluster.crash("n2", power=False)
        await world.cluster.restart("n2")
        world.nemesis.pause("n2", 3.0)
        await asyncio.sleep(3.1)
        assert not is_paused()  # what was paused for longer has died

    play(test)


@pytest.mark.parametrize(
    "kind", ["crash", "crash_leader", "blackout", "crash_at_io", "crash_at_step"]
)
def test_who_is_killed_comes_back_by_itself(kind: str) -> None:
    async def test(world: World) -> None:
        boots = [server.machine.boots for server in world.cluster.servers.values()]
        world.inflict(kind)
        await world.write(5)
        await asyncio.sleep(15.0)
        assert all(server.running for server in world.cluster.servers.values())
        assert boots != [server.machine.boots for server in world.cluster.servers.values()]

    play(test)


ARMED = {  # kind -> what it says if it waits for its moment
    "crash": "once it has",
    "crash_at_io": "at its call",
    "crash_at_step": "at its step",
    "commit_crash": "of its next commit",
    "sync_fails": "",
    "read_fails": "at the next start",
}


@pytest.mark.parametrize("kind", ARMED)
def test_what_is_armed_has_gone_off_when_its_moment_came_and_not_before(kind: str) -> None:
    async def test(world: World) -> None:
        number = 1
        while ARMED[kind] not in world.inflict(kind, number):
            number += 1
        assert world.nemesis.armed == {number: kind}
        assert world.nemesis.in_vain() == {kind: 1}
        for _ in range(100):
            if not world.nemesis.armed:
                break
            with contextlib.suppress(ProcessDied):
                await world.write(1)
        assert world.nemesis.in_vain() == {}
        await world.nemesis.heal()

    play(test)


@pytest.mark.parametrize("kind", ["crash_at_io", "crash_at_step", "commit_crash", "sync_fails"])
def test_what_peace_disarms_has_come_to_nothing(kind: str) -> None:
    async def test(world: World) -> None:
        world.inflict(kind)
        await world.nemesis.heal()
        await world.write(20)
        assert world.nemesis.counts == world.nemesis.in_vain() == {kind: 1}

    play(test)


def test_two_that_do_harm_at_once_keep_their_own_traps() -> None:
    async def test(world: World) -> None:
        other = Nemesis(world.cluster, random.Random(2), wave=1)
        world.nemesis.traps["n1"] = Trap(1, False, "")
        other.traps["n2"] = Trap(1, False, "")
        await world.write(3)
        assert not world.nemesis.traps
        assert not other.traps
        for nemesis in (world.nemesis, other):
            await nemesis.heal()
        other.leave()
        world.nemesis.traps["n1"] = Trap(1, False, "")
        await world.write(3)
        assert not world.nemesis.traps
        await world.cluster.restart("n1")

    play(test)


@pytest.mark.parametrize("mode", ["inline", "auto", "thread"])
def test_nothing_is_acknowledged_before_slow_disks_have_synced_it(mode: str) -> None:
    async def test(world: World) -> None:
        leader = world.cluster.leader_of(2)
        assert leader is not None
        for server in world.cluster.servers.values():
            if server is not leader:
                server.machine.call_s = (0.35, 0.4)  # less than an election
        put = world.client.database.put(b"a", b"v")
        began = asyncio.get_running_loop().time()
        await world.client.process.call(put)
        assert asyncio.get_running_loop().time() - began >= 0.35
        for server in world.cluster.servers.values():
            server.machine.call_s = QUICK_S

    play(test, config=with_sync(mode))


@pytest.mark.parametrize("mode", ["inline", "auto", "thread"])
def test_a_leader_whose_sync_takes_longer_than_an_election_is_replaced(mode: str) -> None:
    async def test(world: World) -> None:
        leader = world.cluster.leader_of(2)
        assert leader is not None
        leader.machine.call_s = (8.0, 8.0)
        began = asyncio.get_running_loop().time()
        await world.write(3)
        assert asyncio.get_running_loop().time() - began < 7.0
        after = world.cluster.leader_of(2)
        assert after is not None
        assert after is not leader
        leader.machine.call_s = QUICK_S

    play(test, config=with_sync(mode))


@pytest.mark.parametrize(("number", "call"), [(1, "write"), (3, "flush")])
def test_a_node_whose_engine_fails_stops_and_is_there_again_once_it_works(
    number: int, call: str
) -> None:
    async def test(world: World) -> None:
        name, said, *_ = world.inflict("engine_fails", number).split()
        assert said == call
        server = world.cluster.servers[name]
        directory = server.machine.directory
        boots, errors = server.machine.boots, (directory.write_error, directory.flush_error)
        assert [isinstance(error, StorageError) for error in errors] == [
            call == "write", call == "flush",
        ]  # fmt: skip
        await world.write(10)
        await asyncio.sleep(FAULT_S_MAX + 3.0)
        assert (directory.write_error, directory.flush_error) == (None, None)
        assert server.machine.boots > boots
        assert server.running
        assert server.node is not None
        assert server.node.state == "ready"
        await world.write(3)

    play(test)


@pytest.mark.parametrize("seed", ["1", "2"])
def test_increments_count_once_whatever_becomes_of_their_requests(seed: str) -> None:
    async def test(world: World) -> None:
        requests = world.nemesis.requests
        world.client = await world.cluster.client("patient", 90.0)
        database = world.client.database
        for name in world.cluster.servers:
            requests.set(name, Astray(0.2, 0.5, 0.5, 2.0))
        for _ in range(5):
            for key in (b"an", b"zn"):
                await world.client.process.call(database.increment(key))
            await world.write(1, 90.0)
        assert (
            min(requests.counters[each] for each in ("lost", "unanswered", "doubled", "late")) > 2
        )
        await asyncio.sleep(5.0)  # copies may come yet
        await world.nemesis.heal()
        found = await world.client.process.call(database.get_many((b"an", b"zn")))
        assert found == {b"an": b"5", b"zn": b"5"}

    play(test, seed)


@pytest.mark.parametrize("plant", ["versions forgotten", "resolved part leaves no status"])
def test_copies_of_requests_show_it_if_one_is_evaluated_anew(plant: str) -> None:
    options = Options(
        seconds=5.0, clients=3, ops=20, kinds=("requests_astray",), mean_s=0.7, frozen=NEVER
    )
    assert run(1, options).problems == []
    with planted(plant):
        problems = run(1, options).problems
    assert first_of(("I1", "I5"), problems) is not None


def test_a_request_that_is_on_its_way_when_all_heals_is_asked_again() -> None:
    async def test(world: World) -> None:
        requests, database = world.nemesis.requests, world.client.database
        for name in world.cluster.servers:
            requests.set(name, Astray(0.0, 0.0, 1.0, 3.0))
        process = world.client.process
        put = process.spawn(database.put(b"a", b"late", timeout=20.0))
        await asyncio.sleep(0.05)
        await world.nemesis.heal()
        await put
        assert await process.call(database.get(b"a")) == b"late"
        assert requests.counters["late"] > 0

    play(test)


def test_healing_lets_an_engine_write_and_flush_again() -> None:
    async def test(world: World) -> None:
        for number in range(1, 9):
            world.inflict("engine_fails", number)
        await world.nemesis.heal()
        for server in world.cluster.servers.values():
            directory = server.machine.directory
            assert (directory.write_error, directory.flush_error) == (None, None)
            assert server.running
        await world.write(3)

    play(test)


def test_a_cut_between_two_nodes_leaves_the_third_in_touch_with_both() -> None:
    async def test(world: World) -> None:
        names = list(world.cluster.servers)
        world.inflict("partial")
        network = world.cluster.network
        cut = [(a, b) for a in names for b in names if a != b and network.blocked_until(a, b) > 0.0]
        assert len(cut) in {1, 2}
        assert len({name for path in cut for name in path}) == 2
        assert await world.write(3) < 15.0

    play(test)


def test_a_coordinator_dies_amid_its_commit_and_nothing_stays_undecided() -> None:
    left_undecided = 0
    for number in range(1, 13):

        async def test(world: World, number: int = number) -> None:
            nonlocal left_undecided
            assert world.inflict("commit_crash", number)
            with pytest.raises(ProcessDied):
                await world.write(30)
            left_undecided += undecided(world)
            await asyncio.sleep(10.0)
            assert not undecided(world)

        play(test)
    assert left_undecided >= 3


def test_a_client_that_was_to_die_in_its_next_commit_lives_once_all_is_healed() -> None:
    async def test(world: World) -> None:
        send = world.client.database.router.send
        for number in (1, 2):
            assert world.inflict("commit_crash", number)
        await world.nemesis.heal()
        assert world.client.database.router.send == send
        await world.write(30)
        assert not world.client.dead

    play(test)


def undecided(world: World) -> bool:
    return any(
        any(server.node.status()["transactions"].values())
        for server in world.cluster.running()
        if server.node is not None
    )


# -- damage


@pytest.mark.parametrize("kind", APART)
def test_a_kind_that_is_drawn_apart_has_its_share_of_the_seeds(kind: str) -> None:
    drawn = sum(drawn_apart(str(seed), kind) for seed in range(5_000))
    assert abs(drawn / 5_000 - APART[kind]) < 0.01


def test_a_seed_without_a_kind_that_is_drawn_apart_draws_as_if_there_were_none() -> None:
    """And so does one with it, but for that kind: the same others, how often, and for how long."""

    async def main(_loop: simulated.SimLoop) -> None:
        with_one = 0
        for seed in range(60):
            cluster, rng = SimCluster(str(seed)), random.Random(seed)
            nemesis = Nemesis(cluster, rng)
            twin = random.Random(seed)
            hold_s, mean_s = twin.choice((0.5, 1.5, 3.0, 5.0)), twin.choice((0.3, 0.7, 1.5, 3.0))
            shares = {kind: RARE_SHARE if kind in RARE else SHARE for kind in KINDS}
            together = [kind for kind in KINDS if kind not in APART]
            others = [kind for kind in together if twin.random() < shares[kind]]
            apart = [kind for kind in APART if drawn_apart(cluster.seed, kind)]
            assert (nemesis.hold_s, nemesis.mean_s, nemesis.kinds) == (
                hold_s,
                mean_s,
                others + apart,
            )
            assert rng.random() == twin.random()
            with_one += bool(apart)
        assert 1 <= with_one <= 20

    simulated.run(main, 1)


def test_one_fault_left_out_leaves_the_others_as_they_were() -> None:
    options = Options(seconds=6.0, clients=2, ops=10, mean_s=0.5)
    whole = run(5, options).happened
    assert len(whole) > 6
    dropped = sorted(whole)[3]
    kept = frozenset(whole) - {dropped}
    less = run(5, Options(seconds=6.0, clients=2, ops=10, mean_s=0.5, faults_kept=kept)).happened
    assert dropped not in less
    for number in less:
        if number < dropped:
            assert less[number] == whole[number]
        elif number in whole:
            assert less[number][:2] == whole[number][:2]
    assert run(5, Options(seconds=2.0, clients=1, ops=4, faults_kept=frozenset())).happened == {}


def test_a_seed_reaches_rare_paths_and_counts_them() -> None:
    probes = run(7, Options(seconds=6.0, clients=2, ops=20, mean_s=0.3)).probes
    assert len(probes) > 10
    assert any(name.startswith("chance:") for name in probes)
    calm = run(5, Options(seconds=2.0, clients=2, ops=10, faults=False)).probes
    assert not any(name.startswith("chance:") for name in calm)


@pytest.mark.parametrize("kind", ["break", "partial", "astray"])
def test_what_needs_two_does_nothing_where_there_is_one(kind: str) -> None:
    async def scene(_loop: simulated.SimLoop) -> None:
        cluster = SimCluster("alone", nodes=1)
        await cluster.start()
        nemesis = Nemesis(cluster, random.Random("alone"))
        for number in range(1, 5):
            nemesis.inflict(number, kind)
        assert nemesis.happened == {}

    simulated.run(scene, 1)
