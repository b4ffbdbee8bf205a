"""What the logs say of transactions: I1 to I5, I7, I8, I10, I12, I13, I19, I20, and I22.

Each entry is judged once, when the first replica applies it; that the others do the same is I17. The rows that it writes
are read, not its commands: so what counts is what stands.

- I1: a part becomes PREPARED or FENCED once, never both; its min_ts never changes. What is decided stays.
- I2: a record goes from nothing or STAGED to its end, once; to COMMITTED from STAGED alone.
- I3: ABORTED after STAGED: some part is FENCED (or ABORTED). I4: COMMITTED: all parts were PREPARED, at the largest min_ts.
- I5: all parts PREPARED and the record STAGED: no part is fenced or aborted any more.
- I7: every min_ts, commit_ts, begin_ts was issued (a begin may be an old bound); a commit_ts belongs to one transaction.
- I8: a commit_ts is above all that had been handed out when its first Prepare arrived (and see answers.py).
- I10: one intent for a key, none under a foreign guard, no guard over a foreign intent.
- I11: no version appears at or below a timestamp at which its key was read. I12: no intent does, either (the read
  watermark's place is taken by fresh timestamps); what was promised to a reader holds.
- I13: nothing new appears at or below what a range's entries have closed, or a message that left (what is resolved may).
- I14: no version and no intent appears at or below a timestamp that any replica has taken for safe.
- I15: a version goes only if no read at or above gc_threshold can see it; a status only below outcome_horizon, a COMMITTED part
  when the record is not STAGED, a record when no part of it is undecided (txn/gc.py). No threshold is above what the oracle
  has allowed (oracle.py).
- I19: a record that ends posts to every part that is undecided; an outbox row goes after its part is decided; a version is
  written once. I20: a txn_id comes with one write set.
- I22: once nothing goes wrong any more, nothing stays undecided for longer than the timers say.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec
from sortedcontainers import SortedDict

from kvstore.sim.observers.oracle import Timestamps
from kvstore.sim.observers.report import Report
from txn import keycode
from txn.messages import Prepare
from txn.mvcc import is_tombstone
from txn.state import DecidedRow, OutboxRow, PreparedRow, TerminalRow
from txn.types import Guard, Participant, PartStatus, begin_ts_of

Part = tuple[bytes, bytes]  # txn_id, locus

STAGED = -1
SPANS_MAX = 200  # of served scans that are remembered; the oldest timestamps go first
_NEVER = (PartStatus.FENCED, PartStatus.ABORTED)
_decode_prepared = msgspec.msgpack.Decoder(PreparedRow).decode
_decode_decided = msgspec.msgpack.Decoder(DecidedRow).decode
_decode_terminal = msgspec.msgpack.Decoder(TerminalRow).decode
_decode_outbox = msgspec.msgpack.Decoder(OutboxRow).decode


class Place(NamedTuple):
    """Where the entry stands that is judged."""

    group: int
    entry: int  # its index
    node: str


class Kept(NamedTuple):
    """Of a range, after an entry: reads at or above `threshold`, and what began above `horizon`, count still."""

    start: bytes
    end: bytes
    threshold: int
    horizon: int


class Served:
    """The ghost log of served reads: the highest timestamp for each key, and for each span."""

    def __init__(self) -> None:
        self._keys: dict[bytes, int] = {}
        self._spans: dict[tuple[bytes, bytes], int] = {}  # (low, high), high b"": the end of all
        self._spans_upto = 0

    def key(self, key: bytes, at: int) -> None:
        if at > self._keys.get(key, 0):
            self._keys[key] = at

    def span(self, low: bytes, high: bytes, at: int) -> None:
        spans = self._spans
        if at > spans.get((low, high), 0):
            spans[low, high] = at
            self._spans_upto = max(self._spans_upto, at)
            if len(spans) > SPANS_MAX:
                del spans[min(spans, key=lambda each: (spans[each], each))]

    def by_name(self, key: bytes) -> int:
        """The highest timestamp at which this key was read alone or with others, and not within a span; 0 if there is none."""
        return self._keys.get(key, 0)

    def upto(self, key: bytes, ts: int) -> int:
        """The highest timestamp at or above `ts` at which the key was read; 0 if there is none."""
        found = self._keys.get(key, 0)
        if ts <= self._spans_upto:
            for (low, high), at in self._spans.items():
                if at > found and low <= key and (not high or key < high):
                    found = at
        return found if found >= ts else 0


class Transactions:
    """See the module. `now` is virtual seconds."""

    def __init__(self, report: Report, oracle: Timestamps) -> None:
        # key -> (commit_ts, LATEST row), of every version that was written, collected or not
        self.versions: dict[bytes, list[tuple[int, bytes]]] = {}
        self.keys: SortedDict[bytes, None] = SortedDict()
        self.status: dict[Part, int] = {}
        self.min_ts: dict[Part, int] = {}
        self.record: dict[bytes, int] = {}  # commit_ts, 0: aborted, STAGED
        self.commit_ts: dict[bytes, int] = {}
        self.implied: dict[bytes, int] = {}  # all prepared and staged: committed at this
        self.refused: dict[bytes, None] = {}  # some part is fenced or aborted
        self.served = Served()
        self.invisible: dict[bytes, int] = {}  # txn_id -> a reader was told so at this
        self.absent: dict[Part, int] = {}
        self._report, self._oracle = report, oracle
        self._participants: dict[bytes, list[Participant]] = {}
        self._owner: dict[int, bytes] = {}  # timestamp -> txn_id
        self._begun: dict[bytes, int] = {}  # handed out before the first Prepare came
        self._asked: dict[Part, Prepare] = {}
        self._elsewhere: dict[bytes, list[Guard]] = {}  # txn_id -> what it has read in other ranges
        self._held: dict[
            bytes, dict[int, list[Guard]]
        ] = {}  # what of that was found unchanged, and at which timestamp
        self._intents: dict[bytes, Part] = {}
        self._rows: dict[Part, PreparedRow] = {}  # of undecided parts
        self._closed: dict[int, int] = {}  # by range: in entries
        self._promised: dict[int, int] = {}  # in messages, too
        self._safe: dict[int, int] = {}
        self._several: dict[bytes, None] = {}  # transactions that were prepared somewhere
        self._kept: dict[int, Kept] = {}
        self._undecided: dict[tuple[Any, ...], tuple[float, int]] = {}  # since when, which range

    # -- what was asked

    def asked(self, node: str, request: Prepare) -> None:
        """A Prepare arrives at a leader."""
        txn_id = request.txn_id
        self._begun.setdefault(txn_id, self._oracle.handed_out)
        if request.elsewhere and txn_id not in self.commit_ts:
            self._elsewhere[txn_id] = [guard for each in request.elsewhere for guard in each]
        other = self._asked.setdefault((txn_id, request.locus), request)
        if other is not request and (
            other.writes != request.writes
            or other.expects != request.expects
            or other.guards != request.guards
            or other.participants != request.participants
            or other.elsewhere != request.elsewhere
            or (other.anchor_key, other.one_range) != (request.anchor_key, request.one_range)
        ):
            what = f"two write sets for the part at {request.locus!r}"
            self._report.broken("I20", what, group=request.range_id, node=node, txn_id=txn_id)

    def unchanged(self, txn_id: bytes, at: int, guards: list[Guard]) -> None:
        """These spans were said to hold at `at` what the transaction has read."""
        if txn_id in self._elsewhere:
            self._held.setdefault(txn_id, {}).setdefault(at, []).extend(guards)

    # -- what an entry writes

    def applied(
        self,
        place: Place,
        rows: dict[bytes, bytes | None],
        closed_ts: int,
        now: float,
        kept: Kept | None = None,
    ) -> None:
        """The rows of an entry, which is applied for the first time."""
        if kept is not None:
            before = self._kept.get(place.group)
            risen = before is None or kept.threshold > before.threshold
            if risen and kept.threshold > self._oracle.collectable:
                what = f"the threshold is {kept.threshold}; the oracle has allowed {self._oracle.collectable}"
                self._broken("I15", place, b"", what)
            self._kept[place.group] = kept
        if closed_ts < self._closed.get(place.group, 0):
            self._broken("I13", place, b"", f"the closed timestamp goes back to {closed_ts}")
        outbox: list[bytes] = []
        ended: list[tuple[bytes, bytes]] = []  # records, each with its anchor
        for row_key, data in rows.items():
            family = row_key[:1]
            if family == keycode.LATEST:
                if data is not None:
                    self._version(place, row_key[1:], data)
                else:
                    self._collected(place, row_key[1:], 0)
            elif family == keycode.ORACLE:
                if data is not None:
                    self._oracle.bound_applied(int.from_bytes(data, "big"))
            elif family == keycode.OUTBOX:
                outbox.append(row_key)
            elif family == keycode.HISTORY:
                if data is None:
                    key, _ = keycode.unescape(row_key, 1)
                    self._collected(place, key, keycode.history_ts(row_key))
            else:
                key, at = keycode.unescape(row_key, 1)
                self._row(place, family, row_key[at:], key, data, now)
                if family == keycode.TERMINAL:
                    ended.append((row_key[at:], key))
        for row_key in outbox:  # after the parts that the same entry decides
            _, at = keycode.unescape(row_key, 1)
            self._outbox(place, row_key[at : at + 16], row_key[at + 16 :], rows[row_key], now)
        for txn_id, anchor_key in ended:
            self._owed(place, txn_id, anchor_key)
        self._closed[place.group] = closed_ts
        self.promised(place.group, closed_ts)

    def promised(self, group: int, closed_ts: int) -> None:
        """A leader has told somebody that it closed so much."""
        self._promised[group] = max(self._promised.get(group, 0), closed_ts)

    def replica_stands(self, node: str, replica: Any) -> None:
        """What a replica takes for safe, where it is now (I14); what it has collected lies below that (I15)."""
        state, group, safe_ts = replica.state, replica.range_id, replica.safe_ts
        self._safe[group] = max(self._safe.get(group, 0), safe_ts)
        for loci in state.parts.values():
            for part in loci.values():
                if part.row.min_ts <= safe_ts:
                    what = f"{safe_ts} is safe, and a part has min_ts {part.row.min_ts}"
                    self._report.broken("I14", what, group=group, node=node, txn_id=part.txn_id)
        if state.row.gc_threshold > safe_ts:
            what = f"the threshold is {state.row.gc_threshold}, and {safe_ts} is safe"
            self._report.broken("I15", what, group=group, node=node)

    def known_upto(self, keys: Iterable[bytes]) -> int:
        """Every version of these keys at or below this is in `versions`, for none may appear there any more: some replica of
        each range has taken it for safe (I14), or each key was read there (I11). 0: there is no such timestamp."""
        safe = min(self._safe.values(), default=0)
        return min((max(safe, self.served.by_name(key)) for key in keys), default=0)

    def _broken(self, invariant: str, place: Place, txn_id: bytes, what: str) -> None:
        self._report.broken(
            invariant, what, group=place.group, index=place.entry, node=place.node, txn_id=txn_id
        )

    def _version(self, place: Place, key: bytes, data: bytes) -> None:
        ts, txn_id = int.from_bytes(data[:8], "big"), data[8:24]
        self._commits(place, txn_id, ts)
        chain = self.versions.get(key)
        if chain is None:
            chain = self.versions[key] = []
            self.keys[key] = None
        elif chain[-1][0] >= ts:
            self._broken("I19", place, txn_id, f"version {ts} of {key!r} after {chain[-1][0]}")
        read = self.served.upto(key, ts)
        if read:
            self._broken("I11", place, txn_id, f"{key!r} was read at {read}, now it gets {ts}")
        if ts <= self._promised.get(place.group, 0) and txn_id not in self._several:
            self._broken("I13", place, txn_id, f"version {ts} of {key!r} in what is closed")
        if ts <= self._safe.get(place.group, 0):
            self._broken("I14", place, txn_id, f"version {ts} of {key!r} in what was safe")
        chain.append((ts, data))

    def _commits(self, place: Place, txn_id: bytes, ts: int) -> None:
        """The log says, by a version or a row, that a transaction is committed at ts."""
        known = self.commit_ts.get(txn_id)
        if known == ts:
            return
        if known is not None:
            self._broken("I6", place, txn_id, f"committed at {ts}, and at {known}")
            return
        self.commit_ts[txn_id] = ts
        begin_ts = begin_ts_of(txn_id)
        if not self._oracle.is_issued(ts):
            self._broken("I7", place, txn_id, f"commit timestamp {ts} was never issued")
        elif begin_ts >= ts or not self._oracle.is_known(begin_ts):
            self._broken("I7", place, txn_id, f"it begins at {begin_ts} and commits at {ts}")
        elif ts <= self._begun.get(txn_id, 0):
            what = (
                f"it commits at {ts}; {self._begun[txn_id]} was handed out before it was asked for"
            )
            self._broken("I8", place, txn_id, what)
        if self._owner.setdefault(ts, txn_id) != txn_id:
            self._broken("I7", place, txn_id, f"{self._owner[ts].hex()} has timestamp {ts}, too")
        if txn_id in self.refused:
            self._broken("I4", place, txn_id, f"it commits at {ts}, but a part of it is fenced")
        held = self._held.pop(txn_id, {}).get(ts, [])
        missing = [guard for guard in self._elsewhere.pop(txn_id, []) if guard not in held]
        if missing:
            what = f"it commits at {ts}, and nobody has said that {missing[0].start!r} is unchanged"
            self._broken("FG2", place, txn_id, what)
        if self.invisible.get(txn_id, 0) >= ts:
            what = f"a reader at {self.invisible[txn_id]} was told that it is invisible; it commits at {ts}"
            self._broken("I12", place, txn_id, what)

    def _row(
        self,
        place: Place,
        family: bytes,
        txn_id: bytes,
        key: bytes,
        data: bytes | None,
        now: float,
    ) -> None:
        if family == keycode.PREPARED:
            if data is None:
                self._unprepared(place, (txn_id, key))
            else:
                row = _decode_prepared(data)
                self._prepared(place, (txn_id, key), row, now)
                if row.participants:
                    self._staged(place, txn_id, key, row.participants, now)
        elif family == keycode.DECIDED:
            if data is None:
                self._part_forgotten(place, txn_id, key)
            else:
                self._decided(place, (txn_id, key), _decode_decided(data))
        elif family == keycode.TERMINAL:
            if data is None:
                self._record_forgotten(place, txn_id)
            else:
                self._terminal(place, txn_id, _decode_terminal(data).commit_ts)

    # -- what is collected

    def _collected(self, place: Place, key: bytes, ts: int) -> None:
        """I15. ts 0: the newest version, which may only be a tombstone."""
        chain = self.versions.get(key, [])
        at = next((at for at, each in enumerate(chain) if each[0] == ts), len(chain) - 1)
        if at < 0:
            self._broken("I15", place, b"", f"{key!r} has nothing that could go")
            return
        kept = self._kept.get(place.group)
        threshold = kept.threshold if kept is not None else 0
        version_ts, row = chain[at]
        txn_id = row[8:24]
        if version_ts > threshold:
            what = f"{key!r} at {version_ts} goes, and the threshold is {threshold}"
            self._broken("I15", place, txn_id, what)
        elif not is_tombstone(row) and (at + 1 == len(chain) or chain[at + 1][0] > threshold):
            what = f"{key!r} at {version_ts} goes, and a read at {threshold} sees it"
            self._broken("I15", place, txn_id, what)

    def _part_forgotten(self, place: Place, txn_id: bytes, locus: bytes) -> None:
        if not self._below(txn_id, locus):
            self._broken("I1", place, txn_id, f"what became of {locus!r} is forgotten")
        elif (
            self.status.get((txn_id, locus)) == PartStatus.COMMITTED
            and self.record.get(txn_id) == STAGED
        ):
            what = f"what became of {locus!r} is forgotten, and the record is staged"
            self._broken("I15", place, txn_id, what)

    def _record_forgotten(self, place: Place, txn_id: bytes) -> None:
        kept = self._kept.get(place.group)
        if kept is None or begin_ts_of(txn_id) > kept.horizon:
            self._broken("I2", place, txn_id, "its record is forgotten")
        for participant in self._participants.get(txn_id, []):
            if self.status.get((txn_id, participant.locus)) == PartStatus.PREPARED:
                what = f"its record is forgotten, and part {participant.locus!r} is undecided"
                self._broken("I15", place, txn_id, what)

    def _below(self, txn_id: bytes, locus: bytes) -> bool:
        """Whether the horizon of the range of `locus` forbids that anything of it is prepared any more."""
        begin_ts = begin_ts_of(txn_id)
        return any(
            kept.start <= locus and (not kept.end or locus < kept.end) and begin_ts <= kept.horizon
            for kept in self._kept.values()
        )

    def over(self, part: Part) -> bool:
        """It is decided; or it never came, and its range's horizon forbids that it comes."""
        if self.status.get(part) in (PartStatus.COMMITTED, *_NEVER):
            return True
        return part not in self.status and self._below(*part)

    # -- parts

    def _prepared(self, place: Place, part: Part, row: PreparedRow, now: float) -> None:
        txn_id, locus = part
        if part in self.status:
            before = PartStatus(self.status[part]).name
            what = f"part {locus!r} is prepared at {row.min_ts}; it was {before}"
            if part in self.min_ts:
                what += f" at {self.min_ts[part]}"
            self._broken("I1", place, txn_id, what)
        self.status[part], self.min_ts[part], self._rows[part] = (
            PartStatus.PREPARED,
            row.min_ts,
            row,
        )
        self._undecided["part", txn_id, locus] = (now, place.group)
        if not self._oracle.is_issued(row.min_ts):
            self._broken("I7", place, txn_id, f"min_ts {row.min_ts} was never issued")
        if self._owner.setdefault(row.min_ts, txn_id) != txn_id:
            what = f"{self._owner[row.min_ts].hex()} has timestamp {row.min_ts}, too"
            self._broken("I7", place, txn_id, what)
        self._several[txn_id] = None
        if row.min_ts <= self._promised.get(place.group, 0):
            self._broken("I13", place, txn_id, f"min_ts {row.min_ts} in what is closed")
        if row.min_ts <= self.absent.get(part, 0):
            what = f"a reader at {self.absent[part]} was told that the part is absent; min_ts {row.min_ts}"
            self._broken("I12", place, txn_id, what)
        for key in row.keys:
            read = self.served.upto(key, row.min_ts)
            if read:
                what = (
                    f"{key!r} was read at {read}, now there is an intent with min_ts {row.min_ts}"
                )
                self._broken("I12", place, txn_id, what)
        self._exclude(place, part, row)
        self._imply(txn_id)

    def _exclude(self, place: Place, part: Part, row: PreparedRow) -> None:
        """I10."""
        txn_id = part[0]
        for key in row.keys:
            other = self._intents.setdefault(key, part)
            if other != part:
                self._broken("I10", place, txn_id, f"{key!r} has an intent of {other[0].hex()}")
        if len(self._rows) == 1:
            return
        for other, standing in self._rows.items():
            if other[0] == txn_id:
                continue
            for guarded, written in ((row, standing), (standing, row)):
                for guard in guarded.guards:
                    for key in written.keys:
                        if guard.start <= key and (not guard.end or key < guard.end):
                            what = f"an intent on {key!r} under a guard: {other[0].hex()}"
                            self._broken("I10", place, txn_id, what)

    def _unprepared(self, place: Place, part: Part) -> None:
        row = self._rows.pop(part, None)
        self._undecided.pop(("part", *part), None)
        if row is None:
            self._broken("I1", place, part[0], f"part {part[1]!r} was not prepared")
            return
        for key in row.keys:
            if self._intents.get(key) == part:
                del self._intents[key]

    def _decided(self, place: Place, part: Part, row: DecidedRow) -> None:
        txn_id, locus = part
        before = self.status.get(part)
        legal: tuple[int, ...] = ()
        if before is None:
            legal = (PartStatus.FENCED, PartStatus.COMMITTED)
        elif before == PartStatus.PREPARED:
            legal = (PartStatus.COMMITTED, PartStatus.ABORTED)
        if row.status not in legal:
            was = PartStatus(before or 0).name
            what = f"part {locus!r} goes from {was} to {PartStatus(row.status).name}"
            self._broken("I1", place, txn_id, what)
        self.status[part] = row.status
        if row.status == PartStatus.COMMITTED:
            self._commits(place, txn_id, row.ts)
        elif row.status in _NEVER:
            self.refused[txn_id] = None
            if txn_id in self.implied or txn_id in self.commit_ts:
                what = f"part {locus!r} is {PartStatus(row.status).name}, but it is committed"
                self._broken("I5", place, txn_id, what)

    # -- records

    def _staged(
        self,
        place: Place,
        txn_id: bytes,
        anchor_key: bytes,
        participants: list[Participant],
        now: float,
    ) -> None:
        if txn_id in self.record:
            what = f"it is staged, and its record was {self.record[txn_id]}"
            self._broken("I2", place, txn_id, what)
        self.record[txn_id] = STAGED
        self._participants[txn_id] = participants
        self._undecided["record", txn_id] = (now, place.group)
        if all(participant.locus != anchor_key for participant in participants):
            self._broken("I20", place, txn_id, "the anchor is not among the participants")
        self._imply(txn_id)

    def _imply(self, txn_id: bytes) -> None:
        """All parts prepared and the record staged: committed, whoever writes it down."""
        if self.record.get(txn_id) == STAGED:
            parts = [(txn_id, each.locus) for each in self._participants[txn_id]]
            if all(self.status.get(part) == PartStatus.PREPARED for part in parts):
                self.implied[txn_id] = max(self.min_ts[part] for part in parts)

    def _terminal(self, place: Place, txn_id: bytes, commit_ts: int) -> None:
        before = self.record.get(txn_id)
        if before not in {None, STAGED} or (before is None and commit_ts):
            self._broken("I2", place, txn_id, f"its record goes from {before} to {commit_ts}")
        self.record[txn_id] = commit_ts
        self._undecided.pop(("record", txn_id), None)
        parts = [(txn_id, each.locus) for each in self._participants.get(txn_id, [])]
        if commit_ts:
            self._commits(place, txn_id, commit_ts)
            missing = [part[1] for part in parts if part not in self.min_ts]
            if missing:
                self._broken("I4", place, txn_id, f"committed, but {missing} were not prepared")
            elif parts and commit_ts != max(self.min_ts[part] for part in parts):
                largest = max(self.min_ts[part] for part in parts)
                what = f"committed at {commit_ts}; the largest min_ts is {largest}"
                self._broken("I4", place, txn_id, what)
        elif txn_id in self.implied:
            what = f"aborted, but committed at {self.implied[txn_id]} since all are prepared"
            self._broken("I5", place, txn_id, what)
        elif parts and not any(
            self.status.get(part) != PartStatus.COMMITTED and self.over(part) for part in parts
        ):
            what = "aborted after it was staged, but no part is fenced"
            self._broken("I3", place, txn_id, what)

    def _outbox(
        self, place: Place, txn_id: bytes, locus: bytes, data: bytes | None, now: float
    ) -> None:
        what = ("outbox", txn_id, locus)
        if data is not None:
            self._undecided[what] = (now, place.group)
            if _decode_outbox(data).commit_ts != self.record.get(txn_id):
                self._broken("I19", place, txn_id, f"what is posted to {locus!r} is not the record")
            return
        self._undecided.pop(what, None)
        if not self.over((txn_id, locus)):
            text = f"the outbox row for {locus!r} goes before its part is decided"
            self._broken("I19", place, txn_id, text)

    def _owed(self, place: Place, txn_id: bytes, anchor_key: bytes) -> None:
        """Its record has ended: who takes part is told, or knows."""
        for participant in self._participants.get(txn_id, []):
            locus = participant.locus
            if self.over((txn_id, locus)):
                continue
            if locus == anchor_key or ("outbox", txn_id, locus) not in self._undecided:
                what = f"its record ends, and nothing is posted to the undecided part {locus!r}"
                self._broken("I19", place, txn_id, what)

    # -- I22

    def undecided_too_long(self, now: float, calm_since: float, bound_s: float) -> None:
        """calm_since: nothing has gone wrong since. bound_s: within which everything has to end."""
        for what, (since, group) in list(self._undecided.items()):
            waited_s = now - max(since, calm_since)
            if waited_s > bound_s:
                del self._undecided[what]  # told once
                text = f"its {what[0]} is undecided for {waited_s:.1f} s without a fault"
                self._report.broken("I22", text, group=group, txn_id=what[1])

    def oldest_undecided(self, now: float, calm_since: float) -> float:
        """For how long something has been undecided since nothing goes wrong any more; 0.0 if nothing is."""
        ages = [now - max(since, calm_since) for since, _ in self._undecided.values()]
        return max(ages, default=0.0)
