"""Claims of a transaction that several tasks share: its reads are of one version, none shows what was never there, and its id
is one."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from kvstore.client import Database
from kvstore.errors import Conflict
from kvstore.transactions import Aborted, Committed
from tests.unit.kvstore.fake_cluster import FakeCluster, simulate
from txn.messages import KeepLocks, LockRead, Prepare, Read, Scan


def test_several_reads_awaited_together_share_a_version():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(a=b"1", z=b"1")
        async with db.transaction() as tx:
            await asyncio.gather(tx.get(b"a"), tx.get(b"z"), tx.scan().to_list(), tx.get(b"q"))
        ats = [read.at for read in cluster.of(Read)] + [scan.at for scan in cluster.of(Scan)]
        assert set(ats) == {tx.read_version}

    simulate(test, FakeCluster(b"m"))


@pytest.mark.parametrize("written", [False, True])
def test_a_read_under_way_as_its_key_is_cleared_finds_nothing(written: bool):
    """Neither what the operation made of the store's value is there any more, nor that value."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(n=b"5")
        async with db.transaction() as tx:
            if written:
                tx.put(b"a", b"1")
                tx.increment(b"n")
            reading = asyncio.ensure_future(tx.get(b"n"))
            reading_both = asyncio.ensure_future(tx.get_many([b"m", b"n"]))
            await asyncio.sleep(0)
            tx.delete_range(b"m", b"o")
            assert await reading is None
            assert await reading_both == {}
        assert await db.get(b"n") is None

    simulate(test)


def test_an_id_that_another_task_reads_during_the_commit_stays_the_commits():
    """Whenever it is read: before the first attempt, between two, or before the second one's id is taken."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        told: list[str] = []
        for moment in range(12):
            await db.get(b"a")
            cluster.set_ranges(b"b", version=2 * moment + 2)  # the first attempt meets other ranges
            tx = db.transaction()
            tx.put(b"a", b"%d" % moment)
            tx.put(b"c", b"1")
            commit = asyncio.ensure_future(tx.commit())
            for _ in range(moment):
                await asyncio.sleep(0)
            if moment >= 8:
                await asyncio.sleep(0.001 * (moment - 7))
            token = tx.id
            try:
                version = await commit or 0
            except Conflict:
                assert await db.outcome(token) == Aborted()
                told.append("aborted")
            else:
                assert await db.outcome(token) == Committed(version)
                told.append("committed")
            assert tx.id == token
            cluster.set_ranges(version=2 * moment + 3)
        assert set(told) == {"aborted", "committed"}

    simulate(test)


@pytest.mark.parametrize("shared", [False, True])
def test_a_key_that_another_task_has_locked_meanwhile_is_compared_with_what_that_one_found(
    shared: bool,
):
    """Its guard stays, too: between the two the lock was lost with its leader, and somebody else wrote the key."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        async def add_one() -> None:
            found = await tx.get_for_update(b"k")
            tx.put(b"k", b"%d" % (int(found or b"") + 1))

        async def other() -> None:
            await asyncio.sleep(0.1)
            cluster.seed(k=b"100")

        cluster.seed(k=b"1")
        asked = itertools.count(1)
        cluster.ignore(LockRead, where=lambda _: next(asked) == 2)
        cluster.ignore(KeepLocks, times=100)
        tx = db.transaction()
        again = tx.get_for_update(b"k", shared=shared)
        with pytest.raises(Conflict) as caught:
            await asyncio.gather(add_one(), again, other())
        assert caught.value.key == b"k"
        assert [(locked.value, locked.exclusive) for locked in tx._locks.found.values()] == [
            (b"1", True)
        ]
        with pytest.raises(Conflict):
            await tx.commit()
        assert cluster.value(b"k") == b"100"
        assert [guard.start for guard in cluster.of(Prepare)[-1].guards] == [b"k"]

    simulate(test)


def test_of_two_tasks_that_lock_a_key_at_once_both_find_the_same_and_one_guard_is_left():
    async def test(cluster: FakeCluster, db: Database) -> None:
        first = cluster.seed(k=b"1")
        asked = itertools.count(1)
        cluster.ignore(LockRead, where=lambda _: next(asked) == 2)
        cluster.ignore(KeepLocks, times=100)

        async def other() -> None:
            await asyncio.sleep(0.1)
            cluster.seed(q=b"1")  # the second answer is of a later time

        async with db.transaction() as tx:
            one, two, _ = await asyncio.gather(
                tx.get_for_update(b"k"), tx.get_for_update(b"k", shared=True), other()
            )
            assert one == two == b"1"
            tx.put(b"k", b"2")
        (guard,) = cluster.of(Prepare)[-1].guards
        assert (guard.start, guard.read_ts) == (b"k", first)
        assert cluster.value(b"k") == b"2"

    simulate(test)
