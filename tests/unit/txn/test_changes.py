"""Claims of polls at a leader (txn/changes.py): what they are told and when, that pages hold whole commits, what a poll from
further back costs, what is refused, and that no poll is left behind."""

from __future__ import annotations

import pytest

from replication.probes import counting
from tests.unit.txn.poll_driver import events, nothing_left, poll
from tests.unit.txn.txn_driver import Asked, Range, put, settled, stored
from txn import stamps
from txn.changes import PAGE_ROWS_MAX, Polls
from txn.commands import Collect, Garbage
from txn.evaluate import Limits
from txn.messages import Changed, Failure, TxnReply
from txn.types import TIMESTAMP_MAX, TxnStatus, Write, WriteKind, point_end


def found(place: Range, asked: Asked) -> Asked:
    """Let what is searched for be found."""
    settled(place, asked)
    for _ in range(1_000):
        if not asked.open:
            return asked
        place.pass_time(0.002)
        settled(place, asked)
    raise AssertionError("it is never found")


# --- what is told


def test_every_version_of_the_span_above_since_is_told_in_order_with_its_value():
    place = Range()
    first = stored(place, b"k", b"1")
    other = stored(place, b"x", b"elsewhere")
    second = stored(place, b"k", b"2")
    gone = settled(place, place.prepare(1, Write(WriteKind.DELETE, b"k"))).reply.ts
    asked = settled(place, poll(place, 0, b"k", b"l"))
    assert events(asked) == [(first, b"k", b"1"), (second, b"k", b"2"), (gone, b"k", None)]
    assert asked.reply.upto == gone
    assert asked.confirm, "it rests on what was not seen"
    assert other not in asked.reply.versions
    assert events(settled(place, poll(place, first, b"k", b"l")))[0][0] == second
    assert nothing_left(place)


def test_a_poll_that_finds_nothing_waits_for_a_commit_in_its_span_and_needs_no_oracle():
    place = Range()
    since = stored(place, b"k")
    by_key, by_span, elsewhere = (
        poll(place, since, b"k", point_end(b"k")),
        poll(place, since, b"a", b"m"),
        poll(place, since, b"x", b"z"),
    )
    settled(place, place.prepare(1, put(b"kk")))
    assert by_key.open
    assert [key for _, key, _ in events(by_span)] == [b"kk"]
    version = settled(place, place.prepare(2, put(b"k", b"new"))).reply.ts
    assert events(by_key) == [(version, b"k", b"new")]
    assert elsewhere.open
    assert not place.evaluator.untimed


def test_a_commit_over_ranges_wakes_when_it_is_resolved_at_its_version():
    place = Range()
    settled(place, place.part(1, put(b"k", b"v")))
    asked = poll(place, place.clock, b"k", point_end(b"k"))
    assert asked.open
    version = place.clock + 7
    settled(place, place.resolve(1, b"k", version))
    assert events(asked) == [(version, b"k", b"v")]


def test_a_commit_is_whole_and_its_keys_are_in_order():
    place = Range()
    asked = poll(place, place.clock, b"", b"")
    version = settled(place, place.prepare(1, put(b"m"), put(b"a"), put(b"k"))).reply.ts
    assert events(asked) == [(version, key, b"v") for key in (b"a", b"k", b"m")]


@pytest.mark.parametrize("limit", [{"rows_max": 1}, {"rows_max": 2}, {"bytes_max": 1}])
def test_a_page_ends_between_versions_and_holds_one_commit_at_least(limit):
    place = Range()
    first = settled(place, place.prepare(1, put(b"a"), put(b"b"), put(b"c"))).reply.ts
    second = stored(place, b"d")
    page = settled(place, poll(place, 0, **limit))
    assert page.reply.versions == [first] * 3
    assert page.reply.upto == first
    assert settled(place, poll(place, first, **limit)).reply.versions == [second]


def test_a_poll_that_something_undecided_blocks_for_too_long_is_told_that_nothing_is_known():
    place = Range()
    min_ts = settled(place, place.part(1, put(b"k"))).reply.ts
    with counting() as reached:
        asked = poll(place, 0, b"k", b"l", at=place.clock, wait_ms=1_000)
        settled(place, asked)
        place.pass_time(1.0 + place.limits.read_wait_s + 0.1)
        assert asked.open
        place.answer(TxnReply(0, TxnStatus.COMMITTED, min_ts))
        settled(place, asked)
    assert (events(asked), asked.reply.upto) == ([], 0)
    assert reached["poll_given_up"] == 1
    assert nothing_left(place)


def test_when_the_wait_is_over_the_answer_speaks_of_everything_up_to_a_fresh_timestamp():
    place = Range()
    asked = poll(place, place.clock, b"k", b"l", wait_ms=1_000)
    place.pass_time(0.9)
    settled(place, asked)
    assert asked.open
    place.clock += 50
    place.pass_time(1.0)
    settled(place, asked)
    assert (events(asked), asked.reply.upto) == ([], place.clock)
    assert asked.confirm
    assert nothing_left(place)


def test_an_explicit_timestamp_is_answered_at_once():
    place = Range()
    since = stored(place, b"k")
    place.clock += 10
    asked = settled(place, poll(place, since, b"k", b"l", at=place.clock))
    assert (events(asked), asked.reply.upto) == ([], place.clock)
    behind = poll(place, since, b"k", b"l", at=since - 1)
    assert behind.reply == Changed(0, since, [], [], [])


def test_without_a_wait_the_answer_is_what_there_is():
    place = Range()
    since = stored(place, b"k")
    asked = poll(place, since, wait_ms=0)
    assert asked.reply == Changed(0, since, [], [], [])
    assert not asked.confirm, "nothing is claimed"


# --- what is waited for


def test_a_writer_that_was_latched_before_is_waited_for():
    place = Range()
    since = stored(place, b"k")
    place.prepare(1, put(b"k", b"slow"))
    place.stamp()
    proposals = place.take()
    asked = poll(place, since, b"k", b"l", at=place.clock)
    assert asked.open
    place.commit(proposals)
    assert events(asked) == [(place.clock, b"k", b"slow")]


def test_an_undecided_write_is_asked_about():
    place = Range()
    settled(place, place.part(1, put(b"k", b"v")))
    min_ts = place.clock
    asked = settled(place, poll(place, 0, b"", b"", at=min_ts))
    assert asked.open
    place.answer(TxnReply(0, TxnStatus.COMMITTED, min_ts))
    settled(place, asked)
    assert events(asked) == [(min_ts, b"k", b"v")]


@pytest.mark.parametrize("of_one_key", [False, True])
def test_an_undecided_stamped_key_is_asked_about(of_one_key):
    place = Range()
    push = Write(WriteKind.STAMPED_KEY, b"q/", stamps.stamped(0, b"v"))
    min_ts = settled(place, place.part(1, push, locus=b"q/")).reply.ts
    key = b"q/" + stamps.stamp(min_ts, 0)
    start, end = (key, point_end(key)) if of_one_key else (b"q", b"r")
    asked = settled(place, poll(place, 0, start, end, at=min_ts))
    assert asked.open
    place.answer(TxnReply(0, TxnStatus.COMMITTED, min_ts))
    settled(place, asked)
    assert events(asked) == [(min_ts, key, b"v")]


def test_a_write_that_commits_later_is_not_in_the_page_and_comes_afterwards():
    place = Range()
    settled(place, place.part(1, put(b"k", b"v")))
    asked = settled(place, poll(place, 0, b"", b"", at=place.clock))
    place.answer(TxnReply(0, TxnStatus.INVISIBLE))
    settled(place, asked)
    assert events(asked) == []
    upto = asked.reply.upto
    settled(place, place.resolve(1, b"k", upto + 5))
    assert events(settled(place, poll(place, upto))) == [(upto + 5, b"k", b"v")]


def test_a_timestamp_that_was_not_issued_is_refused_before_anybody_is_asked():
    place = Range()
    settled(place, place.part(1, put(b"k")))
    asked = settled(place, poll(place, 0, at=place.clock + 1_000))
    assert isinstance(asked.reply, Failure)
    assert asked.reply.code == "invalid_argument"
    assert nothing_left(place)


# --- from further back


def history(place: Range, count: int) -> list[tuple[int, bytes, bytes]]:
    written = []
    for number in range(count):
        key, value = b"k%d" % (number % 7), b"v%d" % number
        written.append((stored(place, key, value), key, value))
    return written


def drain(place: Range, since: int, **fields) -> list[tuple[int, bytes, bytes | None]]:
    told = []
    for _ in range(1_000):
        asked = found(place, poll(place, since, wait_ms=1, **fields))
        told += events(asked)
        if asked.reply.upto >= place.clock:
            return told
        since = max(since, asked.reply.upto)
    raise AssertionError("it never came to the end")


@pytest.mark.parametrize("slice_rows", [1, 2, 512])
@pytest.mark.parametrize("rows_max", [3, 100])
def test_after_a_restart_stored_versions_are_searched(slice_rows, rows_max):
    place = Range()
    written = history(place, 40)
    place.lead()
    place.evaluator.feed.slice_rows = slice_rows
    assert place.state.recent.low == place.clock
    assert drain(place, 0, rows_max=rows_max) == written
    assert drain(place, written[9][0], rows_max=rows_max) == written[10:]
    one = [each for each in written if each[1] == b"k3"]
    assert drain(place, 0, start=b"k3", end=point_end(b"k3")) == one


def test_what_recent_forgot_is_searched_and_writers_go_on_meanwhile():
    place = Range()
    place.state.recent.rows_max = 4
    written = history(place, 30)
    place.evaluator.feed.slice_rows = 1
    asked = settled(place, poll(place, 0))
    assert asked.open
    later = stored(place, b"k0", b"later")
    assert events(found(place, asked)) == written, "and nothing above the timestamp of the search"
    assert later > asked.reply.upto


def test_a_full_backlog_keeps_the_oldest_and_says_how_far_it_came():
    place = Range()
    written = history(place, 30)
    place.lead()
    place.evaluator.feed.backlog_rows_max = 7
    asked = found(place, poll(place, 0))
    assert events(asked) == written[:7]
    assert asked.reply.upto == written[7][0] - 1
    assert drain(place, 0) == written


def test_a_commit_that_is_larger_than_a_backlog_is_found_whole():
    """Seed 90068 of the transaction simulation: nothing was left to drop in its stead."""
    place = Range()
    keys = [b"k%d" % number for number in range(5)]
    settled(place, place.prepare(1, *(Write(WriteKind.PUT, key, b"v") for key in keys)))
    place.lead()
    place.evaluator.feed.backlog_rows_max = 2
    assert [key for _, key, _ in drain(place, 0)] == keys


def test_pages_of_one_search_need_no_other():
    place = Range()
    written = history(place, 40)
    place.lead()
    since = 0
    told: list[tuple[int, bytes, bytes | None]] = []
    while len(told) < 40:
        asked = found(place, poll(place, since, rows_max=4))
        told += events(asked)
        since = asked.reply.upto
    assert told == written
    assert place.evaluator.feed.node.counters["searches_total"] == 1


def test_a_search_that_takes_longer_than_the_wait_goes_on_for_the_next_poll():
    place = Range()
    written = history(place, 20)
    place.lead()
    place.evaluator.feed.slice_rows = 1
    first = settled(place, poll(place, 0, wait_ms=1))
    place.pass_time(0.002)
    settled(place, first)
    assert first.reply == Changed(0, 0, [], [], [])
    second = settled(place, poll(place, 0))
    assert events(found(place, second)) == written
    assert place.evaluator.feed.node.counters["searches_total"] == 1


@pytest.mark.parametrize("slice_rows", [1, 512])
@pytest.mark.parametrize("polls", [2, 3, 40])
def test_polls_of_different_spans_that_search_at_once_are_all_answered(polls, slice_rows):
    """Each search threw away what the one before had found, for polls that had not looked at it yet: for ever."""
    place = Range()
    keys = [b"k%02d" % number for number in range(polls)]
    versions = [stored(place, key) for key in keys]
    stored(place, b"x")
    place.lead()
    place.evaluator.feed.slice_rows = slice_rows
    asked = [poll(place, 0, key, point_end(key)) for key in keys]
    place.stamp()
    place.run_again()
    for _ in range(20 * polls):
        place.pass_time(0.002)
    assert [events(each) for each in asked] == [
        [(version, key, b"old")] for version, key in zip(versions, keys, strict=True)
    ]
    feed = place.evaluator.feed
    assert feed.node.counters["searches_total"] == polls
    assert nothing_left(place)


def test_polls_that_search_at_once_wait_for_a_slice_and_not_for_each_other():
    place = Range()
    stored(place, b"x")
    place.lead()
    asked = [poll(place, 0, b"k%03d" % n, point_end(b"k%03d" % n)) for n in range(100)]
    place.stamp()
    place.run_again()
    place.pass_time(0.0)
    assert sum(not each.open for each in asked) >= 50, "a search of one key is a small part of it"
    place.pass_time(0.002)
    assert not any(each.open for each in asked)


def test_what_one_search_found_serves_all_that_wait_for_it_and_no_others():
    place = Range()
    written = history(place, 20)
    place.lead()
    behind, wide = written[9][0], poll(place, 0)
    same, later, narrow = poll(place, 0), poll(place, behind), poll(place, 0, b"k3", b"k4")
    place.stamp()
    place.run_again()
    place.pass_time(0.0)
    assert place.evaluator.feed.node.counters["searches_total"] == 1
    assert events(wide) == events(same) == written
    assert events(later) == written[10:]
    assert events(narrow) == [each for each in written if each[1] == b"k3"]


def test_an_idle_poll_of_a_busy_range_needs_no_search():
    place = Range()
    place.state.recent.rows_max = 4
    since = stored(place, b"quiet")
    asked = poll(place, since, b"quiet", point_end(b"quiet"))
    history(place, 30)
    assert asked.open
    assert place.state.recent.low > since
    version = stored(place, b"quiet", b"new")
    assert events(asked) == [(version, b"quiet", b"new")]
    assert place.evaluator.feed.node.counters["searches_total"] == 0


def test_a_commit_below_what_recent_remembers_is_searched_for():
    place = Range()
    place.state.recent.rows_max = 4
    settled(place, place.part(1, put(b"quiet", b"late")))
    since, commit_ts = place.clock, place.clock + 1
    place.clock += 1  # the largest min_ts of the parts
    asked = poll(place, since, b"quiet", point_end(b"quiet"))
    history(place, 30)
    settled(place, place.resolve(1, b"quiet", commit_ts))
    assert events(found(place, asked)) == [(commit_ts, b"quiet", b"late")]
    assert place.evaluator.feed.node.counters["searches_total"] == 1


def test_a_backlog_that_nobody_uses_is_dropped():
    place = Range()
    history(place, 5)
    place.lead()
    found(place, poll(place, 0))
    assert place.evaluator.feed._backlogs
    for _ in range(4):
        place.pass_time(16.0)
    assert not place.evaluator.feed._backlogs
    assert place.evaluator.feed.deadline() is None


# --- what is no longer kept


def collect(place: Range, threshold: int, garbage: list[Garbage]) -> None:
    place.apply([Collect(threshold, garbage)])


def test_changes_that_were_collected_are_refused_with_what_is_left():
    place = Range()
    first = stored(place, b"k", b"1")
    stored(place, b"k", b"2")
    collect(place, place.clock, [Garbage(b"k", [first])])
    refused = poll(place, first - 1).reply
    assert (refused.code, refused.details) == ("compacted", {"oldest": place.clock})
    assert events(settled(place, poll(place, place.clock, wait_ms=0))) == []


def test_an_idle_watch_below_the_threshold_is_not_refused_when_nothing_was_written():
    place = Range()
    since = stored(place, b"k")
    asked = poll(place, since, b"k", b"l", wait_ms=1_000)
    stored(place, b"x")
    place.clock += 1_000
    collect(place, place.clock, [])
    again = poll(place, since, b"k", b"l")
    place.pass_time(1.1)
    settled(place, asked)
    assert (events(asked), asked.reply.upto) == ([], place.clock)
    assert again.open


# --- what is refused, and the end


def test_a_span_outside_the_range_and_another_epoch_are_refused():
    place = Range(b"b", b"m")
    for asked in (poll(place, 0, b"a", b"c"), poll(place, 0, b"b", b"n"), poll(place, 0, b"b", b"m", version=9)):  # fmt: skip
        assert asked.reply.code == "epoch_mismatch"
    assert nothing_left(place)


@pytest.mark.parametrize("start", [b"", b"b"])
def test_the_end_of_a_poll_that_names_none_is_the_end_of_the_range(start):
    """The rows of all ranges of a node lie in one engine."""
    place = Range(start, b"m")
    version = stored(place, b"k")
    place.rows.write({b"Lz": place.rows.get(b"Lk")})
    place.lead()
    asked = found(place, poll(place, 0, start, b""))
    assert events(asked) == [(version, b"k", b"old")]


def test_a_poll_of_all_keys_is_not_for_a_range_that_begins_later():
    place = Range(b"m", b"")
    assert poll(place, 0, b"", b"").reply.code == "epoch_mismatch"


def test_more_polls_than_a_node_may_have_are_throttled_with_what_to_do():
    place = Range()
    place.evaluator.feed.node = Polls(1)
    since = place.clock
    waiting, refused = poll(place, since), poll(place, since)
    assert waiting.open
    assert refused.reply.code == "throttled"
    assert "limits.watches" in refused.reply.message
    stored(place, b"k")
    assert events(waiting)
    assert poll(place, place.clock).open


def test_the_next_poll_of_a_watch_takes_the_place_of_one_that_waits():
    place = Range()
    since = stored(place, b"k")
    first, other = poll(place, since, watch=7), poll(place, since, watch=8)
    second = poll(place, since, watch=7)
    assert first.reply == Changed(0, since, [], [], [])
    assert other.open
    last = poll(place, TIMESTAMP_MAX, watch=7, wait_ms=0)
    assert second.reply.upto == since
    assert last.reply.versions == []
    assert place.evaluator.feed.node.open == 1
    assert place.evaluator.feed.node.askers == {other: 1}


@pytest.mark.parametrize("where", ["parked", "latched", "undecided", "untimed", "searching"])
def test_a_poll_is_answered_once_when_another_takes_its_place_and_when_the_leader_stops(where):
    place = Range()
    since = stored(place, b"k")
    stored(place, b"other")
    at = 0
    if where == "parked":
        since = place.clock
    elif where == "latched":
        place.prepare(1, put(b"k"))
        place.stamp()
        at = place.clock
    elif where == "undecided":
        settled(place, place.part(1, put(b"k")))
        at = place.clock
    elif where == "untimed":
        since, at = since - 1, 0
        place.state.recent.begin(place.clock)
    elif where == "searching":
        since, at = since - 1, place.clock
        place.state.recent.begin(place.clock)
        place.evaluator.feed.slice_rows = 1
    first = poll(place, since, b"k", b"p", at=at, watch=7)
    assert first.open
    second = poll(place, since, b"k", b"p", at=at, watch=7)
    assert first.reply == Changed(0, since, [], [], [])
    assert second.open
    place.evaluator.stop()
    assert second.reply.code == "not_leader"
    assert len(first.replies) == 1
    assert place.evaluator.feed.node.open == 0


def test_polls_that_wait_for_long_cost_no_look_but_one_each_half_second():
    place = Range()
    for number in range(100):
        poll(place, place.clock, b"k", b"l", wait_ms=1_000 + number)
    place.pass_time(1.0)
    due = place.evaluator.feed.deadline()
    assert due is not None
    assert due >= place.now + 0.5


def test_a_range_whose_row_does_not_tell_its_newest_version_is_searched():
    place = Range()
    written = history(place, 3)
    place.state.row.newest = TIMESTAMP_MAX  # as a row reads that an earlier version wrote
    place.lead()
    later = stored(place, b"k9", b"later")
    assert place.state.row.newest == TIMESTAMP_MAX
    assert drain(place, 0) == [*written, (later, b"k9", b"later")]


def test_page_limits_of_the_asker_are_capped():
    place = Range(limits=Limits())
    count = PAGE_ROWS_MAX + 10
    since = place.clock
    for number in range(count):
        place.prepare(number + 1, put(b"k%05d" % number), begin_ts=1)
    place.settle()
    asked = settled(place, poll(place, since, rows_max=1 << 30, bytes_max=1 << 40))
    assert len(asked.reply.versions) == PAGE_ROWS_MAX
