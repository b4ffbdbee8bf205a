"""What a transaction has written and read so far: its own view of its writes, and the spans that it must guard.

Invariants
B1  `points` holds one operation for each key: the latest. A clear drops the points under it, so every point is later
    than every clear that covers it, and the write set may name the clears first.
B2  The anchor key names the transaction for ever: the first key written, which stays a point whatever is cleared later;
    or the start of the first clear, if that came first.
B3  An ADD stands only where the value below is unknown: over our own write it is computed at once.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

from kvstore import limits
from kvstore.errors import InvalidArgument, TransactionTooLarge
from txn.types import Guard, Write, WriteKind, point_end

NumberFormat = Literal["ascii", "int64"]

INT64_MIN: Final = -(1 << 63)
INT64_MAX: Final = (1 << 63) - 1
_ADDS: Final = (WriteKind.ADD_ASCII, WriteKind.ADD_INT64)


class Point(NamedTuple):
    kind: int  # a WriteKind, never DELETE_RANGE
    value: bytes = b""  # of a PUT
    by: int = 0  # of an ADD


def add_write(key: bytes, by: int, number_format: str) -> Write:
    """An increment as a write. Raises: InvalidArgument."""
    if type(by) is not int or not INT64_MIN <= by <= INT64_MAX:
        raise InvalidArgument("`by` must be an int of at most 64 bits")
    return Write(add_kind(number_format), key, b"%d" % by)


def add_kind(number_format: str) -> WriteKind:
    if number_format == "ascii":
        return WriteKind.ADD_ASCII
    if number_format == "int64":
        return WriteKind.ADD_INT64
    raise InvalidArgument('format must be "ascii" or "int64"')


def parse_number(kind: int, value: bytes | None) -> int:
    """The number in a value; an absent one counts as 0. Raises: InvalidArgument."""
    if value is None:
        return 0
    if kind == WriteKind.ADD_INT64:
        if len(value) != 8:
            raise InvalidArgument("the value is not a 64-bit integer")
        return int.from_bytes(value, "big", signed=True)
    digits = value[1:] if value[:1] == b"-" else value
    if not digits.isdigit() or not INT64_MIN <= int(value) <= INT64_MAX:
        raise InvalidArgument("the value is not a decimal number of at most 64 bits")
    return int(value)


def format_number(kind: int, number: int) -> bytes:
    """Raises: InvalidArgument when it overflows."""
    if not INT64_MIN <= number <= INT64_MAX:
        raise InvalidArgument("the sum does not fit into 64 bits")
    return number.to_bytes(8, "big", signed=True) if kind == WriteKind.ADD_INT64 else b"%d" % number


def value_over(point: Point, below: bytes | None) -> bytes | None:
    """What a key holds with `point` written over `below`. Raises: InvalidArgument."""
    if point.kind == WriteKind.PUT:
        return point.value
    if point.kind == WriteKind.DELETE:
        return None
    return format_number(point.kind, parse_number(point.kind, below) + point.by)


def _start(span: tuple[bytes, bytes]) -> bytes:
    return span[0]


class WriteBuffer:
    """Writes of one transaction. Every method checks limits and raises InvalidArgument and its kin."""

    def __init__(self) -> None:
        self.anchor_key = b""  # empty: nothing is written yet
        self.points: dict[bytes, Point] = {}
        self._order: (
            list[bytes] | None
        ) = []  # the keys of `points`, sorted; None: to be sorted when it is asked for
        self.clears: list[tuple[bytes, bytes]] = []  # sorted, disjoint
        self._size_bytes = 0

    def __bool__(self) -> bool:
        return bool(self.anchor_key)

    def put(self, key: bytes, value: bytes) -> None:
        self._set(key, Point(WriteKind.PUT, value))

    def delete(self, key: bytes) -> None:
        self._set(key, Point(WriteKind.DELETE))

    def add(self, key: bytes, by: int, kind: WriteKind) -> None:
        point = self.points.get(key)
        if point is None and not self.cleared(key):
            self._set(key, Point(kind, b"", by))
        elif point is not None and point.kind in _ADDS:
            if point.kind != kind:
                raise InvalidArgument("one key is incremented in two formats")
            total = point.by + by
            format_number(kind, total)
            self._set(key, Point(kind, b"", total))
        else:
            below = value_over(point, None) if point is not None else None
            self._set(
                key, Point(WriteKind.PUT, format_number(kind, parse_number(kind, below) + by))
            )

    def clear(self, start: bytes, end: bytes) -> None:
        """Forget every key of [start, end), ours and the store's."""
        start = start or b"\x00"  # the least key that there can be
        if start >= end:
            return
        if not self.anchor_key:
            self.anchor_key = start
        anchored = self.anchor_key in self.points
        for key in self._between(start, end):
            self._size_bytes -= len(key) + len(self.points.pop(key).value)
            self._order = None
        self._clear(start, end)
        if anchored and start <= self.anchor_key < end:  # B2
            self._set(self.anchor_key, Point(WriteKind.DELETE))

    def cleared(self, key: bytes) -> bool:
        at = bisect_right(self.clears, key, key=_start) - 1
        return at >= 0 and key < self.clears[at][1]

    def overlays(self, start: bytes, end: bytes) -> bool:
        """Is there anything of ours in [start, end)?"""
        if self._between(start, end):
            return True
        at = bisect_left(self.clears, end, key=_start) - 1
        return at >= 0 and start < self.clears[at][1]

    def _clear(self, start: bytes, end: bytes) -> None:
        """Add to the clears; those that overlap or touch become one."""
        low = bisect_left(self.clears, start, key=_start)
        if low and start <= self.clears[low - 1][1]:
            low -= 1
        high = bisect_right(self.clears, end, key=_start)
        if low < high:
            start, end = min(start, self.clears[low][0]), max(end, self.clears[high - 1][1])
        elif len(self.clears) >= limits.TXN_READ_SPANS_MAX:
            raise TransactionTooLarge("the transaction deletes too many spans")
        self.clears[low:high] = [(start, end)]

    def _sorted(self) -> list[bytes]:
        if self._order is None:
            self._order = sorted(self.points)
        return self._order

    def _between(self, start: bytes, end: bytes) -> list[bytes]:
        """The written keys of [start, end), in order."""
        order = self._sorted()
        return order[bisect_left(order, start) : bisect_left(order, end)]

    def points_in(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, Point]]:
        for key in self._between(start, end):
            yield key, self.points[key]

    def writes(self) -> list[Write]:
        """The write set: clears first, then the points in key order."""
        result = [Write(WriteKind.DELETE_RANGE, start, end) for start, end in self.clears]
        for key in self._sorted():
            point = self.points[key]
            value = b"%d" % point.by if point.kind in _ADDS else point.value
            result.append(Write(point.kind, key, value))
        return result

    def _set(self, key: bytes, point: Point) -> None:
        old = self.points.get(key)
        size = self._size_bytes + len(point.value) + len(key)
        if old is not None:
            size -= len(key) + len(old.value)
        limits.validate_transaction_size(size, len(self.points) + (old is None))
        self._size_bytes = size
        if old is None:
            self._order = None
        self.points[key] = point
        if not self.anchor_key:
            self.anchor_key = key


class ReadSpans:
    """The spans that a transaction has read, kept few: beyond the limit neighbours are merged, which guards more."""

    def __init__(self, spans_max: int = limits.TXN_READ_SPANS_MAX) -> None:
        self._spans: dict[tuple[bytes, bytes], None] = {}
        self._spans_max = spans_max

    def __len__(self) -> int:
        return len(self._spans)

    def add_key(self, key: bytes) -> None:
        self.add(key, point_end(key))

    def add(self, start: bytes, end: bytes) -> None:
        if start >= end:
            return
        self._spans[start, end] = None
        if len(self._spans) > self._spans_max:
            self._spans = dict.fromkeys(self._merged())
            while (
                len(self._spans) > self._spans_max // 2
            ):  # neighbours in pairs, with the gap between them
                spans = list(self._spans)
                pairs = [
                    (one[0], spans[min(i * 2 + 1, len(spans) - 1)][1])
                    for i, one in enumerate(spans[::2])
                ]
                self._spans = dict.fromkeys(pairs)

    def guards(self, read_ts: int) -> list[Guard]:
        return [Guard(start, end, read_ts) for start, end in self._merged()]

    def _merged(self) -> list[tuple[bytes, bytes]]:
        """Sorted and disjoint; what touches is one."""
        merged: list[tuple[bytes, bytes]] = []
        for start, end in sorted(self._spans):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        return merged


class Batch:
    """Writes collected, to be committed together: atomic, over any number of ranges. Nothing is read."""

    def __init__(self) -> None:
        self.buffer = WriteBuffer()
        self.version: int | None = None  # of the commit, when the block has ended

    def put(self, key: bytes, value: bytes) -> None:
        """Raises: KeyTooLarge, ValueTooLarge, TransactionTooLarge."""
        limits.validate_key(key)
        limits.validate_value(value)
        self.buffer.put(key, value)

    def delete(self, key: bytes) -> None:
        limits.validate_key(key)
        self.buffer.delete(key)

    def delete_range(self, start: bytes, end: bytes) -> None:
        self.buffer.clear(*limits.validate_range(start, end))

    def increment(self, key: bytes, by: int = 1, *, format: NumberFormat = "ascii") -> None:  # noqa: A002
        limits.validate_key(key)
        add_write(key, by, format)
        self.buffer.add(key, by, add_kind(format))
