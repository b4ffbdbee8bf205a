"""Claims of reads and scans: whom a reader waits for, whom it asks, and that it sees all below its timestamp and no more."""

from __future__ import annotations

import pytest

from tests.unit.txn.txn_driver import Asked, Pulled, Range, put, settled, stored, txn_id
from txn import reads
from txn.messages import Failure, QueryMode, TxnReply
from txn.mvcc import encode_latest
from txn.types import PartStatus, TxnStatus, Write, WriteKind


def test_a_read_without_a_timestamp_gets_the_last_one_issued():
    place = Range()
    version = stored(place, b"a")
    place.clock = 200
    asked = settled(place, place.read(b"a", b"b"))
    assert (asked.reply.at, asked.reply.versions) == (200, [version, 0])
    assert asked.reply.values == [b"old", None]
    assert asked.confirm


def test_a_reader_waits_for_the_latches_that_were_there_when_it_came():
    place = Range()
    place.prepare(1, put(b"a"))
    place.stamp()
    reader = place.read(b"a", at=101)
    assert reader.open
    place.commit()
    assert reader.reply.versions == [101]


def test_a_reader_does_not_wait_for_latches_taken_after_it_came():
    place = Range()
    place.prepare(1, put(b"a"))
    place.stamp()
    reader = place.read(b"a", b"b", at=101)
    first = place.take()
    later = place.prepare(2, put(b"b"))
    place.commit(first)
    assert reader.reply.versions == [101, 0]
    place.settle()
    assert later.reply.ts > 101


def test_a_reader_without_a_timestamp_waits_for_latches_taken_until_it_got_one():
    place = Range()
    reader = place.read(b"a")
    place.prepare(1, put(b"a"))
    place.stamp()  # both at once: the read's timestamp is the write's
    assert reader.open
    place.commit()
    assert (reader.reply.at, reader.reply.versions) == (101, [101])


def test_a_read_before_the_collected_past_is_refused():
    place = Range()
    place.state.row.gc_threshold = 60
    assert place.read(b"a", at=59).reply.code == "snapshot_too_old"
    assert place.read(b"a", at=60).reply.versions == [0]


def test_a_reader_below_an_undecided_min_ts_sees_past_it():
    place = Range()
    settled(place, place.part(1, put(b"a")))
    assert place.read(b"a", at=100).reply.versions == [0]
    assert place.calls == []


def undecided() -> tuple[Range, Asked]:
    """A reader at 101 met a part that is prepared at 101."""
    place = Range()
    settled(place, place.part(1, put(b"a")))
    reader = place.read(b"a", at=101)
    assert reader.open
    ((key, question, _),) = place.calls
    assert (key, question.mode, question.read_ts) == (b"zz", QueryMode.READ, 101)
    return place, reader


def test_a_reader_of_an_undecided_key_asks_the_anchor_and_waits_until_the_commit_is_applied():
    place, reader = undecided()
    place.answer(TxnReply(0, TxnStatus.COMMITTED, 101))
    assert reader.open
    place.settle()
    assert reader.reply.versions == [101]


def test_a_reader_sees_nothing_of_what_was_aborted():
    place, reader = undecided()
    place.answer(TxnReply(0, TxnStatus.ABORTED))
    place.settle()
    assert reader.reply.versions == [0]
    assert place.state.parts == {}


def test_what_is_invisible_to_a_reader_is_invisible_to_earlier_ones_and_asked_for_later_ones():
    place, reader = undecided()
    place.answer(TxnReply(0, TxnStatus.INVISIBLE))
    assert reader.reply.versions == [0]
    assert place.read(b"a", at=101).reply.versions == [0]
    place.clock = 150
    settled(place, later := place.read(b"a", at=150))
    assert later.open
    assert place.calls[0][1].read_ts == 150


def test_readers_share_one_question():
    place, _ = undecided()
    second = place.read(b"a", at=101)
    assert len(place.calls) == 1
    place.answer(TxnReply(0, TxnStatus.INVISIBLE))
    assert second.reply.versions == [0]


def test_a_reader_that_got_no_answer_asks_again_until_its_time_is_up():
    place, reader = undecided()
    while reader.open:
        while place.calls:
            place.answer(Failure(0, "unavailable"))
        place.pass_time(0.1)
        assert place.now < 6.0
    assert reader.reply.code == "unavailable"
    assert place.now > 5.0


def test_a_reader_above_every_known_timestamp_is_checked_before_it_asks():
    place = Range()
    settled(place, place.part(1, put(b"a")))
    reader = place.read(b"a", at=5000)
    assert place.calls == []
    place.stamp()
    assert reader.reply.code == "invalid_argument"


def test_a_read_of_many_keys_reads_few_bytes_and_answers_the_first_ones():
    place = Range()
    keys = [b"k%03d" % number for number in range(100)]
    for key in keys:
        stored(place, key)
    at = place.clock
    for key in keys:
        stored(place, key, bytes(64 << 10))
    pulled, left, answers = Pulled(place.rows), keys, 0
    while left:
        reply = place.read(*left, at=at).reply
        assert reply.values == [b"old"] * len(reply.values) != []
        assert pulled.taken() <= reads.READ_BYTES_MAX + (128 << 10)
        left, answers = left[len(reply.values) :], answers + 1
    assert answers == 2


# -- scans


def test_a_scan_of_all_keys_is_not_for_a_range_that_begins_later():
    place = Range(b"m", b"")
    assert place.scan(b"", b"", 100).reply.code == "epoch_mismatch"
    assert place.scan(b"m", b"", 100).reply.keys == []
    assert Range(b"", b"m").scan(b"m", b"m", 100).reply.keys == [], "an empty span is anywhere"


def test_a_scan_stops_at_its_limit_and_tells_how_far_it_came():
    place = Range()
    for key in (b"a", b"b", b"c"):
        stored(place, key)
    forward = place.scan(b"", b"z", 200, rows_max=2).reply
    assert (forward.keys, forward.done, forward.covered_to) == ([b"a", b"b"], False, b"b\x00")
    backward = place.scan(b"", b"z", 200, rows_max=2, reverse=True).reply
    assert (backward.keys, backward.done, backward.covered_to) == ([b"c", b"b"], False, b"b")
    whole = place.scan(b"", b"", 200, keys_only=True).reply
    assert (whole.keys, whole.values, whole.done) == ([b"a", b"b", b"c"], [], True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("why", ["deleted", "too new"])
def test_a_page_looks_at_few_keys_without_a_value_and_the_next_goes_on(
    why: str, reverse: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reads, "SCAN_HIDDEN_MAX", 3)
    place = Range()
    hidden = [b"d%d" % number for number in range(8)]
    at = max(stored(place, key) for key in (b"a", b"e", b"z"))
    for key in hidden:
        stored(place, key)
        if why == "deleted":
            at = settled(place, place.prepare(50, Write(WriteKind.DELETE, key), begin_ts=place.clock)).reply.ts  # fmt: skip
    low, high, keys, pages = b"", b"zz", [], 0
    while True:
        reply = place.scan(low, high, at, reverse=reverse).reply
        keys += reply.keys
        pages += 1
        if reply.done:
            break
        low, high = (low, reply.covered_to) if reverse else (reply.covered_to, high)
    assert keys == ([b"z", b"e", b"a"] if reverse else [b"a", b"e", b"z"])
    assert pages == 3


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("what", ["keys only", "too new", "older values"])
def test_a_page_reads_few_bytes_whatever_it_tells_and_the_next_goes_on(what: str, reverse: bool):
    place = Range()
    large = bytes(64 << 10)
    names = [b"k%02d" % number for number in range(40)]
    for key in (b"a", *(names if what == "older values" else ()), b"z"):
        stored(place, key)
    at = place.clock
    for key in names:
        stored(place, key, large)
    if what == "keys only":
        at = place.clock
    pulled = Pulled(place.rows)
    low, high, keys, pages = b"", b"zz", [], 0
    while True:
        reply = place.scan(low, high, at, reverse=reverse, rows_max=1_000, keys_only=True).reply
        assert pulled.taken() <= reads.SCAN_READ_BYTES_MAX + 3 * (len(large) + 25)
        keys += reply.keys
        pages += 1
        if reply.done:
            break
        low, high = (low, reply.covered_to) if reverse else (reply.covered_to, high)
    wanted = [b"a", *(names if what != "too new" else ()), b"z"]
    assert keys == (wanted[::-1] if reverse else wanted)
    assert pages >= 3


def test_a_scan_asks_about_undecided_keys_within_what_it_covered_only():
    place = Range()
    for key in (b"a", b"c"):
        stored(place, key)
    settled(place, place.part(1, put(b"b")))
    assert place.scan(b"", b"z", place.clock, rows_max=1).reply.keys == [b"a"]
    assert place.calls == []
    whole = place.scan(b"", b"z", place.clock)
    assert whole.open
    assert len(place.calls) == 1


def test_a_scan_waits_for_a_key_in_flight_that_was_not_there_before():
    place = Range()
    place.prepare(1, put(b"b"))
    place.stamp()
    scan = place.scan(b"a", b"c", place.clock)
    assert scan.open
    place.settle()
    assert scan.reply.keys == [b"b"]


def test_a_read_that_rests_after_no_answer_is_answered_when_the_leader_stops():
    place, reader = undecided()
    place.answer(Failure(0, "unavailable"))
    assert reader.open
    place.lead()
    assert reader.reply.code == "not_leader"


# -- what one turn has for reads (T1, T2)


def pages(place: Range, count: int) -> list[Asked]:
    """So many scans of as many rows as a page has, without a timestamp."""
    return [place.scan(b"k", b"l", 0, rows_max=1_000) for _ in range(count)]


def a_page_of_rows(place: Range) -> None:
    for number in range(1_000):
        place.rows.write({b"Lk%04d" % number: encode_latest(50, txn_id(number), b"v" * 100)})


def next_turn(place: Range) -> int:
    """How many go on."""
    turn = place.evaluator.turn
    turn.begin()
    count = 0
    for reader, waiter in turn.go_on():
        assert reader is place.evaluator.reader
        reader.go_on(waiter, place.now)
        count += 1
    return count


def test_readers_that_get_their_timestamp_at_once_look_in_several_turns():
    """They gathered behind one question to the oracle; 1,700 pages were one turn of six seconds."""
    place = Range()
    a_page_of_rows(place)
    next_turn(place)
    asked = pages(place, 10)
    place.stamp()
    done = [len([each for each in asked if not each.open])]
    while any(each.open for each in asked):
        assert next_turn(place) > 0
        done.append(len([each for each in asked if not each.open]))
        assert [each.open for each in asked] == sorted(each.open for each in asked), "in order"
    assert done == [4, 8, 10]
    assert all(len(each.reply.keys) == 1_000 and each.confirm for each in asked)
    assert (place.evaluator.turn.waiting_bytes, next_turn(place)) == (0, 0)


def test_a_reader_that_is_put_off_sees_what_it_would_have_seen():
    place = Range()
    a_page_of_rows(place)
    before = stored(place, b"a", b"before")
    early = place.prepare(1, put(b"b"))  # latched when the reader gets its timestamp
    next_turn(place)
    pages(place, 5)
    read, other = place.read(b"a"), place.read(b"b")
    place.stamp()
    assert read.open
    late = place.prepare(2, put(b"a", b"later"))  # latched afterwards
    place.stamp()
    in_flight = place.take()
    assert len(in_flight) == 2
    next_turn(place)
    assert read.reply.versions == [before], "it waits for nobody who came after its timestamp"
    assert other.open, "and for those who were there"
    place.commit(in_flight)
    assert (early.reply.status, late.reply.status) == (PartStatus.COMMITTED,) * 2
    next_turn(place)
    assert other.reply.versions == [early.reply.ts]
    assert other.reply.at < late.reply.ts


def test_who_is_put_off_is_told_when_the_leader_stops():
    place = Range()
    a_page_of_rows(place)
    next_turn(place)
    asked = pages(place, 10)
    place.stamp()
    place.evaluator.stop()
    left = [each.reply for each in asked if isinstance(each.reply, Failure)]
    assert [each.code for each in left] == ["not_leader"] * 6
    assert next_turn(place) == 0
