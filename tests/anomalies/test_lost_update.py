"""Lost update (P4): both read x, both write what follows from it, and one of the updates is gone.

T1: r(x)=0               w(x, 0+1)  commit     excluded: the second to commit meets a conflict, and `run` does it again
T2:         r(x)=0  w(x, 0+1)  commit
"""

from __future__ import annotations

import asyncio

from kvstore.client import Database
from kvstore.transactions import Transaction
from tests.anomalies.stage import Stage, play, refused


async def script(stage: Stage) -> None:
    first, second = stage.one.transaction(), stage.two.transaction()
    for tx in (first, second):
        assert await tx.get(stage.x) == b"0"
        tx.put(stage.x, b"1")
    assert not await refused(second)
    assert await refused(first)

    async def add(tx: Transaction) -> None:
        tx.put(stage.x, b"%d" % (int(await tx.get(stage.x, b"")) + 1))

    async def adds(db: Database) -> None:
        for _ in range(5):
            await db.run(add)

    await asyncio.gather(adds(stage.one), adds(stage.two))
    assert await stage.one.get(stage.x) == b"11"


def test_lost_update() -> None:
    play(script)
