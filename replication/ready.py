"""What goes into a Raft core and what comes out: configuration, durability tokens, the work to do."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from replication.messages import Message
from replication.reads import ReadState
from replication.types import Entry, HardState, SnapshotMeta


class Role(enum.Enum):
    FOLLOWER = "follower"  # learners too
    PRE_CANDIDATE = "pre-candidate"  # asks whether it could win; its term is unchanged
    CANDIDATE = "candidate"
    LEADER = "leader"


@dataclass(frozen=True)
class RaftConfig:
    """Times and limits of one group."""

    election_timeout_s: float = (
        1.0  # the base; a follower waits base..2*base, drawn anew for each term
    )
    heartbeat_s: float = 0.2
    lease_drift: float = (
        0.1  # a lease is election_timeout_s * (1 - lease_drift), from the send time
    )
    commit_notice_s: float = 0.02  # an idle leader tells followers of a new commit index this soon
    snapshot_patience_s: float = 10.0  # from "sent" to "installed", before it is tried again
    inflight_entries_max: int = 4096  # per follower
    inflight_bytes_max: int = 8 << 20  # per follower
    append_bytes_max: int = 1 << 20  # per AppendRequest; one entry may be larger
    entry_bytes_max: int = 8 << 20  # of a command; one message to a follower has to hold it
    uncommitted_bytes_max: int = 64 << 20  # per group; one entry may be larger
    pending_reads_max: int = 10_000  # contexts that are not answered, per group

    def __post_init__(self) -> None:
        assert 0 < self.heartbeat_s <= self.election_timeout_s / 2, "two heartbeats per timeout"
        assert 0 <= self.lease_drift < 1

    @property
    def lease_s(self) -> float:
        return self.election_timeout_s * (1.0 - self.lease_drift)


class Token(NamedTuple):
    """What must be durable before something counts or leaves: the hard state, and the log up to and with its last entry."""

    term: int
    vote: int
    last_index: int
    last_term: int


class Outgoing(NamedTuple):
    """A message and what must be durable before it leaves; None: it may leave at once.

    A token here is always the newest that was handed out in a Ready and not yet passed to `persisted`, this
    Ready's own included.
    """

    message: Message
    token: Token | None


@dataclass(slots=True)
class Ready:
    """Work that the core hands to its host, once."""

    hard_state: HardState | None = None  # to write if not None
    entries: Sequence[Entry] = ()  # to append; the first one's index may be at or below the last:
    # the suffix is replaced
    token: Token | None = (
        None  # pass it to `persisted` when hard_state and entries are durable; None: nothing to write
    )
    outgoing: Sequence[Outgoing] = ()  # in order per receiver
    committed: Sequence[Entry] = ()  # to apply: committed, and durable in this replica's own log
    read_states: Sequence[ReadState] = ()  # confirmed: serve when applied >= index
    reads_failed: Sequence[int] = ()  # contexts whose leadership is lost
    snapshot_to: Sequence[int] = ()  # replicas that need a snapshot; appends to them pause
    install: SnapshotMeta | None = (
        None  # accepted: install it, make RESET durable, then call `installed`
    )
    leadership: bool | None = None  # became leader, or stopped leading; None: unchanged
