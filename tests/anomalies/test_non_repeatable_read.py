"""Non-repeatable read (P2, fuzzy read): T1 reads x twice, T2 changes it between, and T1 sees two values.

T1: r(x)=0          r(x)=0  w(y, 1)  conflict  excluded: all reads of T1 are of one snapshot, and if it writes,
T2:         w(x, 1)                            what it read must still hold
"""

from __future__ import annotations

from tests.anomalies.stage import Stage, play, refused


async def script(stage: Stage) -> None:
    reader = stage.one.transaction()
    assert await reader.get(stage.x) == b"0"
    await stage.two.put(stage.x, b"1")
    assert await reader.get(stage.x) == b"0"
    assert await reader.get_many([stage.x]) == {stage.x: b"0"}
    assert await reader.scan(stage.x, stage.x + b"\x00").to_list() == [(stage.x, b"0")]
    reader.put(stage.y, b"1")
    assert await refused(reader)
    assert await stage.both(stage.two) == (b"1", b"0")


def test_non_repeatable_read() -> None:
    play(script)
