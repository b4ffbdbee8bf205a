"""Claims of calls of a loop in another thread: what is interrupted or closed comes to its end before the loop stops, its caller
learns that it may have happened, what an interrupted caller never saw is undone, and what work raises is its caller's alone."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from kvstore.errors import ClientClosed, InvalidArgument, KVError
from kvstore.loop_thread import LoopThread
from kvstore.sync import Client
from tests.unit.kvstore.fake_cluster import FakeCluster, blocking
from txn.messages import Prepare

Interrupt = Callable[[str], None]


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Interrupt:
    """Ctrl-C, once, as the main thread waits: before there is an answer, or just behind it."""

    def arm(moment: str) -> None:
        def result(future: concurrent.futures.Future[Any], timeout: float | None = None) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return real(future, timeout)
            if moment == "after":
                real(future, timeout)
            monkeypatch.undo()
            raise KeyboardInterrupt

        real = concurrent.futures.Future.result
        monkeypatch.setattr(concurrent.futures.Future, "result", result)

    return arm


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster()


@pytest.fixture
def db(cluster: FakeCluster) -> Iterator[Client]:
    with blocking(cluster) as client:
        yield client


def called_elsewhere(
    thread: LoopThread, work: Coroutine[Any, Any, None], told: list[ClientClosed]
) -> threading.Thread:
    """A thread that waits for the work; `told` gets what it is told when the client is closed."""

    def call() -> None:
        try:
            thread.call(work)
        except ClientClosed as error:
            told.append(error)

    other = threading.Thread(target=call, daemon=True)
    other.start()
    return other


# --- the thread -----------------------------------------------------------------------------------


def test_a_call_from_the_clients_own_thread_is_refused_and_does_not_wait_for_itself():
    """As `on_progress` of `clear_range` would make it."""
    thread = LoopThread("t")

    async def callback() -> None:
        thread.call(asyncio.sleep(0))

    try:
        with pytest.raises(InvalidArgument, match="own thread"):
            thread.call(callback())
        assert thread.call(asyncio.sleep(0, "goes on")) == "goes on"
    finally:
        thread.close()


def test_what_close_cancels_comes_to_its_end_and_its_caller_learns_that_it_may_have_happened():
    thread = LoopThread("t")
    waiting, ended, told = threading.Event(), list[str](), list[ClientClosed]()

    async def work() -> None:
        try:
            waiting.set()
            await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(0)
            ended.append("ended")

    other = called_elsewhere(thread, work(), told)
    assert waiting.wait(10.0)
    thread.close()
    assert ended == ["ended"]
    other.join(10.0)
    assert [error.maybe_committed for error in told] == [True]


def test_what_does_not_end_when_it_is_cancelled_is_left_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("kvstore.loop_thread.END_TIMEOUT_S", 0.01)
    thread = LoopThread("t")
    waiting, told = threading.Event(), list[ClientClosed]()

    async def work() -> None:
        while True:
            try:
                waiting.set()
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                continue

    other = called_elsewhere(thread, work(), told)
    assert waiting.wait(10.0)
    thread.close()
    other.join(10.0)
    assert len(told) == 1


def test_a_call_that_is_interrupted_at_once_has_begun_and_does_what_it_does_at_its_end(
    interrupt: Interrupt,
):
    """An interrupted `close` of a database has begun to close it."""
    thread = LoopThread("t")
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append("ended")

    interrupt("before")
    with pytest.raises(KeyboardInterrupt):
        thread.call(work())
    thread.close()
    assert ended == ["ended"]


def test_an_interrupted_caller_waits_for_the_end_and_only_so_long(interrupt: Interrupt):
    thread, ends = LoopThread("t"), asyncio.Event()
    told: list[str] = []

    async def work() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await ends.wait()
            told.append("ended")

    async def end() -> None:
        ends.set()

    interrupt("before")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvstore.loop_thread.END_TIMEOUT_S", 0.05)
        with pytest.raises(KeyboardInterrupt):
            thread.call(work())
    assert not told
    thread.call(end())
    thread.close()
    assert told == ["ended"]


def test_an_interrupt_as_a_call_is_handed_over_leaves_nothing_of_it():
    class Interrupted(dict[Any, None]):
        def __setitem__(self, call: Any, value: None) -> None:
            super().__setitem__(call, value)
            raise KeyboardInterrupt

    thread = LoopThread("t")
    begun: list[str] = []

    async def work() -> None:
        begun.append("begun")

    thread._calls, calls = Interrupted(), thread._calls
    with pytest.raises(KeyboardInterrupt):
        thread.call(work())
    assert not thread._calls
    thread._calls = calls
    thread.close()
    assert not begun


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_work_that_raises_system_exit_ends_its_own_call_alone(error: BaseException):
    """As `on_progress` of `clear_range` may."""
    thread = LoopThread("t")
    waiting, told = threading.Event(), list[ClientClosed]()

    async def work() -> None:
        waiting.set()
        await asyncio.get_running_loop().create_future()

    async def ends() -> None:
        await asyncio.sleep(0)
        raise error

    other = called_elsewhere(thread, work(), told)
    assert waiting.wait(10.0)
    with pytest.raises(type(error)) as raised:
        thread.call(ends())
    assert raised.value is error
    assert thread.call(asyncio.sleep(0, "goes on")) == "goes on"
    assert other.is_alive()
    thread.close()
    other.join(10.0)
    assert len(told) == 1


def test_several_may_close_it_at_once_and_each_waits_for_the_end():
    thread, ends = LoopThread("t"), asyncio.Event()
    waiting, closing, ended = threading.Event(), threading.Event(), list[str]()

    async def work() -> None:
        waiting.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            closing.set()
            await ends.wait()
            ended.append("ended")

    def close() -> None:
        thread.close()
        ended.append("closed")

    called_elsewhere(thread, work(), [])
    assert waiting.wait(10.0)
    closers = [threading.Thread(target=close, daemon=True) for _ in range(2)]
    for closer in closers:
        closer.start()
    assert closing.wait(10.0)
    thread._loop.call_soon_threadsafe(ends.set)
    for closer in closers:
        closer.join(10.0)
    assert ended == ["ended", "closed", "closed"]
    thread.close()


def test_in_a_forked_process_close_does_nothing_though_a_thread_that_is_not_there_holds_the_lock(
    monkeypatch: pytest.MonkeyPatch,
):
    thread = LoopThread("t")
    with monkeypatch.context() as patch, thread._lock:
        patch.setattr(os, "getpid", lambda: 0)
        closer = threading.Thread(target=thread.close, daemon=True)
        closer.start()
        closer.join(10.0)
        assert not closer.is_alive()
    assert thread.call(asyncio.sleep(0, "goes on")) == "goes on"
    thread.close()


# --- the client -----------------------------------------------------------------------------------


def test_a_write_that_happened_is_not_called_undone_when_another_threads_close_is_interrupted(
    db: Client, cluster: FakeCluster, interrupt: Interrupt
):
    def applied(_node: int, _request: Prepare) -> None:
        written.set()

    def write() -> None:
        try:
            db.put(b"a", b"1")
        except KVError as error:
            told.append(error)

    written, told = threading.Event(), list[KVError]()
    cluster.fault(Prepare, applied, after=True, times=100)  # and no answer
    other = threading.Thread(target=write, daemon=True)
    other.start()
    assert written.wait(10.0)
    interrupt("before")
    with pytest.raises(KeyboardInterrupt):
        db.close()
    other.join(10.0)
    assert cluster.value(b"a") == b"1"
    assert [error.maybe_committed for error in told] == [True]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("how", ["transaction", "snapshot"])
def test_an_interrupt_as_a_block_begins_leaves_nothing_open(
    db: Client, interrupt: Interrupt, how: str, moment: str
):
    db.put(b"a", b"1")
    assert db._opened is not None
    thread, database = db._opened
    block: Any = db.transaction() if how == "transaction" else db.snapshot()
    interrupt(moment)
    with pytest.raises(KeyboardInterrupt):
        block.__enter__()
    thread.call(asyncio.sleep(0))
    assert len(database._views) == 0
