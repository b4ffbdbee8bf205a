"""Three hosts over simulated disks and a lossy network, with the real core and the real log.

Claims: whatever crashes, is cut off, lost or doubled, every value whose commit was seen is in every replica's state in
the end, in one order; states are prefixes of each other at all times; a replica that fell behind the log, or crashed
while a snapshot came in, has the same state again; the host never fails.
"""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.unit.replication.host_driver import World

NODES = st.integers(1, 3)
GROUPS = st.integers(1, 2)


class HostCluster(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 2**16))
    def begin(self, seed: int) -> None:
        self.world = World(3, (1, 2), seed=seed)
        self.rng = random.Random(seed)
        self.number = 0
        self.committed: dict[int, list[bytes]] = {1: [], 2: []}

    @rule(group=GROUPS, count=st.integers(1, 5), node=NODES)
    def propose(self, group: int, count: int, node: int) -> None:
        """At any node that believes to lead."""
        target = self.world.nodes[node]
        if not target.up or not target.host.raft(group).is_leader:
            return
        raft = target.host.raft(group)
        for _ in range(count):
            self.number += 1
            if raft.is_leader and not raft.transferring:
                target.host.propose(group, raft.term, b"%d" % self.number)

    @rule(count=st.integers(1, 8))
    def deliver(self, count: int) -> None:
        for _ in range(count):
            if self.world.frames:
                self.world.deliver()

    @rule(node=NODES)
    def turn(self, node: int) -> None:
        if self.world.nodes[node].up:
            self.world.nodes[node].host.turn()

    @rule()
    def settle(self) -> None:
        self.world.settle()

    @rule(tenths=st.integers(1, 25))
    def wait(self, tenths: int) -> None:
        self.world.advance(tenths / 10)

    @rule(node=NODES)
    def flush_and_cut_the_log(self, node: int) -> None:
        target = self.world.nodes[node]
        if target.up:
            target.host.flushed(target.machine.flush())

    @rule(node=NODES, at_power_loss=st.booleans())
    def crash(self, node: int, at_power_loss: bool) -> None:
        if self.world.nodes[node].up:
            self.world.nodes[node].crash(self.rng if at_power_loss else None)

    @rule(node=NODES)
    def restart(self, node: int) -> None:
        if not self.world.nodes[node].up:
            self.world.nodes[node].start()

    @rule(node=NODES)
    def isolate(self, node: int) -> None:
        self.world.isolate(node)

    @rule()
    def heal(self) -> None:
        self.world.heal()

    @rule(lossy=st.booleans())
    def lose_frames(self, lossy: bool) -> None:
        self.world.lose = (lambda: self.rng.random() < 0.2) if lossy else lambda: False

    @precondition(lambda self: self.world.frames)
    @rule()
    def double_and_shuffle_frames(self) -> None:
        frames = self.world.frames
        messages = [frame for frame in frames if not frame[2]]
        self.rng.shuffle(messages)
        frames.extend(messages[:3])

    @invariant()
    def states_are_prefixes_and_nothing_failed(self) -> None:
        for node in self.world.nodes.values():
            assert not node.fatal, repr(node.fatal[0])
            for group, committed in self.committed.items():
                if node.machine.states[group].installing:
                    continue
                values = node.values(group)
                known = min(len(values), len(committed))
                assert values[:known] == committed[:known]
                if len(values) > known:
                    self.committed[group] = list(values)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        world.heal()
        world.lose = lambda: False
        for node in world.nodes.values():
            if not node.up:
                node.start()
        for group in (1, 2):
            for _ in range(50):
                index = world.propose(b"last", group)
                world.advance(1.0)
                if index is not None and all(
                    node.values(group)[-1:] == [b"last"] for node in world.nodes.values()
                ):
                    break
            self.states_are_prefixes_and_nothing_failed()
            for node in world.nodes.values():
                assert node.values(group) == self.committed[group]
                assert node.values(group)[-1] == b"last"


TestHostCluster = HostCluster.TestCase
TestHostCluster.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
