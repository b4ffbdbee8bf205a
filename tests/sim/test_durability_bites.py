"""Claims: what guards durability, order and leadership bites. Each planted bug is seen within a stated number of seeds.

A bug that no seed shows would mean that the simulator cannot be trusted with the real one.
"""

from __future__ import annotations

from typing import Final

import pytest

from kvstore.sim.scenario import Options
from tests.sim.plants import PLANTS, planted
from tools.simulate import judge

SEEN: Final = [name for name, plant in PLANTS.items() if plant.seeds]
QUICK: Final = Options(seconds=3.0, clients=2, ops=12, kinds=("crash",), mean_s=0.4, hold_s=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEN)
def test_a_planted_bug_is_seen(name: str) -> None:
    plant = PLANTS[name]
    with planted(name):
        for seed in range(1, plant.seeds + 1):
            if judge(seed, plant.options).problems:
                return
    raise AssertionError(f"{plant.seeds} seeds did not show it: {name}")


def test_a_log_that_is_never_synced_is_seen() -> None:
    with planted("fsync does nothing"):
        assert any(judge(seed, QUICK).problems for seed in range(1, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEN)
def test_the_same_faults_without_the_bug_pass(name: str) -> None:
    assert judge(1, PLANTS[name].options).problems == []
