"""Timestamps: I9, and what I7, I8 and I15 need to know.

- I9: no value is issued twice, none at or above the bound that is in the log, and none that is handed out lies at or below
  what had been handed out when it was issued. A read timestamp is not below what had been handed out when it was asked
  for. The bound rises.

- I15: a floor is at or below what each client reads at that has told this oracle so (a hold), while the lease of that runs, and
  as far back as holds count (kvstore/holds.py). What may be collected is what one answer allows: less than its floor, and
  older than the retention. A snapshot that the oracle has not heard of in time may be refused: that is no mistake. That it
  reads nothing wrong is I11.

A deposed leader may draw from its own window, in vain; what counts is what it hands out.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from typing import Any

from kvstore.holds import LEASE_S
from kvstore.sim.observers.report import Report


class Timestamps:
    """See the module."""

    def __init__(self, report: Report) -> None:
        self.handed_out = 0  # the highest, of either kind
        self.retention = 0  # in units of timestamps
        self.collectable = 0  # the highest threshold that an answer has allowed
        self.bounds: dict[int, None] = {0: None}  # that are or were in the log
        self.bound = 0
        self._report = report
        self._issued: list[tuple[int, int]] = []  # (first, last), disjoint, rising
        self._floors: dict[int, int] = {}  # first -> what was handed out when it was issued

    def found(self, hi: int) -> None:
        """The bound that a process finds in its rows: of the cluster's creation, or one that was applied."""
        if not self.bound:
            self.bound = hi
            self.bounds[hi] = None

    def bound_applied(self, hi: int) -> None:
        if hi <= self.bound:
            self._report.broken("I9", f"the bound goes from {self.bound} to {hi}", group=1)
        self.bound = max(self.bound, hi)
        self.bounds[hi] = None

    def issued(self, node: str, first: int, count: int) -> None:
        last = first + count - 1
        if last >= self.bound:
            what = f"{first} to {last} are issued, the bound in the log is {self.bound}"
            self._report.broken("I9", what, group=1, node=node)
        place = bisect_right(self._issued, (first, last))
        before = self._issued[place - 1] if place else (0, 0)
        after = self._issued[place] if place < len(self._issued) else (last + 1, 0)
        if before[1] >= first or after[0] <= last:
            what = f"{first} to {last} are issued, and were before"
            self._report.broken("I9", what, group=1, node=node)
        insort(self._issued, (first, last))
        self._floors[first] = self.handed_out

    def is_issued(self, ts: int) -> bool:
        place = bisect_right(self._issued, (ts, 1 << 64)) - 1
        return place >= 0 and self._issued[place][0] <= ts <= self._issued[place][1]

    def is_known(self, ts: int) -> bool:
        """What a reader may have been given: issued, or an old bound, or the last one below an undecided write, where what is
        safe at a replica ends.
        """
        return self.is_issued(ts) or ts in self.bounds or self.is_issued(ts + 1)

    def handed(self, node: str, reply: Any, asked_at: int) -> None:
        """An answer of the oracle leaves. asked_at: what had been handed out when it was asked for."""
        first, last, read_ts = reply.first, reply.first + reply.count - 1, reply.read_ts
        if first:
            floor = self._floors.get(first)
            if floor is None:
                what = f"{first} is handed out and was never issued"
                self._report.broken("I9", what, group=1, node=node)
            elif first <= floor:
                what = f"{first} is handed out; {floor} had been when it was issued"
                self._report.broken("I9", what, group=1, node=node)
            self.handed_out = max(self.handed_out, last)
        if read_ts < asked_at:
            what = f"{read_ts} is given to read at; {asked_at} had been handed out when it was asked for"
            self._report.broken("I9", what, group=1, node=node)
        self.handed_out = max(self.handed_out, read_ts)
        if reply.floor:
            allowed = min(read_ts - self.retention, reply.floor - 1)
            self.collectable = max(self.collectable, allowed)


class Views:
    """What one process has been told is open, as the oracle, and the floors that it gives.

    Args: hold: how far back a hold counts, in units of timestamps. Every `now` is of that process's clock.
    """

    def __init__(self, report: Report, node: str, hold: int) -> None:
        self._report, self._node, self._hold = report, node, hold
        self._oldest: dict[int, tuple[int, float]] = {}  # by session, with the end of its lease

    def held(self, session: int, oldest: int, now: float) -> None:
        """Its oldest open view is there; 0: it has none any more."""
        if oldest:
            self._oldest[session] = oldest, now + LEASE_S
        else:
            self._oldest.pop(session, None)

    def floored(self, floor: int, issued: int, now: float) -> None:
        """A floor is about to be told; 0 is none. issued: the last timestamp."""
        for oldest, until in self._oldest.values():
            if floor > max(oldest, issued - self._hold) and until > now:
                what = f"the floor is {floor}, and a client that was heard reads at {oldest}"
                self._report.broken("I15", what, group=1, node=self._node)
                return
