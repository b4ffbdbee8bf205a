"""Bugs to plant into the product while it is simulated, each written as the mistake would be: the rule left out, no more.

`PLANTS` names them; `planted` switches one on. Each says what shows it, and within how many seeds (`base.Plant.proofs`); tests
hold them to it (test_durability_bites.py, test_directed.py), and `python -m tests.sim.plant_table` writes it all down.
Bugs of the transaction core alone are in tests/stateful/txn_plants.py, with a simulation of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tests.sim.plants.base import Caught, Directed, Patches, Plant, Seeds, patched
from tests.sim.plants.caches import CACHES
from tests.sim.plants.disks import DISKS
from tests.sim.plants.kept import KEPT
from tests.sim.plants.leaders import LEADERS
from tests.sim.plants.times import TIMES
from tests.sim.plants.transactions import TRANSACTIONS

PLANTS: Final[dict[str, Plant]] = {**CACHES, **DISKS, **LEADERS, **TIMES, **TRANSACTIONS, **KEPT}

IN_CORE: Final[dict[str, tuple[str, ...]]] = {
    "no_read_watermark": ("stale_min_ts",),
    "barrier_passed_by_fetch": ("joins_a_sent_batch",),
    "propose_again_in_later_term": ("proposed_again",),
    "volatile_fence": ("volatile_fence", "volatile_refusal"),
    "abort_without_fence": ("abort_without_fence", "abort_record_without_fence"),
    "no_guards": ("guards_not_held", "guards_not_validated", "conditions_not_held"),
    "no_cmax": ("validated_before_its_time",),
    "forget": ("resolved_part_forgotten",),
    "recovery_of_dropped_status": ("hinted_part_collected",),
    "deposed_leader_closes": ("deposed_leader_closes",),
    "closed_checked_against_applied": ("closed_checked_against_applied",),
    "closed_passed_by_fetch": ("closed_passed_by_fetch",),
}
"""Bugs of the protocol's first model -> plants of the transaction simulation that stand for them."""

NOT_BUILT: Final[dict[str, str]] = {}
"""Bugs of that model which cannot be planted yet: what they break is not there. They come with it."""

MODEL: Final = (
    "recovery_of_dropped_status",
    "reader_of_dropped_status",
    "waiter_below_commit",
    "failed_condition_without_ts",
    "barrier_passed_by_fetch",
    "one_entry_commit_no_bump",
    "propose_again_in_later_term",
    "deposed_leader_closes",
    "closed_checked_against_applied",
    "closed_passed_by_fetch",
    "no_floor",
    "invent_ts",
    "no_read_watermark",
    "no_guards",
    "no_cmax",
    "volatile_fence",
    "no_validate_bump",
    "forget",
    "abort_without_fence",
    "no_read_bump",
    "no_barrier",
    "stale_tso",
)
"""What could be left out of the protocol as it was first drawn up (txn/DESIGN.md, section 12, says what has changed since)."""


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The bug is in the product until the block ends."""
    with patched(PLANTS[name].patches()):
        yield


def equivalents(bug: str) -> list[str]:
    """The plants that stand for a bug of the model; those of the transaction simulation are marked so."""
    here = [name for name, plant in PLANTS.items() if bug in plant.model]
    return [*here, *(f"{name} (core)" for name in IN_CORE.get(bug, ()))]


__all__ = [
    "IN_CORE",
    "MODEL",
    "NOT_BUILT",
    "PLANTS",
    "Caught",
    "Directed",
    "Patches",
    "Plant",
    "Seeds",
    "equivalents",
    "patched",
    "planted",
]
