"""Write skew (A5B, G2-item): each reads both, finds that it may, and writes the one that the other did not.

T1: r(x)=0 r(y)=0          w(x, 1)  commit     excluded: at most one of the two commits, whichever range it reaches
T2:        r(x)=0 r(y)=0   w(y, 1)  conflict   first
"""

from __future__ import annotations

import asyncio

from tests.anomalies.stage import Stage, play, refused


async def script(stage: Stage) -> None:
    stage.far("one", stage.y)
    stage.far("two", stage.x)
    first, second = stage.one.transaction(), stage.two.transaction()
    for tx in (first, second):
        assert await tx.get_many([stage.x, stage.y]) == {stage.x: b"0", stage.y: b"0"}
    first.put(stage.x, b"1")
    second.put(stage.y, b"1")
    outcome = await asyncio.gather(refused(first), refused(second))
    assert any(outcome)
    assert await stage.both(stage.one) != (b"1", b"1")


def test_write_skew() -> None:
    play(script)
