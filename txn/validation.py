"""Fast guards: what a transaction has read in other ranges is looked at again, at its commit timestamp (DESIGN.md section 4.9).

Story. A transaction writes in one range only and has read in others. Its part latches and gets its commit timestamp c, as
always; but before it is proposed, the leaders of the other ranges are asked whether their spans hold at c what they held when
they were read (Validate). That is a read at c and is served like one. Yes from all: one entry in one range commits, and
nothing is written in the others. No: the part is fenced like any conflict.

FG1 c is issued after the writes were latched, and before the spans are looked at. So nobody who reads above c misses the
    writes (E2), and nothing at or below c can still appear in the spans (I11). Neither rests on anything remembered.
FG2 the entry is proposed only after every span was found unchanged at its very c, asked by the same leader in the same term.
FG3 no circle of waits: a question waits for a part that may itself be waiting for other ranges only if that one is younger.
FG4 bounded: after `validate_wait_s` the part is given up by a fence that blames nobody; the next attempt guards in the log.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from replication.probes import chance, reached
from txn.latches import Pending, Waiter
from txn.messages import Failure, Prepare, Reply, Validate, Validated, fast
from txn.state import Answer
from txn.types import TXN_ID_BYTES, FenceReason, PartStatus, begin_ts_of, point_end

if TYPE_CHECKING:
    from txn.evaluate import Evaluator


class Validation:
    """Both sides of it, in an evaluator: who asks, and who is asked."""

    def __init__(self, owner: Evaluator) -> None:
        self.owner = owner
        self._due: deque[tuple[float, Pending]] = deque()  # each waits equally long

    # -- who asks

    def begin(self, pending: Pending, at: int, now: float) -> None:
        """The part has its latches and its timestamp: ask about each range that it has read in."""
        request: Prepare = pending.request
        age = request.age or begin_ts_of(request.txn_id)
        wait_s = 0.0 if chance("validation_given_up") else self.owner.limits.validate_wait_s
        self._due.append((now + wait_s, pending))
        for guards in request.elsewhere:
            question = Validate(0, 0, 0, at, request.txn_id, age, guards)
            self.owner.recovery.call(guards[0].start, question, partial(self._on_reply, pending))

    def _on_reply(self, pending: Pending, reply: Reply) -> None:
        if not self._asks(pending):
            return  # given up, or refused by another range
        if not isinstance(reply, Validated):
            self._fence(pending, FenceReason.RECOVERY)
        elif not reply.unchanged:
            reached("fast_guard_refused")
            self._fence(
                pending, FenceReason.CONFLICT, reply.key, reply.other_txn, reply.other_version
            )
        else:
            pending.asking -= 1
            if not pending.asking:
                reached("fast_guards_held")
                self.owner.proposals.append(pending)

    def _asks(self, pending: Pending) -> bool:
        return pending.asking > 0 and self.owner.latches.txns.get(pending.txn_id) is pending

    def _fence(
        self,
        pending: Pending,
        reason: FenceReason,
        key: bytes = b"",
        other: bytes = b"",
        ts: int = 0,
    ) -> None:
        """A refusal is durable before it is told (E4)."""
        pending.asking = 0
        refusal = Answer(PartStatus.FENCED, 0, reason, key, other, ts)
        pending.command = self.owner.fence_of(pending.request, refusal)
        self.owner.proposals.append(pending)

    def deadline(self) -> float | None:
        due = self._due
        while due and not self._asks(due[0][1]):
            due.popleft()
        return due[0][0] if due else None

    def tick(self, now: float) -> None:
        """FG4."""
        due = self._due
        while due and (due[0][0] <= now or not self._asks(due[0][1])):
            pending = due.popleft()[1]
            if self._asks(pending):
                reached("fast_guards_given_up")
                self._fence(pending, FenceReason.RECOVERY)

    def stop(self) -> None:
        self._due.clear()

    # -- who is asked

    def validate(self, request: Validate, origin: Any, now: float) -> None:
        self.again(Waiter(request, origin, now, self.owner.latches.sequence), now)

    def again(self, waiter: Waiter, now: float) -> None:
        reply = self._look(waiter, now)
        if reply is not None:
            self.owner.out.reply(waiter.origin, reply, True)

    def _look(self, waiter: Waiter, now: float) -> Reply | None:
        """The answer; or None, and the waiter stands where it will be woken."""
        owner, request = self.owner, waiter.request
        state, at = owner.state, request.at
        if len(request.txn_id) != TXN_ID_BYTES or not fast([request.guards]):
            return Failure(request.id, "invalid_argument", "malformed question")
        if now > waiter.since + owner.limits.validate_wait_s:  # who asked has given up
            return Failure(request.id, "unavailable", "an undecided write could not be decided")
        if at < state.row.gc_threshold:
            return Failure(request.id, "snapshot_too_old")
        for guard in request.guards:
            if not state.owns_span(guard.start, guard.end):
                return Failure(request.id, "epoch_mismatch")
        if owner.latches.txns:
            for guard in request.guards:
                blocker = self._writer(guard.start, guard.end, waiter.sequence)
                if blocker is None:
                    continue
                if blocker.asking and not _younger(blocker, request):  # FG3
                    reached("fast_guards_met")
                    met = [key for key in blocker.keys if guard.start <= key < guard.end]
                    return Validated(request.id, False, (met or [guard.start])[0], blocker.txn_id)
                blocker.waiters.append(waiter.copy())
                return None
        if state.parts and self._undecided(waiter):
            return None
        outdated, unseen = owner.guard_check.look(request.guards)
        if unseen:  # the node has others to serve; the next attempt guards in the log, and has time
            return Failure(request.id, "unavailable", "too many rows to look through at once")
        if outdated is None:
            return Validated(request.id, True)
        return Validated(
            request.id, False, outdated.key, outdated.other_txn, outdated.other_version
        )

    def _undecided(self, waiter: Waiter) -> bool:
        """Whether something in the spans may yet come to stand at or below the timestamp; then the waiter will be woken."""
        request, state, undecided = waiter.request, self.owner.state, self.owner.reader.undecided
        for guard in request.guards:
            parts = [part for _, part in state.intents_in(guard.start, guard.end)]
            for part in (*parts, *state.stamped_in(guard.start, guard.end)):
                if undecided(part, request.at, waiter):
                    return True
        return False

    def _writer(self, start: bytes, end: bytes, sequence: int) -> Pending | None:
        """Who had latched something of [start, end) when the question came; whoever came later gets a later timestamp."""
        latches = self.owner.latches
        if end == point_end(start):
            return latches.blocker_of_read(start, sequence)
        return latches.blocker_of_scan(start, end, sequence)


def _younger(blocker: Pending, request: Validate) -> bool:
    theirs: Prepare = blocker.request
    age = theirs.age or begin_ts_of(theirs.txn_id)
    return (age, theirs.txn_id) > (request.age, request.txn_id)
