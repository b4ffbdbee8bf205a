"""Claims of reads at replicas, of holds and of collection without traffic, in a whole simulated cluster whose every step is
watched (I13, I14 and I15 among others): who answers, how stale that may be, and what is refused rather than staler."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest
from msgspec import structs

from kvstore.config import NodeConfig
from kvstore.errors import DeadlineExceeded, InvalidArgument, KVError, SnapshotTooOld, Unavailable
from kvstore.holds import LEASE_S
from kvstore.sim.cluster import Client, small_logs
from tests.sim.directed import KEYS, LOW, Stage, play
from tests.sim.directed_txn import A, K, Z, begin, patient, undecided
from txn.messages import Finalize, Prepare, Resolve

CLOSED_WITHIN_S = 2.5
RESTARTS: list[asyncio.Task[None]] = []  # begun; kept from being forgotten


def stores(stage: Stage) -> list[Any]:
    return [server.node.store for server in stage.cluster.running() if server.node is not None]


def served(stage: Stage) -> dict[int, int]:
    return {store.node: store.replica_reads.counters["served"] for store in stores(stage)}


def entries(stage: Stage) -> int:
    """In all logs, by their leaders' counts."""
    return sum(store.counters["entries"] for store in stores(stage))


def retaining(seconds: float) -> NodeConfig:
    config = small_logs(NodeConfig())
    return structs.replace(config, txn=structs.replace(config.txn, retention_s=seconds))


async def stale(client: Client, key: bytes, bound_s: float, **more: Any) -> bytes | None:
    return await client.process.call(client.database.get(key, max_staleness=bound_s, **more))


def test_every_replica_answers_and_nobody_asks_the_leader_or_the_oracle():
    async def scenario(stage: Stage) -> None:
        (client,) = await begin(stage, "client")
        await asyncio.sleep(CLOSED_WITHIN_S)
        before, rounds = served(stage), entries(stage)
        for _ in range(30):
            stage.claim(await stale(client, A, 3.0) == b"old", "what was acknowledged is read")
        after = served(stage)
        stage.claim(all(after[node] >= before[node] + 9 for node in after), "each in its turn")
        stage.claim(entries(stage) == rounds, "reads propose nothing")
        stage.claim(client.database.stats()["replicas_behind"] == 0, "nobody was behind")

    assert play(scenario) == []


def test_all_keys_and_spans_of_one_stale_snapshot_are_of_one_version():
    async def scenario(stage: Stage) -> None:
        (client,) = await begin(stage, "client")
        db = client.database
        await asyncio.sleep(CLOSED_WITHIN_S)

        async def work() -> None:
            for number in range(40):
                async with db.batch() as batch:
                    for key in (A, K, Z):
                        batch.put(key, b"%d" % number)
                await asyncio.sleep(0.1)
                snapshot = db.snapshot(max_staleness=2.0)
                found = await snapshot.get_many((A, K, Z))
                stage.claim(len({*found.values()}) == 1, f"torn: {found}")
                rows = dict(await snapshot.scan(b"a", b"zz").to_list())
                stage.claim(rows == found, "a scan of the same snapshot differs")
                rows = dict(await db.scan(b"a", b"zz", max_staleness=2.0).to_list())
                stage.claim(len({*rows.values()}) == 1, f"torn scan: {rows}")

        await client.process.call(work())
        stage.claim(sum(served(stage).values()) > 40, "replicas answered")

    assert play(scenario) == []


def test_without_a_leader_replicas_answer_within_the_bound_and_not_beyond():
    """Two of three nodes are gone: no leader anywhere. What is left answers what it knows, until that is too old."""

    async def scenario(stage: Stage) -> None:
        (client,) = await begin(stage, "client")
        await asyncio.sleep(CLOSED_WITHIN_S)
        await stale(client, A, 3.0)
        for name in ("n2", "n3"):
            stage.cluster.crash(name)
        stage.claim(await stale(client, A, 20.0) == b"old", "it is known, and young enough")
        await asyncio.sleep(10.0)
        stage.claim(await stale(client, A, 20.0) == b"old", "still")
        failure = await stage.outcome(stale(client, A, 5.0, timeout=3.0), "an answer")
        stage.claim(isinstance(failure, Unavailable | DeadlineExceeded), f"too stale: {failure!r}")

    assert play(scenario) == []


def test_a_young_bound_is_kept_by_asking_the_leader():
    async def scenario(stage: Stage) -> None:
        (client,) = await begin(stage, "client")
        loop = stage.cluster.loop
        for number in range(20):
            await stage.put(client, A, b"%d" % number)
            done = loop.time()
            await asyncio.sleep(0.3)
            found = int(await stale(client, A, 0.2) or b"-1")
            stage.claim(loop.time() - done > 0.2 and found == number, f"{found} after {number}")

    assert play(scenario) == []


def test_stale_reads_of_one_client_do_not_go_back():
    async def scenario(stage: Stage) -> None:
        reader, writer = await begin(stage, "reader", "writer")
        last = -1
        for number in range(60):
            await stage.put(writer, K, b"%d" % number)
            await asyncio.sleep(0.05)
            found = int((await stale(reader, K, (0.3, 2.0, 9.0)[number % 3])) or b"-1")
            stage.claim(found >= last, f"{found} after {last}")
            last = max(last, found)

    assert play(scenario) == []


def test_an_old_version_is_read_at_replicas_and_a_young_one_at_the_leader():
    async def scenario(stage: Stage) -> None:
        (client,) = await begin(stage, "client")
        version = await stage.put(client, A, b"first")
        young = await stage.put(client, A, b"second")
        before = served(stage)
        found = await client.process.call(client.database.snapshot(young).get(A))
        stage.claim(found == b"second" and served(stage) == before, "the leader answers")
        await asyncio.sleep(5.0)
        for _ in range(2):  # the client sees how late it is; the oracle's time stood still
            await stage.put(client, Z, b"now")
            await asyncio.sleep(1.0)
        for at, value in ((version, b"first"), (young, b"second")):
            for _ in range(6):
                found = await client.process.call(client.database.snapshot(at).get(A))
                stage.claim(found == value, f"{found!r} at {at}")
        after = served(stage)
        stage.claim(all(after[node] > before[node] for node in after), "each in its turn")

    assert play(scenario) == []


def test_an_undecided_write_holds_back_what_is_safe_and_not_its_readers():
    """The coordinator dies between its parts and its decision; nobody recovers it for a while."""

    async def scenario(stage: Stage) -> None:
        writer, reader = await begin(stage, "writer", "reader")
        await asyncio.sleep(CLOSED_WITHIN_S)
        stage.requests["n2"] = lambda request: not isinstance(request, Finalize)
        stage.requests["n1"] = lambda request: not isinstance(request, Prepare | Resolve)
        writing = asyncio.ensure_future(writer.process.call(write_both(writer)))
        await stage.until(lambda: undecided(stage, LOW) > 0, "a part is prepared")
        stage.cluster.crash_client(writer.name)
        await asyncio.gather(writing, return_exceptions=True)
        replica = next(store for store in stores(stage) if store.node == 3).replicas[LOW]
        await stage.until(lambda: bool(replica.state.parts), "the follower knows of it")
        part = next(iter(next(iter(replica.state.parts.values())).values()))
        await asyncio.sleep(CLOSED_WITHIN_S)
        stage.claim(replica.safe_ts < part.row.min_ts, "safe is below what is undecided")
        loop = stage.cluster.loop
        since = loop.time()
        stage.claim(await stale(reader, A, 30.0) == b"old", "replicas answer")
        stage.claim(loop.time() - since < 0.2, "at once")
        stage.requests.clear()

    config = patient()
    config = structs.replace(config, txn=structs.replace(config.txn, anchor_timer_s=400.0))
    assert play(scenario, config=config) == []


async def write_both(client: Client) -> None:
    async with client.database.transaction() as tx:
        tx.put(A, b"new")
        tx.put(Z, b"new")


def test_a_read_only_transaction_writes_nothing_and_waits_for_no_lock_holders_client():
    """As before: the intents of a client that is dead stand in the way, and no timer runs soon."""

    async def scenario(stage: Stage) -> None:
        writer, reader = await begin(stage, "writer", "reader")
        stage.requests["n1"] = lambda request: not isinstance(request, Prepare | Resolve)
        writing = asyncio.ensure_future(writer.process.call(write_both(writer)))
        await stage.until(lambda: undecided(stage, LOW) > 0, "a part is prepared")
        stage.cluster.crash_client(writer.name)
        await asyncio.gather(writing, return_exceptions=True)
        stage.requests.clear()
        loop, before = stage.cluster.loop, entries(stage)
        since = loop.time()
        found = await reader.process.call(read_both(reader))
        stage.claim(
            found == (b"old", b"old"), f"strictly: what is not committed is not there: {found}"
        )
        stage.claim(loop.time() - since < 0.3, "a reader waits for messages, not for timers")
        stage.claim(entries(stage) == before, "and proposes nothing")

    config = patient()
    config = structs.replace(config, txn=structs.replace(config.txn, anchor_timer_s=400.0))
    assert play(scenario, config=config) == []


async def read_both(client: Client) -> tuple[bytes | None, bytes | None]:
    async with client.database.transaction(read_only=True) as tx:
        found = await tx.get(A), await tx.get(Z)
    assert tx.commit_version is None
    return found


def test_an_idle_cluster_says_little():
    async def scenario(stage: Stage) -> None:
        await begin(stage, "client")
        await asyncio.sleep(15.0)
        before = {store.node: dict(store.closer.counters) for store in stores(stage)}
        rounds = sum(store.counters["oracle_rounds"] for store in stores(stage))
        written = entries(stage)
        await asyncio.sleep(60.0)
        for store in stores(stage):
            told = store.closer.counters["messages"] - before[store.node]["messages"]
            stage.claim(told <= 60, f"{told} messages of node {store.node} in a minute")
        asked = sum(store.counters["oracle_rounds"] for store in stores(stage)) - rounds
        stage.claim(asked <= 3 * 75, f"the oracle is asked {asked} times in a minute")
        stage.claim(entries(stage) - written <= 2, "and logs are at rest")

    assert play(scenario) == []


# --- holds


def test_an_open_snapshot_is_read_long_after_the_retention_and_not_after_its_end():
    async def scenario(stage: Stage) -> None:
        holder, writer = await begin(stage, "holder", "writer")
        db = holder.database

        async def hold() -> None:
            async with db.snapshot() as snapshot:
                version = await snapshot.version()
                for number in range(60):
                    await writer.process.call(writer.database.put(A, b"%d" % number))
                    await asyncio.sleep(0.5)
                stage.claim(await snapshot.get(A) == b"old", "it is read after 30 s")
                stage.claim(history(stage) > 30, "what follows it is kept as well")
            await asyncio.sleep(LEASE_S + 10.0)
            await writer.process.call(writer.database.put(A, b"last"))
            await asyncio.sleep(5.0)
            with pytest.raises(SnapshotTooOld):
                await db.snapshot(version).get(A)

        await holder.process.call(hold())
        stage.claim(history(stage) < 5, "all of it is gone")

    assert play(scenario, config=retaining(8.0)) == []


def history(stage: Stage) -> int:
    return max(len(list(store.engine.scan(b"H", b"I"))) for store in stores(stage))


def test_a_client_that_vanishes_holds_nothing_after_its_lease():
    async def scenario(stage: Stage) -> None:
        holder, writer = await begin(stage, "holder", "writer")

        async def hold() -> None:
            async with holder.database.snapshot() as snapshot:
                await snapshot.get(A)
                await asyncio.sleep(1_000.0)

        holding = asyncio.ensure_future(holder.process.call(hold()))
        for number in range(50):
            await stage.put(writer, A, b"%d" % number)
            await asyncio.sleep(0.5)
        stage.claim(history(stage) > 30, "as long as it lives, versions are kept")
        stage.cluster.crash_client(holder.name)
        await asyncio.gather(holding, return_exceptions=True)
        for number in range(50):
            await stage.put(writer, A, b"%d" % number)
            await asyncio.sleep(0.5)
        stage.claim(history(stage) < 40, f"{history(stage)} versions are kept")

    assert play(scenario, config=retaining(8.0)) == []


def test_a_hold_outlives_the_oracles_leader():
    async def scenario(stage: Stage) -> None:
        holder, writer = await begin(stage, "holder", "writer")

        async def hold() -> bytes | None:
            async with holder.database.snapshot() as snapshot:
                await snapshot.get(A)
                for number in range(80):
                    if number in (20, 45):
                        server = stage.cluster.leader_of(1)
                        if server is not None:
                            stage.crash_soon(server.name)
                            stage.later(3.0, partial(restart, stage, server.name))
                    await asyncio.sleep(0.5)
                    await writer.process.call(writer.database.put(A, b"%d" % number))
                return await snapshot.get(A)

        stage.claim(await holder.process.call(hold()) == b"old", "it is read to its end")

    assert play(scenario, config=retaining(8.0)) == []


def restart(stage: Stage, name: str) -> None:
    RESTARTS.append(stage.cluster.loop.create_task(stage.cluster.restart(name)))


# --- collection without traffic


def test_the_last_garbage_goes_though_nobody_writes_any_more_and_then_no_row_is_read():
    async def scenario(stage: Stage) -> None:
        (client,) = await begin(stage, "client")
        for number in range(20):
            for key in KEYS.values():
                await stage.put(client, key, b"%d" % number)
        stage.claim(history(stage) > 20, "there is garbage")
        await asyncio.sleep(90.0)
        stage.claim(history(stage) == 0, f"{history(stage)} old versions are left")
        engines = [store.engine for store in stores(stage)]
        scans = [0]
        for engine in engines:
            engine.scan = counted(engine.scan, scans)
        written = entries(stage)
        await asyncio.sleep(60.0)
        stage.claim(scans[0] == 0, f"{scans[0]} scans of what is clean")
        stage.claim(entries(stage) == written, "no entry, either")

    assert play(scenario, config=retaining(8.0)) == []


def counted(scan: Any, scans: list[int]) -> Any:
    def counting(*arguments: Any, **more: Any) -> Any:
        scans[0] += 1
        return scan(*arguments, **more)

    return counting


# --- what users may ask


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), 1e9])
def test_a_bound_that_makes_no_sense_is_refused_before_anything_is_sent(bound: float):
    async def scenario(stage: Stage) -> None:
        client = await stage.client("client")
        db = client.database
        for call in (
            lambda: db.get(b"a", max_staleness=bound),
            lambda: db.get_many([b"a"], max_staleness=bound),
        ):
            failure = await stage.outcome(client.process.call(call()), "an answer")
            stage.claim(isinstance(failure, InvalidArgument), repr(failure))
        for begin_it in (
            lambda: db.snapshot(max_staleness=bound),
            lambda: db.scan(max_staleness=bound),
            lambda: db.snapshot(at=5, max_staleness=1.0),
        ):
            try:
                begin_it()
            except InvalidArgument:
                continue
            except KVError:
                pass
            stage.claim(False, "it was taken")

    assert play(scenario) == []


def test_after_a_hand_over_in_vain_the_followers_of_a_quiet_range_hear_what_is_closed():
    """The lease is given up for the rest of the term, and with it they were told nothing."""

    async def scenario(stage: Stage) -> None:
        (client,) = await begin(stage, "client")
        leader, unable = stage.host("n2"), stage.host("n3")
        term, to = leader.raft(LOW).term, unable.raft(LOW).replica
        stage.within("n3", lambda: unable._installer.unreadable(LOW))
        stage.within("n2", lambda: leader.transfer_leadership(LOW, to))
        await asyncio.sleep(2.0)
        stage.claim(not leader.lease_valid(LOW), "the lease is given up")
        followers = [store.replicas[LOW] for store in stores(stage) if store.node != 2]
        before = [replica.safe_ts for replica in followers]
        for _ in range(10):
            await stage.put(client, Z, b"new")
            await asyncio.sleep(1.0)
        stage.claim(leader.raft(LOW).term == term, "the term goes on")
        for replica, safe in zip(followers, before, strict=True):
            stage.claim(replica.safe_ts > safe, "a follower was told nothing")

    assert play(scenario) == []
