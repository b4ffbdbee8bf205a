"""Claims of the graph behind the cycle checkers: knots are what reachability says, cycles are cycles of the kinds that were
asked for, the order of time is exactly "ended before it began", and takes linear space.
"""

from __future__ import annotations

import random

from kvstore.testing.checkers.graph import (
    DEPTHS,
    ONWARD,
    REALTIME,
    RW,
    WR,
    WW,
    Graph,
    find_cycle,
    find_knots,
)
from kvstore.testing.history import MicroTxn, Outcome


def random_graph(rng: random.Random) -> Graph:
    """Few transactions; some edges go through helpers, which may lead back."""
    size = rng.randint(2, 6)
    graph = Graph(size)
    helpers = [graph.helper() for _ in range(rng.randint(0, 3))]
    for _ in range(rng.randint(0, 9)):
        source, kind = rng.randrange(size), rng.choice((WW, WR, RW))
        if helpers and rng.random() < 0.4:
            helper = rng.choice(helpers)
            graph.add(source, helper, kind, ("", (source,)))
            graph.add(helper, rng.randrange(size), ONWARD, ("", (-1,)))
        else:
            graph.add(source, rng.randrange(size), kind)
    for before, after in zip(helpers, helpers[1:], strict=False):  # noqa: RUF007
        graph.add(before, after, ONWARD)
    return graph


def plain_edges(graph: Graph, mask: int) -> list[tuple[int, int, int]]:
    """Edges between two different transactions, with helpers left out."""
    edges = []
    for source in range(graph.size):
        for first, kind, _ in graph.edges[source]:
            if not kind & mask:
                continue
            ahead, seen = [first], {first}
            while ahead:
                node = ahead.pop()
                if node < graph.size:
                    if node != source:
                        edges.append((source, node, kind))
                    continue
                for target, _, _ in graph.edges[node]:
                    if target not in seen:
                        seen.add(target)
                        ahead.append(target)
    return edges


def reaches(edges: list[tuple[int, int, int]], source: int, target: int) -> bool:
    ahead, seen = [source], {source}
    while ahead:
        node = ahead.pop()
        for before, after, _ in edges:
            if before == node and after == target:
                return True
            if before == node and after not in seen:
                seen.add(after)
                ahead.append(after)
    return False


def test_knots_and_cycles_are_what_reachability_says() -> None:
    rng = random.Random(1)
    knotted = 0
    for _ in range(600):
        graph = random_graph(rng)
        for first, rest in ((WW, WW), (WR, WW | WR), (RW, WW | WR), (RW, WW | WR | RW)):
            edges = plain_edges(graph, first | rest)
            knots = find_knots(graph, first | rest, range(len(graph.edges)))
            circular = [node for node in range(graph.size) if reaches(edges, node, node)]
            found = sorted(node for knot in knots for node in knot if node < graph.size)
            assert found == circular
            knotted += bool(knots)
            for knot in knots:
                inner = [edge for edge in edges if edge[0] in knot and edge[1] in knot]
                after = [edge for edge in inner if edge[2] & rest]
                possible = any(
                    reaches(after, target, source) for source, target, kind in inner if kind & first
                )
                cycle = find_cycle(graph, knot, first, rest, surely=possible)
                assert bool(cycle) == possible
                for arc, following in zip(cycle, cycle[1:] + cycle[:1], strict=True):
                    assert (arc.source, arc.target, arc.kind) in inner
                    assert arc.target == following.source
                assert len({arc.source for arc in cycle}) == len(cycle)
                if cycle and not first & rest:
                    assert [bool(arc.kind & first) for arc in cycle].count(True) == 1
    assert knotted > 300


def test_a_helper_that_leads_back_is_no_cycle() -> None:
    graph = Graph(2)
    helper = graph.helper()
    graph.add(0, helper, RW)
    graph.add(helper, 0, ONWARD)
    assert find_knots(graph, RW, range(3)) == []
    graph.add(helper, 1, ONWARD)
    graph.add(1, 0, WW)
    (knot,) = find_knots(graph, RW | WW, range(3))
    assert [(a.source, a.target) for a in find_cycle(graph, knot, RW, WW)] == [(0, 1), (1, 0)]


def test_a_cycle_deeper_than_every_limit_is_found() -> None:
    size = 3 * DEPTHS[-2]
    graph = Graph(size)
    for node in range(size):
        graph.add(node, (node + 1) % size, RW if node == 0 else WW)
    (knot,) = find_knots(graph, RW | WW, range(size))
    assert len(find_cycle(graph, knot, RW, WW)) == size


def test_a_cycle_that_must_exist_is_found_however_little_may_be_looked_at(monkeypatch) -> None:
    monkeypatch.setattr("kvstore.testing.checkers.graph.VISITS_MAX", 5)
    graph = Graph(20)
    for node in range(20):
        graph.add(node, (node + 1) % 20, RW if node == 0 else WW)
    (knot,) = find_knots(graph, RW | WW, range(20))
    assert find_cycle(graph, knot, RW, WW, surely=False) == []
    assert len(find_cycle(graph, knot, RW, RW | WW)) == 20


def test_the_order_of_time_is_that_one_ended_before_the_other_began() -> None:
    rng = random.Random(2)
    for _ in range(100):
        txns = []
        for number in range(8):
            begin = rng.randrange(12)
            end = begin + rng.randrange(5)
            outcome = rng.choice((Outcome.OK, Outcome.OK, Outcome.UNKNOWN))
            txns.append(MicroTxn(f"c{number}", begin, [], 0, end, outcome))
        members = [number for number in range(8) if rng.random() < 0.8]
        graph = Graph(8)
        graph.add_time(txns, members, REALTIME)
        found = {(source, target) for source, target, _ in plain_edges(graph, REALTIME)}
        assert found == {
            (one, other)
            for one in members
            for other in members
            if txns[one].outcome is Outcome.OK and txns[one].end < txns[other].begin
        }


def test_the_order_of_time_takes_linear_space() -> None:
    rng = random.Random(3)
    txns = [
        MicroTxn("c", begin := rng.randrange(5_000), [], 0, begin + rng.randrange(99), Outcome.OK)
        for _ in range(2_000)
    ]
    graph = Graph(len(txns))
    graph.add_time(txns, range(len(txns)), REALTIME)
    assert sum(map(len, graph.edges)) <= 3 * len(txns)
