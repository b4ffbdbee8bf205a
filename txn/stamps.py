"""Versionstamps: keys and values that carry the version at which their transaction commits.

A stamp is the commit version (8 bytes, big-endian) and the number of the write within its transaction (2 bytes): unique, and
ordered by commit. The version is known only when the transaction is committed, so until then the write is kept as it is
asked for, and filled in when its rows are written.

V1 the intent of a stamped key is a span: from the least version that the transaction may still get to the end of what its
   prefix can be followed by. Readers, guards and writers of keys in it meet the intent as they would meet one on a key; other
   stamped writes do not, since no two transactions have one version.
V2 keys with older stamps are not in the span: whoever takes elements from a queue is not in the way of who adds some.
V3 what can follow a prefix lies in one range, so that the key is this range's whatever version it gets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from txn.types import Stamp, Write, WriteKind

VERSION_BYTES: Final = 8
NUMBER_BYTES: Final = 2
STAMP_BYTES: Final = VERSION_BYTES + NUMBER_BYTES
NUMBERS_MAX: Final = 1 << (8 * NUMBER_BYTES)


def stamp(version: int, number: int) -> bytes:
    return version.to_bytes(VERSION_BYTES, "big") + number.to_bytes(NUMBER_BYTES, "big")


def stamped(number: int, rest: bytes) -> bytes:
    """The operand of a stamped write."""
    return number.to_bytes(NUMBER_BYTES, "big") + rest


def of_write(write: Write) -> Stamp:
    number, rest = int.from_bytes(write.value[:NUMBER_BYTES], "big"), write.value[NUMBER_BYTES:]
    return Stamp(write.key, rest, number, write.kind == WriteKind.STAMPED_KEY)


def span(prefix: bytes, above: int = 0) -> tuple[bytes, bytes]:
    """The keys that a stamped key with this prefix may become, if its version is above `above`."""
    low = prefix + (above + 1).to_bytes(VERSION_BYTES, "big")
    return low, prefix + b"\xff" * STAMP_BYTES + b"\x00"


def spans(stamps: Sequence[Stamp], above: int) -> list[tuple[bytes, bytes]]:
    """Of those that are stamped in their key; each prefix once."""
    prefixes = dict.fromkeys(each.key for each in stamps if each.in_key)
    return [span(prefix, above) for prefix in prefixes]


def once(writes: Sequence[Write]) -> Iterator[Write]:
    """The writes; of those with a stamp in their key, the first of each prefix: the others may become the same keys."""
    prefixes: set[bytes] = set()
    for write in writes:
        if write.kind == WriteKind.STAMPED_KEY:
            if write.key in prefixes:
                continue
            prefixes.add(write.key)
        yield write


def filled(
    keys: Sequence[bytes],
    values: Sequence[bytes | None],
    stamps: Sequence[Stamp],
    commit_ts: int,
) -> dict[bytes, bytes | None]:
    """The rows of a transaction that commits at this version."""
    rows = dict(zip(keys, values, strict=True))
    for each in stamps:
        text = stamp(commit_ts, each.number)
        if each.in_key:
            rows[each.key + text] = each.value
        else:
            rows[each.key] = each.value + text
    return rows
