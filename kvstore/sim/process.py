"""Processes of the simulated world: tasks and timers that live, stop and die together.

Every callback belongs to the process in whose context it was scheduled (asyncio hands contexts on by itself), or to
none: then it is the world's. A paused process runs no callback; they wait, in order, until it is resumed, while time
goes on. A callback that waits for the disk makes its process busy: it runs to its end at once, but by the clock of the
time when it is over (`when`), what it sends leaves then, and no other callback runs before. A dead process never runs
another: no `finally`, no `except` of its tasks is executed, as under SIGKILL. Its tasks are kept until the loop ends,
since collecting a coroutine would run its cleanup.
"""

from __future__ import annotations

import asyncio
import contextvars
from asyncio import events
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar
from typing import Any, Final, TypeVar

T = TypeVar("T")

CLOSE_ATTEMPTS: Final = 100  # a coroutine may await in its cleanup, again and again


class Killed(BaseException):
    """The process died within this call: unwind, and run nothing more. Not an Exception, so that nobody handles it."""


class ProcessDied(RuntimeError):
    """What the world waited for will never come: its process is dead."""


class Process:
    """One process. Args: name: for people."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.paused = False
        self.busy_until = 0.0  # when the callback that ran last is over, if it waited in between
        self.held = (
            False  # dead, paused, busy or with a fuse: each of its callbacks is looked at (`takes`)
        )
        self.clock_rate = 1.0  # of its machine's monotonic clock, by which its timers go
        self.parked: list[events.Handle] = []
        self._busy = False
        self._leaving: list[Callable[[], None]] = []  # what a busy one has sent
        self.tasks: dict[int, asyncio.Task[Any]] = {}  # that have not ended, by number
        self._fuse = 0  # steps until `_on_fuse`; 0: there is none
        self._on_fuse: Callable[[], None] = lambda: None
        self._deaths: dict[int, asyncio.Future[None]] = {}
        self._context = contextvars.copy_context()
        self._context.run(PROCESS.set, self)

    def context(self) -> Context:
        """For callbacks and tasks that the world gives to this process."""
        return self._context.copy()

    def spawn(self, coro: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        return asyncio.get_running_loop().create_task(coro, context=self.context())

    async def call(self, coro: Coroutine[Any, Any, T]) -> T:
        """Run it in the process and wait, from outside. Raises ProcessDied: then it has not ended, and never will."""
        task = self.spawn(coro)
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._deaths[id(ended)] = ended
        task.add_done_callback(lambda _: _set(ended))
        await ended
        self._deaths.pop(id(ended), None)
        if not task.done():
            raise ProcessDied(self.name)
        return task.result()

    def kill(self) -> None:
        """At once. May be called from within the process: raise Killed then."""
        if self.dead:
            return
        self.dead = self.held = True
        self.parked.clear()
        self._leaving.clear()
        for ended in self._deaths.values():
            _set(ended)

    def light(self, steps: int, then: Callable[[], None]) -> None:
        """Call `then` (as the world) before the callback that is this process's so-many-th from now on.

        Every resumption of an await is a callback: a `then` that kills the process kills it at that await.
        """
        assert steps > 0
        self._fuse, self._on_fuse = steps, then
        self._hold()

    def takes(self, handle: events.Handle) -> bool:
        """Whether this callback runs now, though the process is held: what is left is a step of its fuse."""
        if self.paused or self._busy:
            self.parked.append(handle)
            return False
        if self._fuse and not self.dead:
            self._fuse -= 1
            if self._fuse == 0:
                outside(self._on_fuse)
                self._hold()
        return not self.dead

    def unlight(self) -> None:
        self._fuse = 0
        self._hold()

    def _hold(self) -> None:
        self.held = self.dead or self.paused or self._busy or self._fuse > 0

    @property
    def lit(self) -> bool:
        return self._fuse > 0

    def pause(self) -> None:
        self.paused = self.held = True

    def resume(self) -> list[events.Handle]:
        """Returns what waits to run; the loop runs it (`SimLoop.resume`).

        What arrived comes first, then the timers that are due: so do event loops when a stopped process goes on.
        """
        self.paused = False
        return self._released()

    def work_until(self, when: float) -> None:
        """The callback that runs now is over at `when`."""
        self.busy_until, self._busy, self.held = when, True, True

    def worked(self) -> list[events.Handle]:
        """It is busy no longer. Returns what waits to run, as `resume`."""
        self._busy = False
        return self._released()

    def when(self, now: float) -> float:
        """What time it is for the callback that runs."""
        return max(now, self.busy_until)

    def leaves_later(self, send: Callable[[], None]) -> bool:
        """Whether it is busy. Then `send` is done when it goes on, and never if it dies before."""
        if self._busy:
            self._leaving.append(send)
        return self._busy

    def _released(self) -> list[events.Handle]:
        self._hold()
        if self.paused or self._busy:
            return []
        leaving, self._leaving = self._leaving, []
        for send in leaving:
            send()
        parked, self.parked = self.parked, []
        parked.sort(key=lambda handle: isinstance(handle, events.TimerHandle))
        return parked


PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def process_of(context: Context | None) -> Process | None:
    """Whose a callback is that is scheduled with this context (None: the current one)."""
    return PROCESS.get() if context is None else context.get(PROCESS)


def world() -> Context:
    """A context for callbacks that are nobody's."""
    context = contextvars.copy_context()
    context.run(PROCESS.set, None)
    return context


def outside(function: Callable[..., T], *args: Any) -> T:
    """Call it as the world, from wherever."""
    return world().run(function, *args)


class SimHandle(events.Handle):
    """A callback, of a process or of nobody (None). Sets what its parent would, without a call: there are thousands in
    each second. The loop calls what is in it itself, unless its process is held."""

    __slots__ = ("_process",)

    def __init__(
        self, process: Process | None, callback: Any, args: Any, loop: Any, context: Context | None
    ) -> None:
        self._process = process
        self._callback, self._args, self._loop = callback, args, loop
        self._context = contextvars.copy_context() if context is None else context
        self._cancelled, self._repr, self._source_traceback = False, None, None


class SimTimerHandle(events.TimerHandle):
    """A timer, likewise."""

    __slots__ = ("_process",)

    def __init__(
        self,
        process: Process | None,
        when: float,
        callback: Any,
        args: Any,
        loop: Any,
        context: Any,
    ) -> None:
        self._process = process
        self._when, self._scheduled = when, False
        self._callback, self._args, self._loop = callback, args, loop
        self._context = contextvars.copy_context() if context is None else context
        self._cancelled, self._repr, self._source_traceback = False, None, None


def bury(task: asyncio.Task[Any]) -> None:
    """End a task of a dead process, when its world is over: whatever its cleanup does comes to nothing."""
    if task.done():
        return
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001  # the only way to say so
    coro: Any = task.get_coro()
    for _ in range(CLOSE_ATTEMPTS):
        try:
            coro.close()
        except BaseException:  # noqa: BLE001, S112  # it goes on cleaning up
            continue
        return
