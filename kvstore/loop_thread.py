"""An event loop in a thread of its own, and calls of it from other threads: what the blocking client stands on.

A call is a task over there. When its caller is interrupted, or the loop is closed, the task is cancelled and comes to its end
before the loop stops: half an end would keep a directory locked, or leave a written value without anybody who knows of it.
Only when that takes longer than END_TIMEOUT_S is it left.

Whatever the work raises is its own caller's: a SystemExit too (user code runs in it), which asyncio would let end the loop, and
with it the calls of all. A loop belongs to the process that made it: in a child forked from it calls are refused, `close` does
nothing, and both look at the process before any lock, which a thread that is not there may hold. The thread is a daemon: the
interpreter's exit does not wait for it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, Generic, TypeVar

from kvstore.errors import ClientClosed, InvalidArgument, KVError

END_TIMEOUT_S: Final = 5.0  # for what is cancelled, to come to its end
JOIN_TIMEOUT_S: Final = 6.0  # for the thread, after all

T = TypeVar("T")


class _Exit(Exception):
    """Carries a SystemExit or KeyboardInterrupt out of a task: as itself it would go through the loop, and end it."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


class _Call(Generic[T]):
    """Work for the loop. `task` and `interrupted` belong to the loop; whoever called waits for `result`."""

    __slots__ = ("interrupted", "result", "task", "undo", "work")

    def __init__(
        self,
        work: Coroutine[Any, Any, T],
        undo: Callable[[T], Coroutine[Any, Any, object]] | None,
    ) -> None:
        self.work = work
        self.undo = undo
        self.result: concurrent.futures.Future[T] = concurrent.futures.Future()
        self.task: asyncio.Task[T] | None = None
        self.interrupted = False


class LoopThread:
    """Args: name: the thread's."""

    def __init__(self, name: str) -> None:
        from kvstore.adapters.loop import new_event_loop

        self._loop = new_event_loop()
        self._lock = threading.Lock()
        self._calls: dict[_Call[Any], None] = {}  # whose callers wait
        self._tasks: dict[
            asyncio.Task[Any], bool
        ] = {}  # and whether it is to be cancelled at the end
        self._closed = False
        self._ending: asyncio.Task[None] | None = None
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        try:
            self._thread.start()
        except BaseException:  # there are too many threads, or none are allowed
            self._loop.close()
            raise

    def call(
        self,
        work: Coroutine[Any, Any, T],
        undo: Callable[[T], Coroutine[Any, Any, object]] | None = None,
    ) -> T:
        """Run it there and wait. An interrupt (Ctrl-C) cancels it, and is raised when that has ended, END_TIMEOUT_S later at
        most. If it has succeeded all the same, its result goes to `undo`.

        Raises: ClientClosed, with maybe_committed if it had begun; what `work` raises.
        """
        try:
            self.require_caller()
        except KVError:
            work.close()
            raise
        call = _Call(work, undo)
        try:
            with self._lock:
                if self._closed:
                    raise ClientClosed
                self._calls[call] = None
                self._loop.call_soon_threadsafe(self._begin, call)
            return call.result.result()
        except concurrent.futures.CancelledError:
            raise ClientClosed(
                "the client was closed during the call: what it was to write may have been written",
                maybe_committed=True,
            ) from None
        except (
            BaseException
        ):  # an interrupt; or what the work raised, and then there is nothing to do
            self._give_up(call)
            raise
        finally:
            self._calls.pop(call, None)

    def require_caller(self) -> None:
        """Raises: ClientClosed in a process forked from the one of this loop; InvalidArgument on its thread."""
        if self._process != os.getpid():  # its thread is not here
            raise ClientClosed("it was opened before the fork: open another client here")
        if threading.current_thread() is self._thread:
            raise InvalidArgument("the client's own thread cannot wait for itself")

    def _give_up(self, call: _Call[Any]) -> None:
        """Cancel it, and wait for its end: the next call is not to find it under way."""
        if call not in self._calls:
            call.work.close()
            return
        with suppress(RuntimeError, TimeoutError, concurrent.futures.CancelledError):
            self._loop.call_soon_threadsafe(self._interrupt, call)  # a RuntimeError: it has ended
            call.result.exception(END_TIMEOUT_S)

    def close(self) -> None:
        """What other threads still wait for is cancelled, and ends with ClientClosed or as it may. Within JOIN_TIMEOUT_S. May
        be called again, and by several threads at once: each waits for the end."""
        if self._process != os.getpid():  # it is the parent's
            return
        with self._lock:
            self._closed = True
        with suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._end)
        try:
            self._thread.join(JOIN_TIMEOUT_S)
        finally:
            for call in list(self._calls):  # none, unless the loop hangs, or this is interrupted
                call.result.cancel()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    # --- on the loop ------------------------------------------------------------------------------

    def _begin(self, call: _Call[Any]) -> None:
        call.task = task = self._loop.create_task(_contained(call.work))
        self._note(task, cancelled_at_end=True)
        task.add_done_callback(lambda _: self._ended(call, task))

    def _note(self, task: asyncio.Task[Any], *, cancelled_at_end: bool) -> None:
        self._tasks[task] = cancelled_at_end
        task.add_done_callback(self._tasks.pop)

    def _ended(self, call: _Call[Any], task: asyncio.Task[Any]) -> None:
        result = call.result
        with suppress(concurrent.futures.InvalidStateError):  # `close` has not waited for it
            if task.cancelled():
                result.cancel()
            elif (error := task.exception()) is not None:
                result.set_exception(error.error if isinstance(error, _Exit) else error)
            else:
                result.set_result(task.result())
        self._undo(call, task)

    def _interrupt(self, call: _Call[Any]) -> None:
        call.interrupted = True
        task = call.task
        if task is None:  # it was to be handed over just then
            call.work.close()
            call.result.cancel()
        elif task.done():
            self._undo(call, task)
        else:  # not in this turn: what has never begun would not do what it does at its end
            self._loop.call_soon(_cancel, task)

    def _undo(self, call: _Call[Any], task: asyncio.Task[Any]) -> None:
        """Of a call that came to a result which nobody has seen."""
        if call.interrupted and call.undo and not task.cancelled() and task.exception() is None:
            undoing = self._loop.create_task(call.undo(task.result()))
            self._note(undoing, cancelled_at_end=False)
            call.undo = None

    def _end(self) -> None:
        if self._ending is not None:
            return
        self._loop.call_later(END_TIMEOUT_S, self._loop.stop)
        self._ending = self._loop.create_task(self._cancel_all())

    async def _cancel_all(self) -> None:
        for task, cancelled_at_end in self._tasks.items():
            if cancelled_at_end:
                _cancel(task)
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        self._loop.stop()


async def _contained(work: Coroutine[Any, Any, T]) -> T:
    try:
        return await work
    except (SystemExit, KeyboardInterrupt) as error:
        raise _Exit(error) from None


def _cancel(task: asyncio.Task[Any]) -> None:
    """Once: a second time would break off what it does at its end."""
    if not task.cancelling():
        task.cancel()
