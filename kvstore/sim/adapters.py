"""The simulated world as one node sees it: kvstore.node.Adapters over a `Machine`.

A machine outlives the processes that run on it: its disk, its engine's directory, its clocks. Every call that touches
the disk passes `Machine.io`, which tells the trace and may kill the process there: between a write and its sync, say.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Final, TypeVar

from crc32c import crc32c

from kvstore.adapters.memory_engine import MemoryDirectory, MemoryEngine
from kvstore.errors import DiskFull, EngineClosed
from kvstore.ports import FramePipe
from kvstore.sim.disk import INJECTED, SimDisk
from kvstore.sim.loop import SimLoop
from kvstore.sim.network import SimHost, SimNetwork
from kvstore.sim.process import PROCESS, Process
from kvstore.sim.trace import Trace

if TYPE_CHECKING:
    from kvstore.node import Node

T = TypeVar("T")
OnPipe = Callable[[str, FramePipe], Awaitable[None]]

WALL_EPOCH_S: Final = 1_700_000_000.0
DRIFT_MAX: Final = (
    0.04  # of a monotonic clock; two may differ by 0.08, below RaftConfig.lease_drift
)
QUICK_S: Final = (0.000_1, 0.003)  # how long a blocking call takes, when nothing is wrong
STALL_TIMEOUTS: Final = (1.5, 4.0)  # of an election: so long takes a call while a disk stalls
NO_SPACE: Final = ((True, False), (False, True), (True, True))  # for the log, for the engine


class Machine:
    """What a node's process runs on. Args: rng: draws clock drift, durations, and what a crash leaves."""

    def __init__(self, name: str, rng: random.Random, trace: Trace) -> None:
        self.name = name
        self.rng = rng
        self.trace = trace
        self.disk = SimDisk()
        self.directory = MemoryDirectory()
        self.engine: MemoryEngine | None = None
        self.io_count = 0
        self.on_io: list[Callable[[Machine, str], None]] = []
        self.call_s = QUICK_S
        self.in_call = False  # a blocking call is done for a thread just now
        self.wall_jump_s = 0.0
        self.boots = 0
        self._process: Process | None = None  # that runs on it, or ran last
        self._rate = 1.0
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        self._loop, self._time = loop, loop.time
        self._mono_at, self._mono = 0.0, 0.0
        self._busy_until = 0.0  # of its process: what it does now, it does at this time

    def stall(self, seconds: float) -> None:
        """From now on, each blocking call takes about so long."""
        self.call_s = (0.9 * seconds, seconds)

    def fill(self, *, log: bool, engine: bool) -> None:
        """No space is left: for new segments of the log, for what the engine writes, or for both."""
        if log:
            self.disk.fill()
        if engine:
            self.directory.write_error = DiskFull(f"no space left: {INJECTED}")

    def boot(self, process: Process) -> None:
        """A new process, or a new machine: its monotonic clock begins anywhere."""
        self.boots += 1
        self._process, process.clock_rate = process, self._rate
        self._mono_at, self._busy_until = self._time(), 0.0
        self._mono = self.rng.uniform(100.0, 100_000.0)

    def drift(self, rate: float) -> None:
        """The monotonic clock goes at `rate` from now on."""
        assert abs(rate - 1.0) <= DRIFT_MAX
        self._mono, self._mono_at = self.monotonic(), max(self._loop.now, self._busy_until)
        self._rate = rate
        if self._process is not None:
            self._process.clock_rate = rate

    def monotonic(self) -> float:
        now = self._loop.now  # called all the time
        if now < self._busy_until:
            now = self._busy_until
        return self._mono + (now - self._mono_at) * self._rate

    def wall_ms(self) -> int:
        now = max(self._loop.now, self._busy_until)
        return int((WALL_EPOCH_S + now + self.wall_jump_s) * 1000)

    def io(self, point: str) -> None:
        """The process is at this point of its work with the disk. May raise Killed."""
        self.io_count += 1
        for look in self.on_io:
            look(self, point)

    def wait(self) -> None:
        """A sync on the loop takes as long as one in a thread, and the loop stands still: its process does nothing else.

        While nothing is wrong it takes no time: to the others that is as if the callback had begun a little later.
        """
        process = PROCESS.get()
        if self.call_s == QUICK_S or self.in_call or process is None or process.dead:
            return
        seconds = self.rng.uniform(*self.call_s)
        self.trace.note("stall", self.name, seconds)
        self._loop.stand_still(process, seconds)
        self._busy_until = process.busy_until

    def lose_process(self, *, power: bool) -> int:
        """What is on the disk afterwards; `power`: unsynced writes are lost too. Returns how many engine batches were."""
        lost = 0
        if self.engine is not None:
            try:
                lost = self.engine.crash(self.rng)
            except EngineClosed:
                pass
            self.engine = None
        self.disk = self.disk.crash(self.rng) if power else self.disk.kill()
        return lost


class SimClock:
    def __init__(self, machine: Machine) -> None:
        self.monotonic = machine.monotonic
        self.wall_ms = machine.wall_ms


class SimRandom:
    """Streams by name; each boot has its own."""

    def __init__(self, seed: str) -> None:
        self._seed = seed
        self._asked: dict[str, int] = {}

    def stream(self, name: str) -> random.Random:
        count = self._asked[name] = self._asked.get(name, 0) + 1
        return random.Random(f"{self._seed}/{name}/{count}")


class SimExecutor:
    """Blocking calls are done at one instant, somewhere within the time that they take."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    async def run(self, work: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        rng, future = self._machine.rng, loop.create_future()
        seconds = rng.uniform(*self._machine.call_s)
        share = rng.random()
        loop.call_later(seconds * share, self._do, work, future, seconds * (1 - share))
        result: T = await future
        return result

    def _do(self, work: Callable[[], T], future: asyncio.Future[T], rest_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._machine.in_call = True
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the call's outcome
            loop.call_later(rest_s, _fail, future, error)
        else:
            loop.call_later(rest_s, _settle, future, result)
        finally:
            self._machine.in_call = False

    def close(self) -> None:
        """There are no threads to wait for."""


def _settle(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


class SimFiles:
    """LogFiles and NodeFiles of one process on a machine's disk."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._disk = machine.disk

    def segments(self) -> list[int]:
        return self._disk.segments()

    def read(self, segment: int) -> bytes:
        return self._disk.read(segment)

    def create(self, segment: int, size_bytes: int) -> None:
        self._disk.create(segment, size_bytes)
        self._machine.trace.note("create", self._machine.name, segment, size_bytes)
        self._machine.io("created")

    def write(self, segment: int, offset: int, data: bytes) -> None:
        self._disk.write(segment, offset, data)
        self._machine.trace.note(
            "write", self._machine.name, segment, offset, len(data), crc32c(data)
        )
        self._machine.io("written")

    def sync(self, segment: int) -> None:
        self._disk.sync(segment)
        self._machine.trace.note("sync", self._machine.name, segment)
        self._machine.io("synced")
        self._machine.wait()

    def delete(self, segment: int) -> None:
        self._machine.io("delete")
        self._disk.delete(segment)
        self._machine.trace.note("delete", self._machine.name, segment)

    def close(self) -> None:
        """Nothing is synced by it; the disk serves the next process."""

    def read_file(self, name: str) -> bytes | None:
        return self._disk.read_file(name)

    def write_file(self, name: str, data: bytes) -> None:
        self._machine.io("file")
        self._disk.write_file(name, data)
        self._machine.io("file written")


class SimEngine(MemoryEngine):
    """The engine of one process on a machine."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine.directory)
        self._machine = machine
        machine.engine = self

    def write(self, rows: Mapping[bytes, bytes | None]) -> None:
        super().write(rows)
        self._machine.io("engine written")

    def flush(self) -> None:
        self._machine.io("engine flush")
        super().flush()
        self._machine.trace.note("flush", self._machine.name)
        self._machine.io("engine flushed")


class SimAdapters:
    """See kvstore.node.Adapters. One for each process of a node."""

    def __init__(self, machine: Machine, network: SimNetwork, seed: str) -> None:
        self.clock = SimClock(machine)
        self.random = SimRandom(f"{seed}/{machine.name}/{machine.boots}")
        self.executor = SimExecutor(machine)
        self.network: SimHost = network.host(machine.name)
        self._machine = machine

    def open_directory(self, directory: str) -> SimFiles:  # noqa: ARG002 - a machine has one
        return SimFiles(self._machine)

    def open_engine(self, *, empty: bool = False) -> SimEngine:
        machine = self._machine
        if empty:
            assert not machine.directory.in_use
            machine.directory = MemoryDirectory()
            for segment in machine.disk.segments():
                machine.disk.delete(segment)
        return SimEngine(machine)

    def open_log(self) -> SimFiles:
        return SimFiles(self._machine)

    async def serve(self, address: str, on_pipe: OnPipe, node: Node) -> str:  # noqa: ARG002 - no HTTP
        return await self.network.serve(address, on_pipe)

    async def finish(self) -> None:
        """There is no HTTP."""

    async def close(self) -> None:
        await self.network.close()
