"""Random histories of a cluster of Raft cores: loss, duplication, reordering, partitions, crashes, drifting clocks.

Claims, judged after every step by tests/scripts/raft_cluster.py: one leader per term; one entry per (index, term),
with one past; a commit index never falls; no two replicas apply different entries at one index; a leader has every
committed entry; no vote, candidacy or acknowledgement leaves before it is durable; what a leader commits is on the
disks of every majority. Here, too: while a lease is valid nothing is committed that its holder does not know, a
confirmed read misses nothing that was committed before it was asked for, and after healing everybody catches up.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.errors import InvalidMembership, NotLeader, ProposalDropped
from replication.membership import enter_joint, is_joint
from replication.raft import RaftConfig
from replication.types import Membership
from tests.scripts.raft_cluster import Cluster, Server, plain

STEPS = 500
REPLICAS_MAX = 7


class History:
    """One random history; everything is drawn from one seed."""

    def __init__(self, seed: int) -> None:
        draw = self.draw = random.Random(seed)
        small = draw.random() < 0.5
        config = RaftConfig(
            inflight_entries_max=3 if small else 4096,
            inflight_bytes_max=60 if small else 1 << 20,
            append_bytes_max=40 if small else 1 << 20,
            uncommitted_bytes_max=400,
            pending_reads_max=5,
        )
        self.cluster = Cluster(
            plain(range(1, draw.choice([1, 2, 3, 3, 4, 5]) + 1)),
            config=config,
            rng_of=lambda replica: random.Random(seed * 31 + replica),
        )
        self.cluster.auto_persist = draw.random() < 0.3
        for server in self.cluster.servers.values():
            self.skew(server)
        self.count = 0
        self.chaos = draw.choice([0.02, 0.1, 0.3])
        self.changes = draw.random() < 0.6
        self.actions: list[tuple[float, Callable[[], None]]] = [
            (8, self.time_passes),
            (25, self.message_arrives),
            (12, self.write_reaches_disk),
            (6, self.client_proposes),
            (3, self.client_reads),
            (4 * self.chaos, self.message_repeats),
            (4 * self.chaos, self.message_is_lost),
            (2 * self.chaos, self.replica_crashes),
            (1.5, self.replica_restarts),
            (1 * self.chaos, self.network_breaks),
            (0.5, self.network_heals),
            (1.5, self.log_is_compacted),
            (0.3, self.leader_hands_over),
            (0.1, self.leader_steps_down),
            (0.5 if self.changes else 0, self.membership_changes),
        ]

    def skew(self, server: Server) -> None:
        server.clock_rate = self.draw.uniform(0.97, 1.03)
        server.clock_offset = self.draw.uniform(0, 100)
        server.start()

    def run(self) -> None:
        weights = [weight for weight, _ in self.actions]
        actions = [action for _, action in self.actions]
        for _ in range(STEPS):
            self.draw.choices(actions, weights)[0]()
            self.cluster.work()
            self.check_leases()

    def check_leases(self) -> None:
        for server in self.cluster.live():
            assert server.raft is not None
            if server.raft.lease_valid(server.now):
                assert server.raft.commit_index >= self.cluster.judge.chosen_last, (
                    f"replica {server.replica} would serve a stale read under its lease"
                )

    def someone(self) -> Server | None:
        live = self.cluster.live()
        return self.draw.choice(live) if live else None

    def leading(self) -> Server | None:
        live = [s for s in self.cluster.live() if s.raft is not None and s.raft.is_leader]
        return self.draw.choice(live) if live else self.someone()

    # ------------------------------------------------------------------ actions

    def time_passes(self) -> None:
        self.cluster.now += self.draw.choice([0.001, 0.001, 0.01, 0.01, 0.05, 0.2, 0.5])
        for server in self.cluster.live():
            assert server.raft is not None
            deadline = server.raft.deadline()
            if deadline is not None and server.now >= deadline and self.draw.random() < 0.9:
                server.raft.tick(server.now)

    def message_arrives(self) -> None:
        network = self.cluster.network
        for _ in range(min(self.draw.choice([1, 2, 8]), len(network))):
            position = 0 if self.draw.random() < 0.7 else self.draw.randrange(len(network))
            self.cluster.servers[network[position].message.to].receive(network.pop(position))

    def message_repeats(self) -> None:
        network = self.cluster.network
        if network:
            network.append(self.draw.choice(network))

    def message_is_lost(self) -> None:
        network = self.cluster.network
        if network:
            self.cluster.lose(network.pop(self.draw.randrange(len(network))))

    def write_reaches_disk(self) -> None:
        server = self.someone()
        if server is not None:
            server.persist(self.draw.choice([1, 2, 5]))

    def client_proposes(self) -> None:
        server = self.leading()
        if server is None or server.raft is None:
            return
        self.count += 1
        data = b"%d" % self.count + b"x" * self.draw.choice([0, 10, 50])
        try:
            self.cluster.propose(server.replica, data)
        except (NotLeader, ProposalDropped):
            pass

    def client_reads(self) -> None:
        server = self.leading()
        if server is not None:
            self.count += 1
            try:
                self.cluster.read(server.replica, self.count)
            except ProposalDropped:
                pass

    def replica_crashes(self) -> None:
        server = self.someone()
        if server is not None:
            server.crash(self.draw.randrange(3), self.draw.randrange(server.disk.applied + 1))

    def replica_restarts(self) -> None:
        down = [server for server in self.cluster.servers.values() if server.raft is None]
        if down:
            self.cluster.restart(self.draw.choice(down).replica)

    def network_breaks(self) -> None:
        sender, receiver = self.draw.choices(list(self.cluster.servers), k=2)
        self.cluster.blocked[sender, receiver] = None
        if self.draw.random() < 0.5:
            self.cluster.isolate(sender)

    def network_heals(self) -> None:
        self.cluster.heal()

    def log_is_compacted(self) -> None:
        server = self.someone()
        if server is not None:
            server.compact(self.draw.randrange(server.disk.applied + 1))

    def leader_hands_over(self) -> None:
        server = self.leading()
        if server is not None and server.raft is not None:
            try:
                server.raft.transfer_leadership(
                    self.draw.choice(list(self.cluster.servers)), server.now
                )
            except (NotLeader, ProposalDropped):
                pass

    def leader_steps_down(self) -> None:
        server = self.leading()
        if server is not None and server.raft is not None:
            server.raft.step_down(server.now)

    def membership_changes(self) -> None:
        server = self.leading()
        if server is None or server.raft is None:
            return
        raft = server.raft
        current = raft.membership
        try:
            raft.propose_membership(raft.term, self.changed(current), server.now)
        except (NotLeader, ProposalDropped, InvalidMembership):
            pass

    def changed(self, current: Membership) -> Membership:
        if is_joint(current):
            return current
        ids = [replica for replica, _ in current.nodes]
        unknown = [replica for replica in range(1, REPLICAS_MAX + 1) if replica not in ids]
        if unknown and len(ids) < 5 and self.draw.random() < 0.5:
            new = self.draw.choice(unknown)
            if new in self.cluster.servers:
                return current  # an id is never used again
            self.skew(self.cluster.add(new, Membership()))
            return plain(current.voters, (*current.learners, new))
        voters = [replica for replica in ids if self.draw.random() < 0.7]
        learners = [
            replica for replica in ids if replica not in voters and self.draw.random() < 0.5
        ]
        if not voters:
            return current
        if self.draw.random() < 0.3:
            return plain(voters, learners)
        return enter_joint(current, voters, learners, ())

    # ------------------------------------------------------------------ the end

    def heal(self) -> None:
        """Everything works again: the group must elect, commit, and bring every member up to date."""
        cluster = self.cluster
        cluster.heal()
        cluster.auto_persist = True
        for server in cluster.servers.values():
            if server.raft is None:
                cluster.restart(server.replica)
            else:
                server.persist(len(server.writes))
        for _ in range(200):
            self.pass_time()
            leader = cluster.leader()
            if leader is not None and leader.commit_index >= leader.term_start_index:
                break
        for _ in range(120):  # longer than the leader's patience with an installation
            self.pass_time()
        leader = cluster.leader()
        assert leader is not None, [s.raft and s.raft.status() for s in cluster.servers.values()]
        index = cluster.propose(leader.replica, b"the end")
        for _ in range(20):
            self.pass_time()
        assert not is_joint(leader.membership)
        for replica, _ in leader.membership.nodes:
            assert cluster.raft(replica).applied_index >= index, (
                leader.status(),
                cluster.raft(replica).status(),
            )
            assert cluster.servers[replica].state == cluster.servers[leader.replica].state

    def pass_time(self) -> None:
        self.cluster.now += 0.1
        self.cluster.fire_timers()
        self.cluster.settle()
        self.check_leases()


def run_history(seed: int) -> None:
    history = History(seed)
    history.run()
    history.heal()


@given(seed=st.integers(0, 2**32 - 1))
def test_random_histories_keep_every_promise(seed):
    run_history(seed)


@pytest.mark.slow
def test_a_thousand_more_histories_keep_every_promise():
    for seed in range(1000):
        run_history(seed)
