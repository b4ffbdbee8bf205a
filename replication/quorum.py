"""Majorities: what one or two (joint) sets of voters agree on. Pure.

Q1. A value is agreed when a majority of the voters hold at least that value, and, while the membership is joint, a
    majority of the outgoing voters too. One function serves commit, lease and read index, so that they cannot differ
    (pitfall 7).
Q2. An election is won by the same two majorities, and lost as soon as one of them can no longer be reached.

Source: Ongaro's thesis, sections 3.6 and 4.3.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import TypeVar

Value = TypeVar("Value", int, float)


class Election(enum.Enum):
    """How the ballots stand."""

    PENDING = "pending"
    WON = "won"
    LOST = "lost"


def majority_value(values: list[Value]) -> Value:
    """The largest value that a majority of `values` (one per voter, at least one) reach. Sorts the list in place."""
    values.sort()
    return values[(len(values) - 1) >> 1]


def agreed_value(incoming: list[Value], outgoing: list[Value]) -> Value:
    """What both majorities reach; `outgoing` is empty unless the membership is joint. Sorts both lists in place."""
    value = majority_value(incoming)
    if not outgoing:
        return value
    return min(value, majority_value(outgoing))


def _majority_result(voters: Sequence[int], ballots: Mapping[int, bool]) -> Election:
    needed = len(voters) // 2 + 1
    granted = refused = 0
    for voter in voters:
        ballot = ballots.get(voter)
        if ballot is None:
            continue
        if ballot:
            granted += 1
        else:
            refused += 1
    if granted >= needed:
        return Election.WON
    if refused > len(voters) - needed:
        return Election.LOST
    return Election.PENDING


def election_result(
    incoming: Sequence[int], outgoing: Sequence[int], ballots: Mapping[int, bool]
) -> Election:
    """The result by ballots (replica id to granted); ballots of replicas that are no voters do not count."""
    first = _majority_result(incoming, ballots)
    if not outgoing or first is Election.LOST:
        return first
    second = _majority_result(outgoing, ballots)
    if second is Election.LOST:
        return second
    return second if first is Election.WON else first
