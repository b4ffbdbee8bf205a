"""Write skew over a predicate (G2): at most one row of a group, though nobody writes what another wrote.

A group has two tables in different ranges. A transaction scans both, and only if it finds nothing it inserts a row into
one of them. Two of them may insert at once only if guards have gaps, or are not over what a scan did not find.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import ClassVar, Final

from kvstore.client import Database, Transaction
from kvstore.testing.history import Outcome, TxnOp
from kvstore.testing.workloads.base import Promise, State
from kvstore.testing.workloads.traced import Traced

GROUPS: Final = 3
SLOTS: Final = 3  # rows that a table may have


class Skew(Traced):
    """Insert if there is nothing; take away, or move, what there is."""

    name: ClassVar[str] = "skew"
    kinds_count: ClassVar[int] = 3

    def slots(self, group: int, table: int) -> list[bytes]:
        place = self.prefix(group + table)
        return [place + b"%03d/%d/%d" % (group, table, slot) for slot in range(SLOTS)]

    def group(self, number: int) -> list[bytes]:
        keys = [*self.slots(number, 0), *self.slots(number, 1)]
        self.watched |= dict.fromkeys(keys)
        return keys

    async def step(self, db: Database, client: str, rng: random.Random) -> None:
        kinds = (self._insert, self._insert_or_take, self._read)
        await self.kind(rng, kinds)(db, client, rng)

    async def _insert(self, db: Database, client: str, rng: random.Random) -> None:
        await self._change(db, client, rng, take=False)

    async def _insert_or_take(self, db: Database, client: str, rng: random.Random) -> None:
        await self._change(db, client, rng, take=True)

    async def _change(self, db: Database, client: str, rng: random.Random, *, take: bool) -> None:
        number = rng.randrange(GROUPS * self.scale)
        keys = self.group(number)
        target = rng.choice(keys)
        value = b"%x" % self.unique(rng)
        limit, backward = rng.choice((None, None, 1)), rng.random() < 0.5
        move = rng.random() < 0.5

        async def changed(tx: Transaction, op: TxnOp) -> None:
            found: dict[bytes, bytes] = {}
            for table in range(2):
                slots = self.slots(number, table)
                scan = tx.scan(slots[0], slots[-1] + b"\0", limit=limit, reverse=backward)
                rows = dict(await scan.to_list())
                found |= rows
                seen = (
                    slots if limit is None or not rows else list(rows)
                )  # behind it: nobody looked
                op.reads |= {key: rows.get(key) for key in seen}
            if take:
                op.writes |= dict.fromkeys(found)
            if not found or (take and move and limit is None):
                op.writes[target] = value

        await self.transact(db, client, rng, "change", changed)

    async def _read(self, db: Database, client: str, rng: random.Random) -> None:
        keys = self.group(rng.randrange(GROUPS * self.scale))
        await self.look(db, client, rng, keys)

    def promises(self) -> Sequence[Promise]:
        return [
            Promise([*self.slots(number, 0), *self.slots(number, 1)], lambda rows, _: crowd(rows))
            for number in range(GROUPS * self.scale)
        ]

    def inspect(self) -> Iterable[str]:
        for op in self.ops:
            if op.outcome is Outcome.OK and (wrong := crowd(op.reads)):
                yield f"G2-predicate: skew: {op.name!r} at {op.version} {wrong}"
        for number in range(GROUPS * self.scale):
            if wrong := crowd({key: self.final.get(key) for key in self.group(number)}):
                yield f"G2-predicate: skew: at the end {wrong}"


def crowd(rows: State) -> str:
    there = [key for key, value in rows.items() if value is not None]
    return f"a group has {len(there)} rows: {there}" if len(there) > 1 else ""
