"""Cutting the log, and snapshots: what a replica that fell behind gets, and what no crash, loss or delay can spoil."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

from replication.codec import decode_messages
from replication.messages import AppendRequest
from replication.ready import RaftConfig
from replication.snapshot import Chunk, Credit, End, Wanted, decode, encode
from replication.turns import HostLimits
from tests.unit.replication.host_driver import Node, World, behind, led, restarted

# -- compaction


def test_a_leader_keeps_what_a_live_follower_still_needs_and_no_more_than_the_bound():
    world = World(nodes=3, limits=HostLimits(log_tail_bytes_max=50_000))
    leader = led(world)
    slow = 1 + leader.number % 3
    world.propose(b"seen by all")
    world.advance(0.5)
    match = leader.host.raft(1).last_index
    world.isolate(slow)
    world.propose(bytes(20_000))
    world.settle()
    leader.host.flushed(leader.machine.flush())
    assert leader.host.raft(1).first_index == match + 1
    world.propose(bytes(40_000))
    world.settle()
    leader.host.flushed(leader.machine.flush())
    assert leader.host.raft(1).first_index == leader.host.raft(1).last_index + 1


def test_a_follower_that_is_gone_holds_nothing_back():
    world = World(nodes=3)
    leader = led(world)
    world.nodes[1 + leader.number % 3].crash()
    world.propose(b"value")
    world.advance(10.0)
    leader.host.flushed(leader.machine.flush())
    assert leader.host.raft(1).first_index == leader.host.raft(1).last_index + 1


# -- snapshots


def test_a_replica_behind_the_cut_log_gets_a_snapshot_and_then_the_log():
    world = World(nodes=3)
    leader, slow = behind(world)
    world.heal()
    world.advance(3.0)
    assert slow.machine.states[1].installed[0] > 0
    sent = sum(node.host.stats()["snapshot_bytes_sent"] for node in world.nodes.values())
    assert sent >= slow.host.stats()["snapshot_bytes_received"] > 0
    leader = world.leader()
    world.propose(b"afterwards")
    world.advance(1.0)
    assert slow.values(1) == leader.values(1)
    assert slow.values(1)[-1] == b"afterwards"
    assert not any(node.fatal for node in world.nodes.values())


def test_a_snapshot_survives_the_crash_that_follows_it():
    world = World(nodes=3)
    _, slow = behind(world)
    world.heal()
    world.advance(3.0)
    slow.crash(random.Random(1))
    slow.start()
    assert slow.logs[1].start[0] == slow.machine.states[1].applied[0] > 0
    world.advance(3.0)
    assert slow.values(1) == world.leader().values(1)


def stream_until(world: World, count: int) -> None:
    """Heal, and let so many chunks of a snapshot through; everything else of it is lost from then on."""
    world.heal()
    left = [count]
    deliver = world.deliver

    def deliver_some() -> None:
        _, _, snapshot, payload = world.frames[0]
        if snapshot and isinstance(decode(payload), Chunk):
            left[0] -= 1
            if left[0] < 0:
                world.frames.popleft()
                return
        deliver()

    world.deliver = deliver_some  # type: ignore[method-assign]
    world.advance(2.0)
    world.deliver = deliver  # type: ignore[method-assign]
    assert left[0] < 0


def test_a_stream_that_breaks_off_costs_the_state_and_another_one_brings_it_back():
    world = World(nodes=3)
    _, slow = behind(world)
    stream_until(world, 4)
    assert slow.machine.states[1].installing
    world.advance(30.0)
    assert not slow.machine.states[1].installing
    assert slow.values(1) == world.leader().values(1)
    assert slow.host.stats()["snapshots_lost"] == 1


def test_a_crash_amid_an_installation_leaves_a_replica_that_votes_and_asks_for_a_snapshot():
    world = World(nodes=3)
    _, slow = behind(world)
    stream_until(world, 4)
    slow.crash(random.Random(2))
    assert slow.machine.states[1].installing
    slow.start()
    asked: list[int] = []
    deliver = world.deliver

    def watch() -> None:
        sender, _, snapshot, payload = world.frames[0]
        if snapshot and isinstance(decode(payload), Wanted):
            asked.append(sender)
        deliver()

    world.deliver = watch  # type: ignore[method-assign]
    world.advance(10.0)
    assert slow.number in asked
    assert slow.values(1) == world.leader().values(1)
    assert not slow.machine.states[1].installing


def test_an_old_snapshot_destroys_nothing():
    """The offer is refused before the machine hears of it: what it brings is committed here already."""
    world = World(nodes=3)
    _, slow = behind(world)
    frames: list[tuple[int, int, bool, bytes]] = []
    deliver = world.deliver

    def copy() -> None:
        if world.frames[0][2] and isinstance(decode(world.frames[0][3]), Chunk):
            frames.append(world.frames[0])
        deliver()

    world.deliver = copy  # type: ignore[method-assign]
    world.heal()
    world.advance(3.0)
    world.propose(b"newer")
    world.advance(1.0)
    newer = list(slow.values(1))
    world.frames.extend(frames)
    world.settle()
    assert slow.values(1) == newer == world.leader().values(1)
    assert slow.host.stats()["snapshots_refused"] >= 1
    assert not slow.machine.states[1].installing


def test_commit_that_passes_a_snapshot_on_its_way_makes_it_no_worse():
    """A leader with the whole log takes over while rows come in: the core declines, the state is good all the same."""
    world = World(nodes=3)
    leader, slow = behind(world)
    third = world.nodes[6 - leader.number - slow.number]
    assert third.host.raft(1).first_index == 1  # never cut
    paused: list[tuple[int, int, bool, bytes]] = []
    deliver = world.deliver

    def hold_the_end() -> None:
        _, to, snapshot, payload = world.frames[0]
        frame = decode(payload) if snapshot else None
        if to == slow.number and isinstance(frame, Chunk) and frame.last:
            paused.append(world.frames.popleft())
            return
        deliver()

    world.deliver = hold_the_end  # type: ignore[method-assign]
    world.heal()
    world.advance(0.5)
    assert paused
    leader.host.transfer_leadership(1, third.number)
    world.advance(1.0)
    assert third.host.raft(1).is_leader
    world.propose(b"by the log")
    world.advance(1.0)
    assert slow.host.raft(1).commit_index == third.host.raft(1).commit_index
    assert slow.machine.states[1].installing
    world.deliver = deliver  # type: ignore[method-assign]
    world.frames.extend(paused)
    world.advance(1.0)
    assert slow.values(1) == third.values(1)
    assert slow.values(1)[-1] == b"by the log"
    assert not slow.fatal


def test_a_snapshot_whose_senders_term_ended_on_the_way_takes_the_log_along():
    """State without its log was refused every other snapshot: of two replicas out of three, nothing was committed."""
    world = World(nodes=3)
    leader, slow = behind(world)
    third = world.nodes[6 - leader.number - slow.number]
    third.host.flushed(third.machine.flush())
    paused: list[tuple[int, int, bool, bytes]] = []
    deliver = world.deliver

    def hold_the_end() -> None:
        sender, _, snapshot, payload = world.frames[0]
        frame = decode(payload) if snapshot else None
        if isinstance(frame, Chunk) and (frame.last or sender == third.number):
            held = world.frames.popleft()
            if sender == leader.number:
                paused.append(held)
            return
        deliver()

    world.deliver = hold_the_end  # type: ignore[method-assign]
    world.heal()
    world.advance(0.5)
    assert paused
    leader.crash()
    world.advance(4.0)
    assert third.host.raft(1).is_leader
    world.deliver = deliver  # type: ignore[method-assign]
    world.frames.extend(paused)
    world.settle()
    assert slow.host.stats()["snapshots_installed"] == 1
    world.propose(b"by two")
    world.advance(30.0)
    assert slow.values(1) == third.values(1)
    assert slow.values(1)[-1] == b"by two"
    assert slow.host.raft(1).term_at(slow.machine.states[1].installed[0]) is not None


def lost_with_its_connection(world: World, lost: Callable[[Any], bool]) -> tuple[int, int]:
    """Heal; the first such frame of a snapshot vanishes in a connection whose end its sender learns of 5 s later.

    Returns: the sender and the receiver of that frame.
    """
    found: list[tuple[int, int]] = []
    deliver = world.deliver

    def deliver_but_one() -> None:
        source, target, snapshot, payload = world.frames[0]
        if snapshot and not found and lost(decode(payload)):
            found.append((source, target))
            world.frames.popleft()
        else:
            deliver()

    world.heal()
    world.deliver = deliver_but_one  # type: ignore[method-assign]
    for _ in range(30):
        world.advance(0.1)
        if found:
            break
    world.advance(5.0)
    world.nodes[found[0][0]].host.snapshot_link_lost(found[0][1])
    return found[0]


def test_an_offer_that_is_lost_with_its_connection_is_made_again_as_soon_as_that_is_known():
    """Seed 1763: the node had lost its power while the leader stood still; of three, the third was gone."""
    world = World(nodes=3)
    _, slow = behind(world)
    lost_with_its_connection(world, lambda frame: isinstance(frame, Chunk) and not frame.sequence)
    world.advance(1.0)
    assert slow.values(1) == world.leader().values(1)


def test_a_chunk_that_is_lost_with_its_connection_is_not_waited_for():
    world = World(nodes=3)
    _, slow = behind(world)
    lost_with_its_connection(world, lambda frame: isinstance(frame, Chunk) and frame.last)
    world.advance(1.0)
    assert slow.values(1) == world.leader().values(1)
    assert slow.host.stats()["snapshots_lost"] == 1


def test_credit_that_is_lost_with_its_connection_is_given_again_and_the_stream_goes_on():
    world = World(nodes=3)
    _, slow = behind(world)
    source, _ = lost_with_its_connection(world, lambda frame: isinstance(frame, Credit))
    assert source == slow.number
    world.advance(1.0)
    assert slow.values(1) == world.leader().values(1)
    assert slow.host.stats()["snapshots_lost"] == 0


def test_a_connection_that_ends_harms_no_stream_of_others_and_none_that_has_not_begun():
    world = World(nodes=3)
    leader, slow = behind(world)
    leader.peers.full = True
    world.heal()
    world.advance(1.0)
    for node in world.nodes.values():
        for other in world.nodes:
            node.host.snapshot_link_lost(other)
    leader.peers.full = False
    world.advance(1.0)
    assert slow.values(1) == world.leader().values(1)
    assert leader.host.stats()["snapshots_failed"] == 0


def test_a_full_queue_delays_a_stream_and_does_not_break_it():
    world = World(nodes=3)
    leader, slow = behind(world)
    leader.peers.full = True
    slow.peers.full = True
    world.heal()
    world.advance(1.0)
    assert slow.values(1) == []
    leader.peers.full = False
    world.advance(1.0)
    slow.peers.full = False
    world.advance(1.0)
    assert slow.values(1) == leader.values(1)


def refuse_for_the_dead(world: World) -> None:
    """A frame for a node that is down finds no connection."""

    def refusing(send: Callable[[int, bytes], bool]) -> Callable[[int, bytes], bool]:
        return lambda to, payload: world.nodes[to].up and send(to, payload)

    for node in world.nodes.values():
        peers: Any = node.peers
        peers.send_snapshot_chunk = refusing(peers.send_snapshot_chunk)


def test_an_answer_to_a_dead_node_is_given_up_with_its_stream():
    """It was tried a hundred times a second until the node returned."""
    world = World(nodes=3)
    leader, slow = behind(world)
    refuse_for_the_dead(world)
    stream_until(world, 4)
    leader.crash()
    world.advance(60.0)
    assert slow.host.stats()["snapshot_answers_dropped"] == 1
    turns = slow.host.counters["turns"]
    world.advance(10.0)
    assert slow.host.counters["turns"] - turns < 200  # heartbeats


def test_an_answer_to_a_dead_node_holds_up_no_other():
    """They waited in one line, so that a stream went on each 10 ms only."""
    world = World(nodes=3)
    leader, slow = behind(world)
    refuse_for_the_dead(world)
    stream_until(world, 4)
    leader.crash()
    third = world.leader()
    deliver, times = world.deliver, list[float]()

    def watch() -> None:
        if {third.number, slow.number} == {*world.frames[0][:2]} and world.frames[0][2]:
            times.append(world.clock.now)
        deliver()

    world.deliver = watch  # type: ignore[method-assign]
    world.advance(12.0)
    assert slow.values(1) == third.values(1)
    assert slow.host._transfers._unsaid
    assert times[-1] == times[1]  # but for what asks for it


def test_the_log_behind_a_snapshot_in_flight_is_kept():
    world = World(nodes=3)
    leader, _ = behind(world)
    stream_until(world, 4)
    opened_at = leader.host.raft(1).applied_index
    world.propose(b"meanwhile")
    world.settle()
    leader.host.flushed(leader.machine.flush())
    assert leader.host.raft(1).first_index == opened_at + 1


class SlowLink:
    """To one node only so many chunks and appends arrive with each `tick`, of 0.1 s; all else at once."""

    def __init__(self, world: World, to: int, *, chunks: int, appends: int) -> None:
        self._world, self._deliver = world, world.deliver
        self._to, self._chunks, self._appends = to, chunks, appends
        self._waiting: tuple[deque[tuple[int, int, bool, bytes]], ...] = (deque(), deque())
        world.deliver = self.deliver  # type: ignore[method-assign]

    def deliver(self) -> None:
        _, to, snapshot, payload = frame = self._world.frames[0]
        if to == self._to and snapshot and isinstance(decode(payload), Chunk):
            self._waiting[0].append(frame)
        elif to == self._to and not snapshot and self._appends_in(payload):
            self._waiting[1].append(frame)
        else:
            self._deliver()
            return
        self._world.frames.popleft()

    def tick(self) -> None:
        for waiting, count in zip(self._waiting, (self._chunks, self._appends), strict=True):
            for _ in range(min(count, len(waiting))):
                self._world.frames.appendleft(waiting.popleft())
                self._deliver()
        self._world.advance(0.1)

    @staticmethod
    def _appends_in(payload: bytes) -> bool:
        return any(isinstance(m, AppendRequest) and m.entries for m in decode_messages(payload))


def write_steadily(world: World, link: SlowLink, leader: Node, ticks: int) -> int:
    """20 kB/s, flushed each 64 kB and at the end. Returns the most that the leader's log had in memory, in bytes."""
    peak_bytes = 0
    for tick in range(1, ticks + 1):
        world.propose(bytes(2_000))
        link.tick()
        peak_bytes = max(peak_bytes, leader.host.raft(1).log_bytes)
        if tick % 32 == 0 or tick == ticks:
            leader.host.flushed(leader.machine.flush())
    return peak_bytes


def lag(leader: Node, other: Node) -> int:
    raft = leader.host.raft(1)
    match: int = raft.status()["peers"][other.number]["match"]
    return raft.last_index - match


SMALL_APPENDS = RaftConfig(append_bytes_max=2_500, inflight_bytes_max=2_500)


def test_one_snapshot_is_enough_for_a_follower_that_is_faster_than_the_writes():
    """What was written while it came was cut as soon as it was there, so another one was sent, and so on."""
    world = World(nodes=3, limits=HostLimits(log_tail_bytes_max=50_000), config=SMALL_APPENDS)
    leader, slow = behind(world, values=450)
    link = SlowLink(world, slow.number, chunks=1, appends=3)
    world.heal()
    peak_bytes = write_steadily(world, link, leader, 310)
    assert leader.host.stats()["snapshots_sent"] == 1
    assert lag(leader, slow) <= 1  # what is on its way
    assert peak_bytes < 450_000
    assert write_steadily(world, link, leader, 100) <= 64_000 + 50_000  # as for any follower
    assert leader.host.stats()["snapshots_sent"] == 1
    assert leader.host.stats()["snapshots_outrun"] == 0


def test_the_log_for_a_snapshot_that_writes_outrun_is_bounded():
    """The stream goes on, since its state is better than none; what follows it is gone, which is told."""
    world = World(
        nodes=3,
        limits=HostLimits(log_tail_bytes_max=50_000, catch_up_bytes_max=100_000),
        config=SMALL_APPENDS,
    )
    leader, slow = behind(world, values=450)
    link = SlowLink(world, slow.number, chunks=1, appends=3)
    world.heal()
    assert write_steadily(world, link, leader, 150) <= 64_000 + 100_000
    assert leader.host.stats()["snapshots_outrun"] == 1
    assert slow.host.stats()["snapshots_lost"] == 0
    for _ in range(500):
        link.tick()
    assert lag(leader, slow) == 0
    assert slow.values(1) == leader.values(1)
    assert leader.host.stats()["snapshots_sent"] == 2


def test_the_log_for_a_follower_that_stands_still_after_its_snapshot_is_given_up():
    world = World(nodes=3, limits=HostLimits(log_tail_bytes_max=50_000), config=SMALL_APPENDS)
    leader, slow = behind(world)
    link = SlowLink(world, slow.number, chunks=1, appends=0)
    world.heal()
    write_steadily(world, link, leader, 80)
    raft, index = leader.host.raft(1), slow.machine.states[1].installed[0]
    assert raft.first_index == index + 1 > 1
    write_steadily(world, link, leader, 100)
    assert raft.first_index > index + 1


def test_the_log_of_a_replica_that_waits_for_its_state_is_bounded():
    """It kept and carried forward all that was appended, for as long as no snapshot came through."""
    world = World(nodes=3, limits=HostLimits(held_log_bytes_max=50_000))
    leader = led(world)
    slow, third = (world.nodes[1 + (leader.number + more) % 3] for more in (0, 1))
    leader.peers.full = True  # no snapshot leaves
    state = slow.machine.states[1]
    state.installing = True
    slow.machine.durable[1] = state.copy()
    restarted(world, slow.number)
    for number in range(40):
        world.propose(b"%d" % number + bytes(5_000))
        world.advance(0.05)
    raft = slow.host.raft(1)
    assert raft.leader == leader.number
    assert 50_000 <= raft.log_bytes < 60_000
    assert len(leader.values(1)) == len(third.values(1)) == 40  # the others go on
    third.crash()
    world.propose(b"the last")
    world.advance(3.0)
    assert world.leader() is leader
    assert leader.values(1)[-1] != b"the last"  # and what is not on a second disk does not count
    leader.peers.full = False
    world.advance(5.0)
    assert slow.values(1) == leader.values(1)
    assert slow.values(1)[-1] == b"the last"


def test_a_damaged_chunk_is_noticed_and_the_sender_is_told():
    world = World(nodes=3)
    leader, slow = behind(world)
    deliver, damaged, ends = world.deliver, [False], list[End]()

    def damage() -> None:
        sender, to, snapshot, payload = world.frames[0]
        frame = decode(payload) if snapshot else None
        if isinstance(frame, Chunk) and frame.sequence == 2 and not damaged[0]:
            damaged[0] = True
            world.frames[0] = (sender, to, True, payload[:-1] + bytes((payload[-1] ^ 1,)))
        elif isinstance(frame, End):
            ends.append(frame)
        deliver()

    world.deliver = damage  # type: ignore[method-assign]
    world.heal()
    world.advance(5.0)
    assert [ends[0].installed, ends[-1].installed] == [False, True]
    assert "checksum" in ends[0].reason
    assert slow.values(1) == leader.values(1)


def test_a_chunk_after_the_end_does_not_cost_a_state_that_is_being_flushed():
    """It counted as a broken stream, though all rows were in."""
    world = World(nodes=3)
    leader, slow = behind(world)
    flushes: list[tuple[Callable[[], None], Callable[[], None]]] = []
    slow.host.run_blocking = lambda work, then: flushes.append((work, then))  # type: ignore[method-assign]
    deliver, doubled = world.deliver, list[tuple[int, int, bool, bytes]]()

    def double_the_last() -> None:
        frame = world.frames[0]
        chunk = decode(frame[3]) if frame[2] else None
        if isinstance(chunk, Chunk) and chunk.last and not doubled:
            doubled.append(frame)
            world.frames.insert(1, frame)
        deliver()

    world.deliver = double_the_last  # type: ignore[method-assign]
    world.heal()
    world.advance(0.5)
    assert doubled
    assert not slow.fatal
    [(work, then)] = flushes
    work()
    slow.host._run(lambda _now: then())
    world.advance(0.5)
    assert slow.values(1) == leader.values(1)
    figures = slow.host.stats()
    assert (figures["snapshots_installed"], figures["snapshots_lost"]) == (1, 0)
    assert figures["snapshot_frames_bad"] == 1
    assert leader.host.stats()["snapshots_sent"] == 1


def test_a_frame_with_text_that_is_not_utf8_ends_no_node():
    world = World(nodes=3)
    host = world.leader().host
    encoded = encode(End(1, 42, False, "bad"))
    host.receive_snapshot_chunk(2, encoded.replace(b"bad", b"\xff\xfe\xfd"))
    world.settle()
    assert not any(node.fatal for node in world.nodes.values())
    assert host.stats()["snapshot_frames_bad"] == 1
    assert world.propose(b"value") is not None


def test_a_second_offer_while_the_first_is_being_flushed_is_refused():
    """All its rows are in: to begin anew would take a state away that is good (pitfall 10)."""
    world = World(nodes=3)
    leader, slow = behind(world)
    flushes: list[tuple[Callable[[], None], Callable[[], None]]] = []
    slow.host.run_blocking = lambda work, then: flushes.append((work, then))  # type: ignore[method-assign]
    world.heal()
    world.advance(0.5)
    [(work, then)] = flushes
    leader.host.snapshot_link_lost(slow.number)  # so it offers the state anew
    for _ in range(10):
        if not slow.host.stats()["snapshots_refused"]:
            world.advance(0.1)
    figures = slow.host.stats()
    assert figures["snapshots_refused"] == 1
    assert (figures["snapshots_lost"], figures["snapshots_installed"]) == (0, 0)
    assert len(flushes) == 1
    work()
    slow.host._run(lambda _now: then())
    world.advance(0.5)
    figures = slow.host.stats()
    assert (figures["snapshots_lost"], figures["snapshots_installed"]) == (0, 1)
    assert slow.values(1) == leader.values(1)
    assert not slow.fatal
