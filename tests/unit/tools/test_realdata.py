"""Claims of `tools.realdata`: an outage lasts from the last answer to the next, whatever fails meanwhile, in any range. Virtual
time."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from kvstore.errors import DeadlineExceeded
from kvstore.sim import loop as simulated
from tools.realdata import RANGES, Outage, probes_of, splits_of

CALL_S = 3.0  # after which a call fails


class Away:
    """A database that answers no call between two instants, counted from its first."""

    def __init__(self, begin_s: float, end_s: float) -> None:
        self.begin_s, self.end_s = begin_s, end_s
        self.first: float | None = None

    async def put(self, _key: bytes, _value: bytes) -> None:
        now = asyncio.get_running_loop().time()
        self.first = now if self.first is None else self.first
        if self.begin_s <= now - self.first < self.end_s:
            await asyncio.sleep(CALL_S)
            raise DeadlineExceeded("not now")
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("end_s", [8.0, 1e9], ids=["until it is answered", "until the end"])
def test_an_outage_is_as_long_as_all_calls_that_failed(end_s: float) -> None:
    async def probed() -> float:
        db: Any = Away(1.0, end_s)
        outage = Outage(db, [b"a"])
        probing = asyncio.create_task(outage.run())
        await asyncio.sleep(12.0)
        outage.running = False
        await probing
        return outage.longest_s

    longest_s = simulated.run(lambda _loop: probed(), 1)
    assert 8.9 < longest_s < 12.1


def test_each_range_is_probed_by_a_key_that_is_no_row() -> None:
    keys = [b"unicode/%06X" % number for number in range(0, 3000, 7)]
    bounds = [b"", *splits_of(keys), b"\xff"]
    probes = probes_of(keys)
    assert len(probes) == RANGES
    for probe, (start, end) in zip(probes, itertools.pairwise(bounds), strict=True):
        assert start <= probe < end
        assert probe not in keys
