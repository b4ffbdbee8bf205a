"""Dirty read (P1, G1a and G1b): T2 reads what T1 wrote before T1 has committed.

T1: w(x, 1) w(y, 1)         commit             excluded: before the commit T2 sees nothing, after it everything
T2:                 r(x)=0          r(x)=1
"""

from __future__ import annotations

from tests.anomalies.stage import Stage, play


async def script(stage: Stage) -> None:
    writer = stage.one.transaction()
    writer.put(stage.x, b"1")
    writer.put(stage.y, b"1")
    assert await stage.both(stage.two) == (b"0", b"0")
    stage.far("one", stage.y)  # x is prepared for a while before y is
    seen = await stage.watched(lambda: stage.both(stage.two), writer.commit())
    assert seen[0] == (b"0", b"0")
    assert seen[-1] == (b"1", b"1")
    assert {*seen} == {(b"0", b"0"), (b"1", b"1")}
    assert seen == sorted(seen)  # and never backwards


def test_dirty_read() -> None:
    play(script)
