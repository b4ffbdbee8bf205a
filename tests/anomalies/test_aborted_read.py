"""Aborted read (G1a): T2 reads what T1 wrote, and T1 aborts.

T1: r(y)=0        w(x, 1) w(y, 1)  abort       excluded: nobody ever sees x = 1
T2:        w(y, 2)           r(x)=0
"""

from __future__ import annotations

from tests.anomalies.stage import Stage, play, refused


async def script(stage: Stage) -> None:
    loser = stage.one.transaction()
    assert await loser.get(stage.y) == b"0"
    await stage.two.put(stage.y, b"2")
    loser.put(stage.x, b"1")
    loser.put(stage.y, b"1")
    stage.far("one", stage.y)  # x is prepared for a while before y refuses
    outcome: list[bool] = []

    async def commit() -> None:
        outcome.append(await refused(loser))

    seen = await stage.watched(lambda: stage.both(stage.two), commit())
    assert outcome == [True]
    assert {*seen} == {(b"0", b"2")}
    assert await stage.both(stage.one) == (b"0", b"2")


def test_aborted_read() -> None:
    play(script)
