"""Conditions and sums: what a Prepare's evaluation computes from the newest values. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from txn.mvcc import decode_latest
from txn.ports import Rows
from txn.types import Expect, ExpectKind, WriteKind

INT64 = 1 << 63


def failed_condition(expects: Sequence[Expect], rows: Rows) -> tuple[bytes, int] | None:
    """The first condition that does not hold now: its key, and the version that is there (0: none)."""
    for expect in expects:
        row = rows.get(b"L" + expect.key)
        version = decode_latest(row) if row is not None else None
        value = version.value if version is not None else None
        current = version.commit_ts if version is not None and value is not None else 0
        if expect.kind == ExpectKind.ABSENT:
            holds = value is None
        elif expect.kind == ExpectKind.VERSION:
            holds = current == expect.version
        else:
            holds = value == expect.value
        if not holds:
            return expect.key, current
    return None


def add(kind: int, current: bytes | None, by: bytes) -> bytes | None:
    """The sum as bytes in the row's format; None if the row is not of the format, or the sum does not fit."""
    try:
        amount = int(by)
        if kind == WriteKind.ADD_INT64:
            if current is not None and len(current) != 8:
                return None
            total = (int.from_bytes(current, "big", signed=True) if current else 0) + amount
            return total.to_bytes(8, "big", signed=True) if -INT64 <= total < INT64 else None
        if current is not None and (len(current) > 20 or not current.lstrip(b"-").isdigit()):
            return None
        total = (int(current) if current else 0) + amount
        return b"%d" % total if -INT64 <= total < INT64 else None
    except ValueError:
        return None
