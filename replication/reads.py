"""Linearizable reads: read-index rounds by counter, and the send times that the lease counts from.

R1. A context is confirmed only by a probe that was sent after it was asked for (pitfall 4): contexts wait for the next
    probe, and a round is confirmed when a quorum acknowledged a probe at or above its own.
R2. The index of a round is the commit index when its probe is sent, and no round begins before an entry of the
    leader's own term is committed (pitfall 3). Until then contexts wait, at most `pending_max` of them.
R3. The send time that is remembered for a probe is never later than the true one: a lease errs on the short side.

Source: Ongaro's thesis, section 6.4.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from replication.errors import ProposalDropped


class ReadState(NamedTuple):
    """A confirmed read: serve it once the state machine has applied up to `index`."""

    context: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks of a pair


@dataclass(frozen=True, slots=True)
class _Round:
    probe: int
    index: int
    contexts: list[int]


class ReadQueue:
    """Contexts that wait: first for a probe, then for its acknowledgement."""

    __slots__ = ("_pending_max", "_rounds", "pending", "waiting")

    def __init__(self, pending_max: int) -> None:
        self._pending_max = pending_max
        self._rounds: deque[_Round] = deque()
        self.waiting: list[int] = []  # asked for, no probe yet
        self.pending = 0  # all that are not answered

    def add(self, context: int) -> None:
        """Raises ProposalDropped when too many wait."""
        if self.pending >= self._pending_max:
            raise ProposalDropped(f"{self.pending} reads wait already")
        self.pending += 1
        self.waiting.append(context)

    def begin_round(self, probe: int, index: int) -> None:
        """Everything that waits is confirmed by `probe`, which is about to be sent."""
        self._rounds.append(_Round(probe, index, self.waiting))
        self.waiting = []

    @property
    def open(self) -> bool:
        """Whether a round awaits its quorum."""
        return bool(self._rounds)

    def confirm(self, probe: int) -> list[ReadState]:
        """A quorum acknowledged `probe`: the rounds that this confirms, in order."""
        confirmed: list[ReadState] = []
        rounds = self._rounds
        while rounds and rounds[0].probe <= probe:
            done = rounds.popleft()
            confirmed += [ReadState(context, done.index) for context in done.contexts]
        self.pending -= len(confirmed)
        return confirmed

    def fail(self) -> list[int]:
        """Leadership is lost: every context, in the order asked."""
        failed: list[int] = []
        for pending in self._rounds:
            failed += pending.contexts
        failed += self.waiting
        self._rounds.clear()
        self.waiting = []
        self.pending = 0
        return failed


class ProbeTimes:
    """When each probe of a term was sent, in steps of `grain_s`; nothing older than `keep_s` is kept.

    Probes that leave within one grain share the time of the first (R3), so that memory is bounded by keep_s / grain_s.
    """

    __slots__ = ("_firsts", "_grain_s", "_keep_s", "_times")

    def __init__(self, keep_s: float, grain_s: float) -> None:
        self._keep_s = keep_s
        self._grain_s = grain_s
        self._firsts: list[int] = []
        self._times: list[float] = []

    def clear(self) -> None:
        self._firsts.clear()
        self._times.clear()

    def sent(self, probe: int, now: float) -> None:
        """Probe numbers and times ascend."""
        times = self._times
        if times and now - times[-1] < self._grain_s:
            return
        self._firsts.append(probe)
        times.append(now)
        oldest = now - self._keep_s
        drop = 0
        while times[drop] < oldest:
            drop += 1
        if drop > 8:  # in batches: deleting at the front moves the rest
            del times[:drop]
            del self._firsts[:drop]

    def sent_at(self, probe: int) -> float | None:
        """No later than the send time; None if that is forgotten."""
        position = bisect_right(self._firsts, probe) - 1
        return self._times[position] if position >= 0 else None
