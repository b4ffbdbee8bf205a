"""Where the scripts play: a simulated cluster of three nodes with three ranges, and two clients. Time is virtual and all draws
are of one seed, so a script is the same interleaving whenever it runs.

`play` runs a script twice: with both keys in one range, and in two ranges that different nodes lead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from kvstore import logs
from kvstore.client import Database
from kvstore.errors import Conflict
from kvstore.sim import loop as simulated
from kvstore.testing import SimCluster
from kvstore.transactions import Transaction

T = TypeVar("T")

SEED: Final = 1
PLACES: Final = ((b"z/x", b"z/y"), (b"z/x", b"a/y"))  # who leads the range of z leads the oracle
SLOW_S: Final = (0.02, 0.02)
SETTLED_S: Final = 5.0  # every range is led where it will be


@dataclass
class Stage:
    """`x` and `y` hold b"0" at first."""

    cluster: SimCluster
    one: Database
    two: Database
    x: bytes
    y: bytes

    async def both(self, db: Database) -> tuple[bytes, bytes]:
        """x and y, at one version."""
        found = await db.get_many([self.x, self.y])
        return found.get(self.x, b""), found.get(self.y, b"")

    def far(self, name: str, key: bytes) -> None:
        """From now on this client reaches the range of `key` late."""
        leader = self.cluster.leader_of(key)
        assert leader is not None
        self.cluster.slow(name, leader, delay_s=SLOW_S)

    async def watched(self, look: Callable[[], Awaitable[T]], work: Awaitable[object]) -> list[T]:
        """What `look` sees, again and again, from before `work` until after it."""
        seen = [await look()]
        task = asyncio.ensure_future(work)
        while not task.done():
            seen.append(await look())
        await task
        seen.append(await look())
        return seen


async def refused(tx: Transaction) -> bool:
    """Whether the commit met a conflict."""
    try:
        await tx.commit()
    except Conflict:
        return True
    return False


Script = Callable[[Stage], Awaitable[None]]


def play(script: Script) -> None:
    for x, y in PLACES:

        async def main(_loop: simulated.SimLoop, x: bytes = x, y: bytes = y) -> None:
            async with SimCluster(SEED) as cluster:
                one, two = await cluster.connect("one"), await cluster.connect("two")
                async with one.batch() as rows:
                    rows.put(x, b"0")
                    rows.put(y, b"0")
                await two.get_many([x, y])  # it knows the ranges, too
                await asyncio.sleep(SETTLED_S)
                await script(Stage(cluster, one, two, x, y))
                assert cluster.problems == []

        with logs.silenced():
            simulated.run(main, SEED, time_limit_s=300.0)
