"""Claims Q1 to Q4 (txn/asking.py): many questions to other ranges go a bounded number at a time, all of them have their turn,
and those that are not answered do not keep the others from it."""

from __future__ import annotations

from tests.unit.txn.txn_driver import Range, put, settled, txn_id
from txn.asking import IN_FLIGHT_MAX
from txn.messages import Failure, PartReply, TxnReply
from txn.types import PartStatus, TxnStatus

LOST = Failure(0, "unavailable")


def orphans(count: int, anchor_key: bytes = b"zz") -> Range:
    """Parts 1 to `count` at b'x000001' and so on, old enough to be asked about."""
    place = Range()
    for number in range(1, count + 1):
        key = b"x%06d" % number
        place.prepare(number, put(key), anchor_key=anchor_key, one_range=False)
    place.settle()
    assert len(place.state.parts) == count
    place.pass_time(place.limits.orphan_timer_s)
    return place


def asked_about(place: Range) -> list[bytes]:
    return [request.txn_id for _, request, _ in place.calls]


def test_of_many_orphans_so_many_are_asked_about_at_a_time_and_the_rest_follow_in_order():
    place = orphans(3_000)
    assert len(place.calls) == IN_FLIGHT_MAX
    asked = asked_about(place)
    for number in range(1, 3_001):
        place.answer(TxnReply(0, TxnStatus.ABORTED))
        if number % 100 == 0:
            assert len(place.calls) == min(IN_FLIGHT_MAX, 3_000 - number)
            asked += asked_about(place)[-100:] if number <= 3_000 - IN_FLIGHT_MAX else []
    assert asked == [txn_id(number) for number in range(1, 3_001)]
    place.settle()
    assert place.state.parts == {}


def test_who_waits_to_be_asked_about_is_left_out_once_it_is_resolved_and_not_asked_about_twice():
    place = orphans(IN_FLIGHT_MAX + 2)
    place.pass_time(place.limits.orphan_timer_s)
    settled(place, place.resolve(IN_FLIGHT_MAX + 1, b"x%06d" % (IN_FLIGHT_MAX + 1), 0))
    for _ in range(3):
        place.answer(TxnReply(0, TxnStatus.STAGED))
    assert asked_about(place) == [
        txn_id(number) for number in (*range(4, IN_FLIGHT_MAX + 1), IN_FLIGHT_MAX + 2)
    ]


def test_a_new_leader_asks_about_those_that_had_not_had_their_turn():
    place = orphans(IN_FLIGHT_MAX + 10)
    place.lead()
    place.pass_time(place.limits.orphan_timer_s)
    while place.calls:
        place.answer(TxnReply(0, TxnStatus.ABORTED))
    place.settle()
    assert place.state.parts == {}


def silence(place: Range, anchor_key: bytes) -> None:
    """Whatever was asked there ends without an answer."""
    asked = [call_id for key, _, call_id in place.calls if key == anchor_key]
    place.calls = [call for call in place.calls if call[0] != anchor_key]
    for call_id in asked:
        place.evaluator.recovery.on_reply(call_id, LOST, place.now)


def test_orphans_whose_anchor_is_silent_do_not_keep_others_from_being_asked_about():
    """Once they are known to be silent: they have half of the room, however many they are."""
    place = orphans(3 * IN_FLIGHT_MAX, b"silent")
    for _ in range(3):
        silence(place, b"silent")
    place.pass_time(place.limits.orphan_timer_s)
    assert asked_about(place) == [txn_id(number) for number in range(1, IN_FLIGHT_MAX // 2 + 1)]
    late = range(10_000, 10_000 + IN_FLIGHT_MAX // 2)
    for number in late:
        place.part(number, put(b"y%06d" % number))
    place.settle()
    place.pass_time(place.limits.orphan_timer_s)
    assert [key for key, _, _ in place.calls].count(b"zz") == len(late)
    while place.calls[-1][0] == b"zz":
        place.answer(TxnReply(0, TxnStatus.ABORTED), len(place.calls) - 1)
    place.settle()
    assert len(place.state.parts) == 3 * IN_FLIGHT_MAX
    for _ in range(6):  # the silent ones are asked about in turns, and found when it answers again
        silence(place, b"silent")
    assert len(place.calls) == 0
    place.pass_time(place.limits.orphan_timer_s)
    while place.calls:
        place.answer(TxnReply(0, TxnStatus.ABORTED))
    place.settle()
    assert place.state.parts == {}


def test_writers_who_gave_up_have_so_many_questions_at_a_time_and_the_rest_follow():
    count = IN_FLIGHT_MAX + 5
    place = Range()
    for number in range(1, count + 1):
        place.part(number, put(b"x%06d" % number))
    place.settle()
    for number in range(1, count + 1):
        place.part(count + number, put(b"x%06d" % number), begin_ts=50)  # younger: refused
    place.settle()
    assert len(place.calls) == IN_FLIGHT_MAX
    asked = asked_about(place)
    for _ in range(5):
        place.answer(TxnReply(0, TxnStatus.ABSENT))
    asked += asked_about(place)[-5:]
    assert asked == [txn_id(number) for number in range(1, count + 1)]


def anchors(count: int) -> Range:
    """Staged transactions 1 to `count`, each with a part at b'x', and the timers of all are up."""
    place = Range(b"", b"m")
    for number in range(1, count + 1):
        place.anchor(number, put(b"a%06d" % number), others=(b"x",))
    place.settle()
    assert len(place.state.staged) == count
    place.pass_time(place.limits.anchor_timer_s)
    return place


def test_of_many_staged_transactions_so_many_fences_are_on_their_way_at_a_time():
    place = anchors(IN_FLIGHT_MAX)  # two fences each
    assert len(place.calls) == IN_FLIGHT_MAX
    place.pass_time(place.limits.anchor_timer_s)
    assert len(place.calls) == IN_FLIGHT_MAX
    while place.calls:
        place.answer(PartReply(0, PartStatus.PREPARED, place.clock))
        assert len(place.calls) <= IN_FLIGHT_MAX
    place.settle()
    assert place.state.staged == {}
    assert len(place.state.outbox) == IN_FLIGHT_MAX


def test_parts_that_do_not_answer_a_fence_do_not_keep_others_from_being_asked():
    place = anchors(IN_FLIGHT_MAX)
    while place.calls:
        place.answer(
            LOST if place.calls[0][0] == b"x" else PartReply(0, PartStatus.PREPARED, place.clock)
        )
    place.pass_time(place.limits.anchor_timer_s)
    assert [key for key, _, _ in place.calls] == [b"x"] * (IN_FLIGHT_MAX // 2)
    place.anchor(20_000, put(b"b"), others=(b"y",))
    place.settle()
    place.pass_time(place.limits.anchor_timer_s)
    assert [key for key, _, _ in place.calls[IN_FLIGHT_MAX // 2 :]] == [b"b", b"y"]


def test_whose_outcome_a_client_waits_for_is_asked_about_first():
    place = anchors(IN_FLIGHT_MAX)
    place.outcome(IN_FLIGHT_MAX, b"a%06d" % IN_FLIGHT_MAX)
    for _ in range(2):
        place.answer(PartReply(0, PartStatus.PREPARED, place.clock))
    assert asked_about(place)[-2:] == [txn_id(IN_FLIGHT_MAX)] * 2
