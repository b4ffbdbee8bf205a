"""Dirty write (P0, G0): T2 overwrites what T1 wrote and has not committed, so that x is of one and y of the other.

T1: w(x, 1)              w(y, 1)  commit        excluded: x and y are of one transaction at every version
T2:          w(y, 2) w(x, 2)      commit
"""

from __future__ import annotations

import asyncio

from kvstore.client import Database
from tests.anomalies.stage import Stage, play


async def script(stage: Stage) -> None:
    stage.far("one", stage.y)  # T1 reaches x first, and T2 reaches y first
    stage.far("two", stage.x)

    async def write(db: Database, value: bytes) -> None:
        async with db.batch() as batch:
            batch.put(stage.x, value)
            batch.put(stage.y, value)

    for number in range(5):
        mine, other = b"1.%d" % number, b"2.%d" % number
        both = asyncio.gather(write(stage.one, mine), write(stage.two, other))
        for x, y in await stage.watched(lambda: stage.both(stage.two), both):
            assert x == y
        assert (await stage.both(stage.one))[0] in (mine, other)


def test_dirty_write() -> None:
    play(script)
