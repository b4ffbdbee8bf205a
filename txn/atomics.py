"""Atomic operations: what a key holds after one, from what it holds before. Pure; the client computes with it, too.

An operation is no read: it is evaluated where the row is, under the latch, so two of them never conflict. One that leaves
the row as it is writes no version; the row is held until the transaction ends, since the decision rests on it.

| kind | operand | absent | what it tells |
|---|---|---|---|
| ADD, MIN, MAX (ASCII, INT64) | a decimal | ADD: counts as 0; MIN, MAX: the operand | the new number, as it is stored |
| APPEND | limit (4 bytes) and what is appended | empty | whether it fitted |
| COMPARE_CLEAR | what is expected | stays absent | whether it was cleared |

Numbers are signed and of 64 bits: decimal ASCII, or 8 bytes big-endian.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from txn.types import WriteKind

INT64_MIN: Final = -(1 << 63)
INT64_MAX: Final = (1 << 63) - 1
DIGITS_MAX: Final = 20  # of a decimal of 64 bits, with its sign
LIMIT_BYTES: Final = 4  # of an APPEND's limit
YES, NO = b"\x01", b""
INT64_KINDS: Final = (WriteKind.ADD_INT64, WriteKind.MIN_INT64, WriteKind.MAX_INT64)
NUMBER_KINDS: Final = (
    WriteKind.ADD_ASCII, WriteKind.MIN_ASCII, WriteKind.MAX_ASCII, *INT64_KINDS,
)  # fmt: skip
ATOMIC_KINDS: Final = (*NUMBER_KINDS, WriteKind.APPEND, WriteKind.COMPARE_CLEAR)
_ADDS: Final = (WriteKind.ADD_ASCII, WriteKind.ADD_INT64)
_MINIMA: Final = (WriteKind.MIN_ASCII, WriteKind.MIN_INT64)


class BadValue(ValueError):
    """The row, or the operand, is no number of the format; or the result does not fit."""


class After(NamedTuple):
    value: bytes | None  # what the key holds now; None: nothing
    told: bytes  # what the operation tells who asked for it


def after(kind: int, operand: bytes, before: bytes | None) -> After:
    """Raises: BadValue."""
    if kind == WriteKind.APPEND:
        piece = fitting(operand, len(before or b""))
        if piece is None:
            return After(before, NO)
        return After(piece if before is None else before + piece, YES)
    if kind == WriteKind.COMPARE_CLEAR:
        return After(None, YES) if before == operand else After(before, NO)
    if kind not in NUMBER_KINDS:
        raise BadValue(f"there is no operation {kind}")
    by = parse(WriteKind.ADD_ASCII, operand)
    if before is None:
        number = by
    elif kind in _ADDS:
        number = parse(kind, before) + by
    elif kind in _MINIMA:
        number = min(parse(kind, before), by)
    else:
        number = max(parse(kind, before), by)
    value = stored(kind, number)
    return After(value, value)


def parse(kind: int, value: bytes) -> int:
    """The number in a row, in the format of `kind`. Raises: BadValue."""
    if kind in INT64_KINDS:
        if len(value) != 8:
            raise BadValue("the value is not a 64-bit integer")
        return int.from_bytes(value, "big", signed=True)
    digits = value[1:] if value[:1] == b"-" else value
    if len(value) > DIGITS_MAX or not digits.isdigit():
        raise BadValue("the value is not a decimal number of at most 64 bits")
    number = int(value)
    if not INT64_MIN <= number <= INT64_MAX:
        raise BadValue("the value is not a decimal number of at most 64 bits")
    return number


def stored(kind: int, number: int) -> bytes:
    """A number in the format of `kind`. Raises: BadValue when it overflows."""
    if not INT64_MIN <= number <= INT64_MAX:
        raise BadValue("the sum does not fit into 64 bits")
    return number.to_bytes(8, "big", signed=True) if kind in INT64_KINDS else b"%d" % number


def appended(piece: bytes, limit: int) -> bytes:
    """The operand of an APPEND."""
    return limit.to_bytes(LIMIT_BYTES, "big") + piece


def limit_of(operand: bytes) -> int:
    """How many bytes the whole value may have after an APPEND."""
    return int.from_bytes(operand[:LIMIT_BYTES], "big")


def fitting(operand: bytes, before_bytes: int) -> bytes | None:
    """What an APPEND adds to a value of so many bytes; None: it does not fit."""
    piece = operand[LIMIT_BYTES:]
    return piece if before_bytes + len(piece) <= limit_of(operand) else None
