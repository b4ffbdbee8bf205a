"""Claims of the client's router about what waits in it: it is bounded, in calls and in bytes for one node."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.client import Database
from kvstore.errors import Throttled
from kvstore.links import OUTGOING_BYTES_MAX, Call, Channel
from kvstore.streams import Stream
from tests.unit.kvstore.fake_cluster import FakeCluster, simulate
from txn.messages import Read


async def _ready(db: Database) -> None:
    """Every node is connected and a timestamp has been seen."""
    await db.get(b"a")
    await db.get(b"z")


def test_more_calls_than_the_limit_are_refused():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        db.router.calls_max = 3
        cluster.ignore(Read, times=3)
        held = [asyncio.ensure_future(db.get(b"k%d" % number)) for number in range(3)]
        await asyncio.sleep(0.01)
        with pytest.raises(Throttled):
            await db.get(b"k")
        await asyncio.gather(*held)

    simulate(test)


def test_a_connection_that_comes_back_gets_no_more_than_it_may_wait_for():
    """What was asked during the dial, and may not wait for it now, waits elsewhere, and is sent in the end."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        router, dialled = db.router, asyncio.Event()
        dial, send, link = router._dial, Stream.send, router.links.by_node[1]
        full = True

        async def dial_slowly(address: str, node: int) -> Channel:
            await dialled.wait()
            return await dial(address, node)

        def send_later(stream: Stream, payload: bytes, lane: int = 0) -> bool:
            of_client = bool(stream.peer.node)
            return not (full and of_client) and send(stream, payload, lane)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(router, "_dial", dial_slowly)
            patch.setattr(Stream, "send", send_later)
            cluster.network.cut()
            await asyncio.sleep(0.1)
            value = bytes(1 << 20)
            puts = [asyncio.ensure_future(db.put(b"k%d" % number, value)) for number in range(80)]
            await asyncio.sleep(0.1)
            assert len(link.pending) == 80
            dialled.set()
            most = 0
            for _ in range(100):
                await asyncio.sleep(0.001)
                most = max(most, link.ready_bytes)
            assert OUTGOING_BYTES_MAX / 2 < most < OUTGOING_BYTES_MAX + 3 * len(value)
            assert router.calls == 80
            full = False
            assert len(set(await asyncio.gather(*puts))) == 80

    simulate(test)


def test_calls_that_are_held_back_leave_the_loop_to_others():
    """There are as many as their callers like, and all that they wait for is room."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        router = db.router
        placed, place = 0, router._place

        def counted(call: Call, now: float) -> None:
            nonlocal placed
            placed += 1
            place(call, now)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stream, "send", lambda *_: False)
            puts = [
                asyncio.ensure_future(db.put(b"k%d" % number, bytes(1 << 20), timeout=3.0))
                for number in range(100)
            ]
            await asyncio.sleep(1.0)
            held = [call for _, _, call in router._parked._heap if call.held_back]
            assert 50 < len(held) <= 100
            patch.setattr(router, "_place", counted)
            await asyncio.sleep(1.0)
            assert placed <= 25 * len(held)
        assert len(set(await asyncio.gather(*puts))) == 100

    simulate(test)
