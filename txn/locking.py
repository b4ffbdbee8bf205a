"""Locking reads at a leader (DESIGN.md section 16): locks are taken, waited for, kept alive and given back here.

A lock keeps writers of others away from a key; it decides nothing. Its owner's read is validated when it commits, like every
other read, so a lock that is lost (with its leader, or its lease) costs a conflict.

X1 whoever holds a lock reads the newest version, and none comes while it holds: others' writers that were latched or prepared
before (also of stamped keys that may become this one) are waited for, later ones wait for the lock. So the read needs no
timestamp of the oracle: it is served at any timestamp that was issued when nobody wrote the key, and every later writer's is
above that (E2). A snapshot that is to begin with it does need one (`fresh`): it has to show all that was committed before.
X2 a Prepare that writes a key which another has locked waits in the same queue, for a bounded time; once its turn has come
it holds the key like any owner, until it is evaluated to its end.
X3 a lock goes when its owner's Prepare is applied here, whatever came of it: from then on a version, an intent, a guard, or
nothing stands for it.
X4 every request is answered: LockRead within LOCK_POLL_S, since its client must not take the leader for dead. Between two
polls a waiter keeps its place.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from replication.probes import chance, reached
from txn import stamps
from txn.deadlocks import DETECTOR_KEY, EDGES_MAX, REPORT_S, WAITED_S, Detector
from txn.latches import Pending, Waiter
from txn.locks import BLOCKERS_MAX, LockTable, Verdict, Wait
from txn.messages import (
    FRESH_LEASE_S,
    LOCK_POLL_S,
    Ack,
    Failure,
    KeepLocks,
    LockEdge,
    LockLeases,
    LockPending,
    LockRead,
    LockWaits,
    Prepare,
    Read,
    ReadReply,
    Reply,
    Unlock,
    Victims,
)
from txn.mvcc import decode_latest
from txn.state import Answer
from txn.types import (
    TXN_ID_BYTES,
    FenceReason,
    PartStatus,
    WriteKind,
    begin_ts_of,
    point_end,
)

if TYPE_CHECKING:
    from txn.evaluate import Evaluator
    from txn.state import Part

PASS_S = 0.2  # a Prepare whose turn has come holds the key for so long at most until it is latched
RETRY_AFTER_S = 0.05


class Locking:
    """The locking part of an evaluator."""

    def __init__(self, owner: Evaluator) -> None:
        self.ev = owner
        self.table = LockTable(owner.limits.locks_max, owner.limits.lock_lease_s)
        self.detector = Detector()
        self._report_at: float | None = None
        self._reports = 0
        self._answered = 0  # the last report that the detector has certainly received
        self._reporting = False  # one is under way

    # -- life and time

    def waiters(self) -> list[Waiter]:
        """Everybody who waits for a lock."""
        return [asker for wait in self.table.waiting.values() for asker in wait.askers]

    def stop(self) -> None:
        """The locks are lost with the term."""
        if self.table.held:
            reached("locks_lost")
        self.table = LockTable(0, 1.0)

    def deadline(self) -> float | None:
        due = self.table.due()
        if self._report_at is not None and (due is None or self._report_at < due):
            return self._report_at
        return due

    def tick(self, now: float) -> None:
        lost = self.table.expire(now)
        if lost:
            reached("lock_lease_ended")
            self.ev.counters["lock_leases_ended_total"] += lost
        self._changed()
        if self._report_at is not None and self._report_at <= now:
            self._report(now)

    # -- requests

    def lock_read(self, request: LockRead, origin: Any, now: float) -> None:
        ev, table = self.ev, self.table
        refusal = self._refusal(request)
        if refusal is None:
            owner = table.owners.get(request.owner)
            if owner is not None and owner.cycle:
                refusal = _deadlock(request, owner.cycle)
                owner.cycle = []
        if refusal is not None:
            ev.out.reply(origin, refusal, False)
            return
        if chance("lock_lost"):
            table.release(request.owner, now, ended=False)
        found = table.acquire(
            request.owner, request.age, request.key, not request.shared, now,
            queue=request.wait_s > 0, lease_s=FRESH_LEASE_S if request.fresh else 0.0,
        )  # fmt: skip
        if isinstance(found, Wait):
            self._attach(
                found, Waiter(request, origin, now), now + _poll_s(request), self._poll_over
            )
        elif found is Verdict.GRANTED:
            self._look(request, origin, now)
        elif found is Verdict.BUSY:
            self._tell_pending(request, origin)
        elif found is Verdict.FULL:
            reached("lock_table_full")
            message = "too many locks in the range"
            details = {"retry_after": RETRY_AFTER_S}
            ev.out.reply(origin, Failure(request.id, "throttled", message, details), False)
        else:
            message = "the transaction has ended; begin another"
            ev.out.reply(origin, Failure(request.id, "transaction_closed", message), False)
        self._changed()

    def _refusal(self, request: LockRead) -> Reply | None:
        row = self.ev.state.row
        if not self.ev.state.owns(request.key) or (
            request.version and request.version != row.version
        ):
            return Failure(request.id, "epoch_mismatch")
        if len(request.owner) != TXN_ID_BYTES or not request.key:
            return Failure(request.id, "invalid_argument", "malformed lock")
        if not request.wait_s >= 0:  # nor is it, if that is no number
            return Failure(request.id, "invalid_argument", "wait_s is a number of seconds")
        return None

    def keep(self, request: KeepLocks, origin: Any, now: float) -> None:
        lost = self.table.renew(request.owners, now)
        lease_s = self.ev.limits.lock_lease_s
        self.ev.out.reply(origin, LockLeases(request.id, lease_s, lost), False)

    def unlock(self, request: Unlock, origin: Any, now: float) -> None:
        table = self.table
        if request.waits_only:
            owner = table.owners.get(request.owner)
            wait = owner.waits.get(request.key) if owner is not None else None
            if wait is not None:
                reached("lock_wait_cancelled")
                askers, wait.askers = wait.askers, []
                for asker in askers:
                    if type(asker.request) is Prepare:  # it took the same place, and stays
                        wait.askers.append(asker)
                        continue
                    asker.done = True
                    self._tell_pending(asker.request, asker.origin)
                if not wait.askers:
                    table.leave(wait)
        else:
            table.release(request.owner, now)
        self._changed()
        self.ev.out.reply(origin, Ack(request.id), False)

    # -- waiting

    def _attach(self, wait: Wait, asker: Waiter, until: float, over: Any) -> None:
        if not wait.askers:
            self.ev.counters["lock_waits_total"] += 1
        wait.askers.append(asker)
        if self._report_at is None:
            self._report_at = max(self.ev.now, wait.since + WAITED_S)
        self.ev.at(until, partial(over, wait, asker))

    def _poll_over(self, wait: Wait, asker: Waiter, _now: float) -> None:
        """The client asks again: a silent leader would be taken for a dead one (X4)."""
        if not asker.done and asker in wait.askers:
            wait.askers.remove(asker)
            asker.done = True
            self._tell_pending(asker.request, asker.origin)

    def _tell_pending(self, request: LockRead, origin: Any, holder: bytes = b"") -> None:
        found = self.table.foreign(request.key, request.owner)
        holder = holder or (found.id if found is not None else b"")
        self.ev.out.reply(origin, LockPending(request.id, holder), False)

    def _changed(self) -> None:
        """Whoever has the key now is evaluated again, and so is whoever lost its place: it takes another, or is told."""
        table = self.table
        for wait in (*table.granted, *table.dropped):
            for asker in wait.askers:
                if wait.committing:
                    asker.since = self.ev.now  # what else is in its way is waited for from now
                self.ev.runnable.append(asker)
            wait.askers = []
        table.granted.clear()
        table.dropped.clear()

    # -- the read under a lock (X1)

    def _look(self, request: LockRead, origin: Any, now: float) -> None:
        ev, key = self.ev, request.key
        latches, state = ev.latches, ev.state
        if latches.txns:
            # Writers alone: the lock keeps later ones away, but not guards, of which there may always be another.
            blocker = latches.blocker_of_guard(key, point_end(key))
            if blocker is not None:
                ev.wait_for(blocker, request, origin, now)
                return
        part = state.intents.get(key)
        if part is None and state.stamped:
            part = next(state.stamped_in(key, point_end(key)), None)
        if part is None and not request.shared and (state.point_guards or state.span_guards):
            part = state.foreign_guard(key, b"")
        if part is not None:
            self._wait_for_part(part, request, origin, now)
            return
        if request.fresh:
            ev.reader.read(Read(request.id, 0, request.version, 0, [key]), origin, now)
            return
        row = ev.rows.get(b"L" + key)
        version = decode_latest(row) if row is not None else None
        at = max(ev.issued, state.row.gc_threshold, version.commit_ts if version is not None else 0)
        if version is None or version.value is None:
            reply = ReadReply(request.id, at, [0], [None])
        else:
            reply = ReadReply(request.id, at, [version.commit_ts], [version.value])
        ev.out.reply(origin, reply, True)

    def _wait_for_part(self, part: Part, request: LockRead, origin: Any, now: float) -> None:
        """Prepared before the lock was taken: its outcome is waited for, with the lock held."""
        ev = self.ev
        reached("lock_waits_for_part")
        if part.resolving is not None:
            ev.wait_for(part.resolving, request, origin, now)
            return
        if not request.wait_s:
            self._tell_pending(request, origin, part.txn_id)
            return
        waiter = Waiter(request, origin, now)
        ev.blocked.setdefault(part.txn_id, []).append(waiter)

        def over(_now: float) -> None:
            if waiter.done:
                return
            waiters = ev.blocked.get(part.txn_id)
            if waiters is not None and waiter in waiters:
                waiters.remove(waiter)
                if not waiters:
                    del ev.blocked[part.txn_id]
                waiter.done = True
                ev.recovery.blocked_by(part)
                self._tell_pending(request, origin, part.txn_id)

        ev.at(now + _poll_s(request), over)

    # -- writers: X2 and X3

    def in_the_way(self, request: Prepare, origin: Any, now: float, since: float) -> bool:
        """Whether another's lock is in the way of what it writes: then it waits, or it is refused."""
        table = self.table
        if not table.locks:
            return False
        owner_id = request.lock_owner or request.txn_id
        for write in stamps.once(request.writes):
            span: tuple[bytes, bytes] | None = None
            if write.kind == WriteKind.DELETE_RANGE:
                span = write.key, write.value
            elif write.kind == WriteKind.STAMPED_KEY:
                span = stamps.span(write.key, self.ev.issued)
            if span is not None:
                found = table.foreign_in(*span, owner_id)
                key, holder = found if found is not None else (b"", None)
            else:
                key, holder = write.key, table.foreign(write.key, owner_id)
            if holder is not None:
                outdated, _ = self.ev.guard_check.look(request.guards)
                if outdated is not None:  # it would wait in vain
                    self.ev.refuse(request, origin, outdated)
                else:
                    self._wait_to_write(request, origin, now, since, key, holder.id)
                return True
        return False

    def _wait_to_write(
        self, request: Prepare, origin: Any, now: float, since: float, key: bytes, holder: bytes
    ) -> None:
        ev, table = self.ev, self.table
        limits = ev.limits
        owner_id = request.lock_owner or request.txn_id
        wait_s = limits.lock_wait_s if request.one_range else limits.conflict_wait_s
        owner = table.owners.get(owner_id)
        until = owner.until if owner is not None and owner.until else now + wait_s
        if now < until:
            age = request.age or begin_ts_of(request.txn_id)
            lease_s = until - now + PASS_S
            found = table.acquire(
                owner_id, age, key, True, now, committing=True, lease_s=lease_s
            )  # fmt: skip
            self._changed()
            if isinstance(found, Wait):
                reached("write_waits_for_lock")
                found.owner.until = until
                asker = Waiter(request, origin, since)
                self._attach(found, asker, until, self._write_wait_over)
                return
        reached("write_refused_by_lock")
        refusal = Answer(PartStatus.FENCED, 0, FenceReason.CONFLICT, key, holder, 0)
        ev.refuse(request, origin, refusal)

    def _write_wait_over(self, wait: Wait, asker: Waiter, now: float) -> None:
        if asker.done or asker not in wait.askers:
            return
        asker.done = True
        wait.askers.remove(asker)
        if not wait.askers:
            self.table.leave(wait)
            self._changed()
        self.ev.prepare_again(asker, now)

    def failed(self, request: Prepare) -> None:
        """It is answered without an outcome: its locks stay for the next try, which waits anew."""
        owner = self.table.owners.get(request.lock_owner or request.txn_id)
        if owner is not None:
            owner.until = 0.0

    def applied(self, pending: Pending) -> None:
        """An own Prepare was applied (X3)."""
        request = pending.request
        if type(request) is Prepare:
            owner_id = request.lock_owner or request.txn_id
            if self.table.release(owner_id, self.ev.now, ended=bool(request.lock_owner)):
                self._changed()

    # -- deadlocks

    def _report(self, now: float) -> None:
        """Tell the detector who waits long; one report at a time."""
        if not self.table.waiting:
            self._report_at = None
            return
        self._report_at = now + REPORT_S
        if self._reporting:
            return
        edges = [
            LockEdge(
                wait.number,
                wait.owner.id,
                wait.owner.age,
                wait.committing,
                [owner.id for owner in blockers],
            )
            for wait, blockers in self.table.long_waits(now - WAITED_S, EDGES_MAX)
        ]
        if not edges:
            return
        self._reporting, self._reports = True, self._reports + 1
        number = self._reports
        row = self.ev.state.row
        report = LockWaits(
            0, 0, 0, DETECTOR_KEY, row.range_id, self.ev.term, number, self._answered, edges
        )  # fmt: skip

        def on_reply(reply: Reply) -> None:
            self._reporting = False
            if isinstance(reply, Victims):  # a failed one may still arrive, after the next was made
                self._answered = number
                for victim in reply.victims:
                    self._give_way(victim.number, victim.cycle)

        self.ev.recovery.call(DETECTOR_KEY, report, on_reply)

    def _give_way(self, number: int, cycle: list[bytes]) -> None:
        wait = self.table.waiting.get(number)
        if wait is None or wait.committing:
            return
        self.ev.counters["deadlocks_total"] += 1
        self.table.leave(wait)
        askers, wait.askers = wait.askers, []
        if not askers:
            wait.owner.cycle = cycle  # told when its client asks again
        for asker in askers:
            asker.done = True
            self.ev.out.reply(asker.origin, _deadlock(asker.request, cycle), False)
        self._changed()

    def waits(self, request: LockWaits, origin: Any, now: float) -> None:
        """At the detector."""
        edges = request.edges
        if len(edges) > EDGES_MAX or any(len(edge.blockers) > BLOCKERS_MAX for edge in edges):
            failure = Failure(request.id, "invalid_argument", "malformed report of waits")
            self.ev.out.reply(origin, failure, False)
            return
        self.ev.out.reply(origin, Victims(request.id, self.detector.report(request, now)), False)


def _poll_s(request: LockRead) -> float:
    return min(request.wait_s, LOCK_POLL_S)


def _deadlock(request: LockRead, cycle: list[bytes]) -> Failure:
    names = " waits for ".join(each.hex() for each in (*cycle, cycle[0]))
    message = f"deadlock at key {request.key!r}: {names}; run the transaction again"
    return Failure(request.id, "deadlock", message, {"cycle": cycle})


__all__ = ["Locking"]
