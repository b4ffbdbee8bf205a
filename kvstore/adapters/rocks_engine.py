"""The storage engine on RocksDB (through rocksdict): the only file that knows either of them.

What it promises is `kvstore.ports.Engine`. How it keeps that, and what was learned by measuring:

- RocksDB's own write-ahead log is off and there is one column family: a crash leaves a prefix of the
  write batches, and `flush` says what is durable. The node's log replays the rest.
- Iterators end at damaged blocks as if they were at the end, so `status` is asked whenever `valid`
  turns false. `ReadOptions.set_iterate_lower_bound` sets the upper bound: it is never called.
- Iterators of a `Snapshot` see the present, not the snapshot (they set it on a copy of the options),
  so a view has a snapshot for its gets and one iterator, made with it, for all its scans.
- A DeleteRange whose end is before its start makes every later write fail: it never gets there.
- A living iterator or snapshot keeps the directory locked after the database was closed, and so does
  a traceback whose frame has one as a local. The engine therefore owns them all, drops them when it
  closes, and no exception leaves a frame that holds one.
- Every error is a bare `Exception` with a text: `_typed` is the one place that reads those.
"""

# rocksdict raises nothing but bare exceptions, so this file catches them all:
# ruff: noqa: BLE001
from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol, TypeVar

from rocksdict import (
    BlockBasedOptions,
    Cache,
    DataBlockIndexType,
    DbClosedError,
    DBCompressionType,
    Options,
    Rdict,
    RdictIter,
    ReadOptions,
    Snapshot,
    WriteBatch,
    WriteOptions,
)

from kvstore.errors import (
    CorruptionError,
    DataDirectoryError,
    DiskFull,
    EngineClosed,
    KVError,
    StorageError,
)

MIB: Final = 1024 * 1024
CURSOR_ROWS_FIRST: Final = 16  # a cursor reads ahead this many rows at first, then ever more
CURSOR_ROWS_MAX: Final = 256
CURSOR_BYTES_MAX: Final = 256 * 1024

STATS: Final = (
    "estimate-num-keys",
    "size-all-mem-tables",
    "total-sst-files-size",
    "num-files-at-level0",
    "num-running-flushes",
    "num-running-compactions",
    "estimate-pending-compaction-bytes",
    "estimate-table-readers-mem",
    "actual-delayed-write-rate",
    "is-write-stopped",
    "background-errors",
    "num-snapshots",
)

Row = tuple[bytes, bytes]


class _Owned(Protocol):
    """What keeps the directory locked while it lives."""

    def close(self) -> None: ...


OwnedT = TypeVar("OwnedT", bound=_Owned)


@dataclass(frozen=True)
class RocksConfig:
    """Sizes of one engine. Memory is about the block cache plus three write buffers."""

    block_cache_bytes: int = 64 * MIB
    write_buffer_bytes: int = 64 * MIB
    write_buffers_max: int = 3  # beyond it a write waits for the disk
    background_jobs_max: int = 2
    bloom_bits_per_key: int = 10
    bytes_per_sync: int = 1 * MIB  # written back early: the node log's fdatasync stays quick
    compress: bool = True
    open_files_max: int = -1  # of tables kept open, 64 MiB each; -1: all


class RocksEngine:
    """An ordered map of bytes on RocksDB. See `kvstore.ports.Engine`.

    Args: path: a directory of its own; made if absent.
    Raises: DataDirectoryError (in use, or not accessible), CorruptionError, StorageError.
    """

    def __init__(self, path: str | Path, config: RocksConfig = RocksConfig()) -> None:
        self._cache = Cache(config.block_cache_bytes)
        options = _options(config, self._cache)
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
            db: Rdict = Rdict(str(path), options)
        except OSError as error:
            raise DataDirectoryError(f"the data directory cannot be used: {error}") from None
        except Exception as error:
            raise _typed(error) from None
        self._db: Rdict | None = db
        self._write_options = WriteOptions()
        # a property, although the stub of rocksdict says that it is a method (a test sees it work)
        self._write_options.disable_wal = True  # type: ignore[assignment,method-assign]
        db.set_write_options(self._write_options)
        self._get: Callable[..., Any] = db.get
        self._write: Callable[..., None] = db.write
        self._owned: weakref.WeakValueDictionary[int, _Owned] = weakref.WeakValueDictionary()
        self._owned_ids = itertools.count()
        self._flushing = threading.Lock()  # close waits for a flush in another thread

    def get(self, key: bytes) -> bytes | None:
        try:
            return self._get(key)  # type: ignore[no-any-return]
        except Exception as error:
            raise _typed(error) from None

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        try:
            return self._get(list(keys))  # type: ignore[no-any-return]
        except Exception as error:
            raise _typed(error) from None

    def write(self, rows: Mapping[bytes, bytes | None]) -> None:
        batch = WriteBatch(raw_mode=True)
        put, delete = batch.put, batch.delete
        try:
            for key, value in rows.items():
                if value is None:
                    delete(key)
                else:
                    put(key, value)
            self._write(batch, self._write_options)
        except Exception as error:
            raise _typed(error) from None

    def delete_range(self, start: bytes, end: bytes) -> None:
        db = self._opened()
        if start >= end:  # RocksDB would refuse this, and every later write with it
            return
        try:
            db.delete_range(start, end, self._write_options)
        except Exception as error:
            raise _typed(error) from None

    def scan(self, start: bytes, end: bytes | None, *, reverse: bool = False) -> RocksCursor:
        options = ReadOptions()
        if end is not None and not reverse:
            options.set_iterate_upper_bound(end)  # spares stepping over deleted rows beyond it
        rows = _Rows(self._opened().iter(options))
        return self._own(RocksCursor(rows, start, end, reverse))

    def snapshot(self) -> RocksView:
        return self._own(RocksView(self._opened(), self._own))

    def flush(self) -> None:
        with self._flushing:
            db = self._opened()
            try:
                db.flush(True)
            except Exception as error:
                raise _typed(error) from None

    def size_bytes(self) -> int:
        return sum(self._property(name) for name in ("total-sst-files-size", "size-all-mem-tables"))

    def stats(self) -> dict[str, float]:
        figures = {name.replace("-", "_"): float(self._property(name)) for name in STATS}
        figures["block_cache_bytes"] = float(self._cache.get_usage())
        figures["cursors_and_views"] = float(len(self._owned))
        return figures

    def close(self) -> None:
        with self._flushing:
            db, self._db = self._db, None
            if db is None:
                return
            self._get = self._write = _refuse
            for owned in list(self._owned.values()):
                owned.close()
            failure: Exception | None = None
            try:
                db.flush(True)
            except Exception as error:
                failure = _typed(error)
            db.close()
            if failure is not None:
                raise failure

    def _own(self, owned: OwnedT) -> OwnedT:
        self._owned[next(self._owned_ids)] = owned
        return owned

    def _opened(self) -> Rdict:
        db = self._db
        if db is None:
            raise EngineClosed("the storage engine is closed")
        return db

    def _property(self, name: str) -> int:
        return self._opened().property_int_value(f"rocksdb.{name}") or 0


class RocksView:
    """The rows at one instant. Cursors made from it end with it: they share its one iterator."""

    def __init__(self, db: Rdict, own: Callable[[RocksCursor], RocksCursor]) -> None:
        self._own = own
        while True:  # both at the same instant, even if another thread writes
            version = db.latest_sequence_number()
            self._snapshot: Snapshot | None = db.snapshot()
            self._rows: _Rows | None = _Rows(db.iter())
            if db.latest_sequence_number() == version:
                break

    def get(self, key: bytes) -> bytes | None:
        if self._snapshot is None:
            raise _view_closed()
        try:
            return self._snapshot[key]  # type: ignore[no-any-return]
        except Exception as error:
            if str(error) == "key not found":
                return None
            raise _typed(error) from None

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        get = self.get
        return [get(key) for key in keys]

    def scan(self, start: bytes, end: bytes | None, *, reverse: bool = False) -> RocksCursor:
        if self._rows is None:
            raise _view_closed()
        return self._own(RocksCursor(self._rows, start, end, reverse))

    def close(self) -> None:
        self._snapshot = None
        if self._rows is not None:
            self._rows.it = None
            self._rows = None


class _Rows:
    """An iterator, and who used it last: that one need not seek again. None once it is given up."""

    __slots__ = ("it", "user")

    def __init__(self, it: RdictIter) -> None:
        self.it: RdictIter | None = it
        self.user: object = None  # the cursor's token (not the cursor: a cycle would keep it alive)


class RocksCursor:
    """Rows of [start, end) as they were when the cursor was made. Reads ahead, in bounded chunks."""

    __slots__ = (
        "__weakref__",
        "_ahead",
        "_chunk_rows",
        "_end",
        "_error",
        "_reverse",
        "_rows",
        "_start",
        "_token",
    )

    def __init__(self, rows: _Rows, start: bytes, end: bytes | None, reverse: bool) -> None:
        self._rows: _Rows | None = rows  # None: at the end, failed or closed
        self._start, self._end = start, end  # what is left to read
        self._ahead: list[Row] = []  # rows read already, the next one last
        self._reverse = reverse
        self._token = object()
        self._chunk_rows = CURSOR_ROWS_FIRST
        self._error: Exception | None = None  # raised at every further step
        if end is not None and start >= end:
            self._rows = None

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        ahead = self._ahead
        if ahead:
            return ahead.pop()
        rows = self._pull(self._chunk_rows, CURSOR_BYTES_MAX)
        self._chunk_rows = min(2 * self._chunk_rows, CURSOR_ROWS_MAX)
        if not rows:
            raise StopIteration
        rows.reverse()
        self._ahead = rows
        return rows.pop()

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
        self._rows = None
        self._error = EngineClosed("the cursor, or its storage engine, is closed")

    def _pull(self, rows_max: int, bytes_max: int) -> list[Row]:
        rows: list[Row] = []
        if self._rows is not None:
            more = self._fill(self._rows, rows, rows_max, bytes_max)
            if not more:
                self._rows = None
            elif self._reverse:
                self._end = rows[-1][0]
            else:
                self._start = rows[-1][0] + b"\x00"
        if self._error is not None and not rows:
            raise self._error.with_traceback(None)
        return rows

    def _fill(self, source: _Rows, rows: list[Row], rows_max: int, bytes_max: int) -> bool:
        """Append to `rows`; return whether there may be more. Notes the error rather than raise it:
        a traceback through here would keep the iterator alive."""
        it = source.it
        if it is None:
            self._error = _view_closed()
            return False
        try:
            if source.user is not self._token:
                source.user = self._token
                _seek(it, self._start, self._end, self._reverse)
            return _read(it, rows, self._start, self._end, self._reverse, rows_max, bytes_max)
        except Exception as error:
            self._error = _typed(error)
            return False


def _seek(it: RdictIter, start: bytes, end: bytes | None, reverse: bool) -> None:
    """Go to the first row to give. What goes wrong on the way, the iterator's status will tell."""
    if not reverse:
        it.seek(start)
    elif end is None:
        it.seek_to_last()
    else:
        it.seek_for_prev(end)
        if it.valid() and it.key() == end:
            it.prev()


def _read(
    it: RdictIter,
    rows: list[Row],
    start: bytes,
    end: bytes | None,
    reverse: bool,
    rows_max: int,
    bytes_max: int,
) -> bool:
    """Append the rows from where `it` stands; return whether there may be more.

    Raises: what the iterator's status says when it ends; rows before that have been appended.
    """
    valid, key, value, step = it.valid, it.key, it.value, it.prev if reverse else it.next
    size = 0
    while valid():
        at: bytes = key()
        if at < start if reverse else end is not None and at >= end:
            return False
        row = (at, value())
        rows.append(row)
        step()
        size += len(at) + len(row[1])
        if len(rows) >= rows_max or size >= bytes_max:
            return True
    it.status()
    return False


def _typed(error: Exception) -> Exception:
    """The error of ours for one of rocksdict. Texts as of rocksdict 0.3.29."""
    text = str(error)
    if isinstance(error, KVError):
        return error
    if isinstance(error, DbClosedError):
        return EngineClosed("the storage engine is closed")
    if isinstance(error, TypeError) or "raw mode only support bytes" in text:  # a bug of ours
        return TypeError(text)
    if "No space left on device" in text:
        return DiskFull(text)
    if text.startswith("Corruption"):
        return CorruptionError(text)
    if "/LOCK: " in text and text.startswith("IO error"):
        return DataDirectoryError(f"the data directory is in use by another process: {text}")
    if "(os error " in text:  # from Rust's own file calls, which only opening makes
        return DataDirectoryError(f"the data directory cannot be used: {text}")
    return StorageError(text)


def _view_closed() -> EngineClosed:
    return EngineClosed("the view, or its storage engine, is closed")


def _refuse(*_: Any) -> NoReturn:
    raise EngineClosed("the storage engine is closed")


def _options(config: RocksConfig, cache: Cache) -> Options:
    table = BlockBasedOptions()
    table.set_block_cache(cache)
    table.set_bloom_filter(config.bloom_bits_per_key, False)
    table.set_cache_index_and_filter_blocks(True)  # so that the cache bounds them too
    table.set_pin_l0_filter_and_index_blocks_in_cache(True)
    table.set_format_version(5)
    table.set_data_block_index_type(DataBlockIndexType.binary_and_hash())  # for gets
    table.set_data_block_hash_ratio(0.75)

    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_block_based_table_factory(table)
    compression = DBCompressionType.lz4() if config.compress else DBCompressionType.none()
    options.set_compression_type(compression)
    options.set_write_buffer_size(config.write_buffer_bytes)
    options.set_max_write_buffer_number(config.write_buffers_max)
    # a bloom filter over the write buffer, 2 % of it: gets of rows that are not in it, most of
    # all of rows that do not exist, take half the time
    options.set_memtable_prefix_bloom_ratio(0.02)
    options.set_memtable_whole_key_filtering(True)
    options.set_level_compaction_dynamic_level_bytes(True)
    options.set_max_background_jobs(config.background_jobs_max)
    options.set_max_file_opening_threads(config.background_jobs_max)
    options.set_max_open_files(config.open_files_max)
    options.set_bytes_per_sync(config.bytes_per_sync)
    options.set_allow_concurrent_memtable_write(False)  # there is one writer
    options.set_keep_log_file_num(4)
    options.set_max_log_file_size(4 * MIB)
    options.set_stats_dump_period_sec(0)
    return options
