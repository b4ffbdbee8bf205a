"""Many seeds on worker processes that may die or hang: each seed gets a verdict, and the run always ends.

1. A worker has one seed at a time. If its process ends meanwhile (killed, out of memory, a segmentation fault), that
   seed has failed, the problem says how the process ended, and another worker takes its place.
2. A worker that is on one seed for more than `limit_s` dumps where it is and ends itself: a thread of faulthandler does
   it, which needs neither the interpreter's lock nor the event loop. One that cannot even do that is killed by the parent.
3. A worker's memory is bounded: it is replaced after `recycle` seeds, or when it has grown, and the operating system
   refuses it more than MEMORY_BYTES_MAX.
4. When the parent ends in whatever way, so do the workers: their pipe ends.

`multiprocessing.Pool` has none of these: it waits for ever for the result of a worker that has died.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Final

from kvstore.sim.loop import heap_set_aside
from kvstore.sim.scenario import Options
from tools.simulation.judging import Verdict

TICK_S: Final = 1.0
GRACE_S: Final = 10.0  # which a worker has for dumping where it hangs, before it is killed
START_S: Final = 60.0  # which a new process has until it asks for work
JOIN_S: Final = 5.0
RECYCLE_SEEDS: Final = 100
RECYCLE_BYTES: Final = 1 << 30
MEMORY_BYTES_MAX: Final = 4 << 30
PROBLEMS_MAX: Final = 10  # of one verdict on its way to the parent, each of so many characters
PROBLEM_CHARACTERS_MAX: Final = 3_000
LOG_BYTES_MAX: Final = 8_000

Work = tuple[int, Options]
Judge = Callable[[int, Options], Verdict]


class Fleet:
    """Args: judge: a function of a module, since another process imports it. jobs: processes at once.
    limit_s: real seconds for one seed; 0: no limit. recycle: seeds until a worker is replaced."""

    def __init__(
        self,
        judge: Judge,
        *,
        jobs: int,
        limit_s: float,
        recycle: int = RECYCLE_SEEDS,
        grace_s: float = GRACE_S,
    ) -> None:
        assert jobs >= 1
        self._judge = judge
        self._jobs, self._limit_s, self._grace_s, self._recycle = jobs, limit_s, grace_s, recycle

    def play(self, work: Iterable[Work]) -> Iterator[Verdict | None]:
        """Verdicts as they come, in any order; None once a second or so, when there is no news.

        Close the iterator (or leave it to its end): workers that are still busy are killed.
        """
        left = iter(work)
        idle: list[_Worker] = []
        busy: list[_Worker] = []
        with tempfile.TemporaryDirectory(prefix="kvorum-simulate-") as directory:
            self._directory, self._started = Path(directory), 0
            try:
                while True:
                    while len(busy) < self._jobs and (item := next(left, None)) is not None:
                        worker = idle.pop() if idle else self._start()
                        busy.append(worker)
                        worker.give(item, self._limit_s)
                    if not busy:
                        return
                    ready = wait([worker.connection for worker in busy], TICK_S)
                    for worker in list(busy):
                        verdict = self._news(worker, worker.connection in ready)
                        if verdict is not None:
                            busy.remove(worker)
                            if not worker.ended:
                                idle.append(worker)
                            yield verdict
                    if not ready:
                        yield None
            finally:
                for worker in (*busy, *idle):
                    worker.end()

    def _start(self) -> _Worker:
        self._started += 1
        log = self._directory / f"worker-{self._started}.log"
        return _Worker(self._judge, self._limit_s, self._recycle, log)

    def _news(self, worker: _Worker, is_ready: bool) -> Verdict | None:
        if is_ready:
            return worker.take()
        if self._limit_s and time.monotonic() > worker.deadline_at + self._grace_s:
            worker.end()
            return worker.failure(f"hang: no end within {self._limit_s:g} s, and no word of where")
        return None


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, judge: Judge, limit_s: float, recycle: int, log: Path) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads and locks
        self.connection, theirs = context.Pipe()
        self.deadline_at = float("inf")
        self.ended = False
        self._limit_s = limit_s
        self._log = log
        self._seed = 0
        self._is_ready = False
        self._process = context.Process(
            target=_serve, args=(theirs, judge, limit_s, recycle, str(log)), daemon=True
        )
        self._process.start()
        theirs.close()

    def give(self, item: Work, limit_s: float) -> None:
        self._seed = item[0]
        self.deadline_at = time.monotonic() + (limit_s if self._is_ready else START_S)
        with contextlib.suppress(OSError):  # it is dead: `take` will say so
            self.connection.send(item)

    def take(self) -> Verdict | None:
        """The verdict that has come; or what became of the process, if it has ended. None: it has started, no more."""
        try:
            verdict, is_last = self.connection.recv()
        except (EOFError, OSError):
            self.end(wait_s=JOIN_S)
            return self.failure(self._death())
        if verdict is None:
            self._is_ready, self.deadline_at = True, time.monotonic() + self._limit_s
            return None
        assert isinstance(verdict, Verdict)
        if is_last:
            self.end(wait_s=JOIN_S)
        return verdict

    def end(self, *, wait_s: float = 0.0) -> None:
        """The process is gone afterwards; it may end by itself within `wait_s`."""
        self.ended = True
        self.connection.close()
        self._process.join(wait_s)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join(JOIN_S)

    def failure(self, problem: str) -> Verdict:
        return Verdict(self._seed, [problem])

    def _death(self) -> str:
        said = self._said()
        if "Timeout (" in said:
            return f"hang: no end within {self._limit_s:g} s; it was here:\n{said}"
        code = self._process.exitcode
        if code is not None and code < 0:
            how = f"killed by {signal.Signals(-code).name}"
        else:
            how = f"exit status {code}"
        return f"died: the process of this seed ended, {how}\n{said}".rstrip()

    def _said(self) -> str:
        """The end of what it wrote to its standard error."""
        try:
            return self._log.read_bytes()[-LOG_BYTES_MAX:].decode(errors="replace").strip()
        except OSError:
            return ""


# ---------------------------------------------------------------- in the worker


def _serve(
    connection: Connection, judge: Judge, limit_s: float, recycle: int, log_path: str
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    with open(log_path, "a", encoding="utf-8") as log, contextlib.ExitStack() as stack:
        os.dup2(log.fileno(), sys.stderr.fileno())
        faulthandler.enable(log)
        _limit_memory()
        stack.enter_context(heap_set_aside())  # each seed has some collections
        connection.send((None, False))  # from now on time counts
        for count in range(1, recycle + 1):
            try:
                seed, options = connection.recv()
            except (EOFError, OSError):
                return  # the parent wants no more, or is gone
            log.truncate(0)
            if limit_s:
                faulthandler.dump_traceback_later(limit_s, exit=True, file=log)
            verdict, is_sound = _judged(judge, seed, options)
            faulthandler.cancel_dump_traceback_later()
            is_last = count == recycle or not is_sound or _memory_bytes() > RECYCLE_BYTES
            connection.send((verdict, is_last))
            if is_last:
                return


def _judged(judge: Judge, seed: int, options: Options) -> tuple[Verdict, bool]:
    """The verdict, small enough for the pipe; and whether this process is as good as new."""
    try:
        verdict = judge(seed, options)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this seed's failure
        text = "".join(traceback.format_exception(error))[-PROBLEM_CHARACTERS_MAX:]
        return Verdict(seed, [f"judge: it raised {error!r}"[:500] + f"\n{text}"]), False
    problems = [text[:PROBLEM_CHARACTERS_MAX] for text in verdict.problems[:PROBLEMS_MAX]]
    return replace(verdict, problems=problems, result=None), True


def _limit_memory() -> None:
    with contextlib.suppress(OSError, ValueError):  # not every system knows this limit
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))


def _memory_bytes() -> int:
    """The most that this process has ever used. Linux's getrusage begins with what its parent had used, which may be much."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_bytes().splitlines():
            if line.startswith(b"VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
