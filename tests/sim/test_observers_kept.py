"""Claims: I14, I15, W1, W2 and FG2 bite, each at every event that breaks it, and nothing else does at the same event.

Forged, as in test_observers_transactions.py; that the observers of I15 and W1 are attached where it happens, planted bugs show
(tests/sim/README.md).
"""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from kvstore.holds import LEASE_S
from kvstore.sim.observers.oracle import Views
from kvstore.sim.observers.report import Report
from tests.sim.ghost import (
    ANCHOR,
    BEGIN,
    COMMITTED,
    LAST,
    ONE,
    OTHER,
    TWO,
    Ghost,
    Rows,
    decided,
    ended,
    gone,
    outbox,
    prepare,
    prepared,
    staged,
    version,
)
from txn import keycode
from txn.messages import Changed, Changes, Timestamps, Validate, Validated
from txn.state import Part, PreparedRow, RangeRow, RangeState
from txn.types import Guard, make_txn_id

THREE = make_txn_id(BEGIN, 3)
HIGH = 190  # a threshold that the oracle has allowed


@pytest.fixture
def ghost() -> Ghost:
    made = Ghost()
    made.transactions._oracle.collectable = HIGH
    return made


def old(key: bytes, ts: int) -> Rows:
    """A version that was overwritten goes."""
    return {keycode.history_row(key, ts): None}


def latest(key: bytes) -> Rows:
    """The newest version goes."""
    return {keycode.latest_row(key): None}


class Replica:
    """What the observer sees of one."""

    def __init__(self, safe_ts: int, *, threshold: int = 0, min_ts: int = 0) -> None:
        self.range_id, self.safe_ts = 2, safe_ts
        self.state = RangeState(RangeRow(2, b"", b"", 1, 1, 0, 0))
        self.state.row.gc_threshold = threshold
        if min_ts:
            row = PreparedRow(ANCHOR, min_ts, BEGIN, [OTHER], [b"v"], [], [])
            self.state.parts[ONE] = {OTHER: Part(OTHER, ONE, row)}


# ---------------------------------------------------------------- I14: what is safe


def test_i14_an_undecided_part_in_what_is_safe(ghost: Ghost) -> None:
    ghost.transactions.replica_stands("n1", Replica(120, min_ts=121))
    assert ghost.told == []
    ghost.transactions.replica_stands("n1", Replica(121, min_ts=121))
    assert ghost.told == ["I14"]


def test_i14_a_version_appears_in_what_was_safe(ghost: Ghost) -> None:
    ghost.transactions.replica_stands("n1", Replica(120))
    ghost.apply(version(b"k", 121, ONE))
    assert ghost.told == []
    ghost.apply(version(b"l", 120, TWO))
    assert ghost.told == ["I14"]


# ---------------------------------------------------------------- I15: what is collected


def test_what_nobody_can_need_goes_in_silence(ghost: Ghost) -> None:
    ghost.commit_over_two_ranges(115)
    ghost.apply(version(b"k", 120, TWO))
    ghost.apply(version(b"k", 130, THREE))
    ghost.apply(version(b"l", 131, make_txn_id(BEGIN, 4), None))
    parts: list[Rows] = [
        {keycode.part_row(keycode.DECIDED, locus, ONE): None} for locus in (ANCHOR, OTHER)
    ]
    record: Rows = {keycode.part_row(keycode.TERMINAL, ANCHOR, ONE): None}
    ghost.apply(old(b"k", 120), latest(b"l"), *parts, record, collected=131)
    ghost.transactions.replica_stands("n1", Replica(131, threshold=131))
    assert ghost.told == []


def test_i15_what_was_never_there_goes(ghost: Ghost) -> None:
    ghost.apply(latest(b"k"), collected=HIGH)
    assert ghost.told == ["I15"]


def test_i15_a_version_above_the_threshold_goes(ghost: Ghost) -> None:
    ghost.apply(version(b"k", 120, ONE))
    ghost.apply(version(b"k", 130, TWO))
    ghost.apply(old(b"k", 120), collected=119)
    assert ghost.told == ["I15"]


@pytest.mark.parametrize("newest", [True, False])
def test_i15_a_version_goes_that_a_read_at_the_threshold_sees(ghost: Ghost, newest: bool) -> None:
    ghost.apply(version(b"k", 120, ONE))
    if newest:
        ghost.apply(latest(b"k"), collected=129)
    else:
        ghost.apply(version(b"k", 130, TWO))
        ghost.apply(old(b"k", 120), collected=129)
    assert ghost.told == ["I15"]


def test_i15_a_part_is_forgotten_whose_record_is_staged(ghost: Ghost) -> None:
    ghost.apply(staged(ONE, min_ts=115))
    ghost.apply(prepared(ONE, OTHER, 116))
    ghost.apply(gone(ONE, OTHER), decided(ONE, OTHER, COMMITTED, 116), version(OTHER, 116, ONE))
    ghost.apply({keycode.part_row(keycode.DECIDED, OTHER, ONE): None}, collected=HIGH)
    assert ghost.told == ["I15"]


def test_i15_a_record_is_forgotten_that_a_part_has_not_heard(ghost: Ghost) -> None:
    ghost.apply(staged(ONE, min_ts=115))
    ghost.apply(prepared(ONE, OTHER, 116))
    ghost.apply(
        gone(ONE, ANCHOR),
        decided(ONE, ANCHOR, COMMITTED, 116),
        ended(ONE, 116),
        outbox(ONE, OTHER, 116),
    )
    ghost.apply({keycode.part_row(keycode.TERMINAL, ANCHOR, ONE): None}, collected=HIGH)
    assert ghost.told == ["I15"]


def test_i2_a_record_above_the_horizon_is_forgotten(ghost: Ghost) -> None:
    ghost.apply(ended(ONE, 0))
    ghost.apply({keycode.part_row(keycode.TERMINAL, ANCHOR, ONE): None}, collected=BEGIN - 1)
    assert ghost.told == ["I2"]


def test_i15_a_threshold_above_what_is_safe(ghost: Ghost) -> None:
    ghost.transactions.replica_stands("n1", Replica(120, threshold=121))
    assert ghost.told == ["I15"]


def test_i15_a_threshold_above_what_an_answer_of_the_oracle_allows(ghost: Ghost) -> None:
    oracle = ghost.oracle
    oracle.collectable, oracle.retention = 0, 10
    oracle.handed("n1", Timestamps(1, LAST, 0, 0, 150), 0)  # held: what is read from 150 on
    assert oracle.collectable == 149
    oracle.handed("n1", Timestamps(1, LAST, 0, 0), 0)  # not known
    ghost.apply(collected=149)
    assert ghost.told == []
    ghost.apply(collected=150)
    ghost.apply(collected=150)  # told once
    assert ghost.told == ["I15"]
    oracle.handed("n1", Timestamps(1, LAST, 0, 0, LAST), 0)  # held: nothing older
    assert oracle.collectable == LAST - 10


def test_i15_a_floor_above_what_a_client_reads_at() -> None:
    told: list[str] = []
    views = Views(Report(told.append), "n1", hold=50)
    views.held(1, 120, 1.0)
    views.held(2, 110, 1.0)
    views.floored(110, 140, 2.0)
    views.floored(0, 140, 2.0)
    views.floored(115, 165, 2.0)  # a hold counts so far back
    views.held(2, 0, 2.0)
    views.floored(120, 140, 2.0)
    views.floored(140, 140, 1.0 + LEASE_S)  # it was not heard of for a lease
    assert told == []
    views.held(1, 120, 3.0)
    views.floored(121, 140, 4.0)
    assert [text.partition(" is broken")[0] for text in told] == ["I15"]


# ---------------------------------------------------------------- W1, W2: watches


def three_versions(ghost: Ghost) -> None:
    ghost.apply(version(b"k", 110, ONE, b"1"))
    ghost.apply(version(b"l", 120, TWO, None))
    ghost.apply(version(b"k", 130, THREE, b"3"))


QUESTION = Changes(1, 2, 1, 105, b"a", b"", 9, 999)
PAGE = Changed(1, 125, [110, 120], [b"k", b"l"], [b"1", None])


def test_a_page_that_is_the_log_is_silent(ghost: Ghost) -> None:
    three_versions(ghost)
    ghost.answer(QUESTION, PAGE)
    whole = Changed(1, LAST, [110, 120, 130], [b"k", b"l", b"k"], [b"1", None, b"3"])
    ghost.answer(QUESTION, whole)
    ghost.answer(structs.replace(QUESTION, since=110), Changed(1, 125, [120], [b"l"], [None]))
    ghost.answer(structs.replace(QUESTION, end=b"b"), Changed(1, LAST, [], [], []))
    assert ghost.told == []


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(Changed(1, 125, [120], [b"l"], [None]), id="the first is lost"),
        pytest.param(Changed(1, 125, [110], [b"k"], [b"1"]), id="the last is lost"),
        pytest.param(Changed(1, 125, [], [], []), id="all are lost"),
        pytest.param(
            Changed(1, 125, [110, 120, 130], [b"k", b"l", b"k"], [b"1", None, b"3"]), id="too new"
        ),
        pytest.param(Changed(1, 125, [110, 120], [b"k", b"m"], [b"1", None]), id="another key"),
        pytest.param(Changed(1, 125, [110, 121], [b"k", b"l"], [b"1", None]), id="another version"),
        pytest.param(Changed(1, 125, [110, 120], [b"k", b"l"], [b"2", None]), id="another value"),
        pytest.param(Changed(1, 125, [120, 110], [b"l", b"k"], [None, b"1"]), id="another order"),
    ],
)
def test_w1_a_page_that_is_not_what_the_log_says(ghost: Ghost, page: Changed) -> None:
    three_versions(ghost)
    ghost.answer(QUESTION, page)
    assert ghost.told == ["W1"]


def test_w2_a_version_appears_in_what_a_page_has_told(ghost: Ghost) -> None:
    """Told as I11: the page was a read of its span."""
    three_versions(ghost)
    ghost.answer(QUESTION, PAGE)
    ghost.apply(version(b"n", 126, make_txn_id(BEGIN, 4)))
    assert ghost.told == []
    ghost.apply(version(b"m", 125, make_txn_id(BEGIN, 5)))
    assert ghost.told == ["I11"]


# ---------------------------------------------------------------- FG2: guards by question


def fast(*spans: tuple[bytes, bytes]) -> Any:
    guards = [Guard(start, end, 105) for start, end in spans]
    return structs.replace(prepare(ONE), elsewhere=[guards])


def unchanged(at: int, *spans: tuple[bytes, bytes]) -> Validate:
    return Validate(1, 2, 1, at, ONE, 0, [Guard(start, end, 105) for start, end in spans])


def asked(ghost: Ghost) -> None:
    ghost.oracle.handed_out = BEGIN
    ghost.transactions.asked("n1", fast((b"n", b"o"), (b"p", b"q")))
    ghost.oracle.handed_out = LAST


def test_a_commit_whose_reads_were_asked_about_is_silent(ghost: Ghost) -> None:
    asked(ghost)
    ghost.answer(unchanged(120, (b"n", b"o")), Validated(1, unchanged=True))
    ghost.answer(unchanged(120, (b"p", b"q")), Validated(1, unchanged=True))
    ghost.apply(version(ANCHOR, 120, ONE))
    assert ghost.told == []


@pytest.mark.parametrize("at", [None, 119])
def test_fg2_a_commit_whose_reads_were_not_asked_about_at_its_timestamp(
    ghost: Ghost, at: int | None
) -> None:
    asked(ghost)
    ghost.answer(unchanged(120, (b"n", b"o")), Validated(1, unchanged=True))
    if at is not None:
        ghost.answer(unchanged(at, (b"p", b"q")), Validated(1, unchanged=True))
    ghost.apply(version(ANCHOR, 120, ONE))
    assert ghost.told == ["FG2"]


def test_fg2_an_answer_that_it_has_changed_is_no_permission(ghost: Ghost) -> None:
    asked(ghost)
    ghost.answer(unchanged(120, (b"n", b"o"), (b"p", b"q")), Validated(1, unchanged=False))
    ghost.apply(version(ANCHOR, 120, ONE))
    assert ghost.told == ["FG2"]


def test_i11_a_span_is_said_to_be_unchanged_that_is_not(ghost: Ghost) -> None:
    ghost.apply(version(b"n", 105, TWO))
    ghost.apply(version(b"p", 110, THREE))
    ghost.answer(unchanged(120, (b"n", b"o")), Validated(1, unchanged=True))
    assert ghost.told == []
    ghost.answer(unchanged(120, (b"p", b"q")), Validated(1, unchanged=True))
    assert ghost.told == ["I11"]
