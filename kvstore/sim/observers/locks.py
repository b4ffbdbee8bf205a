"""I21: every waiter has a holder in its way, or is served; and a deadlock does not last. Looked at now and then.

Each leader's table checks itself. Deadlocks are timed only when nothing goes wrong any more: they are broken by way of the
meta range, and where that cannot be reached the waiters' own timeouts do it.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.sim.observers.report import Report
from txn.deadlocks import CYCLE_S
from txn.locks import LockTable

LATE_S = 2.0  # of elections, and of what had queued up

_Edge = tuple[int, int, bytes]  # range, wait, whom for


class Locks:
    def __init__(self, report: Report) -> None:
        self._report = report
        self._edges: dict[_Edge, tuple[bytes, float]] = {}  # -> who waits, since when at least

    def look(self, tables: Iterable[tuple[str, int, LockTable]], now: float, calm: bool) -> None:
        """All leaders' tables: (node, range, table)."""
        seen: dict[_Edge, tuple[bytes, float]] = {}
        for node, group, table in tables:
            try:
                table.check()
            except AssertionError as error:
                self._report.broken("I21", str(error), group=group, node=node)
                continue
            for number, wait in table.waiting.items():
                if calm and not wait.committing:
                    for blocker in table.blockers_of(wait):
                        edge = (group, number, blocker.id)
                        since = self._edges[edge][1] if edge in self._edges else now
                        seen[edge] = (wait.owner.id, since)
        self._edges = seen
        bound_s = CYCLE_S + LATE_S
        old = {edge: entry for edge, entry in seen.items() if now > entry[1] + bound_s}
        for txn_id in _in_cycles(old):
            what = f"it waits for a lock in a deadlock, for over {bound_s:g} s"
            self._report.broken("I21", what, txn_id=txn_id)


def _in_cycles(edges: dict[_Edge, tuple[bytes, float]]) -> list[bytes]:
    """Who is left when those have gone who wait for nobody that waits: cycles, and what leads to them."""
    waits: dict[bytes, list[bytes]] = {}
    for (_, _, blocker), (waiter, _) in edges.items():
        waits.setdefault(waiter, []).append(blocker)
    while gone := [each for each, to in waits.items() if not any(one in waits for one in to)]:
        for each in gone:
            del waits[each]
    return sorted(waits)
