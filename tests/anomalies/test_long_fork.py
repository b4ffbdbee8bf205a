"""Long fork (parallel snapshot isolation): two writes that know nothing of each other are seen in two orders.

T1: w(x, 1)              T3: r(x)=1 r(y)=0      excluded: of all that is ever seen, either x or y came first
T2: w(y, 1)              T4: r(x)=0 r(y)=1
"""

from __future__ import annotations

import asyncio

from tests.anomalies.stage import SLOW_S, Stage, play


async def script(stage: Stage) -> None:
    stage.far("one", stage.y)  # x is near to one, and y is near to two
    stage.far("two", stage.x)
    for number in range(1, 6):
        old, new = b"%d" % (number - 1), b"%d" % number
        looks = [asyncio.ensure_future(stage.both(db)) for db in (stage.one, stage.two)]
        await asyncio.sleep(
            SLOW_S[0] / 2
        )  # each has read what is near, if it did not wait for a version
        await asyncio.gather(stage.one.put(stage.x, new), stage.two.put(stage.y, new))
        seen = await asyncio.gather(*looks)
        assert not {*seen} >= {(new, old), (old, new)}
        assert await stage.both(stage.one) == (new, new)


def test_long_fork() -> None:
    play(script)
