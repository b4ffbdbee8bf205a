"""Claims of the client's watches about what goes wrong for a while: a watch goes on when it is over."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.client import Database
from kvstore.errors import DeadlineExceeded, KVError, Throttled
from kvstore.watches import EventType
from tests.unit.kvstore.fake_cluster import FakeCluster
from tests.unit.kvstore.fake_cluster import simulate as simulate_cluster
from txn.messages import Changed, Changes


def test_an_overload_that_is_over_ends_no_watch():
    """A poll that was refused for longer than its margin, and then taken, waits at its leader until its time is over."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        def changed(_node: int, request: Changes) -> Changed:
            version = cluster.seed(k=b"v")
            return Changed(request.id, version, [version], [b"k"], [b"v"])

        watch = db.watch(key=b"k")
        await watch.start()
        cluster.fail(Changes, "throttled", {"retry_after": 0.02}, times=10_000)
        pulling = asyncio.ensure_future(watch.pull())
        await asyncio.sleep(6.0)
        cluster.faults.clear()
        cluster.ignore(Changes)  # taken, and nothing is written for so long
        cluster.fault(Changes, changed)
        (event,) = await pulling
        assert (event.type, event.value) == (EventType.PUT, b"v")

    simulate_cluster(test)


@pytest.mark.parametrize(("silent", "error"), [(False, Throttled), (True, DeadlineExceeded)])
def test_one_whose_time_is_over_tells_the_last_that_it_heard(silent: bool, error: type[KVError]):
    async def test(cluster: FakeCluster, db: Database) -> None:
        watch = db.watch(key=b"k", timeout=4.0)
        await watch.start()
        cluster.fail(Changes, "throttled", {"retry_after": 0.02}, times=10_000)
        pulling = asyncio.ensure_future(watch.pull())
        await asyncio.sleep(3.0)
        if silent:
            cluster.faults.clear()
            cluster.ignore(Changes, times=10_000)
        with pytest.raises(error, match="throttled"):
            await pulling

    simulate_cluster(test)
