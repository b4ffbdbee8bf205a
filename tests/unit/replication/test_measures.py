"""What a host notes of time: each figure by one turn, batch or answer, and nothing of a term that is over."""

from __future__ import annotations

import pytest

from replication.measures import Distribution
from tests.unit.replication.host_driver import World, led


def noted(distribution):
    return sum(distribution.counts)


@pytest.fixture
def world():
    return World(nodes=3)


def test_a_value_counts_at_the_first_bound_that_is_not_below_it():
    distribution = Distribution((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        distribution.note(value)
    distribution.note(2.0, times=3)
    assert distribution.counts == [2, 4, 1]
    assert distribution.total == 18.0
    assert list(distribution.cumulative()) == [(1.0, 2), (2.0, 6), (float("inf"), 7)]


def test_a_commit_takes_from_its_proposal_until_it_is_committed_here(world):
    leader = led(world)
    before = noted(leader.host.measures.commit_seconds)
    world.propose(b"value")
    leader.host.turn()
    assert noted(leader.host.measures.commit_seconds) == before
    world.clock.now += 0.25
    world.settle()
    assert noted(leader.host.measures.commit_seconds) == before + 1
    assert leader.host.measures.commit_seconds.total == pytest.approx(0.25)
    others = [node for node in world.nodes.values() if node is not leader]
    assert [noted(node.host.measures.commit_seconds) for node in others] == [0, 0]


def test_proposals_of_a_term_that_is_over_are_not_timed(world):
    leader = led(world)
    for number in world.nodes:
        if number != leader.number:
            world.isolate(number)
    world.propose(b"value")
    world.settle()
    replica = leader.host._replicas[1]
    assert len(replica.proposed) == 1
    world.advance(5.0)
    assert not leader.host.raft(1).is_leader
    assert not replica.proposed


def test_an_append_takes_until_the_followers_word_and_one_at_a_time_is_timed(world):
    leader = led(world)
    before = noted(leader.host.measures.append_seconds)
    total = leader.host.measures.append_seconds.total
    world.propose(b"one")
    leader.host.turn()
    world.clock.now += 0.125
    world.propose(b"two")  # its appends leave while the first ones are timed
    leader.host.turn()
    world.settle()
    assert noted(leader.host.measures.append_seconds) == before + 2  # one for each follower
    assert leader.host.measures.append_seconds.total - total == pytest.approx(0.25)


def test_a_batch_of_the_log_is_noted_once_with_its_entries(world):
    leader = led(world)
    entries, syncs = leader.host.measures.turn_entries, leader.host.measures.log_sync_seconds
    before, batches = list(entries.counts), noted(syncs)
    for value in (b"one", b"two", b"three"):
        world.propose(value)
    leader.host.turn()
    assert noted(syncs) == batches + 1
    assert noted(leader.host.measures.log_write_seconds) == batches + 1
    assert entries.counts[2] == before[2] + 1  # three entries: more than 2, at most 4
    assert sum(entries.counts) == sum(before) + 1


def test_elections_and_turns_are_counted(world):
    leader = led(world)
    assert leader.host.measures.elections_begun == 1
    assert sum(node.host.measures.elections_begun for node in world.nodes.values()) == 1
    turns = noted(leader.host.measures.turn_seconds)
    leader.host.turn()
    assert noted(leader.host.measures.turn_seconds) == turns + 1
