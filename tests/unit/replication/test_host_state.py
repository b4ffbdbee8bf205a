"""A replica whose state is lost, being replaced, or cannot be read: it serves and leads nothing, and its log is not lost."""

from __future__ import annotations

from collections import deque

from replication.replica import Replica
from replication.snapshot import Chunk, decode
from tests.unit.replication.host_driver import World, behind, led, restarted


def test_a_replica_without_state_leads_nothing():
    world = World(nodes=1)
    node = world.nodes[1]
    node.machine.states[1].installing = True
    node.machine.durable[1] = node.machine.states[1].copy()
    host = restarted(world)
    world.advance(5.0)
    assert not host.raft(1).is_leader


def test_a_replica_whose_state_is_being_replaced_does_not_lead_its_machine():
    """It did, its stream broke off, and it led without a state for ever."""
    world = World(nodes=3)
    leader = led(world)
    other = world.nodes[1 + leader.number % 3]
    other.host._installer.begins(1)
    leader.host.transfer_leadership(1, other.number)
    world.advance(0.5)
    assert world.leader() is leader
    leader.crash()
    world.advance(5.0)
    assert world.leader() is not other
    assert not other.machine.led


def test_a_leader_that_loses_its_state_steps_down():
    world = World(nodes=3)
    leader = led(world)
    leader.host._replicas[1].lose_state()
    world.advance(5.0)
    assert world.leader() is not leader


def test_a_log_whose_replica_has_no_state_is_handed_to_one_that_has():
    """Seed 845: with the third away, who had a state lacked an entry, and who had the entry did not campaign."""
    world = World(nodes=3)
    leader = led(world)
    behind, stateless = (world.nodes[1 + (leader.number + n) % 3] for n in (0, 1))
    world.propose(b"seen by all")
    world.advance(0.5)
    world.isolate(behind.number)
    world.propose(b"not there")
    world.advance(0.5)
    stateless.host._replicas[1].lose_state()
    leader.crash()
    world.heal()
    world.advance(20.0)
    assert world.leader() is behind
    assert behind.values(1) == [b"seen by all", b"not there"]
    assert stateless.values(1) == behind.values(1)  # it got a snapshot at last


def test_a_log_whose_replica_cannot_read_its_state_is_handed_over():
    """A bad sector is as good as no state there: the others lacked an entry, and who had it did not campaign."""
    world = World(nodes=3)
    leader = led(world)
    behind, unreadable = (world.nodes[1 + (leader.number + n) % 3] for n in (0, 1))
    world.propose(b"seen by all")
    world.advance(0.5)
    world.isolate(behind.number)
    world.propose(b"not there")
    world.advance(0.5)
    told = len(unreadable.machine.log)
    unreadable.machine.snapshot_open = cannot_open  # type: ignore[method-assign]
    unreadable.host._transfers.trials.failed(1, world.clock.now)
    unreadable.host._installer.unreadable(1)
    leader.crash()
    world.heal()
    world.advance(20.0)
    assert world.leader() is behind
    assert behind.values(1) == [b"seen by all", b"not there"] == unreadable.values(1)
    assert "leadership" not in [each[0] for each in unreadable.machine.log[told:]]


def test_a_caretaker_that_cannot_read_its_state_begins_no_stream():
    """Each would cost a follower the state that it has."""
    world = World(nodes=3)
    leader, slow = behind(world)
    (other,) = set(world.nodes) - {leader.number, slow.number}
    opened, leader.machine.snapshot_open = leader.machine.snapshot_open, cannot_open  # type: ignore[method-assign]
    leader.host._installer.unreadable(1)
    world.nodes[other].crash()
    world.heal()
    world.advance(20.0)
    assert leader.host.raft(1).is_caretaker  # who has the whole log is away
    assert not leader.fatal
    leader.machine.snapshot_open = opened  # type: ignore[method-assign]
    leader.host._installer.readable(1)
    world.advance(5.0)
    assert leader.machine.led  # elected anew, and the machine has heard of it
    assert slow.machine.applied(1) == leader.machine.applied(1)


class SlowStream:
    """`receiver` gets its state from `sender` at a chunk a second, and is the only one left that has the end of the log."""

    def __init__(self) -> None:
        world = self.world = World(nodes=3)
        self.sender = led(world)
        self.receiver, last = (world.nodes[1 + (self.sender.number + n) % 3] for n in (0, 1))
        for number in range(300):
            world.propose(b"%d" % number)
        world.advance(0.5)
        self._chunks: deque[tuple[int, int, bool, bytes]] = deque()
        self._deliver = world.deliver
        world.deliver = self._one_frame  # type: ignore[method-assign]
        self.replica.lose_state()
        self.receiver.host.ask_for_state_soon()
        self.run(5)
        self.sender.host.transfer_leadership(1, last.number)
        self.run(3)
        world.cut[last.number, self.sender.number] = None
        world.propose(b"not at the sender")
        world.advance(0.05)
        last.crash()
        world.cut.clear()
        assert self.replica.receiving

    @property
    def replica(self) -> Replica:
        return self.receiver.host._replicas[1]

    def _one_frame(self) -> None:
        _, to, snapshot, payload = self.world.frames[0]
        if snapshot and to == self.receiver.number and isinstance(decode(payload), Chunk):
            self._chunks.append(self.world.frames.popleft())
        else:
            self._deliver()

    def hurry(self) -> None:
        """All that is left arrives at once."""
        self.world.deliver = self._deliver  # type: ignore[method-assign]
        self.world.frames.extendleft(reversed(self._chunks))
        self._chunks.clear()
        self.world.settle()

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            if self._chunks:
                self.world.frames.appendleft(self._chunks.popleft())
                self._deliver()
            self.world.advance(1.0)


def test_a_log_whose_replica_gets_its_state_slowly_is_handed_over_meanwhile():
    """It alone had the end of the log, and a stream of hours kept it from saying so."""
    stream = SlowStream()
    stream.run(15)
    assert stream.replica.receiving
    assert stream.sender.machine.led
    assert stream.sender.values(1)[-1] == b"not at the sender"
    while stream.replica.held:
        stream.run(1)
    assert stream.receiver.host.stats()["snapshots_lost"] == 0
    assert stream.receiver.values(1) == stream.sender.values(1)


def test_a_caretaker_whose_state_has_come_in_is_elected_anew_and_serves():
    """Nobody took over from it, so that it led when the stream ended; its log was not begun anew for that."""
    stream = SlowStream()
    stream.sender.host._installer.unreadable(1)  # so it does not lead; what it has opened goes on
    while not stream.receiver.host.raft(1).is_caretaker:
        stream.world.advance(0.1)
    stream.hurry()
    assert not stream.replica.held
    assert stream.receiver.host.raft(1).first_index == 1
    assert not stream.receiver.machine.led
    stream.run(5)
    assert stream.receiver.machine.led
    assert stream.receiver.values(1)[-1] == b"not at the sender"
    stream.world.propose(b"more")
    stream.world.advance(0.5)
    assert stream.receiver.values(1)[-1] == b"more"
    assert stream.receiver.values(1) == stream.sender.values(1)


def cannot_open(_group):
    raise OSError("a bad sector")


def test_a_caretaker_asks_each_that_has_the_log_and_leads_only_until_one_can():
    world = World(nodes=3)
    leader = led(world)
    others = [node for node in world.nodes.values() if node is not leader]
    for node in others:
        node.host._replicas[1].lose_state()
    deliver = world.deliver

    def without_snapshots() -> None:
        if world.frames[0][2]:
            world.frames.popleft()
        else:
            deliver()

    world.deliver = without_snapshots  # type: ignore[method-assign]
    world.isolate(leader.number)
    led_here = 0
    for _ in range(200):
        world.advance(0.1)
        led_here += any(node.host.raft(1).is_leader for node in others)
    assert led_here
    told = [each for node in others for each in node.machine.log]
    assert ("leadership", 1) not in {
        each[:2] for each in told
    }  # no machine is told to lead without a state
    world.heal()
    world.advance(10.0)
    assert world.leader() is leader


def test_a_caretaker_that_nobody_relieves_ends_so_that_others_may_try():
    world = World(nodes=3)
    leader = led(world)
    others = [node for node in world.nodes.values() if node is not leader]
    for node in others:
        node.host._replicas[1].lose_state()
    leader.crash()
    roles: list[str] = []
    for _ in range(200):
        world.advance(0.1)
        roles += [node.host.raft(1).status()["role"] for node in others]
    assert "leader" not in roles  # whoever looks is told that nothing is served
    assert roles.count("caretaker") > 10
    terms = [node.host.raft(1).term for node in others]
    world.advance(20.0)
    assert min(node.host.raft(1).term for node in others) > max(terms)


def test_one_that_was_elected_while_its_state_came_in_does_not_lead_unheard():
    world = World(nodes=1)
    node = world.nodes[1]
    led(world)
    replica = node.host._replicas[1]
    replica.led_term = 0  # as if it had been elected while it was held
    replica.has_state(node.machine, replica.applied)
    assert not replica.raft.is_leader


def test_a_leader_that_cannot_read_its_state_lets_another_one_lead_and_send_its_own():
    """It led on, and each of its streams cost the follower its state anew."""
    world = World(nodes=3)
    leader, slow = behind(world)
    opened = leader.machine.snapshot_open

    def unreadable(group):
        source = opened(group)
        chunks = iter([source.chunk()])
        source.chunk = lambda: next(chunks)  # type: ignore[method-assign]  # then StopIteration: a broken read like any other
        return source

    leader.machine.snapshot_open = unreadable  # type: ignore[method-assign]
    world.heal()
    world.advance(120.0)  # some trials of its own, all in vain
    assert world.leader() is not leader
    assert not slow.machine.states[1].installing
    assert slow.values(1) == world.leader().values(1)
    assert slow.host.stats()["snapshots_lost"] <= 1
    leader.host.campaign(1)
    world.advance(1.0)
    assert world.leader() is not leader


def test_a_replica_that_can_read_its_state_again_leads_again():
    """Seed 91128: a disk failed for a second, the others had no state, and the range had no leader ever after."""
    world = World(nodes=3)
    leader, slow = behind(world)
    (other,) = set(world.nodes) - {leader.number, slow.number}
    world.heal()
    world.nodes[other].crash()
    opened = leader.machine.snapshot_open
    broken_until = world.clock.now + 12.0

    def failing(group):
        source = opened(group)
        chunk = source.chunk

        def read() -> bytes | None:
            if world.clock.now < broken_until:
                raise OSError("the disk does not answer")
            return chunk()

        source.chunk = read  # type: ignore[method-assign]
        return source

    leader.machine.snapshot_open = failing  # type: ignore[method-assign]
    world.advance(11.0)
    assert not leader.machine.led
    world.advance(30.0)
    assert leader.machine.led
    assert slow.values(1) == leader.values(1)
    assert slow.host.stats()["snapshots_lost"] <= 1
