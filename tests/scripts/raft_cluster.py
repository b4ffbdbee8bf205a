"""A cluster of Raft cores in memory: disks, a network under the test's control, and a judge that knows all replicas.

No claims of its own. `Cluster` drives the cores as a host does: what is handed out is written to the replica's disk,
messages with a token leave when that write is durable, and a crash loses what is not. After every step the judge
checks what Raft promises (see `Judge`); it knows nothing of how the cores work.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from replication.membership import members
from replication.messages import (
    AppendRequest,
    AppendResponse,
    Heartbeat,
    HeartbeatResponse,
    InstallSnapshot,
    Message,
    VoteRequest,
    VoteResponse,
)
from replication.raft import Outgoing, RaftConfig, RaftNode, Ready, Token
from replication.types import Entry, HardState, Membership, SnapshotMeta

GROUP = 7


def plain(voters: Iterable[int], learners: Iterable[int] = ()) -> Membership:
    """A membership whose replica n lives on node 10 * n."""
    voting, learning = tuple(sorted(voters)), tuple(sorted(learners))
    return Membership(
        voters=voting,
        learners=learning,
        nodes=tuple((replica, 10 * replica) for replica in sorted(voting + learning)),
    )


class FixedDraw(random.Random):
    """Draws that follow from the replica's id, so that scripts can be read."""

    def __init__(self, value: float) -> None:
        super().__init__(0)
        self.value = value

    def random(self) -> float:
        return self.value


@dataclass
class Disk:
    """What is durable of one replica: its log, and its state machine as of `applied`."""

    hard_state: HardState = field(default_factory=HardState)
    start: tuple[int, int] = (0, 0)
    base: Membership = field(default_factory=Membership)
    entries: list[Entry] = field(default_factory=list)
    state: list[tuple[int, bytes]] = field(default_factory=list)  # (index, data) applied
    applied: int = 0

    @property
    def last(self) -> tuple[int, int]:
        return (self.entries[-1].index, self.entries[-1].term) if self.entries else self.start

    def term(self, index: int) -> int | None:
        if index == self.start[0]:
            return self.start[1]
        position = index - self.start[0] - 1
        return self.entries[position].term if 0 <= position < len(self.entries) else None

    def write(self, hard_state: HardState | None, entries: Sequence[Entry]) -> None:
        if hard_state is not None:
            self.hard_state = hard_state
        if entries:
            position = entries[0].index - self.start[0] - 1
            assert 0 <= position <= len(self.entries), "a gap on disk"
            self.entries[position:] = entries


@dataclass
class Write:
    """A ready on its way to disk, with the messages that wait for it."""

    ready: Ready
    held: list[Message] = field(default_factory=list)


@dataclass
class Flight:
    """A message on its way; a snapshot carries the rows."""

    message: Message
    rows: list[tuple[int, bytes]] | None = None


class Judge:
    """Sees everything, and asserts what the Raft paper's figure 3 and our own rules promise."""

    def __init__(self) -> None:
        self.leaders: dict[int, int] = {}  # term -> replica: election safety
        self.votes: dict[
            tuple[int, int], int
        ] = {}  # (voter, term) -> candidate, once it left the voter
        self.lineage: dict[
            tuple[int, int], tuple[bytes, int]
        ] = {}  # (index, term) -> data, term before: log matching
        self.chosen: dict[
            int, tuple[int, bytes]
        ] = {}  # index -> (term, data): state machine safety
        self.chosen_last = 0
        self.probes: dict[tuple[int, int], int] = {}  # (replica, term) -> the highest sent to it

    def appended(self, entries: Sequence[Entry], previous_term: int) -> None:
        for entry in entries:
            known = self.lineage.setdefault((entry.index, entry.term), (entry.data, previous_term))
            assert known == (entry.data, previous_term), f"log matching is broken at {entry}"
            previous_term = entry.term

    def applied(self, replica: int, entry: Entry) -> None:
        known = self.chosen.setdefault(entry.index, (entry.term, entry.data))
        assert known == (entry.term, entry.data), f"replica {replica} applies another {entry}"
        self.chosen_last = max(self.chosen_last, entry.index)

    def leads(self, raft: RaftNode) -> None:
        known = self.leaders.setdefault(raft.term, raft.replica)
        assert known == raft.replica, f"{known} and {raft.replica} lead term {raft.term}"
        if raft.term < max(self.leaders):
            return  # deposed, and does not know it yet: it need not have what its successors committed
        for index in range(raft.first_index, self.chosen_last + 1):
            term = raft.term_at(index)
            assert term == self.chosen[index][0], f"leader {raft.replica} lacks committed {index}"

    def commits(self, raft: RaftNode, disks: dict[int, Disk]) -> None:
        """A leader says that its commit index is this: each majority has it on disk, and so has nobody forgotten it."""
        index = raft.commit_index
        if index < raft.term_start_index:
            return  # learned from an earlier leader
        term = raft.term_at(index)
        holders = [
            replica
            for replica, disk in disks.items()
            if disk.start[0] >= index or disk.term(index) == term
        ]
        # It was committed under the membership of now, or a change was appended since.
        assert any(
            all(
                2 * sum(voter in holders for voter in half) > len(half)
                for half in (membership.voters, membership.voters_outgoing or membership.voters)
            )
            for membership in (raft.membership, raft.membership_at(index))
        ), f"{index} is only on {holders}"

    def leaves(self, message: Message, disk: Disk) -> None:
        """A message leaves its sender, whose disk is this."""
        durable = (disk.hard_state.term, disk.hard_state.vote)
        if isinstance(message, VoteResponse) and message.granted and not message.pre:
            assert durable >= (message.term, 0), "a vote left before it was durable"
            if durable[0] == message.term:
                assert durable[1] == message.to, "another vote is on disk"
            self._voted(message.sender, message.term, message.to)
        elif isinstance(message, VoteRequest) and not message.pre:
            assert durable >= (message.term, 0), "a candidacy left before it was durable"
            self._voted(message.sender, message.term, message.sender)
        elif isinstance(message, AppendRequest | Heartbeat):
            key = (message.to, message.term)
            self.probes[key] = max(message.probe, self.probes.get(key, 0))
        if isinstance(message, AppendResponse | HeartbeatResponse):
            sent = self.probes.get((message.sender, message.term), 0)
            assert message.probe <= sent, f"probe {sent} was sent, and answered with {message}"
        if isinstance(message, AppendResponse) and message.success:
            assert durable[0] >= message.term, "an answer left before its term was durable"
            if durable[0] == message.term:
                assert disk.last[0] >= message.match_index, "acknowledged, and not on disk"

    def _voted(self, voter: int, term: int, candidate: int) -> None:
        known = self.votes.setdefault((voter, term), candidate)
        assert known == candidate, f"{voter} voted twice in term {term}"


class Server:
    """One replica and its host: alive (`raft` is there) or crashed."""

    def __init__(self, cluster: Cluster, replica: int, rng: random.Random) -> None:
        self.cluster = cluster
        self.replica = replica
        self.rng = rng
        self.disk = Disk()
        self.raft: RaftNode | None = None
        self.writes: deque[Write] = deque()
        self.state: list[tuple[int, bytes]] = []
        self.committed = 0  # the highest commit index seen in this life
        self.reads: list[tuple[int, int]] = []
        self.reads_failed: list[int] = []
        self.read_floor: dict[int, int] = {}  # context -> what was chosen when it was asked
        self.clock_rate = 1.0
        self.clock_offset = 0.0
        self.installing: tuple[SnapshotMeta, list[tuple[int, bytes]]] | None = None
        self.auto_install = True

    @property
    def now(self) -> float:
        return self.cluster.now * self.clock_rate + self.clock_offset

    def start(self, vote_not_before: float = 0.0) -> None:
        disk = self.disk
        self.raft = RaftNode(
            GROUP,
            self.replica,
            self.cluster.config,
            self.rng,
            hard_state=disk.hard_state,
            membership=disk.base,
            log_start=disk.start,
            entries=list(disk.entries),
            applied=disk.applied,
            now=self.now,
            vote_not_before=vote_not_before,
        )
        self.state = list(disk.state)
        self.committed = self.raft.commit_index

    def crash(self, writes_kept: int = 0, applied: int | None = None) -> None:
        """Stop at once. The first `writes_kept` writes under way are on disk, `applied` is what the engine kept."""
        for _ in range(min(writes_kept, len(self.writes))):
            write = self.writes.popleft()
            self.disk.write(write.ready.hard_state, write.ready.entries)
        self.writes.clear()
        if applied is not None:
            disk = self.disk
            disk.applied = max(disk.start[0], min(applied, disk.applied))
            disk.state = [row for row in disk.state if row[0] <= disk.applied]
        self.raft = None
        self.installing = None

    def work(self) -> None:
        """Take what the core hands out, until it hands out nothing."""
        raft = self.raft
        assert raft is not None
        while raft.has_ready():
            ready = raft.ready()
            self._check(raft, ready)
            write = Write(ready)
            if ready.token is not None:
                self.writes.append(write)
            self._send(ready.outgoing)
            self._apply(raft, ready.committed)
            self.reads += ready.read_states
            self.reads_failed += ready.reads_failed
            for context, index in ready.read_states:
                floor = self.read_floor.pop(context, 0)
                assert index >= floor, f"read {context} at {index} misses {floor}"
            for replica in ready.snapshot_to:
                self._send_snapshot(raft, replica)
            if ready.install is not None:
                assert self.installing is not None, "an installation without a snapshot"
                assert self.installing[0] == ready.install
                if self.auto_install:
                    self.install()
            self.cluster.note(self.replica, ready)
            if self.cluster.auto_persist:
                while self.writes:
                    self.persist()
        assert not raft.has_ready()

    def _check(self, raft: RaftNode, ready: Ready) -> None:
        judge = self.cluster.judge
        if ready.entries:
            previous = raft.term_at(ready.entries[0].index - 1)
            assert previous is not None
            judge.appended(ready.entries, previous)
        if raft.is_leader:
            judge.leads(raft)
        if raft.is_leader and raft.commit_index > self.committed:
            judge.commits(raft, {n: server.disk for n, server in self.cluster.servers.items()})
        assert raft.commit_index >= self.committed, "the commit index fell"
        self.committed = raft.commit_index
        assert (ready.token is not None) == bool(ready.entries or ready.hard_state)

    def _send(self, outgoing: Sequence[Outgoing]) -> None:
        for message, token in outgoing:
            if token is None:
                self.cluster.post(self, message)
            else:
                assert self.writes, f"{message} waits for a token that nothing will release"
                assert self.writes[-1].ready.token == token
                self.writes[-1].held.append(message)

    def _apply(self, raft: RaftNode, entries: Sequence[Entry]) -> None:
        for entry in entries:
            assert entry.index == self.disk.applied + 1, "applied out of order"
            assert self.disk.term(entry.index) == entry.term, "applied before it was durable"
            self.cluster.judge.applied(self.replica, entry)
            self.state.append((entry.index, entry.data))
            self.disk.state.append((entry.index, entry.data))
            self.disk.applied = entry.index
        if entries:
            raft.applied_to(entries[-1].index)

    def persist(self, count: int = 1) -> list[Token]:
        """The oldest writes reach the disk."""
        raft = self.raft
        assert raft is not None
        tokens: list[Token] = []
        for _ in range(min(count, len(self.writes))):
            write = self.writes.popleft()
            self.disk.write(write.ready.hard_state, write.ready.entries)
            assert write.ready.token is not None
            tokens.append(write.ready.token)
            raft.persisted(write.ready.token)
            for message in write.held:
                self.cluster.post(self, message)
        return tokens

    def _send_snapshot(self, raft: RaftNode, to: int) -> None:
        index = raft.applied_index
        term = raft.term_at(index)
        assert term is not None
        meta = SnapshotMeta(index, term, raft.membership_at(index))
        message = InstallSnapshot(GROUP, to, self.replica, raft.term, meta)
        self.cluster.post(self, message, rows=list(self.state))

    def install(self) -> None:
        """What the core accepted is put in place, and the log begins anew."""
        assert self.raft is not None
        assert self.installing is not None
        meta, rows = self.installing
        self.installing = None
        while self.writes:
            self.persist()
        disk = self.disk
        disk.start, disk.base, disk.entries = (meta.index, meta.term), meta.membership, []
        disk.state, disk.applied = list(rows), meta.index
        self.state = list(rows)
        self.raft.installed(meta, self.now)

    def receive(self, flight: Flight) -> None:
        if self.raft is None:
            self.cluster.lose(flight)
            return
        message = flight.message
        if isinstance(message, InstallSnapshot):
            assert flight.rows is not None
            sender = self.cluster.servers[message.sender].raft
            if self.raft.installing is None:
                self.installing = (message.meta, flight.rows)
            self.raft.step(message, self.now)
            if self.raft.installing is None:
                self.installing = None
            if sender is not None:
                sender.snapshot_status(self.replica, True, self.cluster.servers[message.sender].now)
        else:
            self.raft.step(message, self.now)

    def compact(self, index: int) -> None:
        assert self.raft is not None
        disk = self.disk
        index = min(index, disk.applied)
        if index <= disk.start[0]:
            return
        disk.base = self.raft.membership_at(index)
        term = disk.term(index)
        assert term is not None
        disk.entries = disk.entries[index - disk.start[0] :]
        disk.start = (index, term)
        self.raft.compact(index)


class Cluster:
    """Servers, the messages between them, and one clock."""

    def __init__(
        self,
        membership: Membership,
        *,
        config: RaftConfig | None = None,
        rng_of: Callable[[int], random.Random] | None = None,
    ) -> None:
        self.config = config or RaftConfig()
        self.judge = Judge()
        self.now = 0.0
        self.auto_persist = True
        self.membership = membership
        self.rng_of = rng_of or (lambda replica: FixedDraw(0.1 * (replica - 1)))
        self.servers: dict[int, Server] = {}
        self.network: list[Flight] = []
        self.blocked: dict[tuple[int, int], None] = {}  # links that lose everything
        self.on_ready: Callable[[int, Ready], None] | None = None
        for replica in members(membership):
            self.add(replica, membership)

    def add(self, replica: int, base: Membership) -> Server:
        """A replica with an empty disk."""
        server = self.servers[replica] = Server(self, replica, self.rng_of(replica))
        server.disk.base = base
        server.start()
        return server

    def note(self, replica: int, ready: Ready) -> None:
        if self.on_ready is not None:
            self.on_ready(replica, ready)

    def raft(self, replica: int) -> RaftNode:
        raft = self.servers[replica].raft
        assert raft is not None, f"replica {replica} is down"
        return raft

    def live(self) -> list[Server]:
        return [server for server in self.servers.values() if server.raft is not None]

    def leader(self) -> RaftNode | None:
        """The leader of the highest term."""
        leaders = [s.raft for s in self.live() if s.raft is not None and s.raft.is_leader]
        return max(leaders, key=lambda raft: raft.term, default=None)

    def post(
        self, sender: Server, message: Message, rows: list[tuple[int, bytes]] | None = None
    ) -> None:
        self.judge.leaves(message, sender.disk)
        if (sender.replica, message.to) not in self.blocked and message.to in self.servers:
            self.network.append(Flight(message, rows))
        else:
            self.lose(Flight(message, rows))

    def lose(self, flight: Flight) -> None:
        """A message is lost; who sends a snapshot hears of it, as it does not come as one message in the world."""
        sender = self.servers[flight.message.sender]
        if flight.rows is not None and sender.raft is not None:
            sender.raft.snapshot_status(flight.message.to, False, sender.now)

    # ------------------------------------------------------------------ steps

    def work(self) -> None:
        for server in self.live():
            server.work()

    def deliver(self, wanted: Callable[[Message], bool] = lambda _: True) -> list[Message]:
        """One round: everything on its way now that is wanted arrives, in order."""
        self.work()
        going = [flight for flight in self.network if wanted(flight.message)]
        self.network = [flight for flight in self.network if not wanted(flight.message)]
        for flight in going:
            self.servers[flight.message.to].receive(flight)
            self.work()
        return [flight.message for flight in going]

    def settle(self, rounds_max: int = 200) -> None:
        """Deliver until nothing is on its way."""
        for _ in range(rounds_max):
            self.work()
            if not self.network:
                return
            self.deliver()
        raise AssertionError("the cluster never falls silent")

    def run(self, seconds: float, step_s: float = 0.01) -> None:
        """Time passes; timers fire, messages arrive at once."""
        end = self.now + seconds
        while self.now < end:
            self.now += step_s
            self.fire_timers()
            self.settle()

    def fire_timers(self) -> None:
        for server in self.live():
            assert server.raft is not None
            deadline = server.raft.deadline()
            if deadline is not None and server.now >= deadline:
                server.raft.tick(server.now)

    def tick(self, replica: int) -> None:
        """Go on to the replica's deadline and fire its timer, and no other's."""
        server = self.servers[replica]
        assert server.raft is not None
        deadline = server.raft.deadline()
        assert deadline is not None, f"replica {replica} waits for nothing"
        self.now = max(self.now, (deadline - server.clock_offset) / server.clock_rate)
        server.raft.tick(max(server.now, deadline))
        server.work()

    def elect(self, replica: int) -> RaftNode:
        """Make a replica leader of a group that has none, and let it settle."""
        self.raft(replica).campaign(self.servers[replica].now)
        self.settle()
        assert self.raft(replica).is_leader, self.raft(replica).status()
        return self.raft(replica)

    def propose(self, replica: int, data: bytes) -> int:
        raft = self.raft(replica)
        return raft.propose(raft.term, data, self.servers[replica].now)

    def read(self, replica: int, context: int) -> None:
        server = self.servers[replica]
        server.read_floor[context] = self.judge.chosen_last
        self.raft(replica).read_index(context, server.now)

    def crash(self, replica: int, writes_kept: int = 0, applied: int | None = None) -> None:
        self.servers[replica].crash(writes_kept, applied)

    def restart(self, replica: int, *, may_have_promised: bool = True) -> None:
        server = self.servers[replica]
        wait_s = self.config.election_timeout_s if may_have_promised else 0.0
        server.start(server.now + wait_s)

    def isolate(self, replica: int) -> None:
        for other in self.servers:
            if other != replica:
                self.blocked[replica, other] = self.blocked[other, replica] = None
        flights, self.network = self.network, []
        for flight in flights:
            if (flight.message.sender, flight.message.to) in self.blocked:
                self.lose(flight)
            else:
                self.network.append(flight)

    def heal(self) -> None:
        self.blocked.clear()
