"""What a transaction has written and read so far: its own view of its writes, and the spans that it must guard.

Invariants
B1  `points` holds one operation for each key: the latest. A clear drops the points under it, so every point is later
    than every clear that covers it, and the write set may name the clears first.
B2  The anchor key names the transaction for ever: the first key written, which stays a point whatever is cleared later;
    or the start of the first clear, if that came first.
B3  Atomic operations stand only where the value below is unknown: over our own write they are computed at once.
B4  Stamped writes are numbered in order. A key with a stamp cannot be named before the commit, so a later clear leaves it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from typing import Final, Literal

import msgspec

from kvstore import limits
from kvstore.errors import InvalidArgument, TransactionTooLarge
from txn import atomics, stamps
from txn.types import Guard, Write, WriteKind, point_end

NumberFormat = Literal["ascii", "int64"]
NumberKind = Literal["add", "min", "max"]

_NUMBERS: Final = {
    ("add", "ascii"): WriteKind.ADD_ASCII,
    ("add", "int64"): WriteKind.ADD_INT64,
    ("min", "ascii"): WriteKind.MIN_ASCII,
    ("min", "int64"): WriteKind.MIN_INT64,
    ("max", "ascii"): WriteKind.MAX_ASCII,
    ("max", "int64"): WriteKind.MAX_INT64,
}
_MERGED: Final = (  # two of them, one after the other, are one
    WriteKind.ADD_ASCII, WriteKind.ADD_INT64, WriteKind.MIN_ASCII,
    WriteKind.MIN_INT64, WriteKind.MAX_ASCII, WriteKind.MAX_INT64,
)  # fmt: skip
_CONDITIONAL: Final = (WriteKind.APPEND, WriteKind.COMPARE_CLEAR)
FRESH_SHARE: Final = 16  # more new keys than one in so many are sorted together with the others


class Point(msgspec.Struct, eq=False):
    """What is written to one key. Only the buffer changes one. (A Struct: many are made.)"""

    kind: int  # PUT, DELETE, STAMPED_VALUE; or of the first of the operations
    _head: bytes = b""
    _tail: bytearray | None = None  # what was appended to a PUT since its value was asked for
    operations: list[tuple[int, bytes]] = []  # kind and operand, in order (B3)
    operands_bytes: int = 0
    wide: bool | None = None  # the format of the numbers among the operations; None: there is none

    @property
    def value(self) -> bytes:
        """Of a PUT; of a STAMPED_VALUE its operand."""
        if self._tail:
            self._head += self._tail
            self._tail = None
        return self._head

    @property
    def value_bytes(self) -> int:
        return len(self._head) + len(self._tail or b"")

    @property
    def size_bytes(self) -> int:
        return self.value_bytes + self.operands_bytes

    def append(self, piece: bytes) -> None:
        """To the value of a PUT, without copying it."""
        if self._tail is None:
            self._tail = bytearray()
        self._tail += piece


def number_write(key: bytes, kind: NumberKind, by: int, number_format: str) -> Write:
    """An operation on a number as a write. Raises: InvalidArgument."""
    if type(by) is not int or not atomics.INT64_MIN <= by <= atomics.INT64_MAX:
        raise InvalidArgument("the number must be an int of at most 64 bits")
    found = _NUMBERS.get((kind, number_format))
    if found is None:
        raise InvalidArgument('format must be "ascii" or "int64"')
    return Write(found, key, b"%d" % by)


def append_write(key: bytes, value: bytes, limit: int) -> Write:
    """Raises: InvalidArgument, ValueTooLarge."""
    limits.validate_value(value)
    if type(limit) is not int or not 0 <= limit <= limits.VALUE_BYTES_MAX:
        raise InvalidArgument(f"limit is a number of bytes, 0 to {limits.VALUE_BYTES_MAX}")
    return Write(WriteKind.APPEND, key, atomics.appended(value, limit))


def compare_clear_write(key: bytes, expected: bytes) -> Write:
    """Raises: InvalidArgument, ValueTooLarge."""
    limits.validate_value(expected)
    return Write(WriteKind.COMPARE_CLEAR, key, expected)


def after(kind: int, operand: bytes, before: bytes | None) -> bytes | None:
    """What a key holds after an atomic operation. Raises: InvalidArgument."""
    try:
        return atomics.after(kind, operand, before).value
    except atomics.BadValue as error:
        raise InvalidArgument(str(error)) from error


def value_over(point: Point, below: bytes | None) -> bytes | None:
    """What a key holds with `point` written over `below`. Raises: InvalidArgument."""
    if point.kind == WriteKind.PUT:
        return point.value
    if point.kind == WriteKind.DELETE:
        return None
    if point.kind == WriteKind.STAMPED_VALUE:
        raise InvalidArgument("a value with a versionstamp is known only after the commit")
    grown = bytearray()  # what was appended to `below`, which is not copied for every piece
    for kind, operand in point.operations:
        size = len(below or b"") + len(grown)
        if kind == WriteKind.APPEND:
            piece = atomics.fitting(operand, size)
            if piece is not None:
                below = below or b""
                grown += piece
        elif kind != WriteKind.COMPARE_CLEAR or len(operand) == size:  # else it differs
            below, grown = after(kind, operand, _joined(below, grown)), bytearray()
    return _joined(below, grown)


def _joined(head: bytes | None, tail: bytearray) -> bytes | None:
    return (head or b"") + tail if tail else head


def _start(span: tuple[bytes, bytes]) -> bytes:
    return span[0]


class WriteBuffer:
    """Writes of one transaction. Every method checks limits and raises InvalidArgument and its kin."""

    def __init__(self) -> None:
        self.anchor_key = b""  # empty: nothing is written yet
        self.points: dict[bytes, Point] = {}
        self._order: list[bytes] = []  # the keys of `points`, sorted, but for the fresh ones
        self._fresh: list[bytes] = []
        self.clears: list[tuple[bytes, bytes]] = []  # sorted, disjoint
        self.stamps: list[Write] = []  # with the stamp in the key
        self.conditional = False  # whether a key is there may depend on what it holds
        self._stamped = 0
        self._size_bytes = self._rows = 0

    def __bool__(self) -> bool:
        return bool(self.anchor_key)

    def put(self, key: bytes, value: bytes) -> None:
        self._set(key, Point(WriteKind.PUT, value))

    def delete(self, key: bytes) -> None:
        self._set(key, Point(WriteKind.DELETE))

    def atomic(self, write: Write) -> None:
        kind, key, operand = write.kind, write.key, write.value
        point = self.points.get(key)
        if point is None and not self.cleared(key):
            first = Point(
                kind, operations=[(kind, operand)], operands_bytes=len(operand), wide=_wide(kind)
            )
            self._set(key, first)
        elif point is not None and point.operations:
            self._add(point, kind, operand)
        elif point is not None and point.kind == WriteKind.PUT and kind == WriteKind.APPEND:
            piece = atomics.fitting(operand, point.value_bytes)
            if piece is not None:
                self._grow(len(piece), 0)
                point.append(piece)
        else:
            below = value_over(point, None) if point is not None else None
            value = after(kind, operand, below)
            if value is None:
                self._set(key, Point(WriteKind.DELETE))
            else:
                self._set(key, Point(WriteKind.PUT, value))
        self.conditional = self.conditional or kind in _CONDITIONAL

    def _add(self, point: Point, kind: int, operand: bytes) -> None:
        """One more operation on a value that is unknown."""
        operations, wide = point.operations, _wide(kind)
        if wide is not None and point.wide is not None and wide != point.wide:
            raise InvalidArgument("one key is a number in two formats")
        last, before = operations[-1]
        if last == kind and kind in _MERGED:
            ascii_kind = _NUMBERS[_name_of(kind), "ascii"]  # operands are decimals in both formats
            merged = after(ascii_kind, operand, before)
            assert merged is not None
            grown = len(merged) - len(before)
            self._grow(grown, 0)
            operations[-1] = (kind, merged)
        else:
            grown = len(operand)
            self._grow(grown, 1)
            operations.append((kind, operand))
        point.operands_bytes += grown
        if wide is not None:
            point.wide = wide

    def stamp_key(self, prefix: bytes, value: bytes) -> int:
        """Returns the number of the write."""
        number = self._next_number()
        write = Write(WriteKind.STAMPED_KEY, prefix, stamps.stamped(number, value))
        self._grow(len(prefix) + stamps.STAMP_BYTES + len(value), 1)
        self.stamps.append(write)
        self.anchor_key = self.anchor_key or prefix
        self._stamped = number + 1
        return number

    def stamp_value(self, key: bytes, head: bytes) -> int:
        """Returns the number of the write."""
        number = self._next_number()
        self._set(key, Point(WriteKind.STAMPED_VALUE, stamps.stamped(number, head)))
        self._stamped = number + 1
        return number

    def _next_number(self) -> int:
        if self._stamped >= stamps.NUMBERS_MAX:  # one key may be stamped again and again
            raise TransactionTooLarge(f"a transaction has at most {stamps.NUMBERS_MAX} stamps")
        return self._stamped

    def require_readable(self, start: bytes, end: bytes, at: int) -> None:
        """Raises: InvalidArgument if a key that gets its stamp at the commit, above `at`, may come to stand in [start, end)."""
        for prefix in dict.fromkeys(write.key for write in self.stamps):
            low, high = stamps.span(prefix, at)
            if low < end and start < high:
                raise InvalidArgument(
                    "a key with a versionstamp is known only after the commit: read this first"
                )

    def clear(self, start: bytes, end: bytes) -> None:
        """Forget every key of [start, end), ours and the store's."""
        start = start or b"\x00"  # the least key that there can be
        if start >= end:
            return
        self._clear(start, end)  # first: it may refuse, and nothing has happened then
        if not self.anchor_key:
            self.anchor_key = start
        anchored = self.anchor_key in self.points
        order = self._sorted()
        gone = slice(bisect_left(order, start), bisect_left(order, end))
        for key in order[gone]:
            self._forget(key, self.points.pop(key))
        del order[gone]
        if anchored and start <= self.anchor_key < end:  # B2
            self._set(self.anchor_key, Point(WriteKind.DELETE))

    def cleared(self, key: bytes) -> bool:
        at = bisect_right(self.clears, key, key=_start) - 1
        return at >= 0 and key < self.clears[at][1]

    def writes_key(self, key: bytes) -> bool:
        return key in self.points or self.cleared(key)

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
        """The keys of `points`. Sorted when they are asked for; a few that came since the last time are put in one by one."""
        order, fresh = self._order, self._fresh
        if len(fresh) * FRESH_SHARE < len(order):
            for key in fresh:
                insort(order, key)
        else:
            order += fresh
            order.sort()
        fresh.clear()
        return order

    def _between(self, start: bytes, end: bytes) -> list[bytes]:
        """The written keys of [start, end), in order."""
        order = self._sorted()
        return order[bisect_left(order, start) : bisect_left(order, end)]

    def points_in(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, Point]]:
        for key in self._between(start, end):
            yield key, self.points[key]

    def writes(self) -> list[Write]:
        """The write set: clears first, then the points in key order, then what is stamped in its key."""
        result = [Write(WriteKind.DELETE_RANGE, start, end) for start, end in self.clears]
        for key in self._sorted():
            point = self.points[key]
            if point.operations:
                result += [Write(kind, key, operand) for kind, operand in point.operations]
            else:
                result.append(Write(point.kind, key, point.value))
        return result + self.stamps

    def _set(self, key: bytes, point: Point) -> None:
        old = self.points.get(key)
        if old is None:
            self._grow(len(key) + point.size_bytes, len(point.operations) or 1)
            self._fresh.append(key)
        else:
            rows = (len(point.operations) or 1) - (len(old.operations) or 1)
            self._grow(point.size_bytes - old.size_bytes, rows)
        self.points[key] = point
        if not self.anchor_key:
            self.anchor_key = key

    def _grow(self, size_bytes: int, rows: int) -> None:
        """Raises: TransactionTooLarge, and nothing is counted then."""
        size_bytes, rows = self._size_bytes + size_bytes, self._rows + rows
        limits.validate_transaction_size(size_bytes, rows)
        self._size_bytes, self._rows = size_bytes, rows

    def _forget(self, key: bytes, point: Point) -> None:
        self._size_bytes -= len(key) + point.size_bytes
        self._rows -= len(point.operations) or 1


def _wide(kind: int) -> bool | None:
    """Whether it is an operation on a number of 8 bytes; None: on no number."""
    return kind in atomics.INT64_KINDS if kind in atomics.NUMBER_KINDS else None


def _name_of(kind: int) -> str:
    return next(name for (name, _), each in _NUMBERS.items() if each == kind)


class ReadSpans:
    """The spans that a transaction has read, kept few: beyond the limits neighbours are merged, which guards more."""

    def __init__(
        self,
        spans_max: int = limits.TXN_READ_SPANS_MAX,
        bytes_max: int = limits.TXN_SPANS_BYTES_MAX,
    ) -> None:
        self._spans: dict[tuple[bytes, bytes], None] = {}
        self._spans_max = spans_max
        self._bytes_max = bytes_max
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._spans)

    def add_key(self, key: bytes) -> None:
        self.add(key, point_end(key))

    def add(self, start: bytes, end: bytes) -> None:
        if start >= end or (start, end) in self._spans:
            return
        self._spans[start, end] = None
        self._bytes += len(start) + len(end)
        if len(self._spans) > self._spans_max or self._bytes > self._bytes_max:
            self._keep(self._merged())
            while len(self._spans) > 1 and (
                len(self._spans) > self._spans_max // 2 or self._bytes > self._bytes_max // 2
            ):  # neighbours in pairs, with the gap between them
                spans = list(self._spans)
                pairs = [
                    (one[0], spans[min(i * 2 + 1, len(spans) - 1)][1])
                    for i, one in enumerate(spans[::2])
                ]
                self._keep(pairs)

    def _keep(self, spans: list[tuple[bytes, bytes]]) -> None:
        self._spans = dict.fromkeys(spans)
        self._bytes = sum(len(start) + len(end) for start, end in spans)

    def covers(self, key: bytes) -> bool:
        return any(start <= key < end for start, end in self._spans)

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
