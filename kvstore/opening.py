"""How a blocking client opens and ends, whichever threads meet in it. What holds:

- One connect is under way at most, on a thread of its own. Whoever comes first calls it; who comes meanwhile waits for its end,
  and gets the same database or the same error: nobody waits for several connects in turn. After a failure the next call
  connects anew.
- An interrupt (Ctrl-C) is told to its own thread alone. If that is the one that connects, the connect ends, what it made is
  closed, and then one of those who wait connects anew.
- `close` waits for the loop, never for another caller, so its time is bounded; who waits for a connect gets ClientClosed.
  Either `close` finds the database and closes it, or the connect finds the client closed, and closes what it made: both look
  under the lock. What was closed stays closed.
- The lock is held while the state is looked at and changed, and while a thread starts; never for work on a loop.
- A fork may come at any of these moments, so a child has a lock of its own. There a client that had begun to connect is refused
  (ClientClosed), and its `close` leaves the parent's alone; one that had not connects for itself.
- At the interpreter's exit nobody waits for the client's thread: a client that was not closed ends as by a crash.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Self

from kvstore.client import Database
from kvstore.errors import ClientClosed
from kvstore.loop_thread import LoopThread


class SharedOpening:
    """A thread, and the database that is made on it: of one connect, and of all who wait for that.

    `database` is set on that thread, `error` by whoever connects, before `ended`. Ended without an error, it is open, closed or
    given up: the client knows.
    """

    __slots__ = ("database", "ended", "error", "thread")

    def __init__(self) -> None:
        self.thread = LoopThread("kvstore-client")
        self.database: Database | None = None
        self.error: Exception | None = None
        self.ended = threading.Event()

    def wait(self) -> None:
        """Raises: what the connect failed of."""
        self.thread.require_caller()
        self.ended.wait()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """What is under way is cancelled, what was made is closed. May be called again, and by several threads at once."""
        try:
            if self.database is not None:
                with suppress(ClientClosed):  # it has ended; or after a fork it is the parent's
                    self.thread.call(self.database.close())
        finally:
            self.thread.close()


class BlockingLife:
    """What a blocking client has besides its calls. Use it with `with`, or `start` and `close`."""

    def _prepare(self, make: Callable[[], Awaitable[Database]]) -> None:
        self._make = make
        self._locks: dict[int, threading.Lock] = {}  # one for each process
        self._opening: SharedOpening | None = None  # under way, or what is open
        self._opened: tuple[LoopThread, Database] | None = None
        self._closed = False

    def start(self) -> None:
        """Connect, unless it is connected."""
        self._open()

    def _open(self) -> tuple[LoopThread, Database]:
        while True:
            opened = self._opened
            if opened is not None:
                return opened
            mine: SharedOpening | None = None
            try:
                with self._lock():
                    if self._closed:
                        raise ClientClosed
                    opening = self._opening
                    if opening is None:
                        opening = mine = self._opening = SharedOpening()
                if mine is not None:
                    return self._connect(mine)
            except BaseException as error:
                if mine is not None:
                    self._give_up(mine, error)
                raise
            opening.wait()

    def _lock(self) -> threading.Lock:
        """Guards the state. Of this process: a thread that held the parent's during the fork never gives it back here."""
        return self._locks.setdefault(os.getpid(), threading.Lock())

    def _connect(self, opening: SharedOpening) -> tuple[LoopThread, Database]:
        thread = opening.thread
        opened = thread, thread.call(self._made(opening), undo=Database.close)
        with self._lock():
            if self._closed:
                raise ClientClosed
            self._opened = opened
        opening.ended.set()
        return opened

    async def _made(self, opening: SharedOpening) -> Database:
        try:
            database = await self._make()
        except asyncio.CancelledError:
            if self._closed:  # said plainly: nothing can have been written yet
                raise ClientClosed from None
            raise
        with self._lock():
            if not self._closed:
                opening.database = database
                return database
        await database.close()
        raise ClientClosed

    def _give_up(self, opening: SharedOpening, error: BaseException) -> None:
        """All of it has ended before another connect begins: a directory is free. An interrupt is not told to the others."""
        try:
            opening.close()
        finally:
            with self._lock():
                if self._opening is opening:
                    self._opening = self._opened = None
            if isinstance(error, Exception):
                opening.error = error
            opening.ended.set()

    def close(self) -> None:
        """End it, within a bounded time, and what other threads wait for, be it to connect. May be called again."""
        with self._lock():
            self._closed = True
            opening, self._opening, self._opened = self._opening, None, None
        if opening is not None:
            opening.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
