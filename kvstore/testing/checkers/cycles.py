"""The cycle checkers: is a history of transactions strictly serializable, and if not, what is that called?

From what transactions read and wrote follows which of them must come before which. If those edges form a cycle, no order
explains the history, and the kinds of edges in the cycle name the anomaly:

G0             writes alone (ww): two transactions' writes are interleaved
G1c            writes and reads of them (ww, wr): information flows in a circle
G-single       one anti-dependency (rw: read what the other overwrote): read skew, a stale read
lost-update    two, between two transactions that read the same version of one key and both overwrote it
G2-item        two or more: write skew
...-process    the cycle needs the order of one client's transactions
...-realtime   it needs real time: one ended before the other began

Found without cycles: G1a (aborted read: of a failed write), G1b (intermediate read: of what its writer wrote over), internal (a
transaction contradicts itself), garbage-read (of what nobody wrote); of lists duplicate-elements, incompatible-order
(two reads that are no prefix of each other) and lost-append (acknowledged, and absent later); of versions duplicate-version.

Unknown transactions count if somebody read what they wrote, and then with all their steps; failed ones never happened.
Every anomaly is real. Each knot of transactions is explained by one cycle, of the first kind in the list above.
Complete, that is, no anomaly means that some serial order explains every read and respects real time: for list-append,
and for rw-register with the versions of all writes (`by_version`). Otherwise rw-register knows the order of two writes
from reads within transactions and from real time only, and may miss what others can still explain away.

Sources: Adya, "Weak Consistency" (1999); Kingsbury and Alvaro, "Elle" (VLDB 2020). We differ: one cycle for each knot;
unread appends come after all read ones, whatever their number; helpers keep the graph linear in the size of the history.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kvstore.testing.checkers.anomaly import MISTAKES_MAX, Anomaly, Edge, label, quoted, shown
from kvstore.testing.checkers.graph import (
    PROCESS,
    REALTIME,
    RW,
    RW_TIMED,
    WR,
    WW,
    Arc,
    Graph,
    find_cycle,
    find_knots,
)
from kvstore.testing.checkers.list_append import infer_list_append
from kvstore.testing.checkers.rw_register import infer_rw_register
from kvstore.testing.history import MicroTxn

EXPLANATIONS: Final = {
    "G0": "these transactions wrote over each other in a circle",
    "G1c": "each of these transactions saw, or wrote over, the one before it, in a circle",
    "G-single": "a transaction missed what it should have seen (a cycle with one anti-dependency)",
    "lost-update": "two transactions read the same version, and both wrote over it",
    "G2-item": "each of these transactions missed what another wrote (a cycle of anti-dependencies)",
}
KINDS: Final = {
    WW: "ww",
    WR: "wr",
    RW: "rw",
    RW_TIMED: "rw",
    PROCESS: "process",
    REALTIME: "realtime",
}
ANTI: Final = RW | RW_TIMED
EVERYTHING: Final = WW | WR | ANTI | PROCESS | REALTIME


def check_list_append(txns: Sequence[MicroTxn]) -> list[Anomaly]:
    """Judge transactions that append unique integers to lists, and read whole lists. Exact; see above.

    Returns: at most MISTAKES_MAX anomalies, the same for the same history. Raises: BadHistory for other steps, or a value
    that is appended to a key twice.
    """
    graph = Graph(len(txns))
    committed, anomalies = infer_list_append(txns, graph)
    return _judged(txns, graph, committed, anomalies)


def check_rw_register(txns: Sequence[MicroTxn], *, by_version: bool = False) -> list[Anomaly]:
    """Judge transactions that write unique integers to registers, and read them (None: never written).

    Args: by_version: `MicroTxn.version` of transactions that wrote tells the order of their writes (0: unknown).
    Returns: at most MISTAKES_MAX anomalies, the same for the same history. Raises: BadHistory for other steps, or a value
    that is written to a key twice.
    """
    graph = Graph(len(txns))
    committed, anomalies = infer_rw_register(txns, graph, by_version=by_version)
    return _judged(txns, graph, committed, anomalies)


def _judged(
    txns: Sequence[MicroTxn], graph: Graph, committed: Sequence[int], anomalies: list[Anomaly]
) -> list[Anomaly]:
    clients: dict[str, list[int]] = {}
    for number in committed:
        clients.setdefault(txns[number].client, []).append(number)
    for members in clients.values():
        graph.add_time(txns, members, PROCESS)
    graph.add_time(txns, committed, REALTIME)
    cycles = [_anomaly(txns, cycle) for cycle in _cycles(graph)]
    return (anomalies + cycles)[:MISTAKES_MAX]


def _cycles(graph: Graph) -> list[list[Arc]]:
    """One cycle for each knot, with as few kinds of edges as will do."""
    knots = find_knots(graph, EVERYTHING, range(len(graph.edges)))
    if not knots:
        return []
    suspects = sorted(node for knot in knots for node in knot)
    cycles: list[list[Arc]] = []
    for time, anti in ((0, RW), (PROCESS, RW), (PROCESS | REALTIME, ANTI)):
        forward = WW | WR | time
        for first, rest in (
            (WW, WW | time),
            (WR, forward),
            (anti, forward),
            (anti, forward | anti),
        ):
            surely = not (first & anti) or bool(rest & anti)
            for knot in find_knots(graph, first | rest, suspects):
                nodes = set(knot)
                if any(cycle[0].source in nodes for cycle in cycles):
                    continue  # it is explained
                cycle = find_cycle(graph, knot, first, rest, surely=surely)
                if cycle:
                    cycles.append(cycle)
                if len(cycles) >= MISTAKES_MAX:
                    return cycles
    return cycles


def _anomaly(txns: Sequence[MicroTxn], cycle: Sequence[Arc]) -> Anomaly:
    start = min(range(len(cycle)), key=lambda place: cycle[place].source)
    cycle = [*cycle[start:], *cycle[:start]]
    name = _name(cycle)
    numbers = tuple(arc.source for arc in cycle)
    explanation = EXPLANATIONS[name]
    timed = PROCESS if all(not arc.kind & (REALTIME | RW_TIMED) for arc in cycle) else REALTIME
    if any(arc.kind & (PROCESS | REALTIME | RW_TIMED) for arc in cycle):
        name += f"-{KINDS[timed]}"
        explanation += (
            ", given the order in which one client ran them"
            if timed == PROCESS
            else ", given the order in which they began and ended"
        )
    edges = tuple(_edge(txns, arc) for arc in cycle)
    return Anomaly(name, explanation, numbers, tuple(txns[number] for number in numbers), edges)


def _name(cycle: Sequence[Arc]) -> str:
    missed = [arc for arc in cycle if arc.kind & ANTI]
    if not missed:
        return "G1c" if any(arc.kind == WR for arc in cycle) else "G0"
    if len(missed) == 1:
        return "G-single"
    if len(cycle) == 2 and missed[0].why[1][:2] == missed[1].why[1][:2]:
        return "lost-update"  # one key, one version of it
    return "G2-item"


def _edge(txns: Sequence[MicroTxn], arc: Arc) -> Edge:
    source, target = label(arc.source), label(arc.target)
    if arc.kind & (PROCESS | REALTIME):
        whose = f" ({txns[arc.source].client})" if arc.kind == PROCESS else ""
        ended, began = txns[arc.source].end, txns[arc.target].begin
        reason = f"{source} ended at {ended}, before {target} began at {began}{whose}"
        return Edge(arc.source, arc.target, KINDS[arc.kind], None, reason)
    template, arguments = arc.why
    key = arguments[0]
    assert isinstance(key, bytes)
    reason = template.format(source, target, quoted(key), *map(shown, arguments[1:]))
    return Edge(arc.source, arc.target, KINDS[arc.kind], key, reason)
