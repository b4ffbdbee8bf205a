"""Causal reverse: whoever sees a write sees every write that was acknowledged before that one began.

The writes are blind, of different keys in different ranges, so that nothing but real time orders them: a store that is
serializable, but not strictly so, may show the later one without the earlier.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import ClassVar, Final

from kvstore.client import Database
from kvstore.errors import KVError
from kvstore.testing.history import Outcome, TxnOp
from kvstore.testing.workloads.traced import Traced, Trail

BUCKET: Final = 12  # writes of one bucket, which a reader reads


class CausalReverse(Traced):
    """Writes of new keys, and reads of all that are near."""

    name: ClassVar[str] = "causal-reverse"
    kinds_count: ClassVar[int] = 2

    async def step(self, db: Database, client: str, rng: random.Random) -> None:
        await self.kind(rng, (self._write, self._read))(db, client, rng)

    def bucket(self, number: int) -> list[bytes]:
        keys = [self.key(slot, number) for slot in range(BUCKET)]
        self.watched |= dict.fromkeys(keys)
        return keys

    async def _write(self, db: Database, client: str, rng: random.Random) -> None:
        number, slot = divmod(len(self.trails), BUCKET)
        key = self.bucket(number)[slot]
        op = self.begin(client, "write", rng)
        value = op.writes[key] = b"%x" % self.unique(rng)
        self.trails.append(Trail(op, key, value))
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
        number = max(0, len(self.trails) - 1 - rng.randrange(BUCKET // 2)) // BUCKET
        await self.look(db, client, rng, self.bucket(number))

    def inspect(self) -> Iterable[str]:
        writers = {trail.row: trail.op for trail in self.trails}
        for op in self.ops:
            if op.outcome is not Outcome.OK or op.writes:
                continue
            seen = [writers[key] for key, value in op.reads.items() if value is not None]
            missed = [
                writers[key]
                for key, value in op.reads.items()
                if value is None and key in writers and writers[key].outcome is Outcome.OK
            ]
            if not missed:
                continue
            first = min(missed, key=lambda writer: writer.end)
            if first.end < op.begin:
                yield f"Stale-read: causal-reverse: {op.name!r} does not see {told(first)}, acknowledged before it began"
            last = max(seen, key=lambda writer: writer.begin, default=None)
            if last is not None and first.end < last.begin:
                yield (
                    f"Causal-reverse: causal-reverse: {op.name!r} sees {told(last)}, but not {told(first)}, "
                    "which was acknowledged before that began"
                )


def told(op: object) -> str:
    assert isinstance(op, TxnOp)
    return f"{op.name!r} at {op.version}"
