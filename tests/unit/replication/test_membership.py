"""Claims of replication/membership.py: what a valid membership is, which may follow which, and how it is rolled back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.errors import InvalidMembership
from replication.membership import (
    History,
    check_change,
    enter_joint,
    is_joint,
    is_voter,
    leave_joint,
    members,
    validate,
)
from replication.types import Membership
from tests.scripts.raft_cluster import plain

IDS = st.lists(st.integers(1, 6), max_size=4, unique=True)
SOME_IDS = st.lists(st.integers(1, 6), min_size=1, max_size=4, unique=True)
NODES = tuple((replica, 10 * replica) for replica in range(1, 7))


def membership(**fields) -> Membership:
    """A membership with the right nodes, unless told otherwise."""
    result = Membership(**fields)
    if "nodes" in fields:
        return result
    return Membership(**fields, nodes=tuple((n, 10 * n) for n in members(result)))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"voters": ()}, "needs a voter"),
        ({"voters": (2, 1)}, "ascend"),
        ({"voters": (1, 1)}, "ascend"),
        ({"voters": (0, 1)}, "below 1"),
        ({"voters": (1, 2), "learners": (2,)}, "voter and learner"),
        ({"voters": (1,), "voters_outgoing": (2,), "learners": (2,)}, "voter and learner"),
        ({"voters": (1,), "learners_next": (2,)}, "does not leave"),
        ({"voters": (1, 2), "voters_outgoing": (2,), "learners_next": (2,)}, "does not leave"),
        ({"voters": (1, 2), "nodes": ((1, 10),)}, "nodes"),
        ({"voters": (1,), "nodes": ((1, 10), (2, 20))}, "nodes"),
        ({"voters": (1, 2), "nodes": ((2, 20), (1, 10))}, "nodes"),
    ],
)
def test_a_membership_that_breaks_a_rule_is_refused(fields, why):
    with pytest.raises(InvalidMembership, match=why):
        validate(membership(**fields))


def test_members_are_everyone_who_gets_the_log():
    joint = membership(voters=(1, 4), voters_outgoing=(1, 2), learners=(5,), learners_next=(2,))
    validate(joint)
    assert members(joint) == [1, 2, 4, 5]
    assert [replica for replica in range(1, 6) if is_voter(joint, replica)] == [1, 2, 4]


@given(SOME_IDS, IDS, SOME_IDS, IDS)
def test_joint_leads_from_any_membership_to_any_other(voters, learners, new_voters, new_learners):
    current = plain(voters, [n for n in learners if n not in voters])
    wanted = plain(new_voters, [n for n in new_learners if n not in new_voters])
    joint = enter_joint(current, wanted.voters, wanted.learners, NODES)
    validate(joint)
    check_change(current, joint)
    assert is_joint(joint)
    assert joint.voters_outgoing == current.voters
    for learner in joint.learners_next:
        assert is_voter(joint, learner)  # until joint ends
    check_change(joint, leave_joint(joint))
    assert leave_joint(joint) == wanted


def test_leaving_twice_changes_nothing():
    left = leave_joint(enter_joint(plain([1, 2, 3]), [1, 4], [2], NODES))
    assert leave_joint(left) is left


def test_a_joint_membership_is_not_entered_again():
    joint = enter_joint(plain([1, 2, 3]), [1, 2], [], ())
    with pytest.raises(InvalidMembership, match="between"):
        enter_joint(joint, [1], [], ())


def test_a_new_replica_needs_a_node():
    with pytest.raises(InvalidMembership, match="no node"):
        enter_joint(plain([1]), [1, 2], [], ())


@pytest.mark.parametrize(
    ("current", "proposed", "why"),
    [
        (plain([1, 2, 3]), plain([1, 4]), "more than one"),
        (plain([1, 2]), plain([3]), "more than one"),
        (enter_joint(plain([1, 2]), [1], [], ()), plain([1, 2]), "only be left"),
        (plain([1, 2]), enter_joint(plain([1, 3]), [1], [], ()), "current voters"),
        (plain([1, 2]), Membership((1, 2), nodes=((1, 10), (2, 99))), "cannot move"),
        (plain([1]), Membership(), "needs a voter"),
    ],
)
def test_a_change_that_may_not_follow_is_refused(current, proposed, why):
    with pytest.raises(InvalidMembership, match=why):
        check_change(current, proposed)


@pytest.mark.parametrize(
    "proposed",
    [plain([1, 2, 3]), plain([1]), plain([1, 2]), plain([1], [2]), plain([1, 2], [7, 8])],
)
def test_one_voter_and_any_learner_may_change_at_once(proposed):
    check_change(plain([1, 2]), proposed)


def test_history_follows_the_log_up_and_down():
    history = History(10, plain([1]))
    history.append(12, plain([1, 2]))
    history.append(15, plain([1, 2, 3]))
    assert [history.at(index) for index in (10, 11, 12, 14, 15, 20)] == [
        plain([1]),
        plain([1]),
        plain([1, 2]),
        plain([1, 2]),
        plain([1, 2, 3]),
        plain([1, 2, 3]),
    ]
    assert not history.truncate_after(15)
    assert history.truncate_after(14)
    assert (history.current, history.current_index) == (plain([1, 2]), 12)
    history.compact(13)
    assert history.at(13) == plain([1, 2])
    assert not history.truncate_after(13)
    history.reset(30, plain([4]))
    assert history.at(30) == history.current == plain([4])
