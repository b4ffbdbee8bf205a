"""Claims of the client's router about time: whose deadline counts, what ends when it is over, and which timestamps are new."""

from __future__ import annotations

import asyncio
import contextlib
import itertools

import pytest

from kvstore.batch import Batch
from kvstore.client import SEEN_AGE_S_MAX, Database
from kvstore.errors import DeadlineExceeded
from kvstore.streams import Stream
from tests.unit.kvstore.fake_cluster import FakeCluster, simulate
from txn.messages import (
    Changes,
    GetTimestamps,
    KeepLocks,
    LockRead,
    Prepare,
    Read,
    ReadReply,
)
from txn.types import begin_ts_of


def now() -> float:
    return asyncio.get_running_loop().time()


async def _ready(db: Database) -> None:
    """Every node is connected and a timestamp has been seen."""
    await db.get(b"a")
    await db.get(b"z")


async def _never(_address: str, _node: int) -> Stream:
    """A node that takes no connection and refuses none."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError


def test_calls_of_one_commit_that_run_out_together_are_counted_once():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        db.router._dial = _never
        cluster.network.cut()
        await asyncio.sleep(0.5)
        batch = Batch()
        batch.put(b"a", b"v")
        batch.put(b"z", b"v")
        with pytest.raises(DeadlineExceeded):
            await db.commit_batch(batch, timeout=0.4)
        assert not any(link.pending for link in db.router.links)
        assert db.router.calls == 0

    simulate(test, FakeCluster(b"m"))


def test_who_shares_a_question_for_a_timestamp_keeps_the_own_deadline():
    async def test(cluster: FakeCluster, db: Database) -> None:
        async def timed_out(timeout_s: float) -> float:
            began = now()
            with pytest.raises(DeadlineExceeded):
                await db.router.timestamps(began + timeout_s)
            return now() - began

        cluster.ignore(GetTimestamps, times=100)
        for timeouts in ([0.1, 2.0, 2.001], [2.0, 0.1, 2.001]):
            took = await asyncio.gather(*map(timed_out, timeouts))
            assert list(took) == pytest.approx(timeouts, abs=0.011)

    simulate(test)


@pytest.mark.parametrize("step", [0, 1])
def test_a_stale_read_does_not_make_its_timestamp_new(step: int):
    """Nor does one that shows more than the last: a replica without a leader may be ten minutes behind, and so would be the
    begin of the next put."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        version = await db.put(b"k", b"v")
        answers = itertools.count(version, step)
        cluster.fault(
            Read,
            lambda _node, request: ReadReply(request.id, next(answers), [version], [b"v"]),
            times=60,
        )
        for _ in range(60):
            await asyncio.sleep(10.0)
            assert await db.get(b"k", max_staleness=3600.0) == b"v"
        old = next(answers)
        while cluster.ts < old + 100:
            cluster.seed(other=b"v")  # others have gone on
        await db.put(b"k", b"w")
        assert begin_ts_of(cluster.of(Prepare)[-1].txn_id) > old

    simulate(test)


def test_a_late_answer_does_not_make_its_timestamp_new():
    """A write that is repeated after an outage is answered with the timestamp of its first try."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        await db.put(b"k", b"1")
        cluster.drop_replies(Prepare)
        late = asyncio.ensure_future(db.put(b"k", b"2", timeout=3_600.0))
        await cluster.settled()
        version = cluster.ts
        cluster.ignore(Prepare, times=10_000)
        await asyncio.sleep(400.0)
        cluster.faults.clear()
        while cluster.ts < version + 100:
            cluster.seed(other=b"v")  # others have gone on
        assert await late == version
        await db.put(b"k", b"3")
        assert begin_ts_of(cluster.of(Prepare)[-1].txn_id) > version

    simulate(test)


def test_a_read_that_another_node_answers_at_last_is_as_new_as_the_question_to_that_node():
    """Its leader died without a word: who writes next need not ask the oracle, which may have been led there."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        await db.put(b"k", b"1")
        cluster.ignore(Read, times=2)
        began = now()
        assert await db.get(b"k") == b"1"
        assert now() > began + SEEN_AGE_S_MAX
        asked = len(cluster.of(GetTimestamps))
        await db.put(b"k", b"2")
        assert len(cluster.of(GetTimestamps)) == asked

    simulate(test)


def test_a_locks_answer_does_not_make_its_timestamp_new():
    """A leader where nobody writes reads under a lock at what it last heard of, and that may be long ago."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.ignore(KeepLocks, times=1_000)
        async with db.transaction() as tx:
            await tx.get_for_update(b"k")
            await asyncio.sleep(60.0)
            heard = cluster.ts + 1
            while cluster.ts < heard + 100:
                cluster.seed(other=b"v")
            cluster.fault(LockRead, lambda _, asked: ReadReply(asked.id, heard, [0], [None]))
            await tx.get_for_update(b"l")
            await db.put(b"m", b"v")
            assert begin_ts_of(cluster.of(Prepare)[-1].txn_id) > heard

    simulate(test)


def test_a_stale_read_that_a_replica_does_not_answer_goes_to_another_one():
    async def test(cluster: FakeCluster, db: Database) -> None:
        for _ in cluster.nodes:  # each is connected
            await db.get(b"k", max_staleness=60.0)
        for _ in cluster.nodes:
            cluster.ignore(Read)
            before = len(cluster.requests)
            began = now()
            await db.get(b"k", max_staleness=60.0)
            asked = [node for node, request in cluster.requests[before:] if type(request) is Read]
            assert asked[0] != asked[1]
            assert now() - began == pytest.approx(1.0, abs=0.1)

    simulate(test)


class SuspendedClock:
    """One that goes on while the machine is suspended, when the loop's own stands still."""

    def __init__(self) -> None:
        self.suspended_s = 0.0

    def monotonic(self) -> float:
        return now() + self.suspended_s

    def wall_ms(self) -> int:
        return 0


def test_after_a_suspend_a_call_is_tried_again_soon_though_a_watch_is_open():
    """The timer was armed for the poll of the watch, and has its seconds to go; what is due meanwhile does not wait for it."""
    clock = SuspendedClock()

    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        cluster.ignore(Changes, times=10_000)
        async with db.watch(key=b"k") as watch:
            pull = asyncio.ensure_future(watch.pull())
            await asyncio.sleep(1.0)
            clock.suspended_s += 3_600.0
            cluster.ignore(Read)
            asyncio.get_running_loop().call_later(0.02, cluster.network.cut)
            began = now()
            assert await db.get(b"a", timeout=5.0) is None
            assert now() - began < 1.1
            pull.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pull

    simulate(test, clock=clock)


def test_an_idle_client_has_no_timer():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        await asyncio.sleep(3.0)
        assert db.router._timer is None

    simulate(test)
