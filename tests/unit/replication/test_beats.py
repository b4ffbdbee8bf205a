"""Claims of a leader's beats (replication/leading.py): they are no further apart than the period, and those of all groups
of a node fall together, whenever each began to lead; so they leave in one frame for each peer. Whoever is up and answers
them keeps the leader in office.
"""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from replication.leading import next_beat
from replication.messages import Heartbeat, VoteResponse
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
