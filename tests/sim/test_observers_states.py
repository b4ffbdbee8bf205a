"""Claims of I24: a state between two versions that breaks what a workload promises is told, whether anybody has read it or not;
of what is not known to be whole nothing is said."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Final

import pytest

from kvstore.sim.observers import Observers
from kvstore.sim.observers.report import Report
from kvstore.sim.observers.states import compare_states
from kvstore.sim.scenario import Options, run
from kvstore.testing.history import Outcome
from kvstore.testing.workloads import WORKLOADS, Workload, places_of
from kvstore.testing.workloads.bank import Bank
from tests.sim.ghost import BEGIN, LAST, Ghost, Rows, version
from txn import keycode
from txn.state import RangeRow, RangeState
from txn.types import make_txn_id

PLACES: Final = places_of((b"h", b"p"))
MOVE: Final = 150  # the first version after all rows are there

Versions = Mapping[int, Mapping[bytes, bytes | None]]


class World:
    """One workload, and versions of its keys as entries write them."""

    def __init__(self, name: str) -> None:
        self.ghost = Ghost()
        self.workload: Workload = WORKLOADS[name](random.Random(1), PLACES)
        self.texts: list[str] = []

    def lay(self, rows: Mapping[bytes, bytes]) -> None:
        """One after the other."""
        self.write({BEGIN + 1 + n: {key: value} for n, (key, value) in enumerate(rows.items())})

    def write(self, versions: Versions) -> None:
        for ts, rows in versions.items():
            txn_id, merged = make_txn_id(BEGIN, ts), Rows()
            for key, value in rows.items():
                merged |= version(key, ts, txn_id, value)
            self.ghost.apply(merged)

    def safe(self, ts: int, group: int = 2) -> None:
        """A replica of that range takes all up to ts for safe."""
        replica: Any = SimpleNamespace(range_id=group, safe_ts=ts)
        replica.state = RangeState(RangeRow(group, b"", b"", 1, 1, 0, 0))
        self.ghost.transactions.replica_stands("n1", replica)

    def read(self, keys: Sequence[bytes], at: int) -> None:
        """A range has answered with them."""
        for key in keys:
            self.ghost.transactions.served.key(key, at)

    def judged(self) -> int:
        assert self.ghost.told == []
        return compare_states(self.ghost.transactions, [self.workload], Report(self.texts.append))


def bank() -> tuple[World, list[bytes]]:
    """Six accounts with 100 each."""
    world = World("bank")
    assert isinstance(world.workload, Bank)
    world.lay(world.workload.rows())
    return world, world.workload.accounts()


def test_a_wrong_state_between_two_versions_is_told_with_workload_version_and_keys() -> None:
    world, accounts = bank()
    world.write({MOVE: {accounts[0]: b"95", accounts[1]: b"105"}})
    world.write({MOVE + 1: {accounts[1]: b"100"}, MOVE + 2: {accounts[2]: b"105"}})
    world.safe(LAST)
    assert world.judged() == 2
    txn_id = make_txn_id(BEGIN, MOVE + 1).hex()
    (told,) = world.texts
    assert told.startswith(f"I24 is broken (transaction {txn_id}): bank: at version {MOVE + 1}, ")
    assert told.endswith(f"which wrote {[accounts[1]]}: a total of 595, not 600")


def test_states_that_add_up_are_all_judged_in_silence() -> None:
    world, accounts = bank()
    world.write({MOVE: {accounts[0]: b"95", accounts[1]: b"105"}})
    world.write({MOVE + 1: {accounts[1]: b"100", accounts[2]: b"105"}})
    world.safe(LAST)
    assert world.judged() == 2
    assert world.texts == []


@pytest.mark.parametrize("behind", [2, 3])
def test_beyond_what_every_range_takes_for_safe_nothing_is_said(behind: int) -> None:
    """The other half of the transfer is not applied yet."""
    world, accounts = bank()
    world.write({MOVE: {accounts[0]: b"95"}})
    for group in (2, 3):
        world.safe(MOVE - 1 if group == behind else LAST, group)
    assert world.judged() == 0
    assert world.texts == []


def test_where_some_key_was_not_read_and_nothing_is_safe_nothing_is_said() -> None:
    world, accounts = bank()
    world.write({MOVE: {accounts[0]: b"95"}})
    assert world.judged() == 0
    world.read(accounts[:-1], MOVE)
    assert world.judged() == 0
    world.read(accounts, MOVE - 1)
    assert world.judged() == 0
    assert world.texts == []


def test_what_was_read_of_every_key_is_judged_though_no_range_takes_it_for_safe() -> None:
    world, accounts = bank()
    world.write({MOVE: {accounts[0]: b"95"}})
    world.read(accounts, MOVE)
    assert world.judged() == 1
    assert "a total of 595, not 600" in world.texts[0]


def test_rows_that_are_still_being_laid_out_are_no_state() -> None:
    world = World("bank")
    rows = world.workload.rows()
    world.lay(dict(list(rows.items())[:-1]))
    world.safe(LAST)
    assert world.judged() == 0
    assert world.texts == []


def test_what_is_collected_is_judged_as_it_was_written() -> None:
    world, accounts = bank()
    world.write({MOVE: {accounts[0]: b"95", accounts[1]: b"105"}})
    world.write({MOVE + 1: {accounts[0]: b"100", accounts[1]: b"100"}})
    world.ghost.oracle.collectable = LAST
    gone: Rows = {
        keycode.history_row(key, ts): None
        for at, key in enumerate(accounts[:2])
        for ts in (BEGIN + 1 + at, MOVE)
    }
    world.ghost.apply(gone, collected=LAST)
    world.safe(LAST)
    assert world.judged() == 2
    assert world.texts == []


def lists(world: World, *values: bytes) -> Versions:
    return {MOVE + n: {world.workload.key(0): value} for n, value in enumerate(values)}


def twins(world: World, *values: tuple[bytes, bytes]) -> Versions:
    one, two = world.workload.key(0, 1), world.workload.key(1, 1)
    return {MOVE + n: {one: a, two: b} for n, (a, b) in enumerate(values)}


def of_rows(world: World, *changes: Mapping[int, bytes]) -> Versions:
    keys = list(world.workload.rows())
    return {
        MOVE + n: {keys[at]: value for at, value in each.items()} for n, each in enumerate(changes)
    }


def slots(_world: World, *changes: Mapping[bytes, bytes | None]) -> Versions:
    return dict(enumerate(changes, MOVE))


ONE, TWO = b"+/skew/000/0/1", b"h/skew/000/1/2"  # of one group
CASES: Final[
    Mapping[str, tuple[Any, Sequence[Any], Any, str]]
] = {  # right ones, a wrong one, words
    "ring": (
        of_rows,
        [{0: b"2", 2: b"1", 1: b"3"}, {0: b"1", 1: b"2", 2: b"3"}],
        {0: b"2"},
        "a ring 0 -> 2 -> 3 -> 4 -> 5 -> 0 among 6",
    ),
    "list-append": (lists, [b" 1", b" 1 2a", b" 1 2a 3"], b" 1 2a4", "does not begin with 1 2a 3"),
    "counter": (twins, [(b"3", b"3"), (b"-1", b"-1")], (b"4", b"3"), "twins are 4 and 3"),
    "monotonic": (
        of_rows,
        [{1: b"1"}, {0: b"2"}, {1: b"3"}],
        {2: b"3"},
        "the highest number was 3, and is 3",
    ),
    "skew": (slots, [{ONE: b"1"}, {ONE: None}, {TWO: b"1"}], {ONE: b"2"}, "a group has 2 rows"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_promise_is_kept_by_right_versions_and_broken_by_a_wrong_one(name: str) -> None:
    versions, right, wrong, words = CASES[name]
    world = World(name)
    world.lay(world.workload.rows())
    found = versions(world, *right, wrong)
    last = max(found)
    world.write({ts: rows for ts, rows in found.items() if ts != last})
    world.safe(last - 1)
    assert world.judged() >= len(right)
    assert world.texts == []
    world.write({last: found[last]})
    world.safe(LAST)
    world.judged()
    (told,) = world.texts
    assert f"{name}: at version {last}, which wrote {[*found[last]]}: " in told
    assert words in told


STEPS: Final = Options(
    seconds=1.0, clients=2, ops=10, faults=False, workloads=("monotonic",)
)  # each reads all and writes one


def test_a_run_judges_every_state_that_its_clients_have_made() -> None:
    result = run(1, STEPS)
    assert result.problems == []
    (workload,) = result.workloads
    done = [op for op in workload.history.transactions if op.outcome is Outcome.OK and op.writes]
    assert result.states == len(done) > 1


def test_a_run_in_which_a_state_was_wrong_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The observers are handed a log in which one write has happened nowhere."""
    real = Observers.compare_states

    def doctored(self: Observers, workloads: Sequence[Workload]) -> None:
        chains = [self.transactions.versions[key] for key in workloads[0].rows()]
        del max(chains, key=len)[-2]
        real(self, workloads)

    monkeypatch.setattr(Observers, "compare_states", doctored)
    (problem,) = run(1, STEPS).problems
    assert "I24 is broken" in problem
    assert "monotonic: at version " in problem
