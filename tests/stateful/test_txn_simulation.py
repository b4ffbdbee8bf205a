"""Claims: under lost, doubled and late messages, leader changes and crashing clients, every run is strictly serializable,
every outcome that was told is the record, and nothing stays undecided; and each planted bug is noticed.

The invariants by number: txn/DESIGN.md. A seed that fails is run alone with
`python -m tests.stateful.txn_harness --seed N --trace`.
"""

from __future__ import annotations

import pytest

from tests.stateful.txn_harness import find, run_seed
from tests.stateful.txn_plants import PLANTS

CHUNK_SEEDS = 5
CHUNKS = 30
PROBED_SEEDS = 40

RARE = [  # paths that a run must take now and then; see Checker.told
    "Fence: COMMITTED",
    "LockRead: LockPending",
    "LockRead: ReadReply",
    "LockRead: deadlock",
    "LockRead: transaction_closed",
    "Fence: FENCED",
    "Fence: PREPARED",
    "Outcome: COMMITTED",
    "Prepare: COMMITTED",
    "Prepare: FENCED COMPARE_FAILED",
    "Prepare: FENCED RECOVERY",
    "QueryPart: ABSENT",
    "QueryPart: COMMITTED",
    "QueryTxn BLOCKED: STAGED",
    "QueryTxn ORPHAN: ABORTED",
    "QueryTxn READ: COMMITTED",
    "QueryTxn READ: INVISIBLE",
    "Raft refused a proposal",
    "a client crashed",
    "a deadlock was there",
    "a client learned its outcome by asking",
    "a deposed leader's answer was not confirmed",
    "applied AbortUnstaged",
    "applied OutboxDone",
    "guards_in_slices",
    "guards_not_from_recent",
    "one-range Prepare: COMMITTED",
    "one-range Prepare: FENCED COMPARE_FAILED",
]


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_seed_runs_clean(chunk):
    for seed in range(chunk * CHUNK_SEEDS, (chunk + 1) * CHUNK_SEEDS):
        run_seed(seed)


def test_rare_paths_are_reached():
    reached: dict[str, None] = {}
    for seed in range(PROBED_SEEDS):
        reached |= dict.fromkeys(run_seed(seed).probes)
    assert [name for name in RARE if name not in reached] == []


def test_a_seed_runs_the_same_way_twice():
    first, second = run_seed(3), run_seed(3)
    assert first.probes == second.probes
    assert first.checker.versions == second.checker.versions


@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(
            name, marks=[pytest.mark.slow, pytest.mark.timeout(300)] if seeds_max > 20 else []
        )
        for name, (_, seeds_max) in PLANTS.items()
    ],
)
def test_a_planted_bug_is_noticed_within_its_budget_of_seeds(plant):
    assert find(plant, PLANTS[plant][1]) is not None
