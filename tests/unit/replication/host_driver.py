"""Hosts without a loop: a clock that is set by hand, a machine that collects what is applied, and a network of queues.

Nothing here sleeps or draws randomness of its own. A `World` has nodes that share one clock; `World.settle` turns
every host and delivers every frame until nothing moves, `World.advance` lets time pass from deadline to deadline.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from kvstore.sim.disk import SimDisk
from replication.codec import decode_membership, decode_messages, encode_messages
from replication.errors import NotLeader, ProposalDropped
from replication.host import Host
from replication.messages import AppendRequest, Message
from replication.ready import RaftConfig
from replication.turns import HostLimits
from replication.types import Entry, EntryKind, Membership, SnapshotMeta
from replication.wal import Wal

CONFIG = RaftConfig()
SEGMENT_BYTES = 64 * 1024


class ManualClock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@dataclass
class State:
    """One group's state as an engine would hold it."""

    membership: Membership
    values: list[bytes] = field(default_factory=list)
    applied: tuple[int, int] = (0, 0)
    installed: tuple[int, int] = (0, 0)
    installing: bool = False

    def copy(self) -> State:
        return replace(self, values=list(self.values))


class ListMachine:
    """Machine: the state of a group is the list of its commands. `flush` makes it durable; a crash keeps the rest not."""

    def __init__(self, states: dict[int, State]) -> None:
        self.states = states
        self.durable = {group: state.copy() for group, state in states.items()}
        self.host: Host | None = None
        self.on_drain: Callable[[float], None] = lambda now: None
        self.log: list[tuple[Any, ...]] = []
        self.led: dict[int, int] = {}
        self.reads: dict[int, bool] = {}
        self.finished = 0
        self.stages_bytes = 0  # of rows, by each entry
        self.settlements = 0
        self._unfinished = False

    def drain(self, now: float) -> None:
        self.on_drain(now)

    def apply(self, group: int, entries: Sequence[Entry]) -> int:
        state = self.states[group]
        assert not state.installing
        for entry in entries:
            assert entry.index == state.applied[0] + 1, f"{entry.index} after {state.applied}"
            assert entry.term >= state.applied[1]
            if entry.kind == EntryKind.COMMAND:
                state.values.append(entry.data)
            elif entry.kind == EntryKind.CONFIG:
                state.membership = decode_membership(entry.data)
            state.applied = (entry.index, entry.term)
        self.log.append(("apply", group, [entry.index for entry in entries]))
        self._unfinished = True
        return self.stages_bytes * len(entries)

    def finish(self) -> None:
        assert self._unfinished
        self._unfinished = False
        self.finished += 1

    def settled(self) -> None:
        assert not self._unfinished, "answers leave after what was applied is written"
        self.settlements += 1

    def applied(self, group: int) -> tuple[int, int]:
        return self.states[group].applied

    def leadership(self, group: int, term: int, is_leader: bool) -> None:
        if is_leader:
            assert group not in self.led
            self.led[group] = term
        else:
            assert self.led.pop(group) == term
        self.log.append(("leadership", group, term, is_leader))

    def read_confirmed(self, group: int, contexts: Sequence[int], ok: bool) -> None:
        for context in contexts:
            assert context not in self.reads, "a read is answered once"
            self.reads[context] = ok

    def snapshot_open(self, group: int) -> ListSource:
        return ListSource(self.states[group].copy())

    def snapshot_sink(self, group: int, meta: SnapshotMeta) -> ListSink:
        return ListSink(self, group, meta)

    def flush(self, groups: Sequence[int] | None = None) -> dict[int, int]:
        for group in groups or list(self.states):
            self.durable[group] = self.states[group].copy()
        return {group: state.applied[0] for group, state in self.states.items()}


class ListSource:
    ROWS = 3

    def __init__(self, state: State) -> None:
        self.meta = SnapshotMeta(state.applied[0], state.applied[1], state.membership)
        self._rows = deque(state.values)
        self.closed = False

    def chunk(self) -> bytes | None:
        rows = [self._rows.popleft() for _ in range(min(self.ROWS, len(self._rows)))]
        return msgspec.msgpack.encode(rows) if rows else None

    def close(self) -> None:
        assert not self.closed
        self.closed = True


class ListSink:
    """Wipe and mark first; the mark goes with the last batch. An engine may have flushed any prefix of it."""

    def __init__(self, machine: ListMachine, group: int, meta: SnapshotMeta) -> None:
        self._machine, self._group, self._meta = machine, group, meta
        self._rows: list[bytes] = []
        state = machine.states[group]
        state.values, state.installing = [], True
        machine.durable[group] = state.copy()

    def chunk(self, data: bytes) -> None:
        self._rows += msgspec.msgpack.decode(data, type=list[bytes])

    def finish(self) -> None:
        state = self._machine.states[self._group]
        state.values, state.membership = self._rows, self._meta.membership
        state.applied = state.installed = (self._meta.index, self._meta.term)
        state.installing = False

    def flush(self) -> None:
        self._machine.durable[self._group] = self._machine.states[self._group].copy()

    def abort(self) -> None:
        assert self._machine.states[self._group].installing


class QueuePeers:
    """Peers: frames go through the codec into the world's queue."""

    def __init__(self, world: World, node: int) -> None:
        self._world, self._node = world, node
        self.full = False  # of the snapshot connection
        self.sends: list[tuple[int, list[Message]]] = []

    def send(self, node: int, messages: Sequence[Message]) -> None:
        self.sends.append((node, list(messages)))
        self._world.frames.append((self._node, node, False, encode_messages(messages)))

    def send_snapshot_chunk(self, node: int, payload: bytes) -> bool:
        if self.full:
            return False
        self._world.frames.append((self._node, node, True, payload))
        return True


class Node:
    """One process: it can crash and come back from its disk and the durable part of its machine."""

    def __init__(self, world: World, number: int, groups: Sequence[int], membership: Membership):
        self.world, self.number, self.groups = world, number, list(groups)
        self.disk = SimDisk()
        self.machine = ListMachine({group: State(membership) for group in groups})
        self.fatal: list[BaseException] = []
        self.up = True
        self.start(new=True)

    def start(self, *, new: bool = False) -> None:
        wal, logs = Wal.recover(self.disk, segment_bytes=SEGMENT_BYTES)
        self.wal, self.logs = wal, logs
        self.peers = QueuePeers(self.world, self.number)
        self.host = self.machine.host = Host(
            node=self.number,
            wal=wal,
            files=self.disk,
            machine=self.machine,
            peers=self.peers,
            clock=self.world.clock,
            rng=random.Random(self.world.rng.getrandbits(32)),
            raft_config=self.world.config,
            on_fatal=self.fatal.append,
            limits=self.world.limits,
        )
        for group in self.groups:
            state = self.machine.states[group]
            self.host.add_group(
                group,
                self.number,
                logs.get(group),
                state.membership,
                state.applied,
                installed=state.installed,
                installing=state.installing,
                born=new,
            )
        self.up = True

    def crash(self, rng: random.Random | None = None) -> None:
        """Power fails (or, without rng, all that was written and not synced is lost too, but nothing is torn)."""
        self.up = False
        self.host.stop()
        self.disk = self.disk.crash(rng) if rng is not None else self.disk.kill()
        durable = {group: state.copy() for group, state in self.machine.durable.items()}
        self.machine = ListMachine(durable)

    def values(self, group: int) -> list[bytes]:
        return self.machine.states[group].values


class World:
    def __init__(
        self,
        nodes: int = 3,
        groups: Sequence[int] = (1,),
        *,
        seed: int = 0,
        config: RaftConfig = CONFIG,
        limits: HostLimits | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        self.clock = ManualClock()
        self.config, self.limits = config, limits or HostLimits()
        self.frames: deque[tuple[int, int, bool, bytes]] = deque()
        self.cut: dict[tuple[int, int], None] = {}
        self.lose: Callable[[], bool] = lambda: False
        numbers = tuple(range(1, nodes + 1))
        membership = Membership(voters=numbers, nodes=tuple((n, n) for n in numbers))
        self.nodes = {n: Node(self, n, groups, membership) for n in numbers}

    def deliver(self) -> None:
        """One frame."""
        sender, to, snapshot, payload = self.frames.popleft()
        node = self.nodes[to]
        if not node.up or (sender, to) in self.cut or self.lose():
            return
        if snapshot:
            node.host.receive_snapshot_chunk(sender, payload)
        else:
            node.host.receive(sender, decode_messages(payload))

    def settle(self, steps_max: int = 20_000) -> None:
        """Turn and deliver until nothing moves, at one instant of time."""
        for _ in range(steps_max):
            moved = False
            for node in self.nodes.values():
                if node.up and node.host.turn_wanted:
                    node.host.turn()
                    moved = True
            while self.frames:
                self.deliver()
                moved = True
            if not moved:
                return
        raise AssertionError("it never comes to rest")

    def advance(self, seconds: float) -> None:
        """Let time pass; every deadline on the way gets its turn."""
        end = self.clock.now + seconds
        self.settle()
        for _ in range(100_000):
            deadlines = [n.host.deadline() for n in self.nodes.values() if n.up]
            at = min((d for d in deadlines if d is not None), default=end)
            if at > end:
                break
            self.clock.now = max(at, self.clock.now + 1e-6)
            for node in self.nodes.values():
                deadline = node.host.deadline()
                if node.up and deadline is not None and deadline <= self.clock.now:
                    node.host.turn()
            self.settle()
            if at == end:
                break
        self.clock.now = end

    def leader(self, group: int = 1) -> Node:
        """The leader of the highest term; waits for one, up to a minute of virtual time."""
        for _ in range(600):
            led = [
                node
                for node in self.nodes.values()
                if node.up and group in node.host.groups() and node.host.raft(group).is_leader
            ]
            if led:
                return max(led, key=lambda node: node.host.raft(group).term)
            self.advance(0.1)
        raise AssertionError("nobody leads")

    def propose(self, data: bytes, group: int = 1) -> int | None:
        """At the leader; the index, or None if it was refused."""
        host = self.leader(group).host
        try:
            return host.propose(group, host.raft(group).term, data)
        except (NotLeader, ProposalDropped):
            return None

    def isolate(self, number: int) -> None:
        for other in self.nodes:
            if other != number:
                self.cut[number, other] = self.cut[other, number] = None

    def heal(self) -> None:
        self.cut.clear()


def led(world: World, group: int = 1) -> Node:
    leader = world.leader(group)
    world.advance(0.5)
    return leader


def restarted(world: World, number: int = 1) -> Host:
    world.nodes[number].crash()
    world.nodes[number].start()
    return world.nodes[number].host


def append(index: int, data: bytes = b"x", *, to: int = 1, group: int = 1) -> AppendRequest:
    """From a leader, replica 2, of term 5, whose log has nothing before."""
    entries = [Entry(index, 5, EntryKind.COMMAND, data)]
    return AppendRequest(group, to, 2, 5, index - 1, 5 if index > 1 else 0, entries, 0, 1)


def behind(world: World, *, values: int = 40) -> tuple[Node, Node]:
    """A leader whose log is cut, and a follower that is cut off and needs what was cut."""
    leader = led(world)
    slow = world.nodes[1 + leader.number % 3]
    world.isolate(slow.number)
    for number in range(values):
        world.propose(b"%d" % number)
    world.advance(10.0)
    leader.host.flushed(leader.machine.flush())
    return leader, slow
