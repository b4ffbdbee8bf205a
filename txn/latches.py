"""Latches: what a leader has evaluated and not yet applied. Held from evaluation to apply, in memory only.

A writer excludes writers, guards and (by order) readers of its keys; guards exclude writers only. Waiters of a latch are
evaluated again from the start when it goes. A latch is numbered when taken: a reader waits only for those that were there
when it came, since later writers take a fresh timestamp above the reader's (so a hot key starves nobody).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from txn import stamps
from txn.spans import Joined, Ordered, meeting
from txn.types import point_end
from txn.values import MOVED_BYTES_MAX

if TYPE_CHECKING:
    from txn.commands import Command
    from txn.ports import Rows
    from txn.state import Answer, Part
    from txn.types import Guard, Stamp

NEVER: Final = float("inf")
SEEN_BYTES_MAX: Final = 64 << 10  # that one command keeps in memory; beyond it apply reads again


class Pending:
    """One evaluated command, from latching until it is applied or given up."""

    __slots__ = (
        "adds_bytes",
        "asked_at",
        "asking",
        "command",
        "found_bytes",
        "grown_bytes",
        "guards",
        "keys",
        "looked_bytes",
        "looked_rows",
        "lost",
        "origin",
        "part",
        "request",
        "results",
        "seen",
        "sequence",
        "since",
        "spans",
        "stamp_spans",
        "stamps",
        "then",
        "txn_id",
        "values",
        "waiters",
    )

    def __init__(self, txn_id: bytes, request: Any, origin: Any) -> None:
        self.txn_id = txn_id
        self.request = request
        self.origin = origin
        self.command: Command | None = None
        self.keys: list[bytes] = []
        self.values: list[bytes | None] = []
        self.guards: list[Guard] = []
        self.spans: list[tuple[bytes, bytes]] = []  # written spans (delete_range)
        self.stamps: list[Stamp] = []
        self.stamp_spans: list[tuple[bytes, bytes]] = []  # where their keys may come to stand (V1)
        self.results: list[bytes] | None = None
        self.looked_rows = 0  # by all its delete_ranges
        self.looked_bytes = 0  # of what these rows hold
        self.found_bytes = 0  # of keys that these met
        self.grown_bytes = 0  # of rows that are appended to
        # Rows read under the latch, which apply need not read again.
        self.seen: tuple[tuple[bytes, bytes | None], ...] = ()
        self.adds_bytes = 0  # what apply writes beside what the entry holds: old values above all
        self.waiters: list[Waiter] = []
        self.sequence = 0
        self.asking = 0  # other ranges that have not answered yet; until then it is not proposed
        self.since = 0.0  # of a Prepare: when its evaluation first began
        self.asked_at = NEVER  # when it began to wait for its timestamp
        self.part: Part | None = None  # what a Resolve resolves
        self.then: Callable[[Answer], None] | None = None  # instead of an answer to `origin`
        self.lost: Callable[[], None] | None = None  # it was not proposed after all

    def look(self, rows: Rows, bytes_max: int) -> bool:
        """Read what its keys hold, which goes to HISTORY when it is applied. False: that is more than `bytes_max`."""
        get, size = rows.get, 0
        seen: list[tuple[bytes, bytes | None]] = []
        for key in self.keys:
            latest_key = b"L" + key
            row = get(latest_key)
            seen.append((latest_key, row))
            if row is not None:
                size += len(row)
                if size > bytes_max:
                    break
        self.adds_bytes += size
        if size <= SEEN_BYTES_MAX:
            self.seen = tuple(seen)
        return size <= bytes_max

    def take(self, part: Part, commit_ts: int, rows: Rows) -> None:
        """It will end this part: what that writes is latched until it has."""
        row = part.row
        self.part = part
        self.keys = row.keys
        if row.stamps:
            self.stamp_spans = stamps.spans(row.stamps, row.min_ts - 1)
        if commit_ts:
            self.look(rows, MOVED_BYTES_MAX)
            size = sum(map(len, row.keys)) + sum(len(value) for value in row.values if value)
            self.adds_bytes += size + sum(len(each.key) + len(each.value) for each in row.stamps)
        for each in row.participants:  # an outbox row
            size = len(part.locus) + 2 * len(each.locus) + len(each.start) + len(each.end)
            self.adds_bytes += size


class Waiter:
    """A request that waits, and is evaluated again from the start: for a latch, a transaction, or an answer."""

    __slots__ = ("done", "origin", "request", "sequence", "since")

    def __init__(self, request: Any, origin: Any, since: float, sequence: int = 0) -> None:
        self.request = request
        self.origin = origin
        self.since = since
        self.sequence = sequence  # readers: later latches are not waited for
        self.done = False

    def until_s(self, wait_s: float) -> float:
        """When its time is up, if it may wait for so long."""
        return self.since + wait_s

    def copy(self) -> Waiter:
        """To wait once more, in another place."""
        return Waiter(self.request, self.origin, self.since, self.sequence)


class LatchTable:
    def __init__(self) -> None:
        self.writes: dict[bytes, Pending] = {}
        self.txns: dict[bytes, Pending] = {}
        self.sequence = 0
        self._point_guards: dict[bytes, dict[Pending, None]] = {}
        self._span_guards: dict[Pending, Joined] = {}
        self._write_spans: dict[Pending, Joined] = {}
        self._stamp_spans: dict[Pending, Joined] = {}
        self._written, self._guarded = Ordered(), Ordered()

    def is_free(self, key: bytes) -> bool:
        """Whether a writer of the key surely meets nobody; False only means: look closer."""
        return not (
            key in self.writes
            or self._point_guards
            or self._span_guards
            or self._write_spans
            or self._stamp_spans
        )

    def blocker_of_write(self, key: bytes) -> Pending | None:
        found = self.writes.get(key)
        if found is not None:
            return found
        if self._point_guards:
            holders = self._point_guards.get(key)
            if holders:
                return next(iter(holders))
        for spans in (self._span_guards, self._write_spans, self._stamp_spans):
            if spans:
                found = next(meeting(spans, key, point_end(key)), None)
                if found is not None:
                    return found
        return None

    def blocker_of_guard(self, start: bytes, end: bytes) -> Pending | None:
        """A writer inside [start, end)."""
        return next(meeting(self._stamp_spans, start, end), None) or self._writer_in(start, end)

    def _writer_in(self, start: bytes, end: bytes) -> Pending | None:
        found = next(meeting(self._write_spans, start, end), None)
        if found is not None:
            return found
        if end == point_end(start):
            return self.writes.get(start)
        for key in self._written_in(start, end):
            return self.writes[key]
        return None

    def _written_in(self, start: bytes, end: bytes) -> Iterator[bytes]:
        # Keys come by `acquire`, which counts, and go by `release` only, so that there are fewer.
        return self._written.within(self.writes, (self.sequence, len(self.writes)), start, end)

    def blocker_of_write_span(self, start: bytes, end: bytes) -> Pending | None:
        found = next(meeting(self._stamp_spans, start, end), None)
        return found or self.blocker_of_stamp(start, end)

    def blocker_of_stamp(self, start: bytes, end: bytes) -> Pending | None:
        """Whoever is in the way of a key that will stand somewhere in [start, end); not another such (V1)."""
        found = self._writer_in(start, end)
        if found is not None:
            return found
        guards = self._point_guards
        for key in self._guarded.within(guards, (self.sequence, len(guards)), start, end):
            return next(iter(guards[key]))
        return next(meeting(self._span_guards, start, end), None)

    def blocker_of_read(self, key: bytes, sequence: int) -> Pending | None:
        """A writer of the key that latched at or before `sequence`."""
        found = self.writes.get(key)
        if found is not None and found.sequence <= sequence:
            return found
        if self._write_spans or self._stamp_spans:
            return self._spanning(key, point_end(key), sequence)
        return None

    def blocker_of_scan(self, start: bytes, end: bytes, sequence: int) -> Pending | None:
        for key in self._written_in(start, end):
            pending = self.writes[key]
            if pending.sequence <= sequence:
                return pending
        return self._spanning(start, end, sequence)

    def _spanning(self, start: bytes, end: bytes, sequence: int) -> Pending | None:
        for spans in (self._write_spans, self._stamp_spans):
            for pending in meeting(spans, start, end):
                if pending.sequence <= sequence:
                    return pending
        return None

    def acquire(self, pending: Pending) -> None:
        """Latch keys, spans, guards and the txn_id of `pending`; the caller has looked for blockers."""
        self.sequence += 1
        pending.sequence = self.sequence
        assert pending.txn_id not in self.txns, "a transaction is latched once"
        self.txns[pending.txn_id] = pending
        writes = self.writes
        for key in pending.keys:
            assert key not in writes, "a key has one writer"
            writes[key] = pending
        if pending.guards:
            self._guard(pending)
        if pending.spans:
            self._write_spans[pending] = Joined(pending.spans)
        if pending.stamp_spans:
            self._stamp_spans[pending] = Joined(pending.stamp_spans)

    def _guard(self, pending: Pending) -> None:
        spans = []
        for guard in pending.guards:
            if guard.end == point_end(guard.start):
                self._point_guards.setdefault(guard.start, {})[pending] = None
            else:
                spans.append((guard.start, guard.end))
        if spans:
            self._span_guards[pending] = Joined(spans)

    def release(self, pending: Pending) -> None:
        del self.txns[pending.txn_id]
        for key in pending.keys:
            del self.writes[key]
        if pending.guards:
            for guard in pending.guards:
                holders = self._point_guards.get(guard.start)
                if holders is not None and pending in holders:
                    del holders[pending]
                    if not holders:
                        del self._point_guards[guard.start]
            self._span_guards.pop(pending, None)
        if pending.spans:
            del self._write_spans[pending]
        if pending.stamp_spans:
            del self._stamp_spans[pending]

    def held(self) -> int:
        return len(self.txns)
