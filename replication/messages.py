"""What replicas of one group say to each other (Ongaro's thesis, chapters 3, 4, 6 and 9).

Array-like msgspec structs: fields are only ever appended, with defaults, so that an older node reads a newer one.
`to` and `sender` are replica ids. `probe` is a counter that a leader raises within its term with every round it
sends and that a follower gives back: it confirms read indices and renews the lease (pitfall 4: never a caller's context).
"""

from __future__ import annotations

import msgspec

from replication.types import Entry, SnapshotMeta


class VoteRequest(msgspec.Struct, array_like=True, frozen=True, tag=1, gc=False):
    group: int
    to: int
    sender: int
    term: int  # for a pre-vote: the term the candidate would have
    last_index: int
    last_term: int
    pre: bool
    transfer: bool = False  # asked for by the leader itself: the lease does not refuse it


class VoteResponse(msgspec.Struct, array_like=True, frozen=True, tag=2, gc=False):
    group: int
    to: int
    sender: int
    term: int
    granted: bool
    pre: bool


class AppendRequest(msgspec.Struct, array_like=True, frozen=True, tag=3):
    """Entries, or none: then it is a heartbeat that also checks the log."""

    group: int
    to: int
    sender: int
    term: int
    previous_index: int
    previous_term: int
    entries: list[Entry]
    commit: int
    probe: int


class AppendResponse(msgspec.Struct, array_like=True, frozen=True, tag=4, gc=False):
    group: int
    to: int
    sender: int
    term: int
    success: bool
    match_index: int  # on success: durable here and equal to the leader's up to this index
    probe: int
    hint_index: int = 0  # on refusal: the largest index at which the logs may agree
    hint_term: int = 0  # and this follower's term there
    rejected_index: int = 0  # the previous_index that was refused, so that a stale refusal is known


class Heartbeat(msgspec.Struct, array_like=True, frozen=True, tag=5, gc=False):
    """Leadership alone: sent when there is nothing to append, and to replicas that are paused or far behind."""

    group: int
    to: int
    sender: int
    term: int
    commit: int  # at most the receiver's known match index
    probe: int  # 0: only a notice of the commit index; no answer is wanted


class HeartbeatResponse(msgspec.Struct, array_like=True, frozen=True, tag=6, gc=False):
    group: int
    to: int
    sender: int
    term: int
    probe: int
    last_index: int  # durable here: lets the leader notice a lost append


class TimeoutNow(msgspec.Struct, array_like=True, frozen=True, tag=7, gc=False):
    """Leadership transfer: campaign at once."""

    group: int
    to: int
    sender: int
    term: int


class SteppedDown(msgspec.Struct, array_like=True, frozen=True, tag=8, gc=False):
    """A leader that steps down says so: the others need not wait for their timers."""

    group: int
    to: int
    sender: int
    term: int


class InstallSnapshot(msgspec.Struct, array_like=True, frozen=True, tag=9):
    """A whole snapshot has arrived and was verified: the host hands this to the core on the receiving side."""

    group: int
    to: int
    sender: int
    term: int
    meta: SnapshotMeta


Message = (
    VoteRequest
    | VoteResponse
    | AppendRequest
    | AppendResponse
    | Heartbeat
    | HeartbeatResponse
    | TimeoutNow
    | SteppedDown
    | InstallSnapshot
)
