"""Claims of the check of guards (C1, C2 of txn/guards.py): it is exact, it holds no node, and nothing slips in meanwhile."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.txn.txn_driver import Asked, Range, put, settled, stored, txn_id
from txn import guards
from txn.commands import Collect, Garbage
from txn.guards import STEP_S, GuardCheck
from txn.messages import Validate
from txn.recent import Recent
from txn.types import FenceReason, Guard, PartStatus, Write, WriteKind, point_end

SPAN = (b"k", b"l")


def place_of(rows: int, *, value: bytes = b"old") -> tuple[Range, int]:
    """A range with so many keys in SPAN and a new leader that remembers no commit; and a timestamp before it began to lead."""
    place = Range(end=b"x")
    for number in range(rows):
        stored(place, b"k%03d" % number, value)
    stored(place, b"other")  # so that the leader does not know what was committed since `before`
    before = place.clock - 1
    place.lead()
    return place, before


def reader(
    place: Range, read_ts: int, *, number: int = 1, span: tuple[bytes, bytes] = SPAN, **fields: int
) -> Asked:
    """A transaction that has read the span at read_ts, and writes elsewhere."""
    write, fields = put(b"mine%d" % number), {"begin_ts": read_ts, **fields}
    return place.prepare(number, write, guards=[Guard(*span, read_ts)], **fields)


def walked(place: Range, asked: Asked, steps: int = 1_000) -> Asked:
    """Let slices pass until the transaction has its answer."""
    for _ in range(steps):
        place.settle()
        if asked.replies:
            break
        place.pass_time(STEP_S)
    return asked


@pytest.mark.parametrize("span", [(b"k", b""), (b"", b""), (b"k", b"k"), (b"l", b"k")])
def test_a_guard_that_covers_nothing_is_refused_whatever_is_in_flight(span):
    """An empty end, taken for the end of all keys by some checks, would let every writer that is latched or prepared pass."""
    place = Range()
    settled(place, place.part(5, put(b"kk")))
    assert reader(place, 150, span=span).reply.code == "invalid_argument"


@pytest.fixture
def ten_at_once(monkeypatch):
    monkeypatch.setattr(guards, "SLICE", 10)


class Scans:
    """Counts the rows that are scanned."""

    def __init__(self, place: Range, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = 0
        scan = place.rows.scan

        def counted(*args, **fields):
            for item in scan(*args, **fields):
                self.rows += 1
                yield item

        monkeypatch.setattr(place.rows, "scan", counted)


# -- from what was committed lately


def test_who_read_while_this_leader_has_led_is_checked_without_a_look_at_the_rows(monkeypatch):
    place, _ = place_of(50)
    scans = Scans(place, monkeypatch)
    assert settled(place, reader(place, place.clock)).reply.status == PartStatus.COMMITTED
    read_ts = place.clock
    version = stored(place, b"k777", b"new")
    refused = settled(place, reader(place, read_ts, number=2)).reply
    assert (refused.status, refused.reason) == (PartStatus.FENCED, FenceReason.CONFLICT)
    assert (refused.key, refused.other_version) == (b"k777", version)
    assert scans.rows == 0


def test_a_deletion_counts_and_a_write_beside_the_span_does_not():
    place, _ = place_of(3)
    read_ts = place.clock
    stored(place, b"l", b"beside")
    assert settled(place, reader(place, read_ts)).reply.status == PartStatus.COMMITTED
    settled(place, place.prepare(50, Write(WriteKind.DELETE, b"k001"), begin_ts=read_ts))
    assert settled(place, reader(place, read_ts, number=2)).reply.key == b"k001"


@given(
    written=st.lists(st.integers(0, 9), max_size=20),
    rows_max=st.integers(2, 8),
    back=st.integers(0, 12),
    span=st.tuples(st.integers(0, 9), st.integers(0, 10)),
)
def test_what_was_committed_lately_says_the_same_as_the_rows(written, rows_max, back, span):
    place = Range()
    place.state.recent = Recent(rows_max)
    for key in written:
        stored(place, b"%d" % key)
    low, high = min(span), max(span) + 1
    guard = Guard(b"%d" % low, b"%d" % high if high < 10 else b":", place.clock - back)
    check = GuardCheck(place.evaluator)
    answered = check.look([guard])
    place.state.recent.low = 1 << 62  # it knows nothing: the rows are walked
    assert check.look([guard]) == answered


@given(
    written=st.lists(st.integers(0, 9), max_size=20),
    back=st.integers(0, 12),
    spans=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 10)), min_size=1, max_size=12),
)
def test_many_spans_are_answered_as_each_alone(written, back, spans):
    place = Range()
    for key in written:
        stored(place, b"%d" % key)
    read_ts = place.clock - back
    several = [Guard(b"%d" % min(span), b"%d/" % max(span), read_ts) for span in spans]
    check = GuardCheck(place.evaluator)
    refusals = [refusal for guard in several if (refusal := check.look([guard])[0]) is not None]
    assert check.look(several) == (refusals[0] if refusals else None, [])


def test_many_spans_cost_one_look_at_what_was_committed_lately(monkeypatch):
    """10,000 spans, which a transaction may read, times all that is remembered: that would hold the node for seconds."""
    place, _ = place_of(50)
    looks = []
    between = Recent.between

    def counted(recent: Recent, *bounds):
        looks.append(bounds)
        return between(recent, *bounds)

    monkeypatch.setattr(Recent, "between", counted)
    read_ts = place.clock
    stored(place, b"other", b"new")
    several = [Guard(b"k%03d" % number, b"k%03d/" % number, read_ts) for number in range(500)]
    asked = place.prepare(1, put(b"mine"), guards=several, begin_ts=read_ts)
    assert settled(place, asked).reply.status == PartStatus.COMMITTED
    assert len(looks) == 1


@pytest.mark.usefixtures("ten_at_once")
def test_spans_of_many_snapshots_are_checked_in_slices():
    place, _ = place_of(3)
    first = place.clock
    for number in range(30):
        stored(place, b"new%d" % number)
    several = [Guard(b"k%03d" % back, b"k%03d/" % back, first + back) for back in range(20)]
    check = GuardCheck(place.evaluator)
    refusal, rest = check.look(several)
    assert (refusal, rest) == (None, several[1:])
    asked = place.prepare(1, put(b"mine"), guards=several, begin_ts=first)
    assert walked(place, asked).reply.status == PartStatus.COMMITTED


# -- from the rows, in slices


def test_an_older_read_has_the_rows_walked_and_finds_what_is_newer():
    place, before = place_of(5)
    assert settled(place, reader(place, before)).reply.status == PartStatus.COMMITTED
    version = stored(place, b"k002", b"new")
    refused = settled(place, reader(place, before, number=2)).reply
    assert (refused.key, refused.other_version) == (b"k002", version)


@pytest.mark.usefixtures("ten_at_once")
def test_a_wide_span_is_walked_in_slices_before_a_timestamp_is_asked_for(monkeypatch):
    place, before = place_of(35)
    scans = Scans(place, monkeypatch)
    asked = reader(place, before)
    slices = []
    while not place.evaluator.await_fresh:
        place.settle()
        assert asked.open
        assert place.evaluator.deadline() == pytest.approx(place.now + STEP_S)
        slices.append(scans.rows)
        scans.rows = 0
        place.pass_time(STEP_S)
    assert slices == [11, 11, 11]  # the last of each is looked at again: the next one begins there
    assert settled(place, asked).reply.status == PartStatus.COMMITTED


@pytest.mark.usefixtures("ten_at_once")
def test_between_two_slices_others_are_served_and_writers_of_the_span_wait():
    place, before = place_of(35)
    asked = reader(place, before)
    writer, elsewhere = place.prepare(2, put(b"k030")), place.prepare(3, put(b"far"))
    place.settle()
    assert elsewhere.reply.status == PartStatus.COMMITTED
    assert settled(place, place.read(b"k030")).reply.values == [b"old"]
    assert writer.open
    assert walked(place, asked).reply.status == PartStatus.COMMITTED
    assert settled(place, writer).reply.ts > asked.reply.ts


@pytest.mark.usefixtures("ten_at_once")
def test_what_is_newer_in_the_last_slice_is_found_and_the_refusal_is_durable():
    place, before = place_of(35)
    version = stored(place, b"k034", b"new")
    place.lead()
    asked = walked(place, reader(place, before))
    assert asked.reply.status == PartStatus.FENCED
    assert (asked.reply.key, asked.reply.other_version) == (b"k034", version)
    assert not place.evaluator.latches.txns
    place.lead()
    again = place.ask(asked.request)
    assert again.reply.status == PartStatus.FENCED


@pytest.mark.usefixtures("ten_at_once")
def test_a_tombstone_that_is_collected_during_the_walk_is_not_missed():
    place, before = place_of(35)
    deleted = settled(place, place.prepare(2, Write(WriteKind.DELETE, b"k034"))).reply.ts
    place.lead()
    asked = reader(place, before, begin_ts=deleted + 1)  # else it would have expired
    place.settle()
    assert asked.open
    place.apply([Collect(deleted, [Garbage(b"k034", [], deleted)])])
    assert walked(place, asked).reply.status == PartStatus.FENCED


@pytest.mark.usefixtures("ten_at_once")
def test_a_leader_that_steps_down_amid_a_walk_leaves_nothing_behind():
    place, before = place_of(35)
    asked = reader(place, before)
    evaluator = place.evaluator
    place.lead()
    assert asked.reply.code == "not_leader"
    assert evaluator.guard_check.deadline() is None
    assert walked(place, place.ask(asked.request)).reply.status == PartStatus.COMMITTED


@pytest.mark.usefixtures("ten_at_once")
def test_two_walks_take_turns():
    place, before = place_of(60)
    wide = reader(place, before)
    short = reader(place, before, number=2, span=(b"k", b"k015"))
    place.pass_time(STEP_S)
    place.pass_time(STEP_S)
    assert settled(place, short).reply.status == PartStatus.COMMITTED
    assert wide.open
    assert walked(place, wide).reply.status == PartStatus.COMMITTED


@pytest.mark.usefixtures("ten_at_once")
def test_a_retry_and_a_fence_wait_for_the_walk():
    place, before = place_of(35)
    asked = reader(place, before)
    retry = place.ask(asked.request)
    fence = place.fence(1, b"mine1", begin_ts=before)
    assert walked(place, asked).reply.status == PartStatus.COMMITTED
    place.settle()
    assert retry.reply.status == PartStatus.COMMITTED
    assert fence.reply.status == PartStatus.COMMITTED


@pytest.mark.usefixtures("ten_at_once")
def test_large_rows_make_smaller_slices(monkeypatch):
    place, before = place_of(12, value=bytes(5 * 1024))
    scans = Scans(place, monkeypatch)
    reader(place, before)
    assert scans.rows == 3


@pytest.mark.usefixtures("ten_at_once")
def test_a_fast_guard_over_too_many_rows_is_refused_and_holds_nothing():
    place, before = place_of(35)
    question = Validate(0, 0, 0, place.clock, txn_id(9), 50, [Guard(*SPAN, before)])
    assert place.ask(question).reply.code == "unavailable"
    few = Validate(0, 0, 0, place.clock, txn_id(9), 50, [Guard(b"k", point_end(b"k005"), before)])
    assert place.ask(few).reply.unchanged
    assert not place.evaluator.latches.txns
    assert place.evaluator.guard_check.deadline() is None


@pytest.mark.usefixtures("ten_at_once")
def test_single_keys_are_looked_up_in_slices_too():
    place, before = place_of(35)
    several = [
        Guard(b"k%03d" % number, point_end(b"k%03d" % number), before) for number in range(35)
    ]
    check = GuardCheck(place.evaluator)
    assert check.look(several) == (None, several[10:])
    asked = place.prepare(1, put(b"mine"), guards=several, begin_ts=before)
    slices = 0
    while not place.evaluator.await_fresh:
        place.settle()
        place.pass_time(STEP_S)
        slices += 1
    assert slices == 3
    assert settled(place, asked).reply.status == PartStatus.COMMITTED
    version = stored(place, b"k034", b"new")
    refused = walked(
        place, place.prepare(2, put(b"mine"), guards=several, begin_ts=place.clock)
    ).reply
    assert (refused.key, refused.other_version) == (b"k034", version)
