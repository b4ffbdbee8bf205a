"""A number that only rises: by commit versions, by real time, and for every client.

Each transaction reads all the keys of a group, which lie in different ranges, and writes the greatest number plus one to
any of them. So every write is ordered with every other, and two that have one number would mean a lost update.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import ClassVar, Final

from kvstore.client import Database, Transaction
from kvstore.testing.history import Outcome, TxnOp
from kvstore.testing.workloads.base import Promise, State
from kvstore.testing.workloads.traced import Traced

GROUP: Final = 3


class Monotonic(Traced):
    """Steps up, and reads of a group."""

    name: ClassVar[str] = "monotonic"
    kinds_count: ClassVar[int] = 2

    def group(self, number: int) -> list[bytes]:
        return [self.key(place, number) for place in range(GROUP)]

    def rows(self) -> dict[bytes, bytes]:
        return {key: b"0" for number in range(self.scale) for key in self.group(number)}

    async def step(self, db: Database, client: str, rng: random.Random) -> None:
        await self.kind(rng, (self._up, self._read))(db, client, rng)

    async def _up(self, db: Database, client: str, rng: random.Random) -> None:
        keys = self.group(rng.randrange(self.scale))
        target = rng.choice(keys)

        async def stepped(tx: Transaction, op: TxnOp) -> None:
            found = await tx.get_many(keys)
            op.reads |= {key: found.get(key) for key in keys}
            op.writes[target] = b"%d" % (highest(op.reads) + 1)

        await self.transact(db, client, rng, "up", stepped)

    async def _read(self, db: Database, client: str, rng: random.Random) -> None:
        await self.look(db, client, rng, self.group(rng.randrange(self.scale)))

    def promises(self) -> Sequence[Promise]:
        return [Promise(self.group(number), not_one_more) for number in range(self.scale)]

    def inspect(self) -> Iterable[str]:
        for number in range(self.scale):
            first = self.key(0, number)
            mine = [op for op in self.ops if op.outcome is Outcome.OK and first in op.reads]
            yield from self._check_versions(mine)
            yield from self._check_clients(mine)

    def _check_versions(self, ops: list[TxnOp]) -> Iterable[str]:
        versions = {id(trail.op): trail.version or 0 for trail in self.trails}
        ups = [op for op in ops if op.writes]
        ups += [
            trail.op
            for trail in self.trails
            if isinstance(trail.op, TxnOp)
            and trail.op.outcome is Outcome.UNKNOWN
            and trail.version
            and ops
            and tuple(trail.op.reads) == tuple(ops[0].reads)
        ]
        last, before = 0, b""
        for op in sorted(ups, key=lambda op: versions[id(op)]):
            number = highest(op.reads) + 1
            if number <= last:
                kind = "Lost-update" if number == last else "Monotonic"
                yield f"{kind}: monotonic: {op.name!r} wrote {number}, but {before!r} had written {last}"
            last, before = number, op.name

    def _check_clients(self, ops: list[TxnOp]) -> Iterable[str]:
        """Real time covers this; here it has a name. Reads of the past do not count."""
        last: dict[str, int] = {}
        for op in sorted(ops, key=lambda op: op.end):
            if op.begin and not op.name.endswith(b"/reads"):
                number = highest(op.reads) + bool(op.writes)
                if number < last.get(op.client, 0):
                    yield f"Monotonic-reads: monotonic: {op.name!r} saw {number} after {last[op.client]}"
                last[op.client] = number


def highest(numbers: State) -> int:
    return max(int(value or 0) for value in numbers.values())


def not_one_more(state: State, before: State) -> str:
    """Each version has the number after the highest that there was."""
    was, now = highest({**state, **before}), highest(state)
    return f"the highest number was {was}, and is {now}" if now != was + 1 else ""
