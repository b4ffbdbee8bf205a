"""Claims of a node's readiness, in a whole simulated cluster: it is not ready before it can serve, stays ready while leaders
change and a minority is away, and says so when its ranges have no leaders."""

from __future__ import annotations

import asyncio

from kvstore.leadership import LEADERLESS_ELECTIONS
from tests.sim.directed import Stage, play

GRACE_S = LEADERLESS_ELECTIONS * 1.0  # of the default election timeout
LONG_S = 20.0
LOOK_S = 0.05


def readiness(stage: Stage, name: str) -> tuple[bool, str]:
    found: list[tuple[bool, str]] = []
    node = stage.server(name).node
    assert node is not None
    stage.within(name, lambda: found.append(node.ready()))
    return found[0]


async def ready(stage: Stage, *names: str) -> None:
    await stage.until(lambda: all(readiness(stage, name)[0] for name in names), "all are ready")


async def stay_ready(stage: Stage, *names: str) -> None:
    for _ in range(int(LONG_S / LOOK_S)):
        await asyncio.sleep(LOOK_S)
        for name in names:
            found, reason = readiness(stage, name)
            stage.claim(found, f"{name} stays ready: {reason}")


def test_two_of_three_nodes_stay_ready_and_one_alone_says_that_it_has_no_leaders():
    async def scenario(stage: Stage) -> None:
        await ready(stage, "n1", "n2", "n3")
        stage.crash_soon("n3")
        await stay_ready(stage, "n1", "n2")
        stage.crash_soon("n2")
        await asyncio.sleep(GRACE_S / 2)
        stage.claim(readiness(stage, "n1")[0], "a leader may be missing for a while")
        await asyncio.sleep(2 * GRACE_S)
        found, reason = readiness(stage, "n1")
        stage.claim(not found and "no leader" in reason, f"one of three is not ready: {reason}")
        await stage.cluster.restart("n2")
        await ready(stage, "n1", "n2")

    assert play(scenario) == []


def test_a_node_that_comes_back_alone_is_not_ready():
    async def scenario(stage: Stage) -> None:
        await ready(stage, "n1", "n2", "n3")
        for name in ("n1", "n2", "n3"):
            stage.crash_soon(name)
        await asyncio.sleep(1.0)
        await stage.cluster.restart("n1")
        for _ in range(int(LONG_S / LOOK_S)):
            await asyncio.sleep(LOOK_S)
            stage.claim(not readiness(stage, "n1")[0], "nobody is there to vote")
        await stage.cluster.restart("n3")
        await ready(stage, "n1", "n3")

    assert play(scenario) == []
