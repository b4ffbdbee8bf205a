"""The deadlock detector: at the meta range's leader, in memory, fed by the leaders of ranges where somebody waits long.

A leader reports every REPORT_S all its waits that are older than WAITED_S, whole: a wait that is over is simply not in the
next report, so nothing has to be taken back, and a detector that is lost learns everything anew from the next reports.

DD1 a cycle is confirmed: all its waits existed at one instant. A leader has one report under way at a time, so what it
reports after an answer existed after that answer. An edge known since `first` and reported again by a report that was made
after `before` existed from the one to the other; a search takes those edges for which its instant lies between the two. A
range's first report confirms nothing, and has no part in the choice of an instant. Waiters in such a cycle wait for ever, so
it is no matter that time has passed.
DD2 the victim is the youngest, by (age, id), of those who are not committing: the same whoever looks. A Prepare is nobody's
victim: it waits for a bounded time.
DD3 a cycle lives CYCLE_S at most while the meta range can be reached; otherwise the waiters' own timeouts end it.
DD4 a report brings edges. Every SEARCH_S one of them has the edges of all ranges searched, in one walk; the others hear of
their victims with their next report.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from replication.probes import reached
from txn.messages import LockEdge, LockWaits, Victim

DETECTOR_KEY: Final = b"\xff\x00"  # whoever leads the range of this key has the detector
WAITED_S: Final = 0.02
REPORT_S: Final = 0.05
STALE_S: Final = 4 * REPORT_S  # a leader that reports no more has no waits, or is gone
SEARCH_S: Final = (
    REPORT_S / 2
)  # between two searches: a lone range's reports are searched one by one
PERIOD_S: Final = 0.25
CYCLE_S: Final = 2 * PERIOD_S
EDGES_MAX: Final = 1_000  # of one report


_Wait = tuple[int, LockEdge]  # range and what it reported
_NEVER: Final = float("-inf")


class _Seen(NamedTuple):
    edge: LockEdge
    first: float


class _Source:
    """The last report of one range in one term; waits are numbered anew in each."""

    __slots__ = ("before", "edges", "number", "received", "term", "verdicts")

    def __init__(self, term: int) -> None:
        self.term = term
        self.number = 0
        self.edges: dict[int, _Seen] = {}
        self.verdicts: dict[int, list[bytes]] = {}  # wait -> cycle; told with the next report
        self.before = self.received = _NEVER


class Detector:
    def __init__(self) -> None:
        self._sources: dict[int, _Source] = {}  # by range
        self.cycles = 0
        self._search_at = _NEVER

    def report(self, waits: LockWaits, now: float) -> list[Victim]:
        """All long waits of a range; returns those of them that have to give way."""
        source = self._sources.get(waits.source)
        if source is not None and (waits.term, waits.number) <= (source.term, source.number):
            return []  # of a leader that was deposed, or overtaken by a later one
        if source is None or waits.term != source.term:
            source = _Source(waits.term)
        elif waits.after != source.number:  # what was known does not show when this was made
            source.edges, source.received = {}, _NEVER
        known = source.edges
        source.edges = {
            edge.number: _Seen(edge, known[edge.number].first if edge.number in known else now)
            for edge in waits.edges
        }
        source.number, source.before, source.received = waits.number, source.received, now
        self._sources[waits.source] = source
        self._sources = {
            range_id: each
            for range_id, each in self._sources.items()
            if each.edges and each.received >= now - STALE_S
        }
        if now >= self._search_at:
            self._search_at = now + SEARCH_S
            self._search(now)
        verdicts, source.verdicts = source.verdicts, {}  # of a wait that is over: nobody's
        victims = [
            Victim(number, verdicts[number]) for number in source.edges if number in verdicts
        ]
        for victim in victims:
            del source.edges[victim.number]
        return victims

    def _search(self, now: float) -> None:
        """Every cycle among the edges that existed at one instant (DD1) gets its victim.

        The instant is the latest that all ranges confirm. One whose reports take long lags behind: the instant of the others
        is searched too, so that it delays no cycle but those through itself.
        """
        befores = [each.before for each in self._sources.values() if each.before > _NEVER]
        recent = [before for before in befores if before >= now - STALE_S]
        for instant in dict.fromkeys(min(each) for each in (befores, recent) if each):
            self._search_at_instant(instant)

    def _search_at_instant(self, instant: float) -> None:
        waits: dict[bytes, list[_Wait]] = {}  # waiter -> its waits
        for range_id, source in self._sources.items():
            if source.before < instant:
                continue
            for seen in source.edges.values():
                if seen.first <= instant and seen.edge.number not in source.verdicts:
                    waits.setdefault(seen.edge.waiter, []).append((range_id, seen.edge))
        starts, done = list(reversed(waits)), dict[bytes, None]()
        while cycle := _cycle_in(waits, starts, done):
            ready = [each for each in cycle if not each[1].committing]
            victim = max(ready or cycle, key=lambda each: (each[1].age, each[1].waiter))
            if ready:
                reached("deadlock_broken")
                self.cycles += 1
                ids = [edge.waiter for _, edge in cycle]
                at = ids.index(victim[1].waiter)
                self._sources[victim[0]].verdicts[victim[1].number] = ids[at:] + ids[:at]
            waits[victim[1].waiter].remove(victim)


def _cycle_in(
    waits: dict[bytes, list[_Wait]], starts: list[bytes], done: dict[bytes, None]
) -> list[_Wait]:
    """Waits each of which is for the next one's owner, the last for the first's; empty: there is no cycle.

    `starts`: where to look, the last first; at the last one again when the cycle is broken. `done`: in no cycle. A wait
    that is taken away makes none, so both are kept from one call to the next.
    """
    while starts:
        start = starts[-1]
        if start in done:
            starts.pop()
            continue
        nodes, place = [start], {start: 0}
        path: list[_Wait] = []  # path[i] leads from nodes[i] to nodes[i + 1]
        steps = [_steps(waits[start])]
        while steps:
            step = next(steps[-1], None)
            if step is None:
                steps.pop()
                node = nodes.pop()
                del place[node]
                done[node] = None
                if path:
                    path.pop()
                continue
            wait, to = step
            if to in place:
                return [*path[place[to] :], wait]
            if to in waits and to not in done:
                path.append(wait)
                place[to] = len(nodes)
                nodes.append(to)
                steps.append(_steps(waits[to]))
    return []


def _steps(waits: list[_Wait]) -> Iterator[tuple[_Wait, bytes]]:
    return ((wait, to) for wait in list(waits) for to in wait[1].blockers)
