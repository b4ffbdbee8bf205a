"""A network inside one process: pipes between a node and the clients of the same event loop. No ports, no delay.

A pipe holds a bounded number of bytes towards each side; beyond it `try_send` refuses and `send` waits, as sockets do.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

from kvstore.errors import KVError, PipeClosed
from kvstore.ports import FramePipe
from replication.errors import FrameError

HIGH_WATER_BYTES: Final = 1 << 20

OnPipe = Callable[[str, FramePipe], Awaitable[None]]


class LocalPipe:
    """One side of a connection; see kvstore.ports.FramePipe."""

    __slots__ = ("arrived", "bytes", "closed", "frames", "other", "room")

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()  # for our side to receive
        self.bytes = 0
        self.closed = False
        self.arrived: asyncio.Future[None] | None = None  # our receiver waits
        self.room: asyncio.Future[None] | None = None  # the other side's sender waits
        self.other: LocalPipe

    @classmethod
    def pair(cls) -> tuple[LocalPipe, LocalPipe]:
        one, two = cls(), cls()
        one.other, two.other = two, one
        return one, two

    def try_send(self, frame: bytes) -> bool:
        other = self.other
        if self.closed or other.closed:
            raise PipeClosed("the connection is closed")
        if other.bytes >= HIGH_WATER_BYTES:
            return False
        other.frames.append(frame)
        other.bytes += len(frame)
        _wake(other.arrived)
        return True

    async def send(self, frame: bytes) -> None:
        while not self.try_send(frame):
            other = self.other
            if other.room is None or other.room.done():
                other.room = asyncio.get_running_loop().create_future()
            await other.room

    async def receive(self) -> bytes:
        while not self.frames:
            if self.closed or self.other.closed:
                raise PipeClosed("the connection is closed")
            self.arrived = asyncio.get_running_loop().create_future()
            await self.arrived
        frame = self.frames.popleft()
        self.bytes -= len(frame)
        if self.bytes < HIGH_WATER_BYTES:
            _wake(self.room)
        return frame

    def buffered_bytes(self) -> int:
        return self.other.bytes

    def abort(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.frames.clear()
        for side in (self, self.other):
            _wake(side.arrived)
            _wake(side.room)

    async def close(self, timeout_s: float) -> None:  # noqa: ARG002 - nothing to wait for
        """What was handed over is with the other side already."""
        if self.closed:
            return
        self.closed = True
        for side in (self, self.other):
            _wake(side.arrived)
            _wake(side.room)


def _wake(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)


class LocalNetwork:
    """See kvstore.ports.Network. Addresses are names; one listener each."""

    def __init__(self) -> None:
        self._listeners: dict[str, OnPipe] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def dial(self, address: str, path: str, timeout_s: float) -> LocalPipe:  # noqa: ARG002 - at once
        on_pipe = self._listeners.get(address)
        if on_pipe is None:
            raise PipeClosed(f"nobody listens at {address}")
        ours, theirs = LocalPipe.pair()
        task = asyncio.get_running_loop().create_task(self._run(on_pipe, path, theirs))
        self._tasks[id(task)] = task
        task.add_done_callback(lambda done: self._tasks.pop(id(done), None))
        return ours

    async def _run(self, on_pipe: OnPipe, path: str, pipe: LocalPipe) -> None:
        try:
            await on_pipe(path, pipe)
        except (KVError, FrameError):
            pass  # a refused handshake, or the end of the connection
        finally:
            pipe.abort()

    async def serve(self, address: str, on_pipe: OnPipe) -> str:
        self._listeners[address] = on_pipe
        return address

    async def close(self) -> None:
        self._listeners.clear()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
