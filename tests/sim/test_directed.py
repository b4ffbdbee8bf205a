"""Claims: each scenario that goes straight to a rule passes; and shows every bug that it was written for.

The same scenario with the rule left out must find something, else it would prove nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest

from tests.sim import (
    directed_forgotten,
    directed_kept,
    directed_leaders,
    directed_log,
    directed_txn,
)
from tests.sim.plants import PLANTS, planted

SCENARIOS: Final[list[Callable[[], list[str]]]] = [
    directed_forgotten.a_forgotten_part_is_no_promise_of_a_former_leader,
    directed_forgotten.a_forgotten_part_is_not_absent,
    directed_kept.what_is_open_is_kept,
    directed_leaders.a_late_append_changes_nothing,
    directed_leaders.a_replaced_leader_closes_nothing,
    directed_leaders.a_slow_clock_keeps_no_lease,
    directed_leaders.a_stopped_leader_reads_nothing_old,
    directed_leaders.a_term_uses_no_timestamps_of_another,
    directed_leaders.an_old_entry_is_not_committed_by_counting,
    directed_leaders.what_a_term_lost_is_lost,
    directed_log.an_acknowledged_entry_is_on_two_disks,
    directed_log.an_installed_snapshot_is_on_disk,
    directed_log.an_old_snapshot_is_refused,
    directed_log.durable_is_what_stands_there_now,
    directed_log.half_a_snapshot_is_no_state,
    directed_log.idle_ranges_survive_their_segments,
    directed_log.one_vote_in_a_term,
    directed_log.the_oracle_remembers_its_bound,
    directed_txn.a_decision_reaches_everybody,
    directed_txn.a_hint_is_remembered_for_readers,
    directed_txn.a_hint_is_remembered_for_recovery,
    directed_txn.nothing_appears_where_nothing_was,
    directed_txn.what_was_read_stays,
]
DIRECTED: Final = [name for name, plant in PLANTS.items() if plant.directed is not None]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda each: each.__name__)
def test_the_product_passes(scenario: Callable[[], list[str]]) -> None:
    assert scenario() == []


@pytest.mark.parametrize("name", DIRECTED)
def test_a_planted_bug_is_seen(name: str) -> None:
    plant = PLANTS[name]
    assert plant.directed is not None
    with planted(name):
        assert plant.directed.prove(plant.shows) is not None


def test_every_scenario_shows_a_bug() -> None:
    used = [plant.directed.scenario for plant in PLANTS.values() if plant.directed is not None]
    assert [each.__name__ for each in SCENARIOS if each not in used] == []


def test_a_stopped_leader_under_another_seed() -> None:
    assert directed_leaders.a_stopped_leader_reads_nothing_old(2) == []
