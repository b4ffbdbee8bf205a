"""What is told to anybody, clients and ranges alike, at the moment it leaves: I6, I8, I11, I12, I19, I1.

- I6: every outcome that is told is the record, or what the record will be; nobody is told another.
- I8: a commit timestamp that is told was handed out by then.
- I11: a served read shows the newest version at its timestamp, and is remembered: see transactions.py.
- W1, W2 (txn/changes.py): a page of a watch is every version of its span that the log has in (since, upto], and as a read it is
  remembered.
- FG2 (txn/validation.py): a span that is said to be unchanged is; as a read it is remembered, too.
- I12: what a reader is promised (invisible, absent) is true now; that it stays so is seen there, too.
- I19: a Resolve is acknowledged after it is applied. I1: a told min_ts is that of the log.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any

from kvstore.sim.observers.report import Report
from kvstore.sim.observers.transactions import STAGED, Part, Transactions
from txn.messages import (
    Ack,
    Changed,
    Changes,
    Fence,
    Finalize,
    LockRead,
    Outcome,
    PartReply,
    Prepare,
    PrepareReply,
    QueryPart,
    QueryTxn,
    Read,
    ReadReply,
    Reply,
    Request,
    Resolve,
    Scan,
    ScanReply,
    TxnReply,
    Validate,
    Validated,
)
from txn.mvcc import decode_latest
from txn.types import PartStatus, TxnStatus

_NEVER = (PartStatus.FENCED, PartStatus.ABORTED)


class Answers:
    """See the module. `told` takes each answer with its request, the range it came from, and that range's end."""

    def __init__(
        self, report: Report, transactions: Transactions, handed_out: Callable[[], int]
    ) -> None:
        self.outcomes: dict[bytes, int] = {}  # txn_id -> commit_ts, 0: aborted
        self._report, self._ghost, self._handed_out = report, transactions, handed_out
        self._group, self._node = 0, ""
        self._handlers: dict[tuple[type, type], Callable[[Any, Any, bytes], None]] = {
            (Prepare, PrepareReply): self._prepared,
            (Fence, PartReply): self._fenced,
            (QueryPart, PartReply): self._queried,
            (Outcome, TxnReply): self._transaction,
            (QueryTxn, TxnReply): self._transaction,
            (Finalize, TxnReply): self._transaction,
            (Resolve, Ack): self._acknowledged,
            (Read, ReadReply): self._read,
            (Scan, ScanReply): self._scanned,
            (Changes, Changed): self._changed,
            (LockRead, ReadReply): self._locked,
            (Validate, Validated): self._validated,
        }

    def told(self, node: str, group: int, end: bytes, request: Request, reply: Reply) -> None:
        handler = self._handlers.get((type(request), type(reply)))
        if handler is not None:  # else a Failure, which says nothing
            self._group, self._node = group, node
            handler(request, reply, end)

    def _broken(self, invariant: str, what: str, txn_id: bytes = b"") -> None:
        self._report.broken(invariant, what, group=self._group, node=self._node, txn_id=txn_id)

    # -- outcomes

    def _prepared(self, request: Prepare, reply: PrepareReply, _end: bytes) -> None:
        self._part((request.txn_id, request.locus), reply.status, reply.ts)

    def _fenced(self, request: Fence, reply: PartReply, _end: bytes) -> None:
        self._part((request.txn_id, request.locus), reply.status, reply.ts)

    def _queried(self, request: QueryPart, reply: PartReply, _end: bytes) -> None:
        part, ghost = (request.txn_id, request.locus), self._ghost
        if reply.status != PartStatus.ABSENT:
            self._part(part, reply.status, reply.ts)
            return
        ghost.absent[part] = max(ghost.absent.get(part, 0), request.read_ts)
        min_ts = ghost.min_ts.get(part)
        if min_ts is not None and min_ts <= request.read_ts:
            what = f"a reader at {request.read_ts} is told that the part is absent; min_ts {min_ts}"
            self._broken("I12", what, request.txn_id)

    def _part(self, part: Part, status: int, ts: int) -> None:
        txn_id, ghost = part[0], self._ghost
        if status == PartStatus.PREPARED:
            if ghost.min_ts.get(part) != ts:
                what = f"min_ts {ts} is told, {ghost.min_ts.get(part)} is in the log"
                self._broken("I1", what, txn_id)
        elif status == PartStatus.COMMITTED:
            self._committed(txn_id, ts)
        elif status in _NEVER:
            self._aborted(txn_id)

    def _transaction(
        self, request: Outcome | QueryTxn | Finalize, reply: TxnReply, _end: bytes
    ) -> None:
        if reply.status == TxnStatus.COMMITTED:
            self._committed(request.txn_id, reply.ts)
        elif reply.status == TxnStatus.ABORTED:
            self._aborted(request.txn_id)
        elif reply.status == TxnStatus.INVISIBLE:
            self._invisible(request, reply)

    def _committed(self, txn_id: bytes, ts: int) -> None:
        ghost = self._ghost
        known = ghost.commit_ts.get(txn_id, ghost.implied.get(txn_id))
        if known != ts:
            self._broken("I6", f"said to be committed at {ts}; the log says {known}", txn_id)
        self._outcome(txn_id, ts)
        if ts > self._handed_out():
            what = f"acknowledged at {ts}; {self._handed_out()} is the last that was handed out"
            self._broken("I8", what, txn_id)

    def _aborted(self, txn_id: bytes) -> None:
        ghost = self._ghost
        if txn_id not in ghost.refused and ghost.record.get(txn_id, STAGED) != 0:
            self._broken("I6", "said to be aborted, and no log says so", txn_id)
        self._outcome(txn_id, 0)

    def _outcome(self, txn_id: bytes, ts: int) -> None:
        other = self.outcomes.setdefault(txn_id, ts)
        if other != ts:
            self._broken("I6", f"two outcomes are told: {other} and {ts} (0: aborted)", txn_id)

    def _invisible(self, request: Any, _reply: TxnReply) -> None:
        ghost, txn_id, read_ts = self._ghost, request.txn_id, request.read_ts
        ghost.invisible[txn_id] = max(ghost.invisible.get(txn_id, 0), read_ts)
        commit_ts = ghost.commit_ts.get(txn_id, ghost.implied.get(txn_id))
        if commit_ts is not None and commit_ts <= read_ts:
            what = f"a reader at {read_ts} is told that it is invisible; committed at {commit_ts}"
            self._broken("I12", what, txn_id)

    def _acknowledged(self, request: Resolve, _reply: Ack, _end: bytes) -> None:
        if not self._ghost.over((request.txn_id, request.locus)):
            what = f"a Resolve of {request.locus!r} is acknowledged, and not applied"
            self._broken("I19", what, request.txn_id)

    # -- reads

    def _read(self, request: Read, reply: ReadReply, _end: bytes) -> None:
        self._values(request.keys, reply)

    def _locked(self, request: LockRead, reply: ReadReply, _end: bytes) -> None:
        """The newest version at a timestamp that the leader chose: a read like any other."""
        self._values([request.key], reply)

    def _values(self, keys: list[bytes], reply: ReadReply) -> None:
        served, at = self._ghost.served, reply.at
        for key, version, value in zip(keys, reply.versions, reply.values, strict=False):
            served.key(key, at)
            expected = self._newest(key, at)
            if expected != (version, value):
                what = f"{key!r} is read at {at} as version {version}; the log has {expected[0]}"
                self._broken("I11", what)

    def _newest(self, key: bytes, at: int) -> tuple[int, bytes | None]:
        """Version and value of the log at a timestamp; (0, None): nothing, or deleted."""
        chain = self._ghost.versions.get(key)
        if not chain:
            return 0, None
        place = len(chain)
        if chain[-1][0] > at:
            place = bisect_right(chain, at, key=lambda each: each[0])
        if not place:
            return 0, None
        version = decode_latest(chain[place - 1][1])
        return (version.commit_ts, version.value) if version.value is not None else (0, None)

    def _scanned(self, request: Scan, reply: ScanReply, end: bytes) -> None:
        low, high = request.start, request.end or end
        if not reply.done:
            if request.reverse:
                low = reply.covered_to
            else:
                high = reply.covered_to
        ghost, at = self._ghost, reply.at
        ghost.served.span(low, high, at)
        expected = []
        for key in ghost.keys.irange(low, high or None, inclusive=(True, False)):
            version, value = self._newest(key, at)
            if version:
                expected.append((key, version, None if request.keys_only else value))
        if request.reverse:
            expected.reverse()
        values: list[Any] = [*reply.values] or [None] * len(reply.keys)
        found = list(zip(reply.keys, reply.versions, values, strict=True))
        if found != expected:
            odd = [each for each in expected if each not in found] or [
                each for each in found if each not in expected
            ]
            what = f"[{low!r}, {high!r}) is read at {at} unlike the log: {(odd or found)[:2]}"
            self._broken("I11", what)

    def _validated(self, request: Validate, reply: Validated, _end: bytes) -> None:
        """A span that holds at `at` what it held at read_ts: a read at both."""
        if not reply.unchanged:
            return
        ghost, at = self._ghost, request.at
        ghost.unchanged(request.txn_id, at, request.guards)
        for guard in request.guards:
            ghost.served.span(guard.start, guard.end, at)
            for key in ghost.keys.irange(guard.start, guard.end, inclusive=(True, False)):
                for version, _ in ghost.versions[key]:
                    if guard.read_ts < version <= at:
                        what = f"{key!r} is said to be unchanged in ({guard.read_ts}, {at}]; it was written at {version}"
                        self._broken("I11", what, request.txn_id)

    def _changed(self, request: Changes, reply: Changed, end: bytes) -> None:
        since, upto, ghost = request.since, reply.upto, self._ghost
        low, high = request.start, request.end or end
        if upto > since:
            ghost.served.span(low, high, upto)
        expected = []
        for key in ghost.keys.irange(low, high or None, inclusive=(True, False)):
            chain = ghost.versions[key]
            place = bisect_right(chain, since, key=lambda each: each[0])
            for version, row in chain[place:]:
                if version <= upto:
                    expected.append((version, key, decode_latest(row).value))
        expected.sort(key=lambda each: each[:2])
        found = list(zip(reply.versions, reply.keys, reply.values, strict=True))
        if found != expected:
            odd = [each for each in expected if each not in found] or [
                each for each in found if each not in expected
            ]
            what = f"[{low!r}, {high!r}) in ({since}, {upto}] is told unlike the log: {(odd or found)[:2]}"
            self._broken("W1", what)
