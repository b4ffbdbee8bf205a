"""Claims of garbage collection in a whole cluster: what is overwritten does not stay for ever, on any replica, and a version
that is kept can be read."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from kvstore.config import NodeConfig
from kvstore.errors import SnapshotTooOld
from kvstore.holds import LEASE_S
from kvstore.sim import loop as simulated
from kvstore.sim.cluster import SimCluster, small_logs
from kvstore.transactions import Transaction
from txn.types import KEPT_PREFIX

RETENTION_S = 2.0
WRITES = 60


def config() -> NodeConfig:
    given = small_logs(NodeConfig())
    return msgspec.structs.replace(
        given, txn=msgspec.structs.replace(given.txn, retention_s=RETENTION_S)
    )


def history_rows(cluster: SimCluster) -> list[int]:
    found = []
    for server in cluster.servers.values():
        assert server.node is not None
        assert server.node.engine is not None
        found.append(len(list(server.node.engine.scan(b"H", b"I"))))
    return found


def test_old_versions_go_on_every_replica_and_the_young_can_be_read():
    async def main(_loop: simulated.SimLoop) -> None:
        cluster = SimCluster("1", config=config())
        await cluster.start()
        client = await cluster.client("writer")
        database = client.database
        most: list[int] = []

        async def writes() -> None:
            await asyncio.sleep(
                LEASE_S
            )  # a new oracle lets nothing be collected before it knows what is held
            first = await database.put(b"k", b"first")
            for number in range(WRITES):
                version = await database.put(b"k", b"%d" % number)
                await database.put(b"z%d" % (number % 3), b"%d" % number)
                await asyncio.sleep(0.2)
                most[:] = [
                    max(each) for each in zip(most or [0] * 3, history_rows(cluster), strict=True)
                ]
            assert await database.snapshot(at=version).get(b"k") == b"%d" % (WRITES - 1)
            with pytest.raises(SnapshotTooOld):
                await database.snapshot(at=first).get(b"k")

        await client.process.call(writes())
        assert cluster.problems == []
        assert max(most) < WRITES  # of 120 that were overwritten
        assert min(most) > 4  # and they are kept for a while

    simulated.run(main, 1, time_limit_s=200.0)


def test_a_deleted_key_leaves_nothing():
    async def main(_loop: simulated.SimLoop) -> None:
        cluster = SimCluster("2", config=config())
        await cluster.start()
        client = await cluster.client("writer")

        async def work() -> None:
            for number in range(10):
                await client.database.put(b"k%d" % number, b"v")
            await client.database.delete_range(b"k", b"l")
            for _ in range(40):
                await asyncio.sleep(0.3)
                await client.database.put(
                    b"j", b""
                )  # in the same range: its leader learns the time

        await client.process.call(work())
        for server in cluster.servers.values():
            assert server.node is not None
            assert server.node.engine is not None
            assert list(server.node.engine.scan(b"Lk", b"Ll")) == []
        assert cluster.problems == []

    simulated.run(main, 2, time_limit_s=200.0)


def test_the_row_of_an_idempotency_key_goes_when_its_time_is_over():
    """Until then a second run returns the first result; afterwards it runs again."""
    given = config()
    txn = msgspec.structs.replace(given.txn, idempotency_retention_s=40.0)
    ran: list[int] = []

    async def main(_loop: simulated.SimLoop) -> None:
        cluster = SimCluster("3", config=msgspec.structs.replace(given, txn=txn))
        await cluster.start()
        client = await cluster.client("runner")
        database = client.database

        async def once(tx: Transaction) -> int:
            ran.append(len(ran))
            tx.put(b"k", b"%d" % len(ran))
            return len(ran)

        async def work() -> None:
            assert await database.run(once, idempotency_key=b"first") == 1
            for _ in range(8):
                await asyncio.sleep(2.0)
                assert await database.run(once, idempotency_key=b"first") == 1
            assert ran == [0]
            for number in range(50):  # the leader of the range learns the time
                await asyncio.sleep(1.0)
                await database.run(once, idempotency_key=b"other %d" % number)
            assert await database.run(once, idempotency_key=b"first") == 52

        await client.process.call(work())
        for server in cluster.servers.values():
            assert server.node is not None
            assert server.node.engine is not None
            kept = list(server.node.engine.scan(b"L" + KEPT_PREFIX, b"L\xff\x03"))
            assert (
                10 < len(kept) < 45
            )  # the oracle may be catching up with the clock, twice as fast as that
        assert cluster.problems == []

    simulated.run(main, 3, time_limit_s=200.0)
