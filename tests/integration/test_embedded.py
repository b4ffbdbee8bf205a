"""Claims: a store in one's own process has the whole API, keeps what it acknowledged across close and reopen at once, refuses
a second user of its directory, and refuses a directory that is not its own, with nothing changed."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import random
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

import kvstore
from kvstore import errors
from kvstore.adapters.wal_files import DirectoryLogFiles
from kvstore.bootstrap import mint_cluster_id, plan
from kvstore.client import Database
from kvstore.config import NodeConfig
from kvstore.embedded import ADDRESS, EmbeddedAdapters
from kvstore.identity import FILE_NAME
from kvstore.metrics import NodeMetrics
from kvstore.node import Node
from replication.errors import LogDiskFull, LogWriteFailed


async def test_what_was_written_is_there_after_reopening(tmp_path):
    async with kvstore.open(tmp_path) as db:
        version = await db.put(b"k", b"1")
        entry = await db.get_entry(b"k")
        assert entry is not None
        assert (entry.value, entry.version) == (b"1", version)
        assert await db.increment(b"n", 5) == 5
    async with kvstore.open(tmp_path) as db:
        assert await db.get(b"k") == b"1"
        assert await db.increment(b"n") == 6
        assert await db.put(b"k", b"2") > version


async def test_transactions_scans_and_conditions_work(tmp_path):
    async with kvstore.open(tmp_path) as db:
        async with db.transaction() as tx:
            tx.put(b"a", b"1")
            tx.put(b"b", b"2")
            assert await tx.get(b"a") == b"1"
        assert await db.scan().to_list() == [(b"a", b"1"), (b"b", b"2")]
        assert await db.scan(reverse=True, limit=1).to_list() == [(b"b", b"2")]
        assert await db.cas(b"a", b"1", b"3")
        assert not await db.cas(b"a", b"1", b"4")
        with pytest.raises(errors.CompareFailed):
            await db.put(b"a", b"5", if_absent=True)
        await db.delete_range(b"a", b"b")
        assert await db.scan(keys_only=True).to_list() == [(b"b", b"")]


async def test_a_span_that_one_transaction_may_not_delete_is_cleared_in_pages_that_it_may(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("txn.values.MOVED_BYTES_MAX", 64 << 10)
    monkeypatch.setattr("txn.reads.SCAN_READ_BYTES_MAX", 32 << 10)
    async with kvstore.open(tmp_path) as db:
        for first in range(0, 200, 50):
            async with db.batch() as batch:
                for number in range(first, first + 50):
                    batch.put(b"k%03d" % number, bytes(1 << 10))
        with pytest.raises(errors.TransactionTooLarge, match="write fewer keys at once"):
            await db.delete_range(b"k", b"l")
        with pytest.raises(errors.TransactionTooLarge):  # noqa: PT012 - the end of the block is what raises
            async with db.batch() as batch:
                for number in range(100):
                    batch.put(b"k%03d" % number, b"")
        assert await db.get(b"k000") == bytes(1 << 10)
        pages: list[int] = []
        monkeypatch.delattr(type(db), "delete")  # row by row is for pages that were refused
        cleared = await db.clear_range(b"k", b"l", on_progress=lambda rows, _: pages.append(rows))
        assert (cleared, pages) == (200, [*range(32, 200, 32), 200])
        assert await db.scan(keys_only=True).to_list() == []


async def test_of_two_transactions_that_read_and_write_the_same_key_one_gets_a_conflict(tmp_path):
    async with kvstore.open(tmp_path) as db:
        await db.put(b"k", b"0")
        async with db.transaction() as one:
            await one.get(b"k")
            await db.put(b"k", b"between")
            one.put(b"k", b"mine")
            with pytest.raises(errors.Conflict) as caught:
                await one.commit()
        assert caught.value.key == b"k"
        assert await db.get(b"k") == b"between"


async def test_a_snapshot_at_an_old_version_sees_what_was_there(tmp_path):
    async with kvstore.open(tmp_path) as db:
        versions = [await db.put(b"k", b"%d" % number) for number in range(5)]
        await db.delete(b"k")
        for number, version in enumerate(versions):
            assert await db.snapshot(at=version).get(b"k") == b"%d" % number
        assert await db.get(b"k") is None


async def test_a_version_that_was_not_issued_yet_is_refused(tmp_path):
    async with kvstore.open(tmp_path) as db:
        version = await db.put(b"k", b"1")
        with pytest.raises(errors.InvalidArgument):
            await db.snapshot(at=version + (1 << 40)).get(b"k")


async def test_the_directory_has_one_user_at_a_time(tmp_path):
    async with kvstore.open(tmp_path) as db:
        await db.put(b"k", b"1")
        with pytest.raises(errors.DataDirectoryError, match="in use"):
            await kvstore.open(tmp_path)
        assert await db.get(b"k") == b"1"


async def test_a_damaged_identity_is_refused_and_left_alone(tmp_path):
    async with kvstore.open(tmp_path) as db:
        await db.put(b"k", b"1")
    path = tmp_path / FILE_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:10])
    with pytest.raises(errors.DataDirectoryError, match="damaged"):
        await kvstore.open(tmp_path)
    path.write_bytes(whole)
    async with kvstore.open(tmp_path) as db:
        assert await db.get(b"k") == b"1"


async def test_too_large_is_refused_before_anything_happens(tmp_path):
    async with kvstore.open(tmp_path) as db:
        with pytest.raises(errors.KeyTooLarge):
            await db.put(b"k" * 4097, b"")
        with pytest.raises(errors.ValueTooLarge):
            await db.put(b"k", bytes((1 << 20) + 1))
        with pytest.raises(errors.InvalidArgument):
            await db.put(b"", b"")
        with pytest.raises(errors.InvalidArgument):
            await db.put(b"\xffsystem", b"")
        assert await db.scan().to_list() == []


def test_the_blocking_client_has_the_same_store(tmp_path):
    with kvstore.Client.open(tmp_path) as db:
        db.put(b"k", b"1")
        assert db.get(b"k") == b"1"
    with kvstore.Client.open(tmp_path) as db:
        assert db.get(b"k") == b"1"


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("of", ["open", "close"])
def test_an_interrupt_of_the_blocking_client_leaves_the_directory_free(
    tmp_path, monkeypatch, of: str, moment: str
):
    """Ctrl-C as `open` or `close` is waited for: before it has ended, or just behind it."""

    def result(future: concurrent.futures.Future[Any], timeout: float | None = None) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return real(future, timeout)
        if moment == "after":
            real(future, timeout)
        monkeypatch.undo()
        raise KeyboardInterrupt

    real: Callable[..., Any] = concurrent.futures.Future.result
    db = kvstore.Client.open(tmp_path)
    if of == "close":
        db.put(b"k", b"1")
    monkeypatch.setattr(concurrent.futures.Future, "result", result)
    with pytest.raises(KeyboardInterrupt):
        getattr(db, "start" if of == "open" else "close")()
    with kvstore.Client.open(tmp_path) as again:
        assert again.get(b"k") == (b"1" if of == "close" else None)


def test_the_default_configuration_is_valid():
    assert NodeConfig().raft.heartbeat_s * 2 <= NodeConfig().raft.election_timeout_s


async def test_many_large_values_are_read_in_several_answers(tmp_path):
    async with kvstore.open(tmp_path) as db:
        keys = [b"%02d" % number for number in range(12)]
        for key in keys:
            await db.put(key, key * 500_000)
        found = await db.get_many(keys)
        assert found == {key: key * 500_000 for key in keys}


async def test_more_values_at_once_than_the_queue_holds_are_read_without_losing_the_connection(
    tmp_path,
):
    """48 MiB of answers fall due in one turn, and 32 MiB of them can wait."""
    config = NodeConfig()
    node = Node(str(tmp_path), ADDRESS, "", config, EmbeddedAdapters(config))
    await node.start()
    cluster = mint_cluster_id(1_700_000_000_000, 1, [ADDRESS], [])
    await node.initialize(plan(cluster, [ADDRESS])[0])
    database = Database(node.adapters.network, [ADDRESS], node.adapters.clock, random.Random(1))
    await database.start()
    await database.put(b"k", bytes(1 << 20))
    found = await asyncio.gather(*(database.get(b"k") for _ in range(48)))
    assert found == [bytes(1 << 20)] * 48
    assert node.connections.cut_off == 0
    assert node.connections.throttled > 0
    await database.close()
    await node.stop(drain=False)


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (LogWriteFailed, errors.StorageError),
        (LogDiskFull, errors.DiskFull),
        (ValueError, errors.KVError),
    ],
)
async def test_a_store_that_failed_says_so_at_once_to_whoever_asks(
    tmp_path, monkeypatch, failure: type[Exception], told: type[errors.KVError]
):
    """Each call waited until its own time was over, and ended as if the store were only busy."""

    def sync(*_: object) -> None:
        raise failure("broken")

    async with kvstore.open(tmp_path, timeout=60.0) as db:
        await db.put(b"k", b"1")
        with monkeypatch.context() as broken:
            broken.setattr(DirectoryLogFiles, "sync", sync)
            async with asyncio.timeout(10.0):
                with pytest.raises(errors.CommitUnknown):
                    await db.put(b"k", b"2")
                with pytest.raises(told, match="the store failed"):
                    await db.get(b"k")
                with pytest.raises(told, match="the store failed"):
                    await db.put(b"k", b"3")
    async with kvstore.open(tmp_path) as db:
        assert await db.get(b"k") in (b"1", b"2")


async def test_how_often_leadership_began_is_told_with_the_metrics(tmp_path):
    config = NodeConfig()
    node = Node(str(tmp_path), ADDRESS, "", config, EmbeddedAdapters(config))
    await node.start()
    cluster = mint_cluster_id(1_700_000_000_000, 1, [ADDRESS], [])
    await node.initialize(plan(cluster, [ADDRESS])[0])
    database = Database(node.adapters.network, [ADDRESS], node.adapters.clock, random.Random(1))
    await database.start()
    await database.put(b"a", b"1")
    registry = NodeMetrics(node.status, "0").registry
    assert node.status()["raft"] == {
        "leaderships_begun_total": 3,  # of three ranges, one each
        "elections_begun_total": 3,
    }
    assert registry.get_sample_value("kvorum_raft_leaderships_begun_total") == 3
    await database.close()
    await node.stop(drain=False)


async def test_each_number_of_a_group_of_the_status_is_a_metric(tmp_path):
    """As docs/metrics.md says; what only grows is a counter."""
    config = NodeConfig()
    node = Node(str(tmp_path), ADDRESS, "", config, EmbeddedAdapters(config))
    await node.start()
    cluster = mint_cluster_id(1_700_000_000_000, 1, [ADDRESS], [])
    await node.initialize(plan(cluster, [ADDRESS])[0])
    async with asyncio.timeout(20.0):
        while node.database is None:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0)
    status = node.status()
    samples = {
        sample.name
        for family in NodeMetrics(lambda: status, "0").registry.collect()
        for sample in family.samples
    }
    for group, figures in status.items():
        for name, value in figures.items() if isinstance(figures, dict) else ():
            if isinstance(value, str) or name.startswith("fences_by_"):
                continue
            base = f"kvorum_{group}_{name}".replace(f"{group}_{group}", group)
            base = base.removesuffix("_s") + "_seconds" if base.endswith("_s") else base
            assert {base, f"{base}_total"} & samples, base
    assert {
        "kvorum_host_snapshot_bytes_sent_total",
        "kvorum_host_snapshot_bytes_received_total",
        "kvorum_connections_queue_bytes",
        "kvorum_peers_queue_bytes",
        "kvorum_requests_inbox_bytes",
        "kvorum_client_replicas_behind_total",
    } <= samples
    await node.stop(drain=False)


OPEN_TRANSACTIONS = 10_000
OPEN_BYTES_MAX = 6_000  # of memory, for one that has read two keys and written one


async def test_ten_thousand_open_transactions_take_little_memory_and_nothing_of_the_node(tmp_path):
    """Each has read; nothing is held for them anywhere but what they themselves remember, until they end."""
    async with kvstore.open(tmp_path) as db:
        async with db.batch() as batch:
            for number in range(100):
                batch.put(b"k%02d" % number, b"v" * 100)
        opened = []

        async def begin(number: int) -> None:
            tx = db.transaction()
            assert len(await tx.get_many([b"k%02d" % (number % 100), b"none"])) == 1
            tx.put(b"mine/%05d" % number, b"w" * 100)
            opened.append(tx)

        await begin(99_999)  # what is made once is made
        gc.collect()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            for start in range(0, OPEN_TRANSACTIONS, 500):
                await asyncio.gather(*(begin(number) for number in range(start, start + 500)))
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
            assert (after - before) / OPEN_TRANSACTIONS < OPEN_BYTES_MAX
            assert db.stats()["calls_in_flight"] == 0
            versions = [await tx.commit() for tx in opened[-50:]]
            assert None not in versions
            for tx in opened:
                await tx.rollback()
            opened.clear()
            gc.collect()
            ended, _ = tracemalloc.get_traced_memory()
            assert ended - before < (after - before) / 10
        finally:
            tracemalloc.stop()
        assert len(await db.scan(prefix=b"mine/").to_list()) == 50
