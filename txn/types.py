"""The nouns of transactions: ids, timestamps, writes, conditions, guards, participants. Pure data.

A timestamp is one 64-bit number of the oracle: milliseconds << 18 | counter. 0 means none.
A txn_id is begin_ts (8 bytes, big-endian) followed by 8 random bytes: made by the client before anything is sent.
begin_ts is any timestamp that had been issued before the transaction began; every commit_ts of the id is above it.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

TXN_ID_BYTES: Final = 16
TIMESTAMP_SHIFT: Final = 18
TIMESTAMP_MAX: Final = (1 << 64) - 1
NOBODY: Final = b"\xff" * 8  # no transaction's id begins so: the collector's latches do (txn/gc.py)
KEPT_PREFIX: Final = b"\xff\x02"  # of the rows of idempotency keys; what follows is a hash


class WriteKind(enum.IntEnum):
    PUT = 0  # value: the value
    DELETE = 1
    ADD_ASCII = 2  # value: the decimal to add; the row is decimal ASCII, absent counts as 0
    ADD_INT64 = (
        3  # value: the decimal to add; the row is 8 bytes, big-endian, signed; absent counts as 0
    )
    DELETE_RANGE = 4  # [key, value)
    MIN_ASCII = 5  # from here on see txn/atomics.py
    MIN_INT64 = 6
    MAX_ASCII = 7
    MAX_INT64 = 8
    APPEND = 9
    COMPARE_CLEAR = 10
    STAMPED_KEY = 11  # key: a prefix; value: the write's number (2 bytes), then the value
    STAMPED_VALUE = 12  # value: the write's number (2 bytes), then what precedes the stamp


class Write(msgspec.Struct, array_like=True, frozen=True, gc=False):
    kind: int  # a WriteKind
    key: bytes
    value: bytes = b""


class Stamp(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A write that names the version it is committed at: filled in when that is known (txn/stamps.py)."""

    key: bytes  # of the row; in_key: what precedes the stamp in it
    value: bytes  # of the row; not in_key: what precedes the stamp in it
    number: int  # of this write among the stamped ones of its transaction, below 1 << 16
    in_key: bool


class ExpectKind(enum.IntEnum):
    ABSENT = 0
    VERSION = 1  # the newest version's commit timestamp is `version` (0: absent)
    VALUE = 2  # the newest value is `value`


class Expect(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A condition, evaluated when the transaction is prepared; a failed one aborts with reason `compare_failed`."""

    kind: int  # an ExpectKind
    key: bytes
    version: int = 0
    value: bytes = b""


class Guard(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Nothing inside [start, end) may be newer than read_ts when the transaction commits (gaps included)."""

    start: bytes
    end: bytes
    read_ts: int


class Participant(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One range's part of a transaction: `locus` is a key of the batch (it names the part for ever); [start, end) covers it."""

    locus: bytes
    start: bytes
    end: bytes


class PartStatus(enum.IntEnum):
    """What a range knows of its part of a transaction. All but ABSENT are stable."""

    ABSENT = 0
    PREPARED = 1  # ts: min_ts
    FENCED = 2  # will never be prepared here
    COMMITTED = 3  # ts: commit_ts
    ABORTED = 4
    EXPIRED = 5  # below the outcome horizon: says nothing; ask the anchor


class TxnStatus(enum.IntEnum):
    """What the anchor's range knows of a transaction."""

    ABSENT = 0
    STAGED = 1
    COMMITTED = 2
    ABORTED = 3
    INVISIBLE = 4  # undecided, but it can only commit above the reader's timestamp
    EXPIRED = 5


class FenceReason(enum.IntEnum):
    NONE = 0
    CONFLICT = 1  # a version, an intent or a guard of another transaction stood in the way
    COMPARE_FAILED = 2
    RECOVERY = 3  # somebody gave the attempt up
    TOO_LARGE = 4  # more than one entry may hold: delete_ranges met too many rows, or values grew
    BAD_VALUE = 5  # an increment met a row that is not a number (of the format), or overflowed


def is_txn_id(identity: bytes) -> bool:
    return len(identity) == TXN_ID_BYTES and not identity.startswith(NOBODY)


def begin_ts_of(txn_id: bytes) -> int:
    return int.from_bytes(txn_id[:8], "big")


def age_of(begin_ts: int, priority: int) -> int:
    """What conflicts are ordered by: the smaller is the older. A step of priority is a second."""
    return max(1, begin_ts - priority * (1000 << TIMESTAMP_SHIFT))


def make_txn_id(begin_ts: int, random_bits: int) -> bytes:
    """An id from an issued timestamp and 64 random bits."""
    return begin_ts.to_bytes(8, "big") + random_bits.to_bytes(8, "big")


def milliseconds_of(timestamp: int) -> int:
    return timestamp >> TIMESTAMP_SHIFT


def point_end(key: bytes) -> bytes:
    """The end of the span that holds `key` alone."""
    return key + b"\x00"
