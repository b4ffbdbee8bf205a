"""Claims: each invariant of transactions bites, at forged entries and answers, and nothing else does at the same event."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore.sim.observers.transactions import SPANS_MAX, Served
from tests.sim.ghost import (
    ABORTED,
    ANCHOR,
    BEGIN,
    COMMITTED,
    FENCED,
    LAST,
    ONE,
    OTHER,
    PREPARED,
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
from txn.messages import (
    Ack,
    Fence,
    Outcome,
    PartReply,
    PrepareReply,
    QueryPart,
    QueryTxn,
    Read,
    ReadReply,
    Resolve,
    Scan,
    ScanReply,
    TxnReply,
)
from txn.types import Guard, PartStatus, TxnStatus, make_txn_id


@pytest.fixture
def ghost() -> Ghost:
    return Ghost()


# ---------------------------------------------------------------- what the logs say


def test_a_commit_over_two_ranges_is_silent(ghost: Ghost) -> None:
    ghost.oracle.handed_out = BEGIN
    ghost.transactions.asked("n1", prepare(ONE))
    ghost.oracle.handed_out = LAST
    ghost.commit_over_two_ranges()
    ghost.answer(prepare(ONE), PrepareReply(1, COMMITTED, 120))
    ghost.answer(Read(1, 2, 1, 130, [ANCHOR, b"b"]), ReadReply(1, 130, [120, 0], [b"v", None]))
    ghost.answer(Scan(1, 2, 1, 119, b"a", b"z", 9, 9), ScanReply(1, 119, [], [], [], True, b"z"))
    assert ghost.told == []


def test_an_abort_after_a_fence_is_silent(ghost: Ghost) -> None:
    ghost.apply(staged(ONE))
    ghost.apply(decided(ONE, OTHER, FENCED))
    ghost.apply(
        gone(ONE, ANCHOR), decided(ONE, ANCHOR, ABORTED), ended(ONE, 0), outbox(ONE, OTHER, 0)
    )
    ghost.answer(Outcome(1, 2, 1, ONE, ANCHOR), TxnReply(1, TxnStatus.ABORTED))
    assert ghost.told == []


def test_i1_a_part_is_prepared_again_with_another_min_ts(ghost: Ghost) -> None:
    ghost.apply(prepared(ONE, OTHER, 110))
    ghost.apply(prepared(ONE, OTHER, 111))
    assert ghost.told == ["I1"]


def test_i1_a_fenced_part_is_prepared(ghost: Ghost) -> None:
    ghost.apply(decided(ONE, OTHER, FENCED))
    ghost.apply(prepared(ONE, OTHER, 110))
    assert ghost.told == ["I1"]


@pytest.mark.parametrize("status", [FENCED, PREPARED])
def test_i1_a_prepared_part_is_not_refused_any_more(ghost: Ghost, status: int) -> None:
    ghost.apply(prepared(ONE, OTHER, 110))
    ghost.apply(decided(ONE, OTHER, status))
    assert ghost.told == ["I1"]


def test_i1_what_is_decided_stays(ghost: Ghost) -> None:
    ghost.apply(decided(ONE, OTHER, FENCED))
    ghost.apply({keycode.part_row(keycode.DECIDED, OTHER, ONE): None})
    assert ghost.told == ["I1"]


def test_i1_a_min_ts_is_told_that_is_not_in_the_log(ghost: Ghost) -> None:
    ghost.apply(prepared(ONE, OTHER, 110))
    ghost.answer(prepare(ONE, OTHER), PrepareReply(1, PREPARED, 110))
    assert ghost.told == []
    ghost.answer(prepare(ONE, OTHER), PrepareReply(1, PREPARED, 112))
    assert ghost.told == ["I1"]


@pytest.mark.parametrize("ts", [0, 120])
def test_i2_an_ended_record_changes(ghost: Ghost, ts: int) -> None:
    ghost.apply(ended(ONE, 0))
    ghost.apply(ended(ONE, ts))
    assert ghost.told == ["I2"]


def test_i2_a_record_is_committed_that_was_not_staged(ghost: Ghost) -> None:
    ghost.apply(ended(ONE, 120))
    assert ghost.told == ["I2"]


def test_i2_an_ended_record_is_staged(ghost: Ghost) -> None:
    ghost.apply(ended(ONE, 0))
    ghost.apply(staged(ONE))
    assert ghost.told == ["I2"]


def test_i3_a_staged_record_is_aborted_though_nobody_refused(ghost: Ghost) -> None:
    ghost.apply(staged(ONE))
    ghost.apply(ended(ONE, 0), outbox(ONE, ANCHOR, 0), outbox(ONE, OTHER, 0))
    assert "I3" in ghost.told
    assert set(ghost.told) == {"I3", "I19"}  # its own part is decided in the same entry


def test_i4_committed_though_a_part_is_not_prepared(ghost: Ghost) -> None:
    ghost.apply(staged(ONE))
    ghost.apply(
        gone(ONE, ANCHOR),
        decided(ONE, ANCHOR, COMMITTED, 110),
        ended(ONE, 110),
        outbox(ONE, OTHER, 110),
    )
    assert ghost.told == ["I4"]


def test_i4_committed_at_another_timestamp_than_the_largest(ghost: Ghost) -> None:
    ghost.commit_over_two_ranges()
    assert ghost.told == []
    ghost.apply(staged(TWO, min_ts=131))
    ghost.apply(prepared(TWO, OTHER, 130))
    ghost.apply(
        gone(TWO, ANCHOR),
        decided(TWO, ANCHOR, COMMITTED, 130),
        ended(TWO, 130),
        outbox(TWO, OTHER, 130),
    )
    assert ghost.told == ["I4"]


def test_i4_a_refused_transaction_commits(ghost: Ghost) -> None:
    ghost.apply(decided(ONE, OTHER, FENCED))
    ghost.apply(version(ANCHOR, 120, ONE))
    assert ghost.told == ["I4"]


@pytest.mark.parametrize("status", [FENCED, ABORTED])
def test_i5_a_part_is_refused_after_all_were_prepared(ghost: Ghost, status: int) -> None:
    ghost.apply(staged(ONE))
    ghost.apply(prepared(ONE, OTHER, 111))
    ghost.apply(gone(ONE, OTHER), decided(ONE, OTHER, status))
    assert "I5" in ghost.told
    assert ghost.told == ["I5"] if status == ABORTED else ["I1", "I5"]


def test_i5_a_record_is_aborted_after_all_were_prepared(ghost: Ghost) -> None:
    ghost.apply(staged(ONE))
    ghost.apply(prepared(ONE, OTHER, 111))
    ghost.apply(ended(ONE, 0), outbox(ONE, OTHER, 0))
    assert ghost.told[0] == "I5"


def test_i6_a_transaction_commits_at_two_timestamps(ghost: Ghost) -> None:
    ghost.apply(version(b"a", 120, ONE))
    ghost.apply(version(b"b", 121, ONE))
    assert ghost.told == ["I6"]


@pytest.mark.parametrize("ts", [LAST + 1, 5])
def test_i7_a_timestamp_that_was_never_issued(ghost: Ghost, ts: int) -> None:
    ghost.apply(version(b"a", ts, ONE))
    assert ghost.told == ["I7"]
    ghost.apply(prepared(TWO, b"b", ts + 1))
    assert ghost.told == ["I7", "I7"]


def test_i7_two_transactions_with_one_timestamp(ghost: Ghost) -> None:
    ghost.apply(version(b"a", 120, ONE))
    ghost.apply(version(b"b", 120, TWO))
    assert ghost.told == ["I7"]


def test_i7_a_begin_just_below_what_was_issued_may_come_from_a_replica(ghost: Ghost) -> None:
    ghost.oracle.bound = 400
    ghost.oracle.issued("n1", 300, 5)
    ghost.oracle.handed_out = 304
    ghost.apply(version(b"a", 301, make_txn_id(299, 1)))
    assert ghost.told == []
    ghost.apply(version(b"b", 302, make_txn_id(298, 1)))
    assert ghost.told == ["I7"]


@pytest.mark.parametrize("begin", [7, 150])
def test_i7_a_begin_that_was_not_issued_or_is_not_below(ghost: Ghost, begin: int) -> None:
    ghost.apply(version(b"a", 120, make_txn_id(begin, 1)))
    assert ghost.told == ["I7"]


def test_i8_a_commit_below_what_was_handed_out_before_it_was_asked_for(ghost: Ghost) -> None:
    ghost.oracle.handed_out = 125
    ghost.transactions.asked("n1", prepare(ONE))
    ghost.apply(version(b"a", 120, ONE))
    assert ghost.told == ["I8"]


def test_i8_an_acknowledgement_above_what_was_handed_out(ghost: Ghost) -> None:
    ghost.apply(version(ANCHOR, 120, ONE))
    ghost.oracle.handed_out = 119
    ghost.answer(prepare(ONE), PrepareReply(1, COMMITTED, 120))
    assert ghost.told == ["I8"]


def test_i10_two_intents_on_a_key(ghost: Ghost) -> None:
    ghost.apply(prepared(ONE, b"b", 110, b"b", b"c"))
    ghost.apply(prepared(TWO, b"c", 111, b"c"))
    assert ghost.told == ["I10"]


@pytest.mark.parametrize("guard_first", [True, False])
def test_i10_an_intent_under_a_guard(ghost: Ghost, guard_first: bool) -> None:
    parts = [
        prepared(ONE, b"b", 110, guards=(Guard(b"c", b"f", 105),)),
        prepared(TWO, b"d", 111),
    ]
    ghost.apply(parts[not guard_first])
    ghost.apply(parts[guard_first])
    assert ghost.told == ["I10"]


def test_i10_intents_that_went_are_in_nobodys_way(ghost: Ghost) -> None:
    ghost.apply(prepared(ONE, b"b", 110, guards=(Guard(b"b", b"f", 105),)))
    ghost.apply(gone(ONE, b"b"), decided(ONE, b"b", ABORTED))
    ghost.apply(prepared(TWO, b"b", 111, b"b", b"c"))
    assert ghost.told == []


@pytest.mark.parametrize("scan", [False, True])
def test_i11_a_version_appears_where_it_was_read(ghost: Ghost, scan: bool) -> None:
    if scan:
        reply = ScanReply(1, 130, [], [], [], True, b"z")
        ghost.answer(Scan(1, 2, 1, 130, b"a", b"z", 9, 9), reply)
    else:
        ghost.answer(Read(1, 2, 1, 130, [b"k"]), ReadReply(1, 130, [0], [None]))
    ghost.apply(version(b"k", 131, ONE))
    ghost.apply(version(b"zz", 129, TWO))
    assert ghost.told == []
    ghost.apply(version(b"l" if scan else b"k", 128, make_txn_id(BEGIN, 3)))
    assert ghost.told[-1] == "I11"
    assert set(ghost.told) <= {"I11", "I19"}


@pytest.mark.parametrize(
    ("versions", "values"),
    [([0], [None]), ([121], [b"w"]), ([110], [b"v"]), ([120], [b"w"])],
    ids=["missed", "too new", "too old", "another value"],
)
def test_i11_a_read_that_is_not_what_the_log_says(
    ghost: Ghost, versions: list[int], values: list[bytes | None]
) -> None:
    ghost.apply(version(b"k", 110, ONE))
    ghost.apply(version(b"k", 120, TWO))
    ghost.apply(version(b"k", 125, make_txn_id(BEGIN, 3), b"w"))
    ghost.answer(Read(1, 2, 1, 122, [b"k"]), ReadReply(1, 122, [120], [b"v"]))
    assert ghost.told == []
    ghost.answer(Read(1, 2, 1, 122, [b"k"]), ReadReply(1, 122, versions, values))
    assert ghost.told == ["I11"]


@pytest.mark.parametrize("keys", [[], [b"k"], [b"m", b"k"], [b"k", b"l", b"m"]])
def test_i11_a_scan_that_is_not_what_the_log_says(ghost: Ghost, keys: list[bytes]) -> None:
    ghost.apply(version(b"k", 110, ONE), version(b"m", 110, ONE))
    ghost.apply(version(b"l", 111, TWO, None))
    scan = Scan(1, 2, 1, 120, b"a", b"", 9, 9)
    ghost.answer(scan, ScanReply(1, 120, [b"k", b"m"], [b"v"] * 2, [110] * 2, True, b""))
    part = ScanReply(1, 120, [b"k"], [b"v"], [110], False, b"k\x00")
    ghost.answer(scan, part)
    assert ghost.told == []
    count = len(keys)
    ghost.answer(scan, ScanReply(1, 120, keys, [b"v"] * count, [110] * count, True, b""))
    assert ghost.told == ["I11"]


def test_i12_an_intent_appears_below_a_served_read(ghost: Ghost) -> None:
    ghost.answer(Read(1, 2, 1, 130, [b"k"]), ReadReply(1, 130, [0], [None]))
    ghost.apply(prepared(ONE, b"k", 130))
    assert ghost.told == ["I12"]


def test_i12_a_part_appears_that_was_said_to_be_absent(ghost: Ghost) -> None:
    ghost.answer(QueryPart(1, 2, 1, ONE, b"k", 130), PartReply(1, PartStatus.ABSENT))
    ghost.apply(prepared(ONE, b"k", 129))
    assert ghost.told == ["I12"]


def test_i12_a_transaction_commits_that_was_said_to_be_invisible(ghost: Ghost) -> None:
    question = QueryTxn(1, 2, 1, ONE, ANCHOR, 0, 130)
    ghost.answer(question, TxnReply(1, TxnStatus.INVISIBLE))
    ghost.apply(version(b"k", 129, ONE))
    assert ghost.told == ["I12"]


@pytest.mark.parametrize("invisible", [True, False])
def test_i12_a_promise_that_is_broken_already(ghost: Ghost, invisible: bool) -> None:
    ghost.commit_over_two_ranges()
    if invisible:
        question = QueryTxn(1, 2, 1, ONE, ANCHOR, 0, 130)
        ghost.answer(question, TxnReply(1, TxnStatus.INVISIBLE))
    else:
        ghost.answer(QueryPart(1, 2, 1, ONE, OTHER, 130), PartReply(1, PartStatus.ABSENT))
    assert ghost.told == ["I12"]


def test_i13_something_appears_in_what_is_closed(ghost: Ghost) -> None:
    ghost.apply(version(b"k", 120, ONE), closed_ts=110)
    ghost.apply(prepared(TWO, b"l", 125), closed_ts=126)
    assert ghost.told == []
    ghost.apply(version(b"m", 126, make_txn_id(BEGIN, 3)), closed_ts=126)
    ghost.apply(prepared(make_txn_id(BEGIN, 4), b"n", 124), closed_ts=126)
    ghost.apply(closed_ts=100)
    assert ghost.told == ["I13"] * 3


def test_i19_an_outbox_row_goes_before_its_part_is_decided(ghost: Ghost) -> None:
    ghost.apply({keycode.outbox_row(ANCHOR, ONE, OTHER): None})
    assert ghost.told == ["I19"]


def test_i19_a_record_ends_and_a_participant_is_not_told(ghost: Ghost) -> None:
    ghost.apply(staged(ONE))
    ghost.apply(prepared(ONE, OTHER, 111))
    ghost.apply(gone(ONE, ANCHOR), decided(ONE, ANCHOR, COMMITTED, 111), ended(ONE, 111))
    assert ghost.told == ["I19"]


def test_i19_what_is_posted_is_not_the_record(ghost: Ghost) -> None:
    ghost.apply(staged(ONE))
    ghost.apply(prepared(ONE, OTHER, 111))
    decision = decided(ONE, ANCHOR, COMMITTED, 111)
    ghost.apply(gone(ONE, ANCHOR), decision, ended(ONE, 111), outbox(ONE, OTHER, 0))
    assert ghost.told == ["I19"]


def test_i19_a_version_is_written_again(ghost: Ghost) -> None:
    ghost.apply(version(b"k", 120, ONE))
    ghost.apply(version(b"k", 120, ONE))
    assert ghost.told == ["I19"]


def test_i19_a_resolve_is_acknowledged_before_it_is_applied(ghost: Ghost) -> None:
    ghost.apply(prepared(ONE, OTHER, 110))
    ghost.answer(Resolve(1, 2, 1, ONE, ANCHOR, OTHER, b"n", b"o", 120), Ack(1))
    assert ghost.told == ["I19"]


def test_i20_two_write_sets(ghost: Ghost) -> None:
    ghost.transactions.asked("n1", prepare(ONE))
    ghost.transactions.asked("n2", prepare(ONE))
    assert ghost.told == []
    ghost.transactions.asked("n2", prepare(ONE, value=b"else"))
    assert ghost.told == ["I20"]


def test_i20_an_anchor_that_takes_no_part(ghost: Ghost) -> None:
    ghost.apply(staged(ONE, OTHER))
    assert ghost.told == ["I20"]


@pytest.mark.parametrize(
    "rows",
    [prepared(ONE, OTHER, 110), staged(ONE)],
    ids=["a part", "the anchor's, which is a record, too"],
)
def test_i22_what_stays_undecided(ghost: Ghost, rows: Rows) -> None:
    ghost.now = 5.0
    ghost.apply(rows)
    ghost.transactions.undecided_too_long(15.9, 6.0, 10.0)
    assert ghost.told == []
    ghost.transactions.undecided_too_long(16.1, 6.0, 10.0)
    ghost.transactions.undecided_too_long(30.0, 6.0, 10.0)
    assert ghost.told == ["I22"] * (2 if rows == staged(ONE) else 1)


def test_i22_what_was_decided_in_time(ghost: Ghost) -> None:
    ghost.now = 5.0
    ghost.apply(staged(ONE))
    ghost.apply({**gone(ONE, ANCHOR), **decided(ONE, ANCHOR, PartStatus.ABORTED), **ended(ONE, 0)})
    told = list(ghost.told)
    ghost.transactions.undecided_too_long(30.0, 6.0, 10.0)
    assert ghost.told == told


def test_i22_an_outbox_row_that_stays(ghost: Ghost) -> None:
    ghost.apply(staged(ONE))
    ghost.apply(decided(ONE, OTHER, FENCED))
    ghost.apply(
        gone(ONE, ANCHOR), decided(ONE, ANCHOR, ABORTED), ended(ONE, 0), outbox(ONE, OTHER, 0)
    )
    ghost.transactions.undecided_too_long(16.1, 6.0, 10.0)
    assert ghost.told == ["I22"]


# ---------------------------------------------------------------- what is told


def test_i6_a_commit_is_told_that_no_log_says(ghost: Ghost) -> None:
    ghost.answer(prepare(ONE), PrepareReply(1, COMMITTED, 120))
    assert ghost.told == ["I6"]


def test_i6_an_implied_commit_may_be_told_and_no_other(ghost: Ghost) -> None:
    ghost.apply(staged(ONE))
    ghost.apply(prepared(ONE, OTHER, 111))
    question = QueryTxn(1, 2, 1, ONE, ANCHOR, 0, 130)
    ghost.answer(question, TxnReply(1, TxnStatus.COMMITTED, 111))
    assert ghost.told == []
    ghost.answer(question, TxnReply(1, TxnStatus.COMMITTED, 110))
    assert ghost.told == ["I6", "I6"]  # not the log's, nor what was told before


def test_i6_a_refusal_is_told_before_it_is_in_a_log(ghost: Ghost) -> None:
    ghost.answer(Fence(1, 2, 1, ONE, OTHER, ANCHOR), PartReply(1, FENCED))
    assert ghost.told == ["I6"]


def test_i6_two_outcomes_are_told(ghost: Ghost) -> None:
    ghost.apply(version(ANCHOR, 120, ONE))
    ghost.answer(prepare(ONE), PrepareReply(1, COMMITTED, 120))
    ghost.transactions.refused[ONE] = None
    ghost.answer(Outcome(1, 2, 1, ONE, ANCHOR), TxnReply(1, TxnStatus.ABORTED))
    assert ghost.told == ["I6"]


# ---------------------------------------------------------------- the ghost log of reads


def test_served_reads_are_found_by_key_and_by_span() -> None:
    served = Served()
    served.key(b"k", 10)
    served.key(b"k", 7)
    served.span(b"l", b"n", 20)
    served.span(b"x", b"", 30)
    found = [served.upto(key, 8) for key in (b"k", b"j", b"l", b"m", b"n", b"x", b"zz")]
    assert found == [10, 0, 20, 20, 0, 30, 30]
    assert served.upto(b"k", 11) == 0
    assert served.upto(b"m", 20) == 20
    assert served.upto(b"m", 21) == 0


def test_spans_are_bounded_and_the_newest_stay() -> None:
    served = Served()
    for number in range(SPANS_MAX + 10):
        served.span(b"%05d" % number, b"%05d" % (number + 1), number + 1)
    spans: Any = served._spans
    assert len(spans) == SPANS_MAX
    assert served.upto(b"00003", 1) == 0
    assert served.upto(b"%05d" % SPANS_MAX, 1) == SPANS_MAX + 1
