"""Claims of the client under random faults from a seed: whatever is lost, refused, split or cut, no transfer happens twice
or in part, what was acknowledged is there, and no call outlives its deadline."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from kvstore.client import Database
from kvstore.errors import KVError
from kvstore.transactions import Transaction
from tests.unit.kvstore.fake_cluster import FakeCluster, simulate
from txn.messages import Failure, GetDirectory, GetTimestamps, RangeInfo, Reply
from txn.types import Write, WriteKind

ACCOUNTS = [b"%c/account" % letter for letter in b"adgjmpsvy"]
OPENING = 100
TIMEOUT_S = 3.0
CODES = ["not_leader", "unavailable", "throttled", "epoch_mismatch", "no_quorum"]


class Trouble:
    """Meets requests with faults, and changes ranges, leaders and connections, by a seed."""

    def __init__(self, cluster: FakeCluster, rng: random.Random) -> None:
        self.cluster = cluster
        self.rng = rng
        self.on = True
        self._handle = cluster.handle
        cluster.handle = self.handle  # type: ignore[method-assign]

    def handle(self, node: int, request: Any) -> Reply:
        draw = self.rng.random()
        if not self.on or draw > 0.12:
            return self._handle(node, request)
        if draw > 0.04 and not isinstance(request, GetDirectory | GetTimestamps):
            return Failure(request.id, self.rng.choice(CODES))
        if draw > 0.02:
            self._handle(node, request)
        return Failure(-1, "lost")  # an answer for nobody

    async def run(self) -> None:
        version = 1
        while self.on:
            await asyncio.sleep(self.rng.uniform(0.05, 0.4))
            kind = self.rng.randrange(3)
            cluster, rng = self.cluster, self.rng
            if kind == 0:
                version += 1
                cluster.set_ranges(
                    *sorted(rng.sample([b"c", b"i", b"o", b"u"], rng.randint(0, 4))),
                    version=version,
                )
            elif kind == 1:
                at = rng.randrange(len(cluster.ranges))
                old = cluster.ranges[at]
                cluster.ranges[at] = RangeInfo(
                    old.range_id,
                    old.start,
                    old.end,
                    old.version,
                    old.conf_ver,
                    old.replicas,
                    rng.choice([1, 2, 3]),
                )
            else:
                cluster.network.cut()


@pytest.mark.parametrize("seed", range(6))
def test_money_is_neither_made_nor_lost_and_every_acknowledged_transfer_happened_once(seed: int):
    rng = random.Random(seed)
    acknowledged: dict[bytes, bool] = {}  # transfer -> known to have happened (False: unknown)

    def transfer(source: bytes, target: bytes, name: bytes) -> Any:
        async def fn(tx: Transaction) -> None:
            found = await tx.get_many([source, target])
            tx.put(source, b"%d" % (int(found[source]) - 1))
            if rng.random() < 0.5:
                tx.put(target, b"%d" % (int(found[target]) + 1))
            else:
                tx.increment(target)
            tx.increment(b"log/" + name)

        return fn

    async def teller(db: Database, number: int, trouble: Trouble) -> None:
        loop = asyncio.get_running_loop()
        for round_ in range(25):
            name = b"%d-%d" % (number, round_)
            source, target = rng.sample(ACCOUNTS, 2)
            began = loop.time()
            try:
                if rng.random() < 0.2:
                    await db.increment(b"log/" + name, timeout=TIMEOUT_S)
                else:
                    await db.run(transfer(source, target, name), timeout=TIMEOUT_S)
                acknowledged[name] = True
            except KVError as error:
                if error.maybe_committed:
                    acknowledged[name] = False
            assert loop.time() <= began + TIMEOUT_S + 0.1

    async def reader(db: Database, trouble: Trouble) -> None:
        while trouble.on:
            try:
                found = await db.get_many(ACCOUNTS)
                assert sum(map(int, found.values())) == OPENING * len(ACCOUNTS)
                rows = [value async for key, value in db.scan() if key in ACCOUNTS]
                assert sum(map(int, rows)) == OPENING * len(ACCOUNTS)
            except KVError:
                pass
            await asyncio.sleep(0.3)

    async def test(cluster: FakeCluster, db: Database) -> None:
        async with db.batch() as batch:
            for account in ACCOUNTS:
                batch.put(account, b"%d" % OPENING)
        await cluster.settled()
        trouble = Trouble(cluster, rng)
        background = [
            asyncio.ensure_future(trouble.run()),
            asyncio.ensure_future(reader(db, trouble)),
        ]
        await asyncio.gather(*(teller(db, number, trouble) for number in range(6)))
        trouble.on = False
        await asyncio.gather(*background)
        await asyncio.sleep(10.0)  # what was abandoned is recovered
        found = await db.get_many(ACCOUNTS)
        assert sum(map(int, found.values())) == OPENING * len(ACCOUNTS)
        log = dict(await db.scan(prefix=b"log/").to_list())
        assert set(log.values()) == {b"1"}, "nothing happened twice"
        happened = {key[4:] for key in log}
        assert (
            {name for name, known in acknowledged.items() if known} <= happened <= set(acknowledged)
        )
        assert sum(acknowledged.values()) > 75

    simulate(test, FakeCluster(b"i", b"o"), timeout_s=TIMEOUT_S)


def test_the_fake_applies_a_double_write_if_asked_to():
    """The checker above can fail: the fake itself does not hide a second application."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        await db.increment(b"log/x")
        cluster.ts += 1
        cluster._apply([Write(WriteKind.ADD_ASCII, b"log/x", b"1")], b"again", cluster.ts)
        assert await db.get(b"log/x") == b"2"

    simulate(test)
