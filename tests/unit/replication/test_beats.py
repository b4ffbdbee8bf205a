"""Claims of a leader's beats (replication/leading.py): they are no further apart than the period, and those of all groups
of a node fall together, whenever each began to lead; so they leave in one frame for each peer. Whoever is up and answers
them keeps the leader in office.
"""

from __future__ import annotations

import heapq
import random

from hypothesis import given
from hypothesis import strategies as st

from replication.leading import next_beat
from replication.messages import (
    AppendRequest,
    AppendResponse,
    Heartbeat,
    HeartbeatResponse,
    Message,
    VoteResponse,
)
from replication.raft import RaftConfig, RaftNode
from replication.types import HardState
from tests.scripts.raft_cluster import Cluster, plain

BEAT_S = RaftConfig().heartbeat_s


@given(
    st.floats(min_value=0.0, max_value=1e7),
    st.sampled_from([0.001, 0.05, 0.1, 0.2, 0.3, 1.0, 2.5]),
)
def test_the_next_beat_is_later_and_within_one_period(now, period):
    at = next_beat(now, period)
    assert now < at <= now + period * (1 + 1e-9)


@given(st.floats(min_value=0.0, max_value=1e6), st.floats(min_value=0.0, max_value=1.0))
def test_whoever_asks_between_two_beats_is_given_the_same_one(now, share):
    at = next_beat(now, BEAT_S)
    assert next_beat(now + (at - now) * share * 0.999, BEAT_S) == at


def leader(group, now):
    """Of three replicas, elected at that time."""
    raft = RaftNode(
        group,
        1,
        RaftConfig(),
        random.Random(group),
        hard_state=HardState(),
        membership=plain([1, 2, 3]),
        log_start=(0, 0),
        entries=[],
        applied=0,
        now=0.0,
        vote_not_before=0.0,
    )
    raft.campaign(now)
    for pre in (True, False):
        drain(raft)
        term = raft.term + 1 if pre else raft.term
        raft.step(VoteResponse(group, 1, 2, term, True, pre), now)
    assert raft.is_leader
    drain(raft)
    return raft


def drain(raft):
    messages = []
    while raft.has_ready():
        ready = raft.ready()
        if ready.token is not None:
            raft.persisted(ready.token)
        messages += [outgoing.message for outgoing in ready.outgoing]
    return messages


def test_leaders_that_were_elected_at_different_times_beat_together():
    first, second = leader(1, 10.03), leader(2, 10.17)
    assert first.deadline() == second.deadline()
    at = first.deadline()
    for raft in (first, second):
        raft.tick(at)
        assert sum(type(message) is Heartbeat for message in drain(raft)) == 2


def test_a_lone_write_costs_no_leadership_at_the_slowest_heartbeat():
    """An append, the no-op of the election too, stood for the beat after it: no probe for a whole election timeout."""
    cluster = Cluster(plain([1, 2, 3]), config=RaftConfig(election_timeout_s=1.0, heartbeat_s=0.5))
    leader = cluster.elect(1)
    cluster.run(2.1)
    cluster.propose(1, b"x")
    cluster.run(5.0)
    assert leader.is_leader
    assert leader.term == 1


MEMBERS = (1, 2, 3)
MESSAGE_BYTES = 100


class SlowLinks:
    """Three replicas, and links that carry so many bytes a second, first in, first out, and take 5 ms besides."""

    def __init__(self, bytes_s: float, config: RaftConfig) -> None:
        self.now = 0.0
        self.rafts = {number: replica(number, config) for number in MEMBERS}
        self.elected: list[tuple[int, int]] = []  # (term, leader)
        self._bytes_s = bytes_s
        self._free_at: dict[tuple[int, int], float] = {}
        self._flying: list[tuple[float, int, Message]] = []
        self._sent = 0

    def leader(self) -> RaftNode:
        (leader,) = (raft for raft in self.rafts.values() if raft.is_leader)
        return leader

    def work(self) -> None:
        for raft in self.rafts.values():
            while raft.has_ready():
                ready = raft.ready()
                if ready.token is not None:
                    raft.persisted(ready.token)
                if ready.committed:
                    raft.applied_to(ready.committed[-1].index)
                if ready.leadership:
                    self.elected.append((raft.term, raft.replica))
                for outgoing in ready.outgoing:
                    self._post(outgoing.message)

    def _post(self, message: Message) -> None:
        size_bytes, link = MESSAGE_BYTES, (message.sender, message.to)
        if isinstance(message, AppendRequest):
            size_bytes += sum(len(entry.data) for entry in message.entries)
        at = max(self.now, self._free_at.get(link, 0.0)) + size_bytes / self._bytes_s
        self._free_at[link] = at
        self._sent += 1
        heapq.heappush(self._flying, (at + 0.005, self._sent, message))

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            self.work()
            due = [raft.deadline() for raft in self.rafts.values()]
            times = [at for at in due if at is not None] + [at for at, *_ in self._flying[:1]]
            if min(times) > end:
                self.now = end
                return
            self.now = max(self.now, min(times))
            while self._flying and self._flying[0][0] <= self.now:
                _, _, message = heapq.heappop(self._flying)
                self.rafts[message.to].step(message, self.now)
            for raft in self.rafts.values():
                raft.tick(self.now)


def replica(number: int, config: RaftConfig) -> RaftNode:
    return RaftNode(
        1,
        number,
        config,
        random.Random(number),
        hard_state=HardState(),
        membership=plain(MEMBERS),
        log_start=(0, 0),
        entries=[],
        applied=0,
        now=0.0,
    )


def test_a_leader_whose_followers_answer_late_but_steadily_is_not_deposed():
    """They acknowledged all the time, but only probes that had waited behind a second and more of entries."""
    links = SlowLinks(2.5e6, RaftConfig(inflight_bytes_max=4 << 20))
    links.run(3.0)
    leader = links.leader()
    for _ in range(4):
        leader.propose(leader.term, bytes(1 << 20), links.now)
    last = leader.last_index
    links.run(10.0)
    assert links.elected == [(1, leader.replica)]
    assert leader.commit_index == last


def test_a_leader_that_slept_for_an_election_timeout_does_not_take_old_answers_for_contact():
    """They waited for it in its own buffers; whoever gave them may have elected another one since."""
    raft = leader(1, 10.0)
    raft.step(AppendResponse(1, 1, 2, 1, True, 1, 1), 10.0)
    assert raft.lease_valid(10.1)
    raft.step(HeartbeatResponse(1, 1, 3, 1, 1, 1), 12.0)
    raft.tick(12.0)
    assert not raft.is_leader
