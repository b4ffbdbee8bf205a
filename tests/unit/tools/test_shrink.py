"""Claims of the shrinker: what is irrelevant goes, what is needed stays, another failure does not count, limits hold."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.sim.core import NEVER
from kvstore.sim.scenario import Options
from tools.simulation.judging import Verdict
from tools.simulation.shrink import Shrinker, Shrunk, ddmin, describe

FAULTS = 40


class FakeRun:
    """A run that fails as `kind` if the faults and operations that it needs are kept, and as another if none of them is.

    Fault number n happens at second n / 2, but for the first `idle` ones, which find nobody to harm.
    """

    def __init__(
        self,
        faults: frozenset[int],
        ops: frozenset[tuple[int, int]] = frozenset(),
        *,
        clients_min: int = 1,
        heeds: bool = True,
        idle: int = 0,
    ) -> None:
        self.faults, self.ops, self.clients_min = faults, ops, clients_min
        self.heeds, self.idle = heeds, idle
        self.runs = 0

    def __call__(self, options: Options) -> Verdict:
        self.runs += 1
        drawn = range(self.idle, FAULTS) if options.faults else range(0)
        begun = [n for n in drawn if n / 2 < options.seconds]
        done = [(c, n) for c in range(options.clients) for n in range(options.ops)]
        if self.heeds and options.faults_kept is not None:
            begun = [n for n in begun if n in options.faults_kept]
        if self.heeds and options.ops_kept is not None:
            done = [op for op in done if op in options.ops_kept]
        if not begun:
            problems = ["for 60 s in peace the clients do not finish"]
        elif (
            self.faults.issubset(begun)
            and self.ops.issubset(done)
            and options.clients >= self.clients_min
        ):
            problems = ["at 1003.5: V2: n1 applies entry 7 of range 2 in term 3, not as others"]
        else:
            problems = []
        faults = {"crash": len(begun)} if begun else {}
        return Verdict(
            1,
            problems,
            seconds=30.0,
            operations=len(done),
            faults=faults,
            fault_numbers=tuple(begun),
        )


def shrunk(run: FakeRun, **limits: float) -> Shrunk:
    options = Options()
    changes: dict[str, float] = {"runs_max": 2_000, "seconds_max": 60.0, **limits}
    return Shrinker(run, options, run(options), **changes).shrink()  # type: ignore[arg-type]


def test_the_two_faults_and_the_operation_that_matter_are_found_among_many() -> None:
    found = shrunk(FakeRun(frozenset({7, 19}), frozenset({(2, 13)}), clients_min=3))
    assert found.is_minimal
    assert found.options.faults_kept == frozenset({7, 19})
    assert found.options.ops_kept == frozenset({(2, 13)})
    assert found.options.clients == 3
    assert 14 <= found.options.ops < 20
    assert 9.5 < found.options.seconds <= 15.0
    assert found.verdict.kind == "V2"


def test_another_failure_does_not_count() -> None:
    """Without any fault the fake fails, too, but of something else."""
    found = shrunk(FakeRun(frozenset({3})))
    assert found.options.faults
    assert found.options.faults_kept == frozenset({3})


def test_a_failure_without_faults_is_shrunk_to_a_calm_run() -> None:
    def fails(options: Options) -> Verdict:
        return Verdict(1, ["V4: the oracle"], operations=options.clients * options.ops)

    found = Shrinker(fails, Options(), fails(Options())).shrink()
    assert not found.options.faults
    assert (found.options.clients, found.options.ops) == (1, 1)


def test_a_scenario_that_does_not_heed_the_fields_is_not_said_to_need_nothing() -> None:
    found = shrunk(FakeRun(frozenset({7}), heeds=False))
    assert not found.is_minimal
    assert found.options.faults_kept is None
    assert found.options.ops_kept is None


def test_numbers_of_faults_that_found_nobody_do_not_hide_those_that_did() -> None:
    """Every draw has a number, so the numbers go beyond the count of what happened."""
    found = shrunk(FakeRun(frozenset({30, 37}), idle=25))
    assert found.options.faults_kept == frozenset({30, 37})
    assert found.is_minimal


def test_what_fails_with_faults_that_nobody_has_counted_is_not_minimal() -> None:
    """Its process died, say, and could not tell them."""

    def dies(options: Options) -> Verdict:
        return Verdict(1, ["died: by a signal"] if options.faults else [])

    found = Shrinker(dies, Options(), dies(Options())).shrink()
    assert found.options.faults_kept is None
    assert not found.is_minimal


def test_no_run_is_played_twice() -> None:
    run = FakeRun(frozenset({7, 19}), frozenset({(2, 13)}))
    played: list[Options] = []

    def noted(options: Options) -> Verdict:
        played.append(options)
        return run(options)

    assert Shrinker(noted, Options(), run(Options()), runs_max=2_000).shrink().is_minimal
    assert [each for n, each in enumerate(played) if each in played[:n]] == []


def test_what_fails_without_any_of_them_needs_none() -> None:
    """Here the operations do not matter."""
    run = FakeRun(frozenset({7}))
    found = shrunk(run)
    assert found.options.ops_kept == frozenset()


def test_a_limit_does_not_make_a_scenario_one_that_heeds_nothing() -> None:
    whole = FakeRun(frozenset({7, 19}), frozenset({(2, 13)}))
    runs = shrunk(whole).runs
    for runs_max in range(runs):
        run = FakeRun(frozenset({7, 19}), frozenset({(2, 13)}))
        told: list[str] = []
        Shrinker(run, Options(), run(Options()), runs_max=runs_max, tell=told.append).shrink()
        assert not any("left out" in each for each in told)


def test_runs_are_limited_and_the_result_says_so() -> None:
    run = FakeRun(frozenset({7, 19}), frozenset({(2, 13)}))
    found = shrunk(run, runs_max=12)
    assert not found.is_minimal
    assert found.runs == 12
    assert run.runs == 13
    assert found.verdict.kind == "V2"


def test_time_is_limited() -> None:
    run = FakeRun(frozenset({7}))
    assert shrunk(run, seconds_max=-1.0).runs == 0


def test_kinds_of_faults_that_do_not_matter_go() -> None:
    def play(options: Options) -> Verdict:
        kinds = options.kinds or ("clog", "crash", "drift", "flush", "pause")
        problems = ["V1: two leaders"] if options.faults and {"crash", "flush"} <= {*kinds} else []
        return Verdict(1, problems, faults=dict.fromkeys(kinds, 1), fault_numbers=(1,))

    found = Shrinker(play, Options(), play(Options())).shrink()
    assert set(found.options.kinds) == {"crash", "flush"}


def test_workloads_that_do_not_matter_go() -> None:
    def play(options: Options) -> Verdict:
        names = options.workloads or ("bank", "registers", "ring", "skew")
        return Verdict(1, ["V1: two leaders"] if "ring" in names else [], workloads=names)

    found = Shrinker(play, Options(), play(Options())).shrink()
    assert found.options.workloads == ("ring",)
    assert describe(found.options, found.verdict).startswith(
        "0 faults, 0 operations of 1 client (ring), "
    )


def test_seconds_are_numbers_that_people_can_read() -> None:
    def play(options: Options) -> Verdict:
        return Verdict(1, ["V1: late"] if options.seconds > 1.3 else ["V2: early"])

    found = Shrinker(play, Options(seconds=20.0), play(Options(seconds=20.0))).shrink()
    assert 1.3 < found.options.seconds < 2.0
    assert len(f"{found.options.seconds:g}") <= 4


def minimal_for(needed: frozenset[int]) -> Callable[[tuple[int, ...]], bool]:
    return needed.issubset


@given(st.integers(0, 60), st.randoms(use_true_random=False))
def test_ddmin_finds_exactly_what_is_needed(size: int, rng: random.Random) -> None:
    items = range(size)
    needed = frozenset(rng.sample(items, rng.randint(0, min(size, 5))))
    assert ddmin(items, minimal_for(needed)) == tuple(sorted(needed))


@given(st.integers(1, 30), st.integers(1, 5), st.integers(2, 7))
def test_what_ddmin_leaves_is_one_minimal(size: int, modulus: int, least: int) -> None:
    """A condition that is not monotone: so many of one residue, and an even number of all."""

    def fails(kept: tuple[int, ...]) -> bool:
        return len([each for each in kept if each % modulus == 0]) >= least and len(kept) % 2 == 0

    if fails(tuple(range(size))):
        left = ddmin(range(size), fails)
        assert fails(left)
        assert not any(fails(left[:n] + left[n + 1 :]) for n in range(len(left)))


def test_ddmin_asks_few_questions_when_one_thing_matters_among_a_thousand() -> None:
    asked = 0

    def fails(kept: tuple[int, ...]) -> bool:
        nonlocal asked
        asked += 1
        return 700 in kept

    assert ddmin(range(1_000), fails) == (700,)
    assert asked < 40


@pytest.mark.parametrize("change", [{"clients": 1}, {"ops": 1}, {"seconds": 0.25}])
def test_what_is_smallest_already_stays(change: dict[str, int]) -> None:
    def play(options: Options) -> Verdict:
        return Verdict(1, ["V9: always"], operations=1)

    options = replace(Options(clients=1, ops=1, seconds=0.25), **change)  # type: ignore[arg-type]
    found = Shrinker(play, options, play(options)).shrink()
    assert (found.options.clients, found.options.ops) == (1, 1)


@pytest.mark.parametrize("matters", [False, True])
def test_a_frozen_minority_is_left_out_unless_it_matters(matters: bool) -> None:
    def play(options: Options) -> Verdict:
        frozen = "down" if options.faults and options.frozen != NEVER else ""
        problems = ["V2: broken"] if options.faults and (frozen or not matters) else []
        kept = (1, 2, 3) if options.faults_kept is None else tuple(sorted(options.faults_kept))
        operations, faults = options.clients * options.ops, {"crash": len(kept)}
        return Verdict(
            1, problems, operations=operations, faults=faults, fault_numbers=kept, frozen=frozen
        )

    found = Shrinker(play, Options(), play(Options())).shrink()
    assert found.options.faults
    assert found.options.frozen == ("" if matters else NEVER)
    assert found.options.faults_kept == frozenset()
