"""Locking reads on real processes, over HTTP, blocking and embedded: callers of one counter take turns, a leader that is killed
costs no update, a deadlock is told, and operators see who holds what."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import kvstore
from kvstore import errors
from kvstore.adapters import http_client
from kvstore.client import Database, Transaction
from kvstore.testing.cluster import LocalCluster

ROOT = Path(__file__).resolve().parents[2]
FAST = {"KVORUM_RAFT__ELECTION_TIMEOUT": "500ms", "KVORUM_RAFT__HEARTBEAT": "100ms"}


async def add(db: Database, key: bytes) -> None:
    async def body(tx: Transaction) -> None:
        tx.put(key, b"%d" % (int(await tx.get_for_update(key) or 0) + 1))

    await db.run(body)


@pytest.mark.slow
async def test_a_counter_counts_exactly_while_its_leader_is_killed():
    with LocalCluster(3, splits=[b"g", b"n"], settings=FAST) as cluster:
        async with kvstore.connect(cluster.endpoints, timeout=20.0) as db:
            await add(db, b"kiwi")
            count = 12

            async def caller() -> None:
                for _ in range(count):
                    await add(db, b"kiwi")

            callers = [asyncio.create_task(caller()) for _ in range(8)]
            await asyncio.sleep(0.3)
            victim = cluster.leaders()[3]
            await asyncio.to_thread(cluster.kill, victim)
            await cluster.restart_async(victim)
            await asyncio.gather(*callers)
            assert await db.get(b"kiwi") == b"%d" % (8 * count + 1)


@pytest.mark.slow
async def test_a_deadlock_over_two_ranges_is_told_and_locks_are_listed():
    with LocalCluster(3, splits=[b"g", b"n"], settings=FAST) as cluster:
        async with kvstore.connect(cluster.endpoints, timeout=20.0) as db:
            await asyncio.sleep(3.0)  # leaders move to their places, and lose their locks
            one, two = db.transaction(), db.transaction()
            await one.get_for_update(b"apple")
            await two.get_for_update(b"pear", shared=True)
            table = await asyncio.to_thread(_kvctl, cluster.endpoints, "txn", "locks")
            assert "apple" in table
            assert "shared" in table
            found = json.loads(
                await asyncio.to_thread(_kvctl, cluster.endpoints, "-o", "json", "txn", "locks")
            )
            assert [base64.b64decode(each["key"]) for each in found["locks"]] == [b"apple", b"pear"]
            results = await asyncio.gather(
                one.get_for_update(b"pear"), two.get_for_update(b"apple"), return_exceptions=True
            )
            assert [type(each) for each in results].count(errors.Deadlock) == 1
            metrics = [_metrics(address) for address in cluster.addresses]
            assert sum(each["kvorum_outcomes_deadlocks_total"] for each in metrics) == 1
            assert sum(each["kvorum_transactions_locks_held"] for each in metrics) >= 1
            await one.rollback()
            await two.rollback()


def _kvctl(endpoints: str, *words: str) -> str:
    command = [sys.executable, "-m", "kvstore.cli.admin", "--endpoints", endpoints, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def _metrics(address: str) -> dict[str, float]:
    text = http_client.request(address, "GET", "/metrics").body.decode()
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


async def test_an_embedded_store_locks_too(tmp_path):
    async with kvstore.open(tmp_path) as db:
        await asyncio.gather(*[add(db, b"n") for _ in range(10)])
        assert await db.get(b"n") == b"10"
        assert db.stats()["conflicts"] == 0


def test_the_blocking_client_locks_and_other_threads_wait(tmp_path):
    with kvstore.Client.open(tmp_path) as db:
        order: list[str] = []

        def other() -> None:
            def body(tx: kvstore.BlockingTransaction) -> None:
                assert tx.get_many_for_update([b"n"]) == {b"n": b"first"}
                order.append("second")

            db.run(body)

        with db.transaction() as tx:
            assert tx.get_for_update(b"n") is None
            thread = threading.Thread(target=other)
            thread.start()
            time.sleep(0.2)
            order.append("first")
            tx.put(b"n", b"first")
        thread.join(10)
        assert order == ["first", "second"]
        with db.transaction() as tx:
            tx.get_for_update(b"n", shared=True)
            with pytest.raises(errors.LockTimeout), db.transaction() as late:
                late.get_for_update(b"n", timeout=0.1)
