"""Claims of damage: it stays where it may be, and what is damaged is refused, excused, and told if nobody did it."""

from __future__ import annotations

import asyncio
import random

import pytest

import replication.host
from kvstore.adapters.memory_engine import ROTTEN
from kvstore.errors import CorruptionError
from kvstore.sim import loop as simulated
from kvstore.sim.atlas import Atlas
from kvstore.sim.cluster import Server, SimCluster
from kvstore.sim.kinds import RARE
from replication.errors import LogMismatch
from tests.sim.harmed import World, play


@pytest.mark.parametrize(("nodes", "frail"), [(1, 0), (3, 1), (5, 1)])
def test_only_a_minority_of_any_ranges_replicas_is_ever_damaged(nodes: int, frail: int) -> None:
    async def main(_loop: simulated.SimLoop) -> None:
        for seed in range(5):
            cluster = SimCluster(str(seed), nodes=nodes)
            assert len(Atlas(cluster, random.Random(seed)).frail) == frail

    simulated.run(main, 1)


@pytest.mark.parametrize("kind", sorted(RARE))
def test_damage_is_done_to_a_frail_node_alone(kind: str) -> None:
    async def test(world: World) -> None:
        for server in world.cluster.running():
            assert server.node is not None
            await server.process.call(server.node.flush())  # type: ignore[union-attr]
        assert world.inflict(kind)
        damaged = [server.name for server in world.cluster.servers.values() if server.damage]
        assert damaged == world.nemesis.atlas.frail

    play(test)


async def damaged_log(world: World) -> Server:
    """The frail node restarts with a log that has lost something of some range, and says so."""
    server = world.frail()
    for seed in range(20):
        server.machine.disk.misdirect(random.Random(seed))
    server.damage.append("misdirected")
    world.cluster.crash(server.name, power=False)
    await world.cluster.restart(server.name)
    assert server.node is not None
    assert server.node.host is not None
    assert server.node.host.refused
    return server


def test_a_range_with_a_damaged_log_is_refused_and_excused() -> None:
    async def test(world: World) -> None:
        server = await damaged_log(world)
        assert server.node is not None
        assert server.node.host is not None
        groups = list(world.cluster.servers["n1"].node.store.replicas)  # type: ignore[union-attr]
        for group in groups:
            excused = world.nemesis.atlas.excused(server.name, group)
            assert excused == (group in server.node.host.refused)
            others = [name for name in world.cluster.servers if name != server.name]
            assert not any(world.nemesis.atlas.excused(name, group) for name in others)
        assert not world.nemesis.atlas.gone(server.name)

    play(test)


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_leadership_is_not_handed_to_a_range_that_is_refused_there(seed: str) -> None:
    """It was, every second, for the node was up; each time the range stood still for an election timeout."""

    async def test(world: World) -> None:
        await damaged_log(world)
        await asyncio.sleep(5.0)
        assert await world.write(40) < 0.5

    play(test, seed)


def test_a_damaged_engine_retires_its_node_when_it_is_read() -> None:
    async def test(world: World) -> None:
        server = world.frail()
        for key in list(server.machine.directory.rows):
            server.machine.directory.damage(key)
        server.damage.append("engine_rot")
        assert world.nemesis.atlas.excused(server.name, 1)
        await world.write(5)
        await asyncio.sleep(2.0)
        assert not server.running
        assert world.nemesis.atlas.gone(server.name)
        await world.cluster.restart(server.name)
        assert not server.running
        await world.write(3)

    play(test)


def test_damage_that_nobody_did_is_a_problem() -> None:
    async def main(_loop: simulated.SimLoop) -> None:
        world = World("1")
        await world.start()
        server = world.frail()
        for key in list(server.machine.directory.rows):
            server.machine.directory.damage(key)
        await world.write(5)
        await asyncio.sleep(2.0)
        assert len(world.cluster.problems) == 1
        assert "CorruptionError" in world.cluster.problems[0]

    simulated.run(main, 1, time_limit_s=100.0)


def start_with(damage: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The problems of a cluster in which a node with such damage does not start, and gives this reason."""

    def refused(*_: object, **__: object) -> None:
        raise error

    async def main(_loop: simulated.SimLoop) -> list[str]:
        world = World("1")
        await world.start()
        server = world.frail()
        server.damage.append(damage)
        world.cluster.crash(server.name, power=False)
        monkeypatch.setattr(replication.host, "begin_of", refused)
        await world.cluster.restart(server.name)
        monkeypatch.undo()
        assert world.nemesis.atlas.gone(server.name)
        return world.cluster.problems

    return simulated.run(main, 1, time_limit_s=100.0)


@pytest.mark.parametrize("kind", ["log_rot", "misdirected"])
@pytest.mark.parametrize("error", [LogMismatch("planted"), CorruptionError(f"b'a' {ROTTEN}")])
def test_a_node_that_a_damaged_log_keeps_from_starting_is_a_problem(
    kind: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranges that have lost something are refused, and the others go on."""
    (problem,) = start_with(kind, error, monkeypatch)
    assert f"does not start: {error!r}" in problem


def test_a_node_with_a_damaged_engine_may_stop_for_a_row_that_cannot_be_read_and_for_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not start_with("engine_rot", CorruptionError(f"b'a' {ROTTEN}"), monkeypatch)
    assert start_with("engine_rot", CorruptionError("this is no row"), monkeypatch)
    assert start_with("engine_rot", LogMismatch("planted"), monkeypatch)


# -- numbers
