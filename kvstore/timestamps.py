"""The client's questions to the timestamp oracle: all of one loop turn share one request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvstore.bell import Bell
from kvstore.errors import KVError
from kvstore.links import Answer, OnReply
from txn.messages import Timestamps

Send = Callable[[float, OnReply], object]


class LastIssued:
    """`send(deadline, on_reply)` sends one GetTimestamps to the oracle; it may raise a KVError."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._unsent: Bell[Answer] | None = None

    async def ask(self, deadline: float) -> Timestamps:
        """The last issued timestamp. Joins a request only before it has left: else the answer could be too old."""
        waiting = self._unsent
        if waiting is None:
            loop = asyncio.get_running_loop()
            waiting = self._unsent = Bell(loop)
            loop.call_soon(self._leave, waiting, deadline)
        reply = await waiting.wait()
        if isinstance(reply, KVError):
            raise reply
        assert isinstance(reply, Timestamps)
        return reply

    def _leave(self, waiting: Bell[Answer], deadline: float) -> None:
        self._unsent = None
        try:
            self._send(deadline, waiting.ring)
        except KVError as error:
            waiting.ring(error)
