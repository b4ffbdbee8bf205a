"""Stale read: a write was acknowledged, and a read that begins afterwards does not see it.

T1: w(x, 1)  acknowledged                       excluded, also by way of a leader that was stopped, goes on, and does
T2:                        r(x)=1               not know yet that there is another
"""

from __future__ import annotations

import asyncio

from tests.anomalies.stage import Stage, play


async def script(stage: Stage) -> None:
    for number in range(1, 6):
        await stage.one.put(stage.x, b"%d" % number)
        assert await stage.two.get(stage.x) == b"%d" % number
    cluster, deposed = stage.cluster, stage.cluster.leader_of(stage.x)
    assert deposed is not None
    others = [name for name in cluster.nodes if name != deposed]
    cluster.partition("two", others)  # T2's client knows that leader alone
    cluster.partition("one", deposed)
    cluster.pause(deposed)
    cluster.partition(others, deposed, one_way=True)  # nor does anybody tell it
    await stage.one.put(stage.x, b"new")
    reading = asyncio.ensure_future(stage.two.get(stage.x))
    await asyncio.sleep(0.05)
    cluster.resume(deposed)
    await asyncio.sleep(0.2)
    cluster.heal()
    assert await reading == b"new"
    assert await stage.two.snapshot().get(stage.x) == b"new"


def test_stale_read() -> None:
    play(script)
