"""What waits for a timestamp waits for a bounded time, though the oracle may be away for hours.

Who waited for `read_wait_s` is told `unavailable`, and asks again if anybody still wants to know: else each try of a client,
and each question of another range, would leave one more that waits.

O5 a Prepare that is given up was not proposed: its latches go, no trace is left, and a timestamp that comes for it after all
   is nobody's (`give_timestamps`). What waited for its latches goes on, or is given up with it when its own time is up.
O6 there is one timer for all, and it does not come more often than each LOOK_S.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from replication.probes import reached
from txn.changes import Poll
from txn.latches import Pending, Waiter
from txn.messages import Failure, Prepare, Read, Scan, Validate

if TYPE_CHECKING:
    from txn.evaluate import Evaluator

LOOK_S: Final = 0.5
MESSAGE: Final = "the timestamp oracle does not answer"


class Silence:
    """The patience of an evaluator; its state is the evaluator's."""

    def __init__(self, owner: Evaluator) -> None:
        self.owner = owner
        self.armed = False

    def arm(self, now: float) -> None:
        """Something asks for a timestamp: look whether it still does when its time is up."""
        self.armed = True
        self.owner.at(now + self.owner.limits.read_wait_s, self._look)

    def ask_again(self, pendings: Sequence[Pending], readers: Sequence[Waiter]) -> None:
        """The oracle did not answer; what was given up meanwhile is not asked for any more."""
        owner, latched = self.owner, self.owner.latches.txns
        owner.await_fresh[:0] = [each for each in pendings if latched.get(each.txn_id) is each]
        owner.await_read[:0] = [each for each in readers if not each.done]

    def _look(self, now: float) -> None:
        owner, wait_s = self.owner, self.owner.limits.read_wait_s
        self.armed = False
        oldest = float("inf")
        for waiter in list(owner.untimed):
            until = waiter.until_s(wait_s)
            if until <= now:
                self._give_up(waiter)
            else:
                oldest = min(oldest, until)
        given_up = []
        for pending in owner.latches.txns.values():
            if pending.command is None and pending.asked_at + wait_s <= now:
                given_up.append(pending)
            elif pending.command is None:
                oldest = min(oldest, pending.asked_at + wait_s)
        if given_up:
            gone = set(given_up)
            owner.await_fresh = [each for each in owner.await_fresh if each not in gone]
        owner.await_read = [each for each in owner.await_read if not each.done]
        for pending in given_up:
            reached("writer_of_a_silent_oracle_given_up")
            self._give_up_waiters(pending, now)
            owner.let_go(pending, "unavailable", MESSAGE)
        if oldest < float("inf"):
            self.armed = True
            owner.at(max(oldest, now + LOOK_S), self._look)

    def _give_up(self, waiter: Waiter) -> None:
        reached("reader_of_a_silent_oracle_given_up")
        owner = self.owner
        del owner.untimed[waiter]
        if isinstance(waiter, Poll):
            owner.feed.give_up(waiter)
        else:
            waiter.done = True
            failure = Failure(waiter.request.id, "unavailable", MESSAGE)
            owner.out.reply(waiter.origin, failure, False)

    def _give_up_waiters(self, pending: Pending, now: float) -> None:
        """Those who look at their own time go on; of the others, the next would wait for as long, and those behind it too."""
        left = []
        for waiter in pending.waiters:
            looks = type(waiter.request) in (Read, Scan, Validate) or isinstance(waiter, Poll)
            if waiter.done:
                continue
            if looks or waiter.until_s(self.owner.limits.read_wait_s) > now:
                left.append(waiter)
                continue
            waiter.done = True
            if type(waiter.request) is Prepare:
                self.owner.locking.failed(waiter.request)
            failure = Failure(waiter.request.id, "unavailable", MESSAGE)
            self.owner.out.reply(waiter.origin, failure, False)
        pending.waiters = left
