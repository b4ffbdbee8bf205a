"""Single keys: puts, deletions, reads and compare-and-swaps, which must be linearizable."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Final

from kvstore.client import Database
from kvstore.errors import CompareFailed, KVError
from kvstore.testing.history import RegisterOp
from kvstore.testing.workloads import judges
from kvstore.testing.workloads.base import FINISH_TIMEOUT_S, Workload, each

REGISTERS: Final = 4


class Registers(Workload):
    """Every value that is written is unique, so each tells who wrote it."""

    name: ClassVar[str] = "registers"
    kinds_count: ClassVar[int] = 4

    def __init__(self, rng: random.Random, places: Sequence[bytes], **options: Any) -> None:
        super().__init__(rng, places, **options)
        self.keys = [self.key(number) for number in range(REGISTERS * self.scale)]
        self.ops: list[RegisterOp] = []
        self._seen: dict[tuple[str, bytes], tuple[bytes | None, int]] = {}  # by client and key

    async def step(self, db: Database, client: str, rng: random.Random) -> None:
        kind = self.kind(rng, (self._put, self._get, self._cas, self._put_if))
        op = RegisterOp(client, "", rng.choice(self.keys), 0)
        op.value = b"%x" % self.unique(rng)
        drawn = rng.random()
        op.begin = self.history.tick()
        self.ops.append(op)
        self.history.registers.append(op)
        error: KVError | None = None
        try:
            await kind(db, op, drawn)
        except KVError as raised:
            error = raised
        else:
            if op.swapped:
                self._seen[client, op.key] = op.value, op.version
        self.settle(op, error, f"{op.kind} {op.key!r} {op.expected!r} {op.value!r} {op.swapped}")

    async def _put(self, db: Database, op: RegisterOp, drawn: float) -> None:
        op.kind = "put"
        if drawn < 0.1:
            op.value = None
            op.version = await db.delete(op.key)
        else:
            assert op.value is not None
            op.version = await db.put(op.key, op.value)

    async def _get(self, db: Database, op: RegisterOp, drawn: float) -> None:
        op.kind, op.value = "get", None
        if drawn < 0.2:
            op.value = await db.get(op.key)  # does not tell its version
            return
        entry = await db.get_entry(op.key)
        if entry is not None:
            op.value, op.version = entry.value, entry.version

    async def _cas(self, db: Database, op: RegisterOp, _drawn: float) -> None:
        op.kind = "cas"
        op.expected = self._seen.get((op.client, op.key), (None, 0))[0]
        op.swapped = await db.cas(op.key, op.expected, op.value)

    async def _put_if(self, db: Database, op: RegisterOp, drawn: float) -> None:
        """Only over the version that was seen last, which stands for its unique value."""
        op.expected, version = self._seen.get((op.client, op.key), (None, 0))
        if op.expected is not None and not version:
            await self._cas(db, op, drawn)
            return
        op.kind = "cas"
        assert op.value is not None
        try:
            if op.expected is None:
                op.version = await db.put(op.key, op.value, if_absent=True)
            else:
                op.version = await db.put(op.key, op.value, if_version=version)
        except CompareFailed:
            op.swapped = False

    async def finish(self, db: Database) -> None:
        """One more read of every key, which has to fit."""

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
        for wrong in judges.judge_registers(self.ops):
            yield f"Linearizability: registers: {wrong}"
