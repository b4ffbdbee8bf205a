"""Versions: the newest stands under the bare key, older ones behind it in HISTORY, newest first.

M1 every version's timestamp is unique and a key's versions are written in rising order. M2 a key that was ever written has a
LATEST row, a tombstone at least, until garbage collection: so a scan of LATEST meets every key that any timestamp can see.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from txn import keycode
from txn.ports import Rows

NO_LIMIT: Final = 1 << 62
ROW_BYTES: Final = (
    1 << 10
)  # one row that is looked at takes as long as reading about so much more of it
SEEK_BYTES: Final = 4 << 10  # and the search for an older version, as so much
_VALUE, _TOMBSTONE = b"\x00", b"\x01"


class Budget:
    """What looks may still cost: the bytes that they read, and some for each row and each search. It may be overdrawn."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = NO_LIMIT


class Version(NamedTuple):
    commit_ts: int
    txn_id: bytes
    value: bytes | None  # None: a tombstone


def encode_latest(commit_ts: int, txn_id: bytes, value: bytes | None) -> bytes:
    head = commit_ts.to_bytes(8, "big") + txn_id
    return head + _TOMBSTONE if value is None else head + _VALUE + value


def decode_latest(row: bytes) -> Version:
    return Version(int.from_bytes(row[:8], "big"), row[8:24], None if row[24] else row[25:])


def is_tombstone(row: bytes) -> bool:
    """Of a LATEST row."""
    return row[24] != 0


def latest_ts(row: bytes) -> int:
    return int.from_bytes(row[:8], "big")


def decode_history(key: bytes, data: bytes) -> Version:
    return Version(keycode.history_ts(key), data[:16], None if data[16] else data[17:])


def read_at(rows: Rows, key: bytes, at: int) -> Version | None:
    """The newest version at or below `at`, or None; a tombstone is a version."""
    row = rows.get(keycode.latest_row(key))
    if row is None:
        return None
    if int.from_bytes(row[:8], "big") <= at:
        return decode_latest(row)
    return older_at(rows, key, at)


def older_at(rows: Rows, key: bytes, at: int) -> Version | None:
    """The newest HISTORY version at or below `at`."""
    prefix = keycode.history_prefix(key)
    for found, data in rows.scan(keycode.history_row(key, at), prefix + b"\xff" * 9):
        return decode_history(found, data)
    return None


def find_txn(rows: Rows, key: bytes, txn_id: bytes, latest: bytes | None, above: int) -> int:
    """The commit timestamp of the version of `key` that txn_id wrote, among those above `above`; 0 if there is none."""
    if latest is None:
        return 0
    if latest[8:24] == txn_id:
        return latest_ts(latest)
    if latest_ts(latest) <= above:
        return 0
    for found, data in rows.scan(keycode.history_prefix(key), keycode.history_row(key, above)):
        if data[:16] == txn_id:
            return keycode.history_ts(found)
    return 0


def scan_at(
    rows: Rows,
    start: bytes,
    end: bytes,
    at: int,
    *,
    reverse: bool = False,
    hidden_max: int = NO_LIMIT,
    bytes_max: int = NO_LIMIT,
    budget: Budget | None = None,
) -> Iterator[tuple[bytes, Version | None]]:
    """(key, version) of [start, end) at `at` in order; tombstones are left out. end b"": the end of all keys.

    It ends early, with the key that it looked at last and None, after hidden_max keys that have no value at `at`, or when the
    rows that it read have bytes_max, be they returned or not. All that is looked at is taken from `budget`.
    """
    budget = Budget() if budget is None else budget
    low, high = keycode.family_span(keycode.LATEST, start, end)
    hidden = size = 0
    for found, row in rows.scan(low, high, reverse=reverse):
        read = len(row)
        cost = ROW_BYTES
        version: Version | None
        if int.from_bytes(row[:8], "big") <= at:
            version = decode_latest(row)
        else:
            version = older_at(rows, found[1:], at)
            cost += SEEK_BYTES
            if version is not None and version.value is not None:
                read += len(version.value)
        size += read
        budget.left -= cost + read
        if version is not None and version.value is not None:
            yield found[1:], version
        else:
            hidden += 1
        if size >= bytes_max or hidden >= hidden_max:
            yield found[1:], None
            return
