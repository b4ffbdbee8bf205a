"""The real clock, the operating system's randomness, and threads."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from kvstore.errors import NodeStopped

T = TypeVar("T")


def _counting_sleep() -> Callable[[], float]:
    """A clock that goes on while the machine is suspended, where there is one: a lease must not outlast that."""
    try:
        time.clock_gettime(time.CLOCK_BOOTTIME)
    except (AttributeError, OSError):
        return time.monotonic
    return partial(time.clock_gettime, time.CLOCK_BOOTTIME)


class SystemClock:
    """See `kvstore.ports.Clock`."""

    def __init__(self) -> None:
        self.monotonic = _counting_sleep()

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000


class SystemRandom:
    """See `kvstore.ports.Random`: every stream is seeded by the operating system."""

    def stream(self, name: str) -> random.Random:  # noqa: ARG002 - the port's argument
        """A generator of its own; `name` only matters where a seed is replayed."""
        return random.Random(os.urandom(32))


class ThreadExecutor:
    """Blocking calls in threads of its own. See `kvstore.ports.Executor`.

    Args: threads_max: calls beyond it wait their turn. name: of the threads, for people.
    """

    def __init__(self, threads_max: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(max_workers=threads_max, thread_name_prefix=name)
        self._closed = False

    async def run(self, work: Callable[[], T]) -> T:
        """Raises: what `work` raises; NodeStopped after `close`."""
        if self._closed:
            raise NodeStopped("no more work is accepted")
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        """Blocks until what was accepted is done."""
        self._closed = True
        self._pool.shutdown(wait=True)
