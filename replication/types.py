"""The nouns of replication: entries, hard state, membership, snapshots.

Pure data. A group is one Raft group; a replica is one member of one group and its id is never used again;
a node is a process that hosts replicas of many groups. Indices and terms start at 1; 0 means "none".
"""

from __future__ import annotations

import enum
from typing import NewType

import msgspec

GroupId = NewType("GroupId", int)
ReplicaId = NewType("ReplicaId", int)
NodeId = NewType("NodeId", int)

NO_REPLICA = ReplicaId(0)


class EntryKind(enum.IntEnum):
    COMMAND = 0  # bytes of the layer above
    NOOP = 1  # what a new leader appends, so that it may commit what it inherited
    CONFIG = 2  # an encoded Membership, effective when appended


class Entry(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One entry of a group's log."""

    index: int
    term: int
    kind: int  # an EntryKind; an int on the wire, so that decoding stays cheap
    data: bytes


class HardState(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a replica must not forget: its term, its vote in that term, and (a hint) its commit index."""

    term: int = 0
    vote: int = 0
    commit: int = 0


class Membership(msgspec.Struct, array_like=True, frozen=True):
    """The members of a group; joint while `voters_outgoing` is not empty.

    All tuples are sorted by replica id. `learners_next` are outgoing voters that become learners when joint ends.
    `nodes` pairs every replica id that occurs with its node id.
    """

    voters: tuple[int, ...] = ()
    voters_outgoing: tuple[int, ...] = ()
    learners: tuple[int, ...] = ()
    learners_next: tuple[int, ...] = ()
    nodes: tuple[tuple[int, int], ...] = ()


class SnapshotMeta(msgspec.Struct, array_like=True, frozen=True):
    """Where a snapshot stands: it replaces the log up to and with (index, term)."""

    index: int
    term: int
    membership: Membership
