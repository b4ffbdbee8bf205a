"""Applying commands: a pure function of the command and the range's state, the same on every replica.

A1 nothing is changed by a command whose part is decided already: the log's order decides, the first wins (I1), and the
answer is what stands. A2 a record moves STAGED -> COMMITTED | ABORTED, or nothing -> ABORTED, once (I2). A3 reads go
through the overlay of the write batch that is being built, since two entries of one turn may touch one row.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any, Final

from txn import keycode, stamps
from txn.commands import (
    AbortUnstaged,
    Batch,
    Collect,
    Commit,
    Decide,
    FencePart,
    OracleBound,
    OutboxDone,
    PreparePart,
    ResolvePart,
)
from txn.mvcc import find_txn, latest_ts
from txn.ports import Rows
from txn.state import (
    ABSENT,
    EXPIRED,
    Answer,
    DecidedRow,
    Outbox,
    OutboxRow,
    Part,
    PreparedRow,
    RangeState,
    TerminalRow,
    encode_row,
)
from txn.types import FenceReason, PartStatus, TxnStatus, begin_ts_of

SCAN_BYTES: Final = 1 << 10  # one scan takes about as long as writing so much
FEW_KEYS: Final = 16  # are put in order one by one; more are sorted


class Overlay:
    """Rows of a write batch that is being built, over the stored ones.

    `seen` may hold stored rows that the caller has read already and that cannot have changed since: a leader's, read under
    the latch that is held until now.
    """

    __slots__ = ("_below", "_get_below", "_ordered", "bytes", "rows", "seen")

    def __init__(self, below: Rows) -> None:
        self.rows: dict[bytes, bytes | None] = {}  # a key that came stays
        self.seen: dict[bytes, bytes | None] = {}
        self.bytes = (
            0  # of rows; a scan counts for SCAN_BYTES, since who applies in slices goes by this
        )
        self._below = below
        self._get_below = below.get
        self._ordered: list[bytes] = []  # the keys of rows, when somebody scanned last

    def get(self, key: bytes, /) -> bytes | None:
        if key in self.rows:
            return self.rows[key]
        if key in self.seen:
            return self.seen[key]
        return self._get_below(key)

    def put(self, key: bytes, data: bytes) -> None:
        self.rows[key] = data
        self.bytes += len(key) + len(data)

    def delete(self, key: bytes) -> None:
        self.rows[key] = None
        self.bytes += len(key)

    def scan(
        self, start: bytes, end: bytes | None, *, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        """Merged as it is read: whoever stops early has not read the rest. What is put meanwhile is not in it."""
        self.bytes += SCAN_BYTES
        mine = self._within(start, end)
        if not mine:
            return self._below.scan(start, end, reverse=reverse)
        if reverse:
            mine.reverse()
        return self._merged([(key, self.rows[key]) for key in mine], start, end, reverse)

    def _within(self, start: bytes, end: bytes | None) -> list[bytes]:
        """Keys of its own rows, in order. Each is put in order once: one entry may scan after each of thousands of rows."""
        ordered = self._ordered
        count = len(self.rows) - len(ordered)
        if count:
            fresh = islice(reversed(self.rows), count)
            if count <= FEW_KEYS:
                for key in fresh:
                    insort(ordered, key)
            else:
                ordered += fresh
                ordered.sort()
        low = bisect_left(ordered, start)
        high = len(ordered) if end is None else bisect_left(ordered, end, low)
        return ordered[low:high]

    def _merged(
        self,
        mine: list[tuple[bytes, bytes | None]],
        start: bytes,
        end: bytes | None,
        reverse: bool,
    ) -> Iterator[tuple[bytes, bytes]]:
        hidden = {key for key, _ in mine}
        below = (
            row for row in self._below.scan(start, end, reverse=reverse) if row[0] not in hidden
        )
        for key, data in heapq.merge(below, mine, key=itemgetter(0), reverse=reverse):
            if data is not None:
                yield key, data


def apply_batch(state: RangeState, overlay: Overlay, batch: Batch) -> list[Answer]:
    """Apply the commands of one entry, in order; an answer for each."""
    state.row.closed_ts = max(state.row.closed_ts, batch.closed_ts)
    return [_APPLY[type(command)](state, overlay, command) for command in batch.commands]


def _write_versions(
    overlay: Overlay,
    keys: Sequence[bytes],
    values: Sequence[bytes | None],
    commit_ts: int,
    txn_id: bytes,
) -> None:
    """Each key's newest version; the one that was moves to HISTORY. Written out, without a call for each step: the hot path."""
    rows, get, size = overlay.rows, overlay.get, 0
    written = commit_ts.to_bytes(8, "big")
    value_head, tombstone = written + txn_id + b"\x00", written + txn_id + b"\x01"
    for key, value in zip(keys, values, strict=True):
        latest_key = b"L" + key
        old = get(latest_key)
        if old is not None:
            assert old[:8] < written, "M1: versions of a key are written in rising order"
            history_key = keycode.history_row(key, int.from_bytes(old[:8], "big"))
            rows[history_key] = old[8:]
            size += len(history_key) + len(old)
        rows[latest_key] = row = tombstone if value is None else value_head + value
        size += len(latest_key) + len(row)
    overlay.bytes += size


def _commit(state: RangeState, overlay: Overlay, command: Commit) -> Answer:
    if len(command.keys) == 1 and _commit_key(state, overlay, command):
        return Answer(PartStatus.COMMITTED, command.commit_ts)
    txn_id, locus, commit_ts = command.txn_id, command.locus, command.commit_ts
    known = _known(state, overlay, txn_id, locus)
    if known is not ABSENT:
        return known
    latest = overlay.get(b"L" + locus)
    if latest is not None and latest_ts(latest) > begin_ts_of(txn_id):
        found = find_txn(overlay, locus, txn_id, latest, begin_ts_of(txn_id))
        if found:
            return Answer(PartStatus.COMMITTED, found)
    if begin_ts_of(txn_id) <= state.row.outcome_horizon:
        return EXPIRED
    _write_versions(overlay, command.keys, command.values, commit_ts, txn_id)
    if command.keys:
        state.wrote(commit_ts, command.keys)
    if command.keep_status:
        _put_decided(
            state, overlay, locus, txn_id, DecidedRow(PartStatus.COMMITTED, commit_ts, locus)
        )
    return Answer(PartStatus.COMMITTED, commit_ts)


def _commit_key(state: RangeState, overlay: Overlay, command: Commit) -> bool:
    """The hot path of `_commit`: one key, nothing known of the transaction. False: nothing was done, go the long way.

    The same look-ups and rows as there, without a call for each; timestamps are compared as the bytes that they are.
    """
    txn_id, key = command.txn_id, command.locus
    if command.keys[0] != key or txn_id in state.parts:
        return False
    if begin_ts_of(txn_id) <= state.row.outcome_horizon:
        return False
    latest_key = b"L" + key
    old = overlay.get(latest_key)
    if old is not None and old[:8] > txn_id[:8]:
        return False
    if not state.decided.absent(txn_id) and _known(state, overlay, txn_id, key) is not ABSENT:
        return False
    rows, value = overlay.rows, command.values[0]
    written = command.commit_ts.to_bytes(8, "big")
    if old is not None:
        assert old[:8] < written, "M1: versions of a key are written in rising order"
        history_key = keycode.history_row(key, int.from_bytes(old[:8], "big"))
        rows[history_key] = old[8:]
        overlay.bytes += len(history_key) + len(old)
    rows[latest_key] = row = written + txn_id + (b"\x01" if value is None else b"\x00" + value)
    overlay.bytes += len(latest_key) + len(row)
    state.wrote(command.commit_ts, command.keys)
    return True


def _put_decided(
    state: RangeState, overlay: Overlay, locus: bytes, txn_id: bytes, row: DecidedRow
) -> None:
    state.note_decided(txn_id)
    overlay.put(keycode.part_row(keycode.DECIDED, locus, txn_id), encode_row(row))


def _known(state: RangeState, overlay: Overlay, txn_id: bytes, locus: bytes) -> Answer:
    return state.answer_of(overlay, txn_id, locus)


def _prepare(state: RangeState, overlay: Overlay, command: PreparePart) -> Answer:
    txn_id, locus = command.txn_id, command.locus
    known = _known(state, overlay, txn_id, locus)
    if known is not ABSENT:
        return known
    if begin_ts_of(txn_id) <= state.row.outcome_horizon:
        return EXPIRED
    row = PreparedRow(
        command.anchor_key,
        command.min_ts,
        command.age,
        command.keys,
        command.values,
        command.guards,
        command.participants,
        command.stamps,
    )
    part = Part(locus, txn_id, row)
    state.add_part(part)
    overlay.put(keycode.PREPARED + part.suffix, encode_row(row))
    return Answer(PartStatus.PREPARED, command.min_ts)


def _fence(state: RangeState, overlay: Overlay, command: FencePart) -> Answer:
    txn_id, locus = command.txn_id, command.locus
    known = _known(state, overlay, txn_id, locus)
    if known is not ABSENT:
        return known
    latest = overlay.get(b"L" + locus)
    found = find_txn(overlay, locus, txn_id, latest, begin_ts_of(txn_id))
    if found:
        return Answer(PartStatus.COMMITTED, found)
    if begin_ts_of(txn_id) <= state.row.outcome_horizon:
        return EXPIRED  # its versions may be gone: nothing may be said, nor written, about it
    answer = Answer(
        PartStatus.FENCED, 0, command.reason, command.key, command.other_txn, command.other_version
    )
    row = DecidedRow(
        PartStatus.FENCED,
        0,
        command.anchor_key,
        command.reason,
        command.key,
        command.other_txn,
        command.other_version,
    )
    _put_decided(state, overlay, locus, txn_id, row)
    return answer


def _decide(state: RangeState, overlay: Overlay, command: Decide) -> Answer:
    txn_id, anchor_key, commit_ts = command.txn_id, command.anchor_key, command.commit_ts
    staged = state.staged.get(txn_id)
    if staged is None:
        status, ts = state.terminal_of(overlay, txn_id, anchor_key)
        return _terminal_answer(status, ts)
    overlay.put(
        keycode.part_row(keycode.TERMINAL, anchor_key, txn_id), encode_row(TerminalRow(commit_ts))
    )
    for participant in staged.participants:
        if participant.locus == anchor_key:
            part = state.part(txn_id, anchor_key)
            if part is not None:  # else the anchor stands in the list twice, and this is the second
                _resolve_part(state, overlay, part, commit_ts, hinted=False)
        else:
            _post(state, overlay, Outbox(anchor_key, txn_id, participant, commit_ts))
    return _terminal_answer(TxnStatus.COMMITTED if commit_ts else TxnStatus.ABORTED, commit_ts)


def _terminal_answer(status: int, ts: int) -> Answer:
    if status == TxnStatus.COMMITTED:
        return Answer(PartStatus.COMMITTED, ts)
    return Answer(PartStatus.ABORTED) if status == TxnStatus.ABORTED else ABSENT


def _post(state: RangeState, overlay: Overlay, row: Outbox) -> None:
    state.outbox[row.txn_id, row.participant.locus] = row
    key = keycode.outbox_row(row.anchor_key, row.txn_id, row.participant.locus)
    overlay.put(key, encode_row(OutboxRow(row.participant, row.commit_ts)))


def _resolve_part(
    state: RangeState, overlay: Overlay, part: Part, commit_ts: int, *, hinted: bool
) -> None:
    state.remove_part(part)
    row, txn_id = part.row, part.txn_id
    overlay.delete(keycode.PREPARED + part.suffix)
    status = PartStatus.ABORTED
    if commit_ts:
        assert commit_ts >= row.min_ts, "I4: committed below a part's min_ts"
        keys: Sequence[bytes] = row.keys
        values: Sequence[bytes | None] = row.values
        if row.stamps:
            rows = stamps.filled(keys, values, row.stamps, commit_ts)
            keys, values = list(rows), list(rows.values())
        _write_versions(overlay, keys, values, commit_ts, txn_id)
        if keys:
            state.wrote(commit_ts, keys)
        status = PartStatus.COMMITTED
    decided = DecidedRow(status, commit_ts, row.anchor_key, hinted=hinted)
    state.note_decided(txn_id)
    overlay.put(keycode.DECIDED + part.suffix, encode_row(decided))


def _resolve(state: RangeState, overlay: Overlay, command: ResolvePart) -> Answer:
    part = state.part(command.txn_id, command.locus)
    if part is not None and part.row.participants:  # the anchor's own: only with its record
        return _decide(state, overlay, Decide(command.txn_id, command.locus, command.commit_ts))
    if part is not None:
        _resolve_part(state, overlay, part, command.commit_ts, hinted=command.hinted)
        return Answer(
            PartStatus.COMMITTED if command.commit_ts else PartStatus.ABORTED, command.commit_ts
        )
    known = _known(state, overlay, command.txn_id, command.locus)
    if known is ABSENT and not command.commit_ts:
        fence = FencePart(command.txn_id, command.locus, command.anchor_key, FenceReason.RECOVERY)
        return _fence(state, overlay, fence)
    return known


def _abort_unstaged(state: RangeState, overlay: Overlay, command: AbortUnstaged) -> Answer:
    txn_id, anchor_key = command.txn_id, command.anchor_key
    status, ts = state.terminal_of(overlay, txn_id, anchor_key)
    if status == TxnStatus.STAGED:
        return Answer(PartStatus.PREPARED)
    if status != TxnStatus.ABSENT:
        return _terminal_answer(status, ts)
    fence = FencePart(txn_id, anchor_key, anchor_key, FenceReason.RECOVERY)
    answer = _fence(state, overlay, fence)
    if answer.status == PartStatus.FENCED:
        overlay.put(
            keycode.part_row(keycode.TERMINAL, anchor_key, txn_id), encode_row(TerminalRow(0))
        )
        return Answer(PartStatus.ABORTED)
    return answer


def _outbox_done(state: RangeState, overlay: Overlay, command: OutboxDone) -> Answer:
    for txn_id, anchor_key, locus in command.rows:
        if state.outbox.pop((txn_id, locus), None) is not None:
            overlay.delete(keycode.outbox_row(anchor_key, txn_id, locus))
    return ABSENT


def _oracle_bound(state: RangeState, overlay: Overlay, command: OracleBound) -> Answer:
    if command.hi > state.oracle_hi:
        state.oracle_hi = command.hi
        overlay.put(
            keycode.node_row(keycode.ORACLE, state.row.range_id), command.hi.to_bytes(8, "big")
        )
    return ABSENT


def _collect(state: RangeState, overlay: Overlay, command: Collect) -> Answer:
    """Only what is named goes, so it does not matter what has been written meanwhile (G1, G3)."""
    row = state.row
    row.gc_threshold = max(row.gc_threshold, command.threshold)
    row.outcome_horizon = max(row.outcome_horizon, command.threshold)
    for garbage in command.garbage:
        for version_ts in garbage.versions:
            overlay.delete(keycode.history_row(garbage.key, version_ts))
        for txn_id in garbage.parts:
            overlay.delete(keycode.part_row(keycode.DECIDED, garbage.key, txn_id))
        for txn_id in garbage.records:
            overlay.delete(keycode.part_row(keycode.TERMINAL, garbage.key, txn_id))
        if garbage.tombstone:
            latest = overlay.get(b"L" + garbage.key)
            if latest is not None and latest_ts(latest) == garbage.tombstone:
                overlay.delete(b"L" + garbage.key)
    return ABSENT


_APPLY: dict[type, Callable[[RangeState, Overlay, Any], Answer]] = {
    Commit: _commit,
    PreparePart: _prepare,
    FencePart: _fence,
    Decide: _decide,
    ResolvePart: _resolve,
    AbortUnstaged: _abort_unstaged,
    OutboxDone: _outbox_done,
    OracleBound: _oracle_bound,
    Collect: _collect,
}
