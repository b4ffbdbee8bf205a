"""Claims of `inject_retry_errors`: transactions fail only as they may, `run` gets through, and an unknown commit may or may
not have happened, which its outcome tells."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.api import transactional
from kvstore.client import Database
from kvstore.errors import ClientClosed, CommitUnknown, KVError
from kvstore.sync import BlockingTransaction, Client
from kvstore.testing.retry import POINTS, inject_retry_errors
from kvstore.transactions import Aborted, Committed, Transaction
from tests.unit.kvstore.fake_cluster import FakeCluster, simulate

RETRYABLE = ("begin", "read", "commit")


async def add_one(tx: Transaction) -> None:
    tx.put(b"n", b"%d" % (int(await tx.get(b"n", b"0")) + 1))


def test_run_gets_through_every_retryable_error():
    async def test(cluster: FakeCluster, db: Database) -> None:
        flaky = inject_retry_errors(db, 0.3, points=RETRYABLE)
        for _ in range(50):
            await flaky.run(add_one)
        assert await db.get(b"n") == b"50"
        assert set(flaky.injected) == {
            "conflict", "throttled", "transaction_too_old", "unavailable",
        }  # fmt: skip

    simulate(test)


@pytest.mark.parametrize("point", POINTS)
def test_what_is_injected_says_the_truth_about_what_happened(point):
    async def test(cluster: FakeCluster, db: Database) -> None:
        flaky = inject_retry_errors(db, 1.0, points=[point], in_a_row=1)
        happened, raised = [], []
        for number in range(40):
            before = await db.get(b"n", b"0")
            tx = flaky.transaction()
            try:
                async with tx:
                    await tx.get(b"other")
                    tx.put(b"n", b"%d" % number)
            except KVError as error:
                raised.append((error.retryable, error.maybe_committed))
                changed = await db.get(b"n", b"0") != before
                happened.append(changed)
                assert tx.commit_version is None
                if point == "unknown":
                    outcome = await db.outcome(tx.id)
                    assert isinstance(outcome, Committed if changed else Aborted)
        unknown = point == "unknown"
        assert raised == [(not unknown, unknown)] * 20  # every other one: one error in a row
        assert (True in happened) == unknown
        assert False in happened

    simulate(test)


def test_an_unknown_commit_leaves_run_and_an_idempotency_key_makes_it_safe_to_run_again():
    async def test(cluster: FakeCluster, db: Database) -> None:
        flaky = inject_retry_errors(db, 0.5, points=["unknown"])
        unknown = 0
        for number in range(40):
            while True:
                try:
                    await flaky.run(add_one, idempotency_key=f"order {number}")
                    break
                except CommitUnknown:
                    unknown += 1
        assert unknown > 5
        assert await db.get(b"n") == b"40"

    simulate(test)


def test_scans_fail_too_and_see_the_same_rows():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(a=b"1", b=b"2")
        flaky = inject_retry_errors(db, 0.5, points=["read"])
        for _ in range(10):
            rows = await flaky.run(lambda tx: tx.scan().to_list(), read_only=True)
            assert rows == [(b"a", b"1"), (b"b", b"2")]
        assert sum(flaky.injected.values()) > 3

    simulate(test)


def test_transactional_goes_through_it_and_other_writes_do_not():
    @transactional
    async def add(tx: Transaction) -> None:
        await add_one(tx)

    async def test(cluster: FakeCluster, db: Database) -> None:
        flaky = inject_retry_errors(db, 1.0, points=RETRYABLE)
        await flaky.put(b"m", b"1")
        assert flaky.injected == {}
        await add(flaky)
        assert sum(flaky.injected.values()) == 3
        await add(db)
        assert sum(flaky.injected.values()) == 3
        assert await flaky.get_many([b"n", b"m"]) == {b"n": b"2", b"m": b"1"}

    simulate(test)


def test_one_seed_injects_the_same():
    def injected(seed: int) -> dict[str, int]:
        async def test(cluster: FakeCluster, db: Database) -> dict[str, int]:
            flaky = inject_retry_errors(db, 0.3, seed=seed, points=RETRYABLE)
            for _ in range(20):
                await flaky.run(add_one)
            return flaky.injected

        return simulate(test)

    assert injected(1) == injected(1) != injected(2)


def test_its_transactions_keep_what_they_read_as_others_do():
    """While one is open, the oracle is told not to let its snapshot go (kvstore/open_views.py)."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        async with inject_retry_errors(db, 0.0).transaction() as tx:
            await tx.get(b"n")
            assert len(db._views) == 1
        assert len(db._views) == 0

    simulate(test)


def test_it_wraps_open_clients_only_and_refuses_what_makes_no_sense():
    async def test(cluster: FakeCluster, db: Database) -> None:
        for wrong in ({"rate": 1.5}, {"rate": -0.1}, {"points": ["nowhere"]}, {"in_a_row": 0}):
            with pytest.raises(ValueError, match="rate|point|in_a_row"):
                inject_retry_errors(db, **wrong)
        with pytest.raises(TypeError):
            inject_retry_errors(cluster)  # type: ignore[call-overload]
        flaky = inject_retry_errors(db, rng=random.Random(1))
        await flaky.close()
        with pytest.raises(ClientClosed):
            await db.get(b"n")
        with pytest.raises(ClientClosed):
            inject_retry_errors(db)

    simulate(test)


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[Client]:
    with Client.open(tmp_path / "data") as client:
        yield client


def test_the_blocking_client_is_wrapped_alike(embedded):
    def add(tx: BlockingTransaction) -> None:
        tx.put(b"n", b"%d" % (int(tx.get(b"n", b"0")) + 1))

    flaky = inject_retry_errors(embedded, 0.4, seed=3)
    unknown = 0
    for number in range(30):
        while True:
            try:
                flaky.run(add, idempotency_key=b"%d" % number)
                break
            except CommitUnknown:
                unknown += 1
    assert embedded.get(b"n") == b"30"
    assert unknown
    assert {"conflict", "commit_unknown"} <= set(flaky.injected)
    flaky.close()
    with pytest.raises(ClientClosed):
        embedded.get(b"n")
