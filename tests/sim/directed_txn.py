"""Scenarios of transactions over several ranges: what is promised to whom, and who remembers it."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from msgspec import structs

from kvstore.config import NodeConfig, TxnSection
from kvstore.errors import Conflict, KVError
from kvstore.sim.cluster import Client, small_logs
from tests.sim.directed import HIGH, KEYS, LOW, MIDDLE, NotReached, Stage, play
from txn.messages import Finalize, Resolve

A: Final = KEYS[LOW]
K: Final = KEYS[MIDDLE]
Z: Final = KEYS[HIGH]
LEADERS: Final = {LOW: "n2", MIDDLE: "n3", HIGH: "n1"}
SLOW_S: Final = (0.05, 0.05)
SOON_S: Final = 15.0


async def begin(stage: Stage, *names: str) -> list[Client]:
    """Every range is led where it should be, and holds a row; clients who have seen that."""
    for group, name in LEADERS.items():
        await stage.until_led_by(name, group)
    clients = [await stage.client(name) for name in names]
    for key in (A, K, Z):
        await stage.put(clients[0], key, b"old")
    for client in clients:
        await client.process.call(client.database.get_many([A, K, Z]))
    return clients


def undecided(stage: Stage, group: int) -> int:
    store: Any = stage.server(LEADERS[group]).node.store  # type: ignore[union-attr]
    return len(store.replicas[group].state.parts)


def patient() -> NodeConfig:
    """The anchor's timer is quick, and no participant ever asks by itself."""
    config = small_logs(NodeConfig())
    txn: TxnSection = structs.replace(config.txn, anchor_timer_s=0.3, orphan_timer_s=500.0)
    return structs.replace(config, txn=txn)


def a_decision_reaches_everybody() -> list[str]:
    """The client dies when it has its answer. What the anchor tells the other range is lost; then its leader dies, too."""

    async def scenario(stage: Stage) -> None:
        (client,) = await begin(stage, "client")
        stage.requests["n2"] = lambda request: not isinstance(request, Finalize)
        stage.requests["n1"] = lambda request: not isinstance(request, Resolve)

        async def both() -> None:
            async with client.database.transaction() as tx:
                tx.put(A, b"new")
                tx.put(Z, b"new")

        await client.process.call(both())
        stage.cluster.crash_client(client.name)
        await asyncio.sleep(1.0)
        if not undecided(stage, HIGH) or undecided(stage, LOW):
            raise NotReached("only the anchor knows")
        stage.cluster.crash("n2")
        stage.requests.clear()
        await stage.cluster.restart("n2")
        await asyncio.sleep(SOON_S)
        stage.claim(not undecided(stage, HIGH), "a range never learned the decision")

    return play(scenario, config=patient())


async def _read_and_write(client: Client, read: bytes, written: bytes, value: bytes) -> None:
    async with client.database.transaction() as tx:
        await tx.get(read)
        tx.put(written, value)
        tx.put(read + b"/mark", value)  # so that its range takes part, and holds what was read


def a_hint_is_remembered_for_recovery() -> list[str]:
    """The range that is not the anchor's hears of the commit first; the anchor never does, and has to ask."""

    async def scenario(stage: Stage) -> None:
        (client,) = await begin(stage, "client")
        stage.requests["n2"] = lambda request: not isinstance(request, Finalize)
        await client.process.call(_read_and_write(client, Z, A, b"new"))
        await asyncio.sleep(3.0)
        found = await stage.get(client, A)
        stage.claim(found == b"new", f"a commit was acknowledged, and reads {found!r}")

    return play(scenario)


def a_hint_is_remembered_for_readers() -> list[str]:
    """The same, and somebody reads before the anchor's timer is due."""

    async def scenario(stage: Stage) -> None:
        client, reader = await begin(stage, "client", "reader")
        stage.requests["n2"] = lambda request: not isinstance(request, Finalize)
        await client.process.call(_read_and_write(client, Z, A, b"new"))
        await stage.until(lambda: not undecided(stage, HIGH), "the hint has arrived", 0.5)
        if not undecided(stage, LOW):
            raise NotReached("the anchor does not know")
        found = await stage.get(reader, A)
        stage.claim(found == b"new", f"a commit was acknowledged, and reads {found!r}")

    return play(scenario)


async def _outcomes(*work: asyncio.Task[None]) -> list[BaseException | None]:
    found = await asyncio.gather(*work, return_exceptions=True)
    for each in found:
        if each is not None and not isinstance(each, KVError):
            raise each
    return found


def what_was_read_stays(*, logged: bool = True) -> list[str]:
    """Each of two reads what the other one writes; each reaches first the range that it reads in.

    Args: logged: what was read is guarded in the log, since something is written there, too.
    """

    async def scenario(stage: Stage) -> None:
        one, two = await begin(stage, "one", "two")
        ready = asyncio.Barrier(2)

        async def skewed(client: Client, read: bytes, written: bytes) -> None:
            async with client.database.transaction() as tx:
                await tx.get(read)
                tx.put(written, b"new")
                if logged:
                    tx.put(read + b"/" + client.name.encode(), b"new")
                await ready.wait()
                slow = LEADERS[LOW] if written == A else LEADERS[MIDDLE]
                stage.network.set_delay(client.name, slow, SLOW_S)

        first = one.process.spawn(skewed(one, K, A))
        second = two.process.spawn(skewed(two, A, K))
        found = await _outcomes(first, second)
        stage.claim(found != [None, None], "each of two did not see the other, and both committed")
        stage.claim(all(isinstance(each, Conflict | None) for each in found), str(found))

    return play(scenario)


def nothing_appears_where_nothing_was() -> list[str]:
    """Each of two finds a span empty and writes into it."""

    async def scenario(stage: Stage) -> None:
        one, two = await begin(stage, "one", "two")
        ready = asyncio.Barrier(2)

        async def booked(client: Client) -> None:
            async with client.database.transaction() as tx:
                assert await tx.scan(b"k-day/", b"k-day0").to_list() == []
                tx.put(b"k-day/" + client.name.encode(), b"mine")
                await ready.wait()

        found = await _outcomes(one.process.spawn(booked(one)), two.process.spawn(booked(two)))
        stage.claim(found != [None, None], "two found a span empty, and both wrote into it")

    return play(scenario)
