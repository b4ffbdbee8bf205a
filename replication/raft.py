"""RaftNode: one replica of one group, without I/O. The story, the rules and their reasons: replication/DESIGN.md.

Messages and time go in (`step`, `tick`), work comes out (`ready`); the host does the work and reports what became
durable (`persisted`, `installed`) and applied (`applied_to`). Nothing here awaits, reads a clock, or touches a file.

Invariants (asserted, or checked by the tests that DESIGN.md names):
I1. At most one leader per term; a vote and a term are durable before they leave or count.
I2. What a replica acknowledges is durable in its own log, in the form in which it stands there now (pitfall 14).
I3. Nothing at or below commit_index is ever replaced (pitfall 21); commit_index never falls.
I4. A leader commits by counting only entries of its own term (pitfall 3).
I5. An entry is handed out for applying once, in order, and only when committed and durable here.
I6. A lease counts from the send time of a probe that a quorum answered, and is over before any of them votes (pitfall 5).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from replication.codec import decode_membership, encode_membership
from replication.errors import FrameError, LogMismatch, NotLeader, ProposalDropped
from replication.log import RaftLog
from replication.membership import (
    History,
    check_change,
    is_joint,
    is_voter,
    leave_joint,
    members,
    validate,
)
from replication.messages import (
    AppendRequest,
    AppendResponse,
    Heartbeat,
    HeartbeatResponse,
    InstallSnapshot,
    Message,
    SteppedDown,
    TimeoutNow,
    VoteRequest,
    VoteResponse,
)
from replication.progress import NEVER, Progress, State
from replication.quorum import Election, agreed_value, election_result
from replication.reads import ProbeTimes, ReadQueue, ReadState
from replication.ready import Outgoing, RaftConfig, Ready, Role, Token
from replication.types import NO_REPLICA, Entry, EntryKind, HardState, Membership, SnapshotMeta

__all__ = ["Outgoing", "RaftConfig", "RaftNode", "ReadState", "Ready", "Role", "Token"]

FOREVER: Final = float("inf")
PROBE_GRAINS: Final = 32  # send times are remembered in steps of election_timeout_s / this


class RaftNode:
    """One replica. `now` is monotonic seconds and never falls; every limit and time is in `config`."""

    def __init__(
        self,
        group: int,
        replica: int,
        config: RaftConfig,
        rng: random.Random,
        *,
        hard_state: HardState,
        membership: Membership,
        log_start: tuple[int, int],
        entries: Sequence[Entry],
        applied: int,
        now: float,
        vote_not_before: float = 0.0,
    ) -> None:
        """A replica as its disk has it.

        `membership` is that in effect at `log_start` (index, term); CONFIG entries among `entries` come on top.
        `applied` is the index up to which the state machine has applied. Before `vote_not_before` no vote is granted
        (its old self may have promised a lease), but for a group of one voter, which campaigns at the first tick.
        Raises LogMismatch if log and state machine contradict each other (pitfall 19).
        """
        log = RaftLog(*log_start, entries)
        if not log.start_index <= applied <= log.last_index:
            raise LogMismatch(
                f"group {group}: applied up to {applied}, but the log holds "
                f"{log.first_index}..{log.last_index}"
            )
        self.group = group
        self.replica = replica
        self.config = config
        self.electable = True  # the host's word: false while its storage makes no progress
        self._rng = rng
        self._now = now
        self._vote_not_before = vote_not_before

        # What must survive (hard state), and how much of it is known to be on disk.
        self.term = max(hard_state.term, log.last_term)
        self._vote = hard_state.vote if self.term == hard_state.term else 0
        self._durable_term = hard_state.term
        self._durable_vote = hard_state.vote
        self._hard_state_due = self.term != hard_state.term
        self._commit_written = hard_state.commit
        self._token: Token | None = None  # the newest handed out, while it is not durable
        self._log = log
        self._history = History(log.start_index, membership)
        for entry in entries:
            if entry.kind == EntryKind.CONFIG:
                self._history.append(entry.index, decode_membership(entry.data))

        # What every replica keeps.
        self.commit_index = min(max(hard_state.commit, applied), log.last_index)
        self.applied_index = applied
        self._handed_commit = applied
        self.role = Role.FOLLOWER
        self.leader = 0
        self._reported_leader = False
        self._heard_at = NEVER  # from a leader: votes are refused for election_timeout_s
        self._ballots: dict[int, bool] = {}
        self._installing: SnapshotMeta | None = None
        self._install_due = False
        self._outgoing: list[tuple[Message, bool]] = []  # True: held until everything is durable
        self._ack_index = -1  # the append answer of this turn: one for all appends; -1: none
        self._ack_probe = 0
        self._read_states: list[ReadState] = []
        self._reads_failed: list[int] = []

        # What a leader keeps.
        self.term_start_index = 0  # of the no-op of the term that this replica leads (led)
        self._peers: dict[int, Progress] = {}
        self._probe = 0
        self._probe_times = ProbeTimes(
            2 * config.election_timeout_s, config.election_timeout_s / PROBE_GRAINS
        )
        self._reads = ReadQueue(config.pending_reads_max)
        self._uncommitted_bytes = 0
        self._replicate_due = False
        self._beats_due = False
        self._lease_start: float | None = None  # None: to be computed
        self._lease_given_up = False
        self._transfer_to = 0
        self._beat_at = self._notice_at = self._quorum_at = self._transfer_until = FOREVER
        self._quorum_since = NEVER  # election, or the last change of membership

        self._voter = is_voter(self._history.current, replica)
        self._sole_voter = self._is_sole_voter()
        self._wait_s = self._draw_wait()
        self._election_at = max(now, vote_not_before - config.election_timeout_s) + self._wait_s
        if self._sole_voter:
            self._election_at = now

    # ------------------------------------------------------------------ what the host may know

    @property
    def is_leader(self) -> bool:
        return self.role is Role.LEADER

    @property
    def first_index(self) -> int:
        return self._log.first_index

    @property
    def last_index(self) -> int:
        return self._log.last_index

    @property
    def durable_index(self) -> int:
        """Everything up to here is on this replica's own disk."""
        return self._log.durable_index

    @property
    def log_bytes(self) -> int:
        """Bytes of the entries held in memory."""
        return self._log.bytes

    @property
    def membership(self) -> Membership:
        """The effective one: of the last CONFIG entry in the log, committed or not."""
        return self._history.current

    @property
    def membership_index(self) -> int:
        """Where the effective membership was appended."""
        return self._history.current_index

    @property
    def installing(self) -> SnapshotMeta | None:
        """The snapshot whose installation the host has not reported yet."""
        return self._installing

    @property
    def transferring(self) -> bool:
        """Leadership is on its way to another replica; nothing can be proposed."""
        return self._transfer_to != 0

    def membership_at(self, index: int) -> Membership:
        """The membership in effect at an index at or above first_index - 1, for a snapshot's metadata."""
        return self._history.at(index)

    def term_at(self, index: int) -> int | None:
        """The term of the entry at `index`; None if the log does not reach there."""
        return self._log.term(index)

    def status(self) -> dict[str, Any]:
        """For metrics and debugging."""
        return {
            "group": self.group,
            "replica": self.replica,
            "role": self.role.value,
            "term": self.term,
            "vote": self._vote,
            "leader": self.leader,
            "commit": self.commit_index,
            "applied": self.applied_index,
            "first": self.first_index,
            "last": self.last_index,
            "durable": self._log.durable_index,
            "log_bytes": self._log.bytes,
            "uncommitted_bytes": self._uncommitted_bytes,
            "pending_reads": self._reads.pending,
            "transfer_to": self._transfer_to,
            "peers": {replica: peer.status() for replica, peer in self._peers.items()},
        }

    # ------------------------------------------------------------------ messages and time

    def step(self, message: Message, now: float) -> None:
        """Take one message. Raises FrameError, with nothing changed, if its entries are malformed."""
        self._advance(now)
        if message.to != self.replica or message.sender == self.replica:
            return
        assert message.group == self.group, f"group {message.group} at {self.group}"
        if message.term > self.term:
            if not self._meet_higher_term(message):
                return
        elif message.term < self.term:
            self._answer_stale(message)
            return
        HANDLERS[self.role, type(message)](self, message)

    def tick(self, now: float) -> None:
        """Time has passed; does nothing before `deadline()`."""
        self._advance(now)
        if self.role is Role.LEADER:
            self._tick_leader(now)
        elif self._may_campaign() and now >= self._election_at:
            self._pre_campaign()

    def deadline(self) -> float | None:
        """When `tick` has something to do; None: never, as things stand."""
        if self.role is Role.LEADER:
            return min(self._beat_at, self._notice_at, self._quorum_at, self._transfer_until)
        return self._election_at if self._may_campaign() else None

    def campaign(self, now: float) -> None:
        """Skip the wait for the election timer. Without effect while a leader is in touch, or no vote may be given."""
        self._advance(now)
        if self.role is Role.LEADER or not self._may_campaign() or self._hears_leader():
            return
        if now >= self._vote_not_before or self._sole_voter:
            self._pre_campaign()

    def step_down(self, now: float) -> None:
        """Stop leading (the host shuts down, or its storage makes no progress). The followers are told."""
        self._advance(now)
        if self.role is Role.LEADER:
            self._become_follower(self.term, NO_REPLICA)

    # ------------------------------------------------------------------ proposals, reads, transfer

    def propose(self, term: int, data: bytes, now: float) -> int:
        """Append a command; returns its index.

        Raises NotLeader unless this replica leads exactly `term`; ProposalDropped while leadership is being
        transferred and while too many bytes are uncommitted.
        """
        self._advance(now)
        self._check_leads(term)
        size = len(data)
        if (
            self._uncommitted_bytes
            and self._uncommitted_bytes + size > self.config.uncommitted_bytes_max
        ):
            raise ProposalDropped(f"{self._uncommitted_bytes} bytes are uncommitted")
        return self._append_own(EntryKind.COMMAND, data)

    def propose_membership(self, term: int, membership: Membership, now: float) -> int:
        """Append a change of membership, in effect at once; returns its index. A joint one is left by itself.

        Raises NotLeader, ProposalDropped as `propose` does, and also until an entry of this term is committed and the
        previous change is (pitfall 6); InvalidMembership if the rules do not allow the change.
        """
        self._advance(now)
        self._check_leads(term)
        if self.commit_index < self.term_start_index:
            raise ProposalDropped("nothing of this term is committed yet")
        if self._history.current_index > self.commit_index:
            raise ProposalDropped("a change of membership is not committed yet")
        check_change(self._history.current, membership)
        return self._append_membership(membership)

    def read_index(self, context: int, now: float) -> None:
        """Ask for a linearizable read; the answer comes in Ready.read_states or Ready.reads_failed.

        A replica that does not lead fails it there. Raises ProposalDropped when too many wait.
        """
        self._advance(now)
        if self.role is not Role.LEADER:
            self._reads_failed.append(context)
            return
        self._reads.add(context)

    def lease_valid(self, now: float) -> bool:
        """Whether this replica still leads for certain at `now`: reads need no round. Ask again after reading."""
        if (
            self.role is not Role.LEADER
            or self.commit_index < self.term_start_index
            or self._lease_given_up
            or self._transfer_to
        ):
            return False
        if self._sole_voter:
            return True
        start = self._lease_start
        if start is None:
            start = self._lease_start = self._quorum_contact(FOREVER)
        return now < start + self.config.lease_s

    def transfer_leadership(self, to: int, now: float) -> None:
        """Hand leadership to a voter as soon as it has the whole log; given up after election_timeout_s.

        Raises NotLeader; ProposalDropped if `to` is no voter, or another transfer is under way.
        """
        self._advance(now)
        if self.role is not Role.LEADER:
            raise NotLeader(self.leader)
        if to in {self.replica, self._transfer_to}:
            return
        peer = self._peers.get(to)
        if peer is None or to not in self._history.current.voters:
            raise ProposalDropped(f"replica {to} is no voter")
        if self._transfer_to:
            raise ProposalDropped(f"leadership is being transferred to {self._transfer_to}")
        self._transfer_to = to
        self._transfer_until = now + self.config.election_timeout_s
        self._try_transfer(to, peer)

    # ------------------------------------------------------------------ work for the host, and its reports

    def has_ready(self) -> bool:
        """Whether `ready` would hand out anything."""
        log = self._log
        return bool(
            self._outgoing
            or self._replicate_due
            or self._beats_due
            or self._ack_index >= 0
            or log.handed_index < log.last_index
            or self._hard_state_due
            or (
                self._handed_commit < self.commit_index
                and self._handed_commit < log.durable_index
                and self._installing is None
            )
            or (self._reads.waiting and self.commit_index >= self.term_start_index)
            or self._read_states
            or self._reads_failed
            or self._install_due
            or self._reported_leader is not (self.role is Role.LEADER)
        )

    def ready(self) -> Ready:
        """Take all work. What is handed out is not handed out again."""
        ready = Ready()
        if self.role is Role.LEADER:
            self._begin_read_round()
            if self._replicate_due:
                self._replicate(ready)
            if self._beats_due:
                self._send_beats()
        elif self._ack_index >= 0:
            self._send_ack()
        ready.entries = self._log.take_unwritten()
        if self._hard_state_due or (ready.entries and self.commit_index != self._commit_written):
            ready.hard_state = HardState(self.term, self._vote, self.commit_index)
            self._hard_state_due = False
            self._commit_written = self.commit_index
        if ready.entries or ready.hard_state is not None:
            log = self._log
            self._token = Token(self.term, self._vote, log.last_index, log.last_term)
            ready.token = self._token
        if self._outgoing:
            token = self._token
            ready.outgoing = [
                Outgoing(message, token if held else None) for message, held in self._outgoing
            ]
            self._outgoing.clear()
        self._hand_out_committed(ready)
        if self._read_states:
            ready.read_states, self._read_states = self._read_states, []
        if self._reads_failed:
            ready.reads_failed, self._reads_failed = self._reads_failed, []
        if self._install_due:
            ready.install, self._install_due = self._installing, False
        if self._reported_leader is not (self.role is Role.LEADER):
            self._reported_leader = not self._reported_leader
            ready.leadership = self._reported_leader
        return ready

    def persisted(self, token: Token) -> None:
        """The content of a token is durable, and of all tokens before it.

        A token of an older term, or one whose last entry was truncated meanwhile, says nothing about the log any more
        (pitfall 14): a newer token, which covers the log as it is, has been or will be handed out.
        """
        if token == self._token:
            self._token = None
        if (token.term, token.vote) != (self._durable_term, self._durable_vote):
            assert token.term >= self._durable_term, f"{token} after term {self._durable_term}"
            self._durable_term, self._durable_vote = token.term, token.vote
        if token.term != self.term:
            return
        news = self._log.durable(token.last_index, token.last_term)
        if self.role is Role.LEADER:
            if news and token.last_index > self.commit_index:
                self._try_commit()
        elif self.role is Role.CANDIDATE and self._durable_vote == self.replica:
            self._count_ballot(self.replica, granted=True)

    def installed(self, meta: SnapshotMeta, now: float) -> None:
        """The snapshot from Ready.install is in the state machine, flushed, and RESET is durable in the log."""
        self._advance(now)
        assert self._installing == meta, f"{meta} was not being installed"
        self._installing = None
        self._install_due = False
        self._log.reset(meta.index, meta.term)
        self._history.reset(meta.index, meta.membership)
        self._membership_changed()
        self.commit_index = max(self.commit_index, meta.index)
        self.applied_index = self._handed_commit = meta.index
        if self.leader:
            self._acknowledge(meta.index, 0)

    def install_failed(self, now: float) -> None:
        """The snapshot from Ready.install was not installed and nothing was changed; the leader will send another."""
        self._advance(now)
        self._installing = None
        self._install_due = False

    def applied_to(self, index: int) -> None:
        """The state machine has applied everything up to `index`."""
        assert index <= self._handed_commit, f"applied {index}, handed out {self._handed_commit}"
        if index > self.applied_index:
            self.applied_index = index
            if self.role is Role.LEADER:
                self._leave_joint_if_due()

    def compact(self, index: int) -> None:
        """Drop entries up to `index` from memory: the state machine has them durably, or a snapshot in flight does."""
        assert index <= self.applied_index, f"compaction to {index}, applied {self.applied_index}"
        self._log.compact(index)
        self._history.compact(index)

    def snapshot_status(self, replica: int, ok: bool, now: float) -> None:
        """A snapshot from Ready.snapshot_to was sent, or could not be."""
        self._advance(now)
        peer = self._peers.get(replica)
        if peer is None or peer.state is not State.SNAPSHOT:
            return
        if ok:
            peer.snapshot_deadline = now + self.config.snapshot_patience_s
        else:
            self._probe_after_snapshot(peer)

    # ------------------------------------------------------------------ terms and roles

    def _advance(self, now: float) -> None:
        if now > self._now:
            self._now = now

    def _draw_wait(self) -> float:
        return self.config.election_timeout_s * (1.0 + self._rng.random())

    def _is_sole_voter(self) -> bool:
        membership = self._history.current
        return membership.voters == (self.replica,) and not membership.voters_outgoing

    def _may_campaign(self) -> bool:
        return self._voter and self.electable and self._installing is None

    def _hears_leader(self) -> bool:
        """Whether a leader may hold a lease that counts on this replica's refusal to vote."""
        return self._now < self._heard_at + self.config.election_timeout_s

    def _meet_higher_term(self, message: Message) -> bool:
        """A message of a later term; False if it is dealt with."""
        if isinstance(message, VoteRequest):
            if not message.transfer and (self.role is Role.LEADER or self._hears_leader()):
                self._refuse_vote(message)
                return False
            if not message.pre:
                if message.transfer:
                    self._heard_at = NEVER
                self._become_follower(message.term, NO_REPLICA, announce=not message.transfer)
        elif isinstance(message, VoteResponse) and message.pre and message.granted:
            pass  # its term is the one that the candidate would have
        else:
            self._become_follower(message.term, NO_REPLICA)
        return True

    def _answer_stale(self, message: Message) -> None:
        """Whoever acts in an earlier term learns of this one. A stale answer is dropped."""
        if isinstance(message, VoteRequest):
            self._refuse_vote(message)
        elif isinstance(message, AppendRequest | Heartbeat | InstallSnapshot):
            self._send(
                AppendResponse(self.group, message.sender, self.replica, self.term, False, 0, 0)
            )

    def _become_follower(self, term: int, leader: int, *, announce: bool = True) -> None:
        """Follow `leader` (0: nobody yet) in `term`, which may be the present one."""
        if self.role is Role.LEADER:
            if announce:
                for replica in self._peers:
                    self._send(SteppedDown(self.group, replica, self.replica, self.term))
            self._reads_failed += self._reads.fail()
            self._peers = {}
            self._probe_times.clear()
            self._transfer_to = 0
            self._replicate_due = self._beats_due = False
            self._election_at = self._now + self._wait_s
        self.role = Role.FOLLOWER
        self.leader = leader
        self._ballots.clear()
        if term > self.term:
            self.term = term
            self._vote = 0
            self._hard_state_due = True
            self._ack_index = -1
            self._wait_s = self._draw_wait()

    def _pre_campaign(self) -> None:
        """Ask whether an election could be won, without disturbing anybody (thesis 9.6)."""
        self.role = Role.PRE_CANDIDATE
        self.leader = 0
        self._ack_index = -1
        self._start_ballots()
        self._request_votes(self.term + 1, pre=True, transfer=False)
        self._count_ballot(self.replica, granted=True)

    def _campaign(self, *, transfer: bool) -> None:
        """Begin an election. The own vote counts, and the requests leave, once term and vote are durable (I1)."""
        self.role = Role.CANDIDATE
        self.leader = 0
        self._ack_index = -1
        self.term += 1
        self._vote = self.replica
        self._hard_state_due = True
        self._start_ballots()
        self._request_votes(self.term, pre=False, transfer=transfer)

    def _start_ballots(self) -> None:
        self._ballots.clear()
        self._wait_s = self._draw_wait()
        self._election_at = self._now + self._wait_s

    def _request_votes(self, term: int, *, pre: bool, transfer: bool) -> None:
        log = self._log
        membership = self._history.current
        for voter in dict.fromkeys(membership.voters + membership.voters_outgoing):
            if voter != self.replica:
                request = VoteRequest(
                    self.group,
                    voter,
                    self.replica,
                    term,
                    log.last_index,
                    log.last_term,
                    pre,
                    transfer,
                )
                self._send(request, held=not pre)

    def _count_ballot(self, voter: int, *, granted: bool) -> None:
        self._ballots.setdefault(voter, granted)
        membership = self._history.current
        result = election_result(membership.voters, membership.voters_outgoing, self._ballots)
        if result is Election.LOST:
            self._become_follower(self.term, NO_REPLICA)
        elif result is Election.WON:
            if self.role is Role.PRE_CANDIDATE:
                self._campaign(transfer=False)
            else:
                self._become_leader()

    def _become_leader(self) -> None:
        now = self._now
        log = self._log
        self.role = Role.LEADER
        self.leader = self.replica
        self._ballots.clear()
        self._peers = {
            replica: Progress(log.last_index + 1)
            for replica in members(self._history.current)
            if replica != self.replica
        }
        self._reads = ReadQueue(self.config.pending_reads_max)
        self._probe = 0
        self._probe_times.clear()
        self._lease_start = None
        self._lease_given_up = False
        self._transfer_to = 0
        self._transfer_until = self._notice_at = FOREVER
        self._beat_at = now + self.config.heartbeat_s
        self._quorum_since = now
        self._quorum_at = now + self.config.election_timeout_s
        unsettled = log.slice(self.commit_index + 1, log.last_index)
        self._uncommitted_bytes = sum(len(entry.data) for entry in unsettled)
        self._next_probe()
        self.term_start_index = self._append_own(EntryKind.NOOP, b"")

    # ------------------------------------------------------------------ votes

    def _on_vote_request(self, message: VoteRequest) -> None:
        """Any role, in a term that is not behind."""
        held_back = self._now < self._vote_not_before and not message.transfer
        hears_leader = self._hears_leader() and not message.transfer
        log = self._log
        up_to_date = (message.last_term, message.last_index) >= (log.last_term, log.last_index)
        if message.pre:
            granted = message.term > self.term
        else:
            granted = self._vote == 0 and self.leader == 0
        granted = granted and up_to_date and not held_back and not hears_leader
        if not message.pre:
            if self._vote == message.sender:  # asked again: the answer was lost
                granted = True
            elif granted:
                self._vote = message.sender
                self._hard_state_due = True
                self._election_at = self._now + self._wait_s
                if self.role is not Role.FOLLOWER:
                    self._become_follower(self.term, NO_REPLICA)
        if not granted:
            self._refuse_vote(message)
            return
        answer = VoteResponse(
            self.group, message.sender, self.replica, message.term, True, message.pre
        )
        self._send(answer, held=not message.pre)

    def _refuse_vote(self, message: VoteRequest) -> None:
        """In the candidate's own term or a later one, so that a refusal counts and a laggard learns the term."""
        term = max(self.term, message.term - 1 if message.pre else message.term)
        self._send(VoteResponse(self.group, message.sender, self.replica, term, False, message.pre))

    def _on_vote_response(self, message: VoteResponse) -> None:
        """A candidate of either kind."""
        pre = self.role is Role.PRE_CANDIDATE
        if message.pre is pre and (
            message.term == (self.term + 1 if pre and message.granted else self.term)
        ):
            self._count_ballot(message.sender, granted=message.granted)

    # ------------------------------------------------------------------ following

    def _hear(self, leader: int) -> None:
        """A leader of this term is in touch."""
        assert self.leader in {0, leader}, f"I1: {self.leader} and {leader} lead term {self.term}"
        if self.role is not Role.FOLLOWER:
            self._become_follower(self.term, leader)
        self.leader = leader
        self._heard_at = self._now
        self._election_at = self._now + self._wait_s

    def _on_append_request(self, message: AppendRequest) -> None:
        additions = _memberships_in(message)
        self._hear(message.sender)
        if self._installing is not None:
            return  # the log is about to be replaced
        log = self._log
        previous, entries = message.previous_index, message.entries
        if previous < self.commit_index:
            entries = entries[self.commit_index - previous :]  # the rest is here, and equal (I3)
            previous = self.commit_index
            if not entries:
                self._acknowledge(previous, message.probe)
                return
        elif not log.matches(previous, message.previous_term):
            self._refuse_append(message)
            return
        if entries:
            self._append_theirs(entries, additions)
        last_new = previous + len(entries)
        if message.commit > self.commit_index:
            self.commit_index = max(self.commit_index, min(message.commit, last_new))
        self._acknowledge(last_new, message.probe)

    def _append_theirs(self, entries: list[Entry], additions: Mapping[int, Membership]) -> None:
        """Entries that fit here: what is held already stays, and only a real conflict truncates (pitfall 21)."""
        log = self._log
        known = 0
        if entries[0].index <= log.last_index:
            while known < len(entries) and log.matches(entries[known].index, entries[known].term):
                known += 1
            if known == len(entries):
                return
        first = entries[known].index
        changed = False
        if first <= log.last_index:
            assert first > self.commit_index, f"I3: {first} would replace what is committed"
            log.truncate_after(first - 1)
            changed = self._history.truncate_after(first - 1)
        for entry in entries[known:] if known else entries:
            log.append(entry)
            if entry.kind == EntryKind.CONFIG:
                self._history.append(entry.index, additions[entry.index])
                changed = True
        if changed:
            self._membership_changed()

    def _acknowledge(self, index: int, probe: int) -> None:
        """One answer per turn for all appends: what was accepted in one term only grows."""
        self._ack_index = max(self._ack_index, index)
        self._ack_probe = max(self._ack_probe, probe) if self._ack_index >= 0 else probe

    def _send_ack(self) -> None:
        index, self._ack_index = self._ack_index, -1
        probe, self._ack_probe = self._ack_probe, 0
        if self.leader:
            answer = AppendResponse(
                self.group, self.leader, self.replica, self.term, True, index, probe
            )
            self._send(answer, held=True)

    def _refuse_append(self, message: AppendRequest) -> None:
        index, term = self._log.last_index_within_term(
            message.previous_index, message.previous_term
        )
        self._send(
            AppendResponse(
                self.group,
                message.sender,
                self.replica,
                self.term,
                False,
                0,
                message.probe,
                index,
                term,
                message.previous_index,
            )
        )

    def _on_heartbeat(self, message: Heartbeat) -> None:
        self._hear(message.sender)
        commit = min(message.commit, self._log.last_index)
        if commit > self.commit_index and self._installing is None:
            self.commit_index = commit
        self._send(
            HeartbeatResponse(
                self.group,
                message.sender,
                self.replica,
                self.term,
                message.probe,
                self._log.durable_index,
            )
        )

    def _on_install(self, message: InstallSnapshot) -> None:
        self._hear(message.sender)
        meta = message.meta
        if self._installing is not None:
            return  # one at a time (pitfall 10)
        if meta.index > self.commit_index:
            if not self._log.matches(meta.index, meta.term):
                self._installing = meta
                self._install_due = True
                return
            self.commit_index = meta.index  # the log has it all: nothing to install
        self._acknowledge(self.commit_index, 0)

    def _on_timeout_now(self, message: TimeoutNow) -> None:
        """The leader asks this replica to take over; it has given up its lease for the rest of its term."""
        if self.leader in {0, message.sender} and self._may_campaign():
            self._heard_at = NEVER
            self._campaign(transfer=True)

    def _on_stepped_down(self, message: SteppedDown) -> None:
        """The leader of this term leads no more: its lease is over, and the wait is short."""
        if self.leader in {0, message.sender}:
            self.leader = 0
            self._ack_index = -1
            self._heard_at = NEVER
            wait_s = self.config.heartbeat_s * self._rng.random()
            earliest = max(self._now, self._vote_not_before)
            self._election_at = min(self._election_at, earliest + wait_s)

    def _ignore(self, message: Message) -> None:
        """Legal, and of no consequence for this role."""

    def _two_leaders(self, message: Message) -> None:
        raise AssertionError(f"I1: {message.sender} leads term {self.term} too: {message!r}")

    # ------------------------------------------------------------------ leading: appending and committing

    def _check_leads(self, term: int) -> None:
        if self.role is not Role.LEADER or term != self.term:
            raise NotLeader(self.leader if self.leader != self.replica else 0)
        if self._transfer_to:
            raise ProposalDropped(f"leadership is being transferred to {self._transfer_to}")

    def _append_own(self, kind: EntryKind, data: bytes) -> int:
        index = self._log.last_index + 1
        self._log.append(Entry(index, self.term, int(kind), data))
        self._uncommitted_bytes += len(data)
        self._replicate_due = True
        return index

    def _append_membership(self, membership: Membership) -> int:
        index = self._append_own(EntryKind.CONFIG, encode_membership(membership))
        self._history.append(index, membership)
        self._membership_changed()
        return index

    def _membership_changed(self) -> None:
        """Appended, rolled back, or come with a snapshot: everything derived from it is derived anew."""
        membership = self._history.current
        was_voter = self._voter
        self._voter = is_voter(membership, self.replica)
        self._sole_voter = self._is_sole_voter()
        if self._voter and not was_voter:
            self._election_at = self._now + self._wait_s
        if self.role is not Role.LEADER:
            return
        self._peers = {
            replica: self._peers.get(replica) or Progress(self._log.last_index + 1)
            for replica in members(membership)
            if replica != self.replica
        }
        if self._transfer_to and self._transfer_to not in membership.voters:
            self._end_transfer()
        self._lease_start = None
        self._quorum_since = self._now
        self._quorum_at = self._now + self.config.election_timeout_s

    def _leave_joint_if_due(self) -> None:
        """Joint is left once it is applied, by whoever leads then (M3)."""
        history = self._history
        if (
            is_joint(history.current)
            and history.current_index <= self.applied_index
            and self.commit_index >= self.term_start_index
            and not self._transfer_to
        ):
            self._append_membership(leave_joint(history.current))

    def _agreed_match(self) -> int:
        """The index up to which every majority has the log on disk; the own disk counts as any other."""
        me, peers, durable = self.replica, self._peers, self._log.durable_index
        membership = self._history.current
        return agreed_value(
            [durable if voter == me else peers[voter].match for voter in membership.voters],
            [durable if v == me else peers[v].match for v in membership.voters_outgoing],
        )

    def _try_commit(self) -> None:
        index = self._agreed_match()
        if index <= self.commit_index or self._log.term(index) != self.term:
            return  # of an earlier term: it is committed with the first of this one (I4)
        for entry in self._log.slice(self.commit_index + 1, index):
            self._uncommitted_bytes -= len(entry.data)
        self.commit_index = index
        if self._notice_at == FOREVER and self._peers:
            self._notice_at = self._now + self.config.commit_notice_s
        if not self._voter and self._history.current_index <= index:
            self._become_follower(self.term, NO_REPLICA)  # the group goes on without this replica

    def _hand_out_committed(self, ready: Ready) -> None:
        if self._installing is not None:
            return
        last = min(self.commit_index, self._log.durable_index)
        if last > self._handed_commit:
            ready.committed = self._log.slice(self._handed_commit + 1, last)
            self._handed_commit = last

    # ------------------------------------------------------------------ leading: what goes out

    def _send(self, message: Message, *, held: bool = False) -> None:
        self._outgoing.append((message, held))

    def _next_probe(self) -> int:
        self._probe += 1
        self._probe_times.sent(self._probe, self._now)
        return self._probe

    def _replicate(self, ready: Ready) -> None:
        """Send what windows allow; followers at the same place share one list of entries."""
        self._replicate_due = False
        shared: dict[int, tuple[list[Entry], int]] = {}
        for replica, peer in self._peers.items():
            self._replicate_to(replica, peer, shared)
            if peer.snapshot_due:
                peer.snapshot_due = False
                ready.snapshot_to.append(replica)

    def _replicate_to(
        self, replica: int, peer: Progress, shared: dict[int, tuple[list[Entry], int]]
    ) -> None:
        config, log = self.config, self._log
        checking, peer.check_now = peer.check_now, False
        while checking or (
            peer.next <= log.last_index
            and peer.may_append(config.inflight_entries_max, config.inflight_bytes_max)
        ):
            previous = peer.next - 1
            previous_term = log.term(previous)
            if peer.state is State.SNAPSHOT:
                return
            if previous_term is None:
                peer.become_snapshot()
                return
            if not peer.may_append(config.inflight_entries_max, config.inflight_bytes_max):
                entries, size = list[Entry](), 0  # the window is full: only check the log
            else:
                window = config.inflight_entries_max - peer.entries_in_flight
                chunk = shared.get(peer.next)
                if chunk is None or len(chunk[0]) > window:
                    chunk = log.slice_bounded(peer.next, window, config.append_bytes_max)
                    shared[peer.next] = chunk
                entries, size = chunk
            checking = False
            last_new = previous + len(entries)
            self._send(
                AppendRequest(
                    self.group,
                    replica,
                    self.replica,
                    self.term,
                    previous,
                    previous_term,
                    entries,
                    self.commit_index,
                    self._probe,
                )
            )
            peer.sent_commit = max(peer.sent_commit, min(self.commit_index, last_new))
            peer.sent(last_new, size)

    def _send_beats(self) -> None:
        self._beats_due = False
        for replica, peer in self._peers.items():
            if peer.beat_due:
                peer.beat_due = False
                commit = min(self.commit_index, peer.match)
                peer.sent_commit = max(peer.sent_commit, commit)
                self._send(
                    Heartbeat(self.group, replica, self.replica, self.term, commit, self._probe)
                )

    def _begin_read_round(self) -> None:
        """Everything asked for since the last round shares the next probe (R1)."""
        if not self._reads.waiting or self.commit_index < self.term_start_index:
            return
        self._reads.begin_round(self._next_probe(), self.commit_index)
        if self._sole_voter:
            self._read_states += self._reads.confirm(self._probe)
            return
        membership = self._history.current
        for replica, peer in self._peers.items():
            if is_voter(membership, replica):
                peer.beat_due = self._beats_due = True

    # ------------------------------------------------------------------ leading: what comes back

    def _contact(self, peer: Progress, probe: int) -> None:
        """A follower acknowledged a probe: it was led by this replica after the probe was sent."""
        peer.heard_since_beat = True
        if not peer.acked_probe < probe <= self._probe:
            return
        peer.acked_probe = probe
        sent_at = self._probe_times.sent_at(probe)
        if sent_at is not None and sent_at > peer.acked_sent_at:
            peer.acked_sent_at = sent_at
            self._lease_start = None
        if self._reads.open:
            me, peers = self.replica, self._peers
            membership = self._history.current
            agreed = agreed_value(
                [self._probe if v == me else peers[v].acked_probe for v in membership.voters],
                [
                    self._probe if v == me else peers[v].acked_probe
                    for v in membership.voters_outgoing
                ],
            )
            self._read_states += self._reads.confirm(agreed)

    def _quorum_contact(self, own: float) -> float:
        """The send time of the newest probe that a quorum answered; this replica itself is in touch at `own`."""
        me, peers = self.replica, self._peers
        membership = self._history.current
        return agreed_value(
            [own if voter == me else peers[voter].acked_sent_at for voter in membership.voters],
            [own if v == me else peers[v].acked_sent_at for v in membership.voters_outgoing],
        )

    def _on_append_response(self, message: AppendResponse) -> None:
        replica = message.sender
        peer = self._peers.get(replica)
        if peer is None:
            return
        self._contact(peer, message.probe)
        if not message.success:
            resume, _ = self._log.last_index_within_term(message.hint_index, message.hint_term)
            if peer.refused(message.rejected_index, resume):
                self._replicate_due = True
            return
        match = message.match_index
        assert match <= self._log.last_index, f"replica {replica} claims {match}: {message!r}"
        news = peer.accepted(match)
        if peer.state is State.PROBE or (
            peer.state is State.SNAPSHOT and peer.match >= self._log.start_index
        ):
            peer.become_replicate()
        if peer.next <= self._log.last_index:
            self._replicate_due = True
        if news and match > self.commit_index:
            self._try_commit()
        if replica == self._transfer_to:
            self._try_transfer(replica, peer)

    def _on_heartbeat_response(self, message: HeartbeatResponse) -> None:
        peer = self._peers.get(message.sender)
        if peer is None:
            return
        self._contact(peer, message.probe)
        log = self._log
        if peer.state is State.SNAPSHOT:
            if peer.snapshot_deadline is not None and message.last_index >= log.start_index:
                self._probe_after_snapshot(peer)  # installed, and the word of it was lost
            else:
                return
        if peer.check_due and (peer.paused or peer.match < log.last_index):
            peer.check_due = peer.paused = False
            peer.check_now = self._replicate_due = True

    def _probe_after_snapshot(self, peer: Progress) -> None:
        """Ask the follower where it is, once it answers a heartbeat."""
        peer.become_probe(self._log.last_index + 1)
        peer.paused = peer.check_due = True

    # ------------------------------------------------------------------ leading: time

    def _tick_leader(self, now: float) -> None:
        if now >= self._quorum_at:
            own = FOREVER
            contact = max(self._quorum_contact(own), self._quorum_since)
            self._quorum_at = contact + self.config.election_timeout_s
            if now >= self._quorum_at:
                self._become_follower(self.term, NO_REPLICA)
                return
        if now >= self._transfer_until:
            self._end_transfer()
        if now >= self._beat_at:
            self._beat(now)
        if now >= self._notice_at:
            self._notice_at = FOREVER
            for peer in self._peers.values():
                if peer.sent_commit < min(self.commit_index, peer.match):
                    peer.beat_due = self._beats_due = True

    def _beat(self, now: float) -> None:
        """A new probe. Whoever was sent appends and answered something gets it with the next append instead."""
        self._beat_at = now + self.config.heartbeat_s
        self._next_probe()
        for peer in self._peers.values():
            if not (peer.append_since_beat and peer.heard_since_beat):
                peer.beat_due = self._beats_due = True
            peer.append_since_beat = peer.heard_since_beat = False
            peer.check_due = peer.paused or peer.match < self._log.last_index
            if peer.snapshot_deadline is not None and now >= peer.snapshot_deadline:
                self._probe_after_snapshot(peer)
        self._leave_joint_if_due()

    def _try_transfer(self, replica: int, peer: Progress) -> None:
        if peer.match == self._log.last_index:
            self._lease_given_up = True  # a late TimeoutNow may depose this leader at any time
            self._send(TimeoutNow(self.group, replica, self.replica, self.term))

    def _end_transfer(self) -> None:
        self._transfer_to = 0
        self._transfer_until = FOREVER


def _memberships_in(message: AppendRequest) -> dict[int, Membership]:
    """The memberships among the entries by index. Raises FrameError if entries or memberships are malformed."""
    found: dict[int, Membership] = {}
    index, term = message.previous_index, message.previous_term
    for entry in message.entries:
        if entry.index != index + 1 or entry.term < term or entry.term > message.term:
            raise FrameError(f"entry ({entry.index}, {entry.term}) after ({index}, {term})")
        index, term = entry.index, entry.term
        if entry.kind == EntryKind.CONFIG:
            found[index] = decode_membership(entry.data)
            validate(found[index])
    return found


_CANDIDATES: Final = (Role.PRE_CANDIDATE, Role.CANDIDATE)
_NOT_LEADING: Final = (Role.FOLLOWER, *_CANDIDATES)

# What each role does with each message of its own term (a vote request also of a later one). Every pair is listed.
HANDLERS: Final[Mapping[tuple[Role, type[Message]], Callable[[RaftNode, Any], None]]] = {
    **{(role, VoteRequest): RaftNode._on_vote_request for role in Role},
    **{(role, VoteResponse): RaftNode._on_vote_response for role in _CANDIDATES},
    **{(role, VoteResponse): RaftNode._ignore for role in (Role.FOLLOWER, Role.LEADER)},
    **{(role, AppendRequest): RaftNode._on_append_request for role in _NOT_LEADING},
    **{(role, Heartbeat): RaftNode._on_heartbeat for role in _NOT_LEADING},
    **{(role, InstallSnapshot): RaftNode._on_install for role in _NOT_LEADING},
    **{
        (Role.LEADER, kind): RaftNode._two_leaders
        for kind in (AppendRequest, Heartbeat, InstallSnapshot)
    },
    **{(role, AppendResponse): RaftNode._ignore for role in _NOT_LEADING},
    **{(role, HeartbeatResponse): RaftNode._ignore for role in _NOT_LEADING},
    (Role.LEADER, AppendResponse): RaftNode._on_append_response,
    (Role.LEADER, HeartbeatResponse): RaftNode._on_heartbeat_response,
    **{
        (role, TimeoutNow): RaftNode._on_timeout_now for role in (Role.FOLLOWER, Role.PRE_CANDIDATE)
    },
    **{(role, TimeoutNow): RaftNode._ignore for role in (Role.CANDIDATE, Role.LEADER)},
    **{(role, SteppedDown): RaftNode._on_stepped_down for role in _NOT_LEADING},
    (Role.LEADER, SteppedDown): RaftNode._ignore,
}
