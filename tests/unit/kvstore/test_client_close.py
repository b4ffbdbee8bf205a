"""Claims of how a client ends: what it was asked to commit comes to its end, within a bound; and everything of it goes, however
often it is closed, and whoever is cancelled."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.batch import Batch
from kvstore.client import Database
from kvstore.errors import ClientClosed, KVError
from kvstore.streams import Stream
from tests.unit.kvstore.fake_cluster import FakeCluster, simulate
from txn.messages import Prepare, Read


def now() -> float:
    return asyncio.get_running_loop().time()


async def begun(cluster: FakeCluster, db: Database) -> asyncio.Future[int | None]:
    """A commit over two ranges that nobody answers."""
    cluster.ignore(Prepare, times=10_000)
    batch = Batch()
    batch.put(b"a", b"1")
    batch.put(b"z", b"1")
    writing = asyncio.ensure_future(db.commit_batch(batch, timeout=60.0))
    await asyncio.sleep(0.1)
    return writing


async def cancelled_commit(db: Database) -> None:
    """One over two ranges, whose caller gives up when it has been sent."""

    async def work() -> None:
        async with db.batch() as batch:
            batch.put(b"a", b"1")
            batch.put(b"z", b"1")

    call = asyncio.ensure_future(work())
    await asyncio.sleep(0.1)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)


def test_a_cancelled_commit_over_several_ranges_comes_to_its_end_by_itself():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await db.get(b"a")
        cluster.fail(Prepare, "throttled", {"retry_after_s": 0.3})
        await cancelled_commit(db)
        assert len(cluster.parts) == 1
        await db.close()  # waits for it
        assert not cluster.parts
        assert len(cluster.data) == 2

    simulate(test, FakeCluster(b"m"))


def test_close_waits_for_such_a_commit_only_so_long():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.ignore(Prepare, times=100)
        await cancelled_commit(db)
        began = now()
        await db.close()
        assert now() - began < 3.0

    simulate(test, FakeCluster(b"m"))


def test_a_cancelled_close_closes_all_the_same():
    closed: list[str] = []

    async def on_close() -> None:
        closed.append("network")

    async def test(cluster: FakeCluster, _db: Database) -> None:
        other = cluster.database(on_close=on_close)
        await other.start()
        writing = await begun(cluster, other)
        closing = asyncio.ensure_future(other.close())
        await asyncio.sleep(0.1)
        closing.cancel()
        assert isinstance(
            (await asyncio.gather(closing, return_exceptions=True))[0], asyncio.CancelledError
        )
        assert closed == ["network"]
        assert not any(link.channel for link in other.router.links)
        with pytest.raises(KVError):
            await writing
        assert other.router.calls == 0
        await other.close()
        assert closed == ["network"]

    simulate(test, FakeCluster(b"m"))


@pytest.mark.parametrize("turns", range(1, 7))
def test_a_close_that_is_cancelled_as_it_begins_ends_the_calls_all_the_same(turns: int):
    """Though a dial is under way; and it leaves no connection behind."""

    async def never(_address: str, _node: int) -> Stream:
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async def test(cluster: FakeCluster, db: Database) -> None:
        await db.get(b"a")
        await db.get(b"z")
        links = db.router.links.by_node
        channel, lost = links[1].channel, links[2].channel
        assert isinstance(channel, Stream)
        assert lost is not None
        db.router._dial = never
        lost.abort()
        await asyncio.sleep(0.1)
        cluster.ignore(Read, times=10)
        reads = [asyncio.ensure_future(db.get(key, timeout=60.0)) for key in (b"a", b"z")]
        await asyncio.sleep(0.1)
        assert links[2].dialling
        assert all(link.pending for link in (links[1], links[2]))
        closing = asyncio.ensure_future(db.close())
        for _ in range(turns):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        for error in await asyncio.gather(*reads, return_exceptions=True):
            assert isinstance(error, ClientClosed)
        assert db.router.calls == 0
        assert not channel.is_open
        assert not any(link.channel for link in db.router.links)

    simulate(test, FakeCluster(b"m"))


def test_a_second_close_waits_for_the_first_one_and_does_what_that_one_left():
    async def test(cluster: FakeCluster, db: Database) -> None:
        writing = await begun(cluster, db)
        first, second = (asyncio.ensure_future(db.close()) for _ in range(2))
        await asyncio.sleep(0.1)
        for _ in range(2):  # the second time in the midst of what a cancelled one does
            first.cancel()
            await asyncio.sleep(0)
        await second
        assert first.done()
        with pytest.raises(KVError):
            await writing
        assert not any(link.channel for link in db.router.links)
        assert db.router.calls == 0

    simulate(test, FakeCluster(b"m"))


def test_parts_of_a_commit_that_wait_for_another_try_are_counted_once_when_it_is_closed():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await db.get(b"a")
        await db.get(b"z")
        for node in cluster.nodes:
            cluster.stop_node(node)
        await asyncio.sleep(0.5)
        writing = await begun(cluster, db)
        await db.close()
        with pytest.raises(KVError):
            await writing
        assert db.router.calls == 0

    simulate(test, FakeCluster(b"m"))


def test_a_client_that_is_not_open_says_so():
    async def test(cluster: FakeCluster, db: Database) -> None:
        other = cluster.database()
        for call in (lambda: other.put(b"k", b"v"), lambda: other.get(b"k")):
            with pytest.raises(ClientClosed):
                await call()
        with pytest.raises(ClientClosed):
            other.transaction()
        await other.close()
        with pytest.raises(ClientClosed):
            await other.start()
        await db.close()
        await db.close()

    simulate(test)


def test_what_belongs_to_the_client_is_closed_with_it():
    closed: list[str] = []

    async def on_close() -> None:
        closed.append("network")

    async def test(cluster: FakeCluster, db: Database) -> None:
        async with cluster.database(on_close=on_close) as other:
            await other.put(b"k", b"v")
        assert closed == ["network"]

    simulate(test)
