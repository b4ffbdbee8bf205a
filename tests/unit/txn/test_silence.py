"""Claims O5 and O6 of what waits for the oracle (txn/silence.py): while it is away, everybody is answered in a bounded time,
nothing that was given up leaves a trace or piles up, and questions to other ranges are asked once at a time."""

from __future__ import annotations

import pytest

from tests.unit.txn.txn_driver import Asked, Range, put, settled, stored
from txn.evaluate import Limits
from txn.messages import Changed, Changes, Failure, LockRead, QueryMode, TxnReply
from txn.silence import LOOK_S
from txn.types import PartStatus, TxnStatus, make_txn_id

WAIT_S = Limits().read_wait_s


def silent(place: Range, seconds: float) -> None:
    """Time passes without the oracle."""
    steps = int(seconds / 0.25)
    for _ in range(steps):
        place.pass_time(0.25)


def gave_up(asked: Asked) -> bool:
    return isinstance(asked.reply, Failure) and asked.reply.code == "unavailable"


def nobody_waits(place: Range) -> bool:
    evaluator = place.evaluator
    kept = (evaluator.untimed, evaluator.await_read, evaluator.await_fresh, evaluator.latches.txns)
    return not any(kept)


@pytest.mark.parametrize("asked_already", [False, True], ids=["in the queue", "in a question"])
def test_a_reader_is_told_when_the_oracle_is_silent_and_a_late_answer_is_not_for_it(asked_already):
    place = Range()
    stored(place, b"k")
    asked = [place.read(b"k"), place.scan(b"a", b"z", 0)]
    readers = place.evaluator.await_read
    if asked_already:
        place.evaluator.await_read = []
    silent(place, WAIT_S - 0.25)
    assert all(each.open for each in asked)
    silent(place, 0.25)
    assert all(gave_up(each) for each in asked)
    assert nobody_waits(place)
    if asked_already:
        place.evaluator.silence.ask_again([], readers)
        assert not place.evaluator.await_read, "they are not asked for again"
        place.evaluator.give_timestamps([], 0, readers, place.clock, place.now)
    assert all(len(each.replies) == 1 for each in asked)


def test_those_who_came_later_wait_as_long_and_one_timer_serves_all():
    place = Range()
    asked = []
    for number in range(40):
        asked.append(place.read(b"k%d" % number))
        place.pass_time(0.1)
    timers = len(place.evaluator._timers)
    assert timers == 1
    place.pass_time(WAIT_S + LOOK_S - 4.0)
    first = sum(not each.open for each in asked)
    assert 0 < first < 40
    for _ in range(10):
        place.pass_time(LOOK_S)
    assert all(gave_up(each) for each in asked)
    assert place.evaluator.deadline() is None, "and when nobody waits, it rests"


def test_a_poll_is_told_nothing_and_asks_again():
    place = Range()
    stored(place, b"k")
    place.lead()
    asked = place.ask(Changes(1, 0, 0, 0, b"", b"", 10, 1 << 20, 0, 250))
    silent(place, WAIT_S + 1.0)
    assert asked.reply == Changed(1, 0, [], [], [])
    assert place.evaluator.feed.node.open == 0
    assert nobody_waits(place)


def test_a_prepare_that_is_given_up_leaves_no_trace_and_may_be_tried_again():
    place = Range()
    asked = place.part(1, put(b"k"))
    pendings = place.evaluator.await_fresh
    place.evaluator.await_fresh = []
    silent(place, WAIT_S)
    assert gave_up(asked)
    assert nobody_waits(place)
    place.evaluator.silence.ask_again(pendings, [])
    assert not place.evaluator.await_fresh
    place.clock += 1
    place.evaluator.give_timestamps(pendings, place.clock, [], place.clock, place.now)
    assert place.take() == [], "a timestamp that comes late is nobody's"
    assert place.log == []
    assert settled(place, place.part(1, put(b"k"))).reply.status == PartStatus.PREPARED


def test_those_behind_a_prepare_that_is_given_up_are_given_up_in_their_own_time():
    """Else the n-th writer of a key would wait n times as long, while clients add others."""
    place = Range()
    first = place.prepare(1, put(b"k"))
    asked = [place.prepare(number, put(b"k")) for number in range(2, 12)]
    place.pass_time(2.5)
    later = place.prepare(20, put(b"k"))
    asked.append(place.read(b"k", at=place.clock))
    asked.append(place.fence(1, b"k"))
    silent(place, 2.5)
    assert gave_up(first)
    assert all(gave_up(each) for each in asked[:-2])
    assert later.open, "it has time left, and is in front now"
    place.settle()
    assert later.reply.status == PartStatus.COMMITTED
    assert asked[-2].reply.values == [None]
    assert asked[-1].reply.status == PartStatus.FENCED


def test_a_locking_read_of_a_fresh_snapshot_is_told_too():
    place = Range()
    owner = make_txn_id(1, 5)
    asked = place.ask(LockRead(1, 0, 0, b"k", owner, 1, wait_s=1.0, fresh=True))
    silent(place, WAIT_S)
    assert gave_up(asked)


def test_an_orphan_asks_its_anchor_once_at_a_time():
    place = Range()
    settled(place, place.part(1, put(b"k")))
    for _ in range(10):
        place.pass_time(2.1)
    (call,) = place.calls
    assert call[1].mode == QueryMode.ORPHAN
    place.answer(Failure(0, "unavailable"))
    place.pass_time(2.1)
    (call,) = place.calls
    place.answer(TxnReply(0, TxnStatus.ABORTED))
    assert not settled(place, place.read(b"k")).reply.values[0]
    assert place.state.parts == {}


def test_an_anchor_fences_each_part_once_at_a_time():
    place = Range()
    settled(place, place.anchor(1, put(b"c"), others=(b"x", b"y")))
    for _ in range(10):
        place.pass_time(1.1)
    assert sorted(call[1].locus for call in place.calls) == [b"c", b"x", b"y"]
    waiting = place.outcome(1, b"c")
    assert len(place.calls) == 3
    for number, call in enumerate(place.calls):
        if call[1].locus == b"x":
            place.answer(Failure(0, "unavailable"), number)
            break
    place.pass_time(1.1)
    assert sorted(call[1].locus for call in place.calls) == [b"c", b"x", b"y"]
    assert waiting.open
