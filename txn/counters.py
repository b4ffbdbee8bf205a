"""What a node's ranges count: names for its metrics, and which command raises which."""

from __future__ import annotations

from txn.commands import Command, Decide, FencePart, PreparePart
from txn.state import Answer
from txn.types import FenceReason, PartStatus

COUNTERS = (
    "aborts_cross_range_total",
    "commits_cross_range_total",
    "commits_one_range_total",
    "fences_by_compare_total",
    "fences_by_conflict_total",
    "fences_by_recovery_total",
    "fences_by_request_total",
    "deadlocks_total",
    "fast_guards_total",
    "lock_leases_ended_total",
    "lock_waits_total",
    "parts_prepared_total",
    "redeliveries_total",
    "rows_collected_total",
    "waits_for_parts_total",
)
_FENCES = {
    FenceReason.CONFLICT: "fences_by_conflict_total",
    FenceReason.COMPARE_FAILED: "fences_by_compare_total",
    FenceReason.TOO_LARGE: "fences_by_request_total",
    FenceReason.BAD_VALUE: "fences_by_request_total",
}


def count(counters: dict[str, int], command: Command | None, answer: Answer) -> None:
    """A command that was applied; commits of one range are counted where they are answered."""
    if isinstance(command, FencePart):
        name = _FENCES.get(FenceReason(command.reason), "fences_by_recovery_total")
    elif isinstance(command, Decide):
        committed = answer.status == PartStatus.COMMITTED
        name = "commits_cross_range_total" if committed else "aborts_cross_range_total"
    elif isinstance(command, PreparePart):
        name = "parts_prepared_total"
    else:
        return
    counters[name] += 1
