"""Which parts were decided lately: spares most look-ups of rows that do not exist.

Every command asks first what is known of its transaction, and nearly always nothing is. D1 **`absent` is only said of a
transaction for which no row of the DECIDED family exists.** It rests on two facts: the row of the range carries the largest
begin_ts of any such row ever written, in the same write batch; and since the replica started every one that was written
has been remembered here, or has raised the floor when it was forgotten. So a transaction that began above the floor and is
not remembered has no row. (False only means: look.)
"""

from __future__ import annotations

from collections import deque
from typing import Final

REMEMBERED_MAX: Final = 1_024


class RecentlyDecided:
    """Args: floor: the largest begin_ts of the rows that were there before."""

    __slots__ = ("_floor", "_order", "_recent")

    def __init__(self, floor: int) -> None:
        self._floor = floor.to_bytes(8, "big")  # compared with the first bytes of a txn_id
        self._recent: dict[bytes, None] = {}
        self._order: deque[bytes] = deque()  # of the same, the oldest first

    def absent(self, txn_id: bytes) -> bool:
        """Whether surely no row of this transaction's parts exists."""
        return txn_id[:8] > self._floor and txn_id not in self._recent

    def add(self, txn_id: bytes) -> None:
        """A row of it is being written."""
        recent, order = self._recent, self._order
        if txn_id in recent:
            return
        recent[txn_id] = None
        order.append(txn_id)
        if len(order) > REMEMBERED_MAX:
            oldest = order.popleft()
            del recent[oldest]
            self._floor = max(self._floor, oldest[:8])
