"""Scenarios of leadership: what a leader of the past may still say, and which entries count."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, Final

from kvstore.config import NodeConfig, TxnSection
from kvstore.sim.adapters import DRIFT_MAX
from kvstore.sim.cluster import small_logs
from kvstore.store import META_START
from replication.messages import AppendRequest, HeartbeatResponse, Message
from tests.sim.directed import HIGH, KEYS, META, Look, NotReached, Stage, play

KEY: Final = KEYS[HIGH]  # in the range whose preferred leader is also the oracle's: n1
PATH_S: Final = 0.02
DRIFT: Final = DRIFT_MAX * 0.999
LAG_S: Final = 0.05
BOUND_S: Final = 0.5


def from_others(group: int, *senders: int) -> Look:
    """What these replicas say of this range is lost; none named: what anybody says."""
    return lambda message: message.group != group or bool(senders and message.sender not in senders)


def votes_of(group: int, sender: int) -> Look:
    """What this replica says of this range arrives, but for entries; of the others, nothing."""
    return lambda message: (
        message.group != group
        or (message.sender == sender and not isinstance(message, AppendRequest))
    )


def a_stopped_leader_reads_nothing_old(seed: int = 1) -> list[str]:
    """n1 leads and is stopped; another leader takes a write; a client asks n1, which goes on that very moment."""

    async def scenario(stage: Stage) -> None:
        network = stage.network
        near, far = await stage.client("near"), await stage.client("far")
        await stage.put(far, KEY, b"old")
        await stage.until_led_by("n1", META, HIGH)
        assert await stage.get(near, KEY) == b"old"
        network.partition(near.name, ["n2", "n3"])
        network.partition(far.name, "n1")
        stage.cluster.pause("n1")
        for server in ("n2", "n3"):  # they have given n1 up, and it does not hear of it at once
            network.partition(server, "n1", one_way=True)
        await stage.put(far, KEY, b"new")
        answer = near.process.spawn(near.database.get(KEY, timeout=10.0))
        await asyncio.sleep(0.05)
        stage.cluster.resume("n1")
        await asyncio.sleep(0.2)
        network.heal()
        value = await stage.outcome(answer, "a read by way of n1")
        stage.claim(value == b"new", f"n1 answered {value!r} from the past")

    return play(scenario, seed)


def a_slow_clock_keeps_no_lease() -> list[str]:
    """n1's clock is as slow as it may be and those of the others as fast. Its range's messages are lost from when a
    quorum has answered it; the others elect n2 as soon as they may, which takes a write. n1 is asked for that version.
    """

    async def scenario(stage: Stage) -> None:
        loop = stage.cluster.loop
        near, far = await stage.client("near", 1.0), await stage.client("far")
        await stage.put(far, KEY, b"old")
        await stage.until_led_by("n1", META, HIGH)
        assert await stage.get(near, KEY) == b"old"
        await stage.prefer("n3", META)
        stage.network.partition(near.name, "n2")
        stage.network.partition(far.name, "n1")
        for name in ("n1", "n2", "n3"):
            rate = 1.0 - DRIFT if name == "n1" else 1.0 + DRIFT
            stage.server(name).machine.drift(rate)
        cut_at: list[float] = []

        def at_n1(message: Message) -> bool:
            if message.group != HIGH:
                return True
            if isinstance(message, HeartbeatResponse) and not cut_at:
                cut_at.append(loop.time())
                stage.looks["n2"] = stage.looks["n3"] = from_others(HIGH, 1)
                return True
            return not cut_at

        stage.looks["n1"] = at_n1
        await stage.until(lambda: bool(cut_at), "a heartbeat is answered")
        until = cut_at[0] + 1.0 / (1.0 + DRIFT) + 0.001  # no vote before
        await asyncio.sleep(until - loop.time())
        host = stage.host("n2")
        stage.within("n2", lambda: host.campaign(HIGH))
        raft = stage.raft("n2", HIGH)
        await stage.until(lambda: raft.applied_index >= raft.term_start_index > 0, "n2 leads", 0.04)
        for key, leader in ((KEY, 2), (META_START, 3)):  # it has heard of them
            route = far.database.router.ranges.find(key)
            assert route is not None
            route.leader = leader
        version = await stage.put(far, KEY, b"new")
        snapshot = near.database.snapshot(version)
        value = await stage.outcome(near.process.call(snapshot.get(KEY)), "a read by way of n1")
        stage.claim(value != b"old", "n1 answered from the past")

    return play(scenario)


def a_term_uses_no_timestamps_of_another() -> list[str]:
    """n1 leads, n3 leads and takes a write, n1 leads again: its first write comes after that one."""

    async def scenario(stage: Stage) -> None:
        writer = await stage.client("writer")
        await stage.until_led_by("n1", HIGH)
        await stage.put(writer, KEY, b"1")
        await stage.prefer("n3", HIGH)
        between = await stage.put(writer, KEY, b"2")
        await stage.prefer("n1", HIGH)
        last = await stage.put(writer, KEY, b"3")
        stage.claim(last > between, f"a new leader writes at {last}, and {between} is there")
        found = await stage.get(writer, KEY)
        stage.claim(found == b"3", f"the last write was acknowledged, and reads {found!r}")

    return play(scenario)


def a_replaced_leader_closes_nothing() -> list[str]:
    """n1 hands its range to n2, and hears nothing of the range any more: it believes that it leads. n2 takes a write, and the
    oracle says to n1 what was issued since. A client asks n1 for what was there a moment ago.
    """

    async def scenario(stage: Stage) -> None:
        near, far = await stage.client("near", 2.0), await stage.client("far")
        await stage.put(far, KEY, b"old")
        await stage.until_led_by("n1", META, HIGH)
        await stage.prefer("n3", META)
        await stage.level(HIGH)
        assert await stage.get(near, KEY) == b"old"
        stage.network.partition(near.name, ["n2", "n3"])
        stage.looks["n1"] = from_others(HIGH)
        host, one, two = stage.host("n1"), stage.raft("n1", HIGH), stage.raft("n2", HIGH)
        stage.within("n1", lambda: host.transfer_leadership(HIGH, 2))
        await stage.until(lambda: two.applied_index >= two.term_start_index > 0, "n2 leads")
        await stage.put(far, KEY, b"new")
        await asyncio.sleep(BOUND_S + 0.1)
        if not one.is_leader:
            raise NotReached("n1 believes that it leads")
        read = near.database.get(KEY, max_staleness=BOUND_S)
        value = await stage.outcome(near.process.call(read), "a read of n1")
        stage.claim(value != b"old", "n1 has closed what was written since")

    return play(scenario, config=small_logs(NodeConfig(txn=TxnSection(closed_lag_s=LAG_S))))


def what_a_term_lost_is_lost() -> list[str]:
    """n1 has a write alone, and its client dies. n2 leads, and takes another write of that key; then n1 leads again."""

    async def scenario(stage: Stage) -> None:
        dying, writer = await stage.client("dying"), await stage.client("writer")
        await stage.put(writer, KEY, b"old")
        await stage.until_led_by("n1", HIGH)
        await stage.level(HIGH)
        host, one, two = stage.host("n2"), stage.raft("n1", HIGH), stage.raft("n2", HIGH)
        place = one.last_index + 1
        stage.looks["n2"] = stage.looks["n3"] = from_others(HIGH, 1)
        write = dying.process.spawn(dying.database.put(KEY, b"lost"))
        await stage.until(lambda: one.durable_index >= place, "n1 has the entry")
        assert not write.done()
        dying.process.kill()
        await asyncio.sleep(1.01)  # from here on, n3 may vote
        stage.within("n2", lambda: host.campaign(HIGH))
        await stage.until(lambda: two.applied_index >= two.term_start_index > 0, "n2 leads")
        stage.looks.clear()
        await stage.put(writer, KEY, b"new")
        await stage.prefer("n1", HIGH)
        await stage.put(writer, KEY + b"+", b"1")
        found = await stage.get(writer, KEY)
        stage.claim(found == b"new", f"the last write was acknowledged, and reads {found!r}")
        await stage.compare(HIGH)

    return play(scenario)


def a_late_append_changes_nothing() -> list[str]:
    """n2 acknowledged two appends; the first one arrives once more. Then n1, and what it has, is gone."""

    async def scenario(stage: Stage) -> None:
        writer = await stage.client("writer")
        await stage.put(writer, KEY, b"old")
        await stage.until_led_by("n1", META, HIGH)
        await stage.level(HIGH)
        stage.network.set_delay("n1", "n2", (PATH_S, PATH_S))  # both leave before one is committed
        stage.looks["n3"] = from_others(HIGH, 1)
        place = stage.raft("n1", HIGH).last_index + 1
        appends: list[Message] = []

        def at_n2(message: Message) -> bool:
            if isinstance(message, AppendRequest) and message.group == HIGH:
                if not message.entries or message.entries[0].index < place:
                    return True
                appends.append(message)
                if len(appends) == 2:
                    stage.later(PATH_S / 4, lambda: stage.deliver("n2", appends[0]))
            return True

        stage.looks["n2"] = at_n2
        first = writer.process.spawn(writer.database.put(b"z1", b"1"))
        await asyncio.sleep(PATH_S / 4)
        second = writer.process.spawn(writer.database.put(b"z2", b"2"))
        await asyncio.gather(first, second)
        stage.cluster.crash("n1")
        if len(appends) < 2:
            raise NotReached("two appends")
        stage.looks.clear()
        for key, value in ((b"z1", b"1"), (b"z2", b"2")):
            found = await stage.get(writer, key)
            stage.claim(found == value, f"{key!r} was acknowledged and reads {found!r}")

    return play(scenario)


def an_old_entry_is_not_committed_by_counting() -> list[str]:
    """Raft's figure 8: n1 has an entry alone; n3 leads one term, alone; n1 leads again, and n2 gets that entry of n1, and
    nothing of n1's new term. Then n1 dies, and n3 may lead.
    """

    async def scenario(stage: Stage) -> None:
        writer = await stage.client("writer", 30.0)
        await stage.put(writer, KEY, b"old")
        await stage.until_led_by("n1", HIGH)
        await stage.level(HIGH)
        for name in ("n1", "n2", "n3"):
            raft: Any = stage.raft(name, HIGH)
            raft.config = replace(raft.config, append_bytes_max=1)  # one entry at a time
        stage.looks["n2"] = stage.looks["n3"] = from_others(HIGH, 1)
        stage.looks["n1"] = from_others(HIGH)
        one = stage.raft("n1", HIGH)
        place = one.last_index + 1
        write = writer.process.spawn(writer.database.put(KEY, b"new"))
        await stage.until(lambda: one.durable_index == place, "n1 has the entry")
        await asyncio.sleep(1.01)  # from here on, n2 and n3 may vote
        stage.looks["n2"] = votes_of(HIGH, 3)
        stage.looks["n3"] = from_others(HIGH, 1)
        hosts = {name: stage.host(name) for name in ("n1", "n3")}
        stage.within("n3", lambda: hosts["n3"].campaign(HIGH))
        three = stage.raft("n3", HIGH)
        await stage.until(
            lambda: three.is_leader and three.durable_index == place, "n3 leads alone"
        )
        two = stage.raft("n2", HIGH)

        def of_n1(message: Message) -> bool:
            """n1's old entry, and not the next."""
            if message.group != HIGH:
                return True
            late = isinstance(message, AppendRequest) and message.previous_index >= place
            return message.sender == 1 and not (late and two.last_index >= place)

        stage.looks["n2"] = of_n1
        stage.looks["n3"] = from_others(HIGH)
        stage.looks["n1"] = from_others(HIGH, 3)
        await asyncio.sleep(1.2)
        for _ in range(20):
            if one.is_leader and two.last_index >= place:
                break
            stage.within("n1", lambda: hosts["n1"].campaign(HIGH))
            await asyncio.sleep(0.2)
        else:
            raise NotReached("n1 leads again")
        assert two.log.term(place) == one.log.term(place) != one.term
        await asyncio.sleep(0.05)
        acknowledged = write.done() and write.exception() is None
        stage.cluster.crash("n1")
        stage.looks.clear()
        stage.looks["n2"] = from_others(HIGH, 1)
        await asyncio.sleep(1.2)
        stage.within("n3", lambda: hosts["n3"].campaign(HIGH))
        await stage.until(lambda: stage.leads("n3", HIGH), "n3 leads")
        stage.looks.clear()
        found = await stage.get(writer, KEY)
        stage.claim(not acknowledged or found == b"new", f"acknowledged, and then {found!r}")
        await stage.cluster.restart("n1")
        if not stage.cluster.problems:
            await stage.compare(HIGH)

    return play(scenario)
