"""Scenarios of the log and of snapshots: what a node knows when it comes back."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

from msgspec import structs

from kvstore.config import LogSection, NodeConfig
from kvstore.sim.adapters import QUICK_S, Machine
from kvstore.sim.cluster import small_logs
from replication.messages import Message, TimeoutNow, VoteRequest, VoteResponse
from tests.sim.directed import HIGH, KEYS, LOW, META, MIDDLE, Stage, play

ALL = ("n1", "n2", "n3")
GROUPS = (META, LOW, MIDDLE, HIGH)
_FLUSHED_BY_HAND = structs.replace(small_logs(NodeConfig()).log, flush_interval_s=600.0)


def one_vote_in_a_term() -> list[str]:
    """n2 votes for n1, dies and comes back; n3, told to take over in the term before, asks for the same term's vote."""

    async def scenario(stage: Stage) -> None:
        await stage.until_led_by("n1", HIGH)
        await stage.level(HIGH)
        term = stage.raft("n1", HIGH).term
        held: list[Message] = []

        def at_n3(message: Message) -> bool:
            """Of n1's words only the wish to hand over arrives, late; the rest is lost with the connection."""
            if message.group != HIGH:
                return True
            if isinstance(message, TimeoutNow):
                held.append(message)
            return message.sender != 1

        def at_n1(message: Message) -> bool:
            if isinstance(message, VoteResponse) and message.granted and not message.pre:
                if message.group == HIGH and message.sender == 2:
                    stage.crash_soon("n2")
                    stage.network.partition("n1", ["n2", "n3"])
            return True

        stage.looks["n3"] = at_n3
        stage.looks["n1"] = at_n1
        host: Any = stage.host("n1")
        stage.within("n1", lambda: host.transfer_leadership(HIGH, 3))
        await stage.until(lambda: bool(held), "n1 tells n3 to take over")
        raft = host.raft(HIGH)

        def again() -> None:
            raft.step_down(raft.now)
            host.touch(HIGH)

        stage.within("n1", again)
        await asyncio.sleep(0.01)
        stage.within("n1", lambda: host.campaign(HIGH))
        await stage.until(lambda: raft.is_leader, "n1 leads again", 0.5)
        assert raft.term == term + 1
        await stage.until(lambda: not stage.server("n2").running, "n2 is down")
        await stage.cluster.restart("n2")
        await asyncio.sleep(0.05)
        assert stage.raft("n3", HIGH).term == term
        stage.deliver("n3", held[0])
        await asyncio.sleep(0.2)
        stage.looks.clear()
        stage.network.heal()
        await stage.compare(HIGH)

    return play(scenario)


def idle_ranges_survive_their_segments() -> list[str]:
    """One range writes so much that segments come and go; the others say nothing. Then a node loses power."""

    async def scenario(stage: Stage) -> None:
        client = await stage.client("writer")
        await stage.put(client, KEYS[LOW], b"before")
        for _ in range(12):
            await stage.put(client, KEYS[HIGH], b"v" * 40_000)
            await stage.flush(*ALL)
        machine = stage.server("n2").machine
        assert machine.disk.delete_count > 0, "segments went"
        before = stage.raft("n2", LOW).status()
        stage.cluster.crash("n2")
        await stage.cluster.restart("n2")
        assert stage.server("n2").node is not None
        if stage.cluster.problems:
            return
        stage.claim(LOW in stage.host("n2").groups(), "an idle range is not served any more")
        after = stage.raft("n2", LOW).status()
        stage.claim(
            (after["term"], after["vote"]) >= (before["term"], before["vote"]),
            f"hard state went back from {before} to {after}",
        )
        await stage.compare(LOW)

    log: LogSection = structs.replace(small_logs(NodeConfig()).log, segment_bytes=64 * 1024)
    return play(scenario, config=structs.replace(NodeConfig(), log=log))


def half_a_snapshot_is_no_state() -> list[str]:
    """n3 was away for too long, and dies in the middle of n1's snapshot. n2, the next leader, has the whole log."""

    async def scenario(stage: Stage) -> None:
        client = await stage.client("writer")
        await stage.until_led_by("n1", HIGH)

        async def many() -> None:
            async with client.database.batch() as batch:
                for number in range(300):
                    batch.put(b"z-%03d" % number, b"old")

        await client.process.call(many())
        await stage.level(HIGH)
        await stage.flush("n1", "n3")
        host = stage.host("n1")
        host.limits = replace(host.limits, log_tail_bytes_max=0)
        stage.network.partition("n3", ["n1", "n2", client.name])
        for number in range(5):
            await stage.put(client, b"z-new-%d" % number, b"new")
        await asyncio.sleep(6.0)  # n1 keeps nothing for it any more
        await stage.flush("n1")
        machine = stage.server("n3").machine
        replica: Any = stage.server("n3").node.store.replicas[HIGH]  # type: ignore[union-attr]
        died: list[str] = []

        def on_io(at: Machine, point: str) -> None:
            if at is machine and point == "engine written" and replica.receiving and not died:
                rows = list(at.engine.scan(b"Lz", b"L{"))  # type: ignore[union-attr]
                if 0 < len(rows) < 300:  # some of it is in
                    died.append(point)
                    at.engine.flush()  # type: ignore[union-attr]  # as it may do by itself at any time
                    stage.cluster.crash_within("n3", power=False)

        machine.on_io.append(on_io)
        stage.network.heal()
        await stage.until(lambda: bool(died), "n3 dies while it installs a snapshot")
        stage.cluster.crash("n1")
        await stage.cluster.restart("n3")
        await stage.until(lambda: stage.leads("n2", HIGH), "n2 leads")
        await stage.cluster.restart("n1")
        if not stage.cluster.problems:
            await stage.compare(HIGH)

    return play(scenario)


class _LosesAll(random.Random):
    """Of a crash: every batch that the engine has not flushed is lost."""

    def randint(self, a: int, b: int) -> int:
        return b


def an_installed_snapshot_is_on_disk() -> list[str]:
    """n3 was away for too long, and gets n1's snapshot. As soon as it acknowledges what follows, it loses power."""

    async def scenario(stage: Stage) -> None:
        client = await stage.client("writer")
        await stage.until_led_by("n1", HIGH)
        await stage.put(client, KEYS[HIGH], b"0")
        await stage.level(*GROUPS)
        await stage.flush("n1", "n3")
        host = stage.host("n1")
        host.limits = replace(host.limits, log_tail_bytes_max=0)
        stage.network.partition("n3", ["n1", "n2", client.name])
        for number in range(1, 6):
            await stage.put(client, KEYS[HIGH], b"%d" % number)
        await asyncio.sleep(6.0)  # n1 keeps nothing for it any more
        await stage.flush("n1")
        raft = stage.raft("n3", HIGH)
        before = raft.last_index
        stage.network.heal()
        await stage.until(lambda: raft.log.start_index > before, "n3 installs a snapshot")
        await stage.level(HIGH)
        machine = stage.server("n3").machine
        machine.rng = _LosesAll(1)
        stage.cluster.crash("n3")
        await stage.cluster.restart("n3")
        if stage.cluster.problems:
            return
        stage.claim(HIGH in stage.host("n3").groups(), "n3 does not serve what it acknowledged")
        await stage.compare(HIGH)

    return play(scenario, config=structs.replace(NodeConfig(), log=_FLUSHED_BY_HAND))


def an_old_snapshot_is_refused() -> list[str]:
    """n1 sends a snapshot that nobody needs (it is late), while n2 goes on acknowledging entries."""

    async def scenario(stage: Stage) -> None:
        client = await stage.client("writer")
        await stage.until_led_by("n1", HIGH)
        await stage.put(client, KEYS[HIGH], b"0")
        await stage.level(HIGH)
        host: Any = stage.host("n1")
        stage.network.set_delay("n1", "n3", (0.2, 0.3))  # so that n2 is needed

        two: Any = stage.host("n2")
        arrive, held = two.receive_snapshot_chunk, []
        two.receive_snapshot_chunk = lambda node, chunk: held.append((node, chunk))

        def send() -> None:
            host._transfers.send(HIGH, 2, 2)
            host.wake()

        def release() -> None:
            two.receive_snapshot_chunk = arrive
            for node, chunk in held:
                arrive(node, chunk)

        stage.within("n1", send)
        await stage.until(lambda: bool(held), "a snapshot arrives")
        for number in range(1, 40):
            await stage.put(client, KEYS[HIGH], b"%d" % number)
            if number == 10:
                stage.within("n2", release)
        stage.network.set_delay("n1", "n3", None)
        if not stage.cluster.problems:
            await stage.compare(HIGH)
            stage.claim(
                await stage.get(client, KEYS[HIGH]) == b"39", "acknowledged writes are lost"
            )

    return play(scenario)


def the_oracle_remembers_its_bound() -> list[str]:
    """All nodes lose power after a flush; wall clocks come back slow. Versions go on above the old ones."""

    async def scenario(stage: Stage) -> None:
        client = await stage.client("writer")
        before = await stage.put(client, KEYS[LOW], b"before")
        await stage.level(META, LOW)
        await stage.flush(*ALL)
        for name in ALL:
            stage.cluster.crash(name)
            stage.server(name).machine.wall_jump_s = -86_400.0
        for name in ALL:
            await stage.cluster.restart(name)
        after = await stage.outcome(
            stage.put(client, KEYS[HIGH], b"after"), "a write after the restart"
        )
        stage.claim(
            isinstance(after, int) and after > before, f"version {after} was given after {before}"
        )

    return play(scenario)


def durable_is_what_stands_there_now() -> list[str]:
    """n2's disk is slow: an entry of n1 is still being written when n3, the next leader, replaces it. Then n2 loses power."""

    async def scenario(stage: Stage) -> None:
        writer = await stage.client("writer")
        await stage.until_led_by("n1", HIGH)
        await stage.put(writer, KEYS[HIGH], b"old")
        await stage.level(HIGH)
        machines = {name: stage.server(name).machine for name in ALL}
        two, three = stage.raft("n2", HIGH), stage.raft("n3", HIGH)
        place, term = two.last_index + 1, two.term
        stage.looks["n3"] = stage.looks["n1"] = lambda message: (
            message.group != HIGH
            or not (
                message.term == term or (isinstance(message, VoteRequest) and message.sender == 2)
            )
        )
        machines["n1"].call_s, machines["n2"].call_s = (2.0, 2.0), (4.0, 4.0)
        began = stage.cluster.loop.time()
        write = writer.process.spawn(writer.database.put(KEYS[HIGH], b"lost"))
        await stage.until(lambda: two.last_index == place, "n2 has the entry", 0.5)
        stage.cluster.crash("n1")
        machines["n1"].call_s, machines["n2"].call_s = QUICK_S, (10.0, 10.0)
        await stage.cluster.restart("n1")
        host = stage.host("n3")
        for _ in range(30):
            if three.is_leader:
                break
            await asyncio.sleep(0.1)
            stage.within("n3", lambda: host.campaign(HIGH))
        await stage.until(lambda: two.log.matches(place, three.term), "n2 follows n3", 1.0)
        await asyncio.sleep(began + 4.2 - stage.cluster.loop.time())  # the old write is done
        assert stage.host("n2")._lane.syncing
        machines["n2"].engine.flush()  # type: ignore[union-attr]  # as it may do by itself at any time
        stage.cluster.crash("n2")
        machines["n2"].call_s = QUICK_S
        stage.looks.clear()
        await stage.cluster.restart("n2")
        await stage.outcome(write, "the write's end")
        if not stage.cluster.problems:
            await stage.compare(HIGH)

    log: LogSection = structs.replace(small_logs(NodeConfig()).log, sync_mode="thread")
    return play(scenario, config=structs.replace(NodeConfig(), log=log))


def an_acknowledged_entry_is_on_two_disks() -> list[str]:
    """n3 hears nothing of its leader, and n2's disk is slow. n1 and n2 lose power at once; n2 comes back, n1 does not."""

    async def scenario(stage: Stage) -> None:
        writer, reader = await stage.client("writer"), await stage.client("reader")
        await stage.until_led_by("n1", HIGH)
        await stage.put(writer, KEYS[HIGH], b"old")
        await stage.level(HIGH)
        machine = stage.server("n2").machine
        stage.looks["n3"] = lambda message: message.group != HIGH or message.sender != 1
        machine.call_s = (20.0, 20.0)
        write = writer.process.spawn(writer.database.put(KEYS[HIGH], b"new"))
        await asyncio.sleep(0.2)
        acknowledged = write.done()
        stage.cluster.crash_client(writer.name)
        stage.cluster.crash("n1")
        stage.cluster.crash("n2")
        machine.call_s = QUICK_S
        stage.looks.clear()
        await stage.cluster.restart("n2")
        found = await stage.get(reader, KEYS[HIGH])
        stage.claim(not acknowledged or found == b"new", f"acknowledged, and reads {found!r}")

    log: LogSection = structs.replace(small_logs(NodeConfig()).log, sync_mode="thread")
    return play(scenario, config=structs.replace(NodeConfig(), log=log))
