"""The client's questions to the timestamp oracle: all of one loop turn share one request, if they have one deadline.

Or nearly: those of one turn with the same timeout read the clock one after the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from kvstore.bell import Bell
from kvstore.errors import KVError
from kvstore.links import Answer, OnReply
from txn.messages import Timestamps

SAME_S: Final = 0.01  # deadlines that lie no further apart are one

Send = Callable[[float, OnReply], object]


class LastIssued:
    """`send(deadline, on_reply)` sends one GetTimestamps to the oracle; it may raise a KVError."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._unsent: list[tuple[float, Bell[Answer]]] = []  # (deadline, who waits for it)

    async def ask(self, deadline: float) -> Timestamps:
        """The last issued timestamp. Joins a request only before it has left: else the answer could be too old."""
        waiting: Bell[Answer] | None = None
        for until, bell in self._unsent:
            if abs(until - deadline) <= SAME_S:
                waiting = bell
                break
        if waiting is None:
            loop = asyncio.get_running_loop()
            waiting = Bell(loop)
            self._unsent.append((deadline, waiting))
            if len(self._unsent) == 1:
                loop.call_soon(self._leave)
        reply = await waiting.wait()
        if isinstance(reply, KVError):
            raise reply
        assert isinstance(reply, Timestamps)
        return reply

    def _leave(self) -> None:
        unsent, self._unsent = self._unsent, []
        for deadline, waiting in unsent:
            try:
                self._send(deadline, waiting.ring)
            except KVError as error:
                waiting.ring(error)
