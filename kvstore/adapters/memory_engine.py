"""The storage engine in memory: for tests, and for the simulator, which crashes it.

`MemoryDirectory` stands for a data directory: it outlives the engines that are opened on it, one at
a time. Until a flush it remembers how to undo each write batch, so that `MemoryEngine.crash` can
leave any prefix of the batches that has at least those of the last flush, as RocksDB without its
log does. It can also have damaged rows and a full disk.

Views and cursors do not copy: each instant that somebody looks at collects the old values of rows
that are written later, and reads them before the present ones.
"""

from __future__ import annotations

import itertools
import random
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from sortedcontainers import SortedDict

from kvstore.errors import (
    CorruptionError,
    DataDirectoryError,
    EngineClosed,
    KVError,
    StorageError,
)

CURSOR_ROWS_MAX: Final = 64  # read ahead by one step of a cursor
CURSOR_BYTES_MAX: Final = 256 * 1024
ROTTEN: Final = (
    "lies in a damaged block"  # is in the text of every error that `damage` brings about
)
BLOCK_ROWS: Final = 16  # that one damaged block may hold
WRITE_BUFFER_BYTES: Final = 64 * 1024 * 1024  # a flush happens by itself when as much is unflushed

Row = tuple[bytes, bytes]
Old = dict[bytes, bytes | None]  # key -> the value before, None if there was none


class MemoryDirectory:
    """What is on the simulated disk.

    Public knobs: `damage(key)`, `rot(rng)`; `write_error`: raised by every write and flush while it is set;
    `flush_error`: by every flush alone; `read_error`: by every read.
    """

    def __init__(self) -> None:
        self.rows: SortedDict[bytes, bytes] = SortedDict()
        self.undo: list[Old] = []  # one for each batch since the last flush
        self.unflushed_bytes = 0
        self.damaged: dict[bytes, None] = {}
        self.write_error: KVError | None = None
        self.flush_error: KVError | None = None
        self.read_error: KVError | None = None
        self.in_use = False

    def damage(self, key: bytes) -> None:
        """Bit rot at a row: reading it, or over it, raises CorruptionError until it is overwritten."""
        assert key in self.rows
        self.damaged[key] = None

    def rot(self, rng: random.Random, rows_max: int = BLOCK_ROWS) -> list[bytes]:
        """Damage some neighbouring rows of those that are flushed, as a lost block does. Returns their keys."""
        if not self.rows:
            return []
        fresh: dict[bytes, None] = {}
        for old in self.undo:
            fresh.update(dict.fromkeys(old))
        first = self.rows.peekitem(rng.randrange(len(self.rows)))[0]
        block = itertools.islice(self.rows.irange(first), rng.randint(1, rows_max))
        keys = [key for key in block if key not in fresh]
        for key in keys:
            self.damage(key)
        return keys

    def flush(self) -> None:
        """As `flushed`, if it can. Raises: `write_error`, `flush_error`."""
        error = self.write_error or self.flush_error
        if error is not None:
            raise error
        self.flushed()

    def flushed(self) -> None:
        """Everything written so far is durable."""
        self.undo.clear()
        self.unflushed_bytes = 0


class MemoryEngine:
    """An ordered map of bytes in memory. See `kvstore.ports.Engine`."""

    def __init__(self, directory: MemoryDirectory | None = None) -> None:
        self.directory = directory if directory is not None else MemoryDirectory()
        if self.directory.in_use:
            raise DataDirectoryError("the data directory is in use by another process")
        self.directory.in_use = True
        self._closed = False
        self._instants: weakref.WeakValueDictionary[int, _Instant] = weakref.WeakValueDictionary()
        self._owned: weakref.WeakValueDictionary[int, MemoryView | MemoryCursor]
        self._owned = weakref.WeakValueDictionary()
        self._ids = itertools.count()

    def get(self, key: bytes) -> bytes | None:
        self._check()
        _require_bytes(key)
        directory = self.directory
        if directory.read_error is not None:
            raise directory.read_error
        if key in directory.damaged:
            raise _corrupt(key)
        value: bytes | None = directory.rows.get(key)
        return value

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        self._check()
        return [self.get(key) for key in keys]

    def write(self, rows: Mapping[bytes, bytes | None]) -> None:
        self._check()
        directory = self.directory
        if directory.write_error is not None:
            raise directory.write_error
        for key, value in rows.items():
            if type(key) is not bytes or not (value is None or type(value) is bytes):
                raise TypeError("keys and values are bytes")
        live = directory.rows
        old: Old = {key: live.get(key) for key in rows}
        if self._instants:
            for instant in self._instants.values():
                instant.remember(old)
        for key, value in rows.items():
            if value is not None:
                live[key] = value
                directory.unflushed_bytes += len(key) + len(value)
            elif old[key] is not None:
                del live[key]
        if directory.damaged:
            for key in rows:
                directory.damaged.pop(key, None)
        directory.undo.append(old)
        if directory.unflushed_bytes > WRITE_BUFFER_BYTES:
            directory.flushed()

    def delete_range(self, start: bytes, end: bytes) -> None:
        self._check()
        if start < end:
            keys = self.directory.rows.irange(start, end, inclusive=(True, False))
            self.write(dict.fromkeys(keys))

    def scan(self, start: bytes, end: bytes | None, *, reverse: bool = False) -> MemoryCursor:
        return self._cursor(self._instant(), start, end, reverse)

    def snapshot(self) -> MemoryView:
        view = MemoryView(self._instant(), self._cursor)
        self._owned[next(self._ids)] = view
        return view

    def flush(self) -> None:
        self._check()
        self.directory.flush()

    def size_bytes(self) -> int:
        self._check()
        return sum(len(key) + len(value) for key, value in self.directory.rows.items())

    def stats(self) -> dict[str, float]:
        self._check()
        directory = self.directory
        return {
            "estimate_num_keys": float(len(directory.rows)),
            "unflushed_batches": float(len(directory.undo)),
            "unflushed_bytes": float(directory.unflushed_bytes),
            "cursors_and_views": float(len(self._owned)),
        }

    def close(self) -> None:
        if self._closed:
            return
        self._leave()
        self.directory.flush()

    def crash(self, rng: random.Random) -> int:
        """The process dies: the engine is closed without a flush, and a drawn number of the batches
        after the last flush is lost, the newest first. Returns how many were lost."""
        self._check()
        self._leave()
        directory = self.directory
        lost = rng.randint(0, len(directory.undo))
        for _ in range(lost):
            for key, value in directory.undo.pop().items():
                if value is not None:
                    directory.rows[key] = value
                else:
                    directory.rows.pop(key, None)
        directory.flushed()
        return lost

    def _leave(self) -> None:
        self._closed = True
        self.directory.in_use = False
        for owned in list(self._owned.values()):
            owned.close()

    def _check(self) -> None:
        if self._closed:
            raise EngineClosed("the storage engine is closed")

    def _instant(self) -> _Instant:
        self._check()
        instant = _Instant(self.directory)
        self._instants[next(self._ids)] = instant
        return instant

    def _cursor(
        self, instant: _Instant, start: bytes, end: bytes | None, reverse: bool
    ) -> MemoryCursor:
        _require_bytes(start)
        cursor = MemoryCursor(instant, start, end, reverse)
        self._owned[next(self._ids)] = cursor
        return cursor


class MemoryView:
    """The rows at one instant. Cursors made from it end with it."""

    def __init__(self, instant: _Instant, cursor: Callable[..., MemoryCursor]) -> None:
        self._instant: _Instant | None = instant
        self._cursor = cursor

    def get(self, key: bytes) -> bytes | None:
        _require_bytes(key)
        return self._opened().get(key)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        instant = self._opened()
        return [instant.get(key) for key in keys]

    def scan(self, start: bytes, end: bytes | None, *, reverse: bool = False) -> MemoryCursor:
        return self._cursor(self._opened(), start, end, reverse)

    def close(self) -> None:
        if self._instant is not None:
            self._instant.ended = True
            self._instant = None

    def _opened(self) -> _Instant:
        if self._instant is None:
            raise _view_closed()
        return self._instant


class MemoryCursor:
    """Rows of [start, end) as they were when the cursor was made."""

    def __init__(self, instant: _Instant, start: bytes, end: bytes | None, reverse: bool) -> None:
        self._instant: _Instant | None = instant if end is None or start < end else None
        self._start, self._end = start, end
        self._reverse = reverse
        self._ahead: list[Row] = []  # the next one last
        self._error: KVError | None = None  # raised at every further step

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        if not self._ahead:
            self._ahead = self._pull(CURSOR_ROWS_MAX, CURSOR_BYTES_MAX)
            self._ahead.reverse()
            if not self._ahead:
                raise StopIteration
        return self._ahead.pop()

    def take(self, rows_max: int, bytes_max: int = CURSOR_BYTES_MAX) -> list[Row]:
        assert rows_max > 0
        if not self._ahead:
            return self._pull(rows_max, bytes_max)
        rows: list[Row] = []
        size = 0
        while self._ahead and len(rows) < rows_max and size < bytes_max:
            rows.append(self._ahead.pop())
            size += len(rows[-1][0]) + len(rows[-1][1])
        return rows

    def close(self) -> None:
        self._ahead = []
        self._instant = None
        self._error = EngineClosed("the cursor, or its storage engine, is closed")

    def _pull(self, rows_max: int, bytes_max: int) -> list[Row]:
        rows: list[Row] = []
        size = 0
        if self._instant is not None and self._instant.ended:
            self._error, self._instant = _view_closed(), None
        while self._instant is not None and len(rows) < rows_max and size < bytes_max:
            instant, wanted = self._instant, rows_max - len(rows)
            keys = instant.keys(self._start, self._end, self._reverse, wanted)
            if len(keys) < wanted:
                self._instant = None  # these are the last, unless the loop below stops early
            for key in keys:
                try:
                    value = instant.get(key)
                except StorageError as error:
                    self._error, self._instant = error, None
                    break
                if self._reverse:
                    self._end = key
                else:
                    self._start = key + b"\x00"
                if value is not None:
                    rows.append((key, value))
                    size += len(key) + len(value)
                    if size >= bytes_max:
                        self._instant = instant
                        break
        if self._error is not None and not rows:
            raise self._error.with_traceback(None)
        return rows


class _Instant:
    """A state of the rows: the present ones under the old values of what was written since."""

    __slots__ = ("__weakref__", "_damaged", "_directory", "_old", "ended")

    def __init__(self, directory: MemoryDirectory) -> None:
        self._directory = directory
        self._old: SortedDict[bytes, bytes | None] | None = None  # made when it is needed
        self._damaged: dict[bytes, None] = {}  # rows that were damaged when they were overwritten
        self.ended = False  # the view was closed

    def remember(self, old: Old) -> None:
        if self._old is None:
            self._old = SortedDict()
        for key, value in old.items():
            if key not in self._old:
                self._old[key] = value
                if key in self._directory.damaged:
                    self._damaged[key] = None

    def get(self, key: bytes) -> bytes | None:
        if self._directory.read_error is not None:
            raise self._directory.read_error
        if self._old is not None and key in self._old:
            if key in self._damaged:
                raise _corrupt(key)
            value: bytes | None = self._old[key]
        elif key in self._directory.damaged:
            raise _corrupt(key)
        else:
            value = self._directory.rows.get(key)
        return value

    def keys(self, start: bytes, end: bytes | None, reverse: bool, limit: int) -> list[bytes]:
        """The first `limit` keys of [start, end), in the order asked for; some may have no value."""
        present = _keys(self._directory.rows, start, end, reverse, limit)
        if self._old is None:
            return present
        past = _keys(self._old, start, end, reverse, limit)
        return sorted(dict.fromkeys(present + past), reverse=reverse)[:limit]


def _keys(
    rows: SortedDict[bytes, Any], start: bytes, end: bytes | None, reverse: bool, limit: int
) -> list[bytes]:
    found = rows.irange(start, end, inclusive=(True, False), reverse=reverse)
    return list(itertools.islice(found, limit))


def _view_closed() -> EngineClosed:
    return EngineClosed("the view, or its storage engine, is closed")


def _corrupt(key: bytes) -> CorruptionError:
    return CorruptionError(f"the row {key!r} {ROTTEN}")


def _require_bytes(value: bytes) -> None:
    """RocksDB takes nothing else, so neither does its stand-in."""
    if type(value) is not bytes:
        raise TypeError(f"bytes are wanted, not {type(value).__name__}")
