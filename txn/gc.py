"""Garbage collection: versions and statuses that nobody can need any more, found by a range's leader and removed by its log.

Story. The threshold is the newest timestamp that the leader knows to be issued, less the retention; below what the oldest
open snapshot reads at (kvstore/holds.py), and at most the range's safe timestamp. The leader walks its range
in slices: first HISTORY, where everything at or below the threshold is garbage but for the newest such version of a key that
has no newer one at or below it; then LATEST, for tombstones at or below the threshold; then DECIDED and TERMINAL, for what
began at or below it. What it finds becomes a Collect command, which raises the range's gc_threshold and outcome_horizon
before anything is gone, and names each row that goes: all replicas remove the same, whatever they are doing.

G1 (I15) no version that a read at or above gc_threshold can see is removed; reads below it are refused. The threshold is closed
   before it is used, so no replica's safe timestamp is ever below its gc_threshold.
G2 nobody is evaluated or applied whose begin_ts is at or below outcome_horizon: the versions of a one-range commit are its
   record, and they may be gone. So the horizon is never below gc_threshold.
G3 a tombstone goes only in one command with all that is older of its key, or when that is gone: it hides what is older. One
   in LATEST goes under the key's latch, since a leader applies with what it read under its latches.
G4 bounded: SLICE_ROWS rows or SLICE_BYTES are looked at in one step, COLLECT_ROWS_MAX rows go in one command, one command
   is in flight.
G5 a part that is COMMITTED by a client's word alone goes only when its anchor's range says that the record is terminal: while a
   record is STAGED, EXPIRED of a part means that it was never prepared, or fenced, and the transaction is aborted by it.
G6 a terminal record goes when no outbox row of it is left: every part has applied its Resolve, and asks no more.
G7 rows under KEPT_PREFIX (what an idempotency key did) are deleted `Limits.kept` after they were written, by an ordinary
   transaction of the leader: under a condition on their version, so that what was written meanwhile stays.
G8 a range that has had no entry since a sweep found nothing is not swept again, unless rows of G7 are over: an idle cluster
   reads none of its rows. One that may have garbage, while nobody asks the oracle for anything, is `starved` of time; the
   store sees to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from txn import keycode
from txn.closed import safe_ts
from txn.commands import Collect, Garbage
from txn.latches import Pending
from txn.messages import Failure, Prepare, PrepareReply, QuerySettled, Reply, Settled
from txn.mvcc import is_tombstone, latest_ts
from txn.state import DecidedRow, RangeRow, decode_decided_row
from txn.types import (
    KEPT_PREFIX,
    NOBODY,
    TIMESTAMP_MAX,
    Expect,
    ExpectKind,
    PartStatus,
    Write,
    WriteKind,
    begin_ts_of,
    make_txn_id,
    point_end,
)

if TYPE_CHECKING:
    from txn.evaluate import Evaluator

SLICE_ROWS: Final = 256
SLICE_BYTES: Final = 256 << 10  # of values; one row at least
COLLECT_ROWS_MAX: Final = 512
STEP_S: Final = 0.02  # between two slices of a sweep
FIRST_SWEEP_S: Final = 30.0  # of a term, at the latest: leaders may change oftener than sweeps come
SWEEPS_PER_RETENTION: Final = 4
SILENT_MAX: Final = 3  # anchors' ranges that do not answer; then no other is asked in this sweep
_FAMILIES: Final = (keycode.HISTORY, keycode.LATEST, keycode.DECIDED, keycode.TERMINAL)


class Found:
    """What one slice found. Dicts by key."""

    def __init__(self) -> None:
        self.versions: dict[bytes, list[int]] = {}
        self.tombstones: dict[bytes, int] = {}
        self.parts: dict[bytes, list[bytes]] = {}
        self.records: dict[bytes, list[bytes]] = {}
        self.expired: dict[bytes, int] = {}  # G7: the version that is there

    def garbage(self) -> list[Garbage]:
        every = (self.versions, self.tombstones, self.parts, self.records)
        return [
            Garbage(
                key,
                self.versions.get(key, []),
                self.tombstones.get(key, 0),
                self.parts.get(key, []),
                self.records.get(key, []),
            )
            for key in dict.fromkeys(key for each in every for key in each)
        ]


class Collector:
    """One leader's term of it. `tick` does a slice when it is due."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._ev = evaluator
        self._due: float | None = None
        self._threshold = 0  # of the sweep under way
        self._swept = 0  # the threshold of the last whole sweep
        self._family = keycode.HISTORY
        self._slices: dict[bytes, Callable[[Found], bool]] = {
            keycode.HISTORY: self._slice_of_history,
            keycode.LATEST: self._slice_of_latest,
            keycode.DECIDED: self._slice_of_decided,
            keycode.TERMINAL: self._slice_of_terminal,
        }
        self._settled: list[
            tuple[bytes, bytes, int]
        ] = []  # spans of anchors, and upto when they are
        self._silent = 0  # of this sweep: questions about anchors that came to nothing
        self._cut = False
        self._position = b""  # where the next slice begins
        self._key: bytes | None = None  # whose HISTORY rows are being looked at
        self._covered = False  # that key has a newer version at or below the threshold
        self._hiding = (
            0  # a HISTORY tombstone that nothing covers: it goes if all that is older goes with it
        )
        self._latches = self._deletions = 0
        self.starved = False  # G8: it would sweep if the oracle's time went on
        self._index = -1  # the applied index of the last look
        self._newest = 0  # no row has a timestamp above it, if the index is still that one
        self._clean = False  # nothing can be garbage before another entry, or before `_expiry`
        self._expiry = TIMESTAMP_MAX  # when the first of the rows under KEPT_PREFIX is over
        self._proposed = self._left = False  # of this sweep: something was; something was left
        self._in_flight = 0
        self._refused = (
            False  # a command of this sweep was not taken: the next one finds it all again
        )

    def start(self, now: float) -> None:
        """A term begins. Not at once with a sweep: the range has better things to do, and garbage has waited before."""
        if self._ev.limits.retention:
            self._due = now + min(self._ev.limits.sweep_s, FIRST_SWEEP_S)

    @property
    def due(self) -> float | None:
        """When the next slice is; None: not before what is in flight has come back, or never."""
        return None if self._in_flight else self._due

    def tick(self, now: float) -> None:
        due = self.due
        if due is None or now < due:
            return
        self._due = now + STEP_S
        if not self._threshold and not self._begin():
            self._due = now + self._ev.limits.sweep_s
            return
        found = Found()
        more = self._slices[self._family](found)
        if garbage := found.garbage():
            self._propose(garbage)
        if found.expired:
            self._delete(found.expired)
        if not more:
            self._next_family(now)

    def query_settled(self, request: QuerySettled, origin: Any, _now: float) -> None:
        """Stable, so it needs no confirmation: nothing that began at or below the horizon is staged any more."""
        ev = self._ev
        row = ev.state.row
        if ev.state.owns(request.anchor_key):
            reply: Reply = Settled(request.id, row.start, row.end, self._settled_here())
        else:
            reply = Failure(request.id, "epoch_mismatch")
        ev.out.reply(origin, reply, False)

    def _settled_here(self) -> int:
        state = self._ev.state
        first = min(map(begin_ts_of, state.staged), default=state.row.outcome_horizon + 1)
        return min(state.row.outcome_horizon, first - 1)

    # -- the sweep

    def _begin(self) -> bool:
        """Whether there is a reason for a sweep: time has passed since the last one, and something may have become garbage."""
        limits, row = self._ev.limits, self._ev.state.row
        self.starved = False
        if row.applied_index != self._index:
            self._index, self._clean = row.applied_index, False
            self._newest = self._newest_of(row)
        if self._clean and self._ev.issued < self._expiry:
            return False
        # Below what the oldest open view reads: its transaction may have begun just there, and is to be evaluated (G2).
        threshold = min(self._ev.issued - limits.retention, self._ev.floor - 1)
        threshold = min(threshold, safe_ts(self._ev.state, self._ev.closing.close(threshold)))
        if threshold <= max(self._swept, row.gc_threshold):
            self.starved = True
            return False
        self._threshold = threshold
        self._proposed = self._left = False
        self._expiry = TIMESTAMP_MAX
        self._key = None
        self._settled = [(row.start, row.end, self._settled_here())]
        self._silent = 0
        self._begin_family(keycode.HISTORY)
        return True

    def _newest_of(self, row: RangeRow) -> int:
        """No row has a timestamp above it. What other ranges were given may be above all that is known here to be issued."""
        newest = row.newest if row.newest < TIMESTAMP_MAX else 0
        return max(self._ev.issued, newest, row.decided_begin)

    def _begin_family(self, family: bytes) -> None:
        row = self._ev.state.row
        self._family = family
        self._position, _ = keycode.family_span(family, row.start, row.end)

    def _next_family(self, now: float) -> None:
        following = _FAMILIES.index(self._family) + 1
        if following < len(_FAMILIES):
            self._begin_family(_FAMILIES[following])
        else:
            self._swept = 0 if self._refused else self._threshold
            if not (self._proposed or self._left) and self._threshold >= self._newest:
                self._clean = self._ev.state.row.applied_index == self._index
            self._threshold, self._refused = 0, False
            self._due = now + self._ev.limits.sweep_s

    def _rows(self) -> Iterator[tuple[bytes, bytes]]:
        """From the position on, as many as one slice may look at; `_cut`: there are more."""
        row = self._ev.state.row
        _, end = keycode.family_span(self._family, row.start, row.end)
        size = 0
        self._cut = False
        for rows, found in enumerate(self._ev.rows.scan(self._position, end)):
            if rows >= SLICE_ROWS or size >= SLICE_BYTES:
                self._cut = True
                return
            size += len(found[1])
            yield found

    def _slice_of_history(self, found: Found) -> bool:
        """Garbage versions, by key. Whether anything is left behind this slice."""
        get, threshold = self._ev.rows.get, self._threshold
        for row_key, data in self._rows():
            self._position = row_key + b"\x00"
            key, _ = keycode.unescape(row_key, 1)
            if key != self._key:
                self._take_hiding(found)
                latest = get(keycode.latest_row(key))
                self._key = key
                self._covered = latest is not None and latest_ts(latest) <= threshold
            version_ts = keycode.history_ts(row_key)
            if version_ts > threshold:
                continue
            if self._covered:
                found.versions.setdefault(key, []).append(version_ts)
            elif data[16]:
                self._hiding = version_ts
            self._covered = True
        if self._cut:  # there may be more of this key
            self._hiding = 0
            return True
        self._take_hiding(found)
        return False

    def _take_hiding(self, found: Found) -> None:
        """All HISTORY rows of the last key have been seen, since its tombstone was, in this slice."""
        if self._hiding:
            assert self._key is not None
            found.versions.setdefault(self._key, []).append(self._hiding)
            self._hiding = 0

    def _slice_of_latest(self, found: Found) -> bool:
        rows = 0
        for row_key, data in self._rows():
            self._position = row_key + b"\x00"
            if not is_tombstone(data):
                if row_key.startswith(KEPT_PREFIX, 1):
                    self._look_at_kept(row_key[1:], latest_ts(data), found)
                continue
            if latest_ts(data) > self._threshold:
                continue
            key = row_key[1:]
            if key in self._ev.latches.writes or key in self._ev.state.intents:
                continue  # somebody writes it: it will be no tombstone, or a newer one
            older = self._older(key)
            rows += len(older) + 1
            if len(older) > COLLECT_ROWS_MAX:  # they go first; the next sweep takes the tombstone
                found.versions[key] = older[:COLLECT_ROWS_MAX]
                return True
            found.tombstones[key] = latest_ts(data)
            if older:
                found.versions[key] = older
            if rows >= COLLECT_ROWS_MAX:
                return True
        return self._cut

    def _look_at_kept(self, key: bytes, version: int, found: Found) -> None:
        """G7."""
        kept = self._ev.limits.kept
        if kept and version + kept <= self._ev.issued:
            found.expired[key] = version
        elif kept:
            self._expiry = min(self._expiry, version + kept)

    def _delete(self, expired: dict[bytes, int]) -> None:
        """G7, as a transaction of this range."""
        ev = self._ev
        keys = list(expired)
        self._proposed = True
        self._deletions += 1
        seed = b"%d/%d/%d" % (ev.state.row.range_id, ev.term, self._deletions)
        number = int.from_bytes(blake2b(seed + keys[0], digest_size=8).digest(), "big")
        txn_id = make_txn_id(ev.issued, number)
        writes = [Write(WriteKind.DELETE, key) for key in keys]
        expects = [Expect(ExpectKind.VERSION, key, version) for key, version in expired.items()]
        request = Prepare(0, 0, 0, txn_id, keys[0], keys[0], writes, expects)
        self._in_flight += 1

        def on_reply(reply: Reply) -> None:
            self._in_flight -= 1
            if isinstance(reply, PrepareReply) and reply.status == PartStatus.COMMITTED:
                ev.counters["rows_collected_total"] += len(keys)
            else:
                self._refused = True  # the next sweep finds what is left

        ev.recovery.call(keys[0], request, on_reply)

    def _older(self, key: bytes) -> list[int]:
        prefix = keycode.history_prefix(key)
        found = self._ev.rows.scan(prefix, prefix + b"\xff" * 9)
        return [keycode.history_ts(row) for row, _ in islice(found, COLLECT_ROWS_MAX + 1)]

    def _slice_of_decided(self, found: Found) -> bool:
        for row_key, data in self._rows():
            locus, at = keycode.unescape(row_key, 1)
            txn_id = row_key[at:]
            if begin_ts_of(txn_id) <= self._threshold:
                row = decode_decided_row(data)
                upto = self._needed(row)
                if upto is None:  # asked: this row is looked at again when the answer is there
                    self._position = row_key
                    return True
                if begin_ts_of(txn_id) > upto:
                    self._left = True
                else:
                    found.parts.setdefault(locus, []).append(txn_id)
            self._position = row_key + b"\x00"
        return self._cut

    def _needed(self, row: DecidedRow) -> int | None:
        """G5: up to which begin_ts a part like this may go; None: its anchor's range is asked."""
        if row.status != PartStatus.COMMITTED or not row.hinted:
            return self._threshold
        for start, end, upto in self._settled:
            if start <= row.anchor_key and (not end or row.anchor_key < end):
                return upto
        if self._silent >= SILENT_MAX:  # away, perhaps for hours, and there may be many anchors
            return 0
        self._ask_settled(row.anchor_key)
        return None

    def _ask_settled(self, anchor_key: bytes) -> None:
        self._in_flight += 1

        def on_reply(reply: Reply) -> None:
            self._in_flight -= 1
            if isinstance(reply, Settled):
                self._settled.append((reply.start, reply.end, reply.upto))
            else:
                self._silent += 1
            self._settled.append((anchor_key, point_end(anchor_key), 0))  # else not in this sweep

        self._ev.recovery.call(anchor_key, QuerySettled(0, 0, 0, anchor_key), on_reply)

    def _slice_of_terminal(self, found: Found) -> bool:
        posted = {txn_id for txn_id, _ in self._ev.state.outbox}
        for row_key, _data in self._rows():
            self._position = row_key + b"\x00"
            anchor_key, at = keycode.unescape(row_key, 1)
            txn_id = row_key[at:]
            if begin_ts_of(txn_id) <= self._threshold and txn_id not in posted:  # G6
                found.records.setdefault(anchor_key, []).append(txn_id)
        return self._cut

    # -- the command

    def _propose(self, garbage: list[Garbage]) -> None:
        self._latches += 1
        self._proposed = True
        pending = Pending(NOBODY + self._latches.to_bytes(8, "big"), None, None)
        pending.keys = [each.key for each in garbage if each.tombstone]  # G3
        pending.command = Collect(self._threshold, garbage)
        self._in_flight += 1
        rows = sum(
            len(each.versions) + bool(each.tombstone) + len(each.parts) + len(each.records)
            for each in garbage
        )
        pending.then = lambda _answer: self._applied(rows)
        pending.lost = self._lost
        self._ev.propose(pending)

    def _applied(self, rows: int) -> None:
        self._in_flight -= 1
        self._ev.counters["rows_collected_total"] += rows

    def _lost(self) -> None:
        self._in_flight -= 1
        self._refused = True


__all__ = ["Collector"]
