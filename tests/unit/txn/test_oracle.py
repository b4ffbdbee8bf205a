"""Claims O1 to O4 of the oracle: fresh values once, below the committed bound, above every earlier leader's, paced."""

from __future__ import annotations

import random

import pytest

from replication.probes import choosing
from txn.oracle import CATCH_UP_RATE, Oracle
from txn.types import TIMESTAMP_SHIFT


def led(hi: int = 0, now: float = 0.0, wall_ms: int = 0, window_ms: int = 3000) -> Oracle:
    """An oracle whose leader serves."""
    oracle = Oracle(hi, window_ms)
    oracle.start_term(now)
    oracle.bound_applied(oracle.next_bound(wall_ms, now))
    assert oracle.serving
    return oracle


def test_nothing_is_issued_before_a_bound_of_the_own_term_is_applied():
    oracle = Oracle(500)
    assert oracle.issue(1, 10_000, 0.0) == 0
    oracle.start_term(0.0)
    assert oracle.issue(1, 10_000, 0.0) == 0
    bound = oracle.next_bound(10_000, 0.0)
    assert oracle.issue(1, 10_000, 0.0) == 0
    oracle.bound_applied(bound)
    assert oracle.issue(1, 10_000, 0.0) > 500


def test_a_bound_of_an_earlier_term_does_not_begin_serving():
    oracle = Oracle()
    oracle.start_term(0.0)
    oracle.next_bound(0, 0.0)
    oracle.bound_applied(1 << TIMESTAMP_SHIFT)
    assert not oracle.serving


def test_a_follower_only_takes_note_of_bounds():
    oracle = Oracle()
    assert oracle.next_bound(10_000, 0.0) == 0
    oracle.bound_applied(77)
    assert (oracle.hi, oracle.serving) == (77, False)


def test_the_bound_never_goes_back():
    oracle = Oracle(10)
    with pytest.raises(AssertionError, match="never goes back"):
        oracle.bound_applied(9)


def test_a_refused_bound_is_asked_for_again():
    oracle = Oracle()
    oracle.start_term(0.0)
    first = oracle.next_bound(0, 0.0)
    assert oracle.next_bound(0, 0.0) == 0  # one at a time
    oracle.bound_lost()
    assert oracle.next_bound(0, 0.0) == first


def test_before_any_issue_the_last_timestamp_is_the_old_bound():
    oracle = led(hi=1000)
    assert oracle.last == 1000
    assert oracle.issue(1, 0, 0.0) == 1001


def test_a_batch_is_consecutive_and_the_last_is_known():
    oracle = led()
    first = oracle.issue(5, 0, 0.0)
    assert oracle.last == first + 4
    assert oracle.issue(1, 0, 0.0) == first + 5


def test_when_the_window_is_used_up_nothing_is_issued_until_the_next_bound():
    oracle = led(window_ms=1)
    room = oracle.hi - oracle.last - 1
    assert oracle.issue(room, 0, 0.0)
    assert oracle.issue(1, 0, 0.0) == 0
    oracle.bound_applied(oracle.next_bound(0, 0.0))
    assert oracle.issue(1, 0, 0.0)


def test_a_small_window_raises_the_bound_too():
    """Seed 1322: a bound below the old one was asked for; applied, it raised nothing, and the oracle waited for it for ever."""
    oracle = led()
    oracle.issue(1, 2_000, 1.0)
    with choosing(lambda name: name == "oracle_window_small"):
        bound = oracle.next_bound(2_000, 1.0)
    assert bound > oracle.hi
    oracle.bound_applied(bound)
    assert oracle.next_bound(2_000, 1.0) > bound


def test_a_clock_that_is_far_ahead_is_followed_at_a_bounded_pace():
    oracle = led()
    day_ms = 86_400_000
    issued = oracle.issue(1, day_ms, 1.0)
    assert issued >> TIMESTAMP_SHIFT <= CATCH_UP_RATE * 1000
    assert oracle.next_bound(day_ms, 1.0) >> TIMESTAMP_SHIFT <= CATCH_UP_RATE * 1000 + 3000


def test_a_clock_that_is_behind_does_not_take_the_oracle_back():
    oracle = led(hi=5000 << TIMESTAMP_SHIFT)
    first = oracle.issue(1, 0, 1.0)
    assert oracle.issue(1, 0, 2.0) == first + 1


def test_a_clock_within_the_pace_is_followed_exactly():
    oracle = led(hi=1000 << TIMESTAMP_SHIFT, now=0.0)
    oracle.bound_applied(max(oracle.hi, oracle.next_bound(2000, 1.0)))
    assert oracle.issue(1, 2000, 1.0) == 2000 << TIMESTAMP_SHIFT


def wrote_for(seconds: int) -> Oracle:
    """One that has followed a good clock since 0, with a timestamp each second."""
    oracle = led()
    for second in range(1, seconds + 1):
        bound = oracle.next_bound(second * 1000, float(second))
        if bound:
            oracle.bound_applied(bound)
        assert oracle.issue(1, second * 1000, float(second)) == (second * 1000) << TIMESTAMP_SHIFT
    return oracle


def test_a_clock_that_leaps_is_followed_at_that_pace_however_long_it_was_right():
    oracle = wrote_for(600)
    leapt_ms = 1_000_000
    for second in range(601, 620):
        oracle.bound_applied(max(oracle.hi, oracle.next_bound(leapt_ms, float(second))))
        issued = oracle.issue(1, leapt_ms, float(second)) >> TIMESTAMP_SHIFT
        assert issued == 600_000 + (second - 600) * 1000 * CATCH_UP_RATE


def test_an_idle_time_is_made_up_for_at_once():
    oracle = wrote_for(10)
    bound = oracle.next_bound(3_600_000, 3600.0)
    last = oracle.last
    assert oracle.issue(1, 3_600_000, 3600.0) == last + 1  # the bound is not applied yet
    oracle.bound_applied(bound)
    assert oracle.issue(1, 3_600_001, 3600.001) == 3_600_001 << TIMESTAMP_SHIFT


def test_timestamps_that_are_issued_without_a_pause_follow_the_clock():
    oracle = wrote_for(1)
    for tenth in range(1, 40_000):
        now = 1.0 + tenth / 10_000
        wall_ms = int(now * 1000)
        bound = oracle.next_bound(wall_ms, now)
        if bound:
            oracle.bound_applied(bound)
        assert oracle.issue(1, wall_ms, now) >> TIMESTAMP_SHIFT == wall_ms


@pytest.mark.parametrize("seed", range(20))
def test_through_leader_changes_every_timestamp_is_new_larger_and_below_the_committed_bound(seed):
    rng = random.Random(seed)
    committed, last, now = 0, 0, 0.0
    oracles = [Oracle(window_ms=20) for _ in range(3)]
    leader, asked = oracles[0], 0
    for _ in range(400):
        now += rng.uniform(0, 0.02)
        wall_ms = int(now * 1000) + rng.randint(-500, 500)
        event = rng.random()
        if event < 0.05:
            leader.stop()
            leader, asked = rng.choice(oracles), asked if rng.random() < 0.5 else 0
            if asked:  # the bound in flight survives, and is applied before the new term begins
                committed, asked = asked, 0
            for oracle in oracles:
                oracle.bound_applied(committed)
            leader.start_term(now)
        elif event < 0.4 and asked:
            committed, asked = asked, 0
            for oracle in oracles:
                oracle.bound_applied(committed)
        elif event < 0.45 and asked:
            asked = 0
            leader.bound_lost()
        else:
            asked = leader.next_bound(max(0, wall_ms), now) or asked
            count = rng.randint(1, 4)
            first = leader.issue(count, max(0, wall_ms), now)
            if first:
                assert last < first
                assert first + count - 1 < committed
                last = first + count - 1
        assert leader.last <= committed
