"""Long fork: two readers never see two writes in opposite orders (what snapshots that are not ordered would allow).

Keys come in small groups over the ranges; each is written once. What two readers see of a group must be comparable:
one saw all that the other saw.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from typing import ClassVar, Final

from kvstore.client import Database
from kvstore.errors import KVError
from kvstore.testing.history import Outcome, TxnOp
from kvstore.testing.workloads.traced import Traced, Trail

GROUP: Final = 4


class LongFork(Traced):
    """Writes of one key alone, no two of the same; reads of a group, in all the ways that there are."""

    name: ClassVar[str] = "long-fork"
    kinds_count: ClassVar[int] = 2

    def group(self, number: int) -> list[bytes]:
        keys = [self.key(place, number) for place in range(GROUP)]
        self.watched |= dict.fromkeys(keys)
        return keys

    async def step(self, db: Database, client: str, rng: random.Random) -> None:
        await self.kind(rng, (self._write, self._read))(db, client, rng)

    def _present(self) -> int:
        """The group that is being written."""
        return len(self.trails) // GROUP

    async def _write(self, db: Database, client: str, rng: random.Random) -> None:
        taken = {trail.row: None for trail in self.trails[-3 * GROUP :]}
        present = self._present()
        free = [
            key
            for number in (present, present + 1)
            for key in self.group(number)
            if key not in taken
        ]
        op = self.begin(client, "write", rng)
        key = rng.choice(free)
        value = op.writes[key] = b"%x" % self.unique(rng)
        self.trails.append(Trail(op, key, value))  # nobody else ever writes it
        error: KVError | None = None
        try:
            if rng.random() < 0.7:
                op.version = await db.put(key, value)
            else:
                async with db.transaction() as tx:
                    tx.put(key, value)
                op.version = tx.commit_version or 0
        except KVError as raised:
            error = raised
        self.end(op, error)

    async def _read(self, db: Database, client: str, rng: random.Random) -> None:
        number = max(0, self._present() + rng.choice((-1, 0, 0, 1)))
        await self.look(db, client, rng, self.group(number))

    def inspect(self) -> Iterable[str]:
        groups: dict[tuple[bytes, ...], list[TxnOp]] = {}
        for op in self.ops:
            if op.outcome is Outcome.OK and op.reads and not op.writes:
                groups.setdefault(tuple(op.reads), []).append(op)
        for reads in groups.values():
            reads.sort(key=lambda op: sum(value is not None for value in op.reads.values()))
            for less, more in itertools.pairwise(reads):
                missed = [key for key, value in less.reads.items() if value and not more.reads[key]]
                if missed:
                    yield (
                        f"Long-fork: long-fork: {less.name!r} saw {missed!r}, which {more.name!r} did not, "
                        f"and {more.name!r} saw what {less.name!r} did not"
                    )
