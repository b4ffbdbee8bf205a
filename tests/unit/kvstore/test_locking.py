"""Claims of a client's locks (kvstore/locking.py): whoever ends a transaction ends them all, and is told."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from kvstore.client import Database
from kvstore.errors import LockTimeout, TransactionClosed
from tests.unit.kvstore.fake_cluster import FakeCluster, simulate
from txn.messages import LockPending, LockRead, Prepare, ReadReply, Unlock


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
