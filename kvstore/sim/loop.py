"""An event loop whose time is virtual: when nothing is ready it jumps to the next timer.

One seed gives one history: callbacks run in the order in which they were scheduled, blocking calls run inline and
complete at a drawn virtual time, sockets, processes and other threads are refused. Nothing here depends on the wall
clock, on addresses of objects or on the hash seed; what runs on the loop must not either (no iteration over sets, no
`asyncio.wait`, `TaskGroup`, `all_tasks`, `as_completed`).

When nothing is ready and no timer is left, nothing can ever happen again: that is a SimDeadlock, which names the tasks.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import random
import threading
import weakref
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import Context
from typing import Any, Final, NamedTuple, NoReturn, TypeVar, TypeVarTuple

from kvstore.sim.process import (
    PROCESS,
    Process,
    SimHandle,
    SimTimerHandle,
    bury,
    process_of,
    world,
)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

EPOCH_S: Final = (
    1000.0  # where virtual time begins: not 0, so that a forgotten 0.0 is seen as long ago
)
EXECUTOR_S: Final = (0.000_1, 0.005)  # how long a blocking call takes, drawn from between
RESOLUTION_S: Final = (
    0.000_001  # time goes on by this at least, or a delay below the clock's last bit never ends
)
ROUNDING_S: Final = 1e-9  # above what a clock loses in its last bits: a timer is not early by that
INSTANT_S: Final = 0.001
STEPS_MAX: Final = 50_000  # of the loop within one such instant of virtual time
COLLECT_STEPS: Final = 200_000  # steps of the loop between two garbage collections
LOOKED_AT_S: Final = 1.0  # within which whoever waits for a task has learned of its failure
UNSEEN: Final = "Task exception was never retrieved"  # as asyncio says it


class SimError(RuntimeError):
    """The simulated code did what the simulated world does not have."""


class SimDeadlock(SimError):
    """Nothing is ready and no timer is left, but the main coroutine has not ended."""


class SimLivelock(SimError):
    """Callbacks go on and on without time passing: a busy loop, which would burn a processor in the real world."""


class SimTimeout(SimError):
    """The main coroutine has not ended by the virtual time limit."""


class _Failure(NamedTuple):
    """A task that failed, and when. Weak: whether it is kept, and when it is collected, stays what it is."""

    task: weakref.ref[asyncio.Task[Any]]
    process: Process | None
    at: float


def _refuse(*_: Any, **__: Any) -> Any:
    raise SimError("there are no sockets, pipes, processes or signals in a simulation")


_REFUSED: Any = _refuse


class SimLoop(asyncio.BaseEventLoop):
    """Args: rng: draws the durations of blocking calls. time_limit_s: virtual seconds until SimTimeout is raised."""

    def __init__(self, rng: random.Random, *, time_limit_s: float = float("inf")) -> None:
        super().__init__()
        self.steps = 0
        self._rng = rng
        self.now = EPOCH_S  # what `time` returns; to be read only
        self._end = EPOCH_S + time_limit_s
        self._timers: list[tuple[float, int, events.TimerHandle]] = []  # a heap
        self._timers_made = 0
        self._here = 1  # the step in which the present instant began
        self._here_until_s = EPOCH_S + INSTANT_S
        self._created = 0
        self._running: dict[
            int, asyncio.Task[Any]
        ] = {}  # tasks of the world that have not ended, in order of creation
        self._processes: dict[int, Process] = {}  # that ever had a task
        self._failures: list[_Failure] = []  # that somebody may yet look at
        self._thread = threading.get_ident()
        self._world = world()

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        """Steps until the loop is stopped: with nothing ready, go to the next timer; then run what is ready now.

        One call makes them all, with what each step needs at hand in locals, and a callback is called from here, not by
        its handle: this is the simulator's hottest code.
        """
        ready: deque[Any] = self._ready  # type: ignore[attr-defined]
        timers, due, take, pop = self._timers, ready.append, ready.popleft, heapq.heappop
        steps = self.steps
        collect_at, busy_at = (steps // COLLECT_STEPS + 1) * COLLECT_STEPS, 0
        while True:
            self.steps = steps = steps + 1
            if steps == collect_at:
                collect_at += COLLECT_STEPS
                gc.collect()
            if not ready:
                while timers and timers[0][2]._cancelled:  # noqa: SLF001  # as asyncio does
                    pop(timers)
                if not timers:
                    self._deadlock()
                self.now = now = max(self.now + RESOLUTION_S, timers[0][0])
                if now > self._here_until_s:
                    self._begin_instant()
            if steps >= busy_at:
                busy_at = self._busy_at()
            now = self.now
            while timers and timers[0][0] <= now:  # never early, or it might be armed for ever
                due(pop(timers)[2])
            for _ in range(len(ready)):
                handle = take()
                process = handle._process  # noqa: SLF001
                if handle._cancelled or (  # noqa: SLF001
                    process is not None and process.held and not process.takes(handle)
                ):
                    continue
                try:
                    handle._context.run(handle._callback, *handle._args)  # noqa: SLF001
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:  # noqa: BLE001  # whatever it is, the others go on
                    self._failed(handle, error)
            if self._stopping:  # type: ignore[attr-defined]
                return

    def _busy_at(self) -> int:
        """The step that would be one too many, if time does not go on until then. It may; then this is asked again."""
        if self.steps >= self._here + STEPS_MAX:
            names = sorted({repr(handle) for handle in self._ready})  # type: ignore[attr-defined]
            raise SimLivelock(f"{STEPS_MAX} steps at {self.now:.3f}; now {names[:8]}")
        return self._here + STEPS_MAX

    def _failed(self, handle: Any, error: BaseException) -> None:
        """As asyncio's handles tell it."""
        callback = getattr(handle, "_callback", None)  # a handle's own repr has addresses in it
        message = (
            f"Exception in callback {getattr(callback, '__qualname__', type(callback).__name__)}"
        )
        self.call_exception_handler({"message": message, "exception": error, "handle": handle})

    def _deadlock(self) -> NoReturn:
        tasks = [*self._running.values()]
        for process in self._processes.values():
            tasks += process.tasks.values()
        names = ", ".join(task.get_name() for task in tasks)
        raise SimDeadlock(f"nothing is ready, no timer is left; tasks: {names}")

    def _begin_instant(self) -> None:
        """Time has gone on: no busy loop so far."""
        self._here, self._here_until_s = self.steps, self.now + INSTANT_S
        if self.now > self._end:
            raise SimTimeout(f"not done at {self.now:.3f}, after {self.steps} steps")

    def create_task(
        self,
        coro: Any,
        *,
        name: object = None,
        context: Context | None = None,
    ) -> asyncio.Task[Any]:
        number = self._created = self._created + 1
        process = process_of(context)
        task = super().create_task(coro, name=name or f"task-{number}", context=context)
        running = self._running if process is None else process.tasks
        if process is not None:
            self._processes[id(process)] = process
        running[number] = task

        def ended(_: object) -> None:
            running.pop(number, None)
            if task._log_traceback:  # noqa: SLF001 - asyncio's own mark: it failed, and nobody has looked yet
                self._failures.append(_Failure(weakref.ref(task), process, self.now))

        task.add_done_callback(ended)
        return task

    def unseen(self, process: Process | None = None, age_s: float = 0.0) -> list[BaseException]:
        """What tasks have failed with that nobody has looked at, once each. asyncio tells of one when it collects the
        task: too late for one in a cycle of references (such as an object that keeps its own task), never for one that
        somebody keeps.

        Args: process: of this one alone; None: of the world and all that live. age_s: only what failed so long ago; what
        is younger is left for later, or, if a process is named, to nobody: it dies, and who waited for the task with it.
        """
        found, left = [], []
        for failure in self._failures:
            task = failure.task()
            if task is None or not task._log_traceback:  # noqa: SLF001
                continue
            whose = failure.process
            if process is not whose if process is not None else whose is not None and whose.dead:
                left.append(failure)
                continue
            if self.now - failure.at >= age_s:
                error = task.exception()
                assert error is not None
                found.append(error)
            elif process is None:
                left.append(failure)
            else:
                task._log_traceback = False  # noqa: SLF001
        self._failures = left
        return found

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        if self._closed:  # type: ignore[attr-defined]
            self._check_closed()  # type: ignore[attr-defined]
        process = PROCESS.get() if context is None else context.get(PROCESS)
        handle = SimHandle(process, callback, args, self, context)
        if process is None or not process.dead:
            self._ready.append(handle)  # type: ignore[attr-defined]
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self.now + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """A process counts what is left by its own clock, as it would on a machine of its own."""
        if self._closed:  # type: ignore[attr-defined]
            self._check_closed()  # type: ignore[attr-defined]
        process = PROCESS.get() if context is None else context.get(PROCESS)
        if process is not None:
            now = self.now
            if process.clock_rate != 1.0:
                when = now + (when - now) / process.clock_rate + ROUNDING_S
            if process.held:
                when += process.when(now) - now
        timer = SimTimerHandle(process, when, callback, args, self, context)
        if process is not None and process.dead:
            return timer
        self._timers_made += 1
        heapq.heappush(self._timers, (when, self._timers_made, timer))
        return timer

    def timer(self, callback: Callable[[], object]) -> SimTimerHandle:
        """A timer of the world's, not armed yet; for who arms it again and again."""
        return SimTimerHandle(None, 0.0, callback, (), self, self._world)

    def arm(self, timer: SimTimerHandle, when: float) -> None:
        """Let it go off at `when`. Only if it went off since it was armed last, and was never cancelled."""
        self._timers_made += 1
        heapq.heappush(self._timers, (when, self._timers_made, timer))

    def resume(self, process: Process) -> None:
        """Let a paused process go on: first what has become due meanwhile, in order."""
        self._ready.extend(process.resume())  # type: ignore[attr-defined]

    def stand_still(self, process: Process, seconds: float) -> None:
        """The callback of `process` that runs now waits for so long, in the midst of what it does."""
        until = process.when(self.now) + seconds
        process.work_until(until)
        self.call_at(until, self._goes_on, process, context=self._world)

    def _goes_on(self, process: Process) -> None:
        if process.busy_until <= self.now and not process.dead:  # else it has waited once more
            self._ready.extend(process.worked())  # type: ignore[attr-defined]

    def bury(self) -> None:
        """At the very end: kill every process and take its tasks away. Nothing of them runs."""
        self._here = self.steps + 1
        self._end = float("inf")
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            for task in list(process.tasks.values()):
                bury(task)
            process.tasks.clear()

    def running(self) -> list[asyncio.Task[Any]]:
        """Tasks that have not ended, in order of creation."""
        return list(self._running.values())

    def run_in_executor(
        self,
        executor: Any,  # noqa: ARG002 - there is only this thread
        func: Callable[[*Ts], T],
        *args: *Ts,
    ) -> asyncio.Future[T]:
        """Runs now; the outcome is seen at a later virtual time."""
        future: asyncio.Future[T] = self.create_future()
        try:
            result = func(*args)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the future's outcome
            self.call_later(self._rng.uniform(*EXECUTOR_S), _settle, future, None, error)
        else:
            self.call_later(self._rng.uniform(*EXECUTOR_S), _settle, future, result, None)
        return future

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        if threading.get_ident() != self._thread:
            raise SimError("another thread calls into a simulation")
        return self.call_soon(callback, *args, context=context)

    def _process_events(self, event_list: list[Any]) -> None:
        assert not event_list

    def _write_to_self(self) -> None: ...

    getaddrinfo = getnameinfo = create_connection = create_server = _REFUSED
    create_datagram_endpoint = create_unix_connection = create_unix_server = _REFUSED
    connect_accepted_socket = connect_read_pipe = connect_write_pipe = sendfile = _REFUSED
    start_tls = subprocess_exec = subprocess_shell = _REFUSED
    add_signal_handler = remove_signal_handler = _REFUSED
    add_reader = remove_reader = add_writer = remove_writer = _REFUSED
    sock_recv = sock_recv_into = sock_sendall = sock_connect = sock_accept = _REFUSED


def _settle(future: asyncio.Future[T], result: Any, error: Exception | None) -> None:
    if future.done():
        return  # cancelled meanwhile
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


def run(
    main: Callable[[SimLoop], Coroutine[Any, Any, T]],
    seed: int,
    *,
    time_limit_s: float = float("inf"),
) -> T:
    """Run `main(loop)` to its end under a loop of its own and return what it returns.

    Processes are killed. Tasks of the world that are left over are cancelled in the order of their creation, and run to
    their end.
    Raises: SimDeadlock, SimTimeout, and whatever `main` raises.
    """
    loop = SimLoop(random.Random(f"{seed}/loop"), time_limit_s=time_limit_s)
    with _collected_by_steps():
        try:
            asyncio.set_event_loop(loop)
            return loop.run_until_complete(main(loop))
        finally:
            try:
                _cancel_all(loop)
            finally:
                asyncio.set_event_loop(None)
                loop.close()


def _cancel_all(loop: SimLoop) -> None:
    loop.bury()
    left = loop.running()
    for task in left:
        task.cancel()

    async def gathered() -> None:
        await asyncio.gather(*left, return_exceptions=True)

    if left:
        loop.run_until_complete(gathered())
    loop.run_until_complete(loop.shutdown_asyncgens())


_set_aside = 0  # how many blocks of `heap_set_aside` this process is in


@contextmanager
def heap_set_aside() -> Iterator[None]:
    """Collections do not look at what is there already, until the end of the outermost such block.

    That is most of what they cost: everything that was imported. A run does it by itself; who plays many does it once.
    """
    global _set_aside  # noqa: PLW0603 - the heap is the process's, too
    if not _set_aside:
        gc.freeze()
    _set_aside += 1
    try:
        yield
    finally:
        _set_aside -= 1
        if not _set_aside:
            gc.unfreeze()


@contextmanager
def _collected_by_steps() -> Iterator[None]:
    """Finalizers run at fixed steps only, else they would run when memory happens to be short.

    What was there before is set aside meanwhile: what ends in it would end in the midst of the run.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        with heap_set_aside():
            try:
                yield
            finally:
                gc.collect()
    finally:
        if enabled:
            gc.enable()
