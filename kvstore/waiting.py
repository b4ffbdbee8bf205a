"""The bytes of large requests of clients, from their arrival to their answer, wherever they wait meanwhile: for a turn,
a leader, the oracle, a latch, a lock.

Small ones are bounded by their number, and not counted: an operation costs nothing here, and what others wait for (a decision,
say) is let in when large ones have filled everything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kvstore.store import Asker
    from txn.messages import Reply

HEAVY_BYTES: Final = 4 << 10  # requests of more, on average in their frame, are counted
WAITING_INBOXES: Final = 4  # times what may wait for a turn


class Waiting:
    """Of one node. `bytes`: of what is counted and not answered."""

    def __init__(self, inbox_bytes_max: int) -> None:
        self.bytes = 0
        self._bytes_max = WAITING_INBOXES * inbox_bytes_max

    def share(self, size_bytes: int, requests: int) -> int:
        """What each request of a frame counts; 0: they are small."""
        share = size_bytes // requests if requests else 0
        return share if share > HEAVY_BYTES else 0

    def has_room(self, size_bytes: int) -> bool:
        return self.bytes + size_bytes <= self._bytes_max


class Heavy:
    """Who asked a large request: its bytes count until it is answered. A store's Asker."""

    __slots__ = ("_asker", "_bytes", "_waiting")

    def __init__(self, waiting: Waiting, asker: Asker, size_bytes: int) -> None:
        self._waiting, self._asker, self._bytes = waiting, asker, size_bytes
        waiting.bytes += size_bytes

    def answer(self, reply: Reply) -> None:
        self._waiting.bytes -= self._bytes
        self._asker.answer(reply)
