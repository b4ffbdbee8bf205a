"""Closed timestamps: what lets any replica answer reads alone (DESIGN.md section 8).

Story. A leader promises that nothing new appears in its range at or below a timestamp: it *closes* it. The promise travels in
its entries, and when there are none as a message (term, applied index, timestamp) to its followers. A replica that has applied
that much, and leaves out what is undecided, knows everything at or below its safe timestamp, for ever: it serves reads there,
without a leader, a latch, a question to an anchor, or a lock holder.

F1 (I13) a closed timestamp had been issued when it was chosen, and lies below each min_ts that is in flight. What waits for
   the oracle compares its timestamp with what was promised, in entries not applied and in messages too, and asks again.
F2 a message leaves only if leadership was confirmed *after* the timestamp was chosen: a successor's timestamps are issued
   later, hence above it. So a successor need not know what was promised in messages; what entries promised it has applied.
   An entry needs no confirmation: it is committed in its term, or it promises nothing.
F3 (I14) safe_ts = min(closed, the oldest undecided min_ts - 1), at the replica's own applied index. A part that is prepared
   later has a min_ts above what was closed; one that is resolved later commits at or above its min_ts. What is safe stays safe.
F4 a message counts once its index is applied, not before: what it promises to be whole is only then here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from txn.commands import Commit, PreparePart
from txn.messages import Failure, Read, Reply, Scan
from txn.mvcc import Budget
from txn.reads import read_keys, read_span
from txn.types import TIMESTAMP_MAX

if TYPE_CHECKING:
    from txn.evaluate import Evaluator
    from txn.ports import Rows
    from txn.state import RangeRow, RangeState

REPLICA_BEHIND = "replica_behind"


class Closing:
    """A leader's side, for one term. `promised`: the highest timestamp that it closed, told to anybody or not."""

    __slots__ = ("_evaluator", "promised")

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self.promised = 0

    def start(self) -> None:
        """Everything inherited is applied: what entries promised holds."""
        self.promised = max(self.promised, self._evaluator.state.row.closed_ts)

    def close(self, upto: int) -> int:
        """Close `upto`, which has been issued, or as much below it as is possible now. Returns what is closed (F1)."""
        if self._evaluator.ready and upto > self.promised:
            self.promised = max(self.promised, min(upto, self._lowest_in_flight() - 1))
        return self.promised

    def _lowest_in_flight(self) -> int:
        """Of everything that has its timestamp and is not applied. It is latched all that time."""
        lowest = TIMESTAMP_MAX + 1
        for pending in self._evaluator.latches.txns.values():
            command = pending.command
            kind = type(command)
            if kind is Commit:
                lowest = min(lowest, command.commit_ts)  # type: ignore[union-attr]
            elif kind is PreparePart:
                lowest = min(lowest, command.min_ts)  # type: ignore[union-attr]
        return lowest


def safe_ts(state: RangeState, closed_ts: int) -> int:
    """F3."""
    return min(closed_ts, state.oldest_min_ts() - 1) if state.parts else closed_ts


class Heard:
    """What a replica was told in messages: one promise that counts, and the newest one that does not yet (F4)."""

    __slots__ = ("_closed", "_index", "_next_closed", "_next_index")

    def __init__(self) -> None:
        self._index = self._closed = self._next_index = self._next_closed = 0

    def hear(self, index: int, closed_ts: int, row: RangeRow) -> None:
        """The leader, when it had applied `index`, had closed `closed_ts`."""
        self.closed(row)
        if closed_ts > self._next_closed:
            self._next_index, self._next_closed = index, closed_ts

    def closed(self, row: RangeRow) -> int:
        """The highest closed timestamp that counts where the replica stands now."""
        applied = row.applied_index
        if self._next_closed > self._closed and self._next_index <= applied:
            self._index, self._closed = self._next_index, self._next_closed
        if self._index <= applied and self._closed > row.closed_ts:
            return self._closed
        return row.closed_ts


def read_here(
    state: RangeState, rows: Rows, request: Read | Scan, safe: int, budget: Budget | None = None
) -> Reply:
    """Answer at `request.at` (0: at `safe`) from what is applied here; refuse what lies above `safe`. Never waits.

    What is looked at is taken from `budget`.
    """
    row = state.row
    budget = Budget() if budget is None else budget
    at = request.at or safe
    if request.version and request.version != row.version:
        return Failure(request.id, "epoch_mismatch")
    if at > safe or not at:
        return behind(request.id, safe, at)
    if at < row.gc_threshold:
        return Failure(request.id, "snapshot_too_old")
    if type(request) is Read:
        if not all(state.owns(key) for key in request.keys):
            return Failure(request.id, "epoch_mismatch")
        return read_keys(rows, request, at, budget)
    assert type(request) is Scan
    start, end = request.start, request.end or row.end
    if not state.has_span(start, end):
        return Failure(request.id, "epoch_mismatch")
    return read_span(rows, request, start, end, at, budget)


def behind(request_id: int, safe: int, wanted: int) -> Failure:
    """This replica cannot answer: its safe timestamp is too low."""
    message = f"the replica is safe up to {safe}, and {wanted or 'a newer one'} is wanted: ask another one, or the leader"
    return Failure(request_id, REPLICA_BEHIND, message, {"safe_ts": safe})


__all__ = ["REPLICA_BEHIND", "Closing", "Heard", "behind", "read_here", "safe_ts"]
