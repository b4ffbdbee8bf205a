"""Claims of `get_for_update` in a whole cluster, under virtual time: what it returns, whom it keeps waiting, what ends it, and
that a task which is cancelled at any of its awaits leaves no lock, no waiter and no future behind."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import Database, Transaction
from kvstore.errors import (
    Conflict,
    Deadlock,
    InvalidArgument,
    KVError,
    LockTimeout,
    Throttled,
    TransactionClosed,
)
from kvstore.sim import loop as simulated
from kvstore.testing import SimCluster, simulate
from txn.deadlocks import CYCLE_S
from txn.locks import LockTable

A, K, Z = b"a", b"k", b"z"  # in three ranges
LEASE_S = 10.0


def tables(cluster: SimCluster) -> list[LockTable]:
    """Of all leaders."""
    found = []
    for server in cluster._cluster().running():
        assert server.node is not None
        assert server.node.store is not None
        replicas = server.node.store.replicas.values()
        found += [each.evaluator.locking.table for each in replicas if each.evaluator is not None]
    return found


def held(cluster: SimCluster) -> int:
    return sum(table.held + len(table.waiting) for table in tables(cluster))


async def settled(cluster: SimCluster) -> None:
    """What was given back has arrived."""
    for _ in range(200):
        if not held(cluster):
            return
        await asyncio.sleep(0.01)


async def balanced() -> None:
    """Leaders are where the plan wants them: whoever loses a range loses its locks."""
    await asyncio.sleep(3.0)


def now() -> float:
    return asyncio.get_running_loop().time()


async def add(db: Database, key: bytes) -> int:
    async def body(tx: Transaction) -> int:
        number = int(await tx.get_for_update(key) or b"0") + 1
        tx.put(key, b"%d" % number)
        return number

    return await db.run(body)


@simulate(seeds=2, faults=False)
async def test_many_who_lock_one_counter_conflict_with_nobody(
    cluster: SimCluster, db: Database
) -> None:
    await balanced()
    numbers = await asyncio.gather(*[add(db, K) for _ in range(40)])
    assert sorted(numbers) == list(range(1, 41))
    assert db.stats()["conflicts"] == 0
    await settled(cluster)
    assert held(cluster) == 0


@simulate(seeds=2, faults=False)
async def test_many_who_want_one_counter_need_few_attempts_each(
    cluster: SimCluster, db: Database
) -> None:
    """Without a word of locks: `run` takes one after the first conflict, so the second attempt succeeds."""
    await balanced()
    attempts: dict[int, int] = {}

    async def one(number: int) -> int:
        async def body(tx: Transaction) -> int:
            attempts[number] = attempts.get(number, 0) + 1
            counter = int(await tx.get(K) or b"0") + 1
            tx.put(K, b"%d" % counter)
            return counter

        return await db.run(body)

    numbers = await asyncio.gather(*[one(number) for number in range(40)])
    assert sorted(numbers) == list(range(1, 41))
    assert max(attempts.values()) <= 3
    await settled(cluster)
    assert held(cluster) == 0


@simulate(seeds=1, faults=False)
async def test_it_reads_the_newest_value_and_not_the_snapshots(db: Database) -> None:
    await db.put(A, b"old")
    await db.put(K, b"old")
    async with db.transaction() as tx:
        assert await tx.get(A) == b"old"
        await db.put(K, b"new")
        assert await tx.get_for_update(K) == b"new"
        assert await tx.get(K) == b"new"  # what was locked stays what it was
        tx.put(Z, b"written")
    assert await db.get(Z) == b"written"


@simulate(seeds=1, faults=False)
async def test_what_was_read_before_is_validated_as_well(db: Database) -> None:
    await db.put(K, b"old")
    tx = db.transaction()
    assert await tx.get(K) == b"old"
    await db.put(K, b"new")
    assert await tx.get_for_update(K) == b"new"
    tx.put(Z, b"written")
    with pytest.raises(Conflict):
        await tx.commit()


@simulate(seeds=1, faults=False)
async def test_it_sees_the_transactions_own_writes(db: Database) -> None:
    await db.put(A, b"5")
    async with db.transaction() as tx:
        tx.increment(A, 2)
        tx.put(K, b"mine")
        tx.delete(Z)
        assert await tx.get_for_update(A) == b"7"
        assert await tx.get_for_update(K) == b"mine"
        assert await tx.get_for_update(Z) is None
        assert await tx.get_many_for_update([Z, A, b"absent"]) == {A: b"7"}


@simulate(seeds=3, faults=False)
async def test_several_locks_may_be_awaited_together(cluster: SimCluster, db: Database) -> None:
    await balanced()
    async with db.transaction() as holder:
        await asyncio.sleep(5.0)  # so long that the client asks for a timestamp first
        await asyncio.gather(*[holder.get_for_update(key) for key in (A, K, Z)])
        assert len({owner for table in tables(cluster) for owner in table.owners}) == 1
        holder.put(K, b"written")
    await settled(cluster)
    assert held(cluster) == 0
    assert db.stats()["conflicts"] == 0


@simulate(seeds=1, faults=False)
async def test_others_writes_wait_for_the_lock_and_a_lock_for_theirs(db: Database) -> None:
    async with db.transaction() as tx:
        await tx.get_for_update(K)
        writing = asyncio.create_task(db.put(K, b"theirs"))
        await asyncio.sleep(0.2)
        assert not writing.done()
        tx.put(K, b"mine")
    await writing
    assert await db.get(K) == b"theirs"


@simulate(seeds=1, faults=False)
async def test_shared_locks_go_together_and_keep_writers_away(db: Database) -> None:
    async with db.transaction() as one, db.transaction() as two:
        await one.get_for_update(K, shared=True)
        await two.get_for_update(K, shared=True)
        with pytest.raises(LockTimeout):
            async with db.transaction() as three:
                await three.get_for_update(K, timeout=0.1)


@simulate(seeds=1, faults=False)
async def test_a_lock_that_is_not_free_in_time_names_its_key_and_holder(db: Database) -> None:
    async with db.transaction() as tx:
        await tx.get_for_update(K)
        for timeout_s in (0, 0.3):
            other = db.transaction()
            begun = now()
            with pytest.raises(LockTimeout) as caught:
                await other.get_for_update(K, timeout=timeout_s)
            assert timeout_s <= now() - begun < timeout_s + 0.2
            assert caught.value.key == K
            assert caught.value.holder == tx._locks.owner
            assert caught.value.retryable
            with pytest.raises(TransactionClosed):
                await other.get(A)


@simulate(seeds=1, faults=False)
async def test_run_tries_again_after_a_lock_timeout(db: Database) -> None:
    await balanced()
    async with db.transaction() as tx:
        await tx.get_for_update(K)
        attempts = 0

        async def body(own: Transaction) -> None:
            nonlocal attempts
            attempts += 1
            await own.get_for_update(K, timeout=0.2)
            own.put(K, b"won")

        running = asyncio.create_task(db.run(body))
        await asyncio.sleep(1.0)
    await running
    assert attempts > 1
    assert await db.get(K) == b"won"


@simulate(seeds=3, faults=False)
async def test_a_deadlock_is_told_to_one_with_its_cycle_and_the_other_goes_on(
    cluster: SimCluster, db: Database
) -> None:
    one, two = db.transaction(), db.transaction()
    await one.get_for_update(A)
    await two.get_for_update(Z)
    begun = now()
    results = await asyncio.gather(
        one.get_for_update(Z), two.get_for_update(A), return_exceptions=True
    )
    errors = [each for each in results if isinstance(each, Deadlock)]
    assert len(errors) == 1
    assert results.count(None) == 1
    younger = max(one, two, key=lambda tx: (tx._locks.age, tx._locks.owner))
    victim = one if isinstance(results[0], Deadlock) else two
    assert victim is younger
    assert errors[0].cycle[0] == victim._locks.owner
    assert sorted(errors[0].cycle) == sorted([one._locks.owner, two._locks.owner])
    assert now() - begun < CYCLE_S + 0.2
    await one.rollback()
    await two.rollback()
    await settled(cluster)
    assert held(cluster) == 0


@simulate(seeds=3, faults=False)
async def test_run_gets_everybody_through_deadlocks(db: Database) -> None:
    async def both(first: bytes, second: bytes) -> None:
        async def body(tx: Transaction) -> None:
            for key in (first, second):
                number = int(await tx.get_for_update(key) or b"0")
                tx.put(key, b"%d" % (number + 1))
                await asyncio.sleep(0.01)

        await db.run(body)

    keys = [(A, Z), (Z, A), (A, K), (K, A), (Z, K), (K, Z)]
    await asyncio.gather(*[both(*pair) for pair in keys])
    assert [await db.get(key) for key in (A, K, Z)] == [b"4", b"4", b"4"]


@simulate(seeds=2, faults=False)
async def test_two_who_lock_many_keys_at_once_never_wait_for_each_other(db: Database) -> None:
    async def body(tx: Transaction) -> None:
        found = await tx.get_many_for_update([Z, A, K])
        for key in (A, K, Z):
            tx.put(key, b"%d" % (int(found.get(key, b"0")) + 1))

    await asyncio.gather(*[db.run(body) for _ in range(8)])
    assert [await db.get(key) for key in (A, K, Z)] == [b"8", b"8", b"8"]
    assert db.stats()["conflicts"] == 0


@simulate(seeds=1, faults=False)
async def test_a_transaction_that_only_locked_and_read_is_validated(
    cluster: SimCluster, db: Database
) -> None:
    await db.put(K, b"old")
    async with db.transaction() as tx:
        assert await tx.get_for_update(K) == b"old"
    assert tx.commit_version is None
    tx = db.transaction()
    await tx.get_for_update(K)
    for table in tables(cluster):  # as if the leader had been lost
        table.release(tx._locks.owner, 0.0, ended=False)
    version = await db.put(K, b"new")
    with pytest.raises(Conflict) as caught:
        await tx.commit()
    assert (caught.value.key, caught.value.their_version) == (K, version)


@simulate(seeds=1, faults=False)
async def test_a_lock_is_kept_for_as_long_as_its_transaction_is_open(db: Database) -> None:
    await balanced()
    async with db.transaction() as tx:
        await tx.get_for_update(K)
        await asyncio.sleep(3 * LEASE_S)
        with pytest.raises(LockTimeout):
            async with db.transaction() as other:
                await other.get_for_update(K, timeout=0.5)
        tx.put(K, b"mine")
    assert db.stats()["conflicts"] == 0


@simulate(seeds=1, faults=False)
async def test_a_client_that_dies_keeps_a_lock_no_longer_than_its_lease(
    cluster: SimCluster, db: Database
) -> None:
    await balanced()

    async def hold(own: Database) -> None:
        async with own.transaction() as tx:
            await tx.get_for_update(K)
            await asyncio.sleep(1000)

    worker = await cluster.spawn(hold)
    await asyncio.sleep(2 * LEASE_S)
    cluster.kill(worker.name)
    begun = now()
    await add(db, K)
    assert 1.0 < now() - begun < LEASE_S + 1.0


@simulate(seeds=3, faults=False)
async def test_a_leader_that_dies_costs_a_conflict_and_no_update(
    cluster: SimCluster, db: Database
) -> None:
    other = await cluster.connect("other")
    leader = cluster.leader_of(K)
    assert leader is not None

    async def slowly(tx: Transaction) -> None:
        number = int(await tx.get_for_update(K) or b"0")
        await asyncio.sleep(3.0)
        tx.put(K, b"%d" % (number + 1))

    running = asyncio.create_task(db.run(slowly))
    await asyncio.sleep(0.5)
    cluster.kill(leader)
    await add(other, K)
    await running
    assert await db.get(K) == b"2"


@simulate(seeds=1, faults=False)
async def test_a_closed_client_gives_its_locks_back(cluster: SimCluster, db: Database) -> None:
    other = await cluster.connect("other")
    tx = other.transaction()
    await tx.get_for_update(K)
    await other.close()
    begun = now()
    await add(db, K)
    assert now() - begun < 1.0


@simulate(seeds=1, faults=False)
async def test_a_full_table_is_throttled_and_told(cluster: SimCluster, db: Database) -> None:
    await balanced()
    for table in tables(cluster):
        table._size_max = 1
    async with db.transaction() as tx:
        await tx.get_for_update(A)
        other = db.transaction(timeout=1.0)
        with pytest.raises(Throttled):
            await other.get_for_update(b"aa")


@simulate(seeds=1, faults=False)
async def test_arguments_are_refused_before_anything_is_sent(db: Database) -> None:
    async with db.transaction(read_only=True) as tx:
        with pytest.raises(InvalidArgument, match="read-only"):
            await tx.get_for_update(K)
    async with db.transaction() as tx:
        with pytest.raises(InvalidArgument):
            await tx.get_for_update(b"")
        with pytest.raises(InvalidArgument, match="timeout"):
            await tx.get_for_update(K, timeout=-1)
        with pytest.raises(InvalidArgument):
            await tx.get_many_for_update(b"keys")  # type: ignore[arg-type]


# --- cancellation


@simulate(seeds=1, faults=False)
async def test_a_wait_that_is_given_up_leaves_its_queue_and_the_transaction_goes_on(
    cluster: SimCluster, db: Database
) -> None:
    await balanced()
    async with db.transaction() as holder, db.transaction() as tx:
        await holder.get_for_update(K)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(tx.get_for_update(K), 0.1)
        await asyncio.sleep(0.2)
        assert [len(table.waiting) for table in tables(cluster) if table.waiting] == []
        await tx.get_for_update(A)
        tx.put(A, b"written")
    assert await db.get(A) == b"written"


class _Cancelled:
    """Cancels a task when it has been resumed `steps` times."""

    def __init__(self, work: Any, steps: int) -> None:
        self._work = work.__await__()
        self._steps = steps

    def __await__(self) -> Any:
        sent: Any = None
        error: BaseException | None = None
        while True:
            try:
                if error is not None:
                    waits = self._work.throw(error)
                else:
                    waits = self._work.send(sent)
            except StopIteration as ended:
                return ended.value
            error = None
            self._steps -= 1
            try:
                if self._steps < 0:
                    self._steps = 1 << 30
                    error = asyncio.CancelledError()
                    continue
                sent = yield waits
            except BaseException as raised:  # noqa: BLE001 - handed on to the work
                error = raised


def _play(steps: int, contended: bool, several: bool, swallows: bool) -> tuple[list[str], int]:
    """One transaction, cancelled at its await number `steps`; what is left of it, and whether it was cancelled."""

    async def main(loop: simulated.SimLoop) -> tuple[list[str], int]:
        cluster = SimCluster(7)
        await cluster.start()
        db, other = await cluster.connect("one"), await cluster.connect("two")
        await other.put(K, b"0")
        keys = [A, K, Z] if several else [K]
        blocker = other.transaction()
        if contended:
            await blocker.get_for_update(K)

        async def work() -> None:
            async with db.transaction() as tx:
                for key in keys:
                    try:
                        await tx.get_for_update(key)
                    except asyncio.CancelledError:
                        if not swallows:
                            raise
                    tx.put(key, b"1")

        async def cancelled() -> None:
            await _Cancelled(work(), steps)

        task = asyncio.create_task(cancelled())
        await asyncio.sleep(0.2)
        if contended:
            await blocker.rollback()
        ended = (await asyncio.gather(task, return_exceptions=True))[0]
        await asyncio.sleep(3.0)  # far less than a lease
        wrong = []
        if held(cluster):
            wrong.append(f"{held(cluster)} locks or waiters are left")
        if len(db._committer.keeper) or db._committer.keeper._timer is not None:
            wrong.append("the client keeps locks alive that nobody has")
        if db.router.calls:
            wrong.append(f"{db.router.calls} calls are left")
        begun = now()
        await asyncio.gather(*[add(other, key) for key in keys])
        if now() - begun > 1.0:
            wrong.append("others had to wait")
        if isinstance(ended, BaseException) and not isinstance(
            ended, (asyncio.CancelledError, KVError)
        ):
            wrong.append(repr(ended))
        await cluster.close()
        return wrong, int(isinstance(ended, asyncio.CancelledError))

    return simulated.run(main, 7, time_limit_s=300.0)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 14), st.booleans(), st.booleans(), st.booleans())
def test_a_task_cancelled_at_any_await_leaves_nothing(
    steps: int, contended: bool, several: bool, swallows: bool
) -> None:
    assert _play(steps, contended, several, swallows)[0] == []


def test_the_awaits_of_the_test_above_are_reached() -> None:
    assert [_play(steps, True, True, False)[1] for steps in range(4)] == [1, 1, 1, 1]
