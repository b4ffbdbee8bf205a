"""Claims of cancellation: a task that is cancelled at any step of its client (each resumption of an await is one) leaves no
undecided record, no latch, no waiter, no task, no call in flight; what it did is whole or nothing; and the client goes on.

Hypothesis picks the calls and the steps. All of one example happens to one client of one simulated cluster.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.client import Database
from kvstore.errors import Conflict
from kvstore.transactions import Transaction
from tests.sim.directed import KEYS, LOW, MIDDLE, Stage, play

A: Final = KEYS[LOW]
K: Final = KEYS[MIDDLE]
STEPS_MAX: Final = 60  # a commit over two ranges takes fewer
CALM_S: Final = 4.0  # longer than both timers


async def commit(db: Database) -> None:
    async with db.transaction() as tx:
        found = await tx.get_many([A, K])
        for key in (A, K):
            tx.put(key, b"%d" % (int(found.get(key, b"0")) + 1))


async def guarded(db: Database) -> None:
    async with db.transaction() as tx:
        await tx.scan(K, K + b"~").to_list()
        tx.max(b"a-most", 3)
        tx.put_versionstamped_key(b"a-queue/", b"job")


async def batch(db: Database) -> None:
    async with db.batch() as writes:
        writes.increment(A)
        writes.increment(K)


async def run(db: Database) -> None:
    async def add(tx: Transaction) -> int:
        tx.increment(A)
        tx.increment(K)
        return 1

    await db.run(add, idempotency_key=b"once")


async def increment(db: Database) -> None:
    await db.increment(b"a-counter")


async def read(db: Database) -> None:
    await asyncio.gather(db.get(A), db.get_many([A, K]), db.scan(A, K + b"~").to_list())


async def snapshot(db: Database) -> None:
    view = db.snapshot()
    await asyncio.gather(view.get(A), view.get(K))


CALLS: Final[list[Callable[[Database], Coroutine[Any, Any, None]]]] = [
    commit, guarded, batch, run, increment, read, snapshot,
]  # fmt: skip


def left_behind(stage: Stage) -> list[str]:
    """What nodes still hold of anybody's."""
    found: list[str] = []
    for server in stage.cluster.running():
        store: Any = server.node.store if server.node is not None else None
        if store.open_requests:
            found.append(f"{server.name} has {store.open_requests} requests in flight")
        for group, replica in store.replicas.items():
            state, evaluator = replica.state, replica.evaluator
            if state.parts or state.staged or state.outbox:
                found.append(f"range {group} has undecided transactions on {server.name}")
            if evaluator is not None and (
                evaluator.latches.held() or evaluator.blocked or evaluator.untimed
            ):
                found.append(f"range {group} has latches or waiters on {server.name}")
    return found


def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()


async def scenario(stage: Stage, plan: list[tuple[int, int]]) -> list[bool]:
    """Which of them were cancelled."""
    client = await stage.client("client")
    process, db = client.process, client.database
    for key in (A, K):
        await stage.put(client, key, b"0")
    await process.call(read(db))
    await asyncio.sleep(CALM_S)
    before = len(process.tasks)
    cancelled: list[bool] = []
    for number, steps in plan:
        task = process.spawn(CALLS[number](db))
        process.light(steps, partial(_cancel, task))
        done = (await asyncio.gather(task, return_exceptions=True))[0]
        process.unlight()
        if done is not None and not isinstance(done, asyncio.CancelledError | Conflict):
            raise done
        cancelled.append(isinstance(done, asyncio.CancelledError))
    await asyncio.sleep(CALM_S)
    for what in left_behind(stage):
        stage.claim(False, what)
    stage.claim(db.router.calls == 0, f"{db.router.calls} calls are in flight")
    stage.claim(not db._committer._drives, "commits are under way")
    stage.claim(len(process.tasks) == before, f"{before} tasks have become {len(process.tasks)}")
    found = await process.call(db.get_many([A, K]))
    stage.claim(found[A] == found[K], f"half of something has happened: {found}")
    await process.call(commit(db))  # and it goes on
    return cancelled


def played(plan: list[tuple[int, int]]) -> list[bool]:
    cancelled: list[bool] = []

    async def whole(stage: Stage) -> None:
        cancelled.extend(await scenario(stage, plan))

    assert play(whole) == []
    return cancelled


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(CALLS) - 1), st.integers(1, STEPS_MAX)),
        min_size=4,
        max_size=14,
    )
)
def test_a_task_may_be_cancelled_at_any_step(plan: list[tuple[int, int]]) -> None:
    played(plan)


@pytest.mark.parametrize("number", range(len(CALLS)), ids=lambda number: CALLS[number].__name__)
def test_every_step_of_each(number: int) -> None:
    cancelled = played([(number, steps) for steps in range(1, STEPS_MAX)])
    assert cancelled[0]
    assert not cancelled[-1]  # it ends sooner than that: these were all
