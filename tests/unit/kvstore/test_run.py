"""Claims of `run` and `transactional`: they run a transaction again only when that helps, never after an exception of the
user's or an unknown commit, and keep a result for an idempotency key; and of the package's exports."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import kvstore
from kvstore.api import transactional
from kvstore.client import Database
from kvstore.errors import (
    CommitUnknown,
    Conflict,
    DeadlineExceeded,
    InvalidArgument,
    KVError,
)
from kvstore.transactions import Transaction, decode_token
from tests.unit.kvstore.fake_cluster import FakeCluster, simulate
from txn.messages import LockPending, LockRead, Outcome, Prepare, Read, Unlock
from txn.types import (
    KEPT_PREFIX,
    TIMESTAMP_SHIFT,
    FenceReason,
    Guard,
    begin_ts_of,
    point_end,
)


def now() -> float:
    return asyncio.get_running_loop().time()


# --- run ------------------------------------------------------------------------------------------


def test_run_tries_again_after_a_conflict_and_keeps_its_age():
    async def test(cluster: FakeCluster, db: Database) -> None:
        attempts: list[Transaction] = []

        async def fn(tx: Transaction) -> int:
            attempts.append(tx)
            value = int(await tx.get(b"n", b"0"))
            if len(attempts) < 4:
                await db.put(b"n", b"%d" % (value + 10))
            tx.put(b"n", b"%d" % (value + 1))
            return value

        assert await db.run(fn) == 30
        assert await db.get(b"n") == b"31"
        ours = [each for each in cluster.of(Prepare) if each.guards]
        assert len({each.txn_id for each in ours}) == 4
        assert {each.age for each in ours} == {begin_ts_of(ours[0].txn_id)}

    simulate(test)


@pytest.mark.parametrize("written", [True, False])
def test_after_a_conflict_the_key_is_locked_first_and_read_with_the_lock(written: bool):
    async def test(cluster: FakeCluster, db: Database) -> None:
        attempts = 0

        async def fn(tx: Transaction) -> bytes | None:
            nonlocal attempts
            attempts += 1
            found = await tx.get(b"n")
            if attempts == 1:
                await db.put(b"n", b"theirs")
            tx.put(b"n" if written else b"other", b"ours")
            return found

        assert await db.run(fn) == b"theirs"
        (lock,) = cluster.of(LockRead)
        assert (lock.key, lock.fresh, lock.shared) == (b"n", True, not written)
        assert attempts == 2
        assert len(cluster.of(Read)) == 1, "the answer to the lock is the second attempt's read"
        last = cluster.of(Prepare)[-1]
        assert last.lock_owner == lock.owner
        assert [guard.start for guard in last.guards] == [b"n"]
        assert not cluster.of(Unlock), "the commit gives it back"

    simulate(test)


def test_what_was_locked_and_then_not_used_is_given_back():
    async def test(cluster: FakeCluster, db: Database) -> None:
        attempts = 0

        async def fn(tx: Transaction) -> None:
            nonlocal attempts
            attempts += 1
            if attempts == 1:
                await tx.get(b"n")
                await db.put(b"n", b"theirs")
            tx.put(b"k", b"ours")

        await db.run(fn)
        await asyncio.sleep(0.1)
        assert [each.key for each in cluster.of(Unlock)] == [b"n"]

    simulate(test)


@pytest.mark.parametrize("how", ["busy", "silent", "failing"])
def test_where_there_is_no_lock_to_be_had_the_attempt_goes_on_without(how: str):
    async def test(cluster: FakeCluster, db: Database) -> None:
        attempts = 0

        async def fn(tx: Transaction) -> None:
            nonlocal attempts
            attempts += 1
            value = await tx.get(b"n")
            if attempts == 1:
                await db.put(b"n", b"theirs")
            tx.put(b"n", (value or b"") + b"+ours")

        if how == "busy":
            cluster.fault(LockRead, lambda _, request: LockPending(request.id, b"x"), times=100)
        elif how == "silent":
            cluster.ignore(LockRead, times=100)
        else:
            cluster.fail(LockRead, "throttled", times=100)
        await db.run(fn)
        assert attempts == 2
        assert cluster.value(b"n") == b"theirs+ours"

    simulate(test)


def test_a_task_that_is_cancelled_while_it_waits_for_that_lock_leaves_nothing():
    async def test(cluster: FakeCluster, db: Database) -> None:
        async def fn(tx: Transaction) -> None:
            await tx.get(b"n")
            await db.put(b"n", b"theirs")
            tx.put(b"n", b"ours")

        cluster.ignore(LockRead, times=100)
        task = asyncio.create_task(db.run(fn))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.1)
        (lock,) = cluster.of(LockRead)
        assert {each.owner for each in cluster.of(Unlock)} == {lock.owner}
        assert db._views is not None
        assert len(db._views) == 0

    simulate(test)


def test_user_exceptions_are_never_retried():
    async def test(cluster: FakeCluster, db: Database) -> None:
        runs = 0

        async def fn(tx: Transaction) -> None:
            nonlocal runs
            runs += 1
            tx.put(b"k", b"v")
            raise LookupError("mine")

        with pytest.raises(LookupError):
            await db.run(fn)
        assert runs == 1
        assert cluster.of(Prepare) == []

    simulate(test)


def test_an_unknown_commit_is_never_run_again():
    async def test(cluster: FakeCluster, db: Database) -> None:
        runs = 0

        async def fn(tx: Transaction) -> None:
            nonlocal runs
            runs += 1
            tx.increment(b"k")

        cluster.drop_replies(Prepare, times=100)
        cluster.drop_replies(Outcome, times=100)
        with pytest.raises(CommitUnknown):
            await db.run(fn)
        assert runs == 1
        assert len(cluster.data[b"k"]) == 1

    simulate(test)


def test_what_a_function_has_committed_itself_is_not_done_again():
    async def test(cluster: FakeCluster, db: Database) -> None:
        async def fn(tx: Transaction) -> None:
            tx.increment(b"n")
            await tx.commit()
            raise Conflict(b"elsewhere")

        with pytest.raises(Conflict):
            await db.run(fn)
        assert await db.get(b"n") == b"1"

    simulate(test)


def test_run_gives_up_when_its_time_is_over():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.refuse(FenceReason.CONFLICT, times=10_000)

        async def fn(tx: Transaction) -> None:
            tx.put(b"k", b"v")

        began = now()
        with pytest.raises(DeadlineExceeded) as caught:
            await db.run(fn, timeout=2.0)
        assert isinstance(caught.value.__cause__, Conflict)
        assert now() - began <= 2.0

    simulate(test)


def test_an_idempotency_key_makes_a_second_run_return_the_first_result():
    async def test(cluster: FakeCluster, db: Database) -> None:
        async def fn(tx: Transaction) -> dict[str, int]:
            value = int(await tx.get(b"n", b"0")) + 1
            tx.put(b"n", b"%d" % value)
            return {"value": value}

        assert await db.run(fn, idempotency_key="order-1") == {"value": 1}
        assert await db.run(fn, idempotency_key=b"order-1") == {"value": 1}
        assert await db.run(fn, idempotency_key="order-2") == {"value": 2}
        assert await db.get(b"n") == b"2"
        anchor = next(each for each in cluster.of(Prepare) if each.participants)
        assert anchor.anchor_key.startswith(KEPT_PREFIX)
        assert anchor.guards == [
            Guard(anchor.anchor_key, point_end(anchor.anchor_key), anchor.guards[0].read_ts)
        ]
        assert await db.scan().to_list() == [(b"n", b"2")]  # the row itself is the system's

        async def large(tx: Transaction) -> bytes:
            return bytes(2_000)

        with pytest.raises(InvalidArgument):
            await db.run(large, idempotency_key="order-3")
        with pytest.raises(InvalidArgument):
            await db.run(large, idempotency_key="")

    simulate(test)


def test_a_function_that_is_run_for_an_idempotency_key_does_not_commit_by_itself():
    """It would leave a row without a result: done, and never to be told."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        async def fn(tx: Transaction) -> int:
            tx.put(b"n", b"1")
            if not cluster.of(Prepare):
                await tx.commit()
            return 1

        with pytest.raises(InvalidArgument, match="commits"):
            await db.run(fn, idempotency_key="order-1")
        assert cluster.of(Prepare) == []

    simulate(test)


def test_transactional_owns_a_transaction_of_a_client_and_joins_one_that_is_given():
    @transactional
    async def move(tx: Transaction, source: bytes, target: bytes, amount: int) -> int:
        left = int(await tx.get(source, b"0")) - amount
        tx.put(source, b"%d" % left)
        tx.increment(target, amount)
        return left

    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(a=b"10", z=b"0")
        cluster.refuse(FenceReason.CONFLICT)
        assert await move(db, b"a", b"z", 3) == 7
        async with db.transaction() as tx:
            await move(tx, b"a", b"z", 1)
            assert await move(tx, b"a", b"z", amount=1) == 5
        await cluster.settled()
        assert await db.get_many([b"a", b"z"]) == {b"a": b"5", b"z": b"5"}
        assert move.__name__ == "move"
        with pytest.raises(InvalidArgument):
            await move(None, b"a", b"z", 1)  # type: ignore[arg-type]

    simulate(test, FakeCluster(b"m"))


@pytest.mark.parametrize("priority", [7, -7])
def test_a_priority_makes_every_attempt_older_by_so_many_seconds(priority):
    """It was carried to the range, where nobody looked at it."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.ts = 60_000 << TIMESTAMP_SHIFT  # a minute
        cluster.seed(a=b"0")

        async def move(tx: Transaction) -> None:
            await tx.get_for_update(b"a")
            tx.put(b"a", b"mine")
            if len(cluster.of(Prepare)) == 0:
                await db.put(b"b", b"other")
                raise Conflict(b"b")

        await db.run(move, priority=priority)
        locks, (*_, prepare) = cluster.of(LockRead), cluster.of(Prepare)
        begun = begin_ts_of(locks[0].owner)
        second = 1000 << TIMESTAMP_SHIFT
        ages = {lock.age for lock in locks if lock.key == b"a"} | {prepare.age}
        assert ages == {begun - priority * second}

    simulate(test)


def test_the_package_exports_what_users_need():
    for name in kvstore.__all__:
        assert getattr(kvstore, name) is not None
    assert issubclass(kvstore.errors.Conflict, KVError)
    with pytest.raises(AttributeError):
        _ = kvstore.nothing_of_the_kind


@pytest.mark.parametrize("text", ["", "abc", "!!!!", "A" * 10, "A" * 9000, 5])
def test_what_is_no_token_is_refused(text: Any):
    with pytest.raises(InvalidArgument):
        decode_token(text)
