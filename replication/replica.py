"""One replica of this node as its host keeps it: the core, what waits to be applied, reads that wait for an apply.

Plain bookkeeping between `RaftNode` and `Machine`; no I/O, no clock.

- B1 `applied` is what the machine has; the core is told no other, and entries follow it without a gap.
- B2 while `held`, the machine's state is being replaced: nothing is applied, no read is answered, no vote is asked for,
  but for B5.
- B3 the machine hears of leadership in pairs: of a term, then of its end, before any later term.
- B4 while `held` the log cannot be cut, and all of it waits to be applied: beyond a bound it takes no more entries. They
  count as lost on the way: nothing was promised, and the leader sends them again with each beat.
- B5 without a state, while one comes in, or with one that cannot be read, the log is as good as ever, and it may be the only
  one that has what is committed. So when nobody else can be elected, the core leads as a caretaker and hands over to whoever
  has taken its log. The machine does not hear of it, and nobody gets a snapshot from it. A snapshot that has come in meanwhile
  does not begin the log anew: what it holds is committed, and who was elected later than its sender has that.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from replication.measures import Measures
from replication.messages import AppendRequest, Message
from replication.ports import Machine
from replication.probes import chance, reached
from replication.raft import RaftNode
from replication.reads import ReadState
from replication.ready import RaftConfig
from replication.turns import ENTRY_OVERHEAD_BYTES, ApplyQueue, HostLimits, Routes, Start
from replication.types import Entry, Membership, SnapshotMeta

LIVE_PROBES: Final = (
    20  # a follower is live if it answered one of the last this many that any follower answered
)
APPLY_AT_ONCE: Final = 16  # entries, between two looks at what they staged
APPLY_BYTES_AT_ONCE: Final = 64 << 10  # of these; one at least


class Helped(NamedTuple):
    """A follower that gets a snapshot, or got one and has not caught up yet."""

    after: int  # the log above this is needed for it
    since: float | None  # monotonic seconds of its last progress; None: the stream goes on


class Replica:
    """See the module."""

    __slots__ = (
        "applied",
        "group",
        "helped",
        "id",
        "install",
        "led_term",
        "log_start",
        "proposed",
        "queue",
        "raft",
        "reads",
        "receiving",
        "routes",
        "stateless",
        "stuck",
        "unreadable",
    )

    def __init__(self, group: int, replica: int, raft: RaftNode, applied: int) -> None:
        self.group, self.id, self.raft = group, replica, raft
        self.applied = applied
        self.log_start = raft.first_index - 1  # what the log file is compacted to
        self.queue = ApplyQueue(applied)
        self.reads: deque[tuple[int, int]] = deque()  # (index, context), index not falling
        self.routes = Routes()
        self.receiving = False  # a snapshot; if it gets lost, so is the state
        self.stateless = False  # an installation was cut short: the replica asks for a snapshot
        self.stuck = False  # the node's disk is
        self.unreadable = False  # a read of the state failed, and none succeeded since: B5
        self.install: SnapshotMeta | None = None  # the core accepted this one
        self.proposed: deque[tuple[int, float]] = (
            deque()
        )  # (index, when), of the term that is led; raft bounds what is uncommitted
        self.helped: dict[int, Helped] = {}  # followers, by replica
        self.led_term = 0  # the term whose leadership the machine was told; 0: none

    @property
    def held(self) -> bool:
        """Whether the machine has no state that may be used, or only a part of one (B2)."""
        return self.receiving or self.stateless

    def node_of(self, replica: int) -> int | None:
        return self.routes.node(replica, self.raft.membership)

    def step(self, node: int, message: Message, now: float, held_bytes_max: int) -> None:
        self.routes.heard(message.sender, node)
        if self.held and type(message) is AppendRequest and message.entries:
            log = self.raft.log
            if log.bytes + ENTRY_OVERHEAD_BYTES * len(log) >= held_bytes_max:
                reached("append_with_no_room")
                return  # as if it were lost (B4)
        self.raft.step(message, now)

    # ------------------------------------------------------------ from the core to the machine

    def take_committed(self, entries: Sequence[Entry]) -> bool:
        """Queue what the core handed out. Returns whether there is something to apply now."""
        self.queue.add(entries)
        if self.held:
            return False
        if entries[0].index <= self.applied:  # a snapshot brought it before its commit was known
            reached("committed_entries_skipped")
            self.raft.applied_to(min(entries[-1].index, self.applied))
        return len(self.queue) > 0

    def time_commits(self, entries: Sequence[Entry], now: float, measures: Measures) -> None:
        """Committed entries, of which some were proposed here."""
        upto, proposed = entries[-1].index, self.proposed
        while proposed and proposed[0][0] <= upto:
            measures.commit_seconds.note(now - proposed.popleft()[1])

    def applied_to(self, machine: Machine, index: int) -> None:
        """The machine has applied up to `index`, and answered."""
        self.applied = index
        self.raft.applied_to(index)
        if self.reads:
            self.serve_reads(machine)

    def answer_reads(
        self, machine: Machine, states: Sequence[ReadState], failed: Sequence[int]
    ) -> None:
        """Reads the core confirmed or gave up; the former wait for their index."""
        for state in states:
            self.reads.append((state.index, state.context))
        if states:
            self.serve_reads(machine)
        if failed:
            machine.read_confirmed(self.group, failed, False)

    def serve_reads(self, machine: Machine) -> None:
        contexts: list[int] = []
        while self.reads and self.reads[0][0] <= self.applied and not self.held:
            contexts.append(self.reads.popleft()[1])
        if contexts:
            machine.read_confirmed(self.group, contexts, True)

    def tell_leadership(self, machine: Machine, leads: bool) -> None:
        """The core began or ended to lead."""
        term = self.raft.term
        leads = leads and not (self.held or self.unreadable)  # B5
        if self.led_term and (not leads or self.led_term != term):
            ended, self.led_term = self.led_term, 0
            self.proposed.clear()
            machine.leadership(self.group, ended, False)
        if leads and not self.led_term:
            self.led_term = term
            machine.leadership(self.group, term, True)

    def storage_is_stuck(self, now: float) -> None:
        """Lead nothing, so that others may, and do not campaign."""
        reached("disk_stalled")
        self.stuck = True
        self._may_lead()
        self.raft.step_down(now)

    def storage_moves(self) -> None:
        self.stuck = False
        self._may_lead()

    def _may_lead(self) -> None:
        self.raft.electable = not (self.held or self.unreadable or self.stuck)
        self.raft.caretaker = (self.held or self.unreadable) and not self.stuck

    def _end_unheard(self) -> None:
        """Elected while it could not serve, and now it could: the machine has not heard of it, so it is elected anew."""
        if self.raft.is_leader and not self.led_term:
            self.raft.step_down(self.raft.now)

    # ------------------------------------------------------------ state from a snapshot

    def cannot_read(self, now: float) -> None:
        """The machine's state could not be read: whoever leads owes it to others, so let somebody else lead."""
        reached("unreadable_leader")
        self.unreadable = True
        self._may_lead()
        self.raft.step_down(now)

    def can_read(self) -> None:
        """It has been read whole since (`replication/trials.py`)."""
        self.unreadable = False
        self._may_lead()
        if not self.held:
            self._end_unheard()

    def hold(self) -> None:
        """The machine's state is about to be replaced: apply nothing, and lead only by B5, for it may get lost."""
        self.receiving = True
        self._may_lead()
        self.raft.step_down(self.raft.now)  # a caretaker, or one that has not heard of a later term

    def lose_state(self) -> None:
        """The machine's state is gone: apply nothing, serve nothing; the log and the vote are as good as ever."""
        reached("state_lost")
        self.stateless, self.receiving = True, False
        self._may_lead()
        self.raft.step_down(self.raft.now)

    def has_state(self, machine: Machine, index: int) -> None:
        """The machine's state stands at `index`, by a snapshot; go on from there."""
        self.receiving = self.stateless = self.unreadable = False
        self._may_lead()
        self._end_unheard()
        handed_out = min(index, self.queue.last_index)
        if handed_out > self.raft.applied_index:
            self.raft.applied_to(handed_out)
        self.queue.installed(index)
        self.applied = index
        self.serve_reads(machine)

    # ------------------------------------------------------------ compaction

    def live_log(self) -> list[Entry]:
        """What the log file holds of this group, from where it was compacted to."""
        reached("log_carried")
        log = self.raft.log
        return log.slice(self.log_start + 1, log.handed_index)

    def snapshot_begins(self, other: int, index: int) -> None:
        """A stream of the state at `index` begins to leave for a follower."""
        self.helped[other] = Helped(index, None)

    def snapshot_ends(self, other: int, ok: bool) -> None:
        """It ended. A follower that has it now needs what was written since: its word of that may still be on its way."""
        helped = self.helped.pop(other, None)
        if helped is None:
            return  # it was outrun, or never began
        peer = self.raft.status()["peers"].get(other)
        if ok or (peer is not None and peer["match"] >= helped.after):
            self.helped[other] = Helped(helped.after, self.raft.now)

    def cut(self, index: int, limits: HostLimits) -> list[int]:
        """The engine has flushed up to `index`, and the log file is cut there. Returns followers whose snapshot is outrun.

        In memory a leader keeps what a live follower lacks, while that is at most `log_tail_bytes_max`; and what one
        lacks that is helped by a snapshot, while that is at most `catch_up_bytes_max`.
        """
        self.log_start = max(self.log_start, index)
        raft = self.raft
        peers: dict[int, dict[str, Any]] = raft.status()["peers"]  # none if it does not lead
        tail_bytes_max = 0 if chance("log_tail_dropped") else limits.log_tail_bytes_max
        tail = raft.log.lowest_within(tail_bytes_max)
        self._forget_helped(peers, tail)
        furthest = raft.log.lowest_within(limits.catch_up_bytes_max)
        outrun = [other for other, h in self.helped.items() if h.after < min(index, furthest)]
        for other in outrun:
            reached("snapshot_outrun")
            del self.helped[other]
        needed = [helped.after for helped in self.helped.values()]
        upto = min([index, *needed, *_needed_by_live(peers, tail)])
        if upto >= raft.first_index:
            raft.compact(upto)
        return outrun

    def _forget_helped(self, peers: dict[int, dict[str, Any]], tail: int) -> None:
        """Note progress. Who lacks no more than others may, or makes none for `snapshot_patience_s`, is as any other."""
        now, patience_s = self.raft.now, self.raft.config.snapshot_patience_s
        for other, (after, since) in list(self.helped.items()):
            match = peers[other]["match"] if other in peers else 0
            if since is not None and (
                match >= max(after, tail) or (match <= after and now >= since + patience_s)
            ):
                del self.helped[other]
            elif match > after:
                self.helped[other] = Helped(match, None if since is None else now)


def _needed_by_live(peers: dict[int, dict[str, Any]], tail: int) -> list[int]:
    """Above what each live follower needs the log, where that is `tail` or higher."""
    taking = [peer for peer in peers.values() if peer["state"] != "snapshot"]
    newest = max((peer["acked_probe"] for peer in taking), default=0)
    return [
        peer["match"]
        for peer in taking
        if peer["match"] >= tail and peer["acked_probe"] + LIVE_PROBES >= newest
    ]


class Applier:
    """Hands committed entries to the machine, a bounded slice at a time, all groups in their turn."""

    def __init__(self, replicas: dict[int, Replica], machine: Machine, limits: HostLimits) -> None:
        self.groups: dict[
            int, None
        ] = {}  # that have something to apply, in the order in which they came
        self.entries_applied = 0
        self._replicas, self._machine, self._limits = replicas, machine, limits

    def apply(self) -> list[Replica]:
        """Apply one slice and answer. Returns the replicas it applied to; `groups` keeps what is left."""
        bytes_left, entries_left = self._limits.apply_bytes_max, self._limits.apply_entries_max
        if chance("apply_slice_of_one"):
            entries_left = 1
        done: list[tuple[Replica, int]] = []
        for group in list(self.groups):
            del self.groups[group]
            replica = self._replicas.get(group)
            if replica is None or replica.held:
                continue
            last = 0
            while len(replica.queue) and bytes_left > 0 and entries_left > 0:
                entries, size_bytes = replica.queue.take(
                    min(bytes_left, APPLY_BYTES_AT_ONCE), min(entries_left, APPLY_AT_ONCE)
                )
                bytes_left -= max(size_bytes, self._machine.apply(group, entries))
                entries_left -= len(entries)
                self.entries_applied += len(entries)
                last = entries[-1].index
            if last:
                done.append((replica, last))
            if len(replica.queue):
                self.groups[group] = None  # at the end of the line
            if bytes_left <= 0 or entries_left <= 0:
                break
        if done:
            self._machine.finish()
        for replica, index in done:
            replica.applied_to(self._machine, index)
        return [replica for replica, _ in done]


def open_replica(
    group: int,
    replica: int,
    start: Start,
    membership: Membership,
    *,
    config: RaftConfig,
    rng: random.Random,
    quiet: bool,
    now: float,
    measures: Measures | None = None,
) -> Replica:
    """A replica as it begins. quiet: an old self may have promised a lease; no vote until the longest one is over.

    `membership` is that of the engine; the log may have a later one. So who is the sole voter is for the core to say.
    """
    raft = RaftNode(
        group,
        replica,
        config,
        rng,
        hard_state=start.state,
        membership=membership,
        log_start=start.log_start,
        entries=start.entries,
        applied=start.applied,
        now=now,
        vote_not_before=now + config.election_timeout_s if quiet else 0.0,
        measures=measures,
    )
    return Replica(group, replica, raft, start.applied)
