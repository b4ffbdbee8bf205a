"""Claims on real processes: replicas answer stale reads while their leaders are dead, within the bound and not beyond it; what
they answer is one version."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

import kvstore
from kvstore.client import Database
from kvstore.errors import DeadlineExceeded, Unavailable
from kvstore.testing.cluster import LocalCluster

pytestmark = pytest.mark.slow

KEYS = [b"a", b"m", b"z"]


async def until_closed(db: Database, version: int) -> None:
    """Replicas know this version: stale reads are served without a leader from here on."""
    until = time.monotonic() + 30
    while True:
        before = db.stats()["replicas_behind"]
        snapshot = db.snapshot(max_staleness=60.0)
        await snapshot.get_many(KEYS)
        behind = db.stats()["replicas_behind"] > before
        if not behind and await snapshot.version() >= version:
            return
        assert time.monotonic() < until, "replicas stay behind"
        await asyncio.sleep(0.1)


def test_what_is_left_of_a_cluster_answers_within_the_bound_and_refuses_beyond_it():
    async def scenario() -> None:
        with LocalCluster(3, splits=[b"g", b"n"]) as cluster:
            async with kvstore.connect(cluster.endpoints, timeout=10.0) as db:
                async with db.batch() as batch:
                    for key in KEYS:
                        batch.put(key, b"known")
                version: Any = batch.version
                await until_closed(db, version)
                cluster.kill(1)
                cluster.kill(2)
                snapshot = db.snapshot(max_staleness=60.0)
                assert await snapshot.get_many(KEYS) == dict.fromkeys(KEYS, b"known")
                assert await snapshot.version() >= version
                assert dict(await db.scan(max_staleness=60.0).to_list()) == dict.fromkeys(
                    KEYS, b"known"
                )
                assert await db.snapshot(version).get(b"a") == b"known"
                await asyncio.sleep(2.0)
                with pytest.raises((Unavailable, DeadlineExceeded)):
                    await db.get(b"a", max_staleness=1.0, timeout=3.0)

    asyncio.run(scenario())


def test_the_blocking_client_has_them_too(tmp_path: Any):
    with kvstore.Client.open(str(tmp_path / "data")) as db:
        version = db.put(b"k", b"v")
        until = time.monotonic() + 30
        while db.get(b"k", max_staleness=2.0) != b"v":
            assert time.monotonic() < until
            time.sleep(0.1)
        with db.snapshot(max_staleness=60.0) as snapshot:
            assert snapshot.get_many([b"k"]) == {b"k": b"v"}
            assert snapshot.version() >= version
        assert db.scan(max_staleness=2.0).to_list() == [(b"k", b"v")]
        entry = db.get_entry(b"k", max_staleness=2.0)
        assert entry is not None
        assert entry.version == version
