"""Who belongs to a group, and how that may change.

M1. A membership takes effect when its entry is appended, on every replica, and stops being in effect when that entry
    is truncated; `History` holds the base (of the snapshot or the log's start) and one membership per CONFIG entry.
M2. One change at a time: from a plain membership to one that differs by at most one voter, or to a joint one whose
    outgoing voters are the current voters; from a joint one only to what `leave_joint` says. Learners change freely.
M3. Any leader leaves a joint membership, also one that it inherited; doing it again changes nothing (pitfall 7).

That the previous change is committed, and an entry of the leader's own term, is checked by the leader (pitfall 6).
That a voter comes in as a learner first, and that ids are never used again, is the business of the layer above.
Source: Ongaro's thesis, chapter 4; his message of 2015 on the bug in single-server changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from replication.errors import InvalidMembership
from replication.types import Membership


def members(membership: Membership) -> list[int]:
    """Every replica that receives the log: voters, outgoing voters and learners, ascending."""
    if not (membership.voters_outgoing or membership.learners):
        return list(membership.voters)
    return sorted(
        dict.fromkeys(membership.voters + membership.voters_outgoing + membership.learners)
    )


def is_joint(membership: Membership) -> bool:
    return bool(membership.voters_outgoing)


def is_voter(membership: Membership, replica: int) -> bool:
    """Whether the replica's vote and log count, in either half."""
    return replica in membership.voters or replica in membership.voters_outgoing


def validate(membership: Membership) -> None:
    """Raise InvalidMembership unless every rule of the type holds."""
    for name in ("voters", "voters_outgoing", "learners", "learners_next"):
        ids: tuple[int, ...] = getattr(membership, name)
        if any(low >= high for low, high in itertools.pairwise(ids)):
            raise InvalidMembership(f"{name} must ascend without repetition: {ids}")
        if ids and ids[0] < 1:
            raise InvalidMembership(f"{name} holds a replica id below 1: {ids}")
    if not membership.voters:
        raise InvalidMembership("a group needs a voter")
    voters = dict.fromkeys(membership.voters + membership.voters_outgoing)
    for learner in membership.learners:
        if learner in voters:
            raise InvalidMembership(f"replica {learner} cannot be voter and learner")
    for learner in membership.learners_next:
        if learner not in membership.voters_outgoing or learner in membership.voters:
            raise InvalidMembership(f"replica {learner} becomes a learner but does not leave")
    if [replica for replica, _ in membership.nodes] != members(membership):
        raise InvalidMembership(
            f"nodes must pair each member once, ascending: {membership.nodes} for {members(membership)}"
        )


def enter_joint(
    current: Membership,
    voters: Iterable[int],
    learners: Iterable[int],
    nodes: Iterable[tuple[int, int]],
) -> Membership:
    """The joint membership on the way from `current` to the given voters and learners.

    `nodes` tells the node of every new replica; those of known ones are kept. Voters that become learners are voters
    of the outgoing half until joint ends. Raises InvalidMembership if `current` is joint or the target breaks a rule.
    """
    if is_joint(current):
        raise InvalidMembership("the group is still between two memberships")
    incoming = tuple(sorted(voters))
    target_learners = tuple(sorted(learners))
    learners_next = tuple(replica for replica in target_learners if replica in current.voters)
    joint = Membership(
        voters=incoming,
        voters_outgoing=current.voters,
        learners=tuple(replica for replica in target_learners if replica not in learners_next),
        learners_next=learners_next,
    )
    return _with_nodes(joint, {**dict(nodes), **dict(current.nodes)})


def leave_joint(current: Membership) -> Membership:
    """The membership after joint; the same one if it is not joint."""
    if not is_joint(current):
        return current
    plain = Membership(
        voters=current.voters,
        learners=tuple(sorted(current.learners + current.learners_next)),
    )
    return _with_nodes(plain, dict(current.nodes))


def check_change(current: Membership, proposed: Membership) -> None:
    """Raise InvalidMembership unless `proposed` may follow `current` (M2)."""
    validate(proposed)
    known = dict(current.nodes)
    for replica, node in proposed.nodes:
        if known.get(replica, node) != node:
            raise InvalidMembership(
                f"replica {replica} cannot move from node {known[replica]} to {node}"
            )
    if is_joint(current):
        if proposed != leave_joint(current):
            raise InvalidMembership("a joint membership can only be left")
        return
    if is_joint(proposed):
        if proposed.voters_outgoing != current.voters:
            raise InvalidMembership("the outgoing voters must be the current voters")
        return
    changed = [replica for replica in proposed.voters if replica not in current.voters]
    changed += [replica for replica in current.voters if replica not in proposed.voters]
    if len(changed) > 1:
        raise InvalidMembership(
            f"more than one voter changes ({sorted(changed)}): go through joint"
        )


def _with_nodes(membership: Membership, node_of: dict[int, int]) -> Membership:
    ids = members(membership)
    missing = [replica for replica in ids if replica not in node_of]
    if missing:
        raise InvalidMembership(f"no node is known for the replicas {missing}")
    result = Membership(
        membership.voters,
        membership.voters_outgoing,
        membership.learners,
        membership.learners_next,
        tuple((replica, node_of[replica]) for replica in ids),
    )
    validate(result)
    return result


class History:
    """The membership at each index that the log holds (M1)."""

    __slots__ = ("_changes", "current", "current_index")

    def __init__(self, index: int, base: Membership) -> None:
        """`base` is in effect after `index`, the log's start."""
        self._changes: list[tuple[int, Membership]] = [(index, base)]
        self.current = base
        self.current_index = index

    def append(self, index: int, membership: Membership) -> None:
        """A CONFIG entry was appended at `index`."""
        assert index > self.current_index, f"{index} after {self.current_index}"
        self._changes.append((index, membership))
        self.current, self.current_index = membership, index

    def truncate_after(self, index: int) -> bool:
        """The log lost everything above `index`. True if that rolled a membership back."""
        if self.current_index <= index:
            return False
        while len(self._changes) > 1 and self._changes[-1][0] > index:
            self._changes.pop()
        self.current_index, self.current = self._changes[-1]
        return True

    def compact(self, index: int) -> None:
        """The log starts after `index` now; the membership there becomes the base."""
        while len(self._changes) > 1 and self._changes[1][0] <= index:
            del self._changes[0]

    def reset(self, index: int, base: Membership) -> None:
        """A snapshot replaced the log."""
        self._changes = [(index, base)]
        self.current, self.current_index = base, index

    def at(self, index: int) -> Membership:
        """The membership in effect at `index` (at or above the log's start)."""
        for changed_at, membership in reversed(self._changes):
            if changed_at <= index:
                return membership
        return self._changes[0][1]
