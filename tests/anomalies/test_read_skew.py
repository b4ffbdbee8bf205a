"""Read skew (A5A, G-single): T1 sees x from before T2, and y from after it.

T1: r(x)=0                          r(y)=0     excluded: both are of the snapshot that the first read began
T2:         w(x, 1) w(y, 1) commit
"""

from __future__ import annotations

from tests.anomalies.stage import Stage, play, refused


async def script(stage: Stage) -> None:
    reader = stage.one.transaction()
    snapshot = stage.one.snapshot()
    assert await reader.get(stage.x) == await snapshot.get(stage.x) == b"0"
    async with stage.two.batch() as batch:
        batch.put(stage.x, b"1")
        batch.put(stage.y, b"1")
    assert await snapshot.get(stage.y) == b"0"
    assert await reader.get(stage.y) == b"0"
    reader.put(stage.x, b"9")
    assert await refused(reader)
    assert await stage.both(stage.one) == (b"1", b"1")


def test_read_skew() -> None:
    play(script)
