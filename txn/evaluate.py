"""The leader's side of a range: evaluates requests against the state and decides what goes into the log.

Story. A Prepare looks for its own outcome first, then for latches in its way, conflicts and conditions; then it latches and
waits for a fresh timestamp of the oracle; then it becomes one command. A Read gets its timestamp first, waits for the writers
that were latched when it came, and looks; an undecided intent at or below its timestamp is asked about at its anchor.

E1 a part is evaluated only while nothing of its txn_id is latched: its outcome is answered from what is durable.
E2 **every min_ts is a fresh oracle timestamp, asked for after the latches were taken** (DESIGN.md sections 12 and 13).
Every read this or an earlier leader served had its timestamp issued before that, so the new
version lies above it: no read watermark, no floor at a leader change and no barrier table is needed (I11, I12 hold by
construction), and nothing volatile is left whose loss could hurt.
E3 a reader's promise "invisible at r" needs no memory either: a part that is not latched yet will get a fresh min_ts > r.
E4 a refusal is durable before it is told: a FENCE goes through the log (DESIGN.md 4g).
E5 nothing evaluated is carried over to another term: `stop` drops all of it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from replication.probes import chance, reached
from txn import stamps
from txn.changes import Feed, Poll
from txn.closed import Closing
from txn.commands import Command, Commit, FencePart, OracleBound, PreparePart, ResolvePart
from txn.counters import COUNTERS, count
from txn.gc import Collector
from txn.guards import GuardCheck
from txn.latches import SEEN_BYTES_MAX, LatchTable, Pending, Waiter
from txn.locking import Locking
from txn.messages import (
    Ack,
    Changes,
    Failure,
    Fence,
    Finalize,
    KeepLocks,
    LockRead,
    LockWaits,
    Outcome,
    PartReply,
    Prepare,
    PrepareReply,
    QueryMode,
    QueryPart,
    QuerySettled,
    QueryTxn,
    Read,
    Reply,
    Request,
    Resolve,
    Scan,
    TxnReply,
    Unlock,
    Validate,
    well_formed,
)
from txn.mvcc import find_txn, latest_ts
from txn.ports import Output, Rows
from txn.reads import Reader, Turn
from txn.recovery import Recovery
from txn.silence import Silence
from txn.state import ABSENT, Answer, Part, RangeState
from txn.types import (
    TIMESTAMP_MAX,
    FenceReason,
    PartStatus,
    TxnStatus,
    WriteKind,
    begin_ts_of,
    is_txn_id,
    point_end,
)
from txn.validation import Validation
from txn.values import (
    KEY_BYTES_MAX,
    RANGE_BYTES_MAX,
    RANGE_ROWS_MAX,
    VALUE_BYTES_MAX,
    compute,
    wrong_size,
)

WAITERS_MAX = 20_000
PASSES_MAX = 64  # over those who wait, in one turn
UNDECIDED_MAX = 20_000  # parts and outbox rows: every replica keeps them in memory
TXN_STATUS: Mapping[int, TxnStatus] = {
    PartStatus.COMMITTED: TxnStatus.COMMITTED,
    PartStatus.EXPIRED: TxnStatus.EXPIRED,
}


class Limits(msgspec.Struct, frozen=True):
    """Times in seconds."""

    conflict_wait_s: float = 0.05
    anchor_timer_s: float = 1.0
    orphan_timer_s: float = 2.0
    read_wait_s: float = 5.0
    validate_wait_s: float = 0.25  # for other ranges, by a part that is latched
    outbox_delay_s: float = 0.05
    outbox_retry_s: float = 0.5
    retention: int = 0  # of versions, in units of timestamps; 0: for ever
    sweep_s: float = 10.0  # between two sweeps for garbage
    kept: int = 0  # rows of idempotency keys, in the same units; 0: for ever
    lock_lease_s: float = 10.0  # of a transaction's locks, unless its client renews it
    lock_wait_s: float = 0.5  # of a transaction of one range that writes what another has locked
    locks_max: int = 20_000  # held and waited for


class Evaluator:
    """One per range and leader's term. Fed by the store: `step`, `give_timestamps`, `applied`, `tick`."""

    def __init__(
        self, state: RangeState, rows: Rows, out: Output, limits: Limits, term: int
    ) -> None:
        self.state = state
        self.rows = rows
        self.out = out
        self.limits = limits
        self.term = term
        self.latches = LatchTable()
        self.proposals: list[Pending] = []  # to be proposed, in this order
        self.await_fresh: list[Pending] = []  # each needs one fresh timestamp
        self.await_read: list[
            Waiter
        ] = []  # they need to know the last timestamp, mostly to read at
        self.blocked: dict[
            bytes, list[Waiter]
        ] = {}  # txn_id of an undecided part -> who waits for its end
        self.runnable: list[Waiter] = []  # to be evaluated again, once applied rows are readable
        self.ready = False
        self.now = 0.0  # of the call that is being served
        self.issued = 0  # the largest timestamp known to be issued
        self.floor = TIMESTAMP_MAX  # open snapshots see what is there from here on (txn/gc.py)
        self._early: list[tuple[Request, Any]] = []
        self.untimed: dict[Waiter, None] = {}  # reads that wait for the oracle, asked or not
        self._timers: list[tuple[float, int, Callable[[float], None]]] = []
        self._timer_number = 0
        self.counters = dict.fromkeys(
            COUNTERS, 0
        )  # the store puts its own here, one for all ranges
        self.turn = Turn()  # the store puts its own here, one for all ranges
        self.recovery = Recovery(self)
        self.reader = Reader(self)
        self.feed = Feed(self)
        self.collector = Collector(self)
        self.closing = Closing(self)
        self.locking = Locking(self)
        self.validation = Validation(self)
        self.guard_check = GuardCheck(self)
        self.silence = Silence(self)
        self._handlers: dict[type, Callable[[Any, Any, float], None]] = {
            Prepare: self._prepare_new,
            Read: self.reader.read,
            Scan: self.reader.read,
            Finalize: self._named(self.recovery.finalize),
            Resolve: self._named(self.recovery.resolve),
            Fence: self._named(self._fence_request),
            QueryTxn: self._named(self.recovery.query_txn),
            QueryPart: self._named(self._query_part),
            Outcome: self._named(self.recovery.outcome),
            QuerySettled: self.collector.query_settled,
            Validate: self.validation.validate,
            Changes: self.feed.ask,
            LockRead: self.locking.lock_read,
            KeepLocks: self.locking.keep,
            Unlock: self.locking.unlock,
            LockWaits: self.locking.waits,
        }

    def _named(
        self, handler: Callable[[Any, Any, float], None]
    ) -> Callable[[Any, Any, float], None]:
        """The handler, for what can be a transaction's id only: all others are nobody's, or name a latch of the collector."""

        def handle(request: Any, origin: Any, now: float) -> None:
            if is_txn_id(request.txn_id):
                handler(request, origin, now)
            else:
                failure = Failure(request.id, "invalid_argument", "malformed transaction")
                self.out.reply(origin, failure, False)

        return handle

    # -- life

    def start(self, now: float) -> None:
        """An entry of the own term is applied: everything inherited is known, serving begins."""
        self.ready = True
        self.closing.start()
        for loci in self.state.parts.values():
            for part in loci.values():
                part.forget_volatile()
        self.recovery.start(now)
        self.collector.start(now)
        early, self._early = self._early, []
        for request, origin in early:
            self.step(request, origin, now)

    def stop(self) -> None:
        """Leadership is gone. Everybody who waits is told to ask elsewhere; nothing is said about outcomes."""
        self.ready = False
        seen: list[tuple[Any, Any]] = list(self._early)
        pendings = list(self.latches.txns.values())
        for pending in pendings:
            if pending.request is not None:
                seen.append((pending.request, pending.origin))
            seen += [
                (waiter.request, waiter.origin) for waiter in pending.waiters if not waiter.done
            ]
        for waiters in (
            *self.blocked.values(),
            list(self.untimed),
            self.turn.of(self.reader),
            self.runnable,
            self.locking.waiters(),
            *self.recovery.waiters(),
            self.feed.waiters(),
        ):
            seen += [(waiter.request, waiter.origin) for waiter in waiters if not waiter.done]
            for waiter in waiters:
                waiter.done = True
        for request, origin in seen:
            if origin is not None:
                self.out.reply(origin, Failure(request.id, "not_leader"), False)
        self.feed.stop()
        self.validation.stop()
        self.guard_check.stop()
        self._early, self.await_fresh, self.await_read, self.runnable, self.proposals = (
            [],
            [],
            [],
            [],
            [],
        )
        self.blocked, self._timers, self.latches, self.untimed = {}, [], LatchTable(), {}
        self.locking.stop()
        for loci in self.state.parts.values():
            for part in loci.values():
                part.forget_volatile()

    def step(self, request: Request, origin: Any, now: float) -> None:
        """One request. The answer goes out through `out.reply`, now or later, at most once."""
        self.now = now
        if not self.ready:
            if len(self._early) >= WAITERS_MAX:
                self.out.reply(
                    origin, Failure(request.id, "throttled", "the range has no leader yet"), False
                )
            else:
                self._early.append((request, origin))
            return
        self._handlers[type(request)](request, origin, now)

    def run_again(self, now: float) -> None:
        """Evaluate again whoever waited for what has been applied meanwhile (rows are readable now).

        One may set free another, a few times. Who is still here after PASSES_MAX goes on in the next turn: a mistake of ours
        costs time, and does not keep the node from all else for ever. Tests and simulations take it for the mistake it is.
        Polls may be many, and go on in the next turn too (W4).
        """
        self.now = now
        for _ in range(PASSES_MAX):
            if not self.runnable:
                break
            waiters, self.runnable = self.runnable, []
            for waiter in waiters:
                if not waiter.done:
                    waiter.done = True
                    self._again(waiter, now)
        self.runnable += self.feed.end_turn()

    def _again(self, waiter: Waiter, now: float) -> None:
        request = waiter.request
        kind = type(request)
        if kind is Prepare:
            self.prepare_again(waiter, now)
        elif kind is Read or kind is Scan:
            self.reader.again(waiter, now)
        elif kind is Changes:
            self.feed.again_in_turn(waiter, now)  # type: ignore[arg-type]
        elif kind is Validate:
            self.validation.again(waiter, now)
        else:
            self._handlers[kind](request, waiter.origin, now)

    def wait_for(self, pending: Pending, request: Any, origin: Any, since: float) -> None:
        pending.waiters.append(Waiter(request, origin, since))

    # -- time

    def at(self, when: float, call: Callable[[float], None]) -> None:
        self._timer_number += 1
        heapq.heappush(self._timers, (when, self._timer_number, call))

    def deadline(self) -> float | None:
        due = self.recovery.deadline()
        first = self._timers[0][0] if self._timers else None
        for other in (
            first,
            self.collector.due,
            self.feed.deadline(),
            self.locking.deadline(),
            self.validation.deadline(),
            self.guard_check.deadline(),
        ):
            if due is None or (other is not None and other < due):
                due = other
        return due

    def tick(self, now: float) -> None:
        if not self.ready:
            return
        self.now = now
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2](now)
        self.recovery.tick(now)
        self.collector.tick(now)
        self.feed.tick(now)
        self.locking.tick(now)
        self.validation.tick(now)
        self.guard_check.tick(now)

    # -- timestamps

    def give_timestamps(
        self,
        pendings: Sequence[Pending],
        first: int,
        readers: Sequence[Waiter],
        read_ts: int,
        now: float,
    ) -> None:
        """The oracle's answer for these: fresh timestamps from `first` on, one each; `read_ts` for all readers."""
        self.now = now
        self.issued = max(self.issued, read_ts, first + len(pendings) - 1)
        for waiter in readers:
            self.untimed.pop(waiter, None)
            if waiter.done:
                continue
            request = waiter.request
            at = request.commit_ts if isinstance(request, Finalize | Resolve) else request.at
            if at > read_ts:
                message = f"version {at} was not issued yet; the newest is {read_ts}"
                failure = Failure(request.id, "invalid_argument", message)
                if isinstance(waiter, Poll):
                    self.feed.refuse(waiter, failure)
                else:
                    self.out.reply(waiter.origin, failure, False)
                continue
            if not at:
                waiter.request = msgspec.structs.replace(request, at=read_ts)
                waiter.sequence = self.latches.sequence
            if isinstance(waiter, Poll):  # there may be thousands
                self.runnable.append(waiter)
            else:
                self._again(waiter, now)
        closed = self.closing.promised  # applied or not, in an entry or in a message (F1)
        for number, pending in enumerate(pendings):
            if self.latches.txns.get(pending.txn_id) is not pending:
                continue  # given up meanwhile
            ts = first + number
            if ts <= closed:
                reached("timestamp_too_old")
                self.ask_fresh(pending, now)
                continue
            pending.command = self._command(pending, ts)
            if pending.asking:
                self.validation.begin(pending, ts, now)
            else:
                self.proposals.append(pending)

    def _command(self, pending: Pending, ts: int) -> Command:
        request: Prepare = pending.request
        if request.one_range:
            keys, values = pending.keys, pending.values
            if pending.stamps:
                rows = stamps.filled(keys, values, pending.stamps, ts)
                keys, values = list(rows), list(rows.values())
            keep = request.locus not in keys
            return Commit(request.txn_id, request.locus, ts, keys, values, keep)
        return PreparePart(
            request.txn_id,
            request.locus,
            request.anchor_key,
            ts,
            request.age or begin_ts_of(request.txn_id),
            pending.keys,
            pending.values,
            pending.guards,
            request.participants,
            pending.stamps,
        )

    # -- what was proposed

    def applied(self, pendings: Sequence[Pending], answers: Sequence[Answer], now: float) -> None:
        """An own entry of this term was applied; `answers` are the commands' in order."""
        self.now = now
        release, reply, counters = self.latches.release, self.out.reply, self.counters
        locking = self.locking
        for pending, answer in zip(pendings, answers, strict=True):
            if pending.txn_id:
                release(pending)
            if locking.table.owners:
                locking.applied(pending)
            if pending.waiters:
                self.runnable += pending.waiters
            command = pending.command
            if type(command) is Commit:  # it was never undecided here: nobody waits for its end
                counters["commits_one_range_total"] += 1
                counters["fast_guards_total"] += bool(pending.request.elsewhere)
                results = pending.results if answer.status == PartStatus.COMMITTED else None
                reply(pending.origin, PrepareReply(pending.request.id, *answer, results), False)
                continue
            self._wake(pending)
            if pending.then is not None:
                pending.then(answer)
            elif pending.origin is not None:
                reply(pending.origin, self._reply_to(pending, answer), False)
            count(counters, command, answer)
            if type(command) is PreparePart and answer.status == PartStatus.PREPARED:
                self.recovery.prepared(command, now)
        if self.state.recent.fresh:
            self.feed.wake()

    def _wake(self, pending: Pending) -> None:
        """Whoever waits for a part's end goes on once its transaction left this range."""
        if (
            self.blocked
            and pending.txn_id in self.blocked
            and pending.txn_id not in self.state.parts
        ):
            self.runnable += self.blocked.pop(pending.txn_id)

    def dropped(self, pendings: Sequence[Pending], code: str, message: str = "") -> None:
        """Raft refused to take the entry: nothing happened; `code` says whether the askers may try again."""
        for pending in pendings:
            self.let_go(pending, code, message)
            self.recovery.dropped(pending)
            if pending.lost is not None:
                pending.lost()

    def let_go(self, pending: Pending, code: str, message: str) -> None:
        """It will not be in the log. Its latches go, its asker is told."""
        if pending.txn_id:
            self.latches.release(pending)
        if pending.part is not None:
            pending.part.resolving = None
            if pending.waiters:  # now, they would find the part undecided, and propose the same
                self.recovery.rest(pending.waiters)
        else:
            self.runnable += pending.waiters
        if pending.origin is not None:
            if type(pending.request) is Prepare:
                self.locking.failed(pending.request)
            self.out.reply(pending.origin, Failure(pending.request.id, code, message), False)

    def _reply_to(self, pending: Pending, answer: Answer) -> Reply:
        request = pending.request
        kind = type(request)
        if kind is Prepare:
            results = pending.results if answer.status == PartStatus.COMMITTED else None
            return prepare_reply(request.id, answer, results)
        if kind is Fence:
            return PartReply(request.id, answer.status, answer.ts)
        if kind is Resolve:
            return Ack(request.id)
        return TxnReply(request.id, TXN_STATUS.get(answer.status, TxnStatus.ABORTED), answer.ts)

    # -- Prepare (DESIGN.md section 4)

    def _prepare_new(self, request: Prepare, origin: Any, now: float) -> None:
        """The hot path of `_prepare`: one key put or deleted, with nothing in the way. All else goes the long way."""
        state, latches, txn_id, key = self.state, self.latches, request.txn_id, request.locus
        writes = request.writes
        if (
            request.one_range
            and len(writes) == 1
            and writes[0].kind <= WriteKind.DELETE
            and writes[0].key == key
            and not request.expects
            and not request.guards
            and not request.elsewhere
            and latches.is_free(key)
            and key not in self.locking.table.locks
            and txn_id not in latches.txns
            and key not in state.intents
            and not state.point_guards
            and not state.span_guards
            and not state.stamped
            and txn_id not in state.parts
            and well_formed(request)
            and self._wrong_prepare(request) is None
        ):
            begin_ts = begin_ts_of(txn_id)
            latest_key = b"L" + key
            latest = self.rows.get(latest_key)
            if (
                begin_ts > state.row.outcome_horizon
                and (latest is None or latest_ts(latest) <= begin_ts)
                and state.answer_of(self.rows, txn_id, key) is ABSENT
            ):
                write = writes[0]
                pending = Pending(txn_id, request, origin)
                pending.since = pending.asked_at = now
                pending.keys.append(key)
                pending.values.append(write.value if write.kind == WriteKind.PUT else None)
                if latest is None:
                    pending.seen = ((latest_key, None),)
                else:
                    pending.adds_bytes = size = len(latest)
                    if size <= SEEN_BYTES_MAX:
                        pending.seen = ((latest_key, latest),)
                latches.acquire(pending)
                self.await_fresh.append(pending)
                if not self.silence.armed:
                    self.silence.arm(now)
                return
        self._prepare(request, origin, now, now)

    def _prepare(self, request: Prepare, origin: Any, now: float, since: float) -> None:
        txn_id = request.txn_id
        latched = self.latches.txns.get(txn_id)
        if latched is not None:
            self.wait_for(latched, request, origin, since)
            return
        if not well_formed(request):
            failure = Failure(request.id, "invalid_argument", "malformed transaction")
            self.out.reply(origin, failure, False)
            return
        known = self._known_outcome(request)
        if known is not None:
            self.out.reply(origin, prepare_reply(request.id, known, None), False)
            return
        if request.participants and txn_id in self.state.staged:
            failure = Failure(request.id, "invalid_argument", "it has another anchor already")
            self.out.reply(origin, failure, False)
            return
        row = self.state.row
        if begin_ts_of(txn_id) <= row.outcome_horizon:
            self.out.reply(origin, PrepareReply(request.id, PartStatus.EXPIRED, 0), False)
            return
        wrong = self._wrong_prepare(request)
        if wrong:
            self.locking.failed(request)
            self.out.reply(origin, Failure(request.id, *wrong), False)
            return
        if self.locking.in_the_way(request, origin, now, since):
            return
        blocker = self._latch_blocker(request)
        if blocker is not None:
            self.wait_for(blocker, request, origin, since)
            return
        if self._meets_part(request, origin, now, since):
            return
        outdated, unseen = self.guard_check.look(request.guards)
        if outdated is not None:
            self.refuse(request, origin, outdated)
            return
        pending = Pending(txn_id, request, origin)
        pending.since = since
        pending.asking = len(request.elsewhere)
        refusal = compute(request, pending, self.rows)
        if refusal is not None:
            self.refuse(request, origin, refusal)
            return
        if pending.stamps:
            pending.stamp_spans = stamps.spans(pending.stamps, self.issued)
        self.latches.acquire(pending)
        if unseen:
            self.guard_check.begin(pending, unseen, now)
        else:
            self.ask_fresh(pending, now)

    def ask_fresh(self, pending: Pending, now: float) -> None:
        """It is latched (E2): its timestamp is asked for from here on."""
        pending.asked_at = now
        self.await_fresh.append(pending)
        if not self.silence.armed:
            self.silence.arm(now)

    def _known_outcome(self, request: Prepare) -> Answer | None:
        """(a) answer from what stands, never evaluate twice."""
        txn_id, locus = request.txn_id, request.locus
        answer = self.state.answer_of(self.rows, txn_id, locus)
        if answer is not ABSENT:
            return answer
        if request.one_range:
            latest = self.rows.get(b"L" + locus)
            if latest is not None and latest_ts(latest) > begin_ts_of(txn_id):
                found = find_txn(self.rows, locus, txn_id, latest, begin_ts_of(txn_id))
                if found:
                    return Answer(PartStatus.COMMITTED, found)
        return None

    def _wrong_prepare(self, request: Prepare) -> tuple[str, str] | None:
        state = self.state
        if request.version and request.version != state.row.version:
            return "epoch_mismatch", ""
        if not state.owns(request.locus):
            return "epoch_mismatch", ""
        if not request.one_range and len(state.parts) + len(state.outbox) >= UNDECIDED_MAX:
            return "throttled", "too many undecided transactions in the range"
        size = 0
        for write in request.writes:
            key_bytes, value_bytes = len(write.key), len(write.value)
            size += key_bytes + value_bytes
            if (
                write.kind > WriteKind.DELETE
                or not 0 < key_bytes <= KEY_BYTES_MAX
                or value_bytes > VALUE_BYTES_MAX
            ):
                wrong = wrong_size(write)
                if wrong is not None:
                    return wrong
            if write.kind == WriteKind.DELETE_RANGE:
                if not state.owns_span(write.key, write.value) or write.key >= write.value:
                    return "epoch_mismatch", ""
            elif write.kind == WriteKind.STAMPED_KEY:  # V3
                if not (state.owns(write.key) and state.owns_span(*stamps.span(write.key))):
                    return "epoch_mismatch", ""
            elif write.key != request.locus and not state.owns(write.key):
                return "epoch_mismatch", ""
        for guard in request.guards:
            if not state.owns_span(guard.start, guard.end):
                return "epoch_mismatch", ""
        for expect in request.expects:
            if not state.owns(expect.key):
                return "epoch_mismatch", ""
        for guards in request.elsewhere:
            if state.owns(guards[0].start):  # it has come here meanwhile
                return "epoch_mismatch", ""
        if (
            size > RANGE_BYTES_MAX
            or len(request.writes) > RANGE_ROWS_MAX
            or len(request.expects) > RANGE_ROWS_MAX
        ):
            most = f"{RANGE_BYTES_MAX} bytes, {RANGE_ROWS_MAX} rows and as many conditions"
            return "transaction_too_large", f"at most {most} in one range"
        return None

    def _latch_blocker(self, request: Prepare) -> Pending | None:
        latches = self.latches
        if not latches.txns:
            return None
        for write in stamps.once(request.writes):
            if write.kind == WriteKind.DELETE_RANGE:
                found = latches.blocker_of_write_span(write.key, write.value)
            elif write.kind == WriteKind.STAMPED_KEY:
                found = latches.blocker_of_stamp(*stamps.span(write.key, self.issued))
            else:
                found = latches.blocker_of_write(write.key)
            if found is not None:
                return found
        for guard in request.guards:
            found = latches.blocker_of_guard(guard.start, guard.end)
            if found is not None:
                return found
        for expect in request.expects:
            found = latches.blocker_of_guard(expect.key, point_end(expect.key))
            if found is not None:
                return found
        return None

    def _meets_part(self, request: Prepare, origin: Any, now: float, since: float) -> bool:
        """(c): waits, or refuses, if an undecided part of another is in the way."""
        found = self._foreign_part(request) if self.state.parts else None
        if found is not None:
            self._wait_or_refuse(request, origin, now, since, *found)
        return found is not None

    def _foreign_part(self, request: Prepare) -> tuple[Part, bytes] | None:
        state, txn_id = self.state, request.txn_id
        guarded = bool(state.point_guards) or bool(state.span_guards)
        for write in stamps.once(request.writes):
            start, end = write.key, b""
            if write.kind == WriteKind.STAMPED_KEY:
                start, end = stamps.span(write.key, self.issued)
            elif write.kind == WriteKind.DELETE_RANGE:
                end = write.value
            found = state.intents.get(start) if not end else None
            if end:
                for key, part in state.intents_in(start, end):
                    return part, key
            if found is None and guarded:
                if end:
                    found = state.foreign_guard_in(start, end, txn_id)
                else:
                    found = state.foreign_guard(start, txn_id)
            if found is not None:
                return found, start
            if state.stamped and write.kind != WriteKind.STAMPED_KEY:  # V1
                for part in state.stamped_in(start, end or point_end(start)):
                    return part, start
        return self._foreign_write(request)

    def _foreign_write(self, request: Prepare) -> tuple[Part, bytes] | None:
        """In what this transaction has read, or has a condition on."""
        state = self.state
        for guard in request.guards:
            for key, part in state.intents_in(guard.start, guard.end):
                return part, key
        for expect in request.expects:
            found = state.intents.get(expect.key)
            if found is not None:
                return found, expect.key
        if state.stamped:
            for guard in request.guards:
                for part in state.stamped_in(guard.start, guard.end):
                    return part, guard.start
            for expect in request.expects:
                for part in state.stamped_in(expect.key, point_end(expect.key)):
                    return part, expect.key
        return None

    def _wait_or_refuse(
        self, request: Prepare, origin: Any, now: float, since: float, part: Part, key: bytes
    ) -> None:
        """The older waits, the younger is refused; a transaction of one range holds nothing elsewhere and always waits."""
        if part.resolving is not None:  # it is decided: only an entry in flight is in the way
            self.wait_for(part.resolving, request, origin, since)
            return
        mine = (request.age or begin_ts_of(request.txn_id), request.txn_id)
        until = since + (0.0 if chance("conflict_not_waited_for") else self.limits.conflict_wait_s)
        if now < until and (request.one_range or mine < (part.row.age, part.txn_id)):
            waiter = Waiter(request, origin, since)
            reached("conflict_waited_for")
            self.counters["waits_for_parts_total"] += 1
            self.blocked.setdefault(part.txn_id, []).append(waiter)
            self.at(until, lambda time: self._give_up_waiting(waiter, part, time))
            return
        self.recovery.blocked_by(part)
        self.refuse(
            request,
            origin,
            Answer(PartStatus.FENCED, 0, FenceReason.CONFLICT, key, part.txn_id, part.row.min_ts),
        )

    def _give_up_waiting(self, waiter: Waiter, part: Part, now: float) -> None:
        if waiter.done:
            return
        waiters = self.blocked.get(part.txn_id)
        if waiters is not None and waiter in waiters:
            waiters.remove(waiter)
            if not waiters:
                del self.blocked[part.txn_id]
        waiter.done = True
        reached("conflict_wait_over")
        self.prepare_again(waiter, now)

    def prepare_again(self, waiter: Waiter, now: float) -> None:
        """A Prepare whose time to wait is over."""
        self._prepare(waiter.request, waiter.origin, now, waiter.since)

    def refuse(self, request: Prepare, origin: Any, refusal: Answer) -> None:
        """(g) a negative answer is durable before it is given."""
        pending = Pending(request.txn_id, request, origin)
        pending.command = self.fence_of(request, refusal)
        self.latches.acquire(pending)
        self.proposals.append(pending)

    def fence_of(self, request: Prepare, refusal: Answer) -> FencePart:
        return FencePart(
            request.txn_id,
            request.locus,
            request.anchor_key,
            refusal.reason,
            refusal.key,
            refusal.other_txn,
            refusal.other_version,
        )

    # -- Fence and QueryPart

    def _fence_request(self, request: Fence, origin: Any, now: float) -> None:
        latched = self.latches.txns.get(request.txn_id)
        if latched is not None:
            self.wait_for(latched, request, origin, now)
            return
        if not self.state.owns(request.locus):
            self.out.reply(origin, Failure(request.id, "epoch_mismatch"), False)
            return
        answer = self.state.answer_of(self.rows, request.txn_id, request.locus)
        if answer is not ABSENT:
            self.out.reply(origin, PartReply(request.id, answer.status, answer.ts), False)
            return
        if begin_ts_of(request.txn_id) <= self.state.row.outcome_horizon:
            self.out.reply(origin, PartReply(request.id, PartStatus.EXPIRED), False)
            return
        pending = Pending(request.txn_id, request, origin)
        pending.command = FencePart(
            request.txn_id, request.locus, request.anchor_key, FenceReason.RECOVERY
        )
        self.latches.acquire(pending)
        self.proposals.append(pending)

    def _query_part(self, request: QueryPart, origin: Any, now: float) -> None:
        latched = self.latches.txns.get(request.txn_id)
        if latched is not None:
            self.wait_for(latched, request, origin, now)
            return
        if not self.state.owns(request.locus):
            self.out.reply(origin, Failure(request.id, "epoch_mismatch"), False)
            return
        answer = self.state.answer_of(self.rows, request.txn_id, request.locus)
        if answer is ABSENT and begin_ts_of(request.txn_id) <= self.state.row.outcome_horizon:
            answer = Answer(PartStatus.EXPIRED)
        self.out.reply(origin, PartReply(request.id, answer.status, answer.ts), answer is ABSENT)

    # -- used by recovery

    def propose(self, pending: Pending) -> None:
        """Latch and queue a command that needs no timestamp."""
        if pending.txn_id:
            self.latches.acquire(pending)
        self.proposals.append(pending)

    def propose_resolve(
        self, part: Part, commit_ts: int, *, hinted: bool, request: Any = None, origin: Any = None
    ) -> None:
        """Resolve an undecided part; readers and writers of its keys wait for the latch from now on."""
        assert part.resolving is None
        pending = Pending(part.txn_id, request, origin)
        pending.take(part, commit_ts, self.rows)
        pending.command = ResolvePart(
            part.txn_id, part.row.anchor_key, part.locus, commit_ts, hinted
        )
        part.resolving = pending
        self.propose(pending)

    def propose_bound(self, hi: int, lost: Callable[[], None]) -> None:
        """Meta range: raise the oracle's bound. `lost`: it was refused."""
        pending = Pending(b"", None, None)
        pending.command = OracleBound(hi)
        pending.lost = lost
        self.proposals.append(pending)


def prepare_reply(request_id: int, answer: Answer, results: list[bytes] | None) -> PrepareReply:
    return PrepareReply(request_id, *answer, results)


__all__ = ["COUNTERS", "Evaluator", "Limits", "QueryMode", "Waiter"]
