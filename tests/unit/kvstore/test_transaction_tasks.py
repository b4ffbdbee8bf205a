"""Claims of a transaction that several tasks share: its reads are of one version, none shows what was never there, and its id
is one."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.client import Database
from kvstore.errors import Conflict
from kvstore.transactions import Aborted, Committed
from tests.unit.kvstore.fake_cluster import FakeCluster, simulate
from txn.messages import Read, Scan


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
