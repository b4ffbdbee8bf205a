"""Claims R1 to R4: what the anchor and the participants do about transactions that nobody finishes, and who is told what."""

from __future__ import annotations

import pytest

from tests.unit.txn.txn_driver import Asked, Range, put, settled, txn_id
from txn import keycode
from txn.commands import AbortUnstaged, Decide, FencePart, OutboxDone, ResolvePart
from txn.messages import Ack, Failure, Fence, PartReply, QueryMode, QueryPart, Resolve, TxnReply
from txn.types import FenceReason, PartStatus, TxnStatus

FENCED = PartReply(0, PartStatus.FENCED)
LOST = Failure(0, "unavailable")


def prepared(ts: int) -> PartReply:
    return PartReply(0, PartStatus.PREPARED, ts)


def staged() -> Range:
    """An anchor at b'a' with a staged transaction 1, prepared here at 101, and parts at b'x' and b'y'."""
    place = Range(b"", b"m")
    asked = place.anchor(1, put(b"a"), others=(b"x", b"y"))
    place.settle()
    assert (asked.reply.status, asked.reply.ts) == (PartStatus.PREPARED, 101)
    return place


def recovering() -> Range:
    """Its timer is up: every participant is asked."""
    place = staged()
    place.pass_time(1.1)
    assert [(key, type(request)) for key, request, _ in place.calls] == [
        (b"a", Fence),
        (b"x", Fence),
        (b"y", Fence),
    ]
    return place


def held() -> Range:
    """A participant of transaction 1, prepared at b'x' at 101, anchored elsewhere."""
    place = Range()
    place.part(1, put(b"x"))
    place.settle()
    return place


def decisions(place: Range) -> list[int]:
    return [command.commit_ts for command in place.log if isinstance(command, Decide)]


def record(place: Range) -> tuple[int, int]:
    return place.state.terminal_of(place.rows, txn_id(1), b"a")


# -- the anchor's timer


def test_the_anchor_asks_nobody_before_its_timer():
    place = staged()
    place.pass_time(0.9)
    assert place.calls == []


def test_all_prepared_is_committed_at_the_largest_min_ts():
    place = recovering()
    for ts in (101, 140, 120):
        assert decisions(place) == []
        place.answer(prepared(ts))
        place.settle()
    assert decisions(place) == [140]
    assert record(place) == (TxnStatus.COMMITTED, 140)
    assert place.read(b"a", at=140).reply.versions == [140]


def test_one_fence_aborts_at_once():
    place = recovering()
    place.answer(FENCED, number=2)
    place.settle()
    assert decisions(place) == [0]
    assert record(place) == (TxnStatus.ABORTED, 0)


def test_without_a_fence_nothing_is_aborted_however_long_it_takes():
    place = recovering()
    for _ in range(5):
        while place.calls:
            place.answer(prepared(101) if place.calls[0][0] == b"a" else LOST)
        place.pass_time(1.1)
        place.settle()
    assert decisions(place) == []
    assert record(place) == (TxnStatus.STAGED, 0)
    assert {key for key, _, _ in place.calls} == {b"x", b"y"}, "who is known is not asked again"


def test_an_answer_that_says_nothing_decides_nothing():
    place = recovering()
    place.answer(prepared(101))
    place.answer(PartReply(0, PartStatus.ABSENT))
    place.answer(prepared(120))
    place.settle()
    assert decisions(place) == []


def test_a_part_that_can_never_be_prepared_any_more_is_as_good_as_fenced():
    place = recovering()
    place.answer(prepared(101))
    place.answer(PartReply(0, PartStatus.EXPIRED))
    place.settle()
    assert decisions(place) == [0]


def test_a_decision_that_raft_refuses_is_proposed_again_by_the_timer():
    place = recovering()
    for ts in (101, 140, 120):
        place.answer(prepared(ts))
    place.evaluator.dropped(place.take(), "throttled")
    place.pass_time(1.1)
    place.settle()
    assert decisions(place) == [140]


def test_late_and_doubled_answers_do_no_harm():
    place = recovering()
    numbers = [call_id for _, _, call_id in place.calls]
    for ts in (101, 140, 120):
        place.answer(prepared(ts))
    place.settle()
    for number in numbers:
        place.evaluator.recovery.on_reply(number, FENCED, place.now)
    place.settle()
    assert decisions(place) == [140]


def test_a_new_leader_recovers_what_it_inherited():
    place = staged()
    place.lead()
    place.pass_time(1.1)
    assert {key for key, _, _ in place.calls} == {b"a", b"x", b"y"}


# -- finalize and outcome


def test_finalize_commits_and_is_answered_the_same_later():
    place = staged()
    first = settled(place, place.finalize(1, b"a", 130))
    second = settled(place, place.finalize(1, b"a", 130))
    assert first.reply == second.reply == TxnReply(0, TxnStatus.COMMITTED, 130)
    assert decisions(place) == [130]


def test_finalize_with_an_abort_fences_an_attempt_that_was_never_staged():
    place = Range()
    asked = settled(place, place.finalize(1, b"a", 0))
    assert asked.reply.status == TxnStatus.ABORTED
    late = settled(place, place.anchor(1, put(b"a"), others=(b"x",)))
    assert (late.reply.status, late.reply.reason) == (PartStatus.FENCED, FenceReason.RECOVERY)


def test_a_commit_that_was_never_staged_here_is_refused_only_with_leadership_confirmed():
    place = Range()
    asked = settled(place, place.finalize(1, b"a", 130))
    assert (asked.reply.code, asked.confirm) == ("invalid_argument", True)
    asked = settled(place, place.resolve(1, b"a", 130))
    assert (asked.reply.code, asked.confirm) == ("invalid_argument", True)


def test_a_commit_below_what_was_prepared_is_refused_and_stops_no_replica():
    """Apply asserts that it does not happen: in the log it would stop all replicas, and again at each start."""
    place = staged()
    asked = settled(place, place.finalize(1, b"a", 100))
    assert (asked.reply.code, decisions(place)) == ("invalid_argument", [])
    assert settled(place, place.finalize(1, b"a", 101)).reply.status == TxnStatus.COMMITTED
    place = held()
    for record in (False, True):
        asked = settled(place, place.resolve(1, b"x", 100, record=record))
        assert asked.reply.code == "invalid_argument"
    place.pass_time(2.1)
    place.answer(TxnReply(0, TxnStatus.COMMITTED, 100))
    place.settle()
    assert place.state.part(txn_id(1), b"x") is not None
    assert settled(place, place.resolve(1, b"x", 101)).reply == Ack(0)


def test_the_outcome_of_what_nobody_knows_is_aborted_and_stays_so():
    place = Range()
    asked = place.outcome(1, b"a")
    assert asked.open
    assert isinstance(place.commit()[0], AbortUnstaged)
    assert asked.reply.status == TxnStatus.ABORTED
    late = settled(place, place.prepare(1, put(b"a")))
    assert late.reply.status == PartStatus.FENCED
    assert place.outcome(1, b"a").reply.status == TxnStatus.ABORTED


def test_the_outcome_of_a_one_range_commit_is_its_version():
    place = Range()
    settled(place, place.prepare(1, put(b"a")))
    settled(place, place.prepare(2, put(b"a")))
    assert place.outcome(1, b"a").reply == TxnReply(0, TxnStatus.COMMITTED, 101)


def test_the_outcome_of_what_was_refused_is_aborted():
    place = held()
    settled(place, place.part(2, put(b"x"), age=50))
    assert place.outcome(2, b"x").reply.status == TxnStatus.ABORTED


def test_the_outcome_of_what_is_staged_is_decided_first():
    place = staged()
    asked = place.outcome(1, b"a")
    assert asked.open
    while place.calls:
        place.answer(prepared(140))
    place.settle()
    assert asked.reply == TxnReply(0, TxnStatus.COMMITTED, 140)


def test_who_asks_for_an_outcome_that_cannot_be_decided_does_not_wait_for_ever():
    """A part's range is away; and each question counts as an open request of the node until it is answered."""
    place = staged()
    asked = place.outcome(1, b"a")
    place.pass_time(place.limits.read_wait_s - 0.1)
    later = place.outcome(1, b"a")
    assert asked.open
    place.pass_time(0.2)
    assert asked.reply.code == "unavailable"
    assert later.open
    while place.calls:
        place.answer(prepared(140))
    place.settle()
    assert later.reply == TxnReply(0, TxnStatus.COMMITTED, 140)
    place.pass_time(place.limits.read_wait_s)
    assert len(asked.replies) == len(later.replies) == 1


def test_an_outcome_waits_for_what_is_in_flight():
    place = Range()
    place.prepare(1, put(b"a"))
    asked = place.outcome(1, b"a")
    place.settle()
    assert asked.reply == TxnReply(0, TxnStatus.COMMITTED, 101)


# -- questions to the anchor


@pytest.mark.parametrize(
    ("mode", "status"),
    [(QueryMode.READ, TxnStatus.INVISIBLE), (QueryMode.BLOCKED, TxnStatus.ABSENT)],
)
def test_who_only_asks_changes_nothing_and_absence_is_confirmed(mode, status):
    place = Range()
    asked = place.query(1, b"a", mode, 100)
    assert (asked.reply.status, asked.confirm) == (status, True)
    assert place.take() == []


def test_an_orphan_without_a_record_is_aborted():
    place = Range()
    asked = settled(place, place.query(1, b"a", QueryMode.ORPHAN))
    assert asked.reply.status == TxnStatus.ABORTED
    assert isinstance(place.log[0], AbortUnstaged)


def test_an_orphan_that_is_staged_is_left_to_the_anchors_timer():
    place = staged()
    assert place.query(1, b"a", QueryMode.ORPHAN).reply.status == TxnStatus.STAGED
    assert place.query(1, b"a", QueryMode.BLOCKED).reply.status == TxnStatus.STAGED


@pytest.mark.parametrize("mode", list(QueryMode))
def test_a_question_about_what_is_in_flight_waits_for_it(mode):
    place = Range(b"", b"m")
    place.anchor(1, put(b"a"), others=(b"x",))
    asked = place.query(1, b"a", mode, 100)
    assert asked.open
    place.settle()
    if mode == QueryMode.READ:
        assert asked.open
        assert [type(request) for _, request, _ in place.calls] == [QueryPart, QueryPart]
    else:
        assert asked.reply.status == TxnStatus.STAGED


# -- a reader's question about a staged transaction


def looked() -> tuple[Range, Asked]:
    place = staged()
    asked = place.query(1, b"a", QueryMode.READ, 150)
    assert [(key, request.read_ts) for key, request, _ in place.calls] == [
        (b"a", 150),
        (b"x", 150),
        (b"y", 150),
    ]
    return place, asked


@pytest.mark.parametrize(
    ("status", "confirm"), [(PartStatus.ABSENT, False), (PartStatus.EXPIRED, True)]
)
def test_invisible_because_a_participant_forgot_is_confirmed(status, confirm):
    """A deposed leader has it STAGED long after it was decided and its parts were collected (harness, seed 1104)."""
    place, asked = looked()
    place.answer(PartReply(0, status), 1)
    assert (asked.reply.status, asked.confirm) == (TxnStatus.INVISIBLE, confirm)


def test_a_reader_is_told_committed_once_all_parts_are_prepared():
    place, asked = looked()
    for ts in (101, 140, 120):
        assert asked.open
        place.answer(prepared(ts))
    assert asked.reply == TxnReply(0, TxnStatus.COMMITTED, 140)
    assert decisions(place) == [], "a reader decides nothing"


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (PartReply(0, PartStatus.ABSENT), TxnReply(0, TxnStatus.INVISIBLE)),
        (FENCED, TxnReply(0, TxnStatus.ABORTED)),
        (PartReply(0, PartStatus.ABORTED), TxnReply(0, TxnStatus.ABORTED)),
        (PartReply(0, PartStatus.COMMITTED, 140), TxnReply(0, TxnStatus.COMMITTED, 140)),
    ],
)
def test_one_part_that_is_not_merely_prepared_answers_a_reader(part, told):
    place, asked = looked()
    place.answer(prepared(101))
    place.answer(part)
    assert asked.reply == told
    place.answer(FENCED)
    assert len(asked.replies) == 1


def test_a_reader_is_told_if_a_participant_does_not_answer():
    place, asked = looked()
    place.answer(LOST)
    assert asked.reply.code == "unavailable"


def test_what_a_participant_forgot_is_looked_up_in_the_record():
    place, asked = looked()
    settled(place, place.finalize(1, b"a", 140))
    place.answer(PartReply(0, PartStatus.EXPIRED))
    assert asked.reply == TxnReply(0, TxnStatus.COMMITTED, 140)


# -- a participant


def test_an_absent_part_is_promised_to_stay_above_the_reader():
    place = Range()
    asked = place.query_part(1, b"x", 100)
    assert (asked.reply.status, asked.confirm) == (PartStatus.ABSENT, True)
    late = settled(place, place.part(1, put(b"x")))
    assert late.reply.ts > 100


def test_a_part_in_flight_is_waited_for():
    place = Range()
    place.part(1, put(b"x"))
    asked = place.query_part(1, b"x", 100)
    assert asked.open
    place.settle()
    assert asked.reply == prepared(101)


def test_an_orphan_asks_its_anchor_and_obeys():
    place = held()
    place.pass_time(2.1)
    ((key, question, _),) = place.calls
    assert (key, question.mode) == (b"zz", QueryMode.ORPHAN)
    place.answer(TxnReply(0, TxnStatus.ABORTED))
    place.settle()
    assert place.state.parts == {}
    assert place.read(b"x", at=200).reply.versions == [0]


def test_an_orphan_asks_again_until_it_knows():
    place = held()
    for _ in range(3):
        place.pass_time(2.1)
        place.answer(TxnReply(0, TxnStatus.STAGED))
        assert place.calls == []
    place.pass_time(2.1)
    place.answer(TxnReply(0, TxnStatus.COMMITTED, 130))
    place.settle()
    assert place.read(b"x", at=200).reply.versions == [130]


def test_a_new_leader_arms_the_orphan_timer_again():
    place = held()
    place.lead()
    place.pass_time(2.1)
    assert len(place.calls) == 1


def test_a_resolve_is_acknowledged_once_it_is_applied():
    place = held()
    asked = place.resolve(1, b"x", 130)
    assert asked.open
    place.commit()
    assert asked.reply == Ack(0)
    assert settled(place, place.resolve(1, b"x", 130)).reply == Ack(0)
    assert sum(isinstance(command, ResolvePart) for command in place.log) == 1


def test_an_abort_of_what_is_not_there_is_acknowledged_once_it_is_fenced():
    place = Range()
    asked = place.resolve(1, b"x", 0)
    assert asked.open
    assert isinstance(place.commit()[0], FencePart)
    assert asked.reply == Ack(0)
    assert settled(place, place.part(1, put(b"x"))).reply.status == PartStatus.FENCED


# -- the outbox


def decided() -> Range:
    place = staged()
    settled(place, place.finalize(1, b"a", 140))
    assert place.calls == []
    place.pass_time(0.11)
    assert [(key, type(r), r.commit_ts, r.record) for key, r, _ in place.calls] == [
        (b"x", Resolve, 140, True),
        (b"y", Resolve, 140, True),
    ]
    return place


def test_a_decision_is_delivered_and_its_rows_go_when_it_is_acknowledged():
    place = decided()
    for left in (1, 0):
        place.answer(Ack(0))
        assert len(place.state.outbox) == left + 1, "not before it is in the log"
        place.settle()
        assert len(place.state.outbox) == left
    place.pass_time(place.limits.read_wait_s)  # of what has asked for a timestamp
    assert place.evaluator.deadline() is None


def test_what_is_acknowledged_in_one_turn_goes_by_one_command():
    place = decided()
    for _ in range(2):
        place.answer(Ack(0))
    place.settle()
    assert [len(each.rows) for each in place.log if isinstance(each, OutboxDone)] == [2]
    assert not place.state.outbox


def test_the_outbox_is_served_from_memory_and_its_rows_are_not_searched(monkeypatch):
    """A queue in the engine slows with its own tombstones (pitfall 27)."""
    place = decided()
    families = {keycode.OUTBOX, keycode.PREPARED}

    def refuse(start, *_args, **_options):
        assert start[:1] not in families, f"rows of family {start[:1]!r} are searched"
        return scan(start, *_args, **_options)

    scan = place.rows.scan
    monkeypatch.setattr(place.rows, "scan", refuse)
    place.answer(LOST)
    place.answer(LOST)
    place.settle()
    place.pass_time(0.6)
    assert len(place.calls) == 2
    place.answer(Ack(0))
    place.answer(Ack(0))
    place.settle()
    assert not place.state.outbox


def test_without_an_acknowledgement_it_is_sent_again():
    place = decided()
    place.answer(LOST)
    place.answer(LOST)
    place.settle()
    assert len(place.state.outbox) == 2
    place.pass_time(0.6)
    assert len(place.calls) == 2
    assert not any(isinstance(command, OutboxDone) for command in place.log)


def test_the_age_of_the_channel_is_that_of_the_oldest_outcome_that_nobody_acknowledged():
    place = decided()
    recovery, begun = place.evaluator.recovery, place.now
    assert recovery.outbox_age(place.now + 3.0) == pytest.approx(3.0, abs=0.2)
    place.answer(LOST)
    place.answer(Ack(0))
    place.settle()
    place.pass_time(2.0)
    assert recovery.outbox_age(place.now) >= place.now - begun
    assert place.evaluator.counters["redeliveries_total"] == 1
    place.answer(Ack(0))
    place.settle()
    assert recovery.outbox_age(place.now) == 0
    assert not recovery._outbox_since


def test_while_no_answer_came_it_is_not_sent_twice():
    place = decided()
    place.pass_time(5.0)
    assert len(place.calls) == 2


def test_a_new_leader_sends_what_is_left_at_once():
    place = decided()
    place.answer(Ack(0))
    place.settle()
    place.lead()
    place.pass_time(0.0)
    assert [key for key, _, _ in place.calls] == [b"y"]


def test_a_row_that_cannot_be_delivered_does_not_hold_up_the_others():
    place = decided()
    place.answer(LOST)
    place.answer(LOST)
    place.anchor(2, put(b"b"), others=(b"z",))
    place.settle()
    settled(place, place.finalize(2, b"b", 150))
    place.pass_time(0.11)
    assert [key for key, _, _ in place.calls] == [b"z"]


# ---------------------------------------------------------------- readers of decided parts never loop


def met() -> tuple[Range, Asked]:
    """A reader met the part of transaction 1 at b'x', and its anchor was asked."""
    place = held()
    reader = place.read(b"x")
    place.stamp()
    assert [(key, type(request).__name__) for key, request, _ in place.calls] == [
        (b"zz", "QueryTxn")
    ]
    return place, reader


def test_a_reader_rests_when_raft_refuses_the_resolution_of_what_it_met() -> None:
    place, reader = met()
    place.answer(TxnReply(0, TxnStatus.COMMITTED, 101))
    place.evaluator.dropped(place.take(), "throttled")
    place.evaluator.run_again(place.now)
    assert (place.calls, place.take()) == ([], [])  # else the two would go on for ever in no time
    place.pass_time(0.1)
    place.answer(TxnReply(0, TxnStatus.COMMITTED, 101))
    place.settle()
    assert reader.reply.versions == [101]


def test_a_reader_rests_while_its_answer_cannot_be_used() -> None:
    """Another command of the same transaction is on its way, so the part cannot be resolved yet."""
    place, reader = met()
    place.fence(1, b"y")
    fence = place.take()
    place.answer(TxnReply(0, TxnStatus.COMMITTED, 101))
    place.evaluator.run_again(place.now)
    assert (place.calls, place.take()) == ([], [])
    place.commit(fence)
    place.pass_time(0.1)
    place.answer(TxnReply(0, TxnStatus.COMMITTED, 101))
    place.settle()
    assert reader.reply.versions == [101]
