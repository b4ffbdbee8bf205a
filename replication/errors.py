"""Errors of replication. Each says what the caller may do next."""

from __future__ import annotations

import errno
from collections.abc import Sequence


class ReplicationError(Exception):
    """Base of all errors that this package raises for the world's faults (its own bugs are assertions)."""


class NotLeader(ReplicationError):
    """This replica does not lead its group (any more); nothing was proposed. Ask `leader` (a replica id, 0 if unknown)."""

    def __init__(self, leader: int = 0) -> None:
        super().__init__(
            f"not the leader; the leader is replica {leader}"
            if leader
            else "not the leader; no leader is known"
        )
        self.leader = leader


class ProposalDropped(ReplicationError):
    """The leader refuses for now (a transfer is on its way, too much is uncommitted, a change is pending). Try again."""


class EntryTooLarge(ReplicationError):
    """No message to a follower could hold the entry; nothing was proposed, and the same will be refused again."""


class LogFormatError(ReplicationError):
    """The log's files are of a format that this version does not read. Nothing was changed."""


class LogUnreadable(OSError):
    """The disk fails for parts of a segment. Recovery takes them for damage where it can tell, else the node does not start.

    data: the whole file, with ones (0xFF) where it could not be read. holes: their offsets, in blocks of 4 KiB.
    """

    def __init__(self, segment: int, data: bytes, holes: Sequence[int]) -> None:
        super().__init__(
            errno.EIO,
            f"segment {segment} of the log cannot be read in {len(holes)} places, the first at offset {holes[0]}",
        )
        self.data, self.holes = data, holes


class LogWriteFailed(ReplicationError):
    """A write or sync of the log failed: its outcome is unknown, and the process must stop (pitfall 11)."""


class LogDiskFull(LogWriteFailed):
    """The log's disk is full. The process must stop as for any failed write; space, not the disk, is what it lacks."""


class LogMismatch(ReplicationError):
    """The engine and the log contradict each other (pitfall 19). The node refuses to serve until both are put back as they
    were; another member's are no substitute, for they would vote under its replica ids.
    """


class FrameError(ReplicationError):
    """Bytes from a peer that do not decode. The connection is closed; nothing was applied."""


class InvalidMembership(ReplicationError):
    """A membership, or a change from one to another, that the rules of membership.py do not allow. Ask for another."""
