"""What whoever meets an undecided transaction does, and what the anchor owes its participants (DESIGN.md sections 6, 7, 10).

Nobody but the log decides. A blocked writer or reader only asks the anchor; the anchor's timer fences what is missing; a
participant's orphan timer lets the anchor fence itself when it has no record at all.

R1 STAGED becomes ABORTED only after some participant answered FENCED (or ABORTED), durably. R2 STAGED becomes COMMITTED at the
maximum of all min_ts, after every participant answered PREPARED or COMMITTED. R3 an outbox row goes only after the
participant acknowledged its Resolve as applied. R4 every answer is stable: late, doubled or reordered ones do no harm.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from replication.probes import chance, reached
from txn.asking import PartQuestions, Questions
from txn.commands import AbortUnstaged, Decide, FencePart, OutboxDone, PreparePart
from txn.latches import Pending, Waiter
from txn.messages import (
    Ack,
    Failure,
    Fence,
    Finalize,
    Outcome,
    PartReply,
    QueryMode,
    QueryTxn,
    Reply,
    Request,
    Resolve,
    TxnReply,
)
from txn.mvcc import find_txn
from txn.state import ABSENT, Answer, Outbox, Part, Staged
from txn.types import FenceReason, Participant, PartStatus, TxnStatus, begin_ts_of
from txn.visibility import Visibility

if TYPE_CHECKING:
    from txn.evaluate import Evaluator

OUTBOX_IN_FLIGHT_MAX = 2_000
OUTBOX_DONE_ROWS_MAX = 256  # of one command
ASK_AGAIN_S = 0.02
_DECIDED_PART = {
    PartStatus.COMMITTED: TxnStatus.COMMITTED,
    PartStatus.FENCED: TxnStatus.ABORTED,
    PartStatus.ABORTED: TxnStatus.ABORTED,
}


class Recovery:
    """The anchor's and the participants' duties of one leader's term."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.ev = evaluator
        self._calls: dict[int, Callable[[Reply], None]] = {}
        self._call_number = 0
        self._anchor_due: deque[tuple[float, bytes]] = deque()
        self._orphan_due: deque[tuple[float, bytes, bytes]] = deque()
        self._outbox_due: deque[tuple[float, tuple[bytes, bytes]]] = deque()
        self._outbox_again: deque[tuple[float, tuple[bytes, bytes]]] = deque()
        self._outbox_out: dict[tuple[bytes, bytes], None] = {}  # sent, not acknowledged
        self._outbox_since: dict[tuple[bytes, bytes], float] = {}  # not acknowledged; oldest first
        self._recovering: dict[
            bytes, dict[bytes, tuple[int, int]]
        ] = {}  # txn_id -> locus -> (PartStatus, ts)
        self._deciding: dict[bytes, None] = {}
        self._outcome_waiting: dict[bytes, list[Waiter]] = {}
        self._asks: dict[
            bytes, tuple[int, list[Waiter]]
        ] = {}  # txn_id -> (read_ts asked, who waits)
        self._rest_number = 0
        self._resting: dict[
            int, list[Waiter]
        ] = {}  # readers who got no answer, until they ask again
        self._looking: dict[
            Waiter, None
        ] = {}  # readers' questions that are asked on to participants
        self._orphans = PartQuestions(self, QueryMode.ORPHAN)
        self._blocked = PartQuestions(self, QueryMode.BLOCKED)
        self._fences = Questions(self._send_fence)
        self._done: OutboxDone | None = None  # not proposed yet while `_done_in` is the evaluator's
        self._done_in: list[Pending] | None = None

    # -- life and time

    def start(self, now: float) -> None:
        """Arm the timers of all that was inherited."""
        state, limits = self.ev.state, self.ev.limits
        for txn_id in state.staged:
            self._anchor_due.append((now + limits.anchor_timer_s, txn_id))
        for txn_id, loci in state.parts.items():
            for locus, part in loci.items():
                if part.row.anchor_key != locus:
                    self._orphan_due.append((now + limits.orphan_timer_s, txn_id, locus))
        for key in state.outbox:
            self._outbox_due.append((now, key))
            self._outbox_since[key] = now

    def outbox_age(self, now: float) -> float:
        """For how many seconds the oldest outcome waits for its participant, as far as this leader knows."""
        return now - next(iter(self._outbox_since.values()), now)

    def waiters(self) -> Iterable[list[Waiter]]:
        yield from self._outcome_waiting.values()
        for _, waiting in self._asks.values():
            yield waiting
        yield from self._resting.values()
        yield list(self._looking)

    def deadline(self) -> float | None:
        """The earliest thing that is due; what was finished meanwhile is skipped."""
        state = self.ev.state
        due: float | None = None
        while self._anchor_due and self._anchor_due[0][1] not in state.staged:
            self._anchor_due.popleft()
        while self._orphan_due and state.part(*self._orphan_due[0][1:]) is None:
            self._orphan_due.popleft()
        for queue in (self._outbox_due, self._outbox_again):
            while queue and queue[0][1] not in state.outbox:
                self._outbox_since.pop(queue.popleft()[1], None)
        if self._anchor_due:
            due = self._anchor_due[0][0]
        if self._orphan_due and (due is None or self._orphan_due[0][0] < due):
            due = self._orphan_due[0][0]
        if len(self._outbox_out) < OUTBOX_IN_FLIGHT_MAX:
            for queue in (self._outbox_due, self._outbox_again):
                if queue and (due is None or queue[0][0] < due):
                    due = queue[0][0]
        return due

    def tick(self, now: float) -> None:
        limits, state = self.ev.limits, self.ev.state
        while self._anchor_due and self._anchor_due[0][0] <= now:
            txn_id = self._anchor_due.popleft()[1]
            if txn_id in state.staged:
                reached("anchor_recovers")
                self._recover(txn_id, state.staged[txn_id])
                self._anchor_due.append((now + limits.anchor_timer_s, txn_id))
        while self._orphan_due and self._orphan_due[0][0] <= now:
            _, txn_id, locus = self._orphan_due.popleft()
            part = state.part(txn_id, locus)
            if part is not None:
                if part.resolving is None:
                    self._orphans.ask(txn_id, locus, silent=part.unheard)
                self._orphan_due.append((now + limits.orphan_timer_s, txn_id, locus))
        for queue in (self._outbox_due, self._outbox_again):
            while queue and queue[0][0] <= now and len(self._outbox_out) < OUTBOX_IN_FLIGHT_MAX:
                key = queue.popleft()[1]
                row = state.outbox.get(key)
                if row is None:
                    self._outbox_since.pop(key, None)
                elif key not in self._outbox_out:
                    self._send_outbox(key, row)

    def prepared(self, command: PreparePart, now: float) -> None:
        """A part became PREPARED under this leader."""
        limits = self.ev.limits
        if command.participants:
            if chance("anchor_timer_early"):  # the queue is in order of time: the front
                self._anchor_due.appendleft((now, command.txn_id))
            else:
                self._anchor_due.append((now + limits.anchor_timer_s, command.txn_id))
        if command.anchor_key != command.locus:
            part = (command.txn_id, command.locus)
            if chance("orphan_timer_early"):
                self._orphan_due.appendleft((now, *part))
            else:
                self._orphan_due.append((now + limits.orphan_timer_s, *part))

    def dropped(self, pending: Pending) -> None:
        """A proposal of ours was refused by Raft: the timers bring it again."""
        reached("proposal_refused")
        self._deciding.pop(pending.txn_id, None)

    # -- questions to other ranges

    def call(self, key: bytes, request: Any, then: Callable[[Reply], None]) -> None:
        self._call_number += 1
        self._calls[self._call_number] = then
        self.ev.out.call(key, request, self._call_number)

    def on_reply(self, call_id: int, reply: Reply, now: float) -> None:
        """The answer to a call, or a Failure: no answer came in time."""
        then = self._calls.pop(call_id, None)
        if then is not None and self.ev.ready:
            self.ev.now = now
            then(reply)

    # -- the anchor: decisions

    def finalize(self, request: Finalize, origin: Any, now: float) -> None:
        ev = self.ev
        if self._waits_or_misses(request, origin, now):
            return
        if request.txn_id in ev.state.staged:
            part = ev.state.part(request.txn_id, request.anchor_key)
            if part is None or not part.row.participants:
                message = "it is staged under another anchor"
                ev.out.reply(origin, Failure(request.id, "invalid_argument", message), False)
            elif not self._unfit(part, request, origin, now):
                self._decide(request.txn_id, request.anchor_key, request.commit_ts, request, origin)
            return
        if self._reply_known(request, origin):
            return
        if begin_ts_of(request.txn_id) <= ev.state.row.outcome_horizon:
            ev.out.reply(origin, TxnReply(request.id, TxnStatus.EXPIRED), True)
        elif request.commit_ts:
            ev.out.reply(
                origin,
                Failure(request.id, "invalid_argument", "nothing is staged under this id"),
                True,
            )
        else:
            self._abort_unstaged(request, origin)

    def outcome(self, request: Outcome, origin: Any, now: float) -> None:
        """The definite outcome; whatever is still open is decided first."""
        ev = self.ev
        if self._waits_or_misses(request, origin, now):
            return
        staged = ev.state.staged.get(request.txn_id)
        if staged is not None:
            waiter = Waiter(request, origin, now)
            self._outcome_waiting.setdefault(request.txn_id, []).append(waiter)
            ev.at(now + ev.limits.read_wait_s, lambda _: self._outcome_unknown(waiter))
            self._recover(request.txn_id, staged, first=True)
            return
        if self._reply_known(request, origin):
            return
        if begin_ts_of(request.txn_id) <= ev.state.row.outcome_horizon:
            reached("outcome_expired")
            ev.out.reply(origin, TxnReply(request.id, TxnStatus.EXPIRED), True)
            return
        self._abort_unstaged(request, origin)

    def _outcome_unknown(self, waiter: Waiter) -> None:
        """A part's range is away, perhaps for hours: who asks is told, and asks again while it has time."""
        waiting = self._outcome_waiting.get(waiter.request.txn_id, [])
        if waiter not in waiting:
            return
        waiting.remove(waiter)
        if not waiting:
            del self._outcome_waiting[waiter.request.txn_id]
        waiter.done = True
        message = "a range that takes part does not answer"
        self.ev.out.reply(waiter.origin, Failure(waiter.request.id, "unavailable", message), False)

    def query_txn(self, request: QueryTxn, origin: Any, now: float) -> None:
        ev = self.ev
        if self._waits_or_misses(request, origin, now):
            return
        staged = ev.state.staged.get(request.txn_id)
        if staged is not None:
            if request.mode == QueryMode.READ:
                waiter = Waiter(request, origin, now)
                self._looking[waiter] = None
                Visibility(self, waiter, staged)
            else:
                ev.out.reply(origin, TxnReply(request.id, TxnStatus.STAGED), False)
            return
        if self._reply_known(request, origin):
            return
        if begin_ts_of(request.txn_id) <= ev.state.row.outcome_horizon:
            ev.out.reply(origin, TxnReply(request.id, TxnStatus.EXPIRED), True)
        elif request.mode == QueryMode.ORPHAN:
            reached("anchor_fences_itself")
            self._abort_unstaged(request, origin)
        else:
            status = TxnStatus.INVISIBLE if request.mode == QueryMode.READ else TxnStatus.ABSENT
            ev.out.reply(origin, TxnReply(request.id, status), True)

    def _waits_or_misses(self, request: Any, origin: Any, now: float) -> bool:
        ev = self.ev
        latched = ev.latches.txns.get(request.txn_id)
        if latched is not None:
            ev.wait_for(latched, request, origin, now)
            return True
        if not ev.state.owns(request.anchor_key):
            ev.out.reply(origin, Failure(request.id, "epoch_mismatch"), False)
            return True
        return False

    def _reply_known(self, request: Any, origin: Any) -> bool:
        """Answer from a terminal record, from the anchor's own part, or from the versions of a one-range commit."""
        ev, txn_id, anchor_key = self.ev, request.txn_id, request.anchor_key
        status, ts = ev.state.terminal_of(ev.rows, txn_id, anchor_key)
        if status == TxnStatus.ABSENT:
            answer = ev.state.answer_of(ev.rows, txn_id, anchor_key)
            status, ts = _DECIDED_PART.get(PartStatus(answer.status), TxnStatus.ABSENT), answer.ts
        if status == TxnStatus.ABSENT:
            latest = ev.rows.get(b"L" + anchor_key)
            ts = find_txn(ev.rows, anchor_key, txn_id, latest, begin_ts_of(txn_id))
            status = TxnStatus.COMMITTED if ts else TxnStatus.ABSENT
        if status == TxnStatus.ABSENT:
            return False
        ev.out.reply(origin, TxnReply(request.id, status, ts), False)
        return True

    def _abort_unstaged(self, request: Any, origin: Any) -> None:
        pending = Pending(request.txn_id, request, origin)
        pending.command = AbortUnstaged(request.txn_id, request.anchor_key)
        self.ev.propose(pending)

    def _decide(
        self, txn_id: bytes, anchor_key: bytes, commit_ts: int, request: Any, origin: Any
    ) -> None:
        ev = self.ev
        pending = Pending(txn_id, request, origin)
        part = ev.state.part(txn_id, anchor_key)
        if part is not None:
            pending.take(part, commit_ts, ev.rows)
            part.resolving = pending
        pending.command = Decide(txn_id, anchor_key, commit_ts)
        self._deciding[txn_id] = None
        participants = ev.state.staged[txn_id].participants

        def then(answer: Answer) -> None:
            self._deciding.pop(txn_id, None)
            self._recovering.pop(txn_id, None)
            ev.runnable += self._outcome_waiting.pop(txn_id, [])
            if origin is not None:
                ev.out.reply(origin, _decision(request, answer), False)
            self._post(txn_id, participants)

        pending.then = then
        ev.propose(pending)

    def _post(self, txn_id: bytes, participants: list[Participant]) -> None:
        """Decide was applied: its outbox rows leave a little later, in company: those of all ranges at the same moments."""
        delay = self.ev.limits.outbox_delay_s
        due = (self.ev.now // delay + 2) * delay
        if chance("outbox_late"):
            due += 100 * delay
        for participant in participants:
            if (txn_id, participant.locus) in self.ev.state.outbox:
                self._outbox_due.append((due, (txn_id, participant.locus)))
                self._outbox_since[txn_id, participant.locus] = self.ev.now

    # -- the anchor: recovery of a staged transaction

    def _recover(self, txn_id: bytes, staged: Staged, *, first: bool = False) -> None:
        """Ask every participant, with a Fence: what is not prepared yet never will be (R1, R2)."""
        if txn_id in self._deciding:
            return
        known = self._recovering.setdefault(txn_id, {})
        missing = [
            participant.locus
            for participant in staged.participants
            if known.get(participant.locus, (0, 0))[0] != PartStatus.PREPARED
        ]
        if not missing:  # the decision was proposed before, and refused by Raft
            self._conclude(txn_id, staged, known)
        for locus in missing:
            self._fences.ask(txn_id, locus, silent=locus in known, first=first)

    def _send_fence(self, txn_id: bytes, locus: bytes) -> bool:
        staged = self.ev.state.staged.get(txn_id)
        if staged is None or txn_id in self._deciding:
            return False

        def on_reply(reply: Reply) -> None:
            self._fences.answered(txn_id, locus)
            staged = self.ev.state.staged.get(txn_id)
            if staged is None or txn_id in self._deciding:
                return
            known = self._recovering.setdefault(txn_id, {})
            if isinstance(reply, PartReply):
                known[locus] = (reply.status, reply.ts)
                self._conclude(txn_id, staged, known)
            else:
                known.setdefault(locus, (PartStatus.ABSENT, 0))  # decides nothing: it was asked

        self.call(locus, Fence(0, 0, 0, txn_id, locus, staged.anchor_key), on_reply)
        return True

    def _conclude(self, txn_id: bytes, staged: Staged, known: dict[bytes, tuple[int, int]]) -> None:
        commit_ts = 0
        for participant in staged.participants:
            status, ts = known.get(participant.locus, (PartStatus.ABSENT, 0))
            if status in (PartStatus.FENCED, PartStatus.ABORTED, PartStatus.EXPIRED):
                # EXPIRED is as good as a fence: nothing of this id will be prepared there, and while the record is
                # STAGED here its parts' statuses are kept.
                reached("recovery_aborts")
                self._propose_decision(txn_id, staged.anchor_key, 0)
                return
            if status not in (PartStatus.PREPARED, PartStatus.COMMITTED):
                commit_ts = -1
            elif commit_ts >= 0:
                commit_ts = max(commit_ts, ts)
        if commit_ts > 0:
            reached("recovery_commits")
            self._propose_decision(txn_id, staged.anchor_key, commit_ts)

    def _propose_decision(self, txn_id: bytes, anchor_key: bytes, commit_ts: int) -> None:
        latched = self.ev.latches.txns.get(txn_id)
        if latched is None:  # else something about it is in flight: the timer comes again
            self._decide(txn_id, anchor_key, commit_ts, None, None)

    # -- the anchor: the outbox

    def _send_outbox(self, key: tuple[bytes, bytes], row: Outbox) -> None:
        self._outbox_out[key] = None
        part = row.participant
        identity = (row.txn_id, row.anchor_key, part.locus)
        request = Resolve(0, 0, 0, *identity, part.start, part.end, row.commit_ts, record=True)

        def on_reply(reply: Reply) -> None:
            self._outbox_out.pop(key, None)
            if key not in self.ev.state.outbox:
                self._outbox_since.pop(key, None)
                return
            if isinstance(reply, Ack):
                self._outbox_since.pop(key, None)
                self._outbox_done(identity)
            else:
                reached("outbox_sent_again")
                self.ev.counters["redeliveries_total"] += 1
            self._outbox_again.append((self.ev.now + self.ev.limits.outbox_retry_s, key))

        self.call(part.locus, request, on_reply)

    def _outbox_done(self, row: tuple[bytes, bytes, bytes]) -> None:
        """One command for all rows that are acknowledged before it is proposed."""
        proposals, command = self.ev.proposals, self._done
        if (
            command is None
            or self._done_in is not proposals
            or len(command.rows) >= OUTBOX_DONE_ROWS_MAX
        ):
            pending = Pending(b"", None, None)
            pending.command = self._done = command = OutboxDone([])
            self._done_in = proposals
            self.ev.propose(pending)
        command.rows.append(row)

    # -- a participant

    def resolve(self, request: Resolve, origin: Any, now: float) -> None:
        ev = self.ev
        latched = ev.latches.txns.get(request.txn_id)
        if latched is not None:
            ev.wait_for(latched, request, origin, now)
            return
        if not ev.state.owns(request.locus):
            ev.out.reply(origin, Failure(request.id, "epoch_mismatch"), False)
            return
        part = ev.state.part(request.txn_id, request.locus)
        if part is not None and self._unfit(part, request, origin, now):
            return
        if part is not None and part.row.participants:  # the anchor's own: only with its record
            self._decide(request.txn_id, request.locus, request.commit_ts, request, origin)
            return
        if part is not None:
            ev.propose_resolve(
                part, request.commit_ts, hinted=not request.record, request=request, origin=origin
            )
            return
        answer = ev.state.answer_of(ev.rows, request.txn_id, request.locus)
        below = begin_ts_of(request.txn_id) <= ev.state.row.outcome_horizon
        if answer is ABSENT and not below and not request.commit_ts:
            pending = Pending(request.txn_id, request, origin)
            pending.command = FencePart(
                request.txn_id, request.locus, request.anchor_key, FenceReason.RECOVERY
            )
            ev.propose(pending)
        elif answer is ABSENT and not below:
            reached("resolved_unprepared")
            message = "resolved as committed, but it was never prepared here"
            ev.out.reply(origin, Failure(request.id, "invalid_argument", message), True)
        else:
            ev.out.reply(origin, Ack(request.id), False)

    def _unfit(self, part: Part, request: Finalize | Resolve, origin: Any, now: float) -> bool:
        """A commit below what the part was prepared at (I4), or at a version that was never issued (I7), is a mistake of who
        says so, and may not come into the log. Other ranges are given versions that are not known here: the oracle is asked.
        """
        commit_ts = request.commit_ts
        if commit_ts and commit_ts < part.row.min_ts:
            message = f"committed at {commit_ts}, but prepared here at {part.row.min_ts}"
            self.ev.out.reply(origin, Failure(request.id, "invalid_argument", message), False)
            return True
        if commit_ts > self.ev.issued:
            reached("decision_waits_for_the_oracle")
            self.ev.reader.ask_read_ts(Waiter(request, origin, now))
            return True
        return False

    def blocked_by(self, part: Part) -> None:
        """A writer gave up waiting for this part: ask the anchor; only asking, never fencing."""
        if part.resolving is None and part.row.anchor_key != part.locus:
            self._blocked.ask(part.txn_id, part.locus, silent=part.unheard)

    def on_outcome(self, part: Part, reply: Reply) -> bool:
        """Resolve the part if the outcome is known. Whether it is.

        EXPIRED, of a part that is still undecided, means aborted: its anchor has no record and will have none, and it does
        not forget a committed one before all parts are done (gc.py, G6). The part was undecided when the anchor looked.
        """
        if not isinstance(reply, TxnReply) or reply.status not in (
            TxnStatus.COMMITTED,
            TxnStatus.ABORTED,
            TxnStatus.EXPIRED,
        ):
            return False
        ev = self.ev
        current = ev.state.part(part.txn_id, part.locus)
        if current is not None and 0 < reply.ts < current.row.min_ts:
            return False  # as in `_unfit`; what a range commits at was issued
        if current is not None and current.resolving is None and part.txn_id not in ev.latches.txns:
            if current.row.anchor_key == current.locus and part.txn_id in ev.state.staged:
                self._propose_decision(
                    part.txn_id, part.locus, reply.ts if reply.status == TxnStatus.COMMITTED else 0
                )
            else:
                ts = reply.ts if reply.status == TxnStatus.COMMITTED else 0
                ev.propose_resolve(current, ts, hinted=True)
        return True

    # -- readers (DESIGN.md section 7)

    def ask_visibility(self, part: Part, at: int, waiter: Waiter) -> None:
        """A reader at `at` met an undecided intent at or below it: ask the anchor; it is woken by the answer."""
        ask = self._asks.get(part.txn_id)
        if ask is not None:
            ask[1].append(waiter)
            return
        reached("reader_asks")
        self._asks[part.txn_id] = (at, [waiter])
        request = QueryTxn(0, 0, 0, part.txn_id, part.row.anchor_key, QueryMode.READ, at)
        self.call(part.row.anchor_key, request, lambda reply: self._on_visibility(part, reply))

    def _on_visibility(self, part: Part, reply: Reply) -> None:
        asked, waiters = self._asks.pop(part.txn_id)
        if isinstance(reply, TxnReply) and reply.status == TxnStatus.INVISIBLE:
            reached("reader_told_invisible")
            part.invisible_to = max(part.invisible_to, asked)
        elif not self.on_outcome(part, reply) or self._stands(part):
            reached("reader_rests")
            self.rest(waiters)  # no answer, or none that can be used now
            return
        self.ev.runnable += waiters

    def _stands(self, part: Part) -> bool:
        """Whether the part is still here with nothing on its way that ends it: whoever looks now meets it again."""
        current = self.ev.state.part(part.txn_id, part.locus)
        return current is not None and current.resolving is None

    def rest(self, waiters: list[Waiter]) -> None:
        """They look again a little later, until their own time is up; at once could be for ever (a busy loop)."""
        self._rest_number += 1
        number = self._rest_number
        self._resting[number] = waiters
        self.ev.at(self.ev.now + ASK_AGAIN_S, lambda _: self._wake(number))

    def _wake(self, number: int) -> None:
        self.ev.runnable += self._resting.pop(number)

    def looked(self, waiter: Waiter, reply: Reply, *, confirm: bool) -> None:
        """A reader's question was answered by the participants. `confirm`: it rests on the record still being STAGED."""
        self._looking.pop(waiter, None)
        if not waiter.done:
            waiter.done = True
            self.ev.out.reply(waiter.origin, reply, confirm)

    def look_again(self, waiter: Waiter) -> None:
        """A participant does not remember any more: the record says what became of it."""
        self._looking.pop(waiter, None)
        if not waiter.done:
            waiter.done = True
            self.query_txn(waiter.request, waiter.origin, self.ev.now)


def _decision(request: Request, answer: Answer) -> Reply:
    """What to tell whoever brought a decision, once it stands."""
    if isinstance(request, Resolve):
        return Ack(request.id)
    committed = answer.status == PartStatus.COMMITTED
    return TxnReply(request.id, TxnStatus.COMMITTED if committed else TxnStatus.ABORTED, answer.ts)


__all__ = ["Recovery"]
