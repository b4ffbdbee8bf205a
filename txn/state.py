"""The replicated state of one range, as every replica keeps it: what is undecided in memory, the rest in rows.

Invariants: S1 an undecided part, a staged record, an outbox row is in memory exactly when its row exists (the rows are read
only when a replica starts; a queue in RocksDB slows with its own tombstones). S2 at most one intent per key (I10). S3 no
intent under a guard of another transaction (I10). S4 nothing here changes but by txn/apply.py, or at `load`.

INTENT, GUARD and STAGED have no rows of their own (DESIGN.md section 2). A PREPARED row holds its writes and guards whole,
the anchor's also the participants: intents, guards and the staged record are derived from it; so they cannot disagree (I10),
and a commit writes fewer rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from txn import keycode, stamps
from txn.decided import RecentlyDecided
from txn.ports import Rows
from txn.recent import Recent
from txn.spans import Joined, Ordered, meeting
from txn.types import (
    TIMESTAMP_MAX,
    Guard,
    Participant,
    PartStatus,
    Stamp,
    TxnStatus,
    begin_ts_of,
    point_end,
)


class RangeRow(msgspec.Struct, array_like=True):
    """The range's own row: changes in the same write batch as every row of the entries it speaks of (pitfall 1)."""

    range_id: int
    start: bytes
    end: bytes  # b"": the end of all keys
    version: int
    conf_ver: int
    applied_index: int
    applied_term: int
    closed_ts: int = 0
    gc_threshold: int = 0
    outcome_horizon: int = 0
    installing: bool = False
    decided_begin: int = 0  # the largest begin_ts of any DECIDED row ever written (txn/decided.py)
    newest: int = TIMESTAMP_MAX  # the largest version ever applied; a row without it: unknown


class PreparedRow(msgspec.Struct, array_like=True, frozen=True):
    anchor_key: bytes
    min_ts: int
    age: int
    keys: list[bytes]
    values: list[bytes | None]
    guards: list[Guard]
    participants: list[Participant] = []  # the whole transaction's, at its anchor: it is STAGED
    stamps: list[Stamp] = []


class DecidedRow(msgspec.Struct, array_like=True, frozen=True):
    status: int  # a PartStatus: FENCED, COMMITTED or ABORTED
    ts: int
    anchor_key: bytes
    reason: int = 0
    key: bytes = b""
    other_txn: bytes = b""
    other_version: int = 0
    hinted: bool = False


class TerminalRow(msgspec.Struct, array_like=True, frozen=True):
    commit_ts: int  # 0: aborted


class OutboxRow(msgspec.Struct, array_like=True, frozen=True):
    participant: Participant
    commit_ts: int  # 0: aborted


class Part:
    """An undecided part, in memory."""

    __slots__ = ("invisible_to", "locus", "resolving", "row", "suffix", "txn_id", "unheard")

    def __init__(self, locus: bytes, txn_id: bytes, row: PreparedRow) -> None:
        self.locus = locus
        self.txn_id = txn_id
        self.row = row
        self.suffix = keycode.part_row(b"", locus, txn_id)  # of its rows' keys, after the family
        # Volatile, of this leader's term:
        self.invisible_to = 0  # the anchor promised: it commits above this timestamp, or not at all
        self.resolving: Any = None  # the latch of its Resolve, once that is proposed
        self.unheard = False  # the last question about it was not answered

    def forget_volatile(self) -> None:
        """A new term: what an earlier leader was promised or had proposed does not count."""
        self.invisible_to, self.resolving, self.unheard = 0, None, False


class Staged(NamedTuple):
    anchor_key: bytes
    participants: list[Participant]


class Outbox(NamedTuple):
    anchor_key: bytes
    txn_id: bytes
    participant: Participant
    commit_ts: int


class Answer(NamedTuple):
    """What applying a command (or looking at the state) says of a part."""

    status: int  # a PartStatus
    ts: int = 0
    reason: int = 0
    key: bytes = b""
    other_txn: bytes = b""
    other_version: int = 0


ABSENT = Answer(PartStatus.ABSENT)
EXPIRED = Answer(PartStatus.EXPIRED)  # below the outcome horizon: nothing can be said any more

_encode = msgspec.msgpack.Encoder().encode
encode_row = _encode
_decode_range = msgspec.msgpack.Decoder(RangeRow).decode
_decode_prepared = msgspec.msgpack.Decoder(PreparedRow).decode
_decode_decided = msgspec.msgpack.Decoder(DecidedRow).decode
_decode_terminal = msgspec.msgpack.Decoder(TerminalRow).decode
_decode_outbox = msgspec.msgpack.Decoder(OutboxRow).decode


def decode_decided_row(data: bytes) -> DecidedRow:
    return _decode_decided(data)


def decode_range_row(data: bytes) -> RangeRow:
    return _decode_range(data)


class RangeState:
    """See the module. `row` is the range's row; `persist` of it is the store's business, once a write batch."""

    def __init__(self, row: RangeRow) -> None:
        self.row = row
        self.parts: dict[bytes, dict[bytes, Part]] = {}  # txn_id -> locus -> part
        self.intents: dict[bytes, Part] = {}  # key -> the part that will write it
        self.point_guards: dict[bytes, dict[bytes, Part]] = {}  # key -> txn_id -> part
        self.span_guards: dict[Part, Joined] = {}
        self.stamped: dict[Part, Joined] = {}  # spans in which a part will write one key (V1)
        self.staged: dict[bytes, Staged] = {}  # txn_id -> record
        self.outbox: dict[tuple[bytes, bytes], Outbox] = {}  # (txn_id, locus) -> row
        self.oracle_hi = 0
        self._changes = 0  # parts that came or went
        self._oldest, self._oldest_at = 0, -1  # the smallest min_ts, when so many had
        self._written, self._guarded = Ordered(), Ordered()
        self.decided = RecentlyDecided(row.decided_begin)
        self.recent = Recent()
        self.recent.begin(row.newest)

    def load(self, rows: Rows) -> None:
        """Read what is undecided, once, when the replica starts or has installed a snapshot."""
        for mirror in (
            self.parts,
            self.intents,
            self.point_guards,
            self.span_guards,
            self.stamped,
            self.staged,
            self.outbox,
        ):
            mirror.clear()
        self.decided = RecentlyDecided(self.row.decided_begin)
        for key, data in self._family(rows, keycode.PREPARED):
            locus, at = keycode.unescape(key, 1)
            self.add_part(Part(locus, key[at:], _decode_prepared(data)))
        for key, data in self._family(rows, keycode.OUTBOX):
            anchor_key, at = keycode.unescape(key, 1)
            txn_id, row = key[at : at + 16], _decode_outbox(data)
            self.outbox[txn_id, row.participant.locus] = Outbox(
                anchor_key, txn_id, row.participant, row.commit_ts
            )
        bound = rows.get(keycode.node_row(keycode.ORACLE, self.row.range_id))
        self.oracle_hi = int.from_bytes(bound, "big") if bound else 0
        self.recent.begin(self.row.newest)

    def _family(self, rows: Rows, family: bytes) -> Iterator[tuple[bytes, bytes]]:
        low, high = keycode.family_span(family, self.row.start, self.row.end)
        return rows.scan(low, high)

    # -- changes, by apply and load only

    def wrote(self, commit_ts: int, keys: Sequence[bytes]) -> None:
        """Versions at commit_ts are in the write batch now."""
        if commit_ts > self.row.newest:
            self.row.newest = commit_ts
        self.recent.note(commit_ts, keys)

    def add_part(self, part: Part) -> None:
        row, txn_id, intents = part.row, part.txn_id, self.intents
        self._changes += 1
        self.parts.setdefault(txn_id, {})[part.locus] = part
        if row.participants:
            self.staged[txn_id] = Staged(part.locus, row.participants)
        for key in row.keys:
            assert key not in intents, "I10: a second intent on a key"
            intents[key] = part
        spans = []
        for guard in row.guards:
            if guard.end == point_end(guard.start):
                self.point_guards.setdefault(guard.start, {})[txn_id] = part
            else:
                spans.append((guard.start, guard.end))
        if spans:
            self.span_guards[part] = Joined(spans)
        if row.stamps and (spans := stamps.spans(row.stamps, row.min_ts - 1)):
            self.stamped[part] = Joined(spans)

    def remove_part(self, part: Part) -> None:
        row, txn_id = part.row, part.txn_id
        self._changes += 1
        loci = self.parts[txn_id]
        del loci[part.locus]
        if row.participants:
            del self.staged[txn_id]
        if not loci:
            del self.parts[txn_id]
        for key in row.keys:
            del self.intents[key]
        for guard in row.guards:
            if guard.end == point_end(guard.start):
                holders = self.point_guards.get(guard.start)
                if holders is not None:
                    holders.pop(txn_id, None)
                    if not holders:
                        del self.point_guards[guard.start]
        self.span_guards.pop(part, None)
        self.stamped.pop(part, None)

    def note_decided(self, txn_id: bytes) -> None:
        """A DECIDED row of this transaction is being written (D1)."""
        self.decided.add(txn_id)
        begin_ts = begin_ts_of(txn_id)
        if begin_ts > self.row.decided_begin:
            self.row.decided_begin = begin_ts

    # -- look-ups

    def oldest_min_ts(self) -> int:
        """Of the undecided parts; there is one at least. They are walked once after one came or went, not for each reader."""
        if self._oldest_at != self._changes:
            self._oldest_at = self._changes
            self._oldest = min(
                part.row.min_ts for loci in self.parts.values() for part in loci.values()
            )
        return self._oldest

    def part(self, txn_id: bytes, locus: bytes) -> Part | None:
        loci = self.parts.get(txn_id)
        return loci.get(locus) if loci else None

    def owns(self, key: bytes) -> bool:
        row = self.row
        return row.start <= key and (not row.end or key < row.end)

    def owns_span(self, start: bytes, end: bytes) -> bool:
        row = self.row
        return row.start <= start and (not row.end or (bool(end) and end <= row.end))

    def has_span(self, start: bytes, end: bytes) -> bool:
        """Whether all of [start, end) is here; of an empty span nothing is elsewhere."""
        return start == end != b"" or self.owns_span(start, end)

    def foreign_guard(self, key: bytes, txn_id: bytes) -> Part | None:
        """Another transaction's replicated guard over a key."""
        holders = self.point_guards.get(key)
        if holders:
            for other, part in holders.items():
                if other != txn_id:
                    return part
        return self._foreign_span(key, point_end(key), txn_id) if self.span_guards else None

    def foreign_guard_in(self, start: bytes, end: bytes, txn_id: bytes) -> Part | None:
        """Another transaction's replicated guard that meets [start, end)."""
        guards = self.point_guards
        for key in self._guarded.within(guards, (self._changes, len(guards)), start, end):
            for other, part in guards[key].items():
                if other != txn_id:
                    return part
        return self._foreign_span(start, end, txn_id)

    def _foreign_span(self, start: bytes, end: bytes, txn_id: bytes) -> Part | None:
        for part in meeting(self.span_guards, start, end):
            if part.txn_id != txn_id:
                return part
        return None

    def intents_in(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, Part]]:
        """Intents on keys of [start, end), in order; end b"": the end of all keys."""
        intents = self.intents
        if end == point_end(start):
            part = intents.get(start)
            if part is not None:
                yield start, part
            return
        for key in self._written.within(intents, (self._changes, len(intents)), start, end):
            yield key, intents[key]

    def stamped_in(self, start: bytes, end: bytes) -> Iterator[Part]:
        """Parts that may yet write a stamped key in [start, end); end b"": the end of all keys."""
        return meeting(self.stamped, start, end)

    def answer_of(self, get: Rows, txn_id: bytes, locus: bytes) -> Answer:
        """What this range knows of a part: all but ABSENT are stable."""
        if txn_id in self.parts:
            part = self.part(txn_id, locus)
            if part is not None:
                return Answer(PartStatus.PREPARED, part.row.min_ts)
        if self.decided.absent(txn_id):
            return ABSENT
        data = get.get(keycode.part_row(keycode.DECIDED, locus, txn_id))
        if data is None:
            return ABSENT
        row = _decode_decided(data)
        return Answer(row.status, row.ts, row.reason, row.key, row.other_txn, row.other_version)

    def terminal_of(self, rows: Rows, txn_id: bytes, anchor_key: bytes) -> tuple[int, int]:
        """(TxnStatus, commit_ts) of a transaction anchored here; COMMITTED, ABORTED, STAGED or ABSENT."""
        if txn_id in self.staged:
            return TxnStatus.STAGED, 0
        data = rows.get(keycode.part_row(keycode.TERMINAL, anchor_key, txn_id))
        if data is None:
            return TxnStatus.ABSENT, 0
        commit_ts = _decode_terminal(data).commit_ts
        return (TxnStatus.COMMITTED, commit_ts) if commit_ts else (TxnStatus.ABORTED, 0)
