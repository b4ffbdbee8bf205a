"""The verdict of `kvctl status`: what the nodes say of themselves, put together. Pure.

A range is unavailable when no live node leads it, or too few of its replicas are on live nodes; a part of the key space
that no live node holds is, too. Nothing is believed about a node that does not answer. The newest view of a range wins:
the highest version of its span, then the highest term.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

Report = Mapping[str, Any]

EXIT_CODES: Final[Mapping[str, int]] = {"ok": 0, "degraded": 10, "unavailable": 11}


class NodeHealth(msgspec.Struct, frozen=True):
    address: str
    node_id: int  # 0 if it does not answer and nobody else names it
    state: str  # waiting, starting, ready, draining; unreachable
    replicas: int
    leaders: int
    version: str
    uptime_s: float


class RangeHealth(msgspec.Struct, frozen=True):
    range_id: int
    start: bytes
    end: bytes
    leader: int  # node id, 0 if none that lives
    term: int
    nodes: list[int]
    live: int
    problem: str  # "" or "under-replicated", "no leader", "no quorum", "missing"


class Health(msgspec.Struct, frozen=True):
    verdict: str  # ok, degraded, unavailable
    cluster_id: str
    fault_tolerance: int  # nodes that may fail, whichever they are, with every range still available; -1: already not
    nodes: list[NodeHealth]
    ranges: list[RangeHealth]
    problems: list[str]


def assess(reports: Mapping[str, Report | None]) -> Health:
    """Args: reports: by address, a node's status, or None if it does not answer."""
    reports = distinct(reports)
    node_ids = _node_ids(reports)
    nodes = [
        _node(address, node_ids.get(address, 0), report) for address, report in reports.items()
    ]
    live = sorted(node.node_id for node in nodes if node.state == "ready")
    ranges = _ranges([report for report in reports.values() if report is not None], live)
    ranges += [RangeHealth(0, start, end, 0, 0, [], 0, "missing") for start, end in _holes(ranges)]
    ranges.sort(key=lambda each: each.start)
    problems = _problems(reports, nodes, ranges)
    unavailable = not live or any(
        each.problem in ("no leader", "no quorum", "missing") for each in ranges
    )
    verdict = "unavailable" if unavailable else "degraded" if problems else "ok"
    tolerance = min((each.live - len(each.nodes) // 2 - 1 for each in ranges), default=-1)
    return Health(
        verdict, _cluster_id(reports), -1 if unavailable else tolerance, nodes, ranges, problems
    )


def distinct(reports: Mapping[str, Report | None]) -> dict[str, Report | None]:
    """Each node once, though it was asked at several addresses (an endpoint, and what it advertises): where it answers, and
    of such addresses the one that the others know. Ids of several clusters say nothing of one another.
    """
    if len(_clusters(reports)) > 1:
        return dict(reports)
    node_ids = _node_ids(reports)
    known = [address for report in reports.values() if report for address in addresses_of(report)]
    best: dict[int, tuple[bool, bool]] = {}
    chosen: dict[int, str] = {}
    for address, report in reports.items():
        rank = report is not None, address in known
        node = node_ids.get(address, 0)
        if node and (node not in best or rank > best[node]):
            best[node], chosen[node] = rank, address
    return {
        address: report
        for address, report in reports.items()
        if chosen.get(node_ids.get(address, 0), address) == address
    }


def addresses_of(report: Report) -> list[str]:
    """The addresses of the cluster's nodes, as one of them knows them."""
    nodes = report.get("nodes")
    found = (
        [each.get("address") for each in nodes if isinstance(each, Mapping)]
        if isinstance(nodes, list)
        else []
    )
    return [address for address in found if isinstance(address, str) and address]


def _node(address: str, node_id: int, report: Report | None) -> NodeHealth:
    if report is None:
        return NodeHealth(address, node_id, "unreachable", 0, 0, "", 0.0)
    ranges = _range_reports(report)
    leaders = sum(1 for each in ranges if each.get("role") == "leader")
    version, uptime_s = str(report.get("version", "")), _figure(report.get("uptime_s"))
    return NodeHealth(
        address, node_id, str(report.get("state", "")), len(ranges), leaders, version, uptime_s
    )


def _node_ids(reports: Mapping[str, Report | None]) -> dict[str, int]:
    found: dict[str, int] = {}
    for address, report in reports.items():
        if report is None:
            continue
        found[address] = _number(report.get("node"))
        nodes = report.get("nodes")
        for each in nodes if isinstance(nodes, list) else []:
            if isinstance(each, Mapping) and each.get("address"):
                found.setdefault(str(each["address"]), _number(each.get("node_id")))
    return found


def _ranges(reports: Sequence[Report], live: Sequence[int]) -> list[RangeHealth]:
    newest: dict[int, tuple[tuple[int, int], Report]] = {}
    leaders: dict[int, tuple[int, int]] = {}  # range -> (term, node)
    refusing: dict[int, list[int]] = {}  # range -> nodes whose replica does not serve
    for report in reports:
        node = _number(report.get("node"))
        for each in _range_reports(report):
            range_id, term = _number(each.get("id")), _number(each.get("term"))
            rank = (_number(each.get("version")), term)
            if range_id not in newest or rank > newest[range_id][0]:
                newest[range_id] = (rank, each)
            if each.get("role") == "refused":
                refusing.setdefault(range_id, []).append(node)
            if each.get("role") == "leader" and report.get("state") == "ready":
                leaders[range_id] = max(leaders.get(range_id, (0, 0)), (term, node))
    return [
        _range(each, rank[1], leaders.get(key, (0, 0))[1], live, refusing.get(key, []))
        for key, (rank, each) in newest.items()
    ]


def _range(
    each: Report, term: int, leader: int, live: Sequence[int], refusing: Sequence[int]
) -> RangeHealth:
    nodes = _replica_nodes(each.get("replicas"))
    living = sum(1 for node in nodes if node in live and node not in refusing)
    if living < len(nodes) // 2 + 1:
        problem = "no quorum"
    elif leader not in live:
        problem = "no leader"
    else:
        problem = "under-replicated" if living < len(nodes) else ""
    start, end = decode_key(each.get("start")), decode_key(each.get("end"))
    return RangeHealth(_number(each.get("id")), start, end, leader, term, nodes, living, problem)


def _holes(ranges: Sequence[RangeHealth]) -> list[tuple[bytes, bytes]]:
    """Spans that no range covers; none when there is no range at all (a cluster that waits for init)."""
    holes: list[tuple[bytes, bytes]] = []
    reached: bytes | None = b""  # None: the end of the key space
    for each in sorted(ranges, key=lambda span: span.start):
        if reached is None:
            break
        if each.start > reached:
            holes.append((reached, each.start))
        reached = None if not each.end else max(reached, each.end)
    if ranges and reached is not None:
        holes.append((reached, b""))
    return holes


def _problems(
    reports: Mapping[str, Report | None], nodes: Sequence[NodeHealth], ranges: Sequence[RangeHealth]
) -> list[str]:
    problems = []
    for node in nodes:
        if node.state == "waiting":
            problems.append(f"{node.address} waits for `kvctl init`")
        elif node.state != "ready":
            problems.append(f"{node.address} is {node.state or 'of unknown state'}")
    clusters = _clusters(reports)
    if len(clusters) > 1:
        problems.append("these nodes are of different clusters: " + ", ".join(clusters))
    for kind in ("missing", "no quorum", "no leader", "under-replicated"):
        ids = [
            str(number)
            for number in sorted(each.range_id for each in ranges if each.problem == kind)
        ]
        if kind == "missing" and ids:
            problems.append("a part of the key space is on no node that answers")
        elif ids:
            shown = ", ".join(ids[:10]) + (", ..." if len(ids) > 10 else "")
            problems.append(f"{len(ids)} range{'s'[: len(ids) > 1]} {kind}: {shown}")
    return problems


def _clusters(reports: Mapping[str, Report | None]) -> list[str]:
    return sorted({str(report.get("cluster", "")) for report in reports.values() if report} - {""})


def _cluster_id(reports: Mapping[str, Report | None]) -> str:
    return next(
        (str(report["cluster"]) for report in reports.values() if report and report.get("cluster")),
        "",
    )


def _range_reports(report: Report) -> list[Report]:
    ranges = report.get("ranges")
    return (
        [each for each in ranges if isinstance(each, Mapping)] if isinstance(ranges, list) else []
    )


def _replica_nodes(replicas: Any) -> list[int]:
    """Node ids, of replicas given as [node, replica], as {"node": ...}, or as bare node ids."""
    nodes = []
    for each in replicas if isinstance(replicas, list) else []:
        if isinstance(each, Mapping):
            nodes.append(_number(each.get("node", each.get("node_id"))))
        else:
            nodes.append(_number(each[0] if isinstance(each, list | tuple) and each else each))
    return nodes


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _figure(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def decode_key(value: Any) -> bytes:
    """A key in a status: base64 (or bytes, in this process)."""
    if isinstance(value, bytes):
        return value
    try:
        return base64.b64decode(value or "", validate=True)
    except (ValueError, TypeError, binascii.Error):
        return str(value).encode()
