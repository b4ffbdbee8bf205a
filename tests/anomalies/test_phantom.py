"""Phantom (P3, G2): T1 looks for rows, T2 inserts one that T1 would have found, and T1 writes as if it were not there.

T1: scan(y..)={y}                scan(y..)={y}  w(x, 1)  conflict    excluded: a scan guards the gaps, too
T2:                insert(y/new)
"""

from __future__ import annotations

from tests.anomalies.stage import Stage, play, refused


async def script(stage: Stage) -> None:
    found = [(stage.y, b"0")]
    reader = stage.one.transaction()
    assert await reader.scan(prefix=stage.y).to_list() == found
    await stage.two.put(stage.y + b"/new", b"2")
    assert await reader.scan(prefix=stage.y).to_list() == found
    reader.put(stage.x, b"1")
    assert await refused(reader)
    again = stage.one.transaction()
    assert await again.scan(prefix=stage.y + b"/old").to_list() == []
    await stage.two.put(stage.y + b"/older", b"2")
    again.put(stage.x, b"1")
    assert await refused(again)
    assert await stage.one.get(stage.x) == b"0"


def test_phantom() -> None:
    play(script)
