"""What the task that reads a pipe awaits: one callback of the loop is saved for every frame."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Generator
from typing import Any

from kvstore.sim.process import PROCESS


class Reader:
    """As a future, but an arrival steps the task itself, at once.

    A future would take one more callback of the loop for every frame. A process that is held (paused, dead, or to be
    killed at some step) gets that callback, since each of its steps must be seen.
    """

    __slots__ = ("_asyncio_future_blocking", "_cancelled", "_context", "_loop", "_wakeup")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Of one pipe, for each frame that is waited for in turn."""
        self._loop = loop
        self._asyncio_future_blocking = False  # asyncio asks: was this object really awaited?
        self._wakeup: Callable[[Any], object] | None = None
        self._context: contextvars.Context | None = None
        self._cancelled = False

    def __await__(self) -> Generator[Reader, None, None]:
        assert self._wakeup is None, "two readers on one pipe"
        self._asyncio_future_blocking = True
        yield self

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def add_done_callback(
        self, wakeup: Callable[[Any], object], *, context: contextvars.Context
    ) -> None:
        self._wakeup, self._context = wakeup, context

    def result(self) -> None:
        """Raises: CancelledError."""
        if self._cancelled:
            self._cancelled = False
            raise asyncio.CancelledError

    def cancel(self, msg: object = None) -> bool:  # noqa: ARG002 - tasks give one
        if self._wakeup is None:
            return False  # nobody waits any more: the task is about to run
        self._cancelled = True
        self.wake()
        return True

    def wake(self) -> None:
        """Its task runs soon."""
        wakeup, self._wakeup = self._wakeup, None
        if wakeup is not None:
            self._loop.call_soon(wakeup, self, context=self._context)

    def step(self) -> None:
        """Its task runs now. Only where no other task runs."""
        wakeup, context = self._wakeup, self._context
        if wakeup is None or context is None:
            return
        process = context.get(PROCESS)
        if process is not None and process.held:
            self.wake()
        else:
            self._wakeup = None
            context.run(wakeup, self)
