"""The tables that people see: nodes, ranges, the cluster's health. Pure: data in, rich renderables out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvstore.cli.health import Health, NodeHealth, RangeHealth
from kvstore.cli.init import Plan
from kvstore.cli.locks import Locks
from kvstore.cli.output import Lines, Notation, table

KEY_CHARACTERS_MAX: Final = 40
RANGES_PLANNED_MAX: Final = 20  # shown of a plan
_STYLE: Final = {"ok": "bold green", "degraded": "bold yellow", "unavailable": "bold red"}


def status(health: Health) -> Group:
    """The verdict first, then what is wrong, then the nodes."""
    head = Text.assemble(
        (health.verdict, _STYLE[health.verdict]), f"  cluster {health.cluster_id or '(none yet)'}"
    )
    lines = [head, Text(_tolerance(health)), *(Text(f"- {problem}") for problem in health.problems)]
    return Group(*lines, Text(), nodes(health.nodes), Text(), Text(_summary(health.ranges)))


def nodes(rows: Sequence[NodeHealth]) -> Table | Lines:
    cells = (
        (
            node.node_id or "?",
            node.address,
            Text(node.state or "?", style="green" if node.state == "ready" else "red"),
            node.replicas,
            node.leaders,
            duration(node.uptime_s),
            node.version,
        )
        for node in rows
    )
    return table(("node", "address", "state", "replicas", "leaders", "uptime", "version"), cells)


def ranges(rows: Sequence[RangeHealth]) -> Table | Lines:
    cells = (
        (
            each.range_id or "?",
            key_text(each.start),
            key_text(each.end) if each.end else "(end)",
            each.leader or "-",
            each.term,
            ",".join(str(node) for node in each.nodes),
            Text(each.problem or "ok", style="red" if each.problem else "green"),
        )
        for each in rows
    )
    return table(("range", "start", "end", "leader", "term", "nodes", "state"), cells)


def plan(found: Plan) -> Group:
    """What init would make: its nodes, and the first of its ranges with the nodes of their replicas."""
    made = found.requests[0]
    missing = {address for address, _ in found.missing}
    node_rows = [
        (each.node_id, each.address, "joins" if each.address in missing else "is a member")
        for each in made.nodes
    ]
    range_rows = [
        (
            each.range_id,
            key_text(each.start),
            key_text(each.end) if each.end else "(end)",
            ",".join(str(node) for node, _ in each.replicas),
        )
        for each in made.ranges[:RANGES_PLANNED_MAX]
    ]
    copies = len(made.ranges[0].replicas)
    head = (
        f"cluster {found.cluster_id}: {len(made.nodes)} nodes, {len(made.ranges)} ranges, "
        f"{copies} {'copy' if copies == 1 else 'copies'} of each"
    )
    left = len(made.ranges) - len(range_rows)
    return Group(
        Text(head),
        Text(),
        table(("node", "address", "plan"), node_rows),
        Text(),
        table(("range", "start", "end", "nodes"), range_rows),
        Text(f"and {left} more ranges\n" if left else ""),
    )


def locks(found: Locks, notation: Notation) -> Group:
    """One line for each holder and waiter, the waiters in their order."""
    rows = []
    for lock in found.locks:
        key = notation.write(lock.key)
        for holder in lock.holders:
            how = "exclusive" if holder.exclusive else "shared"
            rows.append((key, "holds", how, holder.transaction, f"lease {holder.lease_s:.1f} s"))
        for waiter in lock.waiters:
            how = "commits" if waiter.committing else "exclusive" if waiter.exclusive else "shared"
            rows.append((key, "waits", how, waiter.transaction, f"for {waiter.waits_s:.1f} s"))
    notes = [Text(f"no answer from {address}", style="red") for address in found.silent]
    if found.more:
        notes.append(Text("there are more locks than are shown", style="yellow"))
    if not rows:
        return Group(Text("no locks"), *notes)
    return Group(table(("key", "", "how", "transaction", "time"), rows), *notes)


def key_text(key: bytes) -> str:
    """A key for people, cut when it is long."""
    text = Notation.ESCAPED.write(key) or "(start)"
    if len(text) <= KEY_CHARACTERS_MAX:
        return text
    shown = Notation.ESCAPED.write("…".encode()) == "…"  # by the terminal
    more = "…" if shown else "..."
    return text[: KEY_CHARACTERS_MAX - len(more)] + more


def duration(seconds: float) -> str:
    """Such as 42s, 3m 5s, 2h 7m, 3d 4h."""
    whole = int(seconds)
    for size, unit, smaller, smaller_unit in (
        (86_400, "d", 3_600, "h"),
        (3_600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // smaller}{smaller_unit}"
    return f"{whole}s"


def _tolerance(health: Health) -> str:
    if health.fault_tolerance < 0:
        return "parts of the key space cannot be read or written now"
    count = health.fault_tolerance
    if count == 0:
        return "every key is served now, and no longer if one more node fails"
    return f"{count} node{'' if count == 1 else 's'} may fail and every key is still served"


def _summary(rows: Sequence[RangeHealth]) -> str:
    bad = sum(1 for each in rows if each.problem)
    return (
        f"{len(rows)} ranges, {bad} with a problem (kvctl ranges ls --problem)"
        if bad
        else f"{len(rows)} ranges"
    )
