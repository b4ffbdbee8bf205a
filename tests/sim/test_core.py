"""Claims of the core: with a minority frozen in a fault the others go on, one that cannot is seen, and then all heals."""

from __future__ import annotations

import asyncio
import io
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import replication.leading
from kvstore.errors import DiskFull
from kvstore.sim import loop as simulated
from kvstore.sim.adapters import QUICK_S
from kvstore.sim.cluster import Server, SimCluster
from kvstore.sim.core import (
    CUT_OFF,
    DEAF,
    DISK_SHARE,
    DISKS,
    DOWN,
    FROZEN,
    FULL,
    MUTE,
    NEVER,
    PAUSED,
    SHARE,
    STALLED,
    draw_frozen,
    drawn_disk,
)
from kvstore.sim.faults import Nemesis
from kvstore.sim.scenario import Options, run
from kvstore.sim.timeline import events
from replication.messages import Message
from tools.simulation.judging import judge
from tools.simulation.totals import Totals

N1_IS_FROZEN = 4  # of four nodes, by this seed
WITHOUT_N1 = 2  # a range
SHORT = Options(seconds=2.0, clients=2, ops=8, kinds=("crash", "partition"), mean_s=0.5)


def in_a_cluster(test: Callable[[SimCluster], None], seed: str = "1", nodes: int = 3) -> None:
    async def main(_loop: simulated.SimLoop) -> None:
        test(SimCluster(seed, nodes=nodes))

    simulated.run(main, 1)


@pytest.mark.parametrize("kind", [*FROZEN, *DISKS])
def test_with_one_of_three_frozen_the_others_go_on_and_then_all_are_level(kind: str) -> None:

    sink = io.StringIO()
    result = run(4, replace(SHORT, frozen=kind), sink)
    assert result.problems == []
    assert result.frozen == kind
    told = [event for event in events(sink.getvalue().splitlines()) if event.kind == "frozen"]
    assert len(told) == 1
    assert told[0].what.startswith(f"stays so, and the others must go on: {kind} n")


@pytest.mark.parametrize("kind", FROZEN)
def test_who_is_frozen_stays_so_until_all_heal(kind: str) -> None:
    async def main(_loop: simulated.SimLoop) -> None:
        cluster = SimCluster("1")
        await cluster.start()
        old = await cluster.client("old")
        nemesis = Nemesis(cluster, random.Random(1))
        frozen = draw_frozen(cluster, kind)
        assert frozen is not None
        (name,) = frozen.names
        await nemesis.heal(frozen)
        new = await cluster.client("new")
        await asyncio.sleep(10.0)
        server = cluster.servers[name]
        assert server.running == (kind != DOWN)
        process = cluster.process(name)
        assert process is not None
        assert process.paused == (kind == PAUSED)
        others = [*(each for each in cluster.servers if each != name), old.name, new.name]
        heard, hears = (
            [cluster.network.blocked_until(*path) == 0.0 for path in paths]
            for paths in ([(name, other) for other in others], [(other, name) for other in others])
        )
        assert heard == [kind not in {CUT_OFF, MUTE}] * len(others)
        assert hears == [kind not in {CUT_OFF, DEAF}] * len(others)
        for client in (old, new):
            for key in (b"a", b"k", b"z"):
                await client.process.call(client.database.put(key, b"1"))
        frozen.end()
        await nemesis.heal()
        assert not cluster.network.blocked
        assert all(each.running for each in cluster.servers.values())
        assert not any(each.process and each.process.paused for each in cluster.servers.values())
        late = await cluster.client("late")
        assert cluster.network.blocked_until(late.name, name) == 0.0
        assert cluster.problems == []

    simulated.run(main, 1, time_limit_s=200.0)


@pytest.mark.parametrize("kind", DISKS)
def test_a_disk_that_is_frozen_stays_so_until_all_heal(kind: str) -> None:
    async def main(_loop: simulated.SimLoop) -> None:
        cluster = SimCluster("1")
        await cluster.start()
        nemesis = Nemesis(cluster, random.Random(1))
        frozen = draw_frozen(cluster, kind)
        assert frozen is not None
        (name,) = frozen.names
        server = cluster.servers[name]

        def stalls() -> bool:
            return server.machine.call_s[0] > cluster.config.raft.election_timeout_s

        def is_full() -> bool:
            full_log = server.machine.disk.capacity_bytes is not None
            return full_log or isinstance(server.machine.directory.write_error, DiskFull)

        await nemesis.heal(frozen)
        client = await cluster.client("c")
        for key in (b"a", b"k", b"z"):
            await client.process.call(client.database.put(key, b"1"))
        await asyncio.sleep(10.0)
        await cluster.restart(name)  # if it has ended
        frozen.hold()
        assert (stalls(), is_full()) == (kind == STALLED, kind == FULL)
        for other in cluster.servers.values():
            assert (other.machine.call_s == QUICK_S) == (kind != STALLED or other is not server)
            full = other.machine.disk.capacity_bytes or other.machine.directory.write_error
            assert not full or other is server
        frozen.end()
        await nemesis.heal()
        assert not stalls()
        assert not is_full()
        assert all(each.running for each in cluster.servers.values())
        await client.process.call(client.database.put(b"a", b"2"))
        assert cluster.problems == []

    simulated.run(main, 1, time_limit_s=200.0)


def test_of_a_full_disk_what_is_let_go_is_taken_at_once() -> None:
    async def main(_loop: simulated.SimLoop) -> None:
        for seed in range(1, 9):
            cluster = SimCluster(str(seed))
            await cluster.start()
            frozen = draw_frozen(cluster, FULL)
            assert frozen is not None
            frozen.begin()
            disk = cluster.servers[frozen.names[0]].machine.disk
            if disk.capacity_bytes is None:
                continue  # the engine's alone
            for segment in disk.segments():
                disk.delete(segment)
            frozen.hold()
            assert disk.capacity_bytes == disk.used_bytes == 0
            return
        raise AssertionError("no log is full")

    simulated.run(main, 1)


@pytest.mark.parametrize("kind", [DOWN, MUTE])
def test_a_core_that_cannot_go_on_is_seen_though_the_whole_cluster_can(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted bug: a leader waits for all voters, not for a majority."""

    def of_all(incoming: list[int], outgoing: list[int]) -> int:
        return min(incoming + outgoing)

    monkeypatch.setattr(replication.leading, "agreed_value", of_all)
    options = replace(SHORT, kinds=("flaky",))
    assert run(4, replace(options, frozen=NEVER)).problems == []
    result = run(4, replace(options, frozen=kind))
    assert any(
        f" {kind} nothing succeeds" in each or "is not served" in each for each in result.problems
    )


def test_a_replica_of_the_core_that_stays_behind_is_seen_though_it_catches_up_in_the_end() -> None:
    """The planted bug: while n1 is down, n4 hears nothing of a range of n2, n3 and n4, which goes on without it."""

    def plant(cluster: SimCluster, server: Server) -> None:
        assert server.node is not None
        host: Any = server.node.host
        receive = host.receive

        def hear(node: int, messages: list[Message], size_bytes: int = 0) -> None:
            if not cluster.servers["n1"].running:
                messages = [each for each in messages if each.group != WITHOUT_N1]
            if messages:
                receive(node, messages, size_bytes)

        if server.name == "n4":
            host.receive = hear

    options = replace(SHORT, kinds=("flaky",), workloads=("registers",), nodes=4, plant=plant)
    assert run(N1_IS_FROZEN, replace(options, frozen=NEVER)).problems == []
    (problem,) = run(N1_IS_FROZEN, replace(options, frozen=DOWN)).problems
    assert "with n1 down replicas do not reach one applied index" in problem


@pytest.mark.parametrize("seed", [5, 6])
def test_of_five_nodes_no_more_are_frozen_than_any_range_can_miss(seed: int) -> None:
    """A range has three replicas: two nodes of five may be its majority."""
    assert run(seed, replace(SHORT, nodes=5, frozen=DOWN)).problems == []


def test_a_third_of_the_seeds_have_a_core_and_one_node_is_frozen() -> None:
    drawn: list[str] = []
    counts: set[int] = set()

    def look(cluster: SimCluster) -> None:
        frozen = draw_frozen(cluster)
        if frozen is not None and not drawn_disk(cluster.seed):
            drawn.append(frozen.kind)
            counts.add(len(frozen.names))

    for seed in range(200):
        in_a_cluster(look, str(seed), 5)
    assert abs(len(drawn) / 200 - SHARE) < 0.1
    assert set(drawn) == set(FROZEN)
    assert counts == {1}


def test_the_disk_of_a_core_is_drawn_apart_and_no_other_seed_changes_by_it() -> None:
    disks = {seed: kind for seed in range(2_000) if (kind := drawn_disk(str(seed)))}
    assert abs(len(disks) / 2_000 - DISK_SHARE) < 0.01
    assert set(disks.values()) == set(DISKS)

    def look(cluster: SimCluster) -> None:
        rng = random.Random(f"{cluster.seed}/core")
        drawn, kind = rng.random() < SHARE, rng.choice(FROZEN)
        names = rng.sample(list(cluster.servers), rng.randint(1, 1))
        frozen = draw_frozen(cluster)
        kind = disks.get(int(cluster.seed)) or (kind if drawn else "")
        assert (kind, names if kind else []) == (
            (frozen.kind, frozen.names) if frozen else ("", [])
        )
        assert draw_frozen(cluster, NEVER) is None

    for seed in range(60):
        in_a_cluster(look, str(seed))
    assert any(seed < 60 for seed in disks)


def test_there_is_no_core_without_a_majority_of_whole_nodes() -> None:
    def damaged(cluster: SimCluster) -> None:
        assert draw_frozen(cluster, DOWN) is not None
        cluster.servers["n2"].damage.append("log_rot")
        assert draw_frozen(cluster, DOWN) is None

    def small(cluster: SimCluster) -> None:
        assert draw_frozen(cluster, DOWN) is None

    in_a_cluster(damaged)
    for nodes in (1, 2):
        in_a_cluster(small, nodes=nodes)


def test_a_core_changes_no_fault_of_its_seed_and_is_counted_beside_them() -> None:

    without, frozen = (judge(4, replace(SHORT, frozen=kind)) for kind in (NEVER, DEAF))
    assert without.result is not None
    assert frozen.result is not None
    assert without.result.happened == frozen.result.happened
    assert judge(4, replace(SHORT, frozen=DEAF, faults_kept=frozenset())).problems == []
    totals = Totals()
    for verdict in (without, frozen, frozen):
        totals.add(verdict)
    assert totals.as_json()["frozen"] == {DEAF: 2}
    assert "frozen while the others went on: deaf 2" in totals.lines()
