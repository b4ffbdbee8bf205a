"""Claims: what guards durability, order, leadership and transactions bites: each planted bug is seen within its budget.

A bug that no seed shows, and no scenario (test_directed.py), would mean that the simulator cannot be trusted with the real one.
"""

from __future__ import annotations

from typing import Final

import pytest

from kvstore.sim.scenario import Options
from tests.sim import plant_table
from tests.sim.plants import IN_CORE, MODEL, NOT_BUILT, PLANTS, equivalents, planted
from tests.sim.plants.base import (
    CALM,
    CLIENTS,
    CRASHES,
    ELECTIONS,
    PARTITIONS,
    RETRIES,
    SNAPSHOTS,
    WATCHES,
    first_of,
)
from tests.stateful import txn_plants
from tools.simulate import judge

RANDOM: Final = [name for name, plant in PLANTS.items() if plant.seeds is not None]
QUICK: Final = Options(seconds=3.0, clients=2, ops=12, kinds=("crash",), mean_s=0.4, hold_s=0.3)
QUICK_CALM: Final = Options(seconds=1.0, clients=6, ops=30, faults=False)
ALL: Final = {
    "calm": CALM,
    "clients": CLIENTS,
    "crashes": CRASHES,
    "elections": ELECTIONS,
    "partitions": PARTITIONS,
    "retries": RETRIES,
    "snapshots": SNAPSHOTS,
    "watches": WATCHES,
}


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", RANDOM)
def test_a_planted_bug_is_seen(name: str) -> None:
    seeds = PLANTS[name].seeds
    assert seeds is not None
    with planted(name):
        assert seeds.prove(PLANTS[name].shows) is not None, f"{seeds.budget} seeds did not show it"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fsync does nothing", QUICK),
        ("stocked for all", QUICK_CALM),
        ("guards not validated", QUICK_CALM),
        ("reads pass latches", QUICK_CALM),
    ],
)
def test_a_planted_bug_is_seen_at_once(name: str, options: Options) -> None:
    with planted(name):
        assert any(first_of(PLANTS[name].shows, judge(n, options).problems) for n in range(1, 4))


@pytest.mark.slow
@pytest.mark.parametrize("faults", ALL)
def test_the_same_faults_without_a_bug_pass(faults: str) -> None:
    assert judge(1, ALL[faults]).problems == []


def test_each_plant_says_what_shows_it() -> None:
    assert [name for name, plant in PLANTS.items() if not plant.proofs] == []
    used = [plant.seeds.options for plant in PLANTS.values() if plant.seeds is not None]
    assert all(options in ALL.values() for options in used)


def test_each_bug_of_the_model_is_planted_or_has_nothing_to_break() -> None:
    assert len(MODEL) == 22
    assert [bug for bug in MODEL if bool(equivalents(bug)) == (bug in NOT_BUILT)] == []
    assert all(bug in MODEL for plant in PLANTS.values() for bug in plant.model)
    assert all(name in txn_plants.PLANTS for names in IN_CORE.values() for name in names)


def test_the_table_has_every_proof() -> None:
    text = plant_table.README.read_text(encoding="utf-8")
    table = text[text.index(plant_table.BEGIN) : text.index(plant_table.END)]
    missing = [job for job in plant_table.jobs() if f"| {job.name} | {job.kind}" not in table]
    assert missing == [], "write it anew: make plants"
    assert "not caught" not in table
