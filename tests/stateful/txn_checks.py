"""The checker of the simulated cluster: every step against the invariants, then the whole history against a replay.

It knows what was committed in each log at each instant (the ghost of every range) and everything that was told to anyone.
Numbers I1 to I23 are the protocol's invariants (txn/DESIGN.md).
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from tests.stateful.txn_ranges import Group, Replica, Violation
from txn import keycode, stamps
from txn.commands import Collect, Commit
from txn.messages import (
    Ack,
    Changed,
    Changes,
    Failure,
    Fence,
    Finalize,
    LockRead,
    Outcome,
    PartReply,
    Prepare,
    PrepareReply,
    QueryMode,
    QueryPart,
    QueryTxn,
    Read,
    ReadReply,
    Reply,
    Request,
    Resolve,
    Scan,
    ScanReply,
    Settled,
    TxnReply,
    Unlock,
    Validate,
    Validated,
)
from txn.mvcc import decode_latest, read_at
from txn.state import DecidedRow, PreparedRow, TerminalRow
from txn.types import FenceReason, Guard, Participant, PartStatus, TxnStatus, begin_ts_of, point_end

if TYPE_CHECKING:
    from tests.stateful.txn_harness import World

Part = tuple[bytes, bytes]  # txn_id, locus
_NEVER = (PartStatus.FENCED, PartStatus.ABORTED)


class Stored(NamedTuple):
    """One version of a key."""

    ts: int
    txn_id: bytes
    value: bytes | None


class Checker:
    def __init__(self, world: World) -> None:
        self.world = world
        self.versions: dict[bytes, list[Stored]] = {}  # of every key, rising
        self.status: dict[Part, int] = {}  # of every part, as the logs say
        self.min_ts: dict[Part, int] = {}
        self.record: dict[bytes, int] = {}  # commit_ts, 0: aborted, -1: staged
        self.participants: dict[bytes, list[Participant]] = {}
        self.commit_ts: dict[bytes, int] = {}
        self.told_outcome: dict[bytes, int] = {}  # commit_ts, 0: aborted
        self._owner: dict[int, bytes] = {}  # commit_ts -> txn_id
        self._refused: dict[bytes, None] = {}  # some part is FENCED
        self._held: list[tuple[bytes, int, Guard]] = []  # said to be unchanged
        self._read_points: dict[bytes, int] = {}  # the largest timestamp served
        self._read_spans: dict[tuple[bytes, bytes], int] = {}
        self._invisible_to: dict[bytes, int] = {}
        self._absent_to: dict[Part, int] = {}
        self._settled_upto: dict[int, int] = {}
        self._closed: dict[int, int] = {}  # by range: promised, in the log or to somebody
        self._safe: dict[int, int] = {}  # by range: some replica took it for safe

    # -- one command was committed

    def applied(
        self,
        group: Group,
        command: Any,
        rows: dict[bytes, bytes | None],
        outbox_gone: list[tuple[bytes, bytes]],
    ) -> None:
        self.world.probe(f"applied {type(command).__name__}")
        for row_key, data in rows.items():
            family = row_key[:1]
            if data is None and family in (keycode.LATEST, keycode.HISTORY):
                self._collected(group, row_key, command)
            elif family == keycode.LATEST and data is not None:
                version = Stored(*decode_latest(data))
                if isinstance(command, Commit) and version.ts <= self._closed.get(group.number, 0):
                    raise Violation(
                        f"I13: {version.ts} appears, {self._closed[group.number]} is closed"
                    )
                if version.ts <= self._safe.get(group.number, 0):
                    raise Violation(
                        f"I14: {version.ts} appears, {self._safe[group.number]} was safe"
                    )
                self._version(row_key[1:], version)
            elif family in (keycode.PREPARED, keycode.DECIDED, keycode.TERMINAL):
                key, at = keycode.unescape(row_key, 1)
                self._row(group, family, row_key[at:], key, data, rows)
        for txn_id, locus in outbox_gone:
            if not self._over((txn_id, locus)):
                raise Violation(
                    f"I19: the outbox row for {locus!r} went before its part was decided"
                )
        self._exclusion(group, getattr(command, "txn_id", b""))

    def _version(self, key: bytes, version: Stored) -> None:
        ts, txn_id, _ = version
        self._commits(txn_id, ts)
        chain = self.versions.setdefault(key, [])
        if chain and chain[-1].ts >= ts:
            raise Violation(f"M1: version {ts} of {key!r} after {chain[-1].ts}")
        if self._served(key) >= ts:
            raise Violation(f"I11: {key!r} was read at {self._served(key)}, now it gets {ts}")
        chain.append(version)

    def _collected(self, group: Group, row_key: bytes, command: Any) -> None:
        """I15: no read at or above the threshold can see what goes."""
        if not isinstance(command, Collect):
            raise Violation(f"{command} removes a version")
        if row_key[:1] == keycode.LATEST:
            key, ts = row_key[1:], self.versions[row_key[1:]][-1].ts
        else:
            (key, _), ts = keycode.unescape(row_key, 1), keycode.history_ts(row_key)
        threshold = group.ghost.state.row.gc_threshold
        following = [version.ts for version in self.versions[key] if version.ts > ts]
        (version,) = [version for version in self.versions[key] if version.ts == ts]
        self.world.probe("a tombstone was collected" if version.value is None else "a version was")
        if ts > threshold:
            raise Violation(f"I15: version {ts} of {key!r} went, the threshold is {threshold}")
        if version.value is not None and (not following or following[0] > threshold):
            raise Violation(f"I15: {key!r} at {threshold} was {ts}, which is gone")

    def _forgotten(self, group: Group, family: bytes, txn_id: bytes, key: bytes) -> None:
        """G5, G6: a status goes below the horizon, and when nobody rests on it."""
        self.world.probe(
            "a part's status was collected" if family == keycode.DECIDED else "a record was"
        )
        if begin_ts_of(txn_id) > group.ghost.state.row.outcome_horizon:
            raise Violation(f"a status of {txn_id.hex()} went above the horizon")
        if family == keycode.DECIDED:
            if self.status[txn_id, key] == PartStatus.COMMITTED and self.record.get(txn_id) == -1:
                raise Violation(f"G5: a part of {txn_id.hex()} was forgotten, its record is staged")
            return
        for participant in self.participants.get(txn_id, []):
            if (
                self.record[txn_id]
                and self.status[txn_id, participant.locus] == PartStatus.PREPARED
            ):
                raise Violation(f"G6: {txn_id.hex()} was forgotten, a part of it is undecided")

    def _told_settled(self, group: Group, reply: Settled) -> None:
        self._settled_upto[group.number] = max(self._settled_upto.get(group.number, 0), reply.upto)
        for txn_id, status in self.record.items():
            if status == -1 and begin_ts_of(txn_id) <= reply.upto:
                anchor_key = self.world.anchors.get(txn_id)
                if anchor_key is not None and group.owns(anchor_key):
                    raise Violation(f"{txn_id.hex()} is staged, and was said to be settled")

    def check_stored(self, group: Group) -> None:
        """I15 again, by the rows that are left: every timestamp that may be read shows what it should."""
        threshold = group.ghost.state.row.gc_threshold
        for key, chain in self.versions.items():
            if not group.owns(key):
                continue
            for at in {threshold, *(version.ts for version in chain if version.ts > threshold)}:
                shown = read_at(group.ghost.rows, key, at)
                place = bisect_right(chain, at, key=lambda version: version.ts)
                value = chain[place - 1].value if place else None
                if (shown.value if shown is not None else None) != value:
                    raise Violation(f"I15: {key!r} at {at} shows {shown}, not {value!r}")

    def _commits(self, txn_id: bytes, ts: int) -> None:
        """The logs say, directly or by a version, that a transaction is committed at ts."""
        if not begin_ts_of(txn_id) < ts <= self.world.oracle_last:
            raise Violation(f"I7: {ts} is not an issued timestamp after the begin")
        if self._owner.setdefault(ts, txn_id) != txn_id:
            raise Violation(f"I7: two transactions commit at {ts}")
        if self.commit_ts.setdefault(txn_id, ts) != ts:
            raise Violation(f"{txn_id.hex()} commits at {ts} and at {self.commit_ts[txn_id]}")
        if txn_id in self._refused:
            raise Violation(f"I4: {txn_id.hex()} commits, though a part of it is fenced")
        if self._invisible_to.get(txn_id, 0) >= ts:
            raise Violation(f"{txn_id.hex()} was said to be invisible, now it commits at {ts}")

    def _served(self, key: bytes) -> int:
        spans = [at for (low, high), at in self._read_spans.items() if low <= key < high]
        return max([self._read_points.get(key, 0), *spans])

    def _row(
        self,
        group: Group,
        family: bytes,
        txn_id: bytes,
        key: bytes,
        data: bytes | None,
        rows: dict[bytes, bytes | None],
    ) -> None:
        part = (txn_id, key)
        if family == keycode.PREPARED:
            if data is None:
                if rows.get(keycode.part_row(keycode.DECIDED, key, txn_id)) is None:
                    raise Violation("I1: a prepared part was forgotten")
            else:
                row = msgspec.msgpack.decode(data, type=PreparedRow)
                if row.min_ts <= self._closed.get(group.number, 0):
                    raise Violation(
                        f"I13: {row.min_ts} appears, {self._closed[group.number]} is closed"
                    )
                self._prepared(part, row)
                if row.participants:
                    self._staged(group, txn_id, row)
        elif data is None and family in (keycode.DECIDED, keycode.TERMINAL):
            self._forgotten(group, family, txn_id, key)
        elif family == keycode.DECIDED:
            assert data is not None
            self._decided(part, msgspec.msgpack.decode(data, type=DecidedRow))
        else:
            assert data is not None
            self._terminal(txn_id, msgspec.msgpack.decode(data, type=TerminalRow).commit_ts)

    def _staged(self, group: Group, txn_id: bytes, row: PreparedRow) -> None:
        if begin_ts_of(txn_id) <= self._settled_upto.get(group.number, 0):
            raise Violation(f"{txn_id.hex()} is staged, after it was said to be settled")
        if txn_id in self.record:
            raise Violation(f"I2: {txn_id.hex()} is staged again")
        self.record[txn_id] = -1
        self.participants[txn_id] = row.participants

    def _prepared(self, part: Part, row: PreparedRow) -> None:
        if part in self.status:
            raise Violation(f"I1: {part} is prepared, but it was {self.status[part]}")
        if not begin_ts_of(part[0]) < row.min_ts <= self.world.oracle_last:
            raise Violation("I7: a min_ts that was not issued after the begin")
        if row.min_ts <= self._absent_to.get(part, 0):
            raise Violation("a part was said to be absent for a reader at or above its min_ts")
        self.status[part], self.min_ts[part] = PartStatus.PREPARED, row.min_ts

    def _decided(self, part: Part, row: DecidedRow) -> None:
        before = self.status.get(part)
        legal: tuple[int, ...] = ()
        if before is None:
            legal = (PartStatus.FENCED, PartStatus.COMMITTED)
        elif before == PartStatus.PREPARED:
            legal = (PartStatus.COMMITTED, PartStatus.ABORTED)
        if row.status not in legal:
            raise Violation(f"I1: a part goes from {before} to {row.status}")
        self.status[part] = row.status
        if row.status == PartStatus.COMMITTED:
            self._commits(part[0], row.ts)
        if row.status in _NEVER:
            self._refused[part[0]] = None
            if part[0] in self.commit_ts:
                raise Violation(f"I5: a part of {part[0].hex()} is fenced after it committed")

    def _terminal(self, txn_id: bytes, commit_ts: int) -> None:
        before = self.record.get(txn_id)
        if before is not None and before != -1:
            raise Violation(
                f"I2: the record of {txn_id.hex()} changes from {before} to {commit_ts}"
            )
        if before is None and commit_ts:
            raise Violation("I2: committed without having been staged")
        self.record[txn_id] = commit_ts
        if commit_ts:
            self._commits(txn_id, commit_ts)
        parts = [(txn_id, participant.locus) for participant in self.participants.get(txn_id, [])]
        if commit_ts:
            if any(
                self.status.get(part) not in (PartStatus.PREPARED, PartStatus.COMMITTED)
                for part in parts
            ):
                raise Violation(f"I4: {txn_id.hex()} commits, but not all parts are prepared")
            if commit_ts != max(self.min_ts[part] for part in parts):
                raise Violation(f"I4: {txn_id.hex()} commits at {commit_ts}, not at the maximum")
        elif parts and not any(
            self.status.get(part) != PartStatus.COMMITTED and self._over(part) for part in parts
        ):
            raise Violation(f"I3: {txn_id.hex()} is aborted, but no part is fenced")

    def _over(self, part: Part) -> bool:
        """It is decided; or it never came, and its range's horizon forbids that it comes."""
        if self.status.get(part) in (PartStatus.COMMITTED, *_NEVER):
            return True
        horizon = self.world.group_of(part[1]).ghost.state.row.outcome_horizon
        return part not in self.status and begin_ts_of(part[0]) <= horizon

    def _exclusion(self, group: Group, txn_id: bytes) -> None:
        """I10: no intent under a guard of another transaction."""
        state = group.ghost.state
        for part in state.parts.get(txn_id, {}).values():
            if any(state.foreign_guard(key, txn_id) is not None for key in part.row.keys):
                raise Violation("I10: an intent under a foreign guard")
            for guard in part.row.guards:
                for _, other in state.intents_in(guard.start, guard.end):
                    if other.txn_id != txn_id:
                        raise Violation("I10: a guard over a foreign intent")
                for other in state.stamped_in(guard.start, guard.end):
                    if other.txn_id != txn_id:
                        raise Violation("I10: a guard over a foreign stamped key")
            for low, high in stamps.spans(part.row.stamps, part.row.min_ts - 1):
                if state.foreign_guard_in(low, high, txn_id) is not None:
                    raise Violation("I10: a stamped key under a foreign guard")
                if any(other.txn_id != txn_id for _, other in state.intents_in(low, high)):
                    raise Violation("I10: a stamped key where another is written")

    # -- closed timestamps

    def closes(self, group: Group, closed_ts: int) -> None:
        self._closed[group.number] = max(self._closed.get(group.number, 0), closed_ts)

    def safe(self, group: Group, replica: Replica) -> None:
        """I14; and I15: what may be collected is below what may be read."""
        safe_ts = replica.safe_ts
        self._safe[group.number] = max(self._safe.get(group.number, 0), safe_ts)
        for loci in replica.state.parts.values():
            for part in loci.values():
                if part.row.min_ts <= safe_ts:
                    raise Violation(
                        f"I14: {safe_ts} is safe, and a part has min_ts {part.row.min_ts}"
                    )
        if replica.state.row.gc_threshold > safe_ts:
            raise Violation(
                f"I15: collected up to {replica.state.row.gc_threshold}, safe is {safe_ts}"
            )

    # -- something was told to somebody

    def told(self, group: Group, request: Request, reply: Reply) -> None:
        self._count(request, reply)
        if isinstance(reply, PrepareReply):
            assert isinstance(request, Prepare)
            self._told_part((request.txn_id, request.locus), reply.status, reply.ts)
            if reply.status == PartStatus.COMMITTED:
                for guards in request.elsewhere:
                    if any((request.txn_id, reply.ts, guard) not in self._held for guard in guards):
                        raise Violation(
                            "FG2: committed, and what was read elsewhere was not asked about"
                        )
        elif isinstance(reply, PartReply):
            assert isinstance(request, (Fence, QueryPart))
            part = (request.txn_id, request.locus)
            if reply.status == PartStatus.ABSENT:
                assert isinstance(request, QueryPart)
                self._absent_to[part] = max(self._absent_to.get(part, 0), request.read_ts)
                if self.min_ts.get(part, request.read_ts + 1) <= request.read_ts:
                    raise Violation("a part is said to be absent, but it is not")
            else:
                self._told_part(part, reply.status, reply.ts)
        elif isinstance(reply, TxnReply):
            assert isinstance(request, (Outcome, QueryTxn, Finalize))
            self._told_txn(request, reply)
        elif isinstance(reply, Settled):
            self._told_settled(group, reply)
        elif isinstance(reply, ReadReply):
            assert isinstance(request, (Read, LockRead))
            keys = request.keys if isinstance(request, Read) else [request.key]
            for key, version, value in zip(keys, reply.versions, reply.values, strict=True):
                self._read_points[key] = max(self._read_points.get(key, 0), reply.at)
                self._compare({key: (version, value)}, self.rows_at(key, point_end(key), reply.at))
        elif isinstance(reply, ScanReply):
            assert isinstance(request, Scan)
            self._told_scan(group, request, reply)
        elif isinstance(reply, Changed):
            assert isinstance(request, Changes)
            self._told_changes(group, request, reply)
        elif isinstance(reply, Validated):
            assert isinstance(request, Validate)
            if reply.unchanged:
                self._told_unchanged(request)
        elif isinstance(reply, Ack):
            assert isinstance(request, (Resolve, Unlock))
            if isinstance(request, Resolve) and not self._over((request.txn_id, request.locus)):
                raise Violation("I19: a Resolve was acknowledged, but not applied")

    def _told_unchanged(self, request: Validate) -> None:
        """A span that holds at `at` what it held at read_ts is read at both."""
        for guard in request.guards:
            self._held.append((request.txn_id, request.at, guard))
            span = (guard.start, guard.end)
            self._read_spans[span] = max(self._read_spans.get(span, 0), request.at)
            for key, chain in self.versions.items():
                if guard.start <= key < guard.end:
                    if any(guard.read_ts < version.ts <= request.at for version in chain):
                        raise Violation(f"I11: {key!r} is said to be unchanged, and it was written")

    def _count(self, request: Request, reply: Reply) -> None:
        name = type(request).__name__
        if isinstance(reply, PrepareReply):
            name = "one-range Prepare" if getattr(request, "one_range", False) else name
            reason = f" {FenceReason(reply.reason).name}" if reply.reason else ""
            self.world.probe(f"{name}: {PartStatus(reply.status).name}{reason}")
        elif isinstance(reply, PartReply):
            self.world.probe(f"{name}: {PartStatus(reply.status).name}")
        elif isinstance(reply, TxnReply):
            if isinstance(request, QueryTxn):
                name = f"{name} {QueryMode(request.mode).name}"
            self.world.probe(f"{name}: {TxnStatus(reply.status).name}")
        elif isinstance(reply, Failure):
            self.world.probe(f"{name}: {reply.code}")
        elif isinstance(request, LockRead):
            self.world.probe(f"{name}: {type(reply).__name__}")
        else:
            self.world.probe(f"{name}: answered")

    def _told_part(self, part: Part, status: int, ts: int) -> None:
        txn_id = part[0]
        if status == PartStatus.PREPARED:
            if self.min_ts.get(part) != ts:
                raise Violation(f"I1: min_ts {ts} was told, {self.min_ts.get(part)} is in the log")
        elif status == PartStatus.COMMITTED:
            self.outcome(txn_id, ts)
            if self.commit_ts.get(txn_id) != ts and self.status.get(part) != status:
                raise Violation(f"I6: {txn_id.hex()} was said to be committed at {ts}")
        elif status in _NEVER:
            self.outcome(txn_id, 0)
            if self.status.get(part) not in _NEVER and self.record.get(txn_id) != 0:
                raise Violation(f"E4: a refusal of {txn_id.hex()} was told before it was durable")

    def _told_txn(self, request: Outcome | QueryTxn | Finalize, reply: TxnReply) -> None:
        if reply.status == TxnStatus.COMMITTED:
            self.outcome(request.txn_id, reply.ts)
        elif reply.status == TxnStatus.ABORTED:
            self.outcome(request.txn_id, 0)
        elif reply.status == TxnStatus.INVISIBLE:
            assert isinstance(request, QueryTxn)
            known = self._invisible_to.get(request.txn_id, 0)
            self._invisible_to[request.txn_id] = max(known, request.read_ts)
            commit_ts = self.commit_ts.get(request.txn_id, 0)
            if commit_ts and commit_ts <= request.read_ts:
                raise Violation(f"a transaction committed at {commit_ts} was said to be invisible")

    def outcome(self, txn_id: bytes, commit_ts: int) -> None:
        """I6, first half: nobody is told anything else than anybody else."""
        if self.told_outcome.setdefault(txn_id, commit_ts) != commit_ts:
            other = self.told_outcome[txn_id]
            raise Violation(f"I6: two outcomes of {txn_id.hex()} were told: {other}, {commit_ts}")

    def _told_scan(self, group: Group, request: Scan, reply: ScanReply) -> None:
        end = request.end or group.end or b"\xff"
        if reply.done:
            low, high = request.start, end
        elif request.reverse:
            low, high = reply.covered_to, end
        else:
            low, high = request.start, reply.covered_to
        self._read_spans[low, high] = max(self._read_spans.get((low, high), 0), reply.at)
        values: list[bytes | None] = [*reply.values] or [None] * len(reply.keys)
        got = {
            key: (version, value)
            for key, version, value in zip(reply.keys, reply.versions, values, strict=True)
        }
        expected = self.rows_at(low, high, reply.at)
        if request.keys_only:
            expected = {key: (version, None) for key, (version, _) in expected.items()}
        if list(got) != sorted(got, reverse=request.reverse):
            raise Violation("a scan is out of order")
        self._compare(got, expected)

    def _told_changes(self, group: Group, request: Changes, reply: Changed) -> None:
        """W1, W2: a page is all of its span from `since` to `upto`, and nothing at or below `upto` comes later."""
        low, high, since, upto = request.start, request.end or b"\xff", request.since, reply.upto
        if not since <= upto <= max(since, self.world.oracle_last):
            raise Violation(f"W2: a page from {since} speaks of everything up to {upto}")
        if upto > since:
            high = request.end or group.end or b"\xff"
            self._read_spans[low, high] = max(self._read_spans.get((low, high), 0), upto)
        told = list(zip(reply.versions, reply.keys, reply.values, strict=True))
        expected = self.changes(low, high, since, upto)
        if told != expected:
            raise Violation(f"W1: ({since}, {upto}] of {low!r} is {told}, the log says {expected}")
        if told:
            self.world.probe("a watcher was told something")

    def changes(
        self, start: bytes, end: bytes, since: int, upto: int
    ) -> list[tuple[int, bytes, bytes | None]]:
        """What the logs say was written to [start, end) in (since, upto], in the order of commit."""
        found = [
            (version.ts, key, version.value)
            for key, chain in self.versions.items()
            if start <= key < end
            for version in chain
            if since < version.ts <= upto
        ]
        return sorted(found, key=lambda each: each[:2])

    def _compare(
        self,
        got: dict[bytes, tuple[int, bytes | None]],
        expected: dict[bytes, tuple[int, bytes | None]],
    ) -> None:
        if {key: entry for key, entry in got.items() if entry[0]} != expected:
            raise Violation(f"I11: read {got}, but the log says {expected}")

    def rows_at(self, start: bytes, end: bytes, at: int) -> dict[bytes, tuple[int, bytes | None]]:
        """What the logs say that [start, end) holds at `at`: version and value of each live key."""
        found: dict[bytes, tuple[int, bytes | None]] = {}
        for key in sorted(self.versions):
            if start <= key < end:
                chain = self.versions[key]
                place = bisect_right(chain, at, key=lambda version: version.ts)
                if place and chain[place - 1].value is not None:
                    found[key] = (chain[place - 1].ts, chain[place - 1].value)
        return found

    # -- at the end

    def committed(self) -> dict[bytes, int]:
        """Every transaction that the logs say is committed, and when."""
        found = {txn_id: ts for txn_id, ts in self.record.items() if ts > 0}
        for txn_id, ts in self.commit_ts.items():
            if found.setdefault(txn_id, ts) != ts:
                raise Violation(f"{txn_id.hex()}: the record and the versions disagree")
        return found

    def check_outcomes(self) -> None:
        """I6, second half: every outcome told is what the record says."""
        committed = self.committed()
        for txn_id, ts in self.told_outcome.items():
            if committed.get(txn_id, 0) != ts:
                raise Violation(
                    f"I6: {ts} was told of {txn_id.hex()}, it is {committed.get(txn_id)}"
                )
