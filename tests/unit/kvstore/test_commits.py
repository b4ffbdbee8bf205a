"""Claims of a commit at its limits: with no time left nothing is sent, and what was sent is never called undone, whether time,
calls or knowledge of the ranges run out."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from kvstore.batch import Batch
from kvstore.client import Database
from kvstore.errors import CommitUnknown, DeadlineExceeded, Throttled
from kvstore.transactions import Transaction
from tests.unit.kvstore.fake_cluster import FakeCluster, simulate
from txn.messages import GetDirectory, Outcome, Prepare


def now() -> float:
    return asyncio.get_running_loop().time()


# --- time -----------------------------------------------------------------------------------------


def test_a_transaction_whose_time_is_over_sends_no_commit():
    """Its connections are up: a request that is not looked at would leave at once."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        async def fn(tx: Transaction) -> None:
            await tx.get(b"a")
            await asyncio.sleep(0.6)
            tx.put(b"a", b"late")

        with pytest.raises(DeadlineExceeded) as caught:
            await db.run(fn, timeout=0.5)
        await cluster.settled()
        assert not caught.value.maybe_committed
        assert cluster.of(Prepare) == []
        assert cluster.value(b"a") is None

    simulate(test)


# --- calls ----------------------------------------------------------------------------------------


def test_a_question_for_the_outcome_waits_for_a_free_call():
    """The first part holds the only one, so the second is refused, and so is the first question for the outcome."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        await db.get_many([b"a", b"z"])
        db.router.calls_max = 1
        batch = Batch()
        batch.put(b"a", b"v")
        batch.put(b"z", b"v")
        with pytest.raises(Throttled) as caught:
            await db.commit_batch(batch, timeout=2.0)
        assert not caught.value.maybe_committed
        db.router.calls_max = 100
        assert await db.get_many([b"a", b"z"]) == {}

    simulate(test, FakeCluster(b"m"))


def test_a_question_for_the_outcome_that_finds_no_free_call_ends_with_the_time():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await db.get_many([b"a", b"z"])
        db.router.calls_max = 1
        batch = Batch()
        batch.put(b"a", b"v")
        batch.put(b"z", b"v")
        began = now()
        committing = asyncio.ensure_future(db.commit_batch(batch, timeout=2.0))
        await cluster.settled()
        db.router.calls_max = 0
        with pytest.raises(CommitUnknown):
            await committing
        assert now() - began <= 2.0
        assert cluster.of(Outcome) == []

    simulate(test, FakeCluster(b"m"))


# --- knowledge of the ranges ----------------------------------------------------------------------


@pytest.mark.parametrize("silent_s", [3.1, 60.0])
def test_a_put_that_happened_is_not_called_undone_when_its_range_is_not_known_any_more(
    silent_s: float,
):
    """The answer is lost, the next try meets a split of which only the other half is told, and the directory is silent: for a
    while, or until the time is over."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        await db.put(b"a", b"0")
        began = now()
        split = FakeCluster(b"m")
        split.set_ranges(b"m", version=2)

        def applied(_node: int, _request: Prepare) -> None:
            cluster.ranges = split.ranges

        cluster.fault(Prepare, applied, after=True)
        cluster.ignore(GetDirectory, times=1_000, where=lambda _: now() < began + silent_s)
        half = msgspec.to_builtins(split.ranges[1])
        cluster.fail(Prepare, "epoch_mismatch", {"ranges": [half]}, times=1_000)
        putting = db.put(b"a", b"1", timeout=4.0)
        if silent_s < 4.0:
            assert await putting == cluster.data[b"a"][-1].ts
        else:
            with pytest.raises(CommitUnknown):
                await putting
        assert cluster.value(b"a") == b"1"
        assert (
            len({prepare.txn_id for prepare in cluster.of(Prepare)}) == 2
        )  # the first put's, and one
        assert now() - began <= 4.0 + 0.01

    simulate(test, try_timeout_s=0.2)
