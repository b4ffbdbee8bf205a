"""The blocking client: the same names as `Database`, for programs without asyncio.

One background thread per client runs an event loop with a Database on it; every call hands work over and waits. It works
where a loop runs already (a notebook), and from several threads at once. A transaction belongs to one thread at a time. How it
opens and ends: `opening`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TypeVar, overload

from kvstore.attempts import KeptResult
from kvstore.batch import Batch
from kvstore.buffer import NumberFormat, WriteBuffer
from kvstore.client import ANY, TIMEOUT_S, AnyVersion, Database, over_websockets
from kvstore.errors import KVError
from kvstore.limits import VALUE_BYTES_MAX
from kvstore.loop_thread import LoopThread
from kvstore.opening import BlockingLife
from kvstore.reads import Entry
from kvstore.scans import RowScan
from kvstore.transactions import Aborted, Committed, Snapshot, Transaction
from kvstore.watches import Event, Watch
from kvstore.writes import BufferedWrites

R = TypeVar("R")


class Rows:
    """An iterable of (key, value), fetched page by page."""

    def __init__(self, thread: LoopThread, scan: RowScan) -> None:
        self._thread = thread
        self._scan = scan

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        walk, page = self._thread.call(self._scan.begin())
        while page:
            yield from page
            page = self._thread.call(walk.page())

    def to_list(self) -> list[tuple[bytes, bytes]]:
        return self._thread.call(self._scan.to_list())


class BlockingSnapshot:
    """As `Snapshot`."""

    def __init__(self, thread: LoopThread, snapshot: Snapshot) -> None:
        self._thread = thread
        self._snapshot = snapshot

    def version(self) -> int:
        return self._thread.call(self._snapshot.version())

    @overload
    def get(self, key: bytes, default: None = None) -> bytes | None: ...
    @overload
    def get(self, key: bytes, default: bytes) -> bytes: ...
    def get(self, key: bytes, default: bytes | None = None) -> bytes | None:
        value = self._thread.call(self._snapshot.get(key))
        return default if value is None else value

    def get_entry(self, key: bytes) -> Entry | None:
        return self._thread.call(self._snapshot.get_entry(key))

    def get_many(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        return self._thread.call(self._snapshot.get_many(keys))

    def scan(
        self,
        start: bytes = b"",
        end: bytes | None = None,
        *,
        prefix: bytes | None = None,
        limit: int | None = None,
        reverse: bool = False,
        keys_only: bool = False,
    ) -> Rows:
        scan = self._snapshot.scan(
            start, end, prefix=prefix, limit=limit, reverse=reverse, keys_only=keys_only
        )
        return Rows(self._thread, scan)

    def __enter__(self) -> Self:
        self._thread.call(
            self._snapshot.__aenter__(), undo=lambda view: view.__aexit__(None, None, None)
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.call(self._snapshot.__aexit__(None, None, None))


class BlockingWatch:
    """As `Watch`: `for event in watch`, `pull`, `version`; a context manager."""

    def __init__(self, thread: LoopThread, watch: Watch) -> None:
        self._thread = thread
        self._watch = watch

    @property
    def version(self) -> int:
        return self._watch.version

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        if not self._watch.has_ready:
            self._thread.call(self._watch.fill())
        return self._watch.next_ready()

    def pull(self, rows_max: int = 0) -> list[Event]:
        if not self._watch.has_ready:  # taken here, not there: an interrupt would lose them
            self._thread.call(self._watch.fill(rows_max))
        return self._watch.all_ready()

    def start(self) -> None:
        self._thread.call(self._watch.start())

    def close(self) -> None:
        self._thread.call(self._watch.close())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BlockingTransaction(BufferedWrites):
    """As `Transaction`. `with`: commits on a clean exit, rolls back on an exception."""

    def __init__(self, thread: LoopThread, tx: Transaction) -> None:
        self._thread = thread
        self._tx = tx

    @property
    def id(self) -> str:
        return self._tx.id

    @property
    def read_version(self) -> int | None:
        return self._tx.read_version

    @property
    def commit_version(self) -> int | None:
        return self._tx.commit_version

    @overload
    def get(self, key: bytes, default: None = None) -> bytes | None: ...
    @overload
    def get(self, key: bytes, default: bytes) -> bytes: ...
    def get(self, key: bytes, default: bytes | None = None) -> bytes | None:
        value = self._thread.call(self._tx.get(key))
        return default if value is None else value

    def get_many(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        return self._thread.call(self._tx.get_many(keys))

    def get_for_update(
        self, key: bytes, *, shared: bool = False, timeout: float | None = None
    ) -> bytes | None:
        return self._thread.call(self._tx.get_for_update(key, shared=shared, timeout=timeout))

    def get_many_for_update(
        self, keys: Iterable[bytes], *, shared: bool = False, timeout: float | None = None
    ) -> dict[bytes, bytes]:
        return self._thread.call(self._tx.get_many_for_update(keys, shared=shared, timeout=timeout))

    def scan(
        self,
        start: bytes = b"",
        end: bytes | None = None,
        *,
        prefix: bytes | None = None,
        limit: int | None = None,
        reverse: bool = False,
        keys_only: bool = False,
    ) -> Rows:
        scan = self._tx.scan(
            start, end, prefix=prefix, limit=limit, reverse=reverse, keys_only=keys_only
        )
        return Rows(self._thread, scan)

    def add_read_conflict(self, start: bytes, end: bytes | None = None) -> None:
        self._tx.add_read_conflict(start, end)

    def _writable(self) -> WriteBuffer:
        return self._tx._writable()  # noqa: SLF001 - its own half

    def _committed_at(self) -> int | None:
        return self._tx.commit_version

    def commit(self) -> int | None:
        return self._thread.call(self._tx.commit())

    def rollback(self) -> None:
        self._thread.call(self._tx.rollback())

    def __enter__(self) -> Self:
        interrupt = KeyboardInterrupt()  # so that nothing is committed
        self._thread.call(
            self._tx.__aenter__(), undo=lambda tx: tx.__aexit__(type(interrupt), interrupt, None)
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.call(self._tx.__aexit__(kind, error, trace))


class Client(BlockingLife):
    """A cluster, for blocking code: `with kvstore.Client("127.0.0.1:7400") as db`. Methods as on `Database`.

    It connects on entering the block, or at the first call; then `close` must be called. Args as of `connect`. Calls that come
    while it connects wait for the same connect. In a forked child, open another one.
    """

    def __init__(
        self, addresses: str | Iterable[str], *, timeout: float = TIMEOUT_S, cluster: str = ""
    ) -> None:
        from kvstore.api import parse_addresses

        parsed = parse_addresses(addresses)
        self._prepare(lambda: over_websockets(parsed, timeout, cluster))

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, timeout: float = TIMEOUT_S) -> Self:
        """Embedded: one node in this process."""
        from kvstore import api

        return cls.over(lambda: api.open(path, timeout=timeout))

    @classmethod
    def over(cls, make: Callable[[], Awaitable[Database]]) -> Self:
        """A client of the database that `make` opens on the client's own loop; for tests and tools."""
        client = cls.__new__(cls)
        client._prepare(make)  # noqa: SLF001 - its own class
        return client

    # --- reads ------------------------------------------------------------------------------------

    @overload
    def get(
        self,
        key: bytes,
        default: None = None,
        *,
        max_staleness: float | None = None,
        timeout: float | None = None,
    ) -> bytes | None: ...
    @overload
    def get(
        self,
        key: bytes,
        default: bytes,
        *,
        max_staleness: float | None = None,
        timeout: float | None = None,
    ) -> bytes: ...
    def get(
        self,
        key: bytes,
        default: bytes | None = None,
        *,
        max_staleness: float | None = None,
        timeout: float | None = None,
    ) -> bytes | None:
        thread, database = self._open()
        value = thread.call(database.get(key, max_staleness=max_staleness, timeout=timeout))
        return default if value is None else value

    def get_entry(
        self, key: bytes, *, max_staleness: float | None = None, timeout: float | None = None
    ) -> Entry | None:
        thread, database = self._open()
        return thread.call(database.get_entry(key, max_staleness=max_staleness, timeout=timeout))

    def get_many(
        self,
        keys: Iterable[bytes],
        *,
        max_staleness: float | None = None,
        timeout: float | None = None,
    ) -> dict[bytes, bytes]:
        thread, database = self._open()
        return thread.call(database.get_many(keys, max_staleness=max_staleness, timeout=timeout))

    def scan(
        self,
        start: bytes = b"",
        end: bytes | None = None,
        *,
        prefix: bytes | None = None,
        limit: int | None = None,
        reverse: bool = False,
        keys_only: bool = False,
        at: int | None = None,
        max_staleness: float | None = None,
    ) -> Rows:
        thread, database = self._open()
        scan = database.scan(
            start, end, prefix=prefix, limit=limit, reverse=reverse, keys_only=keys_only, at=at,
            max_staleness=max_staleness,
        )  # fmt: skip
        return Rows(thread, scan)

    def snapshot(
        self,
        at: int | None = None,
        *,
        max_staleness: float | None = None,
        timeout: float | None = None,
    ) -> BlockingSnapshot:
        thread, database = self._open()
        snapshot = database.snapshot(at, max_staleness=max_staleness, timeout=timeout)
        return BlockingSnapshot(thread, snapshot)

    def watch(
        self,
        *,
        key: bytes | None = None,
        prefix: bytes | None = None,
        since: int | None = None,
        timeout: float | None = None,
    ) -> BlockingWatch:
        thread, database = self._open()
        watch = database.watch(key=key, prefix=prefix, since=since, timeout=timeout)
        return BlockingWatch(thread, watch)

    # --- writes -----------------------------------------------------------------------------------

    def put(
        self,
        key: bytes,
        value: bytes,
        *,
        if_version: int | AnyVersion = ANY,
        if_absent: bool = False,
        timeout: float | None = None,
    ) -> int:
        thread, database = self._open()
        return thread.call(
            database.put(key, value, if_version=if_version, if_absent=if_absent, timeout=timeout)
        )

    def delete(
        self, key: bytes, *, if_version: int | AnyVersion = ANY, timeout: float | None = None
    ) -> int:
        thread, database = self._open()
        return thread.call(database.delete(key, if_version=if_version, timeout=timeout))

    def increment(
        self,
        key: bytes,
        by: int = 1,
        *,
        format: NumberFormat = "ascii",  # noqa: A002 - the surface's word
        timeout: float | None = None,
    ) -> int:
        thread, database = self._open()
        return thread.call(database.increment(key, by, format=format, timeout=timeout))

    def min(
        self,
        key: bytes,
        value: int,
        *,
        format: NumberFormat = "ascii",  # noqa: A002
        timeout: float | None = None,
    ) -> int:
        thread, database = self._open()
        return thread.call(database.min(key, value, format=format, timeout=timeout))

    def max(
        self,
        key: bytes,
        value: int,
        *,
        format: NumberFormat = "ascii",  # noqa: A002
        timeout: float | None = None,
    ) -> int:
        thread, database = self._open()
        return thread.call(database.max(key, value, format=format, timeout=timeout))

    def append_if_fits(
        self,
        key: bytes,
        value: bytes,
        limit: int = VALUE_BYTES_MAX,
        *,
        timeout: float | None = None,
    ) -> bool:
        thread, database = self._open()
        return thread.call(database.append_if_fits(key, value, limit, timeout=timeout))

    def compare_and_clear(
        self, key: bytes, expected: bytes, *, timeout: float | None = None
    ) -> bool:
        thread, database = self._open()
        return thread.call(database.compare_and_clear(key, expected, timeout=timeout))

    def put_versionstamped_key(
        self, prefix: bytes, value: bytes, *, timeout: float | None = None
    ) -> bytes:
        thread, database = self._open()
        return thread.call(database.put_versionstamped_key(prefix, value, timeout=timeout))

    def put_versionstamped_value(
        self, key: bytes, head: bytes = b"", *, timeout: float | None = None
    ) -> bytes:
        thread, database = self._open()
        return thread.call(database.put_versionstamped_value(key, head, timeout=timeout))

    def cas(
        self, key: bytes, expected: bytes | None, new: bytes | None, *, timeout: float | None = None
    ) -> bool:
        thread, database = self._open()
        return thread.call(database.cas(key, expected, new, timeout=timeout))

    def delete_range(self, start: bytes, end: bytes, *, timeout: float | None = None) -> int | None:
        thread, database = self._open()
        return thread.call(database.delete_range(start, end, timeout=timeout))

    def clear_range(
        self,
        start: bytes = b"",
        end: bytes | None = None,
        *,
        prefix: bytes | None = None,
        on_progress: Callable[[int, bytes], None] | None = None,
    ) -> int:
        """As there; `on_progress` is called on the client's thread, and must not call the client. What it raises
        ends this call alone."""
        thread, database = self._open()
        return thread.call(database.clear_range(start, end, prefix=prefix, on_progress=on_progress))

    @contextmanager
    def batch(self, *, timeout: float | None = None) -> Iterator[Batch]:
        thread, database = self._open()
        with Batch() as batch:
            yield batch
        thread.call(database.commit_batch(batch, timeout=timeout))

    # --- transactions -----------------------------------------------------------------------------

    def transaction(
        self, *, read_only: bool = False, timeout: float | None = None, priority: int = 0
    ) -> BlockingTransaction:
        thread, database = self._open()
        tx = database.transaction(read_only=read_only, timeout=timeout, priority=priority)
        return BlockingTransaction(thread, tx)

    def run(
        self,
        fn: Callable[[BlockingTransaction], R],
        *,
        read_only: bool = False,
        timeout: float | None = None,
        priority: int = 0,
        idempotency_key: bytes | str | None = None,
    ) -> R:
        """`fn(tx)` and commit; again while errors say that this may help. Runs in the calling thread."""
        thread, database = self._open()
        attempts = database.attempts(read_only, timeout, priority)
        kept = None if idempotency_key is None else KeptResult(idempotency_key)
        while True:
            tx = attempts.begin()
            try:
                with BlockingTransaction(thread, tx) as blocking:
                    if kept is None:
                        return fn(blocking)
                    before = thread.call(kept.recall(tx))
                    if before is not None:
                        return kept.decode(before)  # type: ignore[no-any-return]
                    result = fn(blocking)
                    kept.remember(tx, result)
                    return result
            except KVError as error:
                thread.call(asyncio.sleep(attempts.pause(tx, error)))

    def stats(self) -> dict[str, float]:
        """Counters of this client, by name, as of `Database.stats`."""
        thread, database = self._open()

        async def read() -> dict[str, float]:
            return database.stats()

        return thread.call(read())

    def outcome(self, token: str, *, timeout: float | None = None) -> Committed | Aborted:
        thread, database = self._open()
        return thread.call(database.outcome(token, timeout=timeout))
