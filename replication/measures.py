"""How long things took and how many came together, counted where they happen, for whoever exports it.

No I/O, no clock, no lock: a node notes on its loop, once a batch or a turn; a scrape on another thread reads numbers
that may be one note apart. A note costs a bisection and two additions, so nothing switches it off.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Final

SECONDS: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
COUNTS: Final = tuple(float(1 << power) for power in range(13))  # 1 to 4096


class Distribution:
    """Counts of values by upper bound, and their sum.

    Args: bounds: ascending; a value counts at the first bound that is not below it, or beyond the last.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def note(self, value: float, times: int = 1) -> None:
        """One value, or one that stands for so many."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def cumulative(self) -> Iterator[tuple[float, int]]:
        """(bound, how many values are at most that), the last bound infinite."""
        sum_of_counts = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            sum_of_counts += count
            yield bound, sum_of_counts


class Measures:
    """What one node's host notes."""

    def __init__(self) -> None:
        self.turn_seconds = Distribution(SECONDS)  # the loop was held by one run of phases
        self.turn_entries = Distribution(COUNTS)  # in one batch of the log, where it has any
        self.log_write_seconds = Distribution(SECONDS)  # of a batch
        self.log_sync_seconds = Distribution(SECONDS)
        self.commit_seconds = Distribution(SECONDS)  # leader: proposal to committed and durable
        self.append_seconds = Distribution(SECONDS)  # leader: append to the follower's answer
        self.elections_begun = 0
