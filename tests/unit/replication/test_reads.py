"""Claims of replication/reads.py: a read waits for a probe of its own, and a send time is never told too late."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.errors import ProposalDropped
from replication.reads import ProbeTimes, ReadQueue, ReadState


def test_a_round_confirms_what_was_asked_for_before_it_and_nothing_later():
    reads = ReadQueue(10)
    reads.add(1)
    reads.add(2)
    reads.begin_round(5, 100)
    reads.add(3)
    assert reads.confirm(4) == []
    assert reads.confirm(6) == [ReadState(1, 100), ReadState(2, 100)]
    reads.begin_round(7, 101)
    assert reads.confirm(7) == [ReadState(3, 101)]
    assert reads.pending == 0


def test_a_later_probe_confirms_all_earlier_rounds():
    reads = ReadQueue(10)
    for context, probe in ((1, 5), (2, 6)):
        reads.add(context)
        reads.begin_round(probe, 100 + probe)
    assert [state.context for state in reads.confirm(9)] == [1, 2]
    assert not reads.open


def test_the_queue_is_bounded_over_all_rounds():
    reads = ReadQueue(2)
    reads.add(1)
    reads.begin_round(5, 100)
    reads.add(2)
    with pytest.raises(ProposalDropped):
        reads.add(3)
    reads.confirm(5)
    reads.add(3)


def test_failing_answers_everything_in_order():
    reads = ReadQueue(9)
    reads.add(1)
    reads.begin_round(5, 100)
    reads.add(2)
    assert reads.fail() == [1, 2]
    assert (reads.pending, reads.open, reads.waiting) == (0, False, [])


@given(st.lists(st.floats(0, 0.4), min_size=1, max_size=200))
def test_a_remembered_send_time_is_never_too_late_and_hardly_too_early(pauses):
    times = ProbeTimes(keep_s=2.0, grain_s=0.03)
    now, true_times = 0.0, []
    for probe, pause in enumerate(pauses, start=1):
        now += pause
        times.sent(probe, now)
        true_times.append(now)
    for probe, sent_at in enumerate(true_times, start=1):
        told = times.sent_at(probe)
        if now - sent_at <= 2.0:
            assert told is not None
        if told is not None:
            assert sent_at - 0.03 <= told <= sent_at


def test_memory_is_bounded_however_many_probes_leave():
    times = ProbeTimes(keep_s=2.0, grain_s=1 / 32)
    for probe in range(20_000):
        times.sent(probe, probe * 0.001)
    assert len(times._times) < 2 * 64 + 16
