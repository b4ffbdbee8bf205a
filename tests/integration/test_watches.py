"""Claims of watches on a cluster of real processes: the stream is the history across kill -9 of nodes and over ranges; one that
comes back later, or is slow, gets all of it from disk or `Compacted`, within bounded memory; every way in has them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import kvstore
from kvstore.adapters import http_client
from kvstore.errors import Compacted, KVError
from kvstore.testing.cluster import LocalCluster

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
FAST = {
    "KVORUM_RAFT__ELECTION_TIMEOUT": "500ms",
    "KVORUM_RAFT__HEARTBEAT": "100ms",
    "KVORUM_LIMITS__WATCH_RECENT_ROWS": "200",
}


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(3, splits=[b"g", b"n"], settings=FAST) as made:
        yield made


def as_rows(events):
    return [(event.version, event.key, event.value) for event in events]


async def eventually(claim, timeout_s=30.0):
    async with asyncio.timeout(timeout_s):
        while not claim():  # noqa: ASYNC110 - it is other processes that change it
            await asyncio.sleep(0.05)


async def collect(watch, upto):
    events = []
    async with asyncio.timeout(45):
        while watch.version < upto:
            events += await watch.pull()
    return events


async def test_the_stream_is_the_history_while_nodes_are_killed(cluster):
    written = {}  # version -> rows
    unknown: dict[
        bytes | None, dict[bytes, bytes]
    ] = {}  # value -> rows of writes that were not acknowledged

    async def write(db, worker):
        for number in range(120):
            value = b"%d/%d" % (worker, number)
            rows = {b"%c/kill/%d" % (first, worker): value for first in b"ahz"[: 1 + number % 3]}
            try:
                async with db.batch(timeout=10.0) as batch:
                    for key, each in rows.items():
                        batch.put(key, each)
                written[batch.version] = rows
            except KVError:
                unknown[value] = rows
            await asyncio.sleep(0.02)

    async def kill():
        for number in (0, 1, 2):
            await asyncio.sleep(0.8)
            await asyncio.to_thread(cluster.kill, number)
            await asyncio.sleep(0.5)
            await cluster.restart_async(number)

    async with kvstore.connect(cluster.endpoints, timeout=20.0) as db:
        watch = db.watch(prefix=b"")
        await watch.start()
        events = []

        async def follow():
            async for event in watch:
                events.append(event)  # noqa: PERF401 - it is cancelled, and keeps what it has

        follower = asyncio.create_task(follow())
        await asyncio.gather(kill(), *(write(db, worker) for worker in range(4)))
        last = await db.put(b"z/last", b"1", timeout=20.0)
        await eventually(lambda: watch.version >= last)
        follower.cancel()
        await asyncio.gather(follower, return_exceptions=True)
        await watch.close()

    told: dict[int, dict[bytes, bytes | None]] = {}
    for event in events:
        told.setdefault(event.version, {})[event.key] = event.value
    order = [(event.version, event.key) for event in events]
    assert order == sorted(dict.fromkeys(order)), "in order, none doubled"
    assert {version: told.get(version) for version in written} == written
    for version, rows in told.items():
        if version not in written and version != last:
            value = next(iter(rows.values()))
            assert unknown.pop(value) == rows


async def test_one_that_comes_back_later_gets_what_it_missed_from_disk(cluster):
    async with kvstore.connect(cluster.endpoints) as db:
        async with db.watch(prefix=b"back/") as watch:
            since = watch.version
        versions = []
        for number in range(40):
            puts = [db.put(b"back/%d" % key, b"%d" % number) for key in range(20)]
            versions += await asyncio.gather(*puts)
    async with kvstore.connect(cluster.endpoints) as db:
        async with db.watch(prefix=b"back/", since=since) as watch:
            events = await collect(watch, max(versions))
        assert [event.version for event in events] == sorted(versions)
        half = events[len(events) // 2].version
        async with db.watch(prefix=b"back/", since=half) as watch:
            assert as_rows(await collect(watch, max(versions))) == as_rows(
                event for event in events if event.version > half
            )
        async with db.watch(key=b"back/7", since=since) as watch:
            assert as_rows(await collect(watch, max(v.version for v in events if v.key == b"back/7"))) == as_rows(
                event for event in events if event.key == b"back/7"
            )  # fmt: skip


async def test_a_slow_consumer_holds_pages_and_misses_nothing(cluster):
    value = bytes(1_000)
    async with kvstore.connect(cluster.endpoints) as db, db.watch(prefix=b"slow/") as watch:
        first = asyncio.create_task(anext(watch))
        versions = [await db.put(b"slow/first", value)]
        assert (await first).version == versions[0]
        most = 0
        for _ in range(60):
            puts = [db.put(b"slow/%d" % (key % 50), value) for key in range(100)]
            versions += await asyncio.gather(*puts)
            most = max(most, sum(len(leg.events) for leg in watch._legs))
        assert most <= 1_000
        rest = await collect(watch, max(versions))
        assert [event.version for event in rest] == sorted(versions[1:])


async def test_a_thousand_waiting_watches_leave_nothing_behind(cluster):
    def waiting():
        return sum(cluster.status(number)["watches"]["waiting"] for number in range(3))

    async with kvstore.connect(cluster.endpoints) as db:
        watches = [db.watch(key=b"many/%d" % number) for number in range(1_000)]
        tasks = [asyncio.create_task(watch.pull()) for watch in watches]
        await eventually(lambda: waiting() >= 1_000)
        version = await db.put(b"many/500", b"v")
        assert as_rows(await tasks[500]) == [(version, b"many/500", b"v")]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for watch in watches:
            await watch.close()
        await eventually(lambda: waiting() == 0, 5.0)


def test_the_blocking_client_has_them(cluster):
    with kvstore.Client(cluster.endpoints) as db, db.watch(prefix=b"sync/") as watch:
        versions: list[int] = []

        def write():
            with kvstore.Client(cluster.endpoints) as other:
                versions.extend(other.put(b"sync/%d" % number, b"v") for number in range(5))

        writer = threading.Thread(target=write)
        writer.start()
        events = [next(watch) for _ in range(5)]
        writer.join()
        assert [event.version for event in events] == versions
        assert watch.version == versions[-1]
        db.delete(b"sync/0")
        assert [event.type for event in watch.pull()] == [kvstore.EventType.DELETE]


async def test_http_polls_go_on_from_each_others_version(cluster):
    async def ask(node, query):
        path = f"/v1/watch?{query}"
        return await asyncio.to_thread(
            http_client.request, cluster.addresses[node], "GET", path, timeout_s=20
        )

    none = json.loads((await ask(0, "prefix=http%2F&wait=50ms")).body)
    assert none["events"] == []
    asked = asyncio.create_task(ask(1, f"prefix=http%2F&since={none['version']}"))
    async with kvstore.connect(cluster.endpoints) as db:
        first = await db.put(b"http/a", b"1")
        answer = json.loads((await asked).body)
        assert [(event["type"], event["version"]) for event in answer["events"]] == [
            ("put", str(first))
        ]
        async with db.batch() as batch:
            batch.put(b"http/b", b"2")
            batch.delete(b"http/a")
    answer = json.loads((await ask(2, f"prefix=http%2F&since={answer['version']}&limit=1")).body)
    assert [(event["key"], event["value"]) for event in answer["events"]] == [
        ("aHR0cC9h", None),
        ("aHR0cC9i", "Mg=="),
    ]
    assert answer["version"] == str(batch.version)
    assert (await ask(0, "key=a&prefix=b")).status == 400
    assert (await ask(0, "key=a&since=99999999999999999999")).status == 400


def test_kvctl_prints_a_line_for_each_event(cluster):
    def start(*words):
        command = [sys.executable, "-m", "kvstore.cli.admin", "--endpoints", cluster.endpoints]
        return subprocess.Popen([*command, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)

    with kvstore.Client(cluster.endpoints) as db:
        since = db.put(b"cli/0", b"before")
        version = db.put(b"cli/1", b"a b")
        gone = db.delete(b"cli/1")
        plain = start("watch", "--prefix", "cli/", "--since", str(since), "--count", "2")
        told, _ = plain.communicate(timeout=30)
        assert told == f"{version}\tput\tcli/1\ta b\n{gone}\tdelete\tcli/1\n"
        as_json = start("-o", "json", "watch", "cli/1", "--since", str(version), "--count", "1")
        told, _ = as_json.communicate(timeout=30)
        assert json.loads(told) == {
            "type": "delete",
            "key": "Y2xpLzE=",
            "value": None,
            "version": str(gone),
        }


async def test_changes_that_were_collected_are_compacted_and_an_idle_watch_is_not(tmp_path):
    settings = {**FAST, "KVORUM_TXN__RETENTION": "2s"}
    with LocalCluster(1, replicas=1, settings=settings) as small:
        async with kvstore.connect(small.endpoints) as db:
            since = await db.put(b"k", b"0")
            idle = db.watch(key=b"idle")
            await idle.start()
            waiting = asyncio.create_task(idle.pull())
            for number in range(60):
                await db.put(b"k", b"%d" % number)
                await asyncio.sleep(0.1)

            async def look_until_refused():
                for _ in range(100):
                    await db.put(b"k", b"v")
                    async with db.watch(key=b"k", since=since) as watch:
                        await watch.pull()
                    await asyncio.sleep(0.2)

            with pytest.raises(Compacted) as caught:
                await look_until_refused()
            assert caught.value.oldest > since
            since = await db.snapshot().version()
            assert since > caught.value.oldest
            async with db.watch(key=b"k", since=since) as watch:
                await db.put(b"k", b"again")
                assert (await watch.pull())[-1].value == b"again"
            version = await db.put(b"idle", b"at last")
            assert as_rows(await waiting) == [(version, b"idle", b"at last")]
            await idle.close()


async def test_an_embedded_store_has_them(tmp_path):
    async with kvstore.open(tmp_path / "data") as db:
        first = await db.put(b"k", b"1")
    async with kvstore.open(tmp_path / "data") as db, db.watch(key=b"k", since=0) as watch:
        assert as_rows(await watch.pull()) == [(first, b"k", b"1")]
        pulling = asyncio.create_task(watch.pull())
        second = await db.put(b"k", b"2")
        assert as_rows(await pulling) == [(second, b"k", b"2")]
