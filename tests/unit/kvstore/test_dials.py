"""Claims: a dial that fails as nobody foresaw is told loudly and repeated as any other, by nodes and by clients."""

from __future__ import annotations

import asyncio
import logging
import random

import pytest

from kvstore.adapters.system import SystemClock
from kvstore.client import Database
from kvstore.errors import PipeClosed
from kvstore.link import Hello, LinkLimits
from kvstore.sim import loop as sim
from kvstore.streams import PeerLink, Stream
from tests.unit.kvstore.fake_cluster import FakeCluster, simulate

UNFORESEEN = RuntimeError("can't start new thread")  # so says the resolver of names, at times


class BadNetwork:
    """Every second dial fails as nobody foresaw, the others as they do."""

    def __init__(self):
        self.dials = 0

    async def dial(self, address, path, timeout_s):
        self.dials += 1
        raise UNFORESEEN if self.dials % 2 else PipeClosed("nobody is there")


def errors(caplog) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.ERROR]


async def test_a_client_dials_for_as_long_as_a_handshake_may_take_but_not_beyond_its_timeout():
    given: list[float] = []

    class Network:
        async def dial(self, address, path, timeout_s):
            given.append(timeout_s)
            raise PipeClosed("nobody is there")

    for limits, timeout_s in ((None, 5.0), (LinkLimits(handshake_timeout_s=0.5), 5.0), (None, 1.0)):
        client = Database(
            Network(),  # type: ignore[arg-type]
            ["far:1"],
            SystemClock(),
            random.Random(1),
            timeout_s,
            link_limits=limits,
        )
        with pytest.raises(PipeClosed):
            await client._dial("far:1", 0)
    assert given == [3.0, 0.5, 1.0]


def test_a_link_goes_on_dialling_whatever_a_dial_ended_in(caplog):
    async def main(_loop: sim.SimLoop) -> None:
        network = BadNetwork()
        link = PeerLink(
            network,  # type: ignore[arg-type]
            "far:1",
            "/v1/peer",
            Hello,
            rng=random.Random(1),
            on_message=print,
        )
        link.start()
        await asyncio.sleep(60.0)
        assert 30 <= network.dials <= 80
        assert link.last_error is not None
        assert errors(caplog) == ["link failed unexpectedly"] * -(-network.dials // 2)
        await link.close()

    sim.run(main, 1, time_limit_s=100.0)


def test_a_link_goes_on_when_what_it_tells_raises(caplog):
    """Whoever is told that the link is up may have a fault; the next stream is another chance."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        ups: list[Stream] = []

        def up(stream: Stream) -> None:
            ups.append(stream)
            if len(ups) == 1:
                raise UNFORESEEN

        link = PeerLink(
            cluster.network,
            "n1:1",
            "/v1/stream",
            lambda: Hello(kind="client"),
            rng=random.Random(1),
            on_message=print,
            on_up=up,
        )
        link.start()
        await asyncio.sleep(5.0)
        assert len(ups) == 2
        assert link.up
        assert errors(caplog) == ["link failed unexpectedly"]
        await link.close()

    simulate(test)


def test_a_client_goes_on_dialling_whatever_a_dial_ended_in(caplog):
    async def test(cluster: FakeCluster, db: Database) -> None:
        await db.get(b"a")
        dial = cluster.network.dial
        failures = [UNFORESEEN] * 20

        async def failing(address, path, timeout_s):
            if failures:
                raise failures.pop()
            return await dial(address, path, timeout_s)

        cluster.network.dial = failing  # type: ignore[method-assign]
        cluster.network.cut()
        assert await db.get(b"a") is None
        assert not failures
        assert errors(caplog) == ["dial failed unexpectedly"] * 20

    simulate(test)
