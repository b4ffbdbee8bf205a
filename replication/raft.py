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
from typing import Any, ClassVar, Final

from replication.codec import decode_membership
from replication.errors import (
    EntryTooLarge,
    FrameError,
    InvalidMembership,
    LogMismatch,
    NotLeader,
    ProposalDropped,
)
from replication.leading import Leader
from replication.log import RaftLog
from replication.measures import Measures
from replication.membership import History, check_change, is_voter, validate
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
from replication.probes import chance, reached
from replication.progress import NEVER
from replication.quorum import Election, election_result
from replication.reads import ReadState
from replication.ready import Outgoing, RaftConfig, Ready, Role, Token
from replication.state import ReplicaState
from replication.types import NO_REPLICA, Entry, EntryKind, HardState, Membership, SnapshotMeta

__all__ = ["Outgoing", "RaftConfig", "RaftNode", "ReadState", "Ready", "Role", "Token"]

Handler = Callable[["RaftNode", Any], None]
NOTHING_TO_ACKNOWLEDGE: Final = -1
CARETAKER_PATIENCE: Final = 3.0  # election timeouts that a caretaker waits beyond all others


class RaftNode(ReplicaState):
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
        measures: Measures | None = None,
    ) -> None:
        """A replica as its disk has it.

        `membership` is that in effect at `log_start` (index, term); CONFIG entries among `entries` come on top.
        `applied` is the index up to which the state machine has applied. Before `vote_not_before` no vote is granted
        (its old self may have promised a lease), but for a group of one voter, which campaigns at the first tick if that
        membership is known to be committed.
        Raises LogMismatch if log and state machine contradict each other (pitfall 19).
        """
        log = RaftLog(*log_start, entries)
        if not log.start_index <= applied <= log.last_index:
            raise LogMismatch(
                f"group {group}: applied up to {applied}, but the log holds "
                f"{log.first_index}..{log.last_index}"
            )
        history = History(log.start_index, membership)
        for entry in entries:
            if entry.kind == EntryKind.CONFIG:
                history.append(entry.index, decode_membership(entry.data))
        super().__init__(group, replica, config, log, history, measures or Measures())
        self.now = now
        self._rng = rng
        self._vote_not_before = vote_not_before

        # What must survive (hard state), and how much of it is known to be on disk.
        self.term = max(hard_state.term, log.last_term)
        self._vote = hard_state.vote if self.term == hard_state.term else 0
        self._durable_term = hard_state.term
        self._durable_vote = hard_state.vote
        self._hard_state_due = self.term != hard_state.term
        self._commit_written = hard_state.commit
        self._token: Token | None = None  # the newest handed out, while it is not durable

        self.commit_index = min(max(hard_state.commit, applied), log.last_index)
        self.applied_index = applied
        self._handed_commit = applied
        self.role = Role.FOLLOWER
        self._handlers = self.HANDLERS[Role.FOLLOWER]
        self.leader = 0
        self._leading: Leader | None = None
        self._reported_leader = False
        self._heard_at = NEVER  # from a leader: votes are refused for election_timeout_s
        self._ballots: dict[int, bool] = {}
        self._installing: SnapshotMeta | None = None
        self._install_due = False
        self._ack_index = NOTHING_TO_ACKNOWLEDGE  # one answer per turn for all appends
        self._ack_probe = 0
        self._wait_s = self._draw_wait()
        self._election_at = max(now, vote_not_before - config.election_timeout_s) + self._wait_s
        if self._promised_nobody():
            self._election_at = now

    # ------------------------------------------------------------------ what the host may know

    @property
    def is_leader(self) -> bool:
        return self._leading is not None

    @property
    def is_caretaker(self) -> bool:
        """It leads for the sake of its log alone, and serves nothing."""
        return self._leading is not None and not self.electable

    @property
    def role_name(self) -> str:
        """For people and metrics."""
        return "caretaker" if self.is_caretaker else self.role.value

    @property
    def term_start_index(self) -> int:
        """The no-op with which this replica began to lead its term; 0 if it does not lead."""
        return self._leading.term_start_index if self._leading else 0

    @property
    def transferring(self) -> bool:
        """Leadership is on its way to another replica; nothing can be proposed."""
        return self._leading is not None and self._leading.transfer_to != 0

    @property
    def installing(self) -> SnapshotMeta | None:
        """The snapshot whose installation the host has not reported yet."""
        return self._installing

    def status(self) -> dict[str, Any]:
        """For metrics and debugging."""
        leading = self._leading
        return {
            "group": self.group,
            "replica": self.replica,
            "role": self.role_name,
            "term": self.term,
            "vote": self._vote,
            "leader": self.leader,
            "commit": self.commit_index,
            "applied": self.applied_index,
            "first": self.first_index,
            "last": self.last_index,
            "durable": self.durable_index,
            "log_bytes": self.log_bytes,
            "uncommitted_bytes": leading.uncommitted_bytes if leading else 0,
            "pending_reads": leading.reads.pending if leading else 0,
            "transfer_to": leading.transfer_to if leading else 0,
            "peers": {replica: peer.status() for replica, peer in leading.peers.items()}
            if leading
            else {},
        }

    # ------------------------------------------------------------------ messages and time

    def step(self, message: Message, now: float) -> None:
        """Take one message. Raises FrameError, with nothing changed, if its entries are malformed."""
        self.now = max(self.now, now)
        if message.to != self.replica or message.sender == self.replica:
            return
        assert message.group == self.group, f"group {message.group} at {self.group}"
        if isinstance(message, AppendRequest):
            _check_entries(message)
        if message.term > self.term:
            if not self._meet_higher_term(message):
                return
        elif message.term < self.term:
            self._answer_stale(message)
            return
        self._handlers[type(message)](self, message)

    def tick(self, now: float) -> None:
        """Time has passed; does nothing before `deadline()`."""
        self.now = max(self.now, now)
        if self._leading is not None:
            self._leading.tick()
            self._end_if_over()
        elif self._may_campaign() and now >= self._campaign_at():
            self._pre_campaign()

    def deadline(self) -> float | None:
        """When `tick` has something to do; None: never, as things stand."""
        if self._leading is not None:
            return self._leading.deadline()
        return self._campaign_at() if self._may_campaign() else None

    def campaign(self, now: float) -> None:
        """Skip the wait for the election timer. Without effect while a leader is in touch, or no vote may be given."""
        self.now = max(self.now, now)
        if self._leading is not None or not self._may_take_over() or self._hears_leader():
            return
        if now >= self._vote_not_before or self._promised_nobody():
            self._pre_campaign()

    def step_down(self, now: float) -> None:
        """Stop leading (the host shuts down, or its storage makes no progress). The followers are told."""
        self.now = max(self.now, now)
        if self._leading is not None:
            self._become_follower(self.term, NO_REPLICA)

    # ------------------------------------------------------------------ proposals, reads, transfer

    def propose(self, term: int, data: bytes, now: float) -> int:
        """Append a command; returns its index.

        Raises NotLeader unless this replica leads exactly `term`; ProposalDropped while leadership is being
        transferred and while too many bytes are uncommitted; EntryTooLarge: once in the log, it could never leave.
        """
        self.now = max(self.now, now)
        leading = self._leading_term(term)
        if len(data) > self.config.entry_bytes_max:
            raise EntryTooLarge(
                f"an entry of {len(data)} bytes; at most {self.config.entry_bytes_max}"
            )
        uncommitted = leading.uncommitted_bytes
        if uncommitted and uncommitted + len(data) > self.config.uncommitted_bytes_max:
            raise ProposalDropped(f"{uncommitted} bytes are uncommitted")
        return leading.append(EntryKind.COMMAND, data)

    def propose_membership(self, term: int, membership: Membership, now: float) -> int:
        """Append a change of membership, in effect at once; returns its index. A joint one is left by itself.

        Raises NotLeader, ProposalDropped as `propose` does, and also until an entry of this term is committed and the
        previous change is (pitfall 6); InvalidMembership if the rules do not allow the change.
        """
        self.now = max(self.now, now)
        leading = self._leading_term(term)
        if self.commit_index < leading.term_start_index:
            raise ProposalDropped("nothing of this term is committed yet")
        if self.membership_index > self.commit_index:
            raise ProposalDropped("a change of membership is not committed yet")
        check_change(self.membership, membership)
        return leading.append_membership(membership)

    def read_index(self, context: int, now: float) -> None:
        """Ask for a linearizable read; the answer comes in Ready.read_states or Ready.reads_failed.

        A replica that does not lead fails it there. Raises ProposalDropped when too many wait.
        """
        self.now = max(self.now, now)
        if self._leading is None:
            self.reads_failed.append(context)
        else:
            self._leading.reads.add(context)

    def lease_valid(self, now: float) -> bool:
        """Whether this replica still leads for certain at `now`: reads need no round. Ask again after reading."""
        return self._leading is not None and self._leading.lease_valid(now)

    def transfer_leadership(self, to: int, now: float) -> None:
        """Hand leadership to a voter as soon as it has the whole log; given up after election_timeout_s.

        Raises NotLeader; ProposalDropped if `to` is no voter, or another transfer is under way.
        """
        self.now = max(self.now, now)
        if self._leading is None:
            raise NotLeader(self.leader)
        self._leading.transfer(to)

    def _leading_term(self, term: int) -> Leader:
        leading = self._leading
        if leading is None or term != self.term:
            raise NotLeader(self.leader if leading is None else 0)
        if leading.transfer_to:
            raise ProposalDropped(f"leadership is being transferred to {leading.transfer_to}")
        return leading

    # ------------------------------------------------------------------ work for the host, and its reports

    def has_ready(self) -> bool:
        """Whether `ready` would hand out anything."""
        log, leading = self.log, self._leading
        return bool(
            self.outgoing
            or log.handed_index < log.last_index
            or self._hard_state_due
            or (leading.has_work if leading is not None else self._ack_index >= 0)
            or (
                self._handed_commit < self.commit_index
                and self._handed_commit < log.durable_index
                and self._installing is None
            )
            or self.read_states
            or self.reads_failed
            or self._install_due
            or self._reported_leader is not (leading is not None)
        )

    def ready(self) -> Ready:
        """Take all work. What is handed out is not handed out again."""
        ready = Ready()
        leading, log = self._leading, self.log
        if leading is not None:
            leading.fill(ready)
        elif self._ack_index >= 0:
            self._send_acknowledgement()
        ready.entries = log.take_unwritten()
        if self._hard_state_due or (ready.entries and self.commit_index != self._commit_written):
            ready.hard_state = HardState(self.term, self._vote, self.commit_index)
            self._hard_state_due = False
            self._commit_written = self.commit_index
        if ready.entries or ready.hard_state is not None:
            self._token = ready.token = Token(self.term, self._vote, log.last_index, log.last_term)
        if self.outgoing:
            token = self._token
            ready.outgoing = [
                Outgoing(message, token if held else None) for message, held in self.outgoing
            ]
            self.outgoing.clear()
        if self._installing is None:
            last = min(self.commit_index, log.durable_index)
            if last > self._handed_commit:
                ready.committed = log.slice(self._handed_commit + 1, last)
                self._handed_commit = last
        if self.read_states:
            ready.read_states, self.read_states = self.read_states, []
        if self.reads_failed:
            ready.reads_failed, self.reads_failed = self.reads_failed, []
        if self._install_due:
            ready.install, self._install_due = self._installing, False
        if self._reported_leader is not (leading is not None):
            ready.leadership = self._reported_leader = leading is not None
        return ready

    def persisted(self, token: Token) -> None:
        """The content of a token is durable, and of all tokens before it.

        A token of an older term, or one whose last entry was truncated meanwhile, says nothing about the log any more
        (pitfall 14): a newer token, which covers the log as it is, has been or will be handed out.
        """
        if token == self._token:
            self._token = None
        assert token.term >= self._durable_term, f"{token} after term {self._durable_term}"
        self._durable_term, self._durable_vote = token.term, token.vote
        if token.term != self.term:
            reached("durable_in_an_older_term")
            return
        news = self.log.durable(token.last_index, token.last_term)
        if self._leading is not None:
            if news:
                self._leading.log_durable()
                self._end_if_over()
        elif self.role is Role.CANDIDATE and token.vote == self.replica:
            self._count_ballot(self.replica, granted=True)

    def overtaken(self, meta: SnapshotMeta, now: float) -> None:
        """The state machine has a snapshot whose sender's term is over: the log has to follow all the same.

        A replica whose state is ahead of its log could be helped by nobody: appends do not fit, and it refuses what
        its state has. Ready.install says that the log begins anew; nothing does that the log or the commit index has it.
        That of a leader has it: its term is later than the one in which the snapshot was committed.
        """
        self.now = max(self.now, now)
        if meta.index > self.commit_index:
            if self._leading is None:
                self._follow_snapshot(meta)
            else:
                assert self.log.matches(meta.index, meta.term), f"I3: {meta} is not in the log"

    def installed(self, meta: SnapshotMeta, now: float) -> None:
        """The snapshot from Ready.install is in the state machine, flushed, and RESET is durable in the log."""
        self.now = max(self.now, now)
        assert self._installing == meta, f"{meta} was not being installed"
        self._installing = None
        self._install_due = False
        self.log.reset(meta.index, meta.term)
        self.history.reset(meta.index, meta.membership)
        self._membership_changed()
        self.commit_index = max(self.commit_index, meta.index)
        self.applied_index = self._handed_commit = meta.index
        if self.leader:
            self._acknowledge(meta.index, 0)

    def install_failed(self, now: float) -> None:
        """The snapshot from Ready.install was not installed and nothing was changed; the leader will send another."""
        self.now = max(self.now, now)
        self._installing = None
        self._install_due = False

    def applied_to(self, index: int) -> None:
        """The state machine has applied everything up to `index`."""
        assert index <= self._handed_commit, f"applied {index}, handed out {self._handed_commit}"
        if index > self.applied_index:
            self.applied_index = index
            if self._leading is not None:
                self._leading.leave_joint_if_due()

    def compact(self, index: int) -> None:
        """Drop entries up to `index` from memory: the state machine has them durably, or a snapshot in flight does."""
        assert index <= self.applied_index, f"compaction to {index}, applied {self.applied_index}"
        self.log.compact(index)
        self.history.compact(index)

    def snapshot_status(self, replica: int, ok: bool, now: float) -> None:
        """A snapshot from Ready.snapshot_to was sent, or could not be."""
        self.now = max(self.now, now)
        if self._leading is not None:
            self._leading.snapshot_status(replica, ok)

    # ------------------------------------------------------------------ terms and roles

    def _draw_wait(self) -> float:
        return self.config.election_timeout_s * (1.0 + self._rng.random())

    def _may_campaign(self) -> bool:
        able = self.electable or (self.caretaker and not self.sole_voter)
        return able and self._installing is None and self._may_be_needed()

    def _may_take_over(self) -> bool:
        return self.electable and self._may_campaign()

    def _campaign_at(self) -> float:
        """Whoever would lead for the sake of its log alone lets everybody else try first."""
        if self.electable:
            return self._election_at
        return self._election_at + CARETAKER_PATIENCE * self.config.election_timeout_s

    def _may_be_needed(self) -> bool:
        """A voter; or one that is leaving, until that is committed: nobody else may have the entry (thesis 4.2.2)."""
        return self.voter or (
            self.history.current_index > self.commit_index
            and is_voter(self.history.at(self.commit_index), self.replica)
        )

    def _promised_nobody(self) -> bool:
        """A sole voter has no leader to promise a lease to; until that is committed, the one that leaves leads by it."""
        return self.sole_voter and self.membership_index <= self.commit_index

    def _hears_leader(self) -> bool:
        """Whether a leader may hold a lease that counts on this replica's refusal to vote."""
        return self.now < self._heard_at + self.config.election_timeout_s

    def _set_role(self, role: Role) -> None:
        self.role = role
        self._handlers = self.HANDLERS[role]

    def _meet_higher_term(self, message: Message) -> bool:
        """A message of a later term; False if it is dealt with."""
        if isinstance(message, VoteRequest):
            if not message.transfer and (self._leading is not None or self._hears_leader()):
                reached("vote_refused_while_led")
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
        reached("stale_term")
        if isinstance(message, VoteRequest):
            self._refuse_vote(message)
        elif isinstance(message, AppendRequest | Heartbeat | InstallSnapshot):
            self.send(
                AppendResponse(self.group, message.sender, self.replica, self.term, False, 0, 0)
            )

    def _become_follower(self, term: int, leader: int, *, announce: bool = True) -> None:
        """Follow `leader` (0: nobody yet) in `term`, which may be the present one."""
        if self._leading is not None:
            self._leading.end(announce=announce)
            self._leading = None
            self._election_at = self.now + self._wait_s
        if self.role is not Role.FOLLOWER:
            self._set_role(Role.FOLLOWER)
        self.leader = leader
        self._ballots.clear()
        if term > self.term:
            self.term = term
            self._vote = 0
            self._hard_state_due = True
            self._forget_acknowledgement()
            self._wait_s = self._draw_wait()

    def _end_if_over(self) -> None:
        if self._leading is not None and self._leading.over:
            reached("quorum_lost")
            self._become_follower(self.term, NO_REPLICA)

    def _pre_campaign(self) -> None:
        """Ask whether an election could be won, without disturbing anybody (thesis 9.6)."""
        self._start_ballots(Role.PRE_CANDIDATE)
        self._request_votes(self.term + 1, pre=True, transfer=False)
        self._count_ballot(self.replica, granted=True)

    def _campaign(self, *, transfer: bool) -> None:
        """Begin an election. The own vote counts, and the requests leave, once term and vote are durable (I1)."""
        self.measures.elections_begun += 1
        self.term += 1
        self._vote = self.replica
        self._hard_state_due = True
        self._start_ballots(Role.CANDIDATE)
        self._request_votes(self.term, pre=False, transfer=transfer)

    def _start_ballots(self, role: Role) -> None:
        self._set_role(role)
        self.leader = 0
        self._forget_acknowledgement()
        self._ballots.clear()
        self._wait_s = self._draw_wait()
        impatient = chance("candidate_impatient")  # it hears no leader: its own vote may come early
        self._election_at = self.now + (self.config.heartbeat_s if impatient else self._wait_s)

    def _request_votes(self, term: int, *, pre: bool, transfer: bool) -> None:
        log, membership = self.log, self.membership
        me, last = self.replica, (log.last_index, log.last_term)
        for voter in dict.fromkeys(membership.voters + membership.voters_outgoing):
            if voter != me:
                request = VoteRequest(self.group, voter, me, term, *last, pre, transfer)
                self.send(request, held=not pre)

    def _count_ballot(self, voter: int, *, granted: bool) -> None:
        self._ballots.setdefault(voter, granted)
        membership = self.membership
        result = election_result(membership.voters, membership.voters_outgoing, self._ballots)
        if result is Election.LOST:
            reached("election_lost")
            self._become_follower(self.term, NO_REPLICA)
        elif result is Election.WON:
            if self.role is Role.PRE_CANDIDATE:
                self._campaign(transfer=False)
            else:
                self._ballots.clear()
                self._set_role(Role.LEADER)
                self.leader = self.replica
                self._leading = Leader(self)

    # ------------------------------------------------------------------ votes

    def _on_vote_request(self, message: VoteRequest) -> None:
        """Any role, in a term that is not behind."""
        log = self.log
        granted = (
            (message.last_term, message.last_index) >= (log.last_term, log.last_index)
            and (message.transfer or not self._hears_leader())
            and (message.transfer or self.now >= self._vote_not_before)
            and (message.term > self.term if message.pre else not (self._vote or self.leader))
        )
        if not message.pre:
            if self._vote == message.sender:
                reached("vote_given_again")
                granted = True  # it asks again: the answer was lost
            elif granted:
                self._vote = message.sender
                self._hard_state_due = True
                self._election_at = self.now + self._wait_s
                self._become_follower(self.term, NO_REPLICA)
        if not granted:
            self._refuse_vote(message)
            return
        self.send(
            VoteResponse(self.group, message.sender, self.replica, message.term, True, message.pre),
            held=not message.pre,
        )

    def _refuse_vote(self, message: VoteRequest) -> None:
        """In the candidate's own term or a later one, so that a refusal counts and a laggard learns the term."""
        term = max(self.term, message.term - 1 if message.pre else message.term)
        self.send(VoteResponse(self.group, message.sender, self.replica, term, False, message.pre))

    def _on_vote_response(self, message: VoteResponse) -> None:
        """A candidate of either kind."""
        pre = self.role is Role.PRE_CANDIDATE
        expected = self.term + 1 if pre and message.granted else self.term
        if message.pre is pre and message.term == expected:
            self._count_ballot(message.sender, granted=message.granted)

    # ------------------------------------------------------------------ following

    def _hear(self, leader: int) -> None:
        """A leader of this term is in touch."""
        assert self.leader in {0, leader}, f"I1: {self.leader} and {leader} lead term {self.term}"
        if self.role is not Role.FOLLOWER:
            self._become_follower(self.term, leader)
        self.leader = leader
        self._heard_at = self.now
        self._election_at = self.now + self._wait_s

    def _on_append_request(self, message: AppendRequest) -> None:
        self._hear(message.sender)
        if self._installing is not None:
            reached("append_while_installing")
            return  # the log is about to be replaced
        previous, entries = message.previous_index, message.entries
        if previous < self.commit_index:
            reached("append_below_commit")
            entries = entries[self.commit_index - previous :]  # the rest is here, and equal (I3)
            previous = self.commit_index
        elif not self.log.matches(previous, message.previous_term):
            self._refuse_append(message)
            return
        if entries:
            self._append_theirs(entries)
        last_new = previous + len(entries)
        if message.commit > self.commit_index:
            self.commit_index = max(self.commit_index, min(message.commit, last_new))
        self._acknowledge(last_new, message.probe)

    def _append_theirs(self, entries: list[Entry]) -> None:
        """Entries that fit here: what is held already stays, and only a real conflict truncates (pitfall 21)."""
        log = self.log
        if entries[0].index <= log.last_index:
            known = 0
            while known < len(entries) and log.matches(entries[known].index, entries[known].term):
                known += 1
            if known == len(entries):
                return
            entries = entries[known:]
        first, changed = entries[0].index, False
        if first <= log.last_index:
            reached("conflict_truncated")
            assert first > self.commit_index, f"I3: {first} would replace what is committed"
            log.truncate_after(first - 1)
            changed = self.history.truncate_after(first - 1)
        for entry in entries:
            log.append(entry)
            if entry.kind == EntryKind.CONFIG:
                self.history.append(entry.index, decode_membership(entry.data))
                changed = True
        if changed:
            self._membership_changed()

    def _membership_changed(self) -> None:
        """Appended, rolled back, or come with a snapshot, while not leading."""
        was_voter = self.voter
        self.derive_membership()
        if self.voter and not was_voter:
            self._election_at = self.now + self._wait_s

    def _acknowledge(self, index: int, probe: int) -> None:
        """One answer per turn for all appends: what was accepted in one term only grows."""
        self._ack_index = max(self._ack_index, index)
        self._ack_probe = max(self._ack_probe, probe)

    def _forget_acknowledgement(self) -> None:
        """Its term is over, or its leader: the probe, too, is of nobody else (I6)."""
        self._ack_index, self._ack_probe = NOTHING_TO_ACKNOWLEDGE, 0

    def _send_acknowledgement(self) -> None:
        index, self._ack_index = self._ack_index, NOTHING_TO_ACKNOWLEDGE
        probe, self._ack_probe = self._ack_probe, 0
        if self.leader:
            me, leader = self.replica, self.leader
            answer = AppendResponse(self.group, leader, me, self.term, True, index, probe)
            self.send(answer, held=True)

    def _refuse_append(self, message: AppendRequest) -> None:
        hint = self.log.last_index_within_term(message.previous_index, message.previous_term)
        reached("append_refused")
        self.send(
            AppendResponse(
                self.group,
                message.sender,
                self.replica,
                self.term,
                False,
                0,
                message.probe,
                *hint,
                message.previous_index,
            )
        )

    def _on_heartbeat(self, message: Heartbeat) -> None:
        self._hear(message.sender)
        if message.commit > self.commit_index and self._installing is None:
            self.commit_index = max(self.commit_index, min(message.commit, self.log.last_index))
        if not message.probe:
            return
        me, durable = self.replica, self.log.durable_index
        self.send(
            HeartbeatResponse(self.group, message.sender, me, self.term, message.probe, durable)
        )

    def _on_install(self, message: InstallSnapshot) -> None:
        self._hear(message.sender)
        self._follow_snapshot(message.meta)

    def _follow_snapshot(self, meta: SnapshotMeta) -> None:
        """What a snapshot holds is committed, whoever sent it."""
        if self._installing is not None:
            return  # one at a time (pitfall 10)
        if meta.index > self.commit_index:
            if not self.log.matches(meta.index, meta.term):
                self._installing = meta
                self._install_due = True
                return
            reached("snapshot_not_needed")
            self.commit_index = meta.index  # the log has it all: nothing to install
        self._acknowledge(self.commit_index, 0)

    def _on_timeout_now(self, message: TimeoutNow) -> None:
        """The leader asks this replica to take over; it has given up its lease for the rest of its term."""
        if self.leader in {0, message.sender} and self._may_take_over():
            reached("timeout_now")
            self._heard_at = NEVER
            self._campaign(transfer=True)

    def _on_stepped_down(self, message: SteppedDown) -> None:
        """The leader of this term leads no more: its lease is over, and the wait is short."""
        if self.leader in {0, message.sender}:
            reached("leader_stepped_down")
            self.leader = 0
            self._forget_acknowledgement()
            self._heard_at = NEVER
            wait_s = self.config.heartbeat_s * self._rng.random()
            earliest = max(self.now, self._vote_not_before)
            self._election_at = min(self._election_at, earliest + wait_s)

    def _ignore(self, message: Message) -> None:
        """Legal, and of no consequence for this role."""

    # ------------------------------------------------------------------ leading: replication/leading.py

    def _on_append_response(self, message: AppendResponse) -> None:
        assert self._leading is not None
        self._leading.on_append_response(message)
        self._end_if_over()

    def _on_heartbeat_response(self, message: HeartbeatResponse) -> None:
        assert self._leading is not None
        self._leading.on_heartbeat_response(message)
        self._end_if_over()

    def _second_leader(self, message: Message) -> None:
        raise AssertionError(f"I1: {message.sender} leads term {self.term} too: {message!r}")

    _following: ClassVar[Mapping[type[Message], Handler]] = {
        VoteRequest: _on_vote_request,
        VoteResponse: _ignore,
        AppendRequest: _on_append_request,
        AppendResponse: _ignore,
        Heartbeat: _on_heartbeat,
        HeartbeatResponse: _ignore,
        InstallSnapshot: _on_install,
        TimeoutNow: _on_timeout_now,
        SteppedDown: _on_stepped_down,
    }
    # What each role does with each message of its own term (VoteRequest, and a granted pre-vote, also of a later one).
    HANDLERS: ClassVar[Mapping[Role, Mapping[type[Message], Handler]]] = {
        Role.FOLLOWER: _following,
        Role.PRE_CANDIDATE: {**_following, VoteResponse: _on_vote_response},
        Role.CANDIDATE: {
            **_following,
            VoteResponse: _on_vote_response,
            TimeoutNow: _ignore,  # it is campaigning
        },
        Role.LEADER: {
            VoteRequest: _on_vote_request,
            VoteResponse: _ignore,  # more votes than were needed
            AppendRequest: _second_leader,
            AppendResponse: _on_append_response,
            Heartbeat: _second_leader,
            HeartbeatResponse: _on_heartbeat_response,
            InstallSnapshot: _second_leader,
            TimeoutNow: _ignore,
            SteppedDown: _ignore,
        },
    }


def _check_entries(message: AppendRequest) -> None:
    """Raise FrameError unless entries follow on each other and their memberships are valid."""
    index, term = message.previous_index, message.previous_term
    for entry in message.entries:
        if entry.index != index + 1 or not term <= entry.term <= message.term:
            raise FrameError(f"entry ({entry.index}, {entry.term}) after ({index}, {term})")
        index, term = entry.index, entry.term
        if entry.kind == EntryKind.CONFIG:
            try:
                validate(decode_membership(entry.data))
            except InvalidMembership as error:
                raise FrameError(f"entry {index}: {error}") from error
