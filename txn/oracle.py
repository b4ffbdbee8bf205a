"""The timestamp oracle (TSO): the meta range's leader hands out 64-bit numbers that only grow.

Promises: O1 every fresh timestamp is handed out once; O2 a timestamp is below the bound `hi` that is committed in the meta
range; O3 the first one of a new leader is above every bound an earlier leader had; O4 it follows the wall clock, but never
back and at most twice as fast as monotonic time has passed since the last one, so that one bad clock expires nothing.
The caller confirms leadership after a batch was asked for (lease checked after generating, or a read index): without
that, a deposed leader could still answer, below what its successor issued.
Source: Peng and Dabek, "Percolator" (OSDI 2010); TiKV's placement driver, and its bugs (pd#4885, #3616).
"""

from __future__ import annotations

from replication.probes import chance, reached
from txn.types import TIMESTAMP_SHIFT

CATCH_UP_RATE = 2  # of monotonic time
PACE_S = 1.0  # it is counted from the last timestamp, but not from each: they may be closer than its unit
RENEW_SHARE = 2  # a new bound is asked for when less than 1/2 of the window is left


class Oracle:
    """One leader's term of the oracle. `hi` is the applied bound; every replica of the meta range keeps it."""

    def __init__(self, hi: int = 0, window_ms: int = 3000) -> None:
        self.hi = hi
        self.last = (
            hi  # the last value issued; before any issue the old bound (GetReadTs may answer it)
        )
        self._window = window_ms << TIMESTAMP_SHIFT
        self._serving = False
        self._leads = False
        self._asked = 0  # a bound that was proposed and is not applied; 0: none
        self._base = 0  # timestamp at `_since`; one from which the pace is counted
        self._since = 0.0

    def start_term(self, now: float) -> None:
        """This replica leads, and has applied an entry of its term. Serving begins when a bound is applied."""
        self._serving, self._leads, self._asked = False, True, 0
        self.last = self.hi
        self._base, self._since = self.hi, now

    def stop(self) -> None:
        self._serving = self._leads = False

    @property
    def serving(self) -> bool:
        return self._serving

    def bound_applied(self, hi: int) -> None:
        """A bound was applied. On the leader, if it is the one asked for in this term, serving may begin."""
        assert hi >= self.hi, "the oracle's bound never goes back"
        self.hi = hi
        if self._leads and hi == self._asked:
            self._serving, self._asked = True, 0

    def bound_lost(self) -> None:
        """The proposed bound was refused; the next turn proposes one again."""
        reached("oracle_bound_lost")
        self._asked = 0

    def next_bound(self, wall_ms: int, now: float) -> int:
        """A bound to propose because little is left of the window, or 0. Ask it in turns that issue timestamps."""
        if not self._leads or self._asked:
            return 0
        target = self._target(wall_ms, now)
        if self._serving and self.hi - target > self._window // RENEW_SHARE:
            return 0
        window = self._window >> 6 if chance("oracle_window_small") else self._window
        # Above the old one in any case: what raises nothing is not told as applied, and no other would be asked for.
        self._asked = max(target + window, self.hi + 1)
        return self._asked

    def issue(self, count: int, wall_ms: int, now: float) -> int:
        """The first of `count` fresh, consecutive timestamps; 0: not now (no bound yet, or it is used up)."""
        if not self._serving:
            return 0
        first = self._target(wall_ms, now)
        near = first + count > self.hi
        if near:
            reached("oracle_bound_near")
            first = self.last + 1  # the clock may wait for the next bound, the order may not
            if first + count > self.hi:
                reached("oracle_bound_used_up")
                return 0
        self.last = first + count - 1
        if not near and now >= self._since + PACE_S:
            self._base, self._since = self.last, now
        return first

    def _target(self, wall_ms: int, now: float) -> int:
        allowed = self._base + (int((now - self._since) * 1000 * CATCH_UP_RATE) << TIMESTAMP_SHIFT)
        return max(self.last + 1, min(wall_ms << TIMESTAMP_SHIFT, allowed))
