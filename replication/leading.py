"""Leader: what one replica keeps and does while it leads one term. The story is in replication/DESIGN.md.

Built when an election is won, dropped when leadership ends; `over` says that it should end (no quorum is in touch, or
the group goes on without this replica). Time is `state.now`.
"""

from __future__ import annotations

from typing import Final

from replication.codec import encode_membership
from replication.errors import ProposalDropped
from replication.membership import is_joint, is_voter, leave_joint, members
from replication.messages import (
    AppendRequest,
    AppendResponse,
    Heartbeat,
    HeartbeatResponse,
    SteppedDown,
    TimeoutNow,
)
from replication.probes import chance, reached
from replication.progress import FOREVER, Progress, State
from replication.quorum import agreed_value
from replication.reads import ProbeTimes, ReadQueue
from replication.ready import Ready
from replication.state import ReplicaState
from replication.types import Entry, EntryKind, Membership

PROBE_GRAINS: Final = 32  # send times are remembered in steps of election_timeout_s / this
PROBES_MAX: Final = 1 << 62  # the own progress has acknowledged every probe


class Leader:
    """Replication, commit, reads, lease and transfer for one term."""

    def __init__(self, state: ReplicaState) -> None:
        """Take office: append the no-op that lets inherited entries be committed, and tell everybody."""
        config, log = state.config, state.log
        self._state = state
        self.over = False
        self.reads = ReadQueue(config.pending_reads_max)
        self.transfer_to = 0
        self._offered_to = 0  # the last replica that a caretaker asked to take over
        self.uncommitted_bytes = sum(
            len(entry.data) for entry in log.slice(state.commit_index + 1, log.last_index)
        )
        self.replicate_due = False
        self.beats_due = False
        self._probe = 0
        self._probe_times = ProbeTimes(
            2 * config.election_timeout_s, config.election_timeout_s / PROBE_GRAINS
        )
        self._lease_start: float | None = None  # None: to be computed
        self._lease_given_up = False
        # A beat that an append stands for leaves two periods between two probes: the answer has to come in time still.
        self._appends_are_beats = 3 * config.heartbeat_s <= config.election_timeout_s
        self._beat_at = next_beat(state.now, config.heartbeat_s)
        self._notice_at = FOREVER
        self._transfer_until = FOREVER

        self._own = Progress(0)  # the own disk and the own presence, counted as any other
        self._own.match = log.durable_index
        self._own.acked_probe = PROBES_MAX
        self._own.acked_sent_at = self._own.heard_at = FOREVER
        self.peers: dict[int, Progress] = {}
        self._incoming: list[Progress] = []
        self._outgoing: list[Progress] = []
        self.membership_changed()
        self._next_probe()
        self.term_start_index = self.append(EntryKind.NOOP, b"")

    # ------------------------------------------------------------------ membership

    def membership_changed(self) -> None:
        """Derive anew who is replicated to and who counts; the quorum gets a full timeout to show itself."""
        state = self._state
        membership = state.history.current
        known, next_index = self.peers, state.log.last_index + 1
        self.peers = {
            replica: known.get(replica) or Progress(next_index)
            for replica in members(membership)
            if replica != state.replica
        }
        counted = {**self.peers, state.replica: self._own}
        self._incoming = [counted[voter] for voter in membership.voters]
        self._outgoing = [counted[voter] for voter in membership.voters_outgoing]
        if self.transfer_to and self.transfer_to not in membership.voters:
            self._end_transfer()
        if state.sole_voter:  # nobody is left to answer the rounds that wait
            state.read_states += self.reads.confirm(self._probe)
        self._lease_start = None
        self._quorum_since = state.now
        self._quorum_at = state.now + state.config.election_timeout_s

    def append_membership(self, membership: Membership) -> int:
        """Append a change that the rules allow; it is in effect at once."""
        state = self._state
        index = self.append(EntryKind.CONFIG, encode_membership(membership))
        state.history.append(index, membership)
        state.derive_membership()
        self.membership_changed()
        return index

    def leave_joint_if_due(self) -> None:
        """Joint is left once it is applied, by whoever leads then (M3)."""
        state, history = self._state, self._state.history
        if (
            is_joint(history.current)
            and history.current_index <= state.applied_index
            and state.commit_index >= self.term_start_index
            and not self.transfer_to
        ):
            reached("joint_left")
            self.append_membership(leave_joint(history.current))

    # ------------------------------------------------------------------ appending and committing

    def append(self, kind: EntryKind, data: bytes) -> int:
        """Append an entry of this term; returns its index."""
        state = self._state
        index = state.log.last_index + 1
        state.log.append(Entry(index, state.term, int(kind), data))
        self.uncommitted_bytes += len(data)
        self.replicate_due = True
        return index

    def log_durable(self) -> None:
        """More of the own log is on disk."""
        index = self._own.match = self._state.log.durable_index
        if index > self._state.commit_index:
            self._try_commit()

    def _try_commit(self) -> None:
        """Commit what every majority has on disk, if it is of this term (I4)."""
        state = self._state
        index = agreed_value(
            [voter.match for voter in self._incoming], [voter.match for voter in self._outgoing]
        )
        if index <= state.commit_index or state.log.term(index) != state.term:
            return  # what is of an earlier term is committed with the first entry of this one
        for entry in state.log.slice(state.commit_index + 1, index):
            self.uncommitted_bytes -= len(entry.data)
        state.commit_index = index
        if self._notice_at == FOREVER and self.peers:
            self._notice_at = state.now + state.config.commit_notice_s
        if not state.voter and state.history.current_index <= index:
            self.over = True  # the group goes on without this replica

    # ------------------------------------------------------------------ what goes out

    def fill(self, ready: Ready) -> None:
        """Read rounds, appends, heartbeats and wishes for snapshots, as far as they are due."""
        if self.reads.waiting and self._state.commit_index >= self.term_start_index:
            self._begin_read_round()
        if self.replicate_due:
            self._replicate(ready)
        if self.beats_due:
            self._send_beats()

    @property
    def has_work(self) -> bool:
        """Whether `fill` would do anything."""
        return (
            self.replicate_due
            or self.beats_due
            or (bool(self.reads.waiting) and self._state.commit_index >= self.term_start_index)
        )

    def _next_probe(self) -> int:
        self._probe += 1
        self._probe_times.sent(self._probe, self._state.now)
        return self._probe

    def _replicate(self, ready: Ready) -> None:
        """Send what windows allow; followers at the same place share one list of entries."""
        self.replicate_due = False
        shared: dict[int, tuple[list[Entry], int]] = {}
        for replica, peer in self.peers.items():
            self._replicate_to(replica, peer, shared)
            if peer.snapshot_due:
                peer.snapshot_due = False
                ready.snapshot_to = (*ready.snapshot_to, replica)

    def _replicate_to(
        self, replica: int, peer: Progress, shared: dict[int, tuple[list[Entry], int]]
    ) -> None:
        config, log = self._state.config, self._state.log
        entries_max, bytes_max = config.inflight_entries_max, config.inflight_bytes_max
        if chance("append_window_of_one"):
            entries_max = 1
        checking, peer.check_now = peer.check_now, False
        if (
            checking
            and peer.state is not State.SNAPSHOT
            and not (peer.next <= log.last_index and peer.may_append(entries_max, bytes_max))
        ):
            self._send_append(replica, peer, [], 0)  # nothing to send: only check the log
        while peer.next <= log.last_index and peer.may_append(entries_max, bytes_max):
            if peer.next <= log.start_index:
                reached("follower_behind_the_log")
                peer.become_snapshot()
                return
            window = entries_max - peer.entries_in_flight
            chunk = shared.get(peer.next)
            if chunk is None or len(chunk[0]) > window:
                chunk = log.slice_bounded(peer.next, window, config.append_bytes_max)
                shared[peer.next] = chunk
            self._send_append(replica, peer, *chunk)

    def _send_append(self, replica: int, peer: Progress, entries: list[Entry], size: int) -> None:
        state = self._state
        previous = peer.next - 1
        previous_term = state.log.term(previous)
        if previous_term is None:
            peer.become_snapshot()
            return
        commit = state.commit_index
        state.send(
            AppendRequest(
                state.group,
                replica,
                state.replica,
                state.term,
                previous,
                previous_term,
                entries,
                commit,
                self._probe,
            )
        )
        last = previous + len(entries)
        peer.sent_commit = max(peer.sent_commit, min(commit, last))
        peer.sent(last, size)
        if entries and not peer.timed_index:
            peer.timed_index, peer.timed_at = last, state.now

    def _send_beats(self) -> None:
        state = self._state
        self.beats_due = False
        for replica, peer in self.peers.items():
            if peer.beat_due or peer.notice_due:
                probe = self._probe if peer.beat_due else 0  # a notice is not answered
                peer.beat_due = peer.notice_due = False
                commit = min(state.commit_index, peer.match)
                peer.sent_commit = max(peer.sent_commit, commit)
                state.send(
                    Heartbeat(state.group, replica, state.replica, state.term, commit, probe)
                )

    def _begin_read_round(self) -> None:
        """Everything asked for since the last round shares the next probe (R1)."""
        state = self._state
        self.reads.begin_round(self._next_probe(), state.commit_index)
        if state.sole_voter:
            state.read_states += self.reads.confirm(self._probe)
            return
        membership = state.history.current
        for replica, peer in self.peers.items():
            if is_voter(membership, replica):
                peer.beat_due = self.beats_due = True

    # ------------------------------------------------------------------ what comes back

    def _contact(self, peer: Progress, probe: int) -> None:
        """A follower acknowledged a probe: it still followed this term after the probe was sent."""
        now = self._state.now
        if now >= self._quorum_at:  # what it says may have waited here while this process slept
            self._check_quorum()
        peer.heard_at = now
        peer.heard_since_beat = True
        if not peer.acked_probe < probe <= self._probe:
            return
        peer.acked_probe = probe
        sent_at = self._probe_times.sent_at(probe)
        if sent_at is not None and sent_at > peer.acked_sent_at:
            peer.acked_sent_at = sent_at
            self._lease_start = None
        if self.reads.open:
            agreed = agreed_value(
                [voter.acked_probe for voter in self._incoming],
                [voter.acked_probe for voter in self._outgoing],
            )
            self._state.read_states += self.reads.confirm(agreed)

    def on_append_response(self, message: AppendResponse) -> None:
        """An append was taken, or refused."""
        peer = self.peers.get(message.sender)
        if peer is None:
            return
        state, log = self._state, self._state.log
        self._contact(peer, message.probe)
        if not message.success:
            resume, _ = log.last_index_within_term(message.hint_index, message.hint_term)
            if peer.refused(message.rejected_index, resume):
                self.replicate_due = True
                if chance("snapshot_for_a_tail") and state.applied_index > peer.match:
                    peer.become_snapshot()
            return
        match = message.match_index
        assert match <= log.last_index, f"replica {message.sender} claims {match}: {message!r}"
        news = peer.accepted(match)
        if 0 < peer.timed_index <= match:
            state.measures.append_seconds.note(state.now - peer.timed_at)
            peer.timed_index = 0
        if peer.state is State.PROBE or (
            peer.state is State.SNAPSHOT and peer.match >= log.start_index
        ):
            peer.become_replicate()
        if peer.next <= log.last_index:
            self.replicate_due = True
        if news and match > self._state.commit_index:
            self._try_commit()
        if message.sender == self.transfer_to:
            self._try_transfer(peer)

    def on_heartbeat_response(self, message: HeartbeatResponse) -> None:
        """Leadership is acknowledged; an append that was lost before comes to light."""
        peer = self.peers.get(message.sender)
        if peer is None:
            return
        self._contact(peer, message.probe)
        log = self._state.log
        if peer.state is State.SNAPSHOT:
            if peer.snapshot_deadline is None or message.last_index < log.start_index:
                return
            reached("word_of_a_snapshot_lost")
            self._probe_after_snapshot(peer)  # installed, and the word of it was lost
        if peer.check_due and (peer.paused or peer.match < log.last_index):
            reached("append_sent_again")
            peer.check_due = peer.paused = False
            peer.check_now = self.replicate_due = True

    # ------------------------------------------------------------------ snapshots

    def snapshot_status(self, replica: int, ok: bool) -> None:
        peer = self.peers.get(replica)
        if peer is None or peer.state is not State.SNAPSHOT:
            return
        if ok:
            peer.snapshot_deadline = self._state.now + self._state.config.snapshot_patience_s
        else:
            self._probe_after_snapshot(peer)

    def _probe_after_snapshot(self, peer: Progress) -> None:
        """Ask the follower where it is, once it answers a heartbeat."""
        peer.become_probe(self._state.log.last_index + 1)
        peer.paused = peer.check_due = True

    # ------------------------------------------------------------------ quorum, lease and transfer

    def _check_quorum(self) -> None:
        """Leadership is over when no quorum was heard from for an election timeout; this replica is always in touch.

        What they answered does not matter here: behind a busy link a probe may be old when it comes back, and to be
        deposed for that helps nobody. The lease counts from when it was sent (I6).
        """
        heard_at = agreed_value(
            [voter.heard_at for voter in self._incoming],
            [voter.heard_at for voter in self._outgoing],
        )
        timeout_s = self._state.config.election_timeout_s
        self._quorum_at = max(heard_at, self._quorum_since) + timeout_s
        if self._state.now >= self._quorum_at:
            self.over = True

    def _lease_began(self) -> float:
        """The send time of the newest probe that a quorum answered."""
        return agreed_value(
            [voter.acked_sent_at for voter in self._incoming],
            [voter.acked_sent_at for voter in self._outgoing],
        )

    def lease_valid(self, now: float) -> bool:
        state = self._state
        if state.commit_index < self.term_start_index or self._lease_given_up or self.transfer_to:
            return False
        start = self._lease_start
        if start is None:
            start = self._lease_start = self._lease_began()
        return now < start + state.config.lease_s

    def transfer(self, to: int) -> None:
        """Raises ProposalDropped if `to` is no voter, or another transfer is under way."""
        state = self._state
        if to in {state.replica, self.transfer_to}:
            return
        peer = self.peers.get(to)
        if peer is None or to not in state.history.current.voters:
            raise ProposalDropped(f"replica {to} is no voter")
        if self.transfer_to:
            raise ProposalDropped(f"leadership is being transferred to {self.transfer_to}")
        self.transfer_to = to
        self._transfer_until = state.now + state.config.election_timeout_s
        self._try_transfer(peer)

    def _hand_over(self) -> None:
        """A caretaker asks who has the whole log to lead, one after the other: some may have no state either. Then it ends."""
        state = self._state
        whole = [
            voter
            for voter in state.history.current.voters
            if voter in self.peers and self.peers[voter].match == state.log.last_index
        ]
        next_ones = [voter for voter in whole if voter > self._offered_to]
        if next_ones:
            reached("caretaker_handed_over")
            self._offered_to = min(next_ones)
            self.transfer(self._offered_to)
        elif whole:
            self.over = True  # nobody took it; who cannot be asked may try, and has more time to than this one

    def _try_transfer(self, peer: Progress) -> None:
        state = self._state
        if peer.match == state.log.last_index:
            self._lease_given_up = True  # a late TimeoutNow may depose this leader at any time
            state.send(TimeoutNow(state.group, self.transfer_to, state.replica, state.term))

    def _end_transfer(self) -> None:
        self.transfer_to = 0
        self._transfer_until = FOREVER

    # ------------------------------------------------------------------ time, and the end

    def deadline(self) -> float:
        return min(self._beat_at, self._notice_at, self._quorum_at, self._transfer_until)

    def tick(self) -> None:
        """Whatever is due at `state.now`."""
        state, now = self._state, self._state.now
        if now >= self._quorum_at:
            self._check_quorum()
            if self.over:
                return
        if now >= self._transfer_until:
            reached("transfer_given_up")
            self._end_transfer()
        if now >= self._beat_at:
            self._beat()
        if now >= self._notice_at:
            self._notice_at = FOREVER
            for peer in self.peers.values():
                if peer.sent_commit < min(state.commit_index, peer.match):
                    peer.notice_due = self.beats_due = True

    def _beat(self) -> None:
        """A new probe. Whoever was sent appends and has answered them all gets it with the next append instead."""
        state = self._state
        self._beat_at = next_beat(state.now, state.config.heartbeat_s)
        self._next_probe()
        for peer in self.peers.values():
            peer.check_due = peer.paused or peer.match < state.log.last_index
            busy = peer.append_since_beat and peer.heard_since_beat
            if peer.check_due or not (busy and self._appends_are_beats):
                peer.beat_due = self.beats_due = True
            peer.append_since_beat = peer.heard_since_beat = False
            if peer.snapshot_deadline is not None and state.now >= peer.snapshot_deadline:
                self._probe_after_snapshot(peer)
        if self.transfer_to:
            self._try_transfer(self.peers[self.transfer_to])
        elif not state.electable:
            self._hand_over()
        else:
            self.leave_joint_if_due()

    def end(self, *, announce: bool) -> None:
        """Leadership is lost or given up: reads fail, and the followers are told."""
        state = self._state
        state.reads_failed += self.reads.fail()
        if announce:
            for replica in self.peers:
                state.send(SteppedDown(state.group, replica, state.replica, state.term))


def next_beat(now: float, heartbeat_s: float) -> float:
    """When heartbeats are due next: on a grid of the node's clock, so that those of all its groups share frames."""
    number = now // heartbeat_s + 1.0
    at = number * heartbeat_s
    return at if at > now else (number + 1.0) * heartbeat_s  # the division may have rounded down
