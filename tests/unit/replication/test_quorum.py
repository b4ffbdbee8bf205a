"""Claims of replication/quorum.py, each against a second implementation that counts instead of sorting."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.quorum import Election, agreed_value, election_result, majority_value

VALUES = st.lists(st.integers(0, 12), min_size=1, max_size=7)
VOTERS = st.lists(st.integers(1, 9), min_size=1, max_size=7, unique=True)


def counted(values: list[int]) -> int:
    """The largest value that more than half of the values reach, by trying all."""
    return max(v for v in values if 2 * sum(other >= v for other in values) > len(values))


@pytest.mark.parametrize(
    ("match_index", "committed"),
    [
        ([5], 5),
        ([5, 3], 3),  # of two, both are needed
        ([5, 5, 0], 5),  # two of three are a majority
        ([5, 4, 3, 2], 3),  # of four, three are needed
        ([5, 4, 3, 2, 1], 3),
    ],
)
def test_a_majority_value_is_the_highest_that_a_majority_reaches(match_index, committed):
    assert majority_value(match_index) == committed


@given(VALUES)
def test_the_majority_value_is_what_counting_finds(values):
    assert majority_value(list(values)) == counted(values)


@given(VALUES, st.lists(st.integers(0, 12), max_size=7))
def test_a_joint_value_needs_both_majorities(incoming, outgoing):
    expected = min(counted(incoming), counted(outgoing)) if outgoing else counted(incoming)
    assert agreed_value(list(incoming), list(outgoing)) == expected


def test_times_agree_as_indices_do():
    assert agreed_value([1.5, float("inf"), float("-inf")], []) == 1.5


def won_by(voters: list[int], granted: list[int]) -> bool:
    return 2 * sum(voter in granted for voter in voters) > len(voters)


@given(VOTERS, st.one_of(st.just([]), VOTERS), st.dictionaries(st.integers(1, 9), st.booleans()))
def test_an_election_is_won_or_lost_as_soon_as_it_is_certain(incoming, outgoing, ballots):
    halves = [half for half in (incoming, outgoing) if half]
    granted = [voter for voter, ballot in ballots.items() if ballot]
    refused = [voter for voter, ballot in ballots.items() if not ballot]
    hopeful = [voter for voter in range(1, 10) if voter not in refused]
    if all(won_by(half, granted) for half in halves):
        expected = Election.WON
    elif not all(won_by(half, hopeful) for half in halves):
        expected = Election.LOST
    else:
        expected = Election.PENDING
    assert election_result(incoming, outgoing, ballots) is expected


def test_ballots_of_replicas_that_do_not_vote_do_not_count():
    assert election_result([1, 2, 3], [], {1: True, 8: True, 9: True}) is Election.PENDING
