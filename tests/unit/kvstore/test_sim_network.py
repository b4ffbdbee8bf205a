"""Claims of the simulated network's faults: what is held travels on, what is lost is a tail, who crashed is gone, and
equal seeds give equal fingerprints. (What every network promises: tests/contract/test_network.py.)"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kvstore.errors import PipeClosed
from kvstore.ports import FramePipe
from kvstore.sim import loop as sim
from kvstore.sim.loop import SimLoop
from kvstore.sim.network import SimHost, SimNetwork, SimPipe

WINDOW_BYTES = 10_000


class World:
    """Hosts a, b and c; b serves, and keeps what it was dialled with."""

    def __init__(self, loop: SimLoop, **options: Any) -> None:
        self.loop = loop
        self.network = SimNetwork(random.Random(1), window_bytes=WINDOW_BYTES, **options)
        self.hosts: dict[str, SimHost] = {name: self.network.host(name) for name in "abc"}
        self.served: asyncio.Queue[SimPipe] = asyncio.Queue()
        self.address = "b:7400"

    async def serve(self) -> None:
        await self.hosts["b"].serve(self.address, self.on_pipe)

    async def on_pipe(self, path: str, pipe: FramePipe) -> None:
        assert isinstance(pipe, SimPipe)
        self.served.put_nowait(pipe)

    async def pair(self, source: str = "a", timeout_s: float = 10.0) -> tuple[SimPipe, SimPipe]:
        near = await self.hosts[source].dial(self.address, "/v1/peer", timeout_s)
        return near, await self.served.get()

    def elapsed(self) -> float:
        return self.loop.time() - sim.EPOCH_S


def simulated(test: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    async def main(loop: SimLoop) -> None:
        world = World(loop)
        await world.serve()
        await test(world)

    def run() -> None:
        sim.run(main, 1, time_limit_s=10_000.0)

    return run


async def read_to_end(pipe: SimPipe) -> list[bytes]:
    got: list[bytes] = []
    try:
        while True:
            got.append(await pipe.receive())
    except PipeClosed:
        return got


@simulated
async def test_a_partition_holds_frames_until_it_heals(world: World) -> None:
    near, far = await world.pair()
    world.network.partition("a", "b")
    near.try_send(b"one")
    await asyncio.sleep(100.0)
    near.try_send(b"two")
    assert near.buffered_bytes() == 6
    world.network.heal()
    assert await far.receive() == b"one"
    assert await far.receive() == b"two"
    assert world.elapsed() < 100.1
    assert near.buffered_bytes() == 0


@simulated
async def test_a_one_way_partition_holds_data_there_and_acknowledgements_back(
    world: World,
) -> None:
    near, far = await world.pair()
    world.network.partition("a", "b", one_way=True)
    assert far.try_send(b"this way is open")
    assert await near.receive() == b"this way is open"
    assert far.buffered_bytes() == 16  # the acknowledgement does not get through
    near.try_send(b"held")
    await asyncio.sleep(10.0)
    assert near.buffered_bytes() == 4
    world.network.heal("a", "b")
    assert await far.receive() == b"held"
    assert near.buffered_bytes() == far.buffered_bytes() == 0


@simulated
async def test_a_partition_is_between_those_named_alone(world: World) -> None:
    world.network.partition("a", ["b"])
    near, far = await world.pair("c")
    near.try_send(b"c and b talk")
    assert await far.receive() == b"c and b talk"
    with pytest.raises(PipeClosed, match="within 5 s"):
        await world.hosts["a"].dial(world.address, "/v1/peer", 5.0)
    assert world.network.counters["timed_out"] == 1


@simulated
async def test_an_isolated_host_is_cut_off_from_all_and_comes_back(world: World) -> None:
    (a, b_of_a), (c, b_of_c) = await world.pair("a"), await world.pair("c")
    world.network.isolate("b", 30.0)
    a.try_send(b"x")
    c.try_send(b"y")
    assert (await b_of_a.receive(), await b_of_c.receive()) == (b"x", b"y")
    assert 30.0 <= world.elapsed() < 30.1


@simulated
async def test_a_clog_ends_by_itself(world: World) -> None:
    near, far = await world.pair()
    world.network.clog("a", "b", 7.0)
    near.try_send(b"late")
    assert await far.receive() == b"late"
    assert 7.0 <= world.elapsed() < 7.1


@simulated
async def test_a_dial_waits_for_a_path_within_its_time(world: World) -> None:
    world.network.clog("a", "b", 3.0)
    await world.pair()
    assert 3.0 <= world.elapsed() < 8.0


@simulated
async def test_a_slow_link_is_slow_for_those_named(world: World) -> None:
    near, far = await world.pair()
    world.network.set_delay("a", "b", (2.0, 3.0))
    before = world.elapsed()
    near.try_send(b"slow")
    await far.receive()
    assert 2.0 <= world.elapsed() - before <= 3.0
    world.network.set_delay("a", "b", None)
    before = world.elapsed()
    far.try_send(b"quick")
    await near.receive()
    assert world.elapsed() - before < 0.1


@simulated
async def test_a_broken_connection_loses_a_tail_and_nothing_else(world: World) -> None:
    lost = 0
    for _ in range(30):
        near, far = await world.pair()
        sent = [b"%d" % number for number in range(20)]
        for frame in sent:
            near.try_send(frame)
        assert world.network.break_connections("a", "b") == 1
        got = await read_to_end(far)
        assert got == sent[: len(got)]
        lost += len(sent) - len(got)
        assert await read_to_end(near) == []
    assert lost > 0
    assert world.network.counters["breaks"] == 30


@simulated
async def test_who_crashed_is_gone_and_its_peers_learn_of_it(world: World) -> None:
    near, _ = await world.pair()
    world.network.crash("b")
    assert await read_to_end(near) == []
    with pytest.raises(PipeClosed, match="refused"):
        await world.pair()
    world.hosts["b"] = world.network.host("b")
    await world.serve()
    await world.pair()


@simulated
async def test_after_a_silent_crash_nothing_comes_and_nothing_is_taken(world: World) -> None:
    near, _ = await world.pair()
    world.network.crash("b", silent=True)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1000.0):
            await near.receive()
    taken = 0
    while near.try_send(bytes(1000)):
        taken += 1
    assert taken == WINDOW_BYTES // 1000
    await asyncio.sleep(1000.0)
    assert not near.try_send(b"x")


@simulated
async def test_a_machine_without_power_does_not_even_refuse(world: World) -> None:
    world.network.crash("b", silent=True)
    with pytest.raises(PipeClosed, match=r"within 10 s"):
        await world.pair(timeout_s=10.0)
    assert world.network.counters["refused"] == 0
    world.hosts["b"] = world.network.host("b")
    with pytest.raises(PipeClosed, match="refused"):
        await world.pair()
    await world.serve()
    await world.pair()


@simulated
async def test_a_machine_that_is_back_ends_an_old_connection_when_it_gets_something(
    world: World,
) -> None:
    near, _ = await world.pair()
    world.network.crash("b", silent=True)
    near.try_send(b"into the void")
    world.hosts["b"] = world.network.host("b")
    await asyncio.sleep(1000.0)
    assert not near.incoming.arrived_end
    near.try_send(b"to one that knows nothing of it")
    assert await read_to_end(near) == []
    with pytest.raises(PipeClosed):
        near.try_send(b"x")


@simulated
async def test_the_news_of_an_abort_does_not_cross_a_partition(world: World) -> None:
    near, far = await world.pair()
    world.network.partition("a", "b")
    near.abort()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(100.0):
            await far.receive()
    world.network.heal()
    assert await read_to_end(far) == []


@simulated
async def test_two_hosts_of_one_name_or_address_are_refused(world: World) -> None:
    with pytest.raises(AssertionError):
        world.network.host("a")
    with pytest.raises(OSError, match="in use"):
        await world.serve()


def fingerprint(seed: int) -> tuple[int, dict[str, int]]:
    async def main(loop: SimLoop) -> tuple[int, dict[str, int]]:
        world = World(loop, break_rate=0.02)
        world.network.rng = random.Random(seed)
        await world.serve()
        for _ in range(20):
            near, far = await world.pair()
            for number in range(50):
                if far.incoming.arrived_end or near.incoming.arrived_end:
                    break
                near.try_send(b"%d" % number)
                await asyncio.sleep(0.001)
            near.abort()
            await read_to_end(far)
        return world.network.fingerprint, world.network.counters

    return sim.run(main, seed)


def test_equal_seeds_give_equal_fingerprints_and_others_do_not():
    assert fingerprint(1) == fingerprint(1)
    assert fingerprint(1)[0] != fingerprint(2)[0]
    assert fingerprint(1)[1]["breaks"] > 0
