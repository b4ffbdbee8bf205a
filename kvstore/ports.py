"""What the product needs from the world, as protocols. Adapters and the simulator implement them.

Storage (Engine and its views and cursors), the network (FramePipe, Network), and the clock,
randomness and threads.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class EngineCursor(Protocol):
    """An iterator of (key, value) over one span, at the instant at which `scan` was called.

    Raises: CorruptionError when stored bytes are damaged (again at each further step: never a
    silent end); EngineClosed after `close`, of the cursor or of its engine.
    """

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]: ...

    def __next__(self) -> tuple[bytes, bytes]: ...

    def take(self, rows_max: int, bytes_max: int = 256 * 1024) -> list[tuple[bytes, bytes]]:
        """Up to `rows_max` (at least 1) rows, stopping after the row that reaches `bytes_max`;
        empty only at the end.

        The quick way through many rows: cheaper by row than `__next__`.
        """

    def close(self) -> None:
        """Give up what the cursor holds. May be called again."""


class EngineView(Protocol):
    """The engine's rows at one instant. Holds old data back from cleaning up until it is closed.

    One thread at a time uses it and its cursors, which end with it.
    """

    def get(self, key: bytes) -> bytes | None: ...

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]: ...

    def scan(self, start: bytes, end: bytes | None, *, reverse: bool = False) -> EngineCursor: ...

    def close(self) -> None: ...


class Engine(Protocol):
    """An ordered map of bytes to bytes, on disk, without a log of its own. Keys are ordered as
    unsigned bytes.

    A crash leaves a prefix of the writes (each one whole), and at least those before the last
    `flush` that returned. One thread writes; `flush`, reads and `stats` may be called from others.
    Every call raises EngineClosed after `close`; CorruptionError, DiskFull, StorageError as the
    disk has it. Keys and values are `bytes`, nothing else.
    """

    def get(self, key: bytes) -> bytes | None: ...

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values of `keys` in their order, None where there is none."""

    def write(self, rows: Mapping[bytes, bytes | None]) -> None:
        """All rows or none of them, at once; None deletes."""

    def delete_range(self, start: bytes, end: bytes) -> None:
        """Delete [start, end), in an atomic batch of its own. For wiping spans: many of them slow
        reads down.
        """

    def scan(self, start: bytes, end: bytes | None, *, reverse: bool = False) -> EngineCursor:
        """The rows of [start, end), ascending or descending; `end` None means to the last key."""

    def snapshot(self) -> EngineView: ...

    def flush(self) -> None:
        """Blocks; what was written before the call is durable after it. For a worker thread."""

    def size_bytes(self) -> int:
        """Roughly what the data takes on disk and in memory."""

    def stats(self) -> dict[str, float]:
        """Figures for metrics, by name."""

    def close(self) -> None:
        """Flush, drop every cursor and view, and release the directory, which can be opened again
        at once.
        """


class FramePipe(Protocol):
    """One connection (a WebSocket, or a simulated one): whole frames, in order."""

    def try_send(self, frame: bytes) -> bool:
        """Hand a frame over at once. False: above the high-water mark, nothing was taken; use `send`.

        Raises: PipeClosed.
        """

    async def send(self, frame: bytes) -> None:
        """Returns when the bytes left our buffers below the high-water mark. Raises: PipeClosed."""

    async def receive(self) -> bytes:
        """The next frame. Raises: PipeClosed; FrameError: what came is no frame of this kind of wire."""

    def buffered_bytes(self) -> int:
        """What was handed over and has not left yet; that it falls shows progress."""

    def abort(self) -> None:
        """End it at once; never blocks. Calls that wait raise PipeClosed."""

    async def close(self, timeout_s: float) -> None:
        """Let what was handed over leave, then end; after `timeout_s` as `abort`. Never raises."""


class Network(Protocol):
    """Dials and serves pipes. Addresses are "host:port"."""

    async def dial(self, address: str, path: str, timeout_s: float) -> FramePipe:
        """Raises: PipeClosed when it fails, or is not done within `timeout_s`."""

    async def serve(
        self, address: str, on_pipe: Callable[[str, FramePipe], Awaitable[None]]
    ) -> str:
        """Listen; `on_pipe(path, pipe)` runs for each connection. Returns the real address (port 0
        was chosen).
        """


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds since some instant; never goes back."""

    def wall_ms(self) -> int:
        """Milliseconds since 1970 UTC; may jump. Only the timestamp oracle and people's eyes use
        it.
        """


class Random(Protocol):
    """Where random numbers come from. Every part asks for a stream of its own, so that a seed
    replays each.
    """

    def stream(self, name: str) -> random.Random: ...


class Executor(Protocol):
    """Runs blocking calls away from the event loop."""

    async def run(self, work: Callable[[], T]) -> T:
        """Await `work()` done elsewhere. Cancelling the wait does not stop the work."""

    def close(self) -> None:
        """Wait for what runs; nothing is accepted afterwards."""
