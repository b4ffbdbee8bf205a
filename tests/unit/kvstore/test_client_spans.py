"""Claims of `Database` over many keys, spans and ranges: what one call reads is one snapshot, what one call writes is atomic
whatever happens to the ranges meanwhile."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import limits
from kvstore.batch import Batch
from kvstore.client import Database
from kvstore.errors import (
    InvalidArgument,
    KVError,
    OutcomeExpired,
    SnapshotTooOld,
    TransactionTooLarge,
)
from kvstore.transactions import Aborted, Committed
from tests.unit.kvstore.fake_cluster import FakeCluster, simulate
from txn.messages import (
    Failure,
    Finalize,
    GetTimestamps,
    Outcome,
    Prepare,
    Read,
    Resolve,
    Scan,
    ScanReply,
    TxnReply,
)
from txn.types import FenceReason, TxnStatus, WriteKind, begin_ts_of

BIG = bytes(limits.VALUE_BYTES_MAX + 1)


def now() -> float:
    return asyncio.get_running_loop().time()


# --- many keys and spans --------------------------------------------------------------------------


def test_get_many_is_one_snapshot_over_ranges():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(a=b"1", b=b"2", z=b"3")
        cluster.fault(Read, lambda node, request: _write_between(cluster, node, request))
        found = await db.get_many([b"z", b"a", b"q", b"a", b"b"])
        assert found == {b"z": b"3", b"a": b"1", b"b": b"2"}
        (at,) = {read.at for read in cluster.of(Read)}
        assert at

    simulate(test, FakeCluster(b"m"))


def test_a_short_answer_to_many_keys_is_continued():
    async def test(cluster: FakeCluster, db: Database) -> None:
        keys = [b"k%03d" % number for number in range(600)]
        async with db.batch() as batch:
            for key in keys:
                batch.put(key, key)
        cluster.read_values_max = 50
        assert await db.get_many(keys) == {key: key for key in keys}
        assert max(len(read.keys) for read in cluster.of(Read)) <= 256

    simulate(test)


@pytest.mark.parametrize("staleness", [None, 60.0])
def test_reads_of_many_long_keys_are_cut_into_messages(staleness: float | None):
    """One message of them all would be refused by the connection, and stand in the way of all that follows."""
    keys = [b"%04d" % number + bytes(3_000) for number in range(4_000)]

    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(k=b"v")
        assert await db.get_many([*keys, b"k"], max_staleness=staleness) == {b"k": b"v"}
        sizes = [
            sum(
                len(key)
                for request in requests
                if isinstance(request, Read)
                for key in request.keys
            )
            for _node, requests in cluster.messages
        ]
        assert 500_000 < max(sizes) < limits.MESSAGE_BYTES_MAX / 2
        scans = (
            db.scan(key, key + b"z", max_staleness=staleness).to_list() for key in keys[:2_000]
        )
        assert await asyncio.gather(*scans) == [[]] * 2_000
        assert max(len(requests) for _node, requests in cluster.messages) < 500

    simulate(test)


@pytest.mark.parametrize("hints", [False, True])
def test_what_is_asked_and_told_of_transactions_with_long_keys_is_cut_too(hints: bool):
    async def test(cluster: FakeCluster, db: Database) -> None:
        await db.get(b"a")  # there is a connection
        key, until = b"k" * 4_000, asyncio.get_running_loop().time() + 5.0
        ids = [b"%016d" % number for number in range(3_000)]
        if hints:
            for txn_id in ids:
                db.router.hint(Resolve(0, 0, 0, txn_id, key, key, key, key, 0))
        else:
            questions = [Outcome(0, 0, 0, txn_id, key) for txn_id in ids]
            await asyncio.gather(*(db.router.ask(each, key, b"", until) for each in questions))
        assert await db.get(b"a") is None
        told = len(cluster.of(Resolve if hints else Outcome))
        assert told > 50 if hints else told == 3_000  # hints need not arrive
        assert max(len(requests) for _node, requests in cluster.messages) < 300

    simulate(test)


def test_reads_go_on_when_ranges_split_under_them():
    async def test(cluster: FakeCluster, db: Database) -> None:
        keys = [b"%02d" % number for number in range(40)]
        async with db.batch() as batch:
            for key in keys:
                batch.put(key, key)
        cluster.set_ranges(b"10", b"20", version=2)
        assert len(await db.get_many(keys)) == 40
        cluster.set_ranges(b"15", b"20", b"31", version=3)
        assert [key for key, _ in await db.scan().to_list()] == keys
        cluster.set_ranges(version=4)
        assert [key for key, _ in await db.scan(reverse=True).to_list()] == keys[::-1]

    simulate(test)


def test_a_scan_is_one_version_over_ranges_and_pages_whatever_is_written_meanwhile():
    async def test(cluster: FakeCluster, db: Database) -> None:
        keys = [b"%03d" % number for number in range(300)]
        async with db.batch() as batch:
            for key in keys:
                batch.put(key, b"old")
        cluster.page_rows_max = 7
        cluster.requests.clear()
        rows: list[tuple[bytes, bytes]] = []
        async for row in db.scan():
            rows.append(row)
            if len(rows) in (1, 50, 150):
                await db.put(b"%03d" % (len(rows) + 10), b"new")
                await db.put(b"%03dx" % (len(rows) + 10), b"new")
        assert rows == [(key, b"old") for key in keys]
        first, *others = cluster.of(Scan)
        assert first.at == 0
        assert {scan.at for scan in others} == {first_at(cluster)}

    def first_at(cluster: FakeCluster) -> int:
        return cluster.of(Scan)[1].at

    simulate(test, FakeCluster(b"100", b"200"))


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_scans_agree_with_a_sorted_list(seed: int):
    rng = random.Random(seed)
    keys = sorted({bytes(rng.choices(b"abc", k=rng.randint(1, 3))) for _ in range(20)})
    splits = sorted(
        {bytes(rng.choices(b"abc", k=rng.randint(1, 2))) for _ in range(rng.randint(0, 4))}
    )

    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.page_rows_max = rng.randint(1, 5)
        async with db.batch() as batch:
            for key in keys:
                batch.put(key, key)
        for _ in range(5):
            low, high = sorted(bytes(rng.choices(b"abcd", k=rng.randint(0, 2))) for _ in range(2))
            limit = rng.choice([None, 0, 1, 3, 100])
            reverse, keys_only = rng.random() < 0.5, rng.random() < 0.5
            wanted = [(key, b"" if keys_only else key) for key in keys if low <= key < high]
            wanted = wanted[::-1] if reverse else wanted
            scan = db.scan(low, high, limit=limit, reverse=reverse, keys_only=keys_only)
            assert await scan.to_list() == wanted[:limit]
            assert [row async for row in scan] == wanted[:limit]

    simulate(test, FakeCluster(*splits))


def test_a_limit_is_told_to_the_range():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(a=b"1", b=b"2", c=b"3")
        assert await db.scan(limit=2).to_list() == [(b"a", b"1"), (b"b", b"2")]
        assert [scan.rows_max for scan in cluster.of(Scan)] == [2]
        assert await db.scan(prefix=b"b").to_list() == [(b"b", b"2")]
        cluster.page_rows_max = 1
        cluster.requests.clear()
        assert len(await db.scan(limit=3).to_list()) == 3
        assert [scan.rows_max for scan in cluster.of(Scan)] == [3, 2, 1]  # what is left of it

    simulate(test)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_goes_on_after_an_empty_page(reverse: bool):
    async def test(cluster: FakeCluster, db: Database) -> None:
        at = cluster.seed(a=b"1", y=b"2")

        def empty(_node: int, request: Scan) -> ScanReply:
            return ScanReply(request.id, at, [], [], [], False, b"m")

        cluster.fault(Scan, empty)
        left = [(b"a", b"1")] if reverse else [(b"y", b"2")]
        assert await db.scan(reverse=reverse, limit=1).to_list() == left
        first, second = cluster.of(Scan)
        assert second.at == at
        if reverse:
            assert (second.start, second.end) == (first.start, b"m")
        else:
            assert (second.start, second.end) == (b"m", first.end)

    simulate(test)


def test_a_snapshot_reads_at_one_version():
    async def test(cluster: FakeCluster, db: Database) -> None:
        old = await db.put(b"k", b"1")
        async with db.snapshot() as view:
            assert await view.get(b"k") == b"1"
            await db.put(b"k", b"2")
            await db.put(b"l", b"2")
            assert await view.get(b"k") == b"1"
            assert await view.get_entry(b"k") == (b"k", b"1", old)
            assert await view.get_many([b"k", b"l"]) == {b"k": b"1"}
            assert await view.scan().to_list() == [(b"k", b"1")]
            assert await view.version() == old
        assert await db.snapshot(at=old).get(b"k") == b"1"
        assert await db.scan(at=old).to_list() == [(b"k", b"1")]
        assert await db.snapshot().version() == cluster.ts

    simulate(test)


def test_first_reads_of_a_snapshot_that_are_awaited_together_share_its_version():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(a=b"1", z=b"1")
        view = db.snapshot()
        await asyncio.gather(view.get(b"a"), view.get(b"z"), view.scan().to_list())
        assert len(cluster.of(GetTimestamps)) == 1
        assert [request.at for request in cluster.of(Read)] == [cluster.ts] * 2
        assert [request.at for request in cluster.of(Scan)] == [cluster.ts] * 2

    simulate(test, FakeCluster(b"m"))


def test_a_first_read_that_is_alone_learns_its_version_from_the_answer():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(a=b"1", b=b"1", z=b"1")
        view = db.snapshot()
        await view.get_many([b"a", b"b"])
        assert [request.at for request in cluster.of(Read)] == [0]
        await asyncio.gather(view.get(b"a"), view.get(b"z"))
        assert [request.at for request in cluster.of(Read)] == [0, cluster.ts, cluster.ts]
        assert not cluster.of(GetTimestamps)

    simulate(test, FakeCluster(b"m"))


def test_a_first_read_that_fails_or_is_cancelled_leaves_the_place_to_the_next():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(a=b"1", b=b"2")
        view = db.snapshot()
        cluster.ignore(Read)
        first = asyncio.ensure_future(view.get(b"a"))
        second = asyncio.ensure_future(view.get(b"b"))
        await asyncio.sleep(0.01)
        first.cancel()
        assert await second == b"2"
        cluster.fail(Read, "corruption_error")
        view = db.snapshot()
        outcomes = await asyncio.gather(view.get(b"a"), view.get(b"b"), return_exceptions=True)
        assert isinstance(outcomes[0], KVError)
        assert outcomes[1] == b"2"

    simulate(test)


def test_a_version_that_was_never_issued_is_refused():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await db.put(b"k", b"v")
        reads = len(cluster.of(Read)), len(cluster.of(Scan))
        for call in (
            lambda: db.snapshot(at=cluster.ts + 1).get(b"k"),
            lambda: db.scan(at=cluster.ts + 1).to_list(),
            lambda: db.snapshot(at=cluster.ts + 1).version(),
        ):
            with pytest.raises(InvalidArgument, match="not been issued"):
                await call()
        assert (len(cluster.of(Read)), len(cluster.of(Scan))) == reads
        cluster.ts += 10  # issued to others, and not seen here
        assert await db.snapshot(at=cluster.ts).get(b"k") == b"v"

    simulate(test)


def test_too_old_a_version_is_typed():
    async def test(cluster: FakeCluster, db: Database) -> None:
        version = await db.put(b"k", b"v")
        cluster.fail(Read, "snapshot_too_old")
        with pytest.raises(SnapshotTooOld):
            await db.snapshot(at=version).get(b"k")

    simulate(test)


# --- several writes -------------------------------------------------------------------------------


def test_a_batch_is_atomic_over_ranges_and_anchored_at_the_first_key_written():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(q=b"1")
        async with db.batch() as batch:
            batch.put(b"z", b"1")
            batch.put(b"a", b"1")
            batch.delete(b"q")
            batch.increment(b"n", 3)
        await cluster.settled()
        assert {batch.version} == {cluster.data[key][-1].ts for key in (b"a", b"z", b"q", b"n")}
        anchor, other = sorted(cluster.of(Prepare), key=lambda each: not each.participants)
        assert anchor.anchor_key == anchor.locus == other.anchor_key == b"z"
        assert [each.locus for each in anchor.participants] == [b"z", b"a"]
        assert not cluster.parts
        assert await db.get_many([b"a", b"n", b"q"]) == {b"a": b"1", b"n": b"3"}

    simulate(test, FakeCluster(b"m"))


def test_the_user_is_told_before_the_record_is_finished_and_hints_go_in_parallel():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.ignore(Finalize, times=100)
        cluster.ignore(Resolve, times=100)
        began = now()
        async with db.batch() as batch:
            batch.put(b"a", b"1")
            batch.put(b"z", b"1")
        assert now() == began
        await asyncio.sleep(0.01)
        assert len(cluster.of(Finalize)) == len(cluster.of(Resolve)) == 1
        cluster.faults.clear()
        await asyncio.sleep(5.0)  # they are repeated
        assert not cluster.parts

    simulate(test, FakeCluster(b"m"))


def test_a_failed_block_writes_nothing():
    async def test(cluster: FakeCluster, db: Database) -> None:
        with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the end of the block is what raises
            async with db.batch() as batch:
                batch.put(b"a", b"1")
                raise ZeroDivisionError
        async with db.batch() as batch:
            pass
        assert batch.version is None
        assert cluster.of(Prepare) == []

    simulate(test)


def test_a_fence_in_one_range_is_followed_by_aborts_and_a_new_attempt():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.refuse(FenceReason.CONFLICT)
        async with db.batch() as batch:
            batch.put(b"a", b"1")
            batch.put(b"z", b"1")
        await cluster.settled()
        first, *_ = cluster.of(Prepare)
        told = [each.commit_ts for each in cluster.of(Finalize) if each.txn_id == first.txn_id]
        hints = [each.commit_ts for each in cluster.of(Resolve) if each.txn_id == first.txn_id]
        assert told + hints == [0, 0]
        assert [len(cluster.data[key]) for key in (b"a", b"z")] == [1, 1]

    simulate(test, FakeCluster(b"m"))


def test_a_part_whose_answer_is_lost_is_asked_of_the_anchor():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.drop_replies(Prepare, times=100, where=lambda request: request.locus == b"z")
        async with db.batch() as batch:
            batch.put(b"a", b"1")
            batch.put(b"z", b"1")
        assert len(cluster.of(Outcome)) == 1
        await cluster.settled()
        assert batch.version == cluster.data[b"a"][-1].ts == cluster.data[b"z"][-1].ts

    simulate(test, FakeCluster(b"m"), timeout_s=2.0)


def test_the_same_attempt_goes_on_after_a_merge_and_after_a_split_beside_its_batches():
    async def test(cluster: FakeCluster, db: Database) -> None:
        for splits in ([b"b", b"m"], [b"b", b"c", b"m"], []):
            cluster.requests.clear()
            cluster.set_ranges(*splits, version=cluster.ranges[0].version + 1)
            async with db.batch() as batch:
                batch.put(b"a", b"1")
                batch.put(b"z", b"1")
            assert len({prepare.txn_id for prepare in cluster.of(Prepare)}) == 1
            assert cluster.of(Outcome) == []

    simulate(test, FakeCluster(b"m"))


def test_a_split_through_a_batch_ends_the_attempt_and_begins_another():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await db.get(b"a")
        cluster.set_ranges(b"b", version=2)
        async with db.batch() as batch:
            batch.put(b"a", b"1")
            batch.put(b"c", b"1")
        ids = list(dict.fromkeys(prepare.txn_id for prepare in cluster.of(Prepare)))
        assert len(ids) == 2
        (outcome,) = cluster.of(Outcome)
        assert outcome.txn_id == ids[0]  # known ABORTED, before the new one was made
        assert cluster.records[ids[0]][0] == TxnStatus.ABORTED
        await cluster.settled()
        assert [len(cluster.data[key]) for key in (b"a", b"c")] == [1, 1]
        assert {each.age for each in cluster.of(Prepare)} == {begin_ts_of(ids[0])}

    simulate(test)


def test_delete_range_is_one_transaction_over_ranges():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(a=b"1", b=b"2", y=b"3", z=b"4")
        version = await db.delete_range(b"b", b"z")
        await cluster.settled()
        assert [key for key, _ in await db.scan().to_list()] == [b"a", b"z"]
        assert cluster.data[b"b"][-1].ts == cluster.data[b"y"][-1].ts == version
        anchor, other = sorted(cluster.of(Prepare), key=lambda each: not each.participants)
        assert anchor.anchor_key == anchor.locus == b"b"
        assert [(each.kind, each.key, each.value) for each in [*anchor.writes, *other.writes]] == [
            (WriteKind.DELETE_RANGE, b"b", b"m"),
            (WriteKind.DELETE_RANGE, b"m", b"z"),
        ]
        assert await db.delete_range(b"x", b"x") is None

    simulate(test, FakeCluster(b"m"))


@pytest.mark.parametrize(("spans", "bound_bytes"), [(5_001, 4), (600, limits.KEY_BYTES_MAX)])
def test_more_delete_ranges_than_a_range_takes_are_refused_before_anything_is_sent(
    spans: int, bound_bytes: int
):
    async def test(cluster: FakeCluster, db: Database) -> None:
        def filled(first: bytes, most: int) -> Batch:
            batch = Batch()
            for number in range(most):
                start = (first + b"%04d" % number).ljust(bound_bytes, b"-")
                batch.delete_range(start, start + b"\x00")
            return batch

        with pytest.raises(TransactionTooLarge, match="in one range"):
            await db.commit_batch(filled(b"a", spans))
        assert not cluster.of(Prepare)
        await db.commit_batch(filled(b"a", spans // 2))
        assert len(cluster.of(Prepare)) == 1

    simulate(test, FakeCluster(b"m"))


def test_clear_range_deletes_any_number_of_rows_page_by_page():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.page_rows_max = 30
        for chunk in range(2):
            async with db.batch() as batch:
                for number in range(100):
                    batch.put(b"k%d%03d" % (chunk, number), b"v")
        await db.put(b"l", b"stays")
        cluster.refuse(FenceReason.TOO_LARGE)  # once: then that page goes row by row
        assert await db.clear_range(prefix=b"k") == 200
        assert await db.scan().to_list() == [(b"l", b"stays")]

    simulate(test, FakeCluster(b"k1"))


def test_clear_range_tells_how_far_it_came_and_goes_on_from_there():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.page_rows_max = 30
        async with db.batch() as batch:
            for number in range(100):
                batch.put(b"k%03d" % number, b"v")
        told: list[tuple[int, bytes]] = []

        def on_progress(rows: int, upto: bytes) -> None:
            told.append((rows, upto))
            if len(told) == 2:
                clearing.cancel()

        clearing = asyncio.ensure_future(db.clear_range(prefix=b"k", on_progress=on_progress))
        with pytest.raises(asyncio.CancelledError):
            await clearing
        rows, upto = told[-1]
        assert rows == 60
        left = await db.scan().to_list()
        assert len(left) == 40
        assert left[0][0] >= upto
        cluster.requests.clear()
        assert await db.clear_range(upto, b"l", on_progress=lambda *each: told.append(each)) == 40
        assert min(scan.start for scan in cluster.of(Scan)) == upto
        assert [count for count, _ in told[2:]] == sorted(count for count, _ in told[2:])
        assert told[-1][1] == b"l"
        assert await db.scan().to_list() == []
        assert all(len(prepare.writes) == 1 for prepare in cluster.of(Prepare))  # one entry a page

    simulate(test)


# --- outcome --------------------------------------------------------------------------------------


def test_the_outcome_of_a_transaction_is_learned_from_its_token():
    async def test(cluster: FakeCluster, db: Database) -> None:
        async with db.transaction() as tx:
            tx.put(b"k", b"v")
            token = tx.id
        assert await db.outcome(token) == Committed(tx.commit_version or 0)
        async with db.transaction() as tx:
            tx.put(b"k", b"w")
            token = tx.id
            await tx.rollback()
        assert await db.outcome(token) == Aborted()
        cluster.fault(Outcome, lambda node, request: TxnReply(request.id, TxnStatus.EXPIRED))
        with pytest.raises(OutcomeExpired):
            await db.outcome(token)
        cluster.fault(Outcome, lambda node, request: TxnReply(request.id, TxnStatus.STAGED))
        assert await db.outcome(token) == Aborted()

    simulate(test)


def _write_between(cluster: FakeCluster, node: int, request: Read) -> Failure | None:
    """Somebody writes everywhere while the first read's answer is on its way."""
    reply = cluster.handle(node, request)
    cluster.seed(a=b"x", b=b"x", q=b"x", z=b"x")
    return reply  # type: ignore[return-value]
