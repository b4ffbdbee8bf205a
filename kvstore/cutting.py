"""A write set, and how it is cut into one part for each range concerned. Pure: it looks at what is known of the ranges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import msgspec

from kvstore import limits
from kvstore.errors import InvalidArgument
from kvstore.ranges import RangeCache, Route
from txn import stamps
from txn.coordinator import Part
from txn.types import Expect, Guard, Participant, Write, WriteKind, point_end

_DELETE_RANGE: Final = int(WriteKind.DELETE_RANGE)  # as plain numbers: asked for each write
_STAMPED_KEY: Final = int(WriteKind.STAMPED_KEY)


@dataclass(slots=True)
class WriteSet:
    """What one transaction wants. DELETE_RANGE writes come first; each key has one other write at most."""

    anchor_key: bytes  # the first key written, or the start of the first DELETE_RANGE
    writes: list[Write]
    expects: list[Expect] = field(default_factory=list)
    guards: list[Guard] = field(default_factory=list)
    lock_owner: bytes = b""  # the id under which the transaction holds locks


class _Share(msgspec.Struct, eq=False, gc=False):
    """What of a write set lies in one range, while it is being cut. A Struct: many are made."""

    low: bytes
    high: bytes
    writes: list[Write] = []
    expects: list[Expect] = []
    guards: list[Guard] = []
    size_bytes: int = 0
    rows: int = 0
    spans_bytes: int = 0

    def part(self, locus: bytes) -> Part:
        return Part(Participant(locus, self.low, self.high), self.writes, self.expects, self.guards)

    def add_span(self, start: bytes, end: bytes) -> None:
        self.spans_bytes += len(start) + len(end) + limits.SPAN_OVERHEAD_BYTES

    def locus(self) -> bytes:
        for write in self.writes:
            if write.kind != _DELETE_RANGE:
                return write.key
        return self.writes[0].key if self.writes else self.low


def cut(write_set: WriteSet, ranges: RangeCache) -> list[Part] | None:
    """One part for each range concerned, the anchor's first; None if the ranges are not all known.

    Raises: TransactionTooLarge; InvalidArgument if what can follow a prefix lies in several ranges.
    """
    find, anchor_key = ranges.find, write_set.anchor_key
    route = find(anchor_key)
    if route is None:
        return None
    anchor = _Share(anchor_key, point_end(anchor_key))
    shares = {route.range_id: anchor}  # by range id, in the order in which they are met
    for write in write_set.writes:
        key = write.key
        if write.kind == _DELETE_RANGE:
            if not _cut_clear(write, ranges, shares):
                return None
            continue
        route = find(key)
        if route is None:
            return None
        end = _stamped_end(key, route) if write.kind == _STAMPED_KEY else point_end(key)
        target = _share(shares, route, key, end)
        target.writes.append(write)
        target.rows += 1
        target.size_bytes += len(key) + len(write.value)
    for expect in write_set.expects:
        route = find(expect.key)
        if route is None:
            return None
        _share(shares, route, expect.key, point_end(expect.key)).expects.append(expect)
    for guard in write_set.guards:
        if not _cut_guard(guard, ranges, shares):
            return None
    size_bytes = rows = 0
    for known in shares.values():
        limits.validate_range_batch_size(known.size_bytes, len(known.writes))
        limits.validate_range_message_size(known.size_bytes + known.spans_bytes)
        size_bytes += known.size_bytes
        rows += known.rows
    limits.validate_transaction_size(size_bytes, rows, len(shares))
    return [
        known.part(anchor_key if known is anchor else known.locus()) for known in shares.values()
    ]


def single_part(write_set: WriteSet) -> Part:
    """The part of a write set of one key, which needs no knowledge of the ranges."""
    key = write_set.anchor_key
    participant = Participant(key, key, point_end(key))
    return Part(participant, write_set.writes, write_set.expects, write_set.guards)


def _share(shares: dict[int, _Share], route: Route, low: bytes, high: bytes) -> _Share:
    known = shares.get(route.range_id)
    if known is None:
        known = shares[route.range_id] = _Share(low, high)
        return known
    if low < known.low:
        known.low = low
    if high > known.high:
        known.high = high
    return known


def _cut_clear(write: Write, ranges: RangeCache, shares: dict[int, _Share]) -> bool:
    """False: the ranges are not all known."""
    pieces = ranges.split(write.key, write.value)
    if pieces is None:
        return False
    for piece in pieces:
        target = _share(shares, piece.route, piece.start, piece.end)
        target.writes.append(Write(WriteKind.DELETE_RANGE, piece.start, piece.end))
        target.size_bytes += len(piece.start) + len(piece.end)
        target.spans_bytes += limits.SPAN_OVERHEAD_BYTES
    return True


def _cut_guard(guard: Guard, ranges: RangeCache, shares: dict[int, _Share]) -> bool:
    """False: the ranges are not all known."""
    start, end = guard.start, guard.end
    route = ranges.find(start)
    if route is not None and start < end and (not route.end or end <= route.end):
        target = _share(shares, route, start, end)  # nearly always
        target.guards.append(guard)
        target.add_span(start, end)
        return True
    pieces = ranges.split(start, end)
    if pieces is None:
        return False
    for piece in pieces:
        target = _share(shares, piece.route, piece.start, piece.end)
        target.guards.append(Guard(piece.start, piece.end, guard.read_ts))
        target.add_span(piece.start, piece.end)
    return True


def _stamped_end(prefix: bytes, route: Route) -> bytes:
    """The end of what can follow a prefix. Raises: InvalidArgument if that is not in one range."""
    _, end = stamps.span(prefix)
    if route.end and end > route.end:
        raise InvalidArgument(
            f"what can follow the prefix {prefix!r} must lie in one range: choose another prefix"
        )
    return end
