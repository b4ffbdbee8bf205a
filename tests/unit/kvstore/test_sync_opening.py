"""Claims of how a blocking client opens and ends where threads meet: they share one connect and what it comes to, `close` ends
it, a forked child is refused, and an interrupt is told to its own thread alone."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from kvstore.adapters.system import SystemClock
from kvstore.client import Database
from kvstore.errors import ClientClosed, InvalidArgument, KVError, Unavailable
from kvstore.loop_thread import LoopThread
from kvstore.opening import SharedOpening
from kvstore.sync import Client
from tests.unit.kvstore.fake_cluster import FakeCluster

WAIT_S = 10.0


class Connects:
    """Makes databases, or fails with `error`. The first one waits for `go_on`, unless it is cancelled."""

    def __init__(self) -> None:
        self.cluster = FakeCluster()
        self.made: list[Database] = []
        self.count = 0
        self.begun = threading.Event()  # and waits
        self.error: KVError | None = None
        self.ignores_cancellation = False
        self._go_on: Callable[[], object] = lambda: None

    async def __call__(self) -> Database:
        self.count += 1
        if self.count == 1:
            await self._wait()
        if self.error is not None:
            raise self.error
        await self.cluster.start()
        database = self.cluster.database(clock=SystemClock())
        await database.start()
        self.made.append(database)
        return database

    async def _wait(self) -> None:
        loop, released = asyncio.get_running_loop(), asyncio.Event()
        self._go_on = lambda: loop.call_soon_threadsafe(released.set)
        self.begun.set()
        try:
            await released.wait()
        except asyncio.CancelledError:
            if not self.ignores_cancellation:
                raise

    def go_on(self) -> None:
        assert self.begun.wait(WAIT_S)
        self._go_on()


class Elsewhere:
    """A call in a thread of its own."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.told: BaseException | None = None
        self._act = act
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._act()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.told = error

    def end(self) -> BaseException | None:
        """Wait for it, within bounds. Returns what it raised."""
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        return self.told


@pytest.fixture
def connects() -> Connects:
    return Connects()


@pytest.fixture
def client(connects: Connects) -> Iterator[Client]:
    client = Client.over(connects)
    yield client
    client.close()
    assert not any(thread.name == "kvstore-client" for thread in threading.enumerate())


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Given once for each thread that is about to wait for the connect of another one."""

    def wait(opening: SharedOpening) -> None:
        arrived.release()
        real(opening)

    arrived, real = threading.Semaphore(0), SharedOpening.wait
    monkeypatch.setattr(SharedOpening, "wait", wait)
    return arrived


def test_threads_that_meet_one_failing_connect_are_told_together(
    connects: Connects, client: Client, waiting: threading.Semaphore
):
    connects.error = Unavailable("nobody is there")
    others = [Elsewhere(lambda: client.get(b"k")) for _ in range(5)]
    for _ in range(4):
        assert waiting.acquire(timeout=WAIT_S)
    connects.go_on()
    assert [other.end() for other in others] == [connects.error] * 5
    assert connects.count == 1
    with pytest.raises(Unavailable):
        client.get(b"k")
    assert connects.count == 2


def test_threads_that_meet_one_connect_get_the_same_database(
    connects: Connects, client: Client, waiting: threading.Semaphore
):
    others = [Elsewhere(lambda: client.put(b"k", b"v")) for _ in range(3)]
    for _ in range(2):
        assert waiting.acquire(timeout=WAIT_S)
    connects.go_on()
    assert [other.end() for other in others] == [None] * 3
    assert connects.count == 1


# --- close ----------------------------------------------------------------------------------------


def test_close_ends_a_connect_of_another_thread(
    connects: Connects, client: Client, waiting: threading.Semaphore
):
    others = [Elsewhere(lambda: client.put(b"k", b"v")) for _ in range(2)]
    assert waiting.acquire(timeout=WAIT_S)
    assert connects.begun.wait(WAIT_S)
    assert Elsewhere(client.close).end() is None
    told = [other.end() for other in others]
    assert [type(error) for error in told] == [ClientClosed] * 2
    assert not any(error.maybe_committed for error in told if isinstance(error, KVError))
    with pytest.raises(ClientClosed):
        client.get(b"k")
    assert connects.count == 1


def test_a_connect_that_succeeds_though_the_client_was_closed_leaves_nothing_open(
    connects: Connects, client: Client
):
    connects.ignores_cancellation = True
    other = Elsewhere(client.start)
    assert connects.begun.wait(WAIT_S)
    assert Elsewhere(client.close).end() is None
    assert isinstance(other.end(), ClientClosed)
    assert [database._closed for database in connects.made] == [True]


def test_a_close_just_behind_a_connect_closes_what_it_made(
    connects: Connects, client: Client, monkeypatch: pytest.MonkeyPatch
):
    def call(thread: LoopThread, work: Coroutine[Any, Any, Any], undo: Any = None) -> Any:
        result = real(thread, work, undo)
        monkeypatch.undo()
        assert Elsewhere(client.close).end() is None
        return result

    real = LoopThread.call
    monkeypatch.setattr(LoopThread, "call", call)
    connects.count = 1  # the first one would wait
    with pytest.raises(ClientClosed):
        client.start()
    assert [database._closed for database in connects.made] == [True]


def test_a_connect_that_calls_its_own_client_is_refused_and_does_not_wait_for_itself():
    async def make() -> Database:
        own.start()
        raise AssertionError

    own = Client.over(make)
    with pytest.raises(InvalidArgument, match="own thread"):
        own.start()


# --- a fork ---------------------------------------------------------------------------------------


def test_a_fork_during_a_connect_leaves_a_child_that_is_refused(
    connects: Connects, client: Client, monkeypatch: pytest.MonkeyPatch
):
    """The client's lock was held, too, by a thread that the child does not have."""
    other = Elsewhere(lambda: client.put(b"k", b"v"))
    assert connects.begun.wait(WAIT_S)
    with monkeypatch.context() as patch, client._lock():
        child = copy.copy(client)
        patch.setattr(os, "getpid", lambda: 0)
        told = Elsewhere(lambda: child.get(b"k")).end()
        assert isinstance(told, ClientClosed)
        assert "fork" in str(told)
        assert Elsewhere(child.close).end() is None
        assert type(Elsewhere(child.start).end()) is ClientClosed
    connects.go_on()
    assert other.end() is None
    assert client.get(b"k") == b"v"


def test_a_child_of_a_fork_before_the_first_call_connects_for_itself(
    connects: Connects, client: Client, monkeypatch: pytest.MonkeyPatch
):
    connects.count = 1  # the first one would wait
    with monkeypatch.context() as patch, client._lock():
        child = copy.copy(client)
        patch.setattr(os, "getpid", lambda: 0)
        assert Elsewhere(lambda: child.put(b"k", b"v")).end() is None
        assert Elsewhere(child.close).end() is None
    assert client.get(b"k") == b"v"
    assert len(connects.made) == 2


# --- an interrupt ---------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_of_who_connects_has_one_of_those_who_wait_connect_anew(
    connects: Connects,
    client: Client,
    waiting: threading.Semaphore,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
):
    """Ctrl-C as the main thread waits: before its connect has ended, or just behind it."""

    def result(future: concurrent.futures.Future[Any], timeout: float | None = None) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return real(future, timeout)
        assert connects.begun.wait(WAIT_S)
        others.append(Elsewhere(lambda: client.put(b"k", b"v")))
        assert waiting.acquire(timeout=WAIT_S)
        if moment == "after":
            connects.go_on()
            real(future, timeout)
        patch.undo()
        raise KeyboardInterrupt

    others: list[Elsewhere] = []
    real = concurrent.futures.Future.result
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(concurrent.futures.Future, "result", result)
        with pytest.raises(KeyboardInterrupt):
            client.start()
    assert [other.end() for other in others] == [None]
    assert connects.count == 2
    before = [] if moment == "before" else [True]
    assert [database._closed for database in connects.made] == [*before, False]
    assert client.get(b"k") == b"v"


def test_an_interrupt_of_who_waits_leaves_the_connect_to_the_others(
    connects: Connects, client: Client, monkeypatch: pytest.MonkeyPatch
):
    def wait(_opening: SharedOpening) -> None:
        raise KeyboardInterrupt

    other = Elsewhere(lambda: client.put(b"k", b"v"))
    assert connects.begun.wait(WAIT_S)
    with monkeypatch.context() as patch:
        patch.setattr(SharedOpening, "wait", wait)
        with pytest.raises(KeyboardInterrupt):
            client.start()
    connects.go_on()
    assert other.end() is None
    assert client.get(b"k") == b"v"
    assert connects.count == 1
