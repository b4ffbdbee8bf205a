"""Claims of replication/progress.py: the window never leaks, match never falls, stale refusals change nothing."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from replication.progress import Progress, State

ENTRIES_MAX = 4
BYTES_MAX = 100


def replicating(match: int) -> Progress:
    progress = Progress(match + 1)
    progress.accepted(match)
    progress.become_replicate()
    return progress


def test_a_probe_is_one_append_at_a_time():
    progress = Progress(6)
    assert progress.may_append(ENTRIES_MAX, BYTES_MAX)
    progress.sent(7, 10)
    assert not progress.may_append(ENTRIES_MAX, BYTES_MAX)
    assert progress.next == 6  # where it is, is not known


def test_pipelining_moves_next_ahead_of_the_answers():
    progress = replicating(5)
    progress.sent(6, 10)
    progress.sent(8, 20)
    assert (progress.match, progress.next) == (5, 9)
    assert (progress.entries_in_flight, progress.bytes_in_flight) == (3, 30)
    assert progress.accepted(6)
    assert (progress.entries_in_flight, progress.bytes_in_flight) == (2, 20)


def test_the_window_closes_at_either_limit():
    progress = replicating(0)
    progress.sent(ENTRIES_MAX, 1)
    assert not progress.may_append(ENTRIES_MAX, BYTES_MAX)
    progress = replicating(0)
    progress.sent(1, BYTES_MAX)
    assert not progress.may_append(ENTRIES_MAX, BYTES_MAX)


def test_one_append_may_be_larger_than_the_window():
    progress = replicating(0)
    assert progress.may_append(0, 0)


def test_an_empty_append_takes_nothing_of_the_window():
    progress = replicating(5)
    progress.sent(5, 0)
    assert progress.next == 6
    assert progress.entries_in_flight == progress.bytes_in_flight == 0


def test_a_refusal_of_what_is_known_to_match_is_stale():
    progress = replicating(5)
    progress.sent(9, 10)
    assert not progress.refused(5, 2)
    assert progress.state is State.REPLICATE


def test_a_refusal_goes_back_to_probing_and_empties_the_window():
    progress = replicating(5)
    progress.sent(9, 10)
    assert progress.refused(9, 6)
    assert (progress.state, progress.next, progress.bytes_in_flight) == (State.PROBE, 7, 0)


def test_a_second_refusal_of_the_same_pipeline_is_stale():
    progress = replicating(5)
    progress.sent(9, 10)
    progress.sent(10, 10)
    assert progress.refused(8, 6)
    assert not progress.refused(9, 6)


def test_probing_never_goes_below_what_matches():
    progress = replicating(5)
    progress.sent(9, 10)
    assert progress.refused(9, 2)
    assert progress.next == 6


def test_nothing_is_sent_while_a_snapshot_is_needed():
    progress = replicating(5)
    progress.become_snapshot()
    assert not progress.may_append(ENTRIES_MAX, BYTES_MAX)
    assert not progress.refused(9, 7)
    assert progress.accepted(20)
    progress.become_replicate()
    assert (progress.match, progress.next) == (20, 21)


class Window(RuleBasedStateMachine):
    """Against a list of (last_index, bytes) of what is in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.progress = replicating(0)
        self.flights: list[tuple[int, int]] = []
        self.match = 0

    @precondition(lambda self: self.progress.may_append(ENTRIES_MAX, BYTES_MAX))
    @rule(count=st.integers(1, 3), size=st.integers(0, 80))
    def sent(self, count: int, size: int) -> None:
        last = self.progress.next + count - 1
        self.progress.sent(last, size)
        if self.progress.state is State.REPLICATE:
            self.flights.append((last, size))

    @rule(data=st.data())
    def accepted(self, data: st.DataObject) -> None:
        match = data.draw(st.integers(0, self.progress.next - 1))
        self.progress.accepted(match)
        self.match = max(self.match, match)
        self.flights = [flight for flight in self.flights if flight[0] > match]
        if self.progress.state is State.PROBE:
            self.progress.become_replicate()

    @rule(data=st.data())
    def refused(self, data: st.DataObject) -> None:
        rejected = data.draw(st.integers(0, self.progress.next))
        if self.progress.refused(rejected, data.draw(st.integers(0, rejected))):
            self.flights.clear()

    @rule()
    def everything_is_lost_and_found_out(self) -> None:
        """However the window stands, a probe makes sending possible again (pitfall 18)."""
        self.progress.become_probe(self.progress.next)
        self.flights.clear()
        assert self.progress.may_append(ENTRIES_MAX, BYTES_MAX)

    @invariant()
    def the_window_is_what_is_in_flight(self) -> None:
        progress = self.progress
        assert progress.match == self.match < progress.next
        assert progress.bytes_in_flight == sum(size for _, size in self.flights)
        if not self.flights and not progress.paused:
            assert progress.may_append(ENTRIES_MAX, BYTES_MAX)


Window.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestWindow = Window.TestCase
