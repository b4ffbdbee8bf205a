"""Claims about leaders that were stopped for a while: what they then say is not from the past.

The same scenario with the confirmation left out must show it, else the scenario would prove nothing.
"""

from __future__ import annotations

import asyncio

import pytest

from kvstore.sim import loop as simulated
from kvstore.sim.cluster import SimCluster
from tests.sim.plants import planted

KEY = b"z"  # in the range whose preferred leader is also the oracle's: n1
META, RANGE = 1, 4


async def until_led_by(cluster: SimCluster, *names: str) -> None:
    for _ in range(200):
        leaders = [cluster.leader_of(group) for group in (META, RANGE)]
        if all(leader is not None and leader.name in names for leader in leaders):
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"not led by {names}")


def read_of_a_resumed_leader(seed: int) -> bytes | None:
    """n1 leads and is stopped; another leader takes a write; a client asks n1, which goes on that very moment."""

    async def main(_loop: simulated.SimLoop) -> bytes | None:
        cluster = SimCluster(str(seed))
        await cluster.start()
        near, far = await cluster.client("near"), await cluster.client("far")
        await far.process.call(far.database.put(KEY, b"old"))
        await until_led_by(cluster, "n1")
        assert await near.process.call(near.database.get(KEY)) == b"old"
        cluster.network.partition(near.name, ["n2", "n3"])
        cluster.network.partition(far.name, "n1")
        cluster.pause("n1")
        for server in ("n2", "n3"):  # they have given n1 up, and it does not hear of it at once
            cluster.network.partition(server, "n1", one_way=True)
        await far.process.call(far.database.put(KEY, b"new", timeout=20.0))
        answer = near.process.spawn(near.database.get(KEY, timeout=10.0))
        await asyncio.sleep(0.05)
        cluster.resume("n1")
        await asyncio.sleep(0.2)
        cluster.network.heal()
        value = await asyncio.wait_for(answer, 20.0)
        assert cluster.problems == []
        return value

    return simulated.run(main, seed, time_limit_s=200.0)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_resumed_leader_serves_no_read_of_the_past(seed: int) -> None:
    assert read_of_a_resumed_leader(seed) == b"new"


@pytest.mark.parametrize("name", ["oracle not confirmed", "lease too long"])
def test_without_confirmation_it_does(name: str) -> None:
    with planted(name):
        assert read_of_a_resumed_leader(1) == b"old"
