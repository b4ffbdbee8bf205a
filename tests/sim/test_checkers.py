"""Claims of the judges (kvstore.testing.checkers): good histories pass, and each kind of bad one is caught."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest

from kvstore.testing.checkers import (
    CheckTooLong,
    check_registers,
    check_totals,
    check_transactions,
    check_versions,
    check_write_order,
    linearizable,
    registers,
)
from kvstore.testing.history import FOREVER, Outcome, RegisterOp, TxnOp

KEY = b"k"
UNKNOWN = Outcome.UNKNOWN


def put(begin: int, end: int, value: bytes | None, version: int = 0) -> RegisterOp:
    return RegisterOp("c", "put", KEY, begin, value, version=version, end=end, outcome=Outcome.OK)


def get(begin: int, end: int, value: bytes | None, version: int = 0) -> RegisterOp:
    return RegisterOp("c", "get", KEY, begin, value, version=version, end=end, outcome=Outcome.OK)


def cas(begin: int, end: int, old: bytes | None, new: bytes, swapped: bool = True) -> RegisterOp:
    return RegisterOp("c", "cas", KEY, begin, new, old, swapped, end=end, outcome=Outcome.OK)


def unknown(op: RegisterOp) -> RegisterOp:
    op.end, op.outcome, op.version = FOREVER, UNKNOWN, 0
    return op


def failed(op: RegisterOp) -> RegisterOp:
    op.outcome = Outcome.FAILED
    return op


@pytest.mark.parametrize(
    "history",
    [
        [],
        [get(1, 2, None)],
        [put(1, 2, b"a"), get(3, 4, b"a")],
        [put(1, 2, b"a", 9), get(3, 4, b"a")],  # a read need not tell its version
        [put(1, 4, b"a"), get(2, 3, b"a")],
        [put(1, 4, b"a"), get(2, 3, None)],
        [put(1, 6, b"a"), put(2, 5, b"b"), get(7, 8, b"a")],
        [put(1, 2, b"a"), put(3, 4, None), get(5, 6, None)],
        [put(1, 2, b"a"), cas(3, 4, b"a", b"b"), get(5, 6, b"b")],
        [put(1, 2, b"a"), cas(3, 4, b"x", b"b", swapped=False), get(5, 6, b"a")],
        [unknown(put(1, 2, b"a")), get(3, 4, None), get(5, 6, b"a")],
        [unknown(put(1, 2, b"a")), get(3, 4, b"a"), get(5, 6, b"a")],
        [unknown(cas(1, 2, None, b"a")), put(3, 4, b"b"), get(5, 6, b"b")],
        [failed(put(1, 2, b"a")), get(3, 4, None)],
    ],
)
def test_a_history_that_one_register_explains_passes(history: list[RegisterOp]) -> None:
    assert linearizable(history)
    assert check_registers(history) == []


@pytest.mark.parametrize(
    "history",
    [
        pytest.param([put(1, 2, b"a"), get(3, 4, None)], id="stale read"),
        pytest.param([put(1, 2, b"a"), put(3, 4, b"b"), get(5, 6, b"a")], id="old value"),
        pytest.param([put(1, 6, b"a"), get(2, 3, b"a"), get(4, 5, None)], id="new, then old"),
        pytest.param([get(1, 2, b"a"), put(3, 4, b"a")], id="read of the future"),
        pytest.param([get(1, 2, b"a")], id="read of nothing"),
        pytest.param([failed(put(1, 2, b"a")), get(3, 4, b"a")], id="aborted read"),
        pytest.param(
            [put(1, 2, b"a"), cas(3, 6, b"a", b"b"), cas(4, 5, b"a", b"c")], id="lost update"
        ),
        pytest.param(
            [put(1, 2, b"a"), cas(3, 4, b"a", b"b", swapped=False)], id="refused for nothing"
        ),
        pytest.param(
            [unknown(put(1, 2, b"a")), get(3, 4, b"a"), get(5, 6, None)], id="unknown, then undone"
        ),
    ],
)
def test_a_history_that_no_register_explains_is_caught(history: list[RegisterOp]) -> None:
    assert not linearizable(history)
    assert check_registers(history)


@pytest.mark.parametrize(
    ("history", "what"),
    [
        ([put(1, 2, b"a", 9), put(3, 4, b"b", 8)], "but 9 was seen"),
        ([put(1, 2, b"a", 9), put(3, 4, b"b", 9)], "but 9 was seen"),
        ([put(1, 2, b"a", 9), get(3, 4, b"z", 8)], "nobody wrote"),
        ([put(1, 2, b"a", 9), get(3, 4, b"a", 8)], "has versions"),
        ([put(1, 6, b"a", 9), put(2, 3, b"b", 5), get(4, 5, b"a", 5)], "has versions"),
        ([get(1, 2, b"a", 9), get(3, 4, b"b", 8), put(0, 5, b"a"), put(0, 5, b"b")], "was seen"),
    ],
)
def test_versions_that_do_not_fit_are_caught(history: list[RegisterOp], what: str) -> None:
    assert what in "; ".join(check_versions(history))


@pytest.mark.parametrize(
    "history",
    [
        pytest.param([put(1, 2, b"a"), get(3, 4, b"a"), put(5, 6, b"a")], id="written again"),
        pytest.param(
            [put(1, 2, b"a"), failed(put(3, 4, b"a")), get(5, 6, b"a")],
            id="refused the second time",
        ),
        pytest.param(
            [put(1, 2, b"a", 5), put(3, 4, b"b", 6), put(5, 6, b"a", 7), get(7, 8, b"a", 7)],
            id="another between",
        ),
        pytest.param(
            [put(1, 2, b"a"), get(3, 4, b"a"), cas(5, 6, b"x", b"a", swapped=False)],
            id="not swapped later",
        ),
    ],
)
def test_a_value_may_be_written_more_than_once(history: list[RegisterOp]) -> None:
    assert linearizable(history)
    assert check_registers(history) == []


@pytest.mark.parametrize(
    ("history", "what"),
    [
        ([failed(put(1, 2, b"a")), failed(put(3, 4, b"a")), get(5, 6, b"a")], "has failed"),
        ([failed(put(1, 2, b"a")), get(3, 4, b"a"), put(5, 6, b"a")], "before it was written"),
        ([put(1, 2, b"a", 5), put(3, 4, b"a", 7), get(5, 6, b"a", 9)], "has versions 5, 7, 9"),
        ([cas(1, 2, b"x", b"a", swapped=False), get(3, 4, b"a")], "nobody wrote"),
    ],
)
def test_none_of_several_writes_explains_a_read(history: list[RegisterOp], what: str) -> None:
    assert what in "; ".join(check_versions(history))


def never_seen(key: bytes) -> list[RegisterOp]:
    """More orders than a search of a few configurations tries."""
    history = [unknown(put(1, 2, b"unseen/%d" % number)) for number in range(20)]
    history += [put(100, 101, b"a", 5), put(102, 103, b"b", 6)]
    for op in history:
        op.key = key
    return history


def test_a_search_that_is_given_up_hides_nothing_that_was_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither what versions show, nor what the search shows of another key."""
    monkeypatch.setattr(registers, "CONFIGURATIONS_MAX", 100)
    stale = [get(104, 105, b"a", 5)]
    wrong = check_registers([*never_seen(KEY), *stale])
    assert "b'k': get of c at 104..105 has version 5, but 6 was seen before it began" in wrong
    assert wrong[-1].startswith("Undecided: b'k': ")
    lost = [put(1, 2, b"a"), get(3, 4, None)]
    wrong = check_registers([*never_seen(b"a key before"), get(104, 105, b"c"), *lost])
    assert any("b'k': no order" in each for each in wrong)


def test_a_search_that_is_given_up_is_told_if_nothing_was_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registers, "CONFIGURATIONS_MAX", 100)
    read = get(104, 105, b"b", 6)
    read.key = b"z"
    impossible = cas(106, 107, b"nobody's", b"c")
    impossible.key = b"z"
    with pytest.raises(CheckTooLong, match="b'z': more than 100"):
        check_registers([*never_seen(b"z"), read, impossible])


def test_a_write_of_another_key_with_a_lower_version_is_caught() -> None:
    first, second = put(1, 2, b"a", 9), put(3, 4, b"b", 8)
    second.key = b"other"
    assert check_write_order([first, second])


def test_the_search_agrees_with_trying_every_order() -> None:
    """Hundreds of tiny random histories, against a judge that tries all permutations."""
    rng = random.Random(4)
    verdicts = {True: 0, False: 0}
    for _ in range(400):
        history = random_history(rng)
        expected = by_permutation(history)
        assert linearizable(history) == expected
        verdicts[expected] += 1
    assert min(verdicts.values()) > 50


class Watched(RegisterOp):
    """Counts how often the search looks at it."""

    looks = 0

    def __getattribute__(self, name: str) -> Any:
        if name == "begin":
            Watched.looks += 1
        return super().__getattribute__(name)


def test_the_search_through_a_long_history_of_one_key_looks_at_what_is_near_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neighbours overlap, and now and then a write stays unknown: one that was never seen, and one that was."""
    monkeypatch.setattr(Watched, "looks", 0)
    rounds = 300
    history: list[RegisterOp] = []
    for number in range(rounds):
        at, value = 100 * number, b"%d" % number
        history += [put(at, at + 50, value), get(at + 40, at + 110, value)]
    for number in (10, 150):
        history.append(unknown(put(100 * number + 60, 0, b"never seen")))
        history.append(unknown(put(100 * number + 61, 0, b"seen/%d" % number)))
        history.append(get(100 * number + 70, 100 * number + 90, b"seen/%d" % number))
    watched = [Watched(**vars(op)) for op in history]
    assert linearizable(watched)
    assert Watched.looks < 20 * len(watched)
    watched.append(Watched(**vars(get(100 * rounds, 100 * rounds + 1, b"0"))))
    assert not linearizable(watched)


def random_history(rng: random.Random) -> list[RegisterOp]:
    instants = list(range(10))
    rng.shuffle(instants)
    history = []
    for _ in range(5):
        begin, end = sorted((instants.pop(), instants.pop()))
        kind, value = rng.choice("pgc"), rng.choice((b"a", b"b"))
        if kind == "p":
            op = put(begin, end, value)
        elif kind == "g":
            op = get(begin, end, rng.choice((None, b"a", b"b")))
        else:
            op = cas(begin, end, rng.choice((None, b"a")), value, rng.random() < 0.5)
        if kind != "g" and rng.random() < 0.3:
            op = unknown(op)
        history.append(op)
    return history


def by_permutation(history: list[RegisterOp]) -> bool:
    sure = [op for op in history if op.outcome is Outcome.OK]
    unsure = [op for op in history if op.outcome is not Outcome.OK]
    for size in range(len(unsure) + 1):
        for more in itertools.combinations(unsure, size):
            for order in itertools.permutations([*sure, *more]):
                if in_time(order) and explained(order):
                    return True
    return False


def in_time(order: tuple[RegisterOp, ...]) -> bool:
    return all(b.end > a.begin for a, b in itertools.combinations(order, 2))


def explained(order: tuple[RegisterOp, ...]) -> bool:
    value: bytes | None = None
    for op in order:
        if op.kind == "get":
            if op.value != value:
                return False
        elif op.kind == "cas":
            swapped = op.swapped if op.outcome is Outcome.OK else True
            if swapped != (value == op.expected):
                return False
            value = op.value if swapped else value
        else:
            value = op.value
    return True


# ---------------------------------------------------------------- transactions


def txn(
    begin: int,
    end: int,
    version: int,
    reads: dict[bytes, bytes | None],
    writes: dict[bytes, bytes | None] | None = None,
    outcome: Outcome = Outcome.OK,
) -> TxnOp:
    name = f"t{begin}".encode()
    return TxnOp("c", name, begin, reads, writes or {}, version, end, outcome)


ZERO: dict[bytes, bytes | None] = {b"x": b"0", b"y": b"0"}


def test_a_serial_history_passes() -> None:
    history = [
        txn(1, 2, 5, {b"x": b"0"}, {b"x": b"1"}),
        txn(3, 4, 7, {b"x": b"1", b"y": b"0"}, {b"y": b"2"}),
        txn(5, 6, 7, {b"x": b"1", b"y": b"2"}),
    ]
    assert check_transactions(ZERO, history, {b"x": b"1", b"y": b"2"}) == []


def test_an_unknown_transaction_counts_exactly_if_its_marker_stands() -> None:
    there = txn(1, FOREVER, 0, {}, {b"x": b"1"}, Outcome.UNKNOWN)
    assert check_transactions(ZERO, [there], {b"x": b"1"}, {b"t1": 5}) == []
    assert check_transactions(ZERO, [there], {b"x": b"0"}, {}) == []
    assert check_transactions(ZERO, [there], {b"x": b"1"}, {})


def test_what_was_recorded_stays_as_it_is() -> None:
    """It may be written to a file after it was judged."""
    unknown = txn(1, FOREVER, 0, {}, {b"x": b"1"}, Outcome.UNKNOWN)
    failed = txn(2, 3, 0, {}, {b"x": b"2"}, Outcome.FAILED)
    history = [unknown, failed]
    before = [replace(op) for op in history]
    check_transactions(ZERO, history, {b"x": b"2"}, {b"t1": 5, b"t2": 6})
    assert history == before


def test_without_markers_a_read_of_what_an_unknown_transaction_wrote_is_believed() -> None:
    lost = txn(1, FOREVER, 0, {}, {b"x": b"1"}, Outcome.UNKNOWN)
    before, after = txn(2, 3, 4, {b"x": b"0"}), txn(4, 5, 6, {b"x": b"1"})
    assert check_transactions(ZERO, [lost, before, after], {b"x": b"1"}) == []
    assert check_transactions(ZERO, [lost, before], {b"x": b"0"}) == []
    undone = txn(6, 7, 7, {b"x": b"0"})
    assert "read b'x' = b'0'" in check_transactions(ZERO, [lost, before, after, undone])[0]


def test_the_version_of_an_acknowledged_transaction_need_not_be_known() -> None:
    """Its marker tells it; without one, a read of what it wrote is believed."""
    done, after = txn(1, 2, 0, {}, {b"x": b"1"}), txn(3, 4, 7, {b"x": b"1"})
    for markers in ({b"t1": 5}, None):
        history = [replace(done), replace(after)]
        assert check_transactions(ZERO, history, {b"x": b"1"}, markers) == []
    assert "is lost" in check_transactions(ZERO, [replace(done)], None, {})[0]
    stale = txn(3, 4, 7, {b"x": b"0"})
    assert "read b'x' = b'0'" in check_transactions(ZERO, [done, stale], None, {b"t1": 5})[0]


@pytest.mark.parametrize(
    ("history", "what"),
    [
        pytest.param(
            [txn(1, 4, 5, {b"x": b"0"}, {b"x": b"1"}), txn(2, 3, 6, {b"x": b"0"}, {b"x": b"2"})],
            "read b'x'",
            id="lost update",
        ),
        pytest.param(
            [txn(1, 4, 5, {b"x": b"0"}, {b"y": b"1"}), txn(2, 3, 6, {b"y": b"0"}, {b"x": b"1"})],
            "read b'y'",
            id="write skew",
        ),
        pytest.param(
            [txn(1, 2, 5, {}, {b"x": b"1", b"y": b"1"}), txn(3, 4, 6, {b"x": b"1", b"y": b"0"})],
            "read b'y'",
            id="half a transaction",
        ),
        pytest.param(
            [txn(1, 2, 5, {}, {b"x": b"1"}), txn(3, 4, 4, {b"x": b"0"})],
            "began after version 5",
            id="stale snapshot",
        ),
        pytest.param(
            [txn(1, 2, 9, {}, {b"x": b"1"}), txn(3, 4, 8, {}, {b"y": b"1"})],
            "began after version 9",
            id="causal reverse",
        ),
        pytest.param(
            [txn(1, 2, 9, {}, {b"x": b"1"}), txn(1, 2, 9, {}, {b"y": b"1"})],
            "have one version",
            id="one version twice",
        ),
    ],
)
def test_a_history_that_is_not_strictly_serializable_is_caught(
    history: list[TxnOp], what: str
) -> None:
    assert what in "; ".join(check_transactions(ZERO, history))


# ---------------------------------------------------------------- readers that do not tell their version

WRITES = [
    txn(10, 20, 5, {}, {b"x": b"1", b"y": b"1"}),
    txn(30, 40, 7, {}, {b"x": b"2"}),
    txn(50, 60, 9, {}, {b"y": b"2"}),
]


@pytest.mark.parametrize(
    "readers",
    [
        pytest.param([txn(1, 2, 0, {b"x": b"0", b"y": b"0"})], id="before all"),
        pytest.param([txn(41, 42, 0, {b"x": b"2", b"y": b"1"})], id="between"),
        pytest.param([txn(70, 71, 0, {b"x": b"2", b"y": b"2"})], id="after all"),
        pytest.param([txn(11, 55, 0, {b"x": b"1", b"y": b"1"})], id="any of several"),
        pytest.param([txn(20, 30, 0, {b"x": b"2"})], id="at the instant of an end and a begin"),
        pytest.param(
            [txn(11, 31, 0, {b"x": b"1"}), txn(32, 33, 0, {b"x": b"2"})],
            id="each later than the other",
        ),
        pytest.param([txn(11, 55, 0, {})], id="of nothing"),
        pytest.param([txn(11, 55, 0, {b"x": b"never"}, None, Outcome.FAILED)], id="failed"),
    ],
)
def test_a_reader_without_a_version_has_a_place(readers: list[TxnOp]) -> None:
    assert check_transactions(ZERO, [*readers, *WRITES]) == []


@pytest.mark.parametrize(
    "readers",
    [
        pytest.param([txn(11, 55, 0, {b"x": b"never"})], id="what nobody wrote"),
        pytest.param([txn(11, 55, 0, {b"x": b"3"})], id="what a failed one wrote"),
        pytest.param([txn(11, 55, 0, {b"x": b"1", b"y": b"0"})], id="half of a transaction"),
        pytest.param([txn(11, 65, 0, {b"x": b"1", b"y": b"2"})], id="long fork"),
        pytest.param([txn(41, 42, 0, {b"x": b"1"})], id="stale"),
        pytest.param([txn(21, 22, 0, {b"x": b"2"})], id="of the future"),
        pytest.param([txn(61, 62, 0, {b"y": None})], id="gone"),
        pytest.param(
            [txn(11, 31, 0, {b"x": b"2"}), txn(32, 33, 0, {b"x": b"1"})],
            id="earlier than one before it",
        ),
        pytest.param(
            [txn(11, 31, 0, {b"x": b"2"}), txn(32, 33, 6, {b"x": b"1"})],
            id="later than a version after it",
        ),
    ],
)
def test_a_reader_without_a_version_that_has_no_place_is_caught(readers: list[TxnOp]) -> None:
    refused = txn(12, 13, 0, {}, {b"x": b"3"}, Outcome.FAILED)
    wrong = check_transactions(ZERO, [*readers, refused, *WRITES])
    assert any("told no version" in each for each in wrong)


def test_what_a_reader_without_a_version_may_believe_the_markers_say() -> None:
    lost = txn(1, FOREVER, 0, {}, {b"x": b"9"}, Outcome.UNKNOWN)
    reader = txn(2, 3, 0, {b"x": b"9", b"y": b"0"})
    torn = txn(2, 3, 0, {b"x": b"9", b"y": b"1"})
    assert check_transactions(ZERO, [lost, reader]) == []
    assert check_transactions(ZERO, [lost, reader], None, {b"t1": 4}) == []
    for history, markers in (
        ([lost, torn], None),
        ([lost, torn], {b"t1": 4}),
        ([lost, reader], {}),
    ):
        assert "told no version" in "; ".join(check_transactions(ZERO, history, None, markers))


def test_readers_without_a_version_agree_with_trying_every_place() -> None:
    """Of tiny random histories, with a version for each reader in every possible way."""
    rng = random.Random(5)
    verdicts = {True: 0, False: 0}
    for _ in range(300):
        history = random_transactions(rng)
        expected = by_every_version(history)
        assert (check_transactions({}, history) == []) == expected
        verdicts[expected] += 1
    assert min(verdicts.values()) > 50


def random_transactions(rng: random.Random) -> list[TxnOp]:
    """Writers in the order of their versions, each of one key or of two, and readers that overlap them."""
    history: list[TxnOp] = []
    for number in range(3):
        begin = 10 * number + rng.randint(0, 8)
        keys = rng.choice(([b"x"], [b"y"], [b"x", b"y"]))
        writes: dict[bytes, bytes | None] = dict.fromkeys(keys, b"%d" % number)
        history.append(txn(begin, begin + rng.randint(1, 12), 2 * number + 2, {}, writes))
    for _ in range(3):
        begin = rng.randint(0, 30)
        at = rng.randint(0, 3)
        seen: dict[bytes, bytes | None] = {b"x": None, b"y": None}
        for writer in history[:at]:
            seen.update(writer.writes)
        if rng.random() < 0.1:
            seen[b"x"] = rng.choice((None, b"0", b"1", b"2"))
        history.append(txn(begin, begin + rng.randint(1, 30), 0, seen))
    return history


def by_every_version(history: list[TxnOp]) -> bool:
    """A reader at an odd version lies between two writers; 1: before all."""
    readers = [op for op in history if not op.version]
    writers = [op for op in history if op.version]
    for versions in itertools.product((1, 3, 5, 7), repeat=len(readers)):
        told = [replace(op, version=at) for op, at in zip(readers, versions, strict=True)]
        if check_transactions({}, [*writers, *told]) == []:
            return True
    return False


def test_an_acknowledged_transaction_that_is_lost_is_caught() -> None:
    history = [txn(1, 2, 5, {}, {b"x": b"1"})]
    assert "is lost" in check_transactions(ZERO, history, {b"x": b"0"}, {})[0]


def test_a_failed_transaction_that_took_effect_is_caught() -> None:
    history = [txn(1, 2, 0, {}, {b"x": b"1"}, Outcome.FAILED)]
    assert "stands at 5" in check_transactions(ZERO, history, {b"x": b"1"}, {b"t1": 5})[0]


def test_a_total_that_does_not_add_up_is_caught() -> None:
    assert check_totals([txn(1, 2, 5, {b"x": b"3", b"y": b"4"})], [b"x", b"y"], 7) == []
    assert check_totals([txn(1, 2, 5, {b"x": b"3", b"y": b"5"})], [b"x", b"y"], 7)
