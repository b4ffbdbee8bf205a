"""A small cluster that runs, and a nemesis that does one thing to it when told: for tests of the faults."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import msgspec

from kvstore.config import NodeConfig
from kvstore.sim import loop as simulated
from kvstore.sim.cluster import Client, Server, SimCluster, small_logs
from kvstore.sim.faults import Nemesis
from kvstore.transactions import Transaction

KEYS = (b"a", b"k", b"z")  # one in each range of users


class World:
    """A cluster that runs, with a client and a nemesis."""

    def __init__(self, seed: str, nodes: int = 3, config: NodeConfig | None = None) -> None:
        self.cluster = SimCluster(seed, nodes=nodes, config=config)
        self.client: Client
        self.nemesis = Nemesis(self.cluster, random.Random(seed), self.victims)

    def victims(self) -> list[str]:
        return [] if self.client.dead else [self.client.name]

    async def start(self) -> None:
        await self.cluster.start()
        self.client = await self.cluster.client("c")
        await self.write(5)

    async def write(self, times: int, timeout_s: float = 20.0) -> float:
        """One transaction over all ranges, again and again. Returns the longest time one took."""
        longest, loop = 0.0, asyncio.get_running_loop()
        for _ in range(times):
            began = loop.time()
            await self.client.process.call(self._put(timeout_s))
            longest = max(longest, loop.time() - began)
        return longest

    async def _put(self, timeout_s: float) -> None:
        async def put(tx: Transaction) -> None:
            for key in KEYS:
                tx.put(key, bytes(200))

        await self.client.database.run(put, timeout=timeout_s)

    def inflict(self, kind: str, number: int = 1) -> str:
        """Returns what it said; empty if it found nothing to do."""
        self.nemesis.inflict(number, kind)
        fault = self.nemesis.happened.get(number)
        return fault.details if fault is not None else ""

    def frail(self) -> Server:
        return self.cluster.servers[self.nemesis.atlas.frail[0]]


def with_sync(mode: str) -> NodeConfig:
    config = small_logs(NodeConfig())
    log = msgspec.structs.replace(config.log, sync_mode=mode)
    return msgspec.structs.replace(config, log=log)


def play(
    test: Callable[[World], Awaitable[None]],
    seed: str = "1",
    nodes: int = 3,
    config: NodeConfig | None = None,
) -> None:
    async def main(_loop: simulated.SimLoop) -> None:
        world = World(seed, nodes, config)
        await world.start()
        await test(world)
        assert world.cluster.problems == []

    simulated.run(main, 1, time_limit_s=500.0)
