"""Connections that are queues inside one loop: the network of a dumb cluster."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from kvstore.errors import PipeClosed


class Pipe:
    """One end of a connection that is two queues."""

    def __init__(self) -> None:
        self.other: Pipe
        self.inbox: deque[bytes] = deque()
        self.closed = False
        self.frames_sent = 0
        self._waiter: asyncio.Future[None] | None = None

    def try_send(self, frame: bytes) -> bool:
        if self.closed:
            raise PipeClosed
        self.frames_sent += 1
        self.other.inbox.append(frame)
        self.other.wake()
        return True

    async def send(self, frame: bytes) -> None:
        self.try_send(frame)

    async def receive(self) -> bytes:
        while not self.inbox:
            if self.closed:
                raise PipeClosed
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self.inbox.popleft()

    def buffered_bytes(self) -> int:
        return 0

    def abort(self) -> None:
        for end in (self, self.other):
            end.closed = True
            end.wake()

    async def close(self, timeout_s: float) -> None:
        self.abort()

    def wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


OnPipe = Callable[[str, Pipe], Awaitable[None]]


class QueueNetwork:
    """The Network port, inside one loop."""

    def __init__(self) -> None:
        self.listeners: dict[str, OnPipe] = {}
        self.pipes: list[Pipe] = []
        self.dials: list[str] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def dial(self, address: str, path: str, timeout_s: float) -> Pipe:
        self.dials.append(address)
        await asyncio.sleep(0)
        on_pipe = self.listeners.get(address)
        if on_pipe is None:
            raise PipeClosed(f"nobody listens at {address}")
        here, there = Pipe(), Pipe()
        here.other, there.other = there, here
        self.pipes.append(here)

        async def attend() -> None:
            await on_pipe(path, there)

        self._tasks.append(asyncio.get_running_loop().create_task(attend()))
        return here

    async def serve(self, address: str, on_pipe: OnPipe) -> str:
        self.listeners[address] = on_pipe
        return address

    def cut(self) -> None:
        """Every connection ends."""
        for pipe in self.pipes:
            pipe.abort()
        self.pipes.clear()
