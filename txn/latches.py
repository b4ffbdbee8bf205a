"""Latches: what a leader has evaluated and not yet applied. Held from evaluation to apply, in memory only.

A writer excludes writers, guards and (by order) readers of its keys; guards exclude writers only. Waiters of a latch are
evaluated again from the start when it goes. A latch is numbered when taken: a reader waits only for those that were there
when it came, since later writers take a fresh timestamp above the reader's (so a hot key starves nobody).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from txn import stamps
from txn.types import point_end

if TYPE_CHECKING:
    from txn.commands import Command
    from txn.state import Answer, Part
    from txn.types import Guard, Stamp

NEVER: Final = float("inf")


class Pending:
    """One evaluated command, from latching until it is applied or given up."""

    __slots__ = (
        "asked_at",
        "asking",
        "command",
        "found_bytes",
        "grown_bytes",
        "guards",
        "keys",
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
        self.found_bytes = 0  # of keys that these met
        self.grown_bytes = 0  # of rows that are appended to
        # Rows read under the latch, which apply need not read again.
        self.seen: tuple[tuple[bytes, bytes | None], ...] = ()
        self.waiters: list[Waiter] = []
        self.sequence = 0
        self.asking = 0  # other ranges that have not answered yet; until then it is not proposed
        self.since = 0.0  # of a Prepare: when its evaluation first began
        self.asked_at = NEVER  # when it began to wait for its timestamp
        self.part: Part | None = None  # what a Resolve resolves
        self.then: Callable[[Answer], None] | None = None  # instead of an answer to `origin`
        self.lost: Callable[[], None] | None = None  # it was not proposed after all

    def take(self, part: Part) -> None:
        """It will end this part: what that writes is latched until it has."""
        row = part.row
        self.part = part
        self.keys = row.keys
        if row.stamps:
            self.stamp_spans = stamps.spans(row.stamps, row.min_ts - 1)


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
        self._point_guards: dict[bytes, list[Pending]] = {}
        self._span_guards: list[tuple[bytes, bytes, Pending]] = []
        self._write_spans: list[tuple[bytes, bytes, Pending]] = []
        self._stamp_spans: list[tuple[bytes, bytes, Pending]] = []

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
                return holders[0]
        for spans in (self._span_guards, self._write_spans, self._stamp_spans):
            for start, end, pending in spans:
                if start <= key < end:
                    return pending
        return None

    def blocker_of_guard(self, start: bytes, end: bytes) -> Pending | None:
        """A writer inside [start, end)."""
        return _meeting(self._stamp_spans, start, end) or self._writer_in(start, end)

    def _writer_in(self, start: bytes, end: bytes) -> Pending | None:
        found = _meeting(self._write_spans, start, end)
        if found is not None:
            return found
        if end == point_end(start):
            return self.writes.get(start)
        for key, pending in self.writes.items():
            if start <= key < end:
                return pending
        return None

    def blocker_of_write_span(self, start: bytes, end: bytes) -> Pending | None:
        return _meeting(self._stamp_spans, start, end) or self.blocker_of_stamp(start, end)

    def blocker_of_stamp(self, start: bytes, end: bytes) -> Pending | None:
        """Whoever is in the way of a key that will stand somewhere in [start, end); not another such (V1)."""
        found = self._writer_in(start, end)
        if found is not None:
            return found
        for key, holders in self._point_guards.items():
            if start <= key < end:
                return holders[0]
        return _meeting(self._span_guards, start, end)

    def blocker_of_read(self, key: bytes, sequence: int) -> Pending | None:
        """A writer of the key that latched at or before `sequence`."""
        found = self.writes.get(key)
        if found is not None and found.sequence <= sequence:
            return found
        for spans in (self._write_spans, self._stamp_spans):
            for start, end, pending in spans:
                if start <= key < end and pending.sequence <= sequence:
                    return pending
        return None

    def blocker_of_scan(self, start: bytes, end: bytes, sequence: int) -> Pending | None:
        for key, pending in self.writes.items():
            if pending.sequence <= sequence and start <= key and (not end or key < end):
                return pending
        for spans in (self._write_spans, self._stamp_spans):
            for low, high, pending in spans:
                if pending.sequence <= sequence and (not end or low < end) and start < high:
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
        for guard in pending.guards:
            if guard.end == point_end(guard.start):
                self._point_guards.setdefault(guard.start, []).append(pending)
            else:
                self._span_guards.append((guard.start, guard.end, pending))
        for start, end in pending.spans:
            self._write_spans.append((start, end, pending))
        for start, end in pending.stamp_spans:
            self._stamp_spans.append((start, end, pending))

    def release(self, pending: Pending) -> None:
        del self.txns[pending.txn_id]
        for key in pending.keys:
            del self.writes[key]
        for guard in pending.guards:
            if guard.end == point_end(guard.start):
                holders = self._point_guards[guard.start]
                holders.remove(pending)
                if not holders:
                    del self._point_guards[guard.start]
            else:
                self._span_guards.remove((guard.start, guard.end, pending))
        for start, end in pending.spans:
            self._write_spans.remove((start, end, pending))
        for start, end in pending.stamp_spans:
            self._stamp_spans.remove((start, end, pending))

    def held(self) -> int:
        return len(self.txns)


def _meeting(spans: list[tuple[bytes, bytes, Pending]], start: bytes, end: bytes) -> Pending | None:
    """The first that meets [start, end)."""
    for low, high, pending in spans:
        if low < end and start < high:
            return pending
    return None
