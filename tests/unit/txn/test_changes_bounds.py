"""Claims of polls at a leader (txn/changes.py): what one turn does for them, however many they are, however busy the range is
beside them, and however large what they ask for."""

from __future__ import annotations

import pytest

from tests.unit.txn.poll_driver import events, nothing_left, poll
from tests.unit.txn.txn_driver import Pulled, Range, put, settled, stored
from txn.changes import LOOKS, PAGE_READ_BYTES_MAX, SLICE_ROWS, Search
from txn.messages import Changes, Failure
from txn.recent import Commit, touches_sorted
from txn.types import point_end

# --- how many look


def test_a_turn_of_many_commits_looks_at_each_poll_once(monkeypatch):
    looks = []

    def touches(*span) -> bool:
        looks.append(span)
        return touches_sorted(*span)

    monkeypatch.setattr("txn.changes.touches_sorted", touches)
    place = Range()
    since = stored(place, b"a")
    idle = [poll(place, since, b"x%03d" % number, b"y") for number in range(100)]
    busy = poll(place, since, b"k", b"l")
    hot = poll(place, since, b"k050", point_end(b"k050"))
    asked = [place.prepare(number, put(b"k%03d" % number)) for number in range(100)]
    place.settle()
    assert len(looks) < 2 * len(idle)
    assert all(each.open for each in idle)
    assert [key for _, key, _ in events(hot)] == [b"k050"]
    assert events(busy)[0][0] == min(each.reply.ts for each in asked)
    assert len(events(busy)) == 100


class Visited(list[Commit]):
    """Commits of `Recent`: how often one was looked at, a search for a place among them included."""

    looks = 0

    def __getitem__(self, place):
        self.looks += 1
        return super().__getitem__(place)


def visited(place: Range) -> Visited:
    commits = place.state.recent._commits = Visited(place.state.recent._commits)
    return commits


def test_polls_to_which_nothing_happened_look_at_no_commits_when_their_time_is_over():
    place = Range()
    since = stored(place, b"a")
    keys = [b"x%02d" % number for number in range(100)]
    asked = [poll(place, since, key, point_end(key), wait_ms=1_000) for key in keys]
    asked += [poll(place, since, key, b"y", wait_ms=1_000) for key in keys]
    for number in range(2_000):
        stored(place, b"k%04d" % number)
    commits = visited(place)
    place.pass_time(1.0)
    place.settle()
    assert {(len(events(each)), each.reply.upto) for each in asked} == {(0, place.clock)}
    assert commits.looks < 50 * len(asked)
    assert nothing_left(place)


def test_a_poll_that_is_woken_looks_from_its_first_commit_on():
    place = Range()
    since = stored(place, b"a")
    keys = [b"x%02d" % number for number in range(100)]
    asked = [poll(place, since, key, point_end(key)) for key in keys]
    for number in range(2_000):
        stored(place, b"k%04d" % number)
    commits = visited(place)
    version = settled(place, place.prepare(1, *map(put, keys))).reply.ts
    assert [events(each) for each in asked] == [[(version, key, b"v")] for key in keys]
    assert commits.looks < 50 * len(asked)


@pytest.mark.parametrize(("value", "in_a_turn"), [(b"v", LOOKS), (bytes(64 << 10), LOOKS // 16)])
def test_polls_that_one_commit_wakes_are_answered_in_several_turns(value, in_a_turn):
    place = Range()
    polls = 3 * in_a_turn
    since = stored(place, b"a")
    asked = [poll(place, since, b"k", point_end(b"k")) for _ in range(polls)]
    place.prepare(1, put(b"k", value))
    place.stamp()
    proposals = place.take()
    answers = place.apply([each.command for each in proposals if each.command is not None])
    place.evaluator.applied(proposals, answers, place.now)
    left, turns = polls, 0
    while left:
        place.evaluator.run_again(place.now)
        answered = left - sum(each.open for each in asked)
        assert 0 < answered <= in_a_turn
        assert bool(place.evaluator.runnable) == (answered < left), "the store comes back at once"
        left, turns = left - answered, turns + 1
    assert turns <= 4
    assert {events(each)[0][1:] for each in asked} == {(b"k", value)}
    assert nothing_left(place)


def test_polls_whose_time_is_over_at_once_are_answered_in_several_turns():
    place = Range()
    since = stored(place, b"a")
    asked = [poll(place, since, b"k", b"l", wait_ms=1_000) for _ in range(2 * LOOKS)]
    place.now += 1.0
    place.evaluator.tick(place.now)
    place.stamp()
    assert all(each.open for each in asked), "timestamps are handed out to all, and they look later"
    place.evaluator.run_again(place.now)
    assert sum(each.open for each in asked) == LOOKS
    place.evaluator.run_again(place.now)
    assert {(len(events(each)), each.reply.upto) for each in asked} == {(0, place.clock)}


def test_polls_that_are_put_off_when_the_term_ends_are_told():
    place = Range()
    since = stored(place, b"a")
    asked = [poll(place, since, b"k", b"l", wait_ms=1_000) for _ in range(2 * LOOKS)]
    place.now += 1.0
    place.evaluator.tick(place.now)
    place.stamp()
    place.evaluator.run_again(place.now)
    place.lead()
    assert sum(isinstance(each.reply, Failure) for each in asked) == LOOKS
    assert nothing_left(place)


# --- how much is read


@pytest.mark.parametrize("keys", [1, 7, 40])
def test_a_step_of_a_search_reads_few_bytes(keys):
    """Of one key with many versions too: it goes on in the middle of them."""
    place = Range()
    written = [(stored(place, b"k%02d" % (n % keys), bytes(64 << 10)), b"k%02d" % (n % keys)) for n in range(40)]  # fmt: skip
    search = Search(place.rows, Changes(0, 0, 0, 0, b"", b"", 1, 1, place.clock))
    pulled, steps = Pulled(place.rows), 0
    while not search.done:
        assert search.step(SLICE_ROWS) > 0
        assert pulled.taken() <= (SLICE_ROWS << 10) + 3 * (65 << 10)
        steps += 1
    assert search.backlog().items == written
    assert steps >= 5


def test_a_search_in_the_middle_of_a_key_goes_on_though_it_is_written_meanwhile():
    place = Range()
    written = [stored(place, b"k", b"%d" % number) for number in range(10)]
    search = Search(place.rows, Changes(0, 0, 0, 0, b"", b"", 1, 1, place.clock))
    while not search.done:
        search.step(1)
        stored(place, b"k", b"later")
        stored(place, b"j", b"elsewhere")
    assert search.backlog().items == [(version, b"k") for version in written]


def test_a_search_in_the_middle_of_a_key_steps_over_a_large_newest_row():
    place = Range()
    written = [stored(place, b"k", b"%d" % number) for number in range(400)]
    written.append(stored(place, b"k", bytes(1 << 20)))
    search = Search(place.rows, Changes(0, 0, 0, 0, b"", b"", 1, 1, place.clock))
    steps = 0
    while not search.done:
        search.step(SLICE_ROWS)
        steps += 1
    assert search.backlog().items == [(version, b"k") for version in written]
    assert steps <= 3


def test_a_page_reads_few_bytes_whatever_it_tells():
    place = Range()
    for number in range(40):
        stored(place, b"k%02d" % number, b"%d" % number)
    upto = place.clock
    for number in range(40):
        stored(place, b"k%02d" % number, bytes(64 << 10))
    pulled, told, since = Pulled(place.rows), [], 0
    while since < upto:
        asked = settled(place, poll(place, since, at=upto))
        assert pulled.taken() <= PAGE_READ_BYTES_MAX + (66 << 10)
        told += [value for _, _, value in events(asked)]
        since = asked.reply.upto
    assert told == [b"%d" % number for number in range(40)]
