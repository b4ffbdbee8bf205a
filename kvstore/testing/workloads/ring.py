"""A ring of links: each key names the next. Whatever order transactions have, one ring of full length remains."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import ClassVar, Final

from kvstore.client import Database, Transaction
from kvstore.testing.history import Outcome, TxnOp
from kvstore.testing.workloads.base import Promise, State
from kvstore.testing.workloads.traced import Traced

LINKS: Final = 6


class Ring(Traced):
    """Swaps of two neighbours (three links are read and rewritten); reads of the whole ring at one version.

    Any two swaps that interleave wrongly cut the ring, or make it shorter.
    """

    name: ClassVar[str] = "ring"
    kinds_count: ClassVar[int] = 3

    def links(self, ring: int) -> list[bytes]:
        return [self.key(number, ring) for number in range(LINKS)]

    def rows(self) -> dict[bytes, bytes]:
        return {
            key: b"%d" % ((number + 1) % LINKS)
            for ring in range(self.scale)
            for number, key in enumerate(self.links(ring))
        }

    async def step(self, db: Database, client: str, rng: random.Random) -> None:
        await self.kind(rng, (self._swap, self._swap, self._walk))(db, client, rng)

    async def _swap(self, db: Database, client: str, rng: random.Random) -> None:
        """From a -> b -> c -> d to a -> c -> b -> d."""
        links = self.links(rng.randrange(self.scale))
        first = rng.randrange(LINKS)

        async def swapped(tx: Transaction, op: TxnOp) -> None:
            keys, values, at = [], [], first
            for _ in range(3):
                key = links[at]
                value = op.reads[key] = await tx.get(key)
                if value is None or key in keys:
                    return
                keys.append(key)
                values.append(value)
                at = int(value)
            op.writes |= {keys[0]: values[1], keys[1]: values[2], keys[2]: values[0]}

        await self.transact(db, client, rng, "swap", swapped)

    async def _walk(self, db: Database, client: str, rng: random.Random) -> None:
        await self.look(db, client, rng, self.links(rng.randrange(self.scale)))

    def promises(self) -> Sequence[Promise]:
        return [self._whole(self.links(ring)) for ring in range(self.scale)]

    @staticmethod
    def _whole(links: Sequence[bytes]) -> Promise:
        return Promise(links, lambda state, _before: broken_ring(links, state))

    def inspect(self) -> Iterable[str]:
        for op in self.ops:
            if op.outcome is Outcome.OK and len(op.reads) == LINKS and not op.writes:
                broken = broken_ring(list(op.reads), op.reads)
                if broken:
                    yield f"Broken-ring: ring: {op.name!r} at {op.version} saw {broken}"
        for ring in range(self.scale):
            broken = broken_ring(self.links(ring), self.final)
            if broken:
                yield f"Broken-ring: ring: at the end there is {broken}"


def broken_ring(links: Sequence[bytes], values: State) -> str:
    """What is there instead of one ring over all the links; empty if it is one. `links` are in order."""
    way: list[int] = []
    at = 0
    while at not in way:
        way.append(at)
        value = values.get(links[at])
        if value is None:
            return f"no link behind {' -> '.join(map(str, way))}"
        at = int(value)
    if at != way[0] or len(way) != len(links):
        return f"a ring {' -> '.join(map(str, [*way, at]))} among {len(links)}"
    return ""
