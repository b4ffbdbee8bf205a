"""Intermediate read (G1b): T2 reads a value of T1 that T1 itself has overwritten.

T1: w(x, 1) w(y, 1) w(x, 2) w(y, 2)  commit    excluded: nobody ever sees 1
T2:              r(x)=0        r(x)=2
"""

from __future__ import annotations

from tests.anomalies.stage import Stage, play


async def script(stage: Stage) -> None:
    writer = stage.one.transaction()
    for value in (b"1", b"2"):
        writer.put(stage.x, value)
        writer.put(stage.y, value)
        assert await writer.get(stage.x) == value  # only it sees them
        assert await stage.both(stage.two) == (b"0", b"0")
    stage.far("one", stage.y)
    seen = await stage.watched(lambda: stage.both(stage.two), writer.commit())
    assert {*seen} == {(b"0", b"0"), (b"2", b"2")}


def test_intermediate_read() -> None:
    play(script)
