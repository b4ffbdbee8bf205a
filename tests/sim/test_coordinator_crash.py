"""Claims of a coordinator's death: at whatever step of a commit its process ends (each resumption of an await is one), nothing
stays undecided, latched or waiting, and what it did is whole or nothing, in all its ranges.

Every step is played, not a sample of them: each by a client of its own, all on one simulated cluster.
"""

from __future__ import annotations

import asyncio
from typing import Final

import pytest

from kvstore.client import Database
from kvstore.sim.process import ProcessDied
from kvstore.transactions import Transaction
from tests.sim.directed import KEYS, LOW, MIDDLE, Stage, play
from tests.sim.test_cancellation import left_behind

A: Final = KEYS[LOW]
K: Final = KEYS[MIDDLE]
STEPS_MAX: Final = 80  # a commit over two ranges takes fewer
CALM_S: Final = 6.0  # longer than the timers of anchors and of orphans, one after the other


async def transfer(db: Database) -> None:
    async with db.transaction() as tx:
        found = await tx.get_many([A, K])
        for key in (A, K):
            tx.put(key, b"%d" % (int(found.get(key, b"0")) + 1))


async def blind(db: Database) -> None:
    async def add(tx: Transaction) -> None:
        tx.increment(A)
        tx.increment(K)

    await db.run(add)


async def locked(db: Database) -> None:
    async with db.transaction() as tx:
        value = await tx.get_for_update(A)
        tx.put(A, b"%d" % (int(value or b"0") + 1))
        tx.increment(K)


COMMITS: Final = {"transfer": transfer, "blind": blind, "locked": locked}


async def dies_at(stage: Stage, name: str, steps: int) -> bool:
    """Whether it did, and did not end before."""
    client = await stage.client(f"{name}{steps}")
    process = client.process
    await process.call(client.database.get_many([A, K]))  # it knows the ranges
    process.light(steps, lambda: stage.cluster.crash_client(client.name))
    try:
        await process.call(COMMITS[name](client.database))
    except ProcessDied:
        await asyncio.sleep(CALM_S)
        for what in left_behind(stage):
            stage.claim(False, f"dead at step {steps}: {what}")
        return True
    process.unlight()
    return False


@pytest.mark.parametrize("name", COMMITS)
def test_every_step_of_a_commit_may_be_its_coordinators_last(name: str) -> None:
    happened: list[int] = []

    async def scenario(stage: Stage) -> None:
        witness = await stage.client("witness")
        read, steps = witness.database.get_many, 0
        for key in (A, K):
            await stage.put(witness, key, b"0")
        while await dies_at(stage, name, steps + 1):
            steps += 1
            found = await witness.process.call(read([A, K]))
            stage.claim(found[A] == found[K], f"dead at step {steps}: half has happened: {found}")
            happened.append(int(found[A]))
            stage.claim(steps < STEPS_MAX, "it never ends")
            if stage.problems:
                return

    assert play(scenario) == []
    assert len(happened) >= 6, "so many steps are in every commit over two ranges"
    assert happened[0] == 0
    assert happened[-1] > 0, "some of them had committed"
    assert happened[-1] < len(happened), "and some had not"
