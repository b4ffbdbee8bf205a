"""The host: the order of a turn, what waits for the disk, what is bounded, how groups begin, and what failure stops.

There is no loop here (`World`): phases follow one another within a turn.
"""

from __future__ import annotations

import random

import pytest

from kvstore.sim.disk import SimDisk
from replication.codec import encode_membership
from replication.errors import LogMismatch, LogWriteFailed, NotLeader
from replication.messages import AppendRequest, InstallSnapshot, VoteRequest, VoteResponse
from replication.ready import RaftConfig
from replication.replica import open_replica
from replication.turns import HostLimits, Start
from replication.types import Entry, EntryKind, HardState, Membership, SnapshotMeta
from replication.wal import Wal
from tests.scripts.raft_cluster import plain
from tests.unit.replication.host_driver import ListMachine, State, World, append, led, restarted

# -- the order of a turn


def test_a_lone_voter_commits_within_the_turn():
    world = World(nodes=1)
    world.settle()
    world.advance(0.01)
    assert world.propose(b"value") is not None
    world.nodes[1].host.turn()
    assert world.nodes[1].values(1) == [b"value"]


def test_appends_leave_before_the_sync_and_acknowledgements_after_it(monkeypatch):
    world = World(nodes=3)
    leader = led(world)
    order: list[str] = []
    for number, node in world.nodes.items():
        name = "leader" if node is leader else "follower"
        send, sync = node.peers.send, node.disk.sync

        def sent(to, messages, *, name=name, send=send):
            order.extend(f"{name} {type(message).__name__}" for message in messages)
            send(to, messages)

        def synced(segment, *, name=name, sync=sync):
            order.append(f"{name} sync")
            sync(segment)

        monkeypatch.setattr(node.peers, "send", sent)
        monkeypatch.setattr(node.disk, "sync", synced)
        if number == 1 + leader.number % 3:
            world.isolate(number)
    world.propose(b"value")
    world.settle()
    assert order[:5] == [
        "leader AppendRequest",
        "leader AppendRequest",
        "leader sync",
        "follower sync",
        "follower AppendResponse",
    ]


def test_all_groups_share_one_batch_and_one_send_for_each_node():
    world = World(nodes=3, groups=range(1, 9))
    for group in range(1, 9):
        world.nodes[1].host.campaign(group)
    world.settle()
    world.advance(0.5)
    node = world.nodes[1]
    node.peers.sends.clear()
    syncs = node.disk.sync_count
    for group in range(1, 9):
        world.propose(b"value", group)
    node.host.turn()
    assert node.disk.sync_count == syncs + 1
    assert [to for to, _ in node.peers.sends] == [2, 3]
    assert all(len(messages) == 8 for _, messages in node.peers.sends)
    world.settle()
    assert node.machine.finished >= 1
    assert all(node.values(group) == [b"value"] for group in range(1, 9))


def test_only_touched_groups_are_visited(monkeypatch):
    world = World(nodes=3, groups=range(1, 9))
    for group in range(1, 9):
        world.nodes[1].host.campaign(group)
    world.settle()
    world.advance(0.5)
    host = world.nodes[1].host
    visited: list[int] = []
    for group in range(1, 9):
        raft = host.raft(group)

        def has_ready(*, raft=raft, ask=raft.has_ready):
            visited.append(raft.group)
            return ask()

        monkeypatch.setattr(raft, "has_ready", has_ready)
    host.turn()
    assert visited == []
    world.propose(b"value", 3)
    host.turn()
    assert set(visited) == {3}


def test_an_apply_phase_is_bounded_and_groups_take_turns():
    world = World(
        nodes=1, groups=(1, 2), limits=HostLimits(apply_entries_max=3, apply_bytes_max=10_000)
    )
    world.settle()
    world.advance(0.01)
    machine = world.nodes[1].machine
    machine.log.clear()
    for number in range(4):
        for group in (1, 2):
            world.propose(b"%d" % number, group)
    world.settle()
    applied = [(group, len(indices)) for _, group, indices in machine.log]
    assert applied == [(1, 3), (2, 3), (1, 1), (2, 1)]


def test_an_apply_phase_is_bounded_by_what_small_entries_stage():
    """A thousand deletions of large values were one phase of a GiB: the old values move."""
    world = World(nodes=1, groups=(1, 2))
    world.settle()
    world.advance(0.01)
    machine = world.nodes[1].machine
    machine.stages_bytes = world.nodes[1].host.limits.apply_bytes_max
    machine.log.clear()
    for number in range(40):
        for group in (1, 2):
            world.propose(b"%d" % number, group)
    before = machine.finished
    world.settle()
    assert [len(indices) for _, _, indices in machine.log] == [16, 16, 16, 16, 8, 8]
    assert [group for _, group, _ in machine.log] == [1, 2, 1, 2, 1, 2]
    assert machine.finished - before == 6


def test_few_large_entries_are_applied_between_two_looks_at_what_they_stage():
    """Sixteen entries of 50 KB are 8,000 commands, whatever each of them costs."""
    world = World(nodes=1)
    world.settle()
    world.advance(0.01)
    machine = world.nodes[1].machine
    machine.log.clear()
    for size in (50_000, 50_000, 50_000, 100, 100, 1_000_000):
        world.propose(bytes(size))
    world.settle()
    assert [len(indices) for _, _, indices in machine.log] == [1, 1, 3, 1]


def test_the_state_is_told_of_leadership_in_pairs():
    world = World(nodes=3)
    first = led(world)
    assert first.machine.led == {1: first.host.raft(1).term}
    world.isolate(first.number)
    world.advance(5.0)
    assert first.machine.led == {}
    assert world.leader() is not first


def test_reads_are_confirmed_once_applied_and_fail_without_leadership():
    world = World(nodes=3)
    leader = led(world)
    leader.host.read_index(1, 77)
    world.settle()
    assert leader.machine.reads == {77: True}
    follower = world.nodes[1 + leader.number % 3]
    follower.host.read_index(1, 78)
    world.settle()
    assert follower.machine.reads == {78: False}
    assert leader.host.lease_valid(1)
    assert not follower.host.lease_valid(1)


# -- bounds, and what is not taken from the network


def test_a_full_inbox_drops_and_counts():
    world = World(nodes=3, limits=HostLimits(inbox_messages_max=2))
    host = world.nodes[1].host
    world.settle()
    messages = [append(1), append(2)]
    host.receive(2, messages)
    host.receive(2, messages)
    assert host.stats()["messages_dropped_inbox_full"] == 2
    host.turn()
    assert host.raft(1).last_index == 2


@pytest.mark.parametrize(
    "message",
    [
        append(1, group=99),
        append(1, to=3),
        InstallSnapshot(1, 1, 2, 5, SnapshotMeta(9, 5, Membership())),
    ],
    ids=["an unknown group", "another replica", "a snapshot that no stream brought"],
)
def test_what_is_not_for_us_is_dropped_and_counted(message):
    world = World(nodes=3)
    host = world.nodes[1].host
    world.settle()
    host.receive(2, [message])
    world.settle()
    assert host.stats()["messages_dropped_unknown"] == 1
    assert host.raft(1).term == 0


def test_malformed_entries_are_dropped_and_counted():
    world = World(nodes=3)
    node = world.nodes[1]
    world.settle()
    config = Entry(1, 5, EntryKind.CONFIG, b"\xc1 no membership")
    node.host.receive(2, [AppendRequest(1, 1, 2, 5, 0, 0, [config], 0, 1)])
    node.host.turn()
    assert node.host.stats()["messages_dropped_malformed"] == 1
    assert not node.fatal


def test_a_replica_that_no_membership_names_is_answered_where_it_was_heard_from():
    world = World(nodes=1)
    node = world.nodes[1]
    world.settle()
    world.nodes[9] = node
    node.host.receive(9, [VoteRequest(1, 1, 44, 9, 0, 0, False)])
    node.host.turn()
    assert [to for to, _ in node.peers.sends] == [9]


# -- failure


@pytest.mark.parametrize("fault", ["fail_sync", "fail_write"])
def test_after_a_failed_write_the_host_says_nothing_more(fault):
    world = World(nodes=3)
    node = world.nodes[1]
    world.settle()
    getattr(node.disk, fault)()
    node.host.receive(2, [append(1)])
    node.peers.sends.clear()
    node.host.turn()
    assert [type(error) for error in node.fatal] == [LogWriteFailed]
    assert node.host.failure is node.fatal[0]
    node.host.receive(2, [append(2)])
    node.host.turn()
    assert node.peers.sends == []
    assert not node.host.turn_wanted
    with pytest.raises(NotLeader):
        node.host.propose(1, 5, b"x")


def test_an_error_of_the_machine_stops_the_host():
    world = World(nodes=1)
    world.settle()
    node = world.nodes[1]

    def broken(now: float) -> None:
        raise RuntimeError("the engine is gone")

    node.machine.on_drain = broken
    node.host.turn()
    assert isinstance(node.fatal[0], RuntimeError)
    assert len(node.fatal) == 1


def test_stopping_twice_is_stopping_once():
    world = World(nodes=1)
    world.nodes[1].host.stop()
    world.nodes[1].host.stop()
    world.nodes[1].host.turn()
    assert world.nodes[1].values(1) == []


# -- how groups begin and end


def test_everything_acknowledged_is_there_after_a_crash():
    world = World(nodes=1)
    world.settle()
    world.advance(0.01)
    for number in range(10):
        world.propose(b"%d" % number)
    world.settle()
    node = world.nodes[1]
    before = list(node.values(1))
    restarted(world)
    assert node.values(1) == []  # nothing was flushed
    world.advance(0.1)
    assert node.values(1) == before == [b"%d" % number for number in range(10)]


def test_a_restarted_voter_does_not_vote_for_the_longest_lease_but_a_lone_one_leads_at_once():
    world = World(nodes=3)
    leader = led(world)
    number = 1 + leader.number % 3
    host = restarted(world, number)
    ask = VoteRequest(1, number, 6 - number - leader.number, 50, 99, 50, False)
    host.receive(ask.sender, [ask])
    host.turn()
    answers = [m for _, sent in world.nodes[number].peers.sends for m in sent]
    assert [m.granted for m in answers if isinstance(m, VoteResponse)] == [False]
    alone = World(nodes=1)
    alone.settle()
    alone.advance(0.1)
    restarted(alone)
    alone.advance(0.001)
    assert alone.nodes[1].host.raft(1).is_leader


def test_a_lone_voter_by_an_entry_of_its_log_leads_at_once_if_that_is_committed():
    alone = World(nodes=1)
    alone.settle()
    alone.advance(0.1)
    host = alone.nodes[1].host
    index = host.propose_membership(1, host.raft(1).term, host.raft(1).membership)
    alone.settle()
    alone.propose(b"the commit index is written with what follows")
    alone.settle()
    host = restarted(alone)
    assert host.raft(1).membership_index == index
    alone.advance(0.001)
    assert host.raft(1).is_leader


def test_a_voter_of_which_the_log_has_nothing_yet_does_not_vote_at_once_when_it_is_back():
    """It may have heard a leader before its first batch was durable, and that one counts on it."""
    world = World(nodes=3)
    node = world.nodes[3]
    node.crash()
    node.disk = SimDisk()
    node.start()
    node.host.receive(2, [VoteRequest(1, 3, 2, 50, 99, 50, False)])
    node.host.turn()
    [answer] = [m for _, sent in node.peers.sends for m in sent if isinstance(m, VoteResponse)]
    assert not answer.granted


def test_a_voter_that_was_alone_when_its_engine_was_flushed_and_is_not_in_its_log_does_not_vote_either():
    grown = Entry(1, 1, EntryKind.CONFIG, encode_membership(plain((1, 2, 3))))
    replica = open_replica(
        1,
        1,
        Start(HardState(1, 2, 0), (0, 0), [grown], 0, reset=False),
        plain((1,)),
        config=RaftConfig(),
        rng=random.Random(1),
        quiet=True,
        now=100.0,
    )
    replica.raft.step(VoteRequest(1, 1, 3, 2, 9, 9, False), 100.01)
    [answer] = [each.message for each in replica.raft.ready().outgoing]
    assert isinstance(answer, VoteResponse)
    assert not answer.granted


def test_a_damaged_log_is_refused_and_neither_votes_nor_serves():
    world = World(nodes=3)
    world.settle()
    world.isolate(1)
    node = world.nodes[1]
    for index in range(1, 4):
        node.host.receive(2, [append(index, b"A" * 5000)])
        node.host.turn()
    world.advance(3.0)
    segment = node.disk.segments()[-1]
    node.disk.flip(segment, node.disk.read(segment).index(b"A" * 5000) + 100)
    host = restarted(world)
    assert host.groups() == []
    assert f"segment {segment}" in host.refused[1]
    host.receive(2, [VoteRequest(1, 1, 2, 50, 99, 50, False)])
    world.nodes[1].peers.sends.clear()
    world.advance(3.0)
    assert world.nodes[1].peers.sends == []
    assert not host.lease_valid(1)
    with pytest.raises(NotLeader):
        host.propose(1, 50, b"x")


def test_a_damaged_entry_that_the_engine_has_flushed_costs_nothing():
    world = World(nodes=3)
    first = led(world)
    node = world.nodes[1 + first.number % 3]
    for letter in (b"A", b"B", b"C"):
        world.propose(letter * 5000)
        world.settle()
        if letter == b"B":
            node.machine.flush()
    world.advance(3.0)
    segment = node.disk.segments()[-1]
    node.disk.flip(segment, node.disk.read(segment).index(b"A" * 5000) + 100)
    for _ in range(2):  # the log is not cut yet: a second start finds the same
        host = restarted(world, node.number)
        assert node.logs[1].faulty
        assert host.refused == {}
        assert host.raft(1).first_index == node.machine.states[1].applied[0] + 1
    world.propose(b"D")
    world.advance(3.0)
    assert node.values(1) == [b"A" * 5000, b"B" * 5000, b"C" * 5000, b"D"]
    host.flushed(node.machine.flush())
    node.wal.rotate()
    world.propose(b"E")
    world.advance(3.0)
    restarted(world, node.number)
    assert not node.logs[1].faulty
    world.advance(3.0)
    assert node.values(1)[-1] == b"E"


def test_a_machine_that_is_ahead_of_its_log_is_a_hard_error():
    world = World(nodes=1)
    node = world.nodes[1]
    node.machine.states[1].applied = (5, 1)
    node.machine.durable[1] = node.machine.states[1].copy()
    with pytest.raises(LogMismatch):
        restarted(world)


def test_a_crash_between_the_installed_state_and_its_reset_is_made_up_for():
    world = World(nodes=3)
    node = world.nodes[1]
    state = node.machine.states[1]
    state.applied = state.installed = (20, 3)
    node.machine.durable[1] = state.copy()
    host = restarted(world)
    assert (host.raft(1).first_index, host.raft(1).applied_index, host.raft(1).term) == (21, 20, 3)
    world.settle()
    node.crash()
    _, logs = Wal.recover(node.disk)
    assert logs[1].start == (20, 3)


def test_a_removed_replica_leaves_a_durable_tombstone_before_its_rows_may_go():
    world = World(nodes=1, groups=(1, 2))
    world.settle()
    node = world.nodes[1]
    done: list[int] = []
    node.host.remove_group(1, lambda: done.append(node.disk.sync_count))
    assert done == []
    syncs = node.disk.sync_count
    node.host.turn()
    assert done == [syncs + 1]
    assert node.host.groups() == [2]
    node.crash()
    _, logs = Wal.recover(node.disk)
    assert logs[1].tombstone == 1


def test_a_wiped_disk_is_a_new_replica_and_does_not_answer_for_the_old_one():
    world = World(nodes=3)
    led(world)
    node = world.nodes[3]
    membership = node.machine.states[1].membership
    node.crash()
    node.disk, node.machine = SimDisk(), ListMachine({1: State(membership)})
    node.groups = []
    node.start()
    node.host.add_group(
        1, 4, None, membership, (0, 0), born=True
    )  # the group again, under a new id
    for message in (append(1, to=3), VoteRequest(1, 3, 1, 50, 99, 50, False)):
        node.host.receive(message.sender, [message])
        node.host.turn()
    assert node.host.counters["messages_dropped_unknown"] == 2
    assert node.peers.sends == []
    assert (node.host.raft(1).term, node.host.raft(1).last_index) == (0, 0)
    world.isolate(3)
    world.advance(30.0)
    assert (
        node.host.raft(1).term == 0
    )  # it is no voter of what it knows, so it does not campaign either


# -- the log's segments and its mark


def test_an_idle_log_is_marked_once():
    world = World(nodes=1)
    world.settle()
    world.advance(0.1)
    node = world.nodes[1]
    syncs = node.disk.sync_count
    world.advance(60.0)
    assert node.disk.sync_count == syncs + 1
    assert not node.wal.needs_mark


def test_a_node_that_stays_idle_after_its_start_marks_what_it_found():
    world = World(nodes=3)
    world.settle()
    world.isolate(1)
    node = world.nodes[1]
    node.host.receive(2, [append(1, b"A" * 5000)])
    node.host.turn()
    assert node.wal.needs_mark
    restarted(world)
    world.advance(world.limits.idle_mark_s)
    assert not node.wal.needs_mark
    segment = node.disk.segments()[-1]
    node.disk.flip(segment, node.disk.read(segment).index(b"A" * 5000) + 100)
    assert restarted(world).refused  # rot, and no torn write


def test_segments_are_made_before_they_are_written_and_go_when_nobody_needs_them():
    world = World(nodes=1, groups=(1, 2))
    world.settle()
    world.advance(0.1)
    node = world.nodes[1]
    for number in range(60):
        world.propose(b"%d" % number + bytes(4000))
        world.settle()
        if number % 10 == 9:
            node.host.flushed(node.machine.flush())
    stats = node.host.stats()
    assert stats["segments_created"] >= 4
    assert stats["segments_deleted"] >= 2
    assert node.wal.segments == node.disk.segments()
    assert not node.fatal


def test_a_group_that_pins_old_segments_is_carried_forward():
    world = World(nodes=1, groups=(1, 2))
    world.settle()
    world.advance(0.1)
    node = world.nodes[1]
    world.propose(b"stays", 2)
    world.settle()
    for number in range(100):
        world.propose(b"%d" % number + bytes(4000))
        world.settle()
        if number % 5 == 4:
            node.host.flushed({1: node.machine.flush([1])[1]})
    assert len(node.disk.segments()) <= 5
    restarted(world)
    world.advance(0.1)
    assert node.values(2) == [b"stays"]


def test_groups_that_do_not_fit_into_one_batch_are_carried_one_after_the_other(monkeypatch):
    world = World(nodes=1, groups=(1, 2, 3, 4), limits=HostLimits(carried_bytes_max=1))
    world.settle()
    world.advance(0.1)
    node = world.nodes[1]
    for group in (2, 3, 4):
        world.propose(b"stays", group)
    world.settle()
    lane, carried_in, most = node.host._lane, [], 0
    carry = lane.carry

    def noted(group, entries):
        carried_in.append(node.wal.segments[-1])
        return carry(group, entries)

    monkeypatch.setattr(lane, "carry", noted)
    for number in range(150):
        world.propose(b"%d" % number + bytes(4000))
        world.settle()
        if number % 5 == 4:
            node.host.flushed({1: node.machine.flush([1])[1]})
        most = max(most, len(node.disk.segments()))
    assert most <= 8
    assert len(carried_in) == len(set(carried_in)) > 3
    restarted(world)
    world.advance(0.1)
    assert [node.values(group) for group in (2, 3, 4)] == [[b"stays"]] * 3


def test_the_configuration_of_elections_is_taken():
    config = RaftConfig(election_timeout_s=10.0)
    world = World(nodes=3, config=config)
    world.advance(9.0)
    assert not any(node.host.raft(1).is_leader for node in world.nodes.values())
