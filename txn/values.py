"""What a Prepare's evaluation computes from the newest values, under its latches: conditions, then final values. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from txn import atomics, keycode, stamps
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

RANGE_ROWS_MAX = 5_000  # of one transaction in one range
RANGE_BYTES_MAX = 4 << 20
RANGE_LOOKED_MAX = 50_000  # by a delete_range, deleted rows included: it is one turn of the node


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
        for looked, (row_key, row) in enumerate(rows.scan(low, high)):
            if looked >= RANGE_LOOKED_MAX:
                return Answer(PartStatus.FENCED, 0, FenceReason.TOO_LARGE, key)
            if row[24]:
                continue
            final[row_key[1:]] = None
            size += len(row_key)
            if len(final) > RANGE_ROWS_MAX or size > RANGE_BYTES_MAX:
                return Answer(PartStatus.FENCED, 0, FenceReason.TOO_LARGE, key)
    elif kind == WriteKind.STAMPED_KEY:
        pending.stamps.append(stamps.of_write(write))
    elif kind == WriteKind.STAMPED_VALUE:
        pending.stamps.append(stamps.of_write(write))
        final[key] = pending.stamps[-1].value
    else:
        return _compute_atomic(write, final, pending, rows)
    return None


def _compute_atomic(
    write: Write, final: dict[bytes, bytes | None], pending: Pending, rows: Rows
) -> Answer | None:
    """One that changes nothing writes nothing; what it has seen has to stay until the transaction ends."""
    key = write.key
    known = key in final
    before = final[key] if known else _newest_value(key, rows)
    try:
        value, told = atomics.after(write.kind, write.value, before)
    except atomics.BadValue:
        return Answer(PartStatus.FENCED, 0, FenceReason.BAD_VALUE, key)
    if known or value != before:
        final[key] = value
    else:
        pending.guards.append(hold(key, point_end(key)))
    if pending.results is None:
        pending.results = []
    pending.results.append(told)
    if write.kind == WriteKind.APPEND and value is not None:  # it may be larger than the request
        pending.grown_bytes += len(value)
        if pending.grown_bytes > RANGE_BYTES_MAX:
            return Answer(PartStatus.FENCED, 0, FenceReason.TOO_LARGE, key)
    return None


def _newest_value(key: bytes, rows: Rows) -> bytes | None:
    row = rows.get(b"L" + key)
    return decode_latest(row).value if row is not None else None


def hold(start: bytes, end: bytes) -> Guard:
    """Blocks later writers of the span until the transaction ends, and validates nothing (DESIGN.md 4.8)."""
    return Guard(start, end, TIMESTAMP_MAX)
