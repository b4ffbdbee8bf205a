"""Graphs of transactions: what must come before what, knots (strongly connected components), and short cycles.

Nodes below `size` are transactions. The others are helpers, which stand for "everything from here on": an edge into a
helper carries the kind, edges out of it are ONWARD, and a path from one transaction over helpers to the next is one edge.
So the order of time over n transactions takes O(n) edges (`add_time`), and not n squared.
A helper may lead back to the transaction that entered it. That is no edge: nothing comes before itself.

Invariant: a knot of two transactions or more holds a cycle, and every cycle lies in a knot.
Nothing here iterates over a set: two runs find the same cycles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from kvstore.testing.history import MicroTxn, Outcome

WW: Final = 1  # overwrote
WR: Final = 2  # was read by
RW: Final = 4  # read what the other overwrote
RW_TIMED: Final = 8  # the same, where only real time tells which write was later
PROCESS: Final = 16  # one client, one after the other
REALTIME: Final = 32  # ended before the other began
ONWARD: Final = 64  # out of a helper

DEPTHS: Final = (4, 16, 64, 1 << 62)  # short cycles are looked for first
VISITS_MAX: Final = 1_000_000  # edges looked at in one search

Why = tuple[str, tuple[object, ...]]  # a template, and what fills it; see `Arc.why`
NO_WHY: Final[Why] = ("", ())


class Arc(NamedTuple):
    """An edge between two transactions. `why`: a template, filled with both labels and then with the arguments."""

    source: int
    target: int
    kind: int
    why: Why


class Graph:
    """Edges in the order in which they were added."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.edges: list[list[tuple[int, int, Why]]] = [[] for _ in range(size)]

    def helper(self) -> int:
        """A new node that is no transaction."""
        self.edges.append([])
        return len(self.edges) - 1

    def add(self, source: int, target: int, kind: int, why: Why = NO_WHY) -> None:
        """An edge; one from a transaction to itself is left out."""
        if source != target:
            self.edges[source].append((target, kind, why))

    def add_time(self, txns: Sequence[MicroTxn], members: Sequence[int], kind: int) -> None:
        """Each member that is known to have ended comes before every one that began after it."""
        events = [(txns[number].begin, 0, number) for number in members]
        events += [
            (txns[number].end, 1, number)
            for number in members
            if txns[number].outcome is Outcome.OK
        ]
        barrier, fresh = -1, False  # fresh: nobody began since it was made
        for _, ended, number in sorted(events):
            if not ended:
                if barrier >= 0:
                    self.add(barrier, number, ONWARD)
                    fresh = False
                continue
            if not fresh:
                before, barrier, fresh = barrier, self.helper(), True
                if before >= 0:
                    self.add(before, barrier, ONWARD)
            self.add(number, barrier, kind)


def find_knots(graph: Graph, mask: int, among: Sequence[int]) -> list[list[int]]:
    """Strongly connected components of two transactions or more, over edges of the mask (Tarjan 1972, without recursion).

    Args: among: the nodes to look at, sorted. Returns: sorted nodes, helpers included, of each; by their first node.
    """
    edges, mask = graph.edges, mask | ONWARD
    order = [0] * len(edges)  # of discovery, from 1; 0: not yet
    low = [0] * len(edges)
    waiting = bytearray(len(edges))  # on the path
    inside = bytearray(len(edges))
    for node in among:
        inside[node] = 1
    path: list[int] = []
    knots: list[list[int]] = []
    count = 0
    for root in among:
        if order[root]:
            continue
        count += 1
        order[root] = low[root] = count
        path.append(root)
        waiting[root] = 1
        work = [(root, iter(edges[root]))]
        while work:
            node, rest = work[-1]
            for target, kind, _ in rest:
                if not kind & mask or not inside[target]:
                    continue
                if not order[target]:
                    count += 1
                    order[target] = low[target] = count
                    path.append(target)
                    waiting[target] = 1
                    work.append((target, iter(edges[target])))
                    break
                if waiting[target] and order[target] < low[node]:
                    low[node] = order[target]
            else:
                work.pop()
                if work and low[node] < low[work[-1][0]]:
                    low[work[-1][0]] = low[node]
                if low[node] == order[node]:
                    knot = _cut(path, node, waiting)
                    if sum(member < graph.size for member in knot) > 1:
                        knots.append(knot)
    knots.sort()
    return knots


def _cut(path: list[int], node: int, waiting: bytearray) -> list[int]:
    """The end of the path from this node on, which is a component."""
    at = len(path) - 1
    while path[at] != node:
        at -= 1
    knot = path[at:]
    del path[at:]
    for member in knot:
        waiting[member] = 0
    knot.sort()
    return knot


def find_cycle(
    graph: Graph, knot: Sequence[int], first: int, rest: int, *, surely: bool = True
) -> list[Arc]:
    """A short cycle in the knot: one edge of the kinds `first`, then edges of the kinds `rest`. Empty: none was found.

    Every such edge is tried, at growing depth, until VISITS_MAX edges were looked at. Then, if there surely is one (the
    kinds of `rest` connect the knot), the first is taken, however long; else it is given up, and may have been missed.
    """
    inside = bytearray(len(graph.edges))
    for node in knot:
        inside[node] = 1
    budget = VISITS_MAX
    for depth in DEPTHS:
        for start, edge in _edges_of_kind(graph, knot, first, inside):
            arcs, budget = _way_back(graph, inside, start, edge, rest, depth, budget)
            if arcs:
                return arcs
            if budget <= 0:
                break
        if budget <= 0:
            break
    if surely:
        for start, edge in _edges_of_kind(graph, knot, first, inside):
            arcs, _ = _way_back(graph, inside, start, edge, rest, DEPTHS[-1], DEPTHS[-1])
            if arcs:
                return arcs
    return []


def _edges_of_kind(
    graph: Graph, knot: Sequence[int], kinds: int, inside: bytearray
) -> Iterator[tuple[int, tuple[int, int, Why]]]:
    for start in knot:
        if start >= graph.size:
            return
        for edge in graph.edges[start]:
            if edge[1] & kinds and inside[edge[0]]:
                yield start, edge


def _way_back(
    graph: Graph,
    inside: bytearray,
    start: int,
    edge: tuple[int, int, Why],
    mask: int,
    depth: int,
    budget: int,
) -> tuple[list[Arc], int]:
    """Breadth first from this edge of `start` back to it: the cycle or nothing, and what is left of the budget."""
    total, mask = len(graph.edges), mask | ONWARD
    # A helper that was reached by the first edge alone is known as total + node: from there to `start` is no way.
    entry = edge[0] if edge[0] < graph.size else edge[0] + total
    found: dict[int, tuple[int, int, Why]] = {entry: (start, edge[1], edge[2])}
    frontier = [entry]
    for _ in range(min(depth, 2 * total)):
        ahead: list[int] = []
        for place in frontier:
            early = place >= total
            for target, kind, why in graph.edges[place - total if early else place]:
                budget -= 1
                if not kind & mask or not inside[target]:
                    continue
                if target == start:
                    if early:
                        continue
                    found[start] = (place, kind, why)
                    return _arcs(graph.size, start, found), budget
                reached = target + total if early and target >= graph.size else target
                if reached not in found:
                    found[reached] = (place, kind, why)
                    ahead.append(reached)
        if not ahead or budget <= 0:
            break
        frontier = ahead
    return [], budget


def _arcs(size: int, start: int, found: dict[int, tuple[int, int, Why]]) -> list[Arc]:
    """The way from `start` to itself, with helpers left out: their edges' reasons are put together."""
    arcs: list[Arc] = []
    node, target = start, start
    after: tuple[object, ...] = ()
    while True:
        before, kind, (template, arguments) = found[node]
        if before < size:
            arcs.append(Arc(before, target, kind, (template, arguments + after)))
            target, after = before, ()
            if before == start:
                break
        else:
            after = arguments + after
        node = before
    arcs.reverse()
    return arcs
