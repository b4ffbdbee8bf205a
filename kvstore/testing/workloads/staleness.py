"""What bounded-stale reads promise: nothing is missing that was acknowledged before the bound, and no client goes back in time.

Times are of the loop that runs: one clock for all, in a simulation and in one process of clients.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

CLOCKS: Final = 1.1  # nodes judge by clocks that may go this much wrong; in simulations they do


class StaleRead(NamedTuple):
    client: str
    reader: object  # the client's process: another one begins anew
    began: float
    bound_s: float
    version: int


class Staleness:
    def __init__(self) -> None:
        self.reads: list[StaleRead] = []  # in the order of their ends
        self._acknowledged: list[tuple[float, int]] = []  # times rise, versions too

    def acknowledged(self, when: float, version: int) -> None:
        if not self._acknowledged or version > self._acknowledged[-1][1]:
            self._acknowledged.append((when, version))

    def problems(self) -> Iterable[str]:
        last: dict[object, int] = {}
        for read in self.reads:
            long_ago = read.began - read.bound_s * CLOCKS
            floor = max(
                (version for when, version in self._acknowledged if when < long_ago), default=0
            )
            if read.version < floor:
                yield (
                    f"Too-stale: {read.client} read at {read.version} with a bound of {read.bound_s:g} s,"
                    f" and {floor} was acknowledged before that"
                )
            if read.version < last.get(read.reader, 0):
                yield f"Monotonic-reads: {read.client} read at {read.version} after {last[read.reader]}"
            last[read.reader] = read.version
