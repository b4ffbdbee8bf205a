"""Claims of the real clock, randomness and threads."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from kvstore.adapters.system import SystemClock, SystemRandom, ThreadExecutor
from kvstore.errors import NodeStopped


def test_the_clock_gives_seconds_that_never_go_back_and_milliseconds_of_this_century():
    clock = SystemClock()
    readings = [clock.monotonic() for _ in range(100)]
    assert readings == sorted(readings)
    assert clock.wall_ms() > 1_600_000_000_000


def test_the_clock_goes_on_while_the_machine_is_suspended(monkeypatch):
    """A lease is over after its time, whoever slept meanwhile: CLOCK_MONOTONIC stands still."""
    since_boot = {7: time.monotonic() + 3600.0}
    monkeypatch.setattr(time, "CLOCK_BOOTTIME", 7, raising=False)
    monkeypatch.setattr(time, "clock_gettime", since_boot.__getitem__)
    assert SystemClock().monotonic() == since_boot[7]


def test_a_system_without_that_clock_has_its_monotonic_one(monkeypatch):
    def refuse(_clock: int) -> float:
        raise OSError("not here")

    monkeypatch.setattr(time, "clock_gettime", refuse)
    before = time.monotonic()
    assert before <= SystemClock().monotonic() <= time.monotonic()


def test_streams_of_randomness_differ_even_under_one_name():
    source = SystemRandom()
    assert source.stream("a").randbytes(16) != source.stream("a").randbytes(16)


async def test_work_runs_in_a_named_thread_and_its_result_and_error_come_back():
    executor = ThreadExecutor(1, "flush")
    name = await executor.run(lambda: threading.current_thread().name)
    assert name.startswith("flush")

    def fail() -> None:
        raise LookupError("told")

    with pytest.raises(LookupError, match="told"):
        await executor.run(fail)
    executor.close()


async def test_no_more_threads_run_than_were_allowed():
    executor = ThreadExecutor(2, "two")
    barrier = threading.Barrier(2)
    await asyncio.gather(*[executor.run(barrier.wait) for _ in range(4)])  # pairs must meet
    executor.close()


async def test_a_closed_executor_has_done_its_work_and_refuses_more():
    executor = ThreadExecutor(1, "last")
    done: list[int] = []
    waiting = asyncio.ensure_future(executor.run(lambda: done.append(1)))
    await asyncio.sleep(0)
    executor.close()
    assert done == [1]
    await waiting
    with pytest.raises(NodeStopped):
        await executor.run(lambda: None)
