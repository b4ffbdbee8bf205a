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

KEY_BYTES_MAX = 4 << 10  # of a row; one byte at least
VALUE_BYTES_MAX = 1 << 20
BOUND_BYTES_MAX = KEY_BYTES_MAX + 1  # of a span: point_end of every key
RANGE_ROWS_MAX = 5_000  # of one transaction in one range
RANGE_BYTES_MAX = 4 << 20
RANGE_LOOKED_MAX = 50_000  # by its delete_ranges, deleted rows included: it is one turn of the node
PART_BYTES_MAX = (
    7 << 20
)  # of what its entry holds, but for participants: it goes to followers in one message
MOVED_BYTES_MAX = 32 << 20  # of what its keys hold: each replica moves it to HISTORY in one write
KEYS_UNSEEN_MAX = MOVED_BYTES_MAX // RANGE_BYTES_MAX - 1  # whatever so few hold, it is less
GUARD_BYTES = 16  # of a guard in an entry, beside its bounds


def wrong_size(write: Write) -> tuple[str, str] | None:
    """The refusal, if what it stores has a size that no client sends: stored, no client could name the key any more."""
    key_bytes, value_bytes, key_bytes_max = len(write.key), len(write.value), KEY_BYTES_MAX
    kind = write.kind
    if (
        kind == WriteKind.DELETE_RANGE
    ):  # its value is a bound, and so is its key, which may be empty
        key_bytes, value_bytes = max(1, key_bytes, value_bytes), 0
        key_bytes_max = BOUND_BYTES_MAX
    elif kind == WriteKind.STAMPED_KEY:
        key_bytes += stamps.STAMP_BYTES
        value_bytes -= stamps.NUMBER_BYTES
    elif kind == WriteKind.STAMPED_VALUE:
        value_bytes += stamps.STAMP_BYTES - stamps.NUMBER_BYTES
    elif kind == WriteKind.APPEND:  # what it may grow to
        value_bytes = max(value_bytes - atomics.LIMIT_BYTES, atomics.limit_of(write.value))
    if not key_bytes or (kind == WriteKind.STAMPED_KEY and not write.key):
        return "invalid_argument", "a key has at least one byte"
    if key_bytes > key_bytes_max:
        return "key_too_large", f"a key has at most {KEY_BYTES_MAX} bytes"
    if value_bytes > VALUE_BYTES_MAX:
        return "value_too_large", f"a value has at most {VALUE_BYTES_MAX} bytes"
    return None


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
    if request.expects:
        written = set(pending.keys)
        for expect in request.expects:
            if expect.key not in written:  # it has to hold until the transaction ends
                pending.guards.append(hold(expect.key, point_end(expect.key)))
    if len(pending.keys) > 1 or pending.guards:  # one value alone is small enough
        if _entry_bytes(pending, guards=not request.one_range) > PART_BYTES_MAX:
            return Answer(PartStatus.FENCED, 0, FenceReason.TOO_LARGE, request.locus)
    if request.one_range:  # what is read here, apply need not read again
        fits = pending.look(rows, MOVED_BYTES_MAX)
    else:  # nobody else writes these keys before it ends, so it is as much then
        fits = len(pending.keys) <= KEYS_UNSEEN_MAX or pending.look(rows, MOVED_BYTES_MAX)
        pending.seen, pending.adds_bytes = (), 0  # a part moves nothing yet
    return None if fits else Answer(PartStatus.FENCED, 0, FenceReason.TOO_LARGE, request.locus)


def _entry_bytes(pending: Pending, *, guards: bool) -> int:
    """What was asked for, and what was found: keys of delete_ranges, values that were appended to, conditions' keys."""
    size = sum(map(len, pending.keys)) + sum(len(each) for each in pending.values if each)
    size += sum(len(stamp.key) + len(stamp.value) for stamp in pending.stamps)
    if guards:
        size += sum(len(guard.start) + len(guard.end) + GUARD_BYTES for guard in pending.guards)
    return size


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
        for row_key, row in rows.scan(low, high):
            if pending.looked_rows >= RANGE_LOOKED_MAX:
                return Answer(PartStatus.FENCED, 0, FenceReason.TOO_LARGE, key)
            pending.looked_rows += 1
            if row[24]:
                continue
            pending.looked_bytes += len(row)
            if pending.looked_bytes > MOVED_BYTES_MAX:
                return Answer(PartStatus.FENCED, 0, FenceReason.TOO_LARGE, key)
            if row_key[1:] in final:
                continue
            final[row_key[1:]] = None
            pending.found_bytes += len(row_key)
            if len(final) > RANGE_ROWS_MAX or pending.found_bytes > RANGE_BYTES_MAX:
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
