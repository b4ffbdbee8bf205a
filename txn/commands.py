"""What a range's log holds: batches of commands. One Raft entry is one batch, all that a turn decided for the range.

Each command is the result of an evaluation by a leader: it carries final values and timestamps, so that applying it is
a pure function of the command and the state (txn/apply.py). Fields are only appended, with defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from txn.types import Guard, Participant, Stamp


class Commit(msgspec.Struct, array_like=True, frozen=True, tag=1, gc=False):
    """A transaction of one range, whole: its versions are its record (DESIGN.md section 4.7)."""

    txn_id: bytes
    locus: bytes
    commit_ts: int
    keys: list[bytes]
    values: list[bytes | None]  # None deletes
    keep_status: bool = (
        False  # the locus is a span (delete_range alone): no version can be the record, so a row is
    )


class PreparePart(msgspec.Struct, array_like=True, frozen=True, tag=2, gc=False):
    """One part of a transaction over several ranges; with participants it also stages the record (at the anchor)."""

    txn_id: bytes
    locus: bytes
    anchor_key: bytes
    min_ts: int
    age: int
    keys: list[bytes]
    values: list[bytes | None]
    guards: list[Guard]
    participants: list[Participant] = []
    stamps: list[Stamp] = []


class FencePart(msgspec.Struct, array_like=True, frozen=True, tag=3, gc=False):
    """Refuse the part for ever, unless it is prepared or decided already: the log's order decides."""

    txn_id: bytes
    locus: bytes
    anchor_key: bytes
    reason: int
    key: bytes = b""
    other_txn: bytes = b""
    other_version: int = 0


class Decide(msgspec.Struct, array_like=True, frozen=True, tag=4, gc=False):
    """At the anchor: STAGED becomes COMMITTED{commit_ts} or (0) ABORTED; its own part is resolved, the outbox written."""

    txn_id: bytes
    anchor_key: bytes
    commit_ts: int


class ResolvePart(msgspec.Struct, array_like=True, frozen=True, tag=5, gc=False):
    """At a participant: intents become versions at commit_ts, or (0) vanish."""

    txn_id: bytes
    anchor_key: bytes
    locus: bytes
    commit_ts: int
    hinted: bool


class AbortUnstaged(msgspec.Struct, array_like=True, frozen=True, tag=6, gc=False):
    """At the anchor, when nothing is known of the transaction: fence itself and write ABORTED, in one entry."""

    txn_id: bytes
    anchor_key: bytes


class OutboxDone(msgspec.Struct, array_like=True, frozen=True, tag=7, gc=False):
    """The Resolve of each of these was applied there: the outbox rows go. A row: (txn_id, anchor_key, locus)."""

    rows: list[tuple[bytes, bytes, bytes]]


class OracleBound(msgspec.Struct, array_like=True, frozen=True, tag=8, gc=False):
    """Meta range only: no timestamp at or above `hi` is issued before a higher bound is committed."""

    hi: int


class Garbage(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Of one key: HISTORY versions that go, (0: none) the tombstone that goes from LATEST, statuses that nobody asks for."""

    key: bytes
    versions: list[int] = []
    tombstone: int = 0
    parts: list[bytes] = []  # txn_ids of decided parts whose locus it is
    records: list[bytes] = []  # txn_ids of terminal records whose anchor key it is


class Collect(msgspec.Struct, array_like=True, frozen=True, tag=9, gc=False):
    """Reads below `threshold` are refused from here on, as is what began at or below it; these rows go (txn/gc.py)."""

    threshold: int
    garbage: list[Garbage]


Command = (
    Commit
    | PreparePart
    | FencePart
    | Decide
    | ResolvePart
    | AbortUnstaged
    | OutboxDone
    | OracleBound
    | Collect
)


COMMAND_BYTES: Final = 96  # of fields of fixed size, at most
ROW_BYTES: Final = 10  # of a key with its value, beside them, at most
SPAN_BYTES: Final = 24  # of a guard, a participant, or a stamp
GARBAGE_BYTES: Final = 32  # of a key with its garbage, or a row of an outbox
ID_BYTES: Final = 18


def size_bytes(command: Command) -> int:
    """How many bytes a command has in an entry: a little more than it has, never less."""
    return COMMAND_BYTES + SIZES[command.__class__](command)


def _rows(keys: Sequence[bytes], values: Sequence[bytes | None]) -> int:
    size = ROW_BYTES * len(keys)
    for key in keys:
        size += len(key)
    for value in values:
        if value is not None:
            size += len(value)
    return size


def _commit(command: Commit) -> int:
    return len(command.locus) + _rows(command.keys, command.values)


def _prepare(command: PreparePart) -> int:
    size = len(command.locus) + len(command.anchor_key) + _rows(command.keys, command.values)
    for guard in command.guards:
        size += SPAN_BYTES + len(guard.start) + len(guard.end)
    for each in command.participants:
        size += SPAN_BYTES + len(each.locus) + len(each.start) + len(each.end)
    for stamp in command.stamps:
        size += SPAN_BYTES + len(stamp.key) + len(stamp.value)
    return size


def _fence(command: FencePart) -> int:
    return len(command.locus) + len(command.anchor_key) + len(command.key)


def _decide(command: Decide | AbortUnstaged) -> int:
    return len(command.anchor_key)


def _resolve(command: ResolvePart) -> int:
    return len(command.anchor_key) + len(command.locus)


def _outbox(command: OutboxDone) -> int:
    return sum(
        GARBAGE_BYTES + len(anchor_key) + len(locus) for _, anchor_key, locus in command.rows
    )


def _bound(_: OracleBound) -> int:
    return 0


def _collect(command: Collect) -> int:
    size = 0
    for each in command.garbage:
        count = len(each.versions) + len(each.parts) + len(each.records)
        size += GARBAGE_BYTES + len(each.key) + ID_BYTES * count
    return size


SIZES: Final[Mapping[type[Command], Callable[[Any], int]]] = {
    Commit: _commit,
    PreparePart: _prepare,
    FencePart: _fence,
    Decide: _decide,
    ResolvePart: _resolve,
    AbortUnstaged: _decide,
    OutboxDone: _outbox,
    OracleBound: _bound,
    Collect: _collect,
}


class Batch(msgspec.Struct, array_like=True, frozen=True):
    """The data of one COMMAND entry. `version`: the range's epoch at proposal; it never changes yet, and nobody compares it."""

    closed_ts: int
    version: int
    commands: list[Command]


encode_batch = msgspec.msgpack.Encoder().encode
decode_batch = msgspec.msgpack.Decoder(Batch).decode
