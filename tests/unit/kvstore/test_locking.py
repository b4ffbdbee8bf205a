"""Claims of a client's locks (kvstore/locking.py): whoever ends a transaction ends them all, and is told."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from kvstore import limits, locking
from kvstore.client import Database
from kvstore.errors import DeadlineExceeded, LockTimeout, TransactionClosed, TransactionTooOld
from kvstore.locking import GRACE_S
from kvstore.transactions import Transaction
from tests.unit.kvstore.fake_cluster import FakeCluster, simulate
from txn.messages import (
    Failure,
    GetTimestamps,
    KeepLocks,
    LockLeases,
    LockPending,
    LockRead,
    Prepare,
    Read,
    ReadReply,
    Scan,
    Unlock,
)


def test_who_goes_on_locking_beside_a_transaction_that_has_ended_locks_nothing_more():
    async def test(cluster: FakeCluster, db: Database) -> None:
        asked = asyncio.Event()

        def grant(_: int, request: LockRead) -> ReadReply:
            asked.set()
            return ReadReply(request.id, cluster.ts, [0], [None])

        cluster.fault(LockRead, grant)
        tx = db.transaction()
        task = asyncio.create_task(tx.get_many_for_update([b"a", b"z"]))
        await asked.wait()  # the lock is held, and its answer is on its way
        await tx.rollback()
        with pytest.raises(TransactionClosed):
            await task
        await asyncio.sleep(0.1)
        assert [each.key for each in cluster.of(LockRead)] == [b"a"]
        assert [each.key for each in cluster.of(Unlock)] == [b"a"]
        assert len(db._committer.keeper) == 0

    simulate(test, FakeCluster(b"m"))


@pytest.mark.parametrize("written", [True, False])
def test_writes_of_a_transaction_that_a_lock_has_ended_are_not_lost_in_silence(written: bool):
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.fault(LockRead, lambda _, request: LockPending(request.id, b"x"), times=100)

        async def skip_if_busy() -> None:
            async with db.transaction() as tx:
                if written:
                    tx.put(b"log", b"v")
                with contextlib.suppress(LockTimeout):
                    await tx.get_for_update(b"a", timeout=0)

        if written:
            with pytest.raises(LockTimeout):
                await skip_if_busy()
        else:
            await skip_if_busy()
        assert cluster.of(Prepare) == []

    simulate(test)


def test_a_lock_wait_that_ends_beside_the_commit_does_not_undo_what_was_committed():
    async def test(cluster: FakeCluster, db: Database) -> None:
        def busy(_: int, request: Prepare) -> Failure:
            """The commit has to be sent again; meanwhile the lock's wait is over."""
            asked = cluster.of(LockRead)[-1]
            cluster.also.append(LockPending(asked.id, b"x"))
            return Failure(request.id, "throttled", "", {"retry_after": 0.1})

        def unlocked() -> list[bytes]:
            return [each.key for each in cluster.of(Unlock)]

        cluster.ignore(LockRead, where=lambda request: request.key == b"k")
        cluster.fault(Prepare, busy)
        async with db.transaction() as tx:
            await tx.get_for_update(b"a")
            tx.put(b"b", b"1")
            waiting = asyncio.create_task(tx.get_for_update(b"k", timeout=0))
            await cluster.settled()
            committing = asyncio.create_task(tx.commit())
            with pytest.raises(LockTimeout):
                await waiting
            await asyncio.sleep(0.05)
            assert not committing.done()
            assert unlocked() == []
            version = await committing
        assert tx.commit_version == version
        assert cluster.value(b"b") == b"1"
        await cluster.settled()
        assert unlocked() == [b"k"]

    simulate(test)


@pytest.mark.parametrize("timeout", [0, 0.1])
def test_a_lock_waits_no_longer_than_it_was_told_though_the_oracle_is_silent(timeout: float):
    async def test(cluster: FakeCluster, db: Database) -> None:
        now = asyncio.get_running_loop().time
        async with db.transaction() as tx:
            await asyncio.sleep(1.5)  # what was seen of the oracle is too old for an id
            cluster.ignore(GetTimestamps, times=100)
            began = now()
            with pytest.raises(DeadlineExceeded):
                await tx.get_for_update(b"a", timeout=timeout)
            assert now() - began <= timeout + GRACE_S + 0.01

    simulate(test)


def test_locks_of_a_transaction_that_nobody_has_any_more_end_with_their_lease():
    async def test(cluster: FakeCluster, db: Database) -> None:
        async def lock_and_stay(key: bytes) -> None:
            tx = db.transaction()
            await tx.get_for_update(key)
            await asyncio.sleep(1_000)

        def kept() -> list[list[bytes]]:
            return [each.owners for each in cluster.of(KeepLocks)]

        def keep(_: int, request: KeepLocks) -> LockLeases:
            return LockLeases(request.id, 10.0, [])

        cluster.fault(KeepLocks, keep, times=100)
        tasks = [asyncio.create_task(lock_and_stay(key)) for key in (b"a", b"b")]
        await asyncio.sleep(1.5)
        owners = [each.owner for each in cluster.of(LockRead)]
        assert kept() == [owners]
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        del tasks[0]
        await asyncio.sleep(10.0)
        assert kept()[1:] == [[owners[1]]] * 3
        assert len(db._committer.keeper) == 1
        tasks[0].cancel()
        await asyncio.wait(tasks)
        tasks.clear()
        await asyncio.sleep(100.0)
        assert len(kept()) <= 5
        assert len(db._committer.keeper) == 0
        assert db._committer.keeper._timer is None

    simulate(test)


def test_writes_of_a_transaction_that_is_too_old_are_not_lost_in_silence():
    async def test(cluster: FakeCluster, db: Database) -> None:
        with pytest.raises(TransactionTooOld):  # noqa: PT012 - the end of the block is what raises
            async with db.transaction() as tx:
                tx.put(b"a", b"1")
                await asyncio.sleep(limits.TXN_AGE_S_MAX + 1)
                with contextlib.suppress(TransactionTooOld):
                    await tx.get(b"b")
        with pytest.raises(TransactionClosed):
            tx.put(b"a", b"2")
        assert cluster.of(Prepare) == []

    simulate(test)


def test_a_buffered_write_of_one_that_is_too_old_gives_no_lock_back_on_whatever_thread_it_is():
    """The blocking client writes on its caller's thread, where nothing may be sent."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        async with db.transaction() as tx:
            await tx.get_for_update(b"a")
            tx._begun_at -= limits.TXN_AGE_S_MAX  # before the timer of the locks comes
            await asyncio.sleep(0.1)
            with pytest.raises(TransactionTooOld):
                tx.put(b"a", b"1")
            await asyncio.sleep(0.1)
            assert cluster.of(Unlock) == []
            await tx.rollback()
        await asyncio.sleep(0.1)
        assert [each.key for each in cluster.of(Unlock)] == [b"a"]

    simulate(test)


def test_a_transaction_that_ends_before_its_first_lock_takes_none():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await asyncio.sleep(2.0)
        tx = db.transaction()
        task = asyncio.create_task(tx.get_for_update(b"a"))
        await asyncio.sleep(0)
        await tx.rollback()
        with pytest.raises(TransactionClosed):
            await task
        assert not cluster.of(LockRead)
        assert len(db._committer.keeper) == 0

    simulate(test)


@pytest.mark.parametrize("kind", ["get", "get_many", "scan"])
def test_a_read_that_is_answered_after_the_commit_raises_for_nothing_guards_it(kind: str):
    async def test(cluster: FakeCluster, db: Database) -> None:
        async def held(tx: Transaction) -> None:
            if kind == "get":
                await tx.get(b"b")
            elif kind == "get_many":
                await tx.get_many([b"b", b"c"])
            else:
                await tx.scan().to_list()

        cluster.fault(Read, lambda *_: None, where=lambda request: request.keys != [b"a"])
        cluster.fault(Scan, lambda *_: None)  # no answer, before the client asks again
        async with db.transaction() as tx:
            await tx.get(b"a")
            task = asyncio.create_task(held(tx))
            await asyncio.sleep(0.01)
            tx.put(b"a", b"1")
        with pytest.raises(TransactionClosed):
            await task

    simulate(test)


def test_one_message_renews_no_more_leases_than_a_range_takes_at_once(monkeypatch):
    monkeypatch.setattr(locking, "NAMED_MAX", 2)

    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.fault(KeepLocks, lambda _, request: LockLeases(request.id, 10.0, []), times=3)
        async with contextlib.AsyncExitStack() as stack:
            for number in range(5):
                tx = await stack.enter_async_context(db.transaction())
                await tx.get_for_update(b"a%d" % number)
            await asyncio.sleep(1.5 * locking.KEEP_S)
            kept = cluster.of(KeepLocks)
            assert [len(each.owners) for each in kept] == [2, 2, 1]
            assert len({owner for each in kept for owner in each.owners}) == 5

    simulate(test)
