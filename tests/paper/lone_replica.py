"""One replica alone with a test that plays everybody else. No claims of its own."""

from __future__ import annotations

from replication.messages import (
    AppendRequest,
    AppendResponse,
    Message,
    VoteRequest,
    VoteResponse,
)
from replication.raft import RaftConfig, RaftNode, Role
from replication.types import Entry, HardState, Membership
from tests.scripts.raft_cluster import GROUP, Cluster, FixedDraw, plain

TIMEOUT_S = RaftConfig().election_timeout_s


class Replica:
    """Replica 1 alone with the test, which plays everybody else."""

    def __init__(
        self,
        terms: tuple[int, ...] = (),
        *,
        term: int = 0,
        vote: int = 0,
        commit: int = 0,
        membership: Membership | None = None,
        config: RaftConfig | None = None,
        vote_not_before: float = 0.0,
        draw: float = 0.5,
    ) -> None:
        self.now = 0.0
        self.raft = RaftNode(
            GROUP,
            1,
            config or RaftConfig(),
            FixedDraw(draw),
            hard_state=HardState(max(term, *terms, 0), vote, commit),
            membership=membership or plain([1, 2, 3]),
            log_start=(0, 0),
            entries=[Entry(n, t, 0, b"%d" % n) for n, t in enumerate(terms, start=1)],
            applied=0,
            now=0.0,
            vote_not_before=vote_not_before,
        )
        self.applied: list[int] = []
        self.reads: list[tuple[int, int]] = []
        self.reads_failed: list[int] = []

    @property
    def role(self) -> Role:
        return self.raft.role

    def work(self, *, persist: bool = True) -> list[Message]:
        """What leaves; everything is durable at once unless told otherwise."""
        out: list[Message] = []
        while self.raft.has_ready():
            ready = self.raft.ready()
            if ready.token is not None and persist:
                self.raft.persisted(ready.token)
            out += [o.message for o in ready.outgoing if o.token is None or persist]
            self.applied += [entry.index for entry in ready.committed]
            if ready.committed:
                self.raft.applied_to(ready.committed[-1].index)
            self.reads += ready.read_states
            self.reads_failed += ready.reads_failed
        return out

    def step(self, message: Message) -> list[Message]:
        self.raft.step(message, self.now)
        return self.work()

    def tick(self) -> list[Message]:
        deadline = self.raft.deadline()
        assert deadline is not None
        self.now = max(self.now, deadline)
        self.raft.tick(self.now)
        return self.work()

    def lead(self) -> list[Message]:
        """Be elected by replica 2 in the next term; the no-op is sent, and not yet acknowledged."""
        self.raft.campaign(self.now)
        self.work()
        self.step(VoteResponse(GROUP, 1, 2, self.raft.term + 1, True, True))
        out = self.step(VoteResponse(GROUP, 1, 2, self.raft.term, True, False))
        assert self.raft.is_leader
        return out

    def propose(self, data: bytes = b"x") -> list[Message]:
        self.raft.propose(self.raft.term, data, self.now)
        return self.work()

    def acknowledge(self, sender: int, match: int, probe: int = 0) -> list[Message]:
        return self.step(AppendResponse(GROUP, 1, sender, self.raft.term, True, match, probe))

    def append(
        self, term: int, previous: tuple[int, int], *terms: int, commit: int = 0
    ) -> list[Message]:
        """An append from replica 2."""
        entries = [Entry(previous[0] + n, t, 0, b"new") for n, t in enumerate(terms, start=1)]
        return self.step(AppendRequest(GROUP, 1, 2, term, *previous, entries, commit, 1))

    def vote(self, term: int, last: tuple[int, int] = (99, 99), sender: int = 3) -> bool:
        """Whether a request for a real vote is granted."""
        answers = self.step(VoteRequest(GROUP, 1, sender, term, *last, False))
        return any(isinstance(a, VoteResponse) and a.granted for a in answers)

    @property
    def terms(self) -> list[int | None]:
        return [self.raft.term_at(n) for n in range(1, self.raft.last_index + 1)]


def of(kind: type[Message], messages: list[Message]) -> list[Message]:
    return [message for message in messages if isinstance(message, kind)]


def cluster_of(voters: int, learners: tuple[int, ...] = ()) -> Cluster:
    return Cluster(plain(range(1, voters + 1), learners))
