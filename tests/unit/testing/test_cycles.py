"""Claims of the cycle checkers: each anomaly is found in the smallest history that shows it and rightly named, and is not
in the same history repaired; what a serial executor records is clean; on tiny mutated histories the verdict is that of a
judge that tries every order (exactly for list-append and for rw-register by version; without versions no false alarm).
"""

from __future__ import annotations

import copy
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.testing.checkers import (
    Anomaly,
    BadHistory,
    check_list_append,
    check_rw_register,
    describe,
)
from kvstore.testing.checkers.cycles import EXPLANATIONS
from kvstore.testing.history import MicroTxn, Outcome
from tests.unit.testing.micro_histories import Executor, explained, mutate, parse

LISTS = [  # name, bad, repaired. A line: client begin..end steps; "?" after the time: unknown, "!": failed
    (
        "G0",
        [
            "a 1..9 append x 1; append y 1",
            "b 1..9 append x 2; append y 2",
            "c 2..9 r x 1,2; r y 2,1",
        ],
        [
            "a 1..9 append x 1; append y 1",
            "b 1..9 append x 2; append y 2",
            "c 2..9 r x 1,2; r y 1,2",
        ],
    ),
    (
        "G0",  # with an append that nobody read
        ["a 1..9 append x 1; append x 2", "b 1..9 append x 3", "c 2..9 r x 1,3"],
        ["a 1..9 append x 1; append x 2", "b 1..9 append x 3", "c 2..9 r x 1,2,3"],
    ),
    ("G1a", ["a 1..3! append x 1", "b 2..4 r x 1"], ["a 1..3? append x 1", "b 2..4 r x 1"]),
    (
        "G1b",
        ["a 1..3 append x 1; append x 2", "b 2..4 r x 1"],
        ["a 1..3 append x 1; append x 2", "b 2..4 r x 1,2"],
    ),
    (
        "G1c",
        ["a 1..3 append x 1; r y 1", "b 2..4 append y 1; r x 1"],
        ["a 1..3 append x 1; r y -", "b 2..4 append y 1; r x 1"],
    ),
    (
        "G-single",  # read skew
        ["a 1..3 append x 1; append y 1", "b 2..4 r x 1; r y -"],
        ["a 1..3 append x 1; append y 1", "b 2..4 r x 1; r y 1"],
    ),
    (
        "G-single",  # lost update, and the order of the two is known
        ["a 1..3 r x -; append x 1", "b 2..4 r x -; append x 2", "c 5..6 r x 1,2"],
        ["a 1..3 r x -; append x 1", "b 2..4 r x 1; append x 2", "c 5..6 r x 1,2"],
    ),
    (
        "lost-update",
        ["a 1..3 r x -; append x 1", "b 2..4 r x -; append x 2"],
        ["a 1..3 r x -; append x 1", "b 2..4 r x 1; append x 2"],
    ),
    (
        "G2-item",  # write skew
        ["a 1..3 r x -; append y 1", "b 2..4 r y -; append x 1"],
        ["a 1..3 r x -; append y 1", "b 2..4 r y 1; append x 1"],
    ),
    (
        "G2-item",  # long fork
        ["a 1..9 append x 1", "b 1..9 append y 1", "c 1..9 r x 1; r y -", "d 1..9 r x -; r y 1"],
        ["a 1..9 append x 1", "b 1..9 append y 1", "c 1..9 r x 1; r y -", "d 1..9 r x 1; r y 1"],
    ),
    (
        "G0-realtime",
        ["a 1..2 append x 1", "b 3..4 append x 2", "c 5..6 r x 2,1"],
        ["a 1..2 append x 1", "b 3..4 append x 2", "c 5..6 r x 1,2"],
    ),
    (
        "G0-process",
        ["a 1..2 append x 1", "a 3..4 append x 2", "c 5..6 r x 2,1"],
        ["a 1..2 append x 1", "a 3..4 append x 2", "c 5..6 r x 1,2"],
    ),
    (
        "G1c-realtime",
        ["a 1..2 r x 1", "b 3..4 append x 1"],
        ["a 1..4 r x 1", "b 3..4 append x 1"],
    ),
    (
        "G1c-process",
        ["a 1..2 r x 1", "a 3..4 append x 1"],
        ["a 1..2 r x -", "a 3..4 append x 1"],
    ),
    (
        "G-single-realtime",  # a stale read
        ["a 1..9 append x 1", "b 2..3 r x 1", "c 4..5 r x -"],
        ["a 1..9 append x 1", "b 2..5 r x 1", "c 4..5 r x -"],
    ),
    (
        "G-single-process",  # reads that are not monotonic
        ["a 1..9 append x 1", "b 2..3 r x 1", "b 4..5 r x -"],
        ["a 1..9 append x 1", "b 2..3 r x -", "b 4..5 r x 1"],
    ),
    (
        "G2-item-realtime",
        ["a 1..2 append y 1", "b 1..9 r y -; append x 1", "c 3..4 r x -"],
        ["a 1..2 append y 1", "b 1..9 r y 1; append x 1", "c 3..4 r x -"],
    ),
    (
        "G2-item-process",
        ["a 1..2 append y 1", "b 1..9 r y -; append x 1", "a 3..4 r x -"],
        ["a 1..2 append y 1", "b 1..9 r y 1; append x 1", "a 3..4 r x -"],
    ),
    ("internal", ["a 1..2 append x 1; r x -"], ["a 1..2 append x 1; r x 1"]),
    (
        "internal",
        ["a 1..2 r x -; r x 1", "b 1..2 append x 1"],
        ["a 1..2 r x 1; r x 1", "b 1..2 append x 1"],
    ),
    ("internal", ["a 1..2 r x 1; append x 1"], ["a 1..2 r x -; append x 1"]),
    ("garbage-read", ["a 1..2 append y 1; r x 7"], ["a 1..2 r x 7", "b 1..9? append x 7"]),
    (
        "duplicate-elements",
        ["a 1..2 append x 1", "b 3..4 r x 1,1"],
        ["a 1..2 append x 1", "b 3..4 r x 1"],
    ),
    (
        "duplicate-elements",  # of the reader's own
        ["a 1..2 append x 1; r x 1,1"],
        ["a 1..2 append x 1; r x 1"],
    ),
    (
        "incompatible-order",
        ["a 1..9 append x 1", "b 1..9 append x 2", "c 1..9 r x 1,2", "d 1..9 r x 2,1"],
        ["a 1..9 append x 1", "b 1..9 append x 2", "c 1..9 r x 1,2", "d 1..9 r x 1"],
    ),
    (
        "incompatible-order",  # with the transaction's own
        ["a 1..2 append x 1; append x 2", "b 1..2 append x 3", "c 1..2 r x 2,1,3"],
        ["a 1..2 append x 1; append x 2", "b 1..2 append x 3", "c 1..2 r x 1,2,3"],
    ),
    ("lost-append", ["a 1..2 append x 1", "b 3..4 r x -"], ["a 1..3 append x 1", "b 2..4 r x -"]),
    (
        "lost-append",  # half a transaction
        ["a 1..4 append x 1; append x 2", "b 1..4 r x 2"],
        ["a 1..4 append x 1; append x 2", "b 1..4 r x 1,2"],
    ),
]

REGISTERS = [
    (
        "G0",
        ["a 1..3 r x 2; w x 1", "b 2..4 r x 1; w x 2"],
        ["a 1..3 r x -; w x 1", "b 2..4 r x 1; w x 2"],
    ),
    ("G1a", ["a 1..3! w x 1", "b 2..4 r x 1"], ["a 1..3? w x 1", "b 2..4 r x 1"]),
    ("G1b", ["a 1..3 w x 1; w x 2", "b 2..4 r x 1"], ["a 1..3 w x 1; w x 2", "b 2..4 r x 2"]),
    (
        "G1c",
        ["a 1..3 w x 1; r y 1", "b 2..4 w y 1; r x 1"],
        ["a 1..3 w x 1; r y -", "b 2..4 w y 1; r x 1"],
    ),
    (
        "G-single",
        ["a 1..3 w x 1; w y 1", "b 2..4 r x 1; r y -"],
        ["a 1..3 w x 1; w y 1", "b 2..4 r x 1; r y 1"],
    ),
    (
        "lost-update",
        ["a 1..3 r x -; w x 1", "b 2..4 r x -; w x 2"],
        ["a 1..3 r x -; w x 1", "b 2..4 r x 1; w x 2"],
    ),
    (
        "G2-item",
        ["a 1..3 r x -; w y 1", "b 2..4 r y -; w x 1"],
        ["a 1..3 r x -; w y 1", "b 2..4 r y 1; w x 1"],
    ),
    (
        "G1c-realtime",
        ["a 1..2 r x 1", "b 3..4 w x 1"],
        ["a 1..4 r x 1", "b 3..4 w x 1"],
    ),
    (
        "G1c-process",
        ["a 1..2 r x 1", "a 3..4 w x 1"],
        ["a 1..2 r x -", "a 3..4 w x 1"],
    ),
    (
        "G-single-realtime",  # a stale read, by the order of the writes in time
        ["a 1..2 w x 1", "b 3..4 w x 2", "c 5..6 r x 1"],
        ["a 1..2 w x 1", "b 3..6 w x 2", "c 5..6 r x 1"],
    ),
    (
        "G-single-realtime",  # the same, by the order of a read and a write
        ["a 1..9? w x 1", "b 2..3 r x 1", "c 4..5 w x 2", "d 6..7 r x 1"],
        ["a 1..9? w x 1", "b 2..3 r x 1", "c 4..7 w x 2", "d 6..7 r x 1"],
    ),
    (
        "G-single-process",
        ["a 1..9 w x 1", "b 2..3 r x 1", "b 4..5 r x -"],
        ["a 1..9 w x 1", "b 2..3 r x -", "b 4..5 r x 1"],
    ),
    (
        "G2-item-realtime",
        ["a 1..2 w y 1", "b 1..9 r y -; w x 1", "c 3..4 r x -"],
        ["a 1..2 w y 1", "b 1..9 r y 1; w x 1", "c 3..4 r x -"],
    ),
    (
        "G2-item-process",
        ["a 1..2 w y 1", "b 1..9 r y -; w x 1", "a 3..4 r x -"],
        ["a 1..2 w y 1", "b 1..9 r y 1; w x 1", "a 3..4 r x -"],
    ),
    ("internal", ["a 1..2 w x 1; r x -"], ["a 1..2 w x 1; r x 1"]),
    ("garbage-read", ["a 1..2 r x 7"], ["a 1..2 r x 7", "b 1..9? w x 7"]),
]

VERSIONS = [  # "@" and the version, after the time
    (
        "G-single",  # lost update
        ["a 1..3@5 r x -; w x 1", "b 2..4@6 r x -; w x 2"],
        ["a 1..3@5 r x -; w x 1", "b 2..4@6 r x 1; w x 2"],
    ),
    (
        "G0-realtime",
        ["a 1..2@6 w x 1", "b 3..4@5 w x 2"],
        ["a 1..2@5 w x 1", "b 3..4@6 w x 2"],
    ),
    (
        "G0-process",
        ["a 1..2@6 w x 1", "a 3..4@5 w x 2"],
        ["a 1..2@5 w x 1", "a 3..4@6 w x 2"],
    ),
    (
        "G-single",  # a read of what was overwritten
        ["a 1..9@5 w x 1", "b 1..9@6 w x 2; w y 1", "c 1..9@7 r x 1; r y 1"],
        ["a 1..9@5 w x 1", "b 1..9@6 w x 2; w y 1", "c 1..9@7 r x 2; r y 1"],
    ),
    (
        "duplicate-version",
        ["a 1..3@5 w x 1", "b 2..4@5 w x 2"],
        ["a 1..3@5 w x 1", "b 2..4@6 w x 2"],
    ),
]


def by_version(txns: list[MicroTxn]) -> list[Anomaly]:
    return check_rw_register(txns, by_version=True)


CASES = [
    pytest.param(check, *case, id=f"{kind} {case[0]} {number}")
    for kind, check, cases in (
        ("list-append", check_list_append, LISTS),
        ("rw-register", check_rw_register, REGISTERS),
        ("by version", by_version, VERSIONS),
    )
    for number, case in enumerate(cases)
]


@pytest.mark.parametrize(("check", "name", "bad", "repaired"), CASES)
def test_an_anomaly_is_found_and_named_and_gone_when_repaired(check, name, bad, repaired) -> None:
    history = parse(bad)
    anomalies = check(history)
    assert [anomaly.name for anomaly in anomalies] == [name]
    assert not explained(history, by_version=check is by_version) or name == "duplicate-version"
    assert check(parse(repaired)) == []
    assert explained(parse(repaired), by_version=check is by_version)


@pytest.mark.parametrize(("check", "name", "bad", "repaired"), CASES)
def test_the_cycle_of_an_anomaly_is_one(check, name, bad, repaired) -> None:
    for anomaly in check(parse(bad)):
        assert bool(anomaly.edges) == name.startswith(("G0", "G1c", "G-", "G2", "lost-update"))
        for edge, following in zip(
            anomaly.edges, (*anomaly.edges[1:], *anomaly.edges[:1]), strict=True
        ):
            assert edge.target == following.source
            assert edge.source != edge.target
            assert (edge.key is None) == (edge.kind in {"process", "realtime"})
        assert [edge.source for edge in anomaly.edges] == list(anomaly.numbers) * bool(
            anomaly.edges
        )


def test_an_anomaly_is_explained_in_words() -> None:
    history = parse(["a 1..9 append x 1; append \\xff 3", "b 2..3 r x 1", "c 4..5 r x -"])
    (anomaly,) = check_list_append(history)
    assert describe(anomaly).splitlines() == [
        f"G-single-realtime: {EXPLANATIONS['G-single']}, given the order in which they began and ended",
        "  T1 by a at 1..9 (ok): append 'x' 1, append '\\xff' 3",
        "  T2 by b at 2..3 (ok): r 'x' [1]",
        "  T3 by c at 4..5 (ok): r 'x' []",
        "  T1 -wr-> T2: T1 appended 1 to 'x', and T2 read [1]",
        "  T2 -realtime-> T3: T2 ended at 3, before T3 began at 4",
        "  T3 -rw-> T1: T3 read 'x' as [], to which T1 appended 1",
    ]


def test_the_end_of_a_long_list_is_shown() -> None:
    history = [MicroTxn("a", n, [("append", b"x", n)], 0, n, Outcome.OK) for n in range(1, 31)]
    history.append(MicroTxn("b", 40, [("r", b"x", list(range(1, 29)))], 0, 41, Outcome.OK))
    (anomaly,) = check_list_append(history)
    assert "read [(18 more), 19, 20, 21, 22, 23, 24, 25, 26, 27, 28]; no" in anomaly.explanation


@pytest.mark.parametrize(
    ("check", "lines", "what"),
    [
        (check_list_append, ["a 1..2 append x 1", "b 3..4 append x 1"], "by T1 and T2; it must be"),
        (check_list_append, ["a 1..2 append x 1; append x 1"], "1 is appended to 'x' by T1 and T1"),
        (check_list_append, ["a 1..2 w x 1"], "T1: 'w' 'x' 1 is no step of list-append"),
        (check_rw_register, ["a 1..2 w x 1", "b 3..4! w x 1"], "1 is written to 'x' by T1 and T2"),
        (check_rw_register, ["a 1..2 append x 1"], "T1: 'append' 'x' 1 is no step of rw-register"),
        (check_rw_register, ["a 1..2 r x 1,2"], "T1: 'r' 'x' [1, 2] is no step of rw-register"),
    ],
)
def test_a_history_that_cannot_be_judged_is_refused(check, lines, what) -> None:
    with pytest.raises(BadHistory) as caught:
        check(parse(lines))
    assert what in str(caught.value)


def test_an_unknown_transaction_whose_append_was_read_counts_with_all_its_steps() -> None:
    half = parse(["a 1..2? append x 1; append y 1", "b 3..4 r x 1; r y -"])
    assert [anomaly.name for anomaly in check_list_append(half)] == ["G-single"]
    assert check_list_append(parse(["a 1..2? append x 1; append y 1", "b 3..4 r x -; r y -"])) == []


def test_unknown_transactions_that_lead_to_each_other_count() -> None:
    """T1 is known only through T2's read, and T2 only through T3's."""
    lines = ["a 1..2? append x 1; append z 1", "b 1..2? r x 1; append y 1", "c 3..4 r y 1; r z -"]
    assert [anomaly.name for anomaly in check_list_append(parse(lines))] == ["G-single"]
    lines = [line.replace("append", "w") for line in lines]
    assert [anomaly.name for anomaly in check_rw_register(parse(lines))] == ["G-single"]


def test_at_one_instant_nothing_is_before_anything() -> None:
    assert check_rw_register(parse(["a 1..2 w x 1", "b 2..4 w x 2", "c 5..6 r x 1"])) == []
    assert check_list_append(parse(["a 1..2 append x 1", "b 2..4 r x -"])) == []


def test_each_knot_is_explained_once() -> None:
    lines = []
    for number in range(3):
        x, y = f"x{number}", f"y{number}"
        lines += [f"a{number} 1..9 append {x} 1; append {y} 1", f"b{number} 1..9 r {x} 1; r {y} -"]
    assert [anomaly.name for anomaly in check_list_append(parse(lines))] == ["G-single"] * 3


LIST_CHECKS = ((check_list_append, False),)
REGISTER_CHECKS = ((check_rw_register, False), (by_version, True))


@given(st.randoms(use_true_random=False), st.booleans(), st.integers(0, 40))
def test_what_a_serial_executor_records_is_clean(
    rng: random.Random, lists: bool, count: int
) -> None:
    history = Executor(rng, lists=lists, clients=5, keys=3).run(count)
    untouched = copy.deepcopy(history)
    for check, _ in LIST_CHECKS if lists else REGISTER_CHECKS:
        assert check(history) == []
    assert history == untouched


def compare(seeds: range) -> dict[str, int]:
    """Mutated histories of five transactions, judged twice. Returns how often each was found, and missed."""
    seen = {"good": 0, "bad": 0, "missed": 0}
    for seed in seeds:
        lists = bool(seed % 2)
        rng = random.Random(f"cycles/{seed}")
        history = Executor(rng, lists=lists, clients=rng.randint(1, 4), keys=rng.randint(1, 3)).run(
            5
        )
        for _ in range(rng.randint(1, 2)):
            mutate(rng, history, lists=lists)
        wrote = [txn for txn in history if any(what == "w" for what, _, _ in txn.steps)]
        for check, versions in LIST_CHECKS if lists else REGISTER_CHECKS:
            anomalies = check(history)
            good = explained(history, by_version=versions)
            exact = lists or (versions and all(txn.version for txn in wrote))
            seen["good" if good else "bad"] += 1
            if good:
                assert anomalies == [], f"seed {seed}: a false alarm"
            elif not anomalies:
                assert not exact, f"seed {seed}: not found"
                seen["missed"] += 1
    return seen


def test_the_verdict_is_that_of_trying_every_order() -> None:
    seen = compare(range(600))
    assert seen["good"] > 300
    assert seen["bad"] > 200
    assert seen["missed"] < 10  # of rw-register without versions


@pytest.mark.slow
def test_the_verdict_is_that_of_trying_every_order_many_times() -> None:
    seen = compare(range(600, 60_000))
    assert seen["missed"] < seen["bad"] // 50


@pytest.mark.parametrize("lists", [True, False])
def test_the_same_history_is_judged_the_same(lists: bool) -> None:
    rng = random.Random(5)
    history = Executor(rng, lists=lists, clients=6, keys=4).run(300)
    for _ in range(20):
        mutate(rng, history, lists=lists)
    check = check_list_append if lists else check_rw_register
    first, second = check(history), check(copy.deepcopy(history))
    assert first == second
    assert first


@pytest.mark.parametrize("lists", [True, False])
def test_one_mistake_among_thousands_of_transactions_is_found(lists: bool) -> None:
    history = Executor(random.Random(6), lists=lists, clients=20, keys=200).run(3_000)
    check = check_list_append if lists else by_version
    assert check(history) == []
    start = max(txn.begin for txn in history) + 10_000
    late = [
        MicroTxn("late", start, [("append" if lists else "w", b"new", 1)], 0, start + 1, Outcome.OK)
    ]
    late.append(
        MicroTxn(
            "later", start + 2, [("r", b"new", [] if lists else None)], 0, start + 3, Outcome.OK
        )
    )
    names = ["lost-append"] if lists else ["G-single-realtime"]
    assert [anomaly.name for anomaly in check(history + late)] == names
