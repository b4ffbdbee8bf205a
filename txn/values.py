"""What a Prepare's evaluation computes from the newest values, under its latches: conditions, then final values. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from txn import keycode
from txn.mvcc import decode_latest
from txn.ports import Rows
from txn.state import Answer
from txn.types import (
    TIMESTAMP_MAX,
    Expect,
    ExpectKind,
    FenceReason,
    Guard,
    PartStatus,
    Write,
    WriteKind,
    point_end,
)

if TYPE_CHECKING:
    from txn.latches import Pending
    from txn.messages import Prepare

INT64 = 1 << 63
RANGE_ROWS_MAX = 5_000  # of one transaction in one range
RANGE_BYTES_MAX = 4 << 20


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


def compute(request: Prepare, pending: Pending, rows: Rows) -> Answer | None:
    """(d): conditions, then the final value of every key. Returns a refusal, or None."""
    failed = failed_condition(request.expects, rows)
    if failed is not None:
        key, version = failed
        return Answer(PartStatus.FENCED, 0, FenceReason.COMPARE_FAILED, key, b"", version)
    pending.guards = list(request.guards)
    writes = request.writes
    if len(writes) == 1 and writes[0].kind <= WriteKind.DELETE:
        write = writes[0]
        pending.keys = [write.key]
        pending.values = [write.value if write.kind == WriteKind.PUT else None]
    else:
        final: dict[bytes, bytes | None] = {}
        for write in writes:
            refusal = _compute_write(write, final, pending, rows)
            if refusal is not None:
                return refusal
        pending.keys, pending.values = list(final), list(final.values())
    for expect in request.expects:
        if expect.key not in pending.keys:  # it has to hold until the transaction ends
            pending.guards.append(hold(expect.key, point_end(expect.key)))
    return None


def _compute_write(
    write: Write, final: dict[bytes, bytes | None], pending: Pending, rows: Rows
) -> Answer | None:
    kind, key = write.kind, write.key
    if kind == WriteKind.PUT:
        final[key] = write.value
    elif kind == WriteKind.DELETE:
        final[key] = None
    elif kind == WriteKind.DELETE_RANGE:
        pending.spans.append((key, write.value))
        pending.guards.append(hold(key, write.value))
        for found in list(final):
            if key <= found < write.value:
                final[found] = None
        low, high = keycode.family_span(keycode.LATEST, key, write.value)
        size = 0
        for row_key, row in rows.scan(low, high):
            if row[24]:
                continue
            final[row_key[1:]] = None
            size += len(row_key)
            if len(final) > RANGE_ROWS_MAX or size > RANGE_BYTES_MAX:
                return Answer(PartStatus.FENCED, 0, FenceReason.TOO_LARGE, key)
    else:
        current = final[key] if key in final else _newest_value(key, rows)
        result = add(kind, current, write.value)
        if result is None:
            return Answer(PartStatus.FENCED, 0, FenceReason.BAD_VALUE, key)
        final[key] = result
        if pending.results is None:
            pending.results = []
        pending.results.append(result)
    return None


def _newest_value(key: bytes, rows: Rows) -> bytes | None:
    row = rows.get(b"L" + key)
    return decode_latest(row).value if row is not None else None


def hold(start: bytes, end: bytes) -> Guard:
    """Blocks later writers of the span until the transaction ends, and validates nothing (DESIGN.md 4.8)."""
    return Guard(start, end, TIMESTAMP_MAX)
