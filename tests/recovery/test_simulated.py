"""The recovery table (txn/DESIGN.md section 6) in the simulator: each crash in each phase of a commit over two ranges.

Claims: the transaction has happened in both ranges or in none; its outcome is one, whoever asks and how often; what the client
was told is that; what all ranges had prepared is committed; and within the timers nothing is undecided.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import pytest

from kvstore.errors import KVError
from kvstore.transactions import Aborted, Committed
from tests.recovery.phases import (
    COMMITTED_FOR_SURE,
    NEW,
    OLD,
    TABLE,
    Crash,
    Held,
    Phase,
    must_be_aborted,
)
from tests.sim.directed import HIGH, KEYS, LOW, META, MIDDLE, Stage, play
from tests.stateful.txn_plants import planted

ANCHOR: Final = KEYS[LOW]
PARTICIPANT: Final = KEYS[MIDDLE]
LEADERS: Final = {META: "n1", LOW: "n2", MIDDLE: "n3", HIGH: "n1"}
VICTIMS: Final = {
    Crash.ANCHOR: ["n2"],
    Crash.PARTICIPANT: ["n3"],
    Crash.ORACLE: ["n1"],
    Crash.CLUSTER: ["n1", "n2", "n3"],
}
DOWN_S: Final = 1.5  # longer than an election
DECIDED_S: Final = 15.0  # elections and both timers


def undecided(stage: Stage) -> int:
    """Parts, records and outbox rows, on all nodes."""
    count = 0
    for server in stage.cluster.running():
        store: Any = server.node.store if server.node is not None else None
        for replica in store.replicas.values() if store is not None else ():
            state = replica.state
            count += len(state.parts) + len(state.staged) + len(state.outbox)
    return count


async def scenario(stage: Stage, crash: Crash, phase: Phase) -> None:
    for group, name in LEADERS.items():
        await stage.until_led_by(name, group)
    victim, witness = await stage.client("victim"), await stage.client("witness")
    for key in (ANCHOR, PARTICIPANT):
        await stage.put(witness, key, OLD)
    await victim.process.call(victim.database.get_many([ANCHOR, PARTICIPANT]))
    held = Held(victim.database, phase, ANCHOR, PARTICIPANT)
    told = victim.process.spawn(held.commit())
    await stage.until(held.reached.is_set, phase.value)
    if crash is Crash.CLIENT:
        stage.cluster.crash_client(victim.name)
    else:
        for name in VICTIMS[crash]:
            stage.cluster.crash(name)
        await asyncio.sleep(DOWN_S)
        for name in VICTIMS[crash]:
            await stage.cluster.restart(name)
        stage.within_client(victim, held.release)
    await asyncio.sleep(DECIDED_S)
    stage.claim(not undecided(stage), f"{undecided(stage)} rows are undecided after {DECIDED_S} s")
    await check(stage, crash, phase, held, witness.process, witness.database)
    if crash is not Crash.CLIENT:
        await check_told(stage, held, told, witness)


async def check(
    stage: Stage, crash: Crash, phase: Phase, held: Held, process: Any, database: Any
) -> None:
    outcome = await process.call(database.outcome(held.token))
    stage.claim(await process.call(database.outcome(held.token)) == outcome, "two outcomes")
    found = await process.call(database.get_many([ANCHOR, PARTICIPANT]))
    value = NEW if isinstance(outcome, Committed) else OLD
    stage.claim(found == {ANCHOR: value, PARTICIPANT: value}, f"{outcome}, and it reads {found}")
    if isinstance(outcome, Committed):
        entry = await process.call(database.get_entry(PARTICIPANT))
        stage.claim(entry.version == outcome.version, f"{outcome}, and it reads {entry}")
    if phase in COMMITTED_FOR_SURE:
        stage.claim(isinstance(outcome, Committed), f"all were prepared, and it is {outcome}")
    if must_be_aborted(crash, phase):
        stage.claim(
            isinstance(outcome, Aborted), f"a part is missing for ever, and it is {outcome}"
        )


async def check_told(stage: Stage, held: Held, told: asyncio.Task[Any], witness: Any) -> None:
    outcome = await witness.process.call(witness.database.outcome(held.token))
    try:
        version = await asyncio.wait_for(told, 30.0)
    except KVError as error:
        definite = not error.maybe_committed
        stage.claim(not definite or isinstance(outcome, Aborted), f"told {error!r}, is {outcome}")
    else:
        stage.claim(outcome == Committed(version), f"told {version}, is {outcome}")


@pytest.mark.parametrize(
    ("crash", "phase"), TABLE, ids=[f"{crash.name}-{phase.name}".lower() for crash, phase in TABLE]
)
def test_recovery(crash: Crash, phase: Phase) -> None:
    assert play(lambda stage: scenario(stage, crash, phase)) == []


def test_the_table_is_whole() -> None:
    assert len(TABLE) == 20


@pytest.mark.parametrize(
    ("plant", "crash", "phase"),
    [
        ("abort_without_fence", Crash.CLIENT, Phase.ALL_PREPARED),
        ("volatile_fence", Crash.CLIENT, Phase.AFTER_STAGED),
        ("resolved_part_forgotten", Crash.CLUSTER, Phase.ACK_LOST),
    ],
)
def test_it_would_be_seen(plant: str, crash: Crash, phase: Phase) -> None:
    with planted(plant):
        assert play(lambda stage: scenario(stage, crash, phase)) != []
