"""The host on a loop: its timer, its tasks, syncs in threads. The loop is the simulated one, whose time is virtual."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import pytest

from kvstore.sim.disk import SimDisk
from kvstore.sim.loop import SimLoop, run
from replication.errors import LogWriteFailed
from replication.host import Host
from replication.messages import AppendResponse, Message, VoteRequest, VoteResponse
from replication.turns import SyncMode
from replication.types import Membership
from replication.wal import Wal
from tests.unit.replication.host_driver import (
    CONFIG,
    ListMachine,
    QueuePeers,
    State,
    World,
    append,
)

T = TypeVar("T")


class Disk(SimDisk):
    """Tells when it is synced."""

    def __init__(self, loop: SimLoop) -> None:
        super().__init__()
        self.synced_at: list[float] = []
        self._loop = loop

    def sync(self, segment: int) -> None:
        super().sync(segment)
        self.synced_at.append(self._loop.time())


class CountingPeers(QueuePeers):
    """`syncs`: for each frame that was sent, how many syncs there had been."""

    def __init__(self, world: World, node: int, disk: Disk) -> None:
        super().__init__(world, node)
        self.syncs: list[int] = []
        self._disk = disk

    def send(self, node: int, messages: Sequence[Message]) -> None:
        super().send(node, messages)
        self.syncs.append(len(self._disk.synced_at))


class LoopClock:
    def __init__(self, loop: SimLoop) -> None:
        self.monotonic = loop.time


class OnLoop:
    """One host of a group on the simulated loop; `threads` holds blocking calls back until they are let go."""

    def __init__(self, loop: SimLoop, *, voters: int = 1, sync_mode: SyncMode = "inline") -> None:
        self.loop, self.disk = loop, Disk(loop)
        self.fatal: list[BaseException] = []
        self.threads: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []
        self.hold = False
        world = World(nodes=1)
        self.frames = world.frames
        self.peers = CountingPeers(world, 1, self.disk)
        members = tuple(range(1, voters + 1))
        membership = Membership(voters=members, nodes=tuple((n, n) for n in members))
        self.machine = ListMachine({1: State(membership)})
        wal, _ = Wal.recover(self.disk)
        self.host = Host(
            node=1,
            wal=wal,
            files=self.disk,
            machine=self.machine,
            peers=self.peers,
            clock=LoopClock(loop),
            rng=random.Random(1),
            raft_config=CONFIG,
            on_fatal=self.fatal.append,
            sync_mode=sync_mode,
            run_in_thread=self.in_thread,
        )
        self.host.add_group(1, 1, None, membership, (0, 0), born=True)
        self.task = loop.create_task(self.host.run())

    def in_thread(self, work: Callable[[], T], /) -> Awaitable[T]:
        future: asyncio.Future[T] = self.loop.create_future()
        self.threads.append((work, future))
        if not self.hold:
            self.let_go()
        return future

    def let_go(self) -> None:
        threads, self.threads = self.threads, []
        for work, future in threads:
            try:
                future.set_result(work())
            except LogWriteFailed as error:
                future.set_exception(error)

    def acknowledged(self) -> list[int]:
        """Match indices of the append answers that left."""
        sent = [message for _, messages in self.peers.sends for message in messages]
        return [message.match_index for message in sent if isinstance(message, AppendResponse)]

    async def steps(self, count: int) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    async def stop(self) -> None:
        self.host.stop()
        await self.task


def on_loop(main: Callable[[SimLoop], Any]) -> None:
    run(main, seed=1, time_limit_s=10_000.0)


def test_run_turns_by_itself_and_returns_when_stopped():
    async def main(loop: SimLoop) -> None:
        one = OnLoop(loop)
        await asyncio.sleep(1.0)
        assert one.host.raft(1).is_leader
        one.host.propose(1, one.host.raft(1).term, b"value")
        await asyncio.sleep(0.1)
        assert one.machine.states[1].values == [b"value"]
        await one.stop()

    on_loop(main)


def test_one_timer_drives_elections():
    async def main(loop: SimLoop) -> None:
        one = OnLoop(loop, voters=3)
        await asyncio.sleep(30.0)
        asked = [m for _, messages in one.peers.sends for m in messages]
        assert all(isinstance(m, VoteRequest) and m.pre for m in asked)
        assert 10 <= len(asked) / 2 <= 31  # a wait is one to two election timeouts
        assert one.host.stats()["turns"] < 100
        await one.stop()

    on_loop(main)


def test_wakes_are_coalesced():
    async def main(loop: SimLoop) -> None:
        one = OnLoop(loop)
        await asyncio.sleep(1.0)
        turns = one.host.stats()["turns"]
        for _ in range(100):
            one.host.wake()
        await one.steps(10)
        assert one.host.stats()["turns"] == turns + 1
        await one.stop()

    on_loop(main)


def led_by_one(loop: SimLoop, one: OnLoop) -> None:
    """Make it the leader of its three voters, and count from there."""
    one.host.campaign(1)
    one.host.receive(2, [VoteResponse(1, 1, 2, 1, granted=True, pre=True)])
    one.host.turn()
    one.host.receive(2, [VoteResponse(1, 1, 2, 1, granted=True, pre=False)])
    one.host.turn()
    # follower 2 is known by its answer; to 3 nothing more is sent before it gives one
    one.host.receive(2, [AppendResponse(1, 1, 2, 1, match_index=1, success=True, probe=0)])
    one.host.turn()
    one.peers.syncs = []


def test_entries_are_sent_before_an_inline_sync() -> None:
    async def main(loop: SimLoop) -> None:
        one = OnLoop(loop, voters=3)
        led_by_one(loop, one)
        before = len(one.disk.synced_at)
        one.host.propose(1, 1, b"x")
        one.host.turn()
        assert one.peers.syncs == [before]
        assert len(one.disk.synced_at) == before + 1
        await one.stop()

    on_loop(main)


def test_under_load_one_frame_is_sent_after_the_sync_rather_than_two_around_it() -> None:
    async def main(loop: SimLoop) -> None:
        one = OnLoop(loop, voters=3)
        led_by_one(loop, one)
        before = len(one.disk.synced_at)
        late = AppendResponse(1, 1, 2, 1, match_index=1, success=True, probe=0)
        one.host.receive(2, [late] * one.host.limits.loaded_messages)
        one.host.propose(1, 1, b"x")
        one.host.turn()
        assert one.peers.syncs == [before + 1]
        await one.stop()

    on_loop(main)


def test_a_turn_without_messages_sends_before_its_sync_whatever_the_turn_before_it_took() -> None:
    async def main(loop: SimLoop) -> None:
        one = OnLoop(loop, voters=3)
        led_by_one(loop, one)
        before = len(one.disk.synced_at)
        late = AppendResponse(1, 1, 2, 1, match_index=1, success=True, probe=0)
        one.host.receive(2, [late] * one.host.limits.loaded_messages)
        one.host.turn()
        one.host.propose(1, 1, b"x")
        one.host.turn()
        assert one.peers.syncs == [before]
        await one.stop()

    on_loop(main)


def test_a_sync_in_a_thread_holds_answers_back_and_nothing_else():
    async def main(loop: SimLoop) -> None:
        one = OnLoop(loop, voters=3, sync_mode="thread")
        await asyncio.sleep(0.5)
        one.hold = True
        one.host.receive(2, [append(1)])
        await one.steps(5)
        one.host.receive(2, [append(2)])
        one.host.receive(2, [append(3)])
        await one.steps(5)
        assert len(one.threads) == 1  # one batch under way; the rest becomes one more
        assert one.host.raft(1).last_index == 3
        assert one.peers.sends == []
        one.let_go()
        await one.steps(5)
        assert one.acknowledged() == [1]
        one.let_go()
        await one.steps(5)
        assert one.acknowledged() == [1, 3]
        assert one.host.stats()["syncs"] == 2
        await one.stop()

    on_loop(main)


def test_a_backlog_is_applied_a_slice_in_each_iteration_of_the_loop():
    async def main(loop: SimLoop) -> None:
        one = OnLoop(loop)
        await asyncio.sleep(1.0)
        values = one.machine.states[1].values
        slice_ = one.host.limits.apply_entries_max
        for sent in (slice_, 3 * slice_):
            values.clear()
            for _ in range(sent):
                one.host.propose(1, one.host.raft(1).term, b"value")
            seen = []
            while len(values) < sent:
                await asyncio.sleep(0)
                seen.append(len(values))
            assert seen == list(range(slice_, sent + 1, slice_))
        await one.stop()

    on_loop(main)


def test_a_host_that_stops_amid_a_backlog_applies_no_more():
    async def main(loop: SimLoop) -> None:
        one = OnLoop(loop)
        await asyncio.sleep(1.0)
        slice_ = one.host.limits.apply_entries_max
        for _ in range(2 * slice_):
            one.host.propose(1, one.host.raft(1).term, b"value")
        await one.steps(1)
        await one.stop()
        await one.steps(5)
        assert len(one.machine.states[1].values) == slice_

    on_loop(main)


def test_a_stuck_disk_gives_up_leadership():
    async def main(loop: SimLoop) -> None:
        one = OnLoop(loop, sync_mode="thread")
        await asyncio.sleep(1.0)
        assert one.host.raft(1).is_leader
        one.hold = True
        one.host.propose(1, one.host.raft(1).term, b"value")
        await asyncio.sleep(3 * CONFIG.election_timeout_s)
        assert not one.host.raft(1).is_leader
        assert one.host.stats()["stalls"] == 1
        assert one.host.stats()["sync_age_s"] > 2 * CONFIG.election_timeout_s
        one.hold = False
        one.let_go()
        await asyncio.sleep(3 * CONFIG.election_timeout_s)
        assert one.host.raft(1).is_leader
        assert one.machine.states[1].values == [b"value"]
        await one.stop()

    on_loop(main)


def test_a_failed_sync_in_a_thread_is_fatal_and_run_returns():
    async def main(loop: SimLoop) -> None:
        one = OnLoop(loop, voters=3, sync_mode="thread")
        await asyncio.sleep(0.5)
        one.disk.fail_sync()
        one.host.receive(2, [append(1)])
        await one.task
        assert [type(error) for error in one.fatal] == [LogWriteFailed]
        assert one.peers.sends == []

    on_loop(main)


def test_run_ends_only_when_no_blocking_call_is_under_way():
    async def main(loop: SimLoop) -> None:
        one = OnLoop(loop, voters=3, sync_mode="thread")
        await asyncio.sleep(0.5)
        one.hold = True
        one.host.receive(2, [append(1)])
        await one.steps(5)
        one.host.stop()
        await one.steps(5)
        assert not one.task.done()
        one.let_go()
        await one.task
        assert one.peers.sends == []

    on_loop(main)


def test_auto_makes_segments_in_the_thread_and_writes_inline():
    async def main(loop: SimLoop) -> None:
        one = OnLoop(loop, voters=3, sync_mode="auto")
        one.hold = True
        await asyncio.sleep(0.5)
        one.host.receive(2, [append(1)])
        await one.steps(5)
        assert len(one.threads) == 1
        one.let_go()
        await one.steps(5)
        one.host.receive(2, [append(2)])
        await one.steps(5)
        assert one.threads == []
        assert one.acknowledged() == [1, 2]
        await one.stop()

    on_loop(main)


class Wire:
    """Peers of one of several hosts on a loop: each frame arrives after a drawn delay, so they overtake one another."""

    def __init__(
        self, loop: SimLoop, rng: random.Random, hosts: dict[int, Host], node: int
    ) -> None:
        self.loop, self.rng, self.hosts, self.node = loop, rng, hosts, node

    def send(self, node: int, messages: Sequence[Message]) -> None:
        self.loop.call_later(
            self.rng.uniform(0.000_1, 0.01), self.hosts[node].receive, self.node, messages
        )

    def send_snapshot_chunk(self, node: int, payload: bytes) -> bool:
        self.loop.call_later(0.001, self.hosts[node].receive_snapshot_chunk, self.node, payload)
        return True


@pytest.mark.parametrize("sync_mode", ["inline", "thread", "auto"])
def test_three_hosts_agree_whatever_the_sync_mode(sync_mode):
    async def main(loop: SimLoop) -> None:
        rng = random.Random(7)
        hosts: dict[int, Host] = {}
        membership = Membership(voters=(1, 2, 3), nodes=((1, 1), (2, 2), (3, 3)))
        machines = {n: ListMachine({1: State(membership), 2: State(membership)}) for n in (1, 2, 3)}
        fatal: list[BaseException] = []
        for number, machine in machines.items():
            hosts[number] = Host(
                node=number,
                wal=Wal(segment_bytes=64 * 1024),
                files=SimDisk(),
                machine=machine,
                peers=Wire(loop, rng, hosts, number),
                clock=LoopClock(loop),
                rng=random.Random(number),
                raft_config=CONFIG,
                on_fatal=fatal.append,
                sync_mode=sync_mode,
                run_in_thread=lambda work: loop.run_in_executor(None, work),
            )
            for group in (1, 2):
                hosts[number].add_group(group, number, None, membership, (0, 0), born=True)
        tasks = [loop.create_task(host.run()) for host in hosts.values()]
        await asyncio.sleep(5.0)
        for value in range(300):
            group = 1 + value % 2
            for host in hosts.values():
                if host.raft(group).is_leader:
                    host.propose(group, host.raft(group).term, b"%d" % value)
            if value % 7 == 0:
                await asyncio.sleep(rng.uniform(0.0, 0.02))
            if value % 100 == 99:
                for number, host in hosts.items():
                    host.flushed(machines[number].flush())
        await asyncio.sleep(5.0)
        assert not fatal
        for group in (1, 2):
            expected = [b"%d" % value for value in range(300) if 1 + value % 2 == group]
            assert [m.states[group].values for m in machines.values()] == [expected] * 3
        for host in hosts.values():
            host.stop()
        for task in tasks:
            await task

    on_loop(main)
