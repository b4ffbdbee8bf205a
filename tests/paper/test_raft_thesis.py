"""One test per rule that Ongaro's thesis adds to the paper, as this core keeps them; "T" and a section number.

"Consensus: Bridging Theory and Practice": transfer, membership and learners, disruptive servers, reads and leases,
writing to disk in parallel, snapshots.
"""

from __future__ import annotations

import pytest

from replication.errors import InvalidMembership, NotLeader, ProposalDropped
from replication.membership import enter_joint
from replication.messages import (
    AppendRequest,
    AppendResponse,
    Heartbeat,
    HeartbeatResponse,
    InstallSnapshot,
    SteppedDown,
    TimeoutNow,
    VoteRequest,
    VoteResponse,
)
from replication.raft import RaftConfig, Role
from replication.types import SnapshotMeta
from tests.paper.lone_replica import TIMEOUT_S, Replica, cluster_of, of
from tests.scripts.raft_cluster import GROUP, plain

# ---------------------------------------------------------------- T 3.10, 6.3: leadership transfer


def test_transfer_the_prior_leader_stops_accepting_requests():
    replica = Replica()
    replica.lead()
    replica.raft.transfer_leadership(2, 0.0)
    with pytest.raises(ProposalDropped):
        replica.propose()


def test_transfer_timeout_now_leaves_when_the_target_has_the_whole_log():
    replica = Replica()
    replica.lead()
    replica.raft.transfer_leadership(2, 0.0)
    assert not of(TimeoutNow, replica.work())
    assert of(TimeoutNow, replica.acknowledge(2, 1)) == [TimeoutNow(GROUP, 2, 1, 1)]


def test_transfer_the_target_campaigns_at_once_without_a_pre_vote():
    replica = Replica()
    replica.append(1, (0, 0))
    asked = replica.step(TimeoutNow(GROUP, 1, 2, 1))
    assert asked == [VoteRequest(GROUP, n, 1, 2, 0, 0, False, True) for n in (2, 3)]


def test_transfer_its_requests_are_granted_though_a_leader_is_heard():
    replica = Replica()
    replica.append(1, (0, 0))
    asked = VoteRequest(GROUP, 1, 3, 2, 9, 9, False, True)
    [answer] = replica.step(asked)
    assert isinstance(answer, VoteResponse)
    assert answer.granted


def test_transfer_that_takes_an_election_timeout_is_given_up():
    cluster = cluster_of(3)
    leader = cluster.elect(1)
    cluster.isolate(2)
    leader.transfer_leadership(2, cluster.now)
    cluster.run(TIMEOUT_S - 0.02)
    assert leader.transferring
    cluster.run(0.04)
    assert not leader.transferring
    assert cluster.propose(1, b"x") == 2


def test_transfer_gives_up_the_lease_once_the_target_was_told():
    cluster = cluster_of(3)
    leader = cluster.elect(1)
    cluster.run(0.3)
    assert leader.lease_valid(cluster.now)
    cluster.isolate(2)
    leader.transfer_leadership(2, cluster.now)
    cluster.run(1.5)
    assert leader.is_leader
    assert not leader.transferring
    assert not leader.lease_valid(cluster.now)


def test_transfer_is_to_voters_only():
    replica = Replica(membership=plain([1, 2], [3]))
    replica.lead()
    with pytest.raises(ProposalDropped):
        replica.raft.transfer_leadership(3, 0.0)
    with pytest.raises(NotLeader):
        Replica().raft.transfer_leadership(2, 0.0)


# ---------------------------------------------------------------- T 4: membership


def test_membership_takes_effect_when_it_is_appended():
    cluster = cluster_of(1, (2,))
    leader = cluster.elect(1)
    leader.propose_membership(leader.term, plain([1, 2]), cluster.now)
    assert leader.membership == plain([1, 2])
    assert leader.commit_index == 1


def test_membership_one_change_at_a_time():
    replica = Replica(membership=plain([1, 2, 3], [4]))
    replica.lead()
    replica.acknowledge(2, 1)
    replica.raft.propose_membership(1, plain([1, 2, 3, 4]), 0.0)
    with pytest.raises(ProposalDropped):
        replica.raft.propose_membership(1, plain([1, 2, 3]), 0.0)


def test_membership_not_before_an_entry_of_the_leaders_term_is_committed():
    """Ongaro's correction of 2015: otherwise two leaders may count by disjoint majorities."""
    replica = Replica(membership=plain([1, 2, 3], [4]))
    replica.lead()
    with pytest.raises(ProposalDropped):
        replica.raft.propose_membership(1, plain([1, 2, 3, 4]), 0.0)


def test_membership_more_than_one_voter_goes_through_joint():
    replica = Replica()
    replica.lead()
    replica.acknowledge(2, 1)
    with pytest.raises(InvalidMembership):
        replica.raft.propose_membership(1, plain([1, 7, 8]), 0.0)


def test_membership_a_removed_leader_leads_until_the_change_is_committed_and_does_not_count_itself():
    replica = Replica()
    replica.lead()
    replica.acknowledge(2, 1)
    replica.raft.propose_membership(1, plain([2, 3]), 0.0)
    replica.work()
    replica.acknowledge(2, 2)
    assert replica.raft.commit_index == 1
    replica.raft.step(AppendResponse(GROUP, 1, 3, 1, True, 2, 0), 0.0)
    assert replica.raft.commit_index == 2
    assert not replica.raft.is_leader


def test_membership_a_replica_that_is_leaving_may_still_be_needed_to_lead():
    """T 4.2.2: it may be the only one that has the entry."""
    cluster = cluster_of(2)
    leader = cluster.elect(1)
    cluster.isolate(1)
    leader.propose_membership(leader.term, plain([2], [1]), cluster.now)
    cluster.work()
    cluster.run(3.0)
    cluster.heal()
    cluster.run(6.0)
    assert [cluster.raft(n).membership for n in (1, 2)] == [plain([2], [1])] * 2
    assert cluster.raft(2).is_leader


def test_membership_a_removed_server_does_not_disrupt_the_others():
    cluster = cluster_of(3)
    leader = cluster.elect(1)
    cluster.run(0.1)
    cluster.isolate(3)
    leader.propose_membership(leader.term, plain([1, 2]), cluster.now)
    cluster.run(5.0)
    cluster.heal()
    cluster.run(10.0)
    assert leader.is_leader
    assert leader.term == 1


def test_membership_joint_needs_separate_majorities_for_elections():
    joint = enter_joint(plain([1, 2, 3]), [1, 4, 5], [], ((4, 40), (5, 50)))
    replica = Replica(membership=joint)
    replica.raft.campaign(0.0)
    replica.work()
    replica.step(VoteResponse(GROUP, 1, 2, 1, True, True))
    assert replica.role is Role.PRE_CANDIDATE
    replica.step(VoteResponse(GROUP, 1, 4, 1, True, True))
    assert replica.raft.status()["role"] == "candidate"


def test_membership_joint_is_left_by_the_leader_once_it_is_applied():
    cluster = cluster_of(3, (4,))
    leader = cluster.elect(1)
    joint = enter_joint(leader.membership, [1, 2, 4], [3], ())
    leader.propose_membership(leader.term, joint, cluster.now)
    cluster.run(0.5)
    assert {cluster.raft(n).membership for n in (1, 2, 3, 4)} == {plain([1, 2, 4], [3])}


def test_membership_learners_replicate_and_count_for_nothing():
    replica = Replica(membership=plain([1, 2, 3], [4, 5]))
    assert [m.to for m in replica.lead()] == [2, 3, 4, 5]
    replica.acknowledge(4, 1)
    replica.acknowledge(5, 1)
    assert replica.raft.commit_index == 0


def test_membership_a_learner_never_campaigns():
    replica = Replica(membership=plain([2, 3], [1]))
    assert replica.raft.deadline() is None
    replica.raft.tick(100.0)
    replica.raft.campaign(100.0)
    replica.step(TimeoutNow(GROUP, 1, 2, 0))
    assert replica.role is Role.FOLLOWER


def test_membership_a_learner_still_votes_when_asked():
    """It may not know yet that it was promoted (T 4.2.1)."""
    assert Replica(membership=plain([2, 3], [1])).vote(1)


# ---------------------------------------------------------------- T 4.2.3, 6.2, 9.6: disruption


def test_pre_vote_does_not_raise_the_term():
    replica = Replica()
    replica.raft.campaign(0.0)
    asked = replica.work()
    assert replica.raft.term == 0
    assert all(isinstance(m, VoteRequest) and m.pre and m.term == 1 for m in asked)


def test_pre_vote_is_granted_by_the_same_rules_and_binds_nobody():
    replica = Replica((1, 1))
    for sender in (2, 3):
        [answer] = replica.step(VoteRequest(GROUP, 1, sender, 2, 2, 1, True))
        assert isinstance(answer, VoteResponse)
        assert answer.granted
    [answer] = replica.step(VoteRequest(GROUP, 1, 2, 2, 1, 1, True))
    assert isinstance(answer, VoteResponse)
    assert not answer.granted
    assert (replica.raft.term, replica.raft.status()["vote"]) == (1, 0)


@pytest.mark.parametrize("pre", [True, False])
def test_a_server_that_hears_a_leader_neither_grants_its_vote_nor_updates_its_term(pre):
    replica = Replica()
    replica.append(1, (0, 0))
    replica.now = TIMEOUT_S - 0.01
    [answer] = replica.step(VoteRequest(GROUP, 1, 3, 9, 9, 9, pre))
    assert isinstance(answer, VoteResponse)
    assert not answer.granted
    assert replica.raft.term == 1
    replica.now = TIMEOUT_S
    [answer] = replica.step(VoteRequest(GROUP, 1, 3, 9, 9, 9, pre))
    assert isinstance(answer, VoteResponse)
    assert answer.granted


def test_the_promise_to_a_leader_outlives_its_term():
    """The term rose by a stray answer; the old leader's lease is as long as it was."""
    replica = Replica()
    replica.append(1, (0, 0))
    replica.step(VoteResponse(GROUP, 1, 3, 2, False, True))
    assert replica.raft.term == 2
    assert not replica.vote(2)
    replica.now = TIMEOUT_S
    assert replica.vote(2)


def test_a_lost_pre_vote_makes_a_follower_again():
    replica = Replica()
    replica.raft.campaign(0.0)
    replica.work()
    for sender in (2, 3):
        replica.step(VoteResponse(GROUP, 1, sender, 0, False, True))
    assert (replica.role, replica.raft.term) == (Role.FOLLOWER, 0)


def test_a_leader_steps_down_if_an_election_timeout_passes_without_a_round_to_a_majority():
    replica = Replica()
    replica.lead()
    replica.acknowledge(2, 1, probe=1)
    while replica.raft.is_leader:
        replica.tick()
    assert replica.now == pytest.approx(TIMEOUT_S)


def test_a_leader_that_is_answered_by_a_majority_stays():
    cluster = cluster_of(5)
    leader = cluster.elect(1)
    cluster.isolate(4)
    cluster.isolate(5)
    cluster.run(5.0)
    assert leader.is_leader


def test_a_leader_that_steps_down_tells_its_followers_and_they_wait_less():
    replica = Replica()
    replica.lead()
    replica.raft.step_down(0.0)
    assert of(SteppedDown, replica.work()) == [SteppedDown(GROUP, n, 1, 1) for n in (2, 3)]
    follower = Replica()
    follower.append(1, (0, 0))
    follower.step(SteppedDown(GROUP, 1, 2, 1))
    deadline = follower.raft.deadline()
    assert deadline is not None
    assert deadline <= RaftConfig().heartbeat_s
    assert follower.vote(2)  # the old leader's lease is over


def test_no_vote_is_granted_for_one_lease_after_a_restart():
    replica = Replica(vote_not_before=1.0)
    assert not replica.vote(1)
    replica.raft.campaign(0.0)
    assert replica.role is Role.FOLLOWER
    deadline = replica.raft.deadline()
    assert deadline is not None
    assert deadline >= 1.0
    replica.now = 1.0
    assert replica.vote(2)


def test_a_group_of_one_campaigns_at_once_even_after_a_restart():
    replica = Replica(membership=plain([1], [2]), vote_not_before=99.0)
    assert replica.raft.deadline() == 0.0
    replica.tick()
    assert replica.raft.is_leader
    assert replica.raft.commit_index == 1


@pytest.mark.parametrize("joint", [False, True])
def test_who_becomes_the_sole_voter_by_an_uncommitted_entry_waits_after_a_restart(joint):
    """The leader that leaves still counts on its answers, and does not know that it has the entry."""
    cluster = cluster_of(2)
    leader = cluster.elect(2)
    cluster.run(0.3)
    target = enter_joint(leader.membership, [1], [], ()) if joint else plain([1])
    leader.propose_membership(leader.term, target, cluster.now)
    while leader.membership != plain([1]):  # joint is left once it is committed
        cluster.deliver()
    cluster.blocked[1, 2] = None
    cluster.settle()
    assert cluster.raft(1).membership == plain([1])
    cluster.crash(1)
    cluster.restart(1)
    cluster.raft(1).campaign(cluster.now)
    assert leader.lease_valid(cluster.now)
    while not cluster.raft(1).is_leader:
        cluster.run(0.01)
        assert not (cluster.raft(1).is_leader and leader.lease_valid(cluster.now))
    assert cluster.now < 0.3 + 3 * TIMEOUT_S


def test_a_replica_whose_storage_stalls_does_not_campaign():
    replica = Replica()
    replica.raft.electable = False
    assert replica.raft.deadline() is None
    replica.raft.campaign(9.0)
    assert replica.role is Role.FOLLOWER


# ---------------------------------------------------------------- T 6.4: reads


def test_read_1_waits_until_an_entry_of_the_leaders_term_is_committed():
    replica = Replica((1,))
    replica.lead()
    replica.raft.read_index(7, 0.0)
    assert not of(Heartbeat, replica.work())
    assert of(Heartbeat, replica.acknowledge(2, 2))


def test_read_1_also_when_there_is_other_work_to_do():
    replica = Replica((1,))
    replica.lead()
    replica.raft.read_index(7, 0.0)
    assert not of(Heartbeat, replica.propose())


def test_read_2_saves_the_commit_index_as_read_index():
    replica = Replica()
    replica.lead()
    replica.acknowledge(2, 1)
    replica.raft.read_index(7, 0.0)
    probe = next(m.probe for m in replica.work() if isinstance(m, Heartbeat))
    replica.propose()
    replica.acknowledge(3, 2, probe=1)
    replica.step(HeartbeatResponse(GROUP, 1, 2, 1, probe, 1))
    assert replica.reads == [(7, 1)]


def test_read_3_a_new_round_of_heartbeats_is_acknowledged_by_a_majority_first():
    replica = Replica(membership=plain([1, 2, 3, 4, 5]))
    cluster = cluster_of(5)
    leader = cluster.elect(1)
    cluster.run(0.3)
    cluster.read(1, 7)
    cluster.deliver(lambda message: message.to in {1, 2})
    cluster.deliver(lambda message: message.to == 1)
    assert not cluster.servers[1].reads
    cluster.settle()
    assert [context for context, _ in cluster.servers[1].reads] == [7]
    assert leader.is_leader
    assert not replica.raft.is_leader


def test_read_a_replica_that_does_not_lead_fails_it():
    replica = Replica()
    replica.raft.read_index(7, 0.0)
    replica.work()
    assert replica.reads_failed == [7]


def test_read_pending_reads_fail_when_leadership_is_lost():
    replica = Replica()
    replica.lead()
    replica.raft.read_index(7, 0.0)
    replica.step(AppendResponse(GROUP, 1, 2, 9, False, 0, 0))
    assert replica.reads_failed == [7]


def test_read_that_waits_is_confirmed_when_the_leader_becomes_the_only_voter():
    """Nobody is left who could answer its round: it waited for the next read, or for ever."""
    replica = Replica(membership=plain([1, 2]))
    replica.lead()
    replica.acknowledge(2, 1)
    replica.raft.read_index(7, 0.0)
    assert of(Heartbeat, replica.work())
    replica.raft.propose_membership(replica.raft.term, plain([1]), 0.0)
    replica.work()
    assert replica.reads == [(7, 1)]


def test_read_a_group_of_one_confirms_at_once():
    replica = Replica(membership=plain([1]))
    replica.tick()
    replica.raft.read_index(7, 0.0)
    replica.work()
    assert replica.reads == [(7, 1)]


def test_lease_counts_from_the_send_time_of_what_a_majority_acknowledged():
    replica = Replica()
    replica.lead()
    replica.now = 0.5
    replica.acknowledge(2, 1, probe=1)  # it was sent at 0
    lease_s = RaftConfig().lease_s
    assert replica.raft.lease_valid(lease_s - 0.01)
    assert not replica.raft.lease_valid(lease_s)


def test_lease_is_shorter_than_the_time_for_which_others_refuse_to_vote():
    config = RaftConfig()
    assert config.lease_s == pytest.approx(config.election_timeout_s * (1 - config.lease_drift))


def test_lease_needs_an_entry_of_the_own_term_committed():
    replica = Replica(membership=plain([1, 2, 3]))
    replica.lead()
    replica.step(HeartbeatResponse(GROUP, 1, 2, 1, 1, 0))
    assert not replica.raft.lease_valid(0.0)


def test_lease_is_of_the_membership_of_now():
    """A quorum of the old membership says nothing about the new one."""
    replica = Replica(membership=plain([1, 2], [3]))
    replica.lead()
    replica.acknowledge(2, 1, probe=1)
    assert replica.raft.lease_valid(0.0)
    replica.raft.propose_membership(1, plain([1, 2, 3]), 0.0)
    assert replica.raft.lease_valid(0.0)  # 1 and 2 are a majority of three
    replica.work()
    replica.acknowledge(2, 2, probe=1)
    joint = enter_joint(replica.raft.membership, [1, 3, 4, 5], [], ((4, 40), (5, 50)))
    replica.raft.propose_membership(1, joint, 0.0)
    assert not replica.raft.lease_valid(0.0)


@pytest.mark.parametrize("said", [True, False])
def test_reads_a_probe_of_an_earlier_leader_is_not_answered_to_the_next(said):
    replica = Replica()
    replica.raft.step(AppendRequest(GROUP, 1, 2, 1, 0, 0, [], 0, 4), 0.0)
    if said:  # in the same turn it hears that this leader gives up
        replica.raft.step(SteppedDown(GROUP, 1, 2, 1), 0.0)
        replica.work()
    sent = replica.step(AppendRequest(GROUP, 1, 3, 2, 0, 0, [], 0, 1))
    [answer] = of(AppendResponse, sent)
    assert isinstance(answer, AppendResponse)
    assert (answer.to, answer.term, answer.probe) == (3, 2, 1)


# ---------------------------------------------------------------- T 10.2.1: writing to disk in parallel


def test_a_leader_sends_appends_while_its_own_disk_still_writes():
    replica = Replica()
    replica.lead()
    replica.acknowledge(2, 1)
    replica.raft.propose(1, b"x", 0.0)
    ready = replica.raft.ready()
    appends = [o for o in ready.outgoing if isinstance(o.message, AppendRequest)]
    assert appends
    assert all(outgoing.token is None for outgoing in appends)


def test_the_leaders_own_disk_counts_as_far_as_it_has_come():
    replica = Replica()
    replica.lead()
    replica.acknowledge(2, 1)
    tokens = []
    for data in (b"x", b"y"):
        replica.raft.propose(1, data, 0.0)
        tokens.append(replica.raft.ready().token)
    replica.raft.step(AppendResponse(GROUP, 1, 2, 1, True, 3, 0), 0.0)
    assert replica.raft.commit_index == 1
    assert tokens[0] is not None
    replica.raft.persisted(tokens[0])
    assert replica.raft.commit_index == 2


def test_a_leader_may_commit_before_its_own_disk_has_it_but_applies_only_then():
    replica = Replica()
    replica.lead()
    replica.acknowledge(2, 1)
    replica.raft.propose(1, b"x", 0.0)
    ready = replica.raft.ready()
    for sender in (2, 3):
        replica.raft.step(AppendResponse(GROUP, 1, sender, 1, True, 2, 0), 0.0)
    assert replica.raft.commit_index == 2
    replica.work()
    assert replica.applied == [1]
    assert ready.token is not None
    replica.raft.persisted(ready.token)
    replica.work()
    assert replica.applied == [1, 2]


# ---------------------------------------------------------------- T 5: snapshots


def test_install_1_reply_immediately_if_term_is_smaller_than_current_term():
    [answer] = Replica(term=5).step(
        InstallSnapshot(GROUP, 1, 2, 4, SnapshotMeta(9, 4, plain([1, 2, 3])))
    )
    assert isinstance(answer, AppendResponse)
    assert (answer.success, answer.term) == (False, 5)


def test_install_6_a_snapshot_of_what_the_log_holds_keeps_the_log():
    replica = Replica((1, 1, 1))
    [answer] = replica.step(InstallSnapshot(GROUP, 1, 2, 1, SnapshotMeta(2, 1, plain([1, 2, 3]))))
    assert replica.raft.last_index == 3
    assert replica.raft.installing is None
    assert isinstance(answer, AppendResponse)
    assert (answer.success, answer.match_index) == (True, 2)


def test_install_7_otherwise_the_whole_log_is_discarded():
    replica = Replica((1, 1))
    meta = SnapshotMeta(9, 3, plain([1, 2], [3]))
    assert not replica.step(InstallSnapshot(GROUP, 1, 2, 3, meta))
    assert replica.raft.installing == meta
    replica.raft.installed(meta, 0.0)
    [answer] = replica.work()
    raft = replica.raft
    assert (raft.first_index, raft.last_index, raft.commit_index, raft.applied_index) == (
        10,
        9,
        9,
        9,
    )
    assert isinstance(answer, AppendResponse)
    assert (answer.success, answer.match_index) == (True, 9)


def test_install_appends_are_neither_taken_nor_answered_meanwhile():
    replica = Replica((1, 1))
    meta = SnapshotMeta(9, 3, plain([1, 2, 3]))
    replica.step(InstallSnapshot(GROUP, 1, 2, 3, meta))
    assert replica.append(3, (2, 1), 3, commit=3) == []
    assert (replica.terms, replica.raft.commit_index) == ([1, 1], 0)
    [answer] = replica.step(Heartbeat(GROUP, 1, 2, 3, 9, 4))
    assert isinstance(answer, HeartbeatResponse)
    assert replica.raft.deadline() is None  # it does not campaign


def test_install_8_the_membership_of_the_snapshot_is_taken():
    replica = Replica((1, 1))
    meta = SnapshotMeta(9, 3, plain([2, 3], [1]))
    replica.step(InstallSnapshot(GROUP, 1, 2, 3, meta))
    replica.raft.installed(meta, 0.0)
    assert replica.raft.membership == plain([2, 3], [1])
    assert replica.raft.deadline() is None


def test_install_a_snapshot_that_could_not_be_installed_leaves_everything_as_it_was():
    replica = Replica((1, 1))
    replica.step(InstallSnapshot(GROUP, 1, 2, 3, SnapshotMeta(9, 3, plain([1, 2]))))
    replica.raft.install_failed(0.0)
    replica.append(3, (2, 1), 3)
    assert replica.terms == [1, 1, 3]
