"""What one client may count on between its own operations, by the versions that it is told.

Per session (one client, one operation at a time): read your writes; monotonic reads (of one key, never an older
version); monotonic writes (its later write has the higher version, whatever the keys); writes follow reads (a write's
version is above all that the session has read). Strict serializability implies all four, but these are seen within a
single client's history, and named.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Final

from kvstore.client import Database
from kvstore.errors import KVError
from kvstore.testing.history import Outcome, RegisterOp
from kvstore.testing.workloads.base import FINISH_TIMEOUT_S, Workload, each

KEYS: Final = 6


class Sessions(Workload):
    """Puts and reads of a few keys that all clients share; nothing is ever deleted."""

    name: ClassVar[str] = "sessions"
    kinds_count: ClassVar[int] = 4

    def __init__(self, rng: random.Random, places: Sequence[bytes], **options: Any) -> None:
        super().__init__(rng, places, **options)
        self.keys = [self.key(number) for number in range(KEYS * self.scale)]
        self.ops: list[RegisterOp] = []

    async def step(self, db: Database, client: str, rng: random.Random) -> None:
        kind = self.kind(rng, (self._put, self._write, self._get, self._snapshot))
        value = b"%x" % self.unique(rng)
        op = RegisterOp(client, "", rng.choice(self.keys), self.history.tick(), value)
        self.ops.append(op)
        self.history.registers.append(op)
        error: KVError | None = None
        try:
            await kind(db, op)
        except KVError as raised:
            error = raised
        self.settle(op, error, f"{op.kind} {op.key!r} {op.value!r}")

    async def _put(self, db: Database, op: RegisterOp) -> None:
        op.kind = "put"
        assert op.value is not None
        op.version = await db.put(op.key, op.value)

    async def _write(self, db: Database, op: RegisterOp) -> None:
        op.kind = "put"
        assert op.value is not None
        async with db.transaction() as tx:
            tx.put(op.key, op.value)
        op.version = tx.commit_version or 0

    async def _get(self, db: Database, op: RegisterOp) -> None:
        op.kind, op.value = "get", None
        entry = await db.get_entry(op.key)
        if entry is not None:
            op.value, op.version = entry.value, entry.version

    async def _snapshot(self, db: Database, op: RegisterOp) -> None:
        op.kind, op.value = "get", None
        entry = await db.snapshot().get_entry(op.key)
        if entry is not None:
            op.value, op.version = entry.value, entry.version

    async def finish(self, db: Database) -> None:
        """A session of its own reads all keys."""

        async def read(key: bytes) -> None:
            op = RegisterOp("end", "get", key, self.history.tick())
            entry = await db.get_entry(key, timeout=FINISH_TIMEOUT_S)
            if entry is not None:
                op.value, op.version = entry.value, entry.version
            self.ops.append(op)
            self.history.registers.append(op)
            self.settle(op, None, f"get {key!r} {op.value!r}")

        await each(read, self.keys)

    def inspect(self) -> Iterable[str]:
        sessions: dict[str, list[RegisterOp]] = {}
        newest: dict[bytes, int] = {}
        for op in self.ops:
            if op.outcome is Outcome.OK:
                sessions.setdefault(op.client, []).append(op)
                if op.kind == "put":
                    newest[op.key] = max(op.version, newest.get(op.key, 0))
        for op in sessions.get("end", []):
            if op.version < newest.get(op.key, 0):
                yield f"Lost-write: sessions: {op.key!r} ends at {op.version}, below {newest[op.key]}, which was acknowledged"
        for client, ops in sessions.items():
            yield from check_session(client, ops)


def check_session(client: str, ops: Sequence[RegisterOp]) -> Iterable[str]:
    """What breaks a session's four guarantees. `ops`: its acknowledged operations, in order."""
    written: dict[bytes, int] = {}
    read: dict[bytes, int] = {}
    last_write = last_read = 0
    for op in ops:
        what = f"sessions: {client} {op.kind} {op.key!r} at version {op.version}"
        if op.kind == "put":
            if op.version <= last_write:
                yield f"Monotonic-writes: {what}, after its own write at {last_write}"
            if op.version <= last_read:
                yield f"Writes-follow-reads: {what}, after it read {last_read}"
            last_write = max(last_write, op.version)
            written[op.key] = max(op.version, written.get(op.key, 0))
        else:
            if op.version < written.get(op.key, 0):
                yield f"Read-your-writes: {what}, after its own write at {written[op.key]}"
            if op.version < read.get(op.key, 0):
                yield f"Monotonic-reads: {what}, after it read {read[op.key]}"
            last_read = max(last_read, op.version)
            read[op.key] = max(op.version, read.get(op.key, 0))
