"""A set of elements: what was added is there until somebody takes it away, and nothing else is.

Every element is added once, in one of the ways that there are to write, and a scan at one version is held against each
element near it: by versions where they are known, by real time where they are not.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from kvstore.client import Database
from kvstore.errors import KVError
from kvstore.testing.history import Outcome, TxnOp
from kvstore.testing.workloads.traced import Traced

BUCKET: Final = 24  # elements that a scan looks for
SPAN_MAX: Final = 9  # elements that one deletion of a span covers


@dataclass
class Element:
    """One element: who adds it, and who tried to take it away."""

    key: bytes
    add: TxnOp
    takes: list[TxnOp]


class Sets(Traced):
    """Add one or two elements (in one transaction), take one away, or a span of them; scans."""

    name: ClassVar[str] = "sets"
    kinds_count: ClassVar[int] = 5
    exact: ClassVar[bool] = False  # what is unknown alone stays unknown

    def __init__(self, rng: random.Random, places: Sequence[bytes], **options: Any) -> None:
        super().__init__(rng, places, **options)
        self.elements: dict[bytes, Element] = {}
        self._spans: list[tuple[bytes, bytes, TxnOp]] = []  # that were deleted as a whole

    async def step(self, db: Database, client: str, rng: random.Random) -> None:
        kinds = (self._add, self._add_two, self._take, self._take_span, self._scan_bucket)
        await self.kind(rng, kinds)(db, client, rng)

    # -- operations

    def _bucket_of(self, number: int) -> bytes:
        return b"%03d/" % (number // BUCKET)

    def _new(self, op: TxnOp) -> bytes:
        number = len(self.elements)
        key = self.prefix(number) + self._bucket_of(number) + b"%05d" % number
        self.elements[key] = Element(key, op, [])
        self.watched[key] = None
        op.writes[key] = op.name
        return key

    async def _add(self, db: Database, client: str, rng: random.Random) -> None:
        op = self.begin(client, "add", rng)
        key = self._new(op)
        await self._ended(op, db.put(key, op.name))

    async def _add_two(self, db: Database, client: str, rng: random.Random) -> None:
        op = self.begin(client, "add", rng)
        self._new(op)
        self._new(op)
        await self._ended(op, self._together(db, op))

    async def _together(self, db: Database, op: TxnOp) -> int | None:
        async with db.batch() as batch:
            for key, value in op.writes.items():
                assert value is not None
                batch.put(key, value)
        return batch.version

    async def _take(self, db: Database, client: str, rng: random.Random) -> None:
        near = list(self.elements)[-BUCKET:]
        op = self.begin(client, "take", rng)
        if not near:
            self.end(op)
            return
        key = rng.choice(near)
        op.writes[key] = None
        self.elements[key].takes.append(op)
        await self._ended(op, db.delete(key))

    async def _take_span(self, db: Database, client: str, rng: random.Random) -> None:
        """Of one place, or over several."""
        low = rng.randrange(max(1, len(self.elements)))
        high = low + rng.randint(1, SPAN_MAX)
        place = rng.randrange(len(self.places))
        start = self.prefix(place) + self._bucket_of(low) + b"%05d" % low
        end = self.prefix(place) + self._bucket_of(high) + b"%05d" % high
        op = self.begin(client, "take", rng)
        op.writes |= {key: None for key in self.elements if start <= key < end}
        self._spans.append((start, end, op))
        await self._ended(op, db.delete_range(start, end))

    async def _ended(self, op: TxnOp, call: Awaitable[int | None]) -> None:
        error: KVError | None = None
        try:
            op.version = await call or 0
        except KVError as raised:
            error = raised
        self.end(op, error)

    async def _scan_bucket(self, db: Database, client: str, rng: random.Random) -> None:
        number = max(0, len(self.elements) - 1 - rng.randrange(BUCKET // 2))
        op = self.begin(client, "scan", rng)
        backward, bare = rng.random() < 0.5, rng.random() < 0.3
        error: KVError | None = None
        try:
            await self._scan_into(db, op, self._bucket_of(number), backward=backward, bare=bare)
        except KVError as raised:
            error = raised
        self.end(op, error)

    async def _scan_into(
        self, db: Database, op: TxnOp, bucket: bytes, *, backward: bool, bare: bool
    ) -> None:
        snapshot = db.snapshot()
        found: dict[bytes, bytes] = {}
        for place in range(len(self.places)):
            prefix = self.prefix(place) + bucket
            scan = snapshot.scan(prefix=prefix, reverse=backward, keys_only=bare)
            rows = await scan.to_list()
            if [key for key, _ in rows] != sorted((key for key, _ in rows), reverse=backward):
                self.problems.append(f"Scan-order: sets: {op.name!r} has rows out of order")
            found |= rows
        op.version = await snapshot.version()
        for key, value in found.items():
            element = self.elements.get(key)
            if element is None:
                self.problems.append(
                    f"Phantom: sets: {op.name!r} found {key!r}, which nobody added"
                )
            elif not bare and value != element.add.name:
                self.problems.append(f"Wrong-value: sets: {op.name!r} found {key!r} = {value!r}")
        near = [key for key in self.elements if bucket in key]
        op.reads = {key: found.get(key) for key in near}

    # -- the end

    async def finish(self, db: Database) -> None:
        """A last scan of everything."""
        for number in range(0, len(self.elements), BUCKET):
            op = TxnOp("end", b"scan/end/%d" % number, self.history.tick())
            await self._scan_into(db, op, self._bucket_of(number), backward=False, bare=False)
            self.ops.append(op)
            self.history.transactions.append(op)
            self.end(op)

    def inspect(self) -> Iterable[str]:
        for op in self.ops:
            if op.reads and op.outcome is Outcome.OK:
                for key, value in op.reads.items():
                    wrong = self._judge(op, self.elements[key], value is not None)
                    if wrong:
                        kind, why = wrong
                        yield f"{kind}: sets: {op.name!r} at {op.version}: {key!r} {why}"

    def _judge(self, scan: TxnOp, element: Element, there: bool) -> tuple[str, str] | None:
        add, sure = element.add, element.add.outcome is Outcome.OK
        takes = [op for start, end, op in self._spans if start <= element.key < end]
        takes = [op for op in (*element.takes, *takes) if op.outcome is not Outcome.FAILED]
        if there:
            if add.outcome is Outcome.FAILED:
                return "Aborted-read", "is there, though adding it failed"
            if add.version > scan.version:
                return "Future-read", f"is there, though it was added at {add.version}"
            gone = [op.version for op in takes if add.version < op.version <= scan.version]
            if sure and gone:
                return "Risen-element", f"was taken away at {max(gone)}, and is there"
        elif sure:
            if add.version > scan.version and add.end < scan.begin:
                return (
                    "Stale-read",
                    f"was added at {add.version}, acknowledged before the scan, and is not there",
                )
            if add.version <= scan.version and not any(_may_hide(op, add, scan) for op in takes):
                return (
                    "Lost-element",
                    f"was added at {add.version}, nobody took it away, and it is not there",
                )
        return None


def _may_hide(take: TxnOp, add: TxnOp, scan: TxnOp) -> bool:
    if take.outcome is Outcome.OK and take.version:
        return add.version < take.version <= scan.version
    return take.begin < scan.end
