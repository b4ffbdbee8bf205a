"""Causal reverse (serializable, but not strictly): T2 begins after T1 was acknowledged, and somebody sees T2 without T1.

T1: w(x, 1)  acknowledged                       excluded: who sees y = 1 sees x = 1, also if x was looked at first
T2:                        w(y, 1)
T3: r(x)=0                          r(y)=0
"""

from __future__ import annotations

from tests.anomalies.stage import Stage, play


async def script(stage: Stage) -> None:
    for number in range(1, 6):
        old, new = b"%d" % (number - 1), b"%d" % number
        early = stage.two.transaction(read_only=True)
        assert await early.get(stage.x) == old

        async def in_order(new: bytes = new) -> None:
            await stage.one.put(stage.x, new)
            await stage.two.put(stage.y, new)

        seen = await stage.watched(lambda: stage.both(stage.one), in_order())
        assert {*seen} <= {(old, old), (new, old), (new, new)}
        assert await early.get(stage.y) == old
        assert await stage.both(stage.two) == (new, new)


def test_causal_reverse() -> None:
    play(script)
