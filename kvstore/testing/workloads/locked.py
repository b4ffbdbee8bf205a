"""Locking reads: counters under exclusive locks, swaps of several cells locked in any order (so that deadlocks come), copies
under shared locks, and writers that take no lock at all among them. Judged by replay: a lock may fail, never an update."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any, ClassVar, Final

from kvstore.client import Database, Transaction
from kvstore.testing.history import TxnOp
from kvstore.testing.workloads.traced import Traced

CELLS: Final = 2  # in each place: few, since locks that nobody wants prove nothing
DAWDLE_S: Final = 3.0
WAITS_S: Final = (0.0, 0.05, 1.0)


class Locked(Traced):
    """Cells with numbers; each is a counter, and may be swapped with others or copied from them."""

    name: ClassVar[str] = "locked"
    kinds_count: ClassVar[int] = 5

    def __init__(self, rng: random.Random, places: Sequence[bytes], **options: Any) -> None:
        super().__init__(rng, places, **options)
        self.cells = sorted(
            self.key(number) for number in range(CELLS * len(self.places) * self.scale)
        )
        self.watched = dict.fromkeys(self.cells)

    async def step(self, db: Database, client: str, rng: random.Random) -> None:
        kinds = (self._bump, self._swap, self._copy, self._overwrite, self._read)
        await self.kind(rng, kinds)(db, client, rng)

    def _some(self, rng: random.Random, most: int) -> list[bytes]:
        return rng.sample(self.cells, rng.randint(1, min(most, len(self.cells))))

    def _keep_reads(self, op: TxnOp, version: int) -> None:
        """Reads under locks are of no snapshot: those of a failed transaction prove nothing."""

    async def _bump(self, db: Database, client: str, rng: random.Random) -> None:
        key = self.cells[min(rng.randrange(len(self.cells)), rng.randrange(len(self.cells)))]
        timeout_s = rng.choice(WAITS_S) if rng.random() < 0.2 else None
        dawdle_s = rng.expovariate(1 / DAWDLE_S) if rng.random() < 0.1 else 0.0
        shared_first = rng.random() < 0.1

        async def bumped(tx: Transaction, op: TxnOp) -> None:
            if shared_first:
                await tx.get_for_update(key, shared=True)
            op.reads[key] = await tx.get_for_update(key, timeout=timeout_s)
            if dawdle_s:
                await asyncio.sleep(dawdle_s)
            op.writes[key] = b"%d" % (int(op.reads[key] or 0) + 1)

        await self.transact(db, client, rng, "bump", bumped)

    async def _swap(self, db: Database, client: str, rng: random.Random) -> None:
        keys = self._some(rng, 3)
        at_once = rng.random() < 0.3

        async def swapped(tx: Transaction, op: TxnOp) -> None:
            if at_once:
                found = await tx.get_many_for_update(keys)
                op.reads |= {key: found.get(key) for key in keys}
            else:
                for key in keys:
                    op.reads[key] = await tx.get_for_update(key)
            op.writes |= {
                key: op.reads[other] for key, other in zip(keys, [*keys[1:], keys[0]], strict=True)
            }

        await self.transact(db, client, rng, "swap", swapped)

    async def _copy(self, db: Database, client: str, rng: random.Random) -> None:
        """The sum of some cells, which must not change meanwhile, into another one, which is not locked."""
        keys = self._some(rng, 3)
        target = rng.choice(self.cells)

        async def copied(tx: Transaction, op: TxnOp) -> None:
            for key in keys:
                op.reads[key] = await tx.get_for_update(key, shared=True)
            if rng.random() < 0.3:
                other = rng.choice(self.cells)
                op.reads[other] = await tx.get(other)
            op.writes[target] = b"%d" % sum(int(value or 0) for value in op.reads.values())

        await self.transact(db, client, rng, "copy", copied)

    async def _overwrite(self, db: Database, client: str, rng: random.Random) -> None:
        keys = self._some(rng, 2)

        async def overwritten(_tx: Transaction, op: TxnOp) -> None:
            op.writes |= {key: b"%d" % rng.randrange(100) for key in keys}

        await self.transact(db, client, rng, "overwrite", overwritten)

    async def _read(self, db: Database, client: str, rng: random.Random) -> None:
        await self.look(db, client, rng, self.cells)
