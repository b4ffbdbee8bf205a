"""Claims of the blocking client: the same names and errors from a thread of its own, beside a running loop too, closed
within a bounded time; and that programs written against the package pass mypy --strict."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Coroutine, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import kvstore
from kvstore.adapters.system import SystemClock
from kvstore.api import parse_addresses
from kvstore.client import Database
from kvstore.errors import (
    ClientClosed,
    CompareFailed,
    Conflict,
    InvalidArgument,
    Throttled,
    TransactionClosed,
    Unavailable,
)
from kvstore.loop_thread import LoopThread
from kvstore.ranges import RangeCache
from kvstore.sync import BlockingTransaction, Client
from kvstore.transactions import Committed
from kvstore.watches import Watch
from tests.unit.kvstore.fake_cluster import FakeCluster, blocking
from txn.messages import Changed, Changes, Prepare
from txn.types import FenceReason

ROOT = Path(__file__).parents[3]


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster(b"m")


@pytest.fixture
def db(cluster: FakeCluster) -> Iterator[Client]:
    with blocking(cluster) as client:
        yield client


def test_every_call_of_the_database_is_there(db: Client, cluster: FakeCluster):
    version = db.put(b"a", b"1")
    assert db.get(b"a") == b"1"
    assert db.get(b"q", b"none") == b"none"
    assert db.get_entry(b"a") == (b"a", b"1", version)
    db.put(b"z", b"2", if_absent=True)
    with pytest.raises(CompareFailed):
        db.put(b"z", b"3", if_absent=True)
    assert db.get_many([b"a", b"z", b"q"]) == {b"a": b"1", b"z": b"2"}
    assert db.increment(b"n", 5) == 5
    assert db.cas(b"n", b"5", b"6")
    assert list(db.scan()) == [(b"a", b"1"), (b"n", b"6"), (b"z", b"2")]
    assert db.scan(reverse=True, limit=1).to_list() == [(b"z", b"2")]
    with db.snapshot(at=version) as view:
        assert list(view.scan()) == [(b"a", b"1")]
        assert view.version() == version
    with db.batch() as batch:
        batch.put(b"b", b"1")
        batch.delete(b"z")
    assert batch.version
    with pytest.raises(TransactionClosed):
        batch.put(b"c", b"1")
    assert db.get(b"z") is None
    assert db.delete(b"a")
    assert db.delete_range(b"a", b"c")
    assert db.clear_range() == 1
    assert list(db.scan()) == []
    assert db.stats()["messages_sent"] > 0


@pytest.mark.parametrize("how", ["stale", "snapshot", "plain"])
def test_what_a_scan_needs_of_the_ranges_is_looked_up_on_the_clients_own_thread(
    db: Client, monkeypatch: pytest.MonkeyPatch, how: str
):
    """There they change: between two of their lists another thread would find one that is newer than the other."""
    db.put(b"a", b"1")
    seen: list[threading.Thread] = []

    def noted(real: Any) -> Any:
        def call(*args: Any) -> Any:
            seen.append(threading.current_thread())
            return real(*args)

        return call

    for name in ("split", "find", "before"):
        monkeypatch.setattr(RangeCache, name, noted(getattr(RangeCache, name)))
    rows = {
        "stale": lambda: db.scan(max_staleness=5.0),
        "snapshot": lambda: db.snapshot(max_staleness=5.0).scan(),
        "plain": db.scan,
    }[how]()
    assert list(rows) == [(b"a", b"1")]
    assert seen
    assert threading.current_thread() not in seen


def test_transactions_commit_on_a_clean_exit_and_roll_back_on_an_exception(db: Client):
    with db.transaction() as tx:
        tx.put(b"a", b"1")
        tx.increment(b"n", 2)
        assert tx.get(b"a") == b"1"
        assert tx.get_many([b"n"]) == {b"n": b"2"}
        assert list(tx.scan()) == [(b"a", b"1"), (b"n", b"2")]
        token = tx.id
    assert db.outcome(token) == Committed(tx.commit_version or 0)
    with pytest.raises(ZeroDivisionError), db.transaction() as tx:  # noqa: PT012 - the end of the block is what raises
        tx.delete(b"a")
        raise ZeroDivisionError
    assert db.get(b"a") == b"1"


def test_run_tries_again_and_keeps_results(db: Client, cluster: FakeCluster):
    runs = 0

    def fn(tx: BlockingTransaction) -> int:
        nonlocal runs
        runs += 1
        tx.increment(b"n")
        return runs

    cluster.refuse(FenceReason.CONFLICT, times=2)
    assert db.run(fn) == 3
    assert db.run(fn, idempotency_key="once") == 4
    assert db.run(fn, idempotency_key="once") == 4
    assert db.get(b"n") == b"2"
    cluster.refuse(FenceReason.CONFLICT)
    with pytest.raises(Conflict), db.transaction() as tx:
        tx.put(b"a", b"1")


def test_transactional_takes_a_blocking_client_and_its_transactions(db: Client):
    @kvstore.transactional
    def bump(tx: BlockingTransaction, key: bytes) -> bytes | None:
        tx.increment(key)
        return tx.get(key)

    assert bump(db, b"n") == b"1"
    with db.transaction() as tx:
        assert bump(tx, b"n") == b"2"
        assert bump(tx, b"n") == b"3"
    with pytest.raises(InvalidArgument):
        bump("db", b"n")  # type: ignore[arg-type]


async def test_it_works_where_a_loop_is_running(cluster: FakeCluster):
    async def make() -> Database:
        await cluster.start()
        database = cluster.database(clock=SystemClock())
        await database.start()
        return database

    with Client.over(make) as db:  # as in a notebook
        assert db.put(b"a", b"1")
        assert db.get(b"a") == b"1"


def test_several_threads_share_a_client(db: Client, cluster: FakeCluster):
    def work(number: int) -> None:
        for round_ in range(20):
            db.put(b"%d/%d" % (number, round_), b"v")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(db.scan(keys_only=True).to_list()) == 80


def test_it_connects_at_the_first_call_and_closes_twice(cluster: FakeCluster):
    made = 0

    async def make() -> Database:
        nonlocal made
        made += 1
        await cluster.start()
        database = cluster.database(clock=SystemClock())
        await database.start()
        return database

    client = Client.over(make)
    assert made == 0
    client.put(b"a", b"1")
    client.get(b"a")
    assert made == 1
    client.close()
    client.close()
    with pytest.raises(ClientClosed):
        client.get(b"a")
    assert not any(thread.name == "kvstore-client" for thread in threading.enumerate())


def test_what_other_threads_wait_for_ends_when_it_is_closed(cluster: FakeCluster):
    async def make() -> Database:
        await cluster.start()
        database = cluster.database(clock=SystemClock())
        await database.start()
        return database

    client = Client.over(make)
    client.start()
    pausing = threading.Event()

    def fn(_tx: BlockingTransaction) -> None:
        pausing.set()
        raise Throttled(20.0)

    def run() -> None:
        try:
            client.run(fn)
        except ClientClosed as error:
            ended.append(error)

    ended: list[ClientClosed] = []
    other = threading.Thread(target=run, daemon=True)
    other.start()
    assert pausing.wait(10.0)
    client.close()
    other.join(10.0)
    assert not other.is_alive()
    assert len(ended) == 1


def test_an_interrupt_as_the_events_come_loses_none_of_a_watch(
    db: Client, cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
):
    def act(_node: int, request: Changes) -> Changed:
        version = cluster.ts + 1
        return Changed(request.id, version, [version], [b"k"], [b"v"])

    def interrupted(thread: LoopThread, work: Coroutine[Any, Any, Any]) -> None:
        call(thread, work)
        raise KeyboardInterrupt

    cluster.fault(Changes, act)
    call = LoopThread.call
    with db.watch(key=b"k") as watch:
        began = watch.version
        with monkeypatch.context() as patch:
            patch.setattr(LoopThread, "call", interrupted)
            with pytest.raises(KeyboardInterrupt):
                watch.pull()
        assert watch.version == began
        assert [(event.key, event.version) for event in watch.pull()] == [(b"k", began + 1)]
        assert watch.version == began + 1


def test_after_an_interrupt_the_next_call_finds_nothing_of_the_one_before(
    db: Client, cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
):
    """A watch has one consumer at a time. The signal is a real one, and comes as the call waits."""

    def on_alarm(_number: int, _frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if due.is_set():
            due.clear()
            raise KeyboardInterrupt

    async def interrupted(watch: Watch, rows_max: int = 0) -> None:
        due.set()
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.05)  # again: one before the wait wakes nobody
        await fill(watch, rows_max)

    due, fill = threading.Event(), Watch.fill
    cluster.ignore(Changes, times=10_000)
    monkeypatch.setattr(Watch, "fill", interrupted)
    before = signal.signal(signal.SIGALRM, on_alarm)
    try:
        with db.watch(key=b"k") as watch:
            for _ in range(10):
                with pytest.raises(KeyboardInterrupt):
                    watch.pull()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_watch_that_another_thread_opens_as_the_client_closes_is_in_nobodys_way(db: Client):
    """Watches are opened on their callers' threads. Here one is opened at every line of a walk over those that are open."""
    opened = [db.watch(key=b"k"), db.watch(key=b"k")]

    def at_line(frame: FrameType, event: str, _argument: object) -> Any:
        if event == "line" and frame.f_code is weakref.WeakKeyDictionary.__iter__.__code__:
            opened.append(db.watch(key=b"k"))
        return at_line

    async def close(database: Database) -> None:
        before = sys.gettrace()
        sys.settrace(at_line)
        try:
            await database._watches.close()
        finally:
            sys.settrace(before)

    assert db._opened is not None
    thread, database = db._opened
    thread.call(close(database))


def test_in_a_forked_process_it_is_closed_and_its_parents_goes_on(
    db: Client, monkeypatch: pytest.MonkeyPatch
):
    db.put(b"a", b"1")
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 0)
        with pytest.raises(ClientClosed, match="fork"):
            db.get(b"a")
    assert db.get(b"a") == b"1"


def test_leaving_its_block_in_a_forked_process_raises_nothing(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
):
    async def make() -> Database:
        await cluster.start()
        database = cluster.database(clock=SystemClock())
        await database.start()
        return database

    with monkeypatch.context() as patch, Client.over(make) as client:
        thread, database = client._open()
        patch.setattr(os, "getpid", lambda: 0)
    thread.call(database.close())  # the parent's, which goes on
    thread.close()


def test_a_failure_to_connect_leaves_no_thread(cluster: FakeCluster):
    async def make() -> Database:
        database = cluster.database(0.05)
        await database.start()
        return database

    with pytest.raises(Unavailable), Client.over(make):
        pass
    assert not any(thread.name == "kvstore-client" for thread in threading.enumerate())


def test_prepares_of_threads_are_whole(db: Client, cluster: FakeCluster):
    db.put(b"k", bytes(500_000))
    assert len(cluster.of(Prepare)) == 1
    assert cluster.value(b"k") == bytes(500_000)


def test_the_two_clients_have_the_same_names():
    def names(of: type) -> dict[str, list[str]]:
        ignored = {"router", "begin", "attempts", "commit_batch", "open", "over"}
        return {
            name: list(inspect.signature(member).parameters)
            for name, member in inspect.getmembers(of, inspect.isroutine)
            if not name.startswith("_") and name not in ignored
        }

    assert names(Client) == names(Database)
    ignored = {"recall", "remember", "contested_by"}
    wanted = {name for name in dir(kvstore.Transaction) if not name.startswith("_")} - ignored
    assert wanted - {"age"} == {name for name in dir(BlockingTransaction) if name[0] != "_"}


@pytest.mark.parametrize("text", ["", ",", "host", "host:", ":1", "host:x", "host:0", "host:70000"])
def test_addresses_are_checked_before_anything_is_dialled(text: str):
    with pytest.raises(InvalidArgument):
        _ = kvstore.connect(text)
    with pytest.raises(InvalidArgument):
        kvstore.Client(text)


def test_addresses_may_be_text_or_several():
    assert parse_addresses("a:1, b:2,") == parse_addresses(["a:1", "b:2"]) == ["a:1", "b:2"]
    assert parse_addresses("[::1]:7400") == ["[::1]:7400"]


async def test_connect_can_be_awaited_or_entered_and_says_that_nobody_is_there():
    with pytest.raises(Unavailable):
        await kvstore.connect("127.0.0.1:1", timeout=0.1)
    with pytest.raises(Unavailable):
        async with kvstore.connect("127.0.0.1:1", timeout=0.1):
            pass
    await asyncio.sleep(0)


PROGRAM = """
import asyncio
import kvstore
from kvstore import errors


@kvstore.transactional
async def transfer(tx: kvstore.Transaction, a: bytes, b: bytes, n: int) -> int:
    left = int(await tx.get(a, b"0")) - n
    tx.put(a, b"%d" % left)
    tx.increment(b, n)
    return left


@kvstore.transactional
def bump(tx: kvstore.BlockingTransaction, key: bytes) -> bytes:
    tx.increment(key, by=2)
    return tx.get(key, b"")


async def main() -> None:
    async with kvstore.connect("127.0.0.1:7400,127.0.0.1:7401", timeout=5.0) as db:
        version: int = await db.put(b"k", b"v", if_absent=True)
        value: bytes | None = await db.get(b"k")
        sure: bytes = await db.get(b"k", b"")
        value = await db.get(b"k", default=None)
        value = await db.get(b"k", value)
        entry = await db.get_entry(b"k")
        if entry is not None:
            version = await db.put(entry.key, entry.value, if_version=entry.version)
        many: dict[bytes, bytes] = await db.get_many([b"k", b"l"])
        async for key, row in db.scan(prefix=b"a", limit=10, reverse=True, keys_only=True):
            print(key + row)
        rows: list[tuple[bytes, bytes]] = await db.scan(b"a", b"b", at=version).to_list()
        async with db.batch() as batch:
            batch.put(b"a", b"1")
            batch.delete(b"b")
        view = db.snapshot(at=version)
        print(value, sure, many, rows, await view.get(b"k"), await view.get_many([b"k"]))
        print(await view.get(b"k", default=None), await view.get(b"k", value))
        async with db.transaction(read_only=True, timeout=1.0, priority=1) as tx:
            first, second = await asyncio.gather(tx.get(b"a"), tx.get(b"b"))
            first, second = await tx.get(b"a", default=None), await tx.get(b"b", first)
            print(first, second, tx.read_version, tx.commit_version)
        left: int = await transfer(db, b"a", b"b", 5)

        async def fn(tx: kvstore.Transaction) -> str:
            await transfer(tx, b"a", b"b", left)
            return tx.id

        token: str = await db.run(fn, idempotency_key="x")
        outcome = await db.outcome(token)
        if isinstance(outcome, kvstore.Committed):
            print(outcome.version)
        try:
            done: bool = await db.cas(b"k", None, b"v")
            print(done, await db.increment(b"n", 3, format="int64"))
        except errors.Conflict as error:
            print(error.key, error.code, error.retryable)
    async with kvstore.open("./data") as db:
        await db.delete_range(b"a", b"b")


def blocking() -> None:
    with kvstore.Client("127.0.0.1:7400") as db:
        number: bytes = bump(db, b"n")
        print(number, db.get(b"k", default=b""))
        value: bytes | None = db.get(b"k", default=None)
        value = db.get(b"k", value, timeout=1.0)
        print(value, db.snapshot().get(b"k", default=None), db.snapshot().get(b"k", value))
        for key, value in db.scan(start=b"a"):
            print(key, value)
        with db.transaction() as tx:
            bump(tx, b"n")
            value = tx.get(b"n", default=None) or tx.get(b"k", value)
    with kvstore.Client.open("./data") as db:
        db.put(b"k", b"v", if_version=kvstore.ANY)


asyncio.run(main())
"""

MISTAKES = """
import kvstore

async def main(db: kvstore.Database) -> None:
    number: int = await db.get(b"k")
    await db.put("k", b"v")
    async with db.transaction() as tx:
        await tx.put(b"k", b"v")
"""


@pytest.mark.slow
def test_programs_that_use_it_pass_mypy_strict_and_mistakes_do_not(tmp_path: Path):
    def check(text: str) -> subprocess.CompletedProcess[str]:
        program = tmp_path / "program.py"
        program.write_text(text)
        command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(program)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    good = check(PROGRAM)
    assert good.returncode == 0, good.stdout
    bad = check(MISTAKES)
    lines = {line.split(":")[1] for line in bad.stdout.splitlines()}
    assert lines == {"5", "6", "8"}, bad.stdout
