"""Row keys: one first byte tells the families apart, the rest orders by user key.

| family | row key | row |
|---|---|---|
| L | key | the newest version: commit_ts, txn_id, value or tombstone |
| H | escaped key, ~commit_ts | an older version: txn_id, value or tombstone |
| Q | escaped locus, txn_id | an undecided (PREPARED) part, with its writes and guards; the anchor's is the STAGED record, too |
| P | escaped locus, txn_id | a decided part: FENCED, COMMITTED or ABORTED |
| T | escaped anchor key, txn_id | a decided transaction: COMMITTED or ABORTED |
| O | escaped anchor key, txn_id, locus | an outbox row: a Resolve that is still to be acknowledged |
| R, C, M | range id | node-local: the range's state, its configuration, the oracle's bound |
| N | | node-local: the id of the cluster whose rows these are |

A key that is followed by something is escaped (00 -> 00 FF, terminator 00 01), so that no key's rows interleave with
another's; L needs no suffix and keeps the raw key, so that a plain get is one point look-up.
"""

from __future__ import annotations

from typing import Final

from txn.types import TIMESTAMP_MAX

LATEST: Final = b"L"
HISTORY: Final = b"H"
PREPARED: Final = b"Q"
DECIDED: Final = b"P"
TERMINAL: Final = b"T"
OUTBOX: Final = b"O"
RANGE: Final = b"R"
CONFIG: Final = b"C"
ORACLE: Final = b"M"
CLUSTER_ROW: Final = b"N"

# The families that hold rows of user keys: split, move and wipe carry them by key. LATEST is raw, the others escaped.
RAW_FAMILIES: Final = (LATEST,)
ESCAPED_FAMILIES: Final = (HISTORY, PREPARED, DECIDED, TERMINAL, OUTBOX)
_TERMINATOR: Final = b"\x00\x01"


def escape(key: bytes) -> bytes:
    """Order-preserving, self-terminating form of a key."""
    if b"\x00" in key:
        key = key.replace(b"\x00", b"\x00\xff")
    return key + _TERMINATOR


def unescape(row: bytes, start: int = 0) -> tuple[bytes, int]:
    """The key that begins at `start`, and the position after its terminator. ValueError if there is none."""
    at = start
    while True:
        at = row.index(b"\x00", at)
        if row[at + 1 : at + 2] == b"\x01":
            return row[start:at].replace(b"\x00\xff", b"\x00"), at + 2
        at += 2


def latest_row(key: bytes) -> bytes:
    return b"L" + key


def history_prefix(key: bytes) -> bytes:
    return b"H" + escape(key)


def history_row(key: bytes, commit_ts: int) -> bytes:
    return b"H" + escape(key) + (TIMESTAMP_MAX - commit_ts).to_bytes(8, "big")


def history_ts(row: bytes) -> int:
    return TIMESTAMP_MAX - int.from_bytes(row[-8:], "big")


def part_row(family: bytes, key: bytes, txn_id: bytes) -> bytes:
    """Rows of Q, P and T."""
    return family + escape(key) + txn_id


def outbox_row(anchor_key: bytes, txn_id: bytes, locus: bytes) -> bytes:
    return OUTBOX + escape(anchor_key) + txn_id + locus


def node_row(family: bytes, range_id: int) -> bytes:
    """Rows of R, C and M."""
    return family + range_id.to_bytes(8, "big")


def family_span(family: bytes, start: bytes, end: bytes) -> tuple[bytes, bytes]:
    """The rows of one family that belong to user keys in [start, end); end b"" is the end of all keys."""
    if family in RAW_FAMILIES:
        low, high = family + start, family + end
    else:
        low, high = family + escape(start)[:-2], family + escape(end)[:-2]
    return low, (high if end else bytes([family[0] + 1]))
