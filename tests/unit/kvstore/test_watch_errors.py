"""Claims of the client's watches about what goes wrong for a while: a watch goes on when it is over."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.client import Database
from kvstore.errors import (
    ClientClosed,
    DeadlineExceeded,
    EpochMismatch,
    KVError,
    Throttled,
    Unavailable,
)
from kvstore.watches import EventType
from tests.unit.kvstore.fake_cluster import FakeCluster
from tests.unit.kvstore.fake_cluster import simulate as simulate_cluster
from tests.unit.kvstore.test_watches import FakeRouter, simulate, watch_of
from txn.messages import Changed, Changes, RangeInfo


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


def test_one_that_moves_on_more_often_is_as_patient_as_was_said():
    async def test() -> None:
        router = FakeRouter()
        watch = watch_of(router, key=b"k", timeout=60.0)
        watch.move_on(1.0)
        pulling = asyncio.create_task(watch.pull())
        await asyncio.sleep(0.01)
        (call,) = router.open_calls.values()
        assert call.deadline - router.monotonic() == pytest.approx(60.0, abs=0.01)
        await watch.close()
        with pytest.raises(ClientClosed):
            await pulling

    simulate(test())


# --- ranges that are not known just then


class Directory:
    """In place of the router's `find_out`: it is away for a while."""

    def __init__(self, router: FakeRouter) -> None:
        self.asked = 0
        self.away = True
        self._router = router
        router.find_out = self.find_out  # type: ignore[method-assign]

    async def find_out(self, _until: float) -> None:
        self.asked += 1
        await asyncio.sleep(0.001)
        if self.away:
            raise Unavailable
        self._router.split(b"m", version=3)


def half_known(router: FakeRouter) -> None:
    """A split of which one half is heard of first: what was known of the rest is gone."""
    router.ranges.update([RangeInfo(201, b"", b"m", 2, 1, [(1, 1)], 1)])
    router.fail(EpochMismatch(1))


def test_a_watch_whose_new_ranges_cannot_be_learned_at_once_goes_on_when_they_are():
    async def test() -> None:
        router = FakeRouter()
        watch = watch_of(router, prefix=b"")
        pulling = asyncio.create_task(watch.pull())
        await asyncio.sleep(0.01)
        directory = Directory(router)
        half_known(router)
        await asyncio.sleep(1.0)
        assert 10 <= directory.asked <= 30
        directory.away = False
        version = router.write(a=b"1", z=b"2")
        await asyncio.sleep(0.1)
        assert len(router.open_calls) == 2
        router.answer_all()
        assert [(event.key, event.version) for event in await pulling] == [
            (b"a", version),
            (b"z", version),
        ]

    simulate(test())


def test_one_with_a_timeout_raises_when_its_new_ranges_are_not_to_be_learned():
    async def test() -> None:
        router = FakeRouter()
        watch = watch_of(router, prefix=b"", timeout=2.0)
        pulling = asyncio.create_task(watch.pull())
        await asyncio.sleep(0.01)
        directory = Directory(router)
        half_known(router)
        with pytest.raises(Unavailable):
            await pulling
        directory.away = False
        pulling = asyncio.create_task(watch.pull())
        await asyncio.sleep(0.1)
        router.write(a=b"1")
        router.answer_all()
        assert [event.key for event in await pulling] == [b"a"]

    simulate(test())


def test_one_that_is_closed_while_its_new_ranges_are_learned_ends():
    async def test() -> None:
        router = FakeRouter()
        watch = watch_of(router, prefix=b"")
        pulling = asyncio.create_task(watch.pull())
        await asyncio.sleep(0.01)
        directory = Directory(router)
        directory.away = False
        half_known(router)
        await asyncio.sleep(0.0005)
        assert directory.asked == 1
        await watch.close()
        with pytest.raises(ClientClosed):
            await pulling

    simulate(test())
