"""Transactions whose fate is known in the end, and reads of many keys at one version.

T1. Every transaction that writes leaves a trace: a marker row of its own, a row that nobody ever overwrites, or its token.
    `finish` follows them, so that no outcome is unknown afterwards, and what a client was told is held against it.
T2. With that, transactions can be replayed in the order of their commit versions: each read must be what the replay
    has, and the order must respect real time. This is strict serializability, complete and in O(n log n).
T3. A transaction that failed has read one snapshot all the same: its reads stay in the history as those of a reader.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvstore.client import Database, Transaction
from kvstore.errors import KVError, OutcomeExpired
from kvstore.testing.history import MicroTxn, Outcome, TxnOp
from kvstore.testing.workloads import judges
from kvstore.testing.workloads.base import (
    FINISH_TIMEOUT_S,
    Workload,
    each,
    first_of_each_kind,
    patiently,
)
from kvstore.testing.workloads.staleness import Staleness, StaleRead
from kvstore.transactions import Committed, Snapshot

TOKEN_SHARE: Final = 0.3
PAST_SHARE: Final = 0.1  # of the reads that are of an earlier version
STALE_SHARE: Final = 0.15  # that any replica may answer, with one of these bounds
STALENESS_S: Final = (1.0, 2.0, 3.0, 10.0)

Body = Callable[[Transaction, TxnOp], Awaitable[None]]


@dataclass
class Trail:
    """How one transaction is found again: by a row that has this value if it happened, or by a token."""

    op: TxnOp | MicroTxn
    row: bytes = b""
    value: bytes = b""
    token: str = ""
    version: int | None = None  # of the commit; 0: it did not happen; None: not known


class Traced(Workload):
    """Base of workloads that consist of transactions (TxnOp) on known keys.

    `watched`: every key that may have a value, in the order of their first use; `finish` and `check` go by it.
    """

    def __init__(self, rng: random.Random, places: Sequence[bytes], **options: Any) -> None:
        super().__init__(rng, places, **options)
        self.ops: list[TxnOp] = []
        self.watched: dict[bytes, None] = dict.fromkeys(self.rows())
        self.final: dict[bytes, bytes | None] = {}
        self.trails: list[Trail] = []
        # Of the transactions that are traced by their token rather than by a marker; 0 where outcomes are not kept for
        # as long as a run takes.
        self.token_share = TOKEN_SHARE
        self.staleness = Staleness()
        self._laid_version = 0  # the rows are there from then on
        self._seen_version = 0  # of the last that was acknowledged, for reads of the past

    async def prepare(self, db: Database) -> None:
        await super().prepare(db)
        self._laid_version = await patiently(lambda: db.snapshot().version())

    # -- transactions

    def begin(self, client: str, kind: str, rng: random.Random) -> TxnOp:
        name = f"{kind}/{client}/{self.unique(rng):x}".encode()
        op = TxnOp(client, name, self.history.tick())
        self.ops.append(op)
        self.history.transactions.append(op)
        return op

    def end(self, op: TxnOp, error: KVError | None = None) -> None:
        if error is None and op.version:
            self._seen_version = op.version
            self.staleness.acknowledged(asyncio.get_running_loop().time(), op.version)
        self.settle(op, error, f"{op.name!r} {op.reads!r} {op.writes!r}")

    async def transact(
        self, db: Database, client: str, rng: random.Random, kind: str, body: Body
    ) -> TxnOp:
        """One transaction: `body` reads, and fills in `reads` and `writes`, which are then written and committed."""
        op = self.begin(client, kind, rng)
        tx: Transaction | None = None
        try:
            async with db.transaction() as tx:
                await body(tx, op)
                if op.writes:
                    await self.commit(op, tx, rng)
                else:
                    op.version = tx.read_version or 0
        except KVError as error:
            if tx is not None:
                self._keep_reads(op, tx.read_version or 0)
            self.end(op, error)
        else:
            self.end(op)
        return op

    async def commit(self, op: TxnOp, tx: Transaction, rng: random.Random) -> None:
        for key, value in op.writes.items():
            if value is None:
                tx.delete(key)
            else:
                tx.put(key, value)
        self.leave_trail(op, tx, rng)
        version = await tx.commit()
        assert version is not None
        op.version = version

    def leave_trail(
        self, op: TxnOp | MicroTxn, tx: Transaction, rng: random.Random, name: bytes = b""
    ) -> None:
        """T1, for a transaction whose writes are buffered and that is about to commit."""
        if rng.random() < self.token_share:
            self.trails.append(Trail(op, token=tx.id))
            return
        row = rng.choice(self.places) + b"mark/" + self.name.encode() + b"/"
        row += op.name if isinstance(op, TxnOp) else name
        tx.put(row, b"1")
        self.trails.append(Trail(op, row, b"1"))

    def _keep_reads(self, op: TxnOp, version: int) -> None:
        """T3."""
        if not version or not op.reads:
            return
        now = self.history.tick()
        reader = TxnOp(op.client, op.name + b"/reads", op.begin, dict(op.reads), {}, version, now)
        reader.outcome = Outcome.OK
        self.ops.append(reader)
        self.history.transactions.append(reader)

    # -- reads at one version

    async def look(
        self,
        db: Database,
        client: str,
        rng: random.Random,
        keys: Sequence[bytes],
        *,
        past: bool = True,
    ) -> TxnOp:
        """Read keys (in order, some of which may be absent) at one version, in one of the ways that there are.

        A read of the past begins at 0: anybody might have seen it before. So does one that may be stale.
        """
        if past and rng.random() < STALE_SHARE:
            return await self._look_stale(db, client, rng, keys)
        op = self.begin(client, "look", rng)
        op.reads = dict.fromkeys(keys)
        shuffled = list(keys)
        rng.shuffle(shuffled)
        way = rng.choices(
            (self._snapshot, self._scan, self._scan_all, self._read_only, self._at_once),
            (4, 2, 1, 2, 1),
        )[0]
        at = None
        if past and rng.random() < PAST_SHARE and self._seen_version:
            at, op.begin, way = self._seen_version, 0, self._snapshot
        backward = rng.random() < 0.5
        try:
            found, op.version = await way(db, shuffled, at, backward)
        except KVError as error:
            op.reads = {}
            self.end(op, error)
            return op
        for key in found:
            if key not in self.watched:
                self.problems.append(
                    f"Phantom: {self.name}: {client} found a row {key!r} that nobody wrote"
                )
        op.reads.update((key, found[key]) for key in keys if key in found)
        self.end(op)
        return op

    async def _look_stale(
        self, db: Database, client: str, rng: random.Random, keys: Sequence[bytes]
    ) -> TxnOp:
        op = self.begin(client, "stale", rng)
        op.begin, bound_s = 0, rng.choice(STALENESS_S)
        began = asyncio.get_running_loop().time()
        snapshot = db.snapshot(max_staleness=bound_s)
        try:
            if rng.random() < 0.5:
                found = await snapshot.get_many(keys)
            else:
                found = dict(await snapshot.scan(min(keys), max(keys) + b"\0").to_list())
            op.version = await snapshot.version()
        except KVError as error:
            self.end(op, error)
            return op
        if op.version >= self._laid_version:  # else it is right that nothing is there
            op.reads = {key: found.get(key) for key in keys}
        self.staleness.reads.append(StaleRead(client, db, began, bound_s, op.version))
        self.settle(op, None, f"{op.name!r} {op.reads!r}")
        return op

    async def _snapshot(
        self, db: Database, keys: list[bytes], at: int | None, _backward: bool
    ) -> tuple[dict[bytes, bytes], int]:
        snapshot = db.snapshot(at)
        return await snapshot.get_many(keys), await snapshot.version()

    async def _scan(
        self, db: Database, keys: list[bytes], at: int | None, backward: bool
    ) -> tuple[dict[bytes, bytes], int]:
        """Place by place."""
        snapshot = db.snapshot(at)
        found: dict[bytes, bytes] = {}
        for place in range(len(self.places)):
            mine = [key for key in keys if key.startswith(self.prefix(place))]
            if mine:
                start, end = min(mine), max(mine) + b"\0"
                found.update(await snapshot.scan(start, end, reverse=backward).to_list())
        return found, await snapshot.version()

    async def _scan_all(
        self, db: Database, keys: list[bytes], at: int | None, backward: bool
    ) -> tuple[dict[bytes, bytes], int]:
        """All at once, over what others have between."""
        snapshot = db.snapshot(at)
        rows = await snapshot.scan(min(keys), max(keys) + b"\0", reverse=backward).to_list()
        ordered = sorted(rows, reverse=backward)
        if rows != ordered:
            self.problems.append(f"Scan-order: {self.name}: a scan's rows are not in order")
        wanted = dict.fromkeys(keys)
        return {key: value for key, value in rows if key in wanted}, await snapshot.version()

    async def _read_only(
        self, db: Database, keys: list[bytes], _at: int | None, _backward: bool
    ) -> tuple[dict[bytes, bytes], int]:
        """Side by side, in a transaction."""
        async with db.transaction(read_only=True) as tx:
            values = await asyncio.gather(*(tx.get(key) for key in keys), return_exceptions=True)
        found = {}
        for key, value in zip(keys, values, strict=True):
            if isinstance(value, BaseException):
                raise value
            if value is not None:
                found[key] = value
        return found, tx.read_version or 0

    async def _at_once(
        self, db: Database, keys: list[bytes], _at: int | None, _backward: bool
    ) -> tuple[dict[bytes, bytes], int]:
        """The one that does not tell its version."""
        return await db.get_many(keys), 0

    # -- the end

    async def finish(self, db: Database) -> None:
        """Asking for an outcome decides it. A marker that is not there decides nothing: what it belongs to may still be under
        way. So markers, and all that is compared with them, are read at one version, after the outcomes.
        """
        await each(lambda trail: self._ask(db, trail), [one for one in self.trails if one.token])
        async with db.snapshot() as view:
            await each(lambda trail: _follow(view, trail), [one for one in self.trails if one.row])
            await self.read_final(view)

    async def read_final(self, view: Snapshot) -> None:
        found = await view.get_many(self.watched) if self.watched else {}
        self.final = {key: found.get(key) for key in self.watched}

    async def _ask(self, db: Database, trail: Trail) -> None:
        try:
            outcome = await db.outcome(trail.token, timeout=FINISH_TIMEOUT_S)
        except OutcomeExpired:
            if trail.op.outcome is not Outcome.UNKNOWN:
                trail.version = trail.op.version
            return
        trail.version = outcome.version if isinstance(outcome, Committed) else 0

    def check(self) -> list[str]:
        found = [*super().check(), *first_of_each_kind(self.staleness.problems())]
        if not self.exact:
            return found
        if any(trail.version is None for trail in self.trails):
            return [
                *found,
                f"Undecided: {self.name}: the outcome of a transaction is not known any more",
            ]
        wrong = (f"Serializability: {self.name}: {each_wrong}" for each_wrong in self.replay())
        return [*found, *first_of_each_kind(wrong)]

    def replay(self) -> list[str]:
        """T2. What is wrong with the order of versions."""
        return judges.judge_transactions(self.rows(), self.ops, self.final, self._markers())

    def _markers(self) -> dict[bytes, int]:
        return {
            trail.op.name: trail.version
            for trail in self.trails
            if isinstance(trail.op, TxnOp) and trail.version
        }

    def complete(self) -> None:
        super().complete()
        history = self.history
        if all(trail.version is not None for trail in self.trails):
            history.final = {**(history.final or {}), **self.final}
            history.markers = {**(history.markers or {}), **self._markers()}

    def inspect(self) -> Iterable[str]:
        """Nothing more than the replay."""
        return ()


async def _follow(view: Snapshot, trail: Trail) -> None:
    entry = await view.get_entry(trail.row)
    happened = entry is not None and entry.value == trail.value
    trail.version = entry.version if entry is not None and happened else 0
