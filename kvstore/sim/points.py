"""Which rare ways a seed takes on purpose (`replication.probes.chance`), and which must have been taken by many seeds.

Swarm, as with faults: a seed switches on about a quarter of the points, each with a probability of its own. A point
draws from its own generator, so that one more look at another point changes nothing here.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Final

SHARE: Final = 0.25  # of the points that a seed has switched on, on average
PROBABILITIES: Final = (0.01, 0.05, 0.25)


class Points:
    """The chooser of one seed."""

    def __init__(self, seed: str) -> None:
        self._seed = seed
        self._points: dict[str, tuple[float, random.Random]] = {}  # by name, as they are met

    def __call__(self, name: str) -> bool:
        point = self._points.get(name)
        if point is None:
            rng = random.Random(f"{self._seed}/point/{name}")
            on = rng.random() < SHARE
            point = self._points[name] = (rng.choice(PROBABILITIES) if on else 0.0, rng)
        probability, rng = point
        return probability > 0.0 and rng.random() < probability


def never_reached(counts: Mapping[str, int]) -> list[str]:
    """Which of `EXPECTED` are not among these counts, added up over all seeds of a run."""
    return [name for name in EXPECTED if not counts.get(name)]


EXPECTED: Final[tuple[str, ...]] = ()
