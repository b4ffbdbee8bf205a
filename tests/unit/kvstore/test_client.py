"""Claims of `Database`: what is refused before anything is sent, what each call returns and raises, that a write happens
once whatever is lost, and that what one call reads is one snapshot."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import limits
from kvstore.client import Database
from kvstore.errors import (
    ClientClosed,
    CommitUnknown,
    CompareFailed,
    DeadlineExceeded,
    InvalidArgument,
    KeyTooLarge,
    KVError,
    OutcomeExpired,
    SnapshotTooOld,
    TransactionTooLarge,
    Unavailable,
    ValueTooLarge,
)
from kvstore.transactions import Aborted, Committed
from tests.unit.kvstore.fake_cluster import FakeCluster, simulate
from txn.messages import (
    Failure,
    Finalize,
    GetTimestamps,
    Outcome,
    Prepare,
    PrepareReply,
    Read,
    Resolve,
    Scan,
    TxnReply,
)
from txn.types import ExpectKind, FenceReason, PartStatus, TxnStatus, WriteKind, begin_ts_of

BIG = bytes(limits.VALUE_BYTES_MAX + 1)


def now() -> float:
    return asyncio.get_running_loop().time()


# --- one key --------------------------------------------------------------------------------------


def test_put_returns_the_version_that_get_entry_shows():
    async def test(cluster: FakeCluster, db: Database) -> None:
        first = await db.put(b"k", b"1")
        second = await db.put(b"k", b"2")
        assert second > first
        entry = await db.get_entry(b"k")
        assert entry == (b"k", b"2", second)
        assert await db.get(b"k") == b"2"
        await db.delete(b"k")
        assert await db.get(b"k") is None
        assert await db.get(b"k", b"none") == b"none"
        assert await db.get_entry(b"k") is None
        assert await db.put(b"k", b"") > second
        assert await db.get(b"k", b"none") == b""

    simulate(test)


def test_a_put_is_one_request_and_the_next_one_needs_no_timestamp_of_its_own():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await db.put(b"k", b"1")
        cluster.requests.clear()
        await db.put(b"k", b"2")
        (request,) = [request for _node, request in cluster.requests]
        assert isinstance(request, Prepare)
        assert request.one_range
        assert request.locus == request.anchor_key == b"k"
        assert request.age == begin_ts_of(request.txn_id)

    simulate(test)


def test_begin_ts_is_what_was_seen_within_a_second_and_else_asked_for():
    async def test(cluster: FakeCluster, db: Database) -> None:
        version = await db.put(b"k", b"1")
        await asyncio.sleep(0.5)
        await db.put(b"k", b"2")
        assert begin_ts_of(cluster.of(Prepare)[-1].txn_id) == version
        asked = len(cluster.of(GetTimestamps))
        await asyncio.sleep(2.0)
        cluster.ts += 100
        await db.put(b"k", b"3")
        assert len(cluster.of(GetTimestamps)) == asked + 1
        assert begin_ts_of(cluster.of(Prepare)[-1].txn_id) == cluster.ts - 1

    simulate(test)


def test_ids_are_never_used_twice():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await asyncio.gather(*(db.put(b"k%d" % number, b"v") for number in range(500)))
        assert len({prepare.txn_id for prepare in cluster.of(Prepare)}) == 500

    simulate(test)


def test_conditions_on_the_version():
    async def test(cluster: FakeCluster, db: Database) -> None:
        version = await db.put(b"k", b"1", if_absent=True)
        with pytest.raises(CompareFailed) as caught:
            await db.put(b"k", b"2", if_absent=True)
        assert caught.value.version == version
        newer = await db.put(b"k", b"2", if_version=version)
        with pytest.raises(CompareFailed) as caught:
            await db.delete(b"k", if_version=version)
        assert caught.value.version == newer
        await db.delete(b"k", if_version=newer)
        await db.put(b"k", b"3", if_version=0)
        with pytest.raises(InvalidArgument):
            await db.put(b"k", b"4", if_version=1, if_absent=True)

    simulate(test)


def test_cas_says_whether_it_was_done():
    async def test(cluster: FakeCluster, db: Database) -> None:
        assert await db.cas(b"k", None, b"1")
        assert not await db.cas(b"k", None, b"2")
        assert not await db.cas(b"k", b"x", b"2")
        assert await db.cas(b"k", b"1", b"2")
        assert await db.get(b"k") == b"2"
        assert await db.cas(b"k", b"2", None)
        assert await db.get(b"k") is None
        assert [each.expects[0].kind for each in cluster.of(Prepare)] == [
            ExpectKind.ABSENT, ExpectKind.ABSENT, ExpectKind.VALUE, ExpectKind.VALUE, ExpectKind.VALUE,
        ]  # fmt: skip

    simulate(test)


def test_increment_returns_the_new_number_in_both_formats():
    async def test(cluster: FakeCluster, db: Database) -> None:
        assert await db.increment(b"a") == 1
        assert await db.increment(b"a", 41) == 42
        assert await db.increment(b"a", -50) == -8
        assert await db.get(b"a") == b"-8"
        assert await db.increment(b"i", 258, format="int64") == 258
        assert await db.get(b"i") == bytes.fromhex("0000000000000102")
        await db.put(b"t", b"text")
        with pytest.raises(InvalidArgument):
            await db.increment(b"t")

    simulate(test)


def test_an_increment_whose_answer_was_lost_is_read_back_at_its_version():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await db.increment(b"a", 5)
        cluster.drop_replies(Prepare)
        assert await db.increment(b"a", 2) == 7
        assert cluster.value(b"a") == b"7"
        assert cluster.of(Read)[-1].at == cluster.data[b"a"][-1].ts

    simulate(test)


# --- limits ---------------------------------------------------------------------------------------


def test_what_exceeds_a_limit_is_refused_before_anything_is_sent():
    async def test(cluster: FakeCluster, db: Database) -> None:
        sent = len(cluster.requests)
        long_key = bytes(limits.KEY_BYTES_MAX + 1)
        for error, call in [
            (KeyTooLarge, lambda: db.put(b"k" + long_key, b"")),
            (ValueTooLarge, lambda: db.put(b"k", BIG)),
            (InvalidArgument, lambda: db.put(b"", b"v")),
            (InvalidArgument, lambda: db.put(b"\xffx", b"v")),
            (InvalidArgument, lambda: db.put("k", b"v")),
            (InvalidArgument, lambda: db.put(b"k", "v")),
            (KeyTooLarge, lambda: db.get(long_key)),
            (InvalidArgument, lambda: db.get(b"")),
            (InvalidArgument, lambda: db.get_many([b"k", b""])),
            (InvalidArgument, lambda: db.get_many(b"keys")),
            (KeyTooLarge, lambda: db.delete(long_key)),
            (InvalidArgument, lambda: db.increment(b"k", 1 << 63)),
            (InvalidArgument, lambda: db.increment(b"k", 1.5)),
            (InvalidArgument, lambda: db.increment(b"k", 1, format="hex")),
            (ValueTooLarge, lambda: db.cas(b"k", None, BIG)),
            (InvalidArgument, lambda: db.delete_range(b"b", b"a")),
            (InvalidArgument, lambda: db.put(b"k", b"v", timeout=0)),
            (InvalidArgument, lambda: db.get(b"k", timeout=-1.0)),
            (InvalidArgument, lambda: db.put(b"k", b"v", if_version=-1)),
            (InvalidArgument, lambda: db.outcome("no token")),
        ]:
            with pytest.raises(error):
                await call()
        for scan in [
            lambda: db.scan(limit=-1),
            lambda: db.scan(b"b", b"a"),
            lambda: db.scan(b"a", prefix=b"b"),
            lambda: db.scan(prefix=b"\xff"),
            lambda: db.scan(at=0),
            lambda: db.scan(at=1 << 64),
        ]:
            with pytest.raises(InvalidArgument):
                scan()
        assert len(cluster.requests) == sent

    simulate(test)


def test_a_batch_beyond_the_limits_is_refused_before_anything_is_sent():
    async def test(cluster: FakeCluster, db: Database) -> None:
        megabyte = bytes(limits.VALUE_BYTES_MAX)
        with pytest.raises(TransactionTooLarge):  # in all
            async with db.batch() as batch:
                for number in range(9):
                    batch.put(b"%d" % number, megabyte)
        with pytest.raises(TransactionTooLarge):  # in one range
            async with db.batch() as batch:
                for number in range(5):
                    batch.put(b"a%d" % number, megabyte)
        with pytest.raises(TransactionTooLarge):
            async with db.batch() as batch:
                for number in range(limits.TXN_RANGE_ROWS_MAX + 1):
                    batch.put(b"%06d" % number, b"")
        assert cluster.of(Prepare) == []
        async with db.batch() as batch:  # as much, but in two ranges
            for number in range(3):
                batch.put(b"a%d" % number, megabyte)
                batch.put(b"z%d" % number, megabyte)
        await cluster.settled()
        assert len(cluster.data) == 6

    simulate(test, FakeCluster(b"m"))


def test_too_many_ranges_in_one_transaction_are_refused():
    splits = [b"k%03d" % number for number in range(limits.TXN_PARTICIPANTS_MAX)]

    async def test(cluster: FakeCluster, db: Database) -> None:
        with pytest.raises(TransactionTooLarge, match="129 ranges"):
            async with db.batch() as batch:
                for key in [b"a", *splits]:
                    batch.put(key, b"v")
        async with db.batch() as batch:
            for key in splits:
                batch.put(key, b"v")
        await cluster.settled()
        assert len(cluster.data) == 128

    simulate(test, FakeCluster(*splits))


# --- exactly once ---------------------------------------------------------------------------------


def test_a_lost_reply_is_learned_from_the_outcome_with_the_original_version():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.drop_replies(Prepare)
        cluster.ignore(Prepare, times=100, where=lambda request: len(cluster.of(Prepare)) > 1)
        version = await db.put(b"k", b"v", timeout=2.0)
        assert [each.ts for each in cluster.data[b"k"]] == [version]
        assert {each.txn_id for each in cluster.of(Outcome)} == {cluster.of(Prepare)[0].txn_id}
        assert len({prepare.txn_id for prepare in cluster.of(Prepare)}) == 1

    simulate(test)


def test_a_write_that_never_arrived_is_known_not_to_have_happened():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.ignore(Prepare, times=100)
        with pytest.raises(DeadlineExceeded) as caught:
            await db.put(b"k", b"v", timeout=2.0)
        assert not caught.value.maybe_committed
        assert now() <= 1002.01
        cluster.faults.clear()
        late = cluster.of(Prepare)[0]
        assert cluster._prepare(late).status != PartStatus.COMMITTED

    simulate(test)


def test_only_what_could_not_be_learned_in_time_is_unknown():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.drop_replies(Prepare, times=100)
        cluster.drop_replies(Outcome, times=100)
        began = now()
        with pytest.raises(CommitUnknown) as caught:
            await db.put(b"k", b"v", timeout=2.0)
        assert caught.value.maybe_committed
        assert not caught.value.retryable
        assert now() - began == pytest.approx(2.0, abs=0.02)

    simulate(test)


def test_a_write_that_was_never_sent_is_simply_unavailable():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await db.put(b"k", b"v")
        for node in cluster.nodes:
            cluster.stop_node(node)
        await asyncio.sleep(0.01)
        with pytest.raises(Unavailable):
            await db.put(b"k", b"v", timeout=0.5)

    simulate(test)


def test_a_record_that_is_no_longer_kept_is_said_so():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.fault(Prepare, lambda node, request: PrepareReply(request.id, PartStatus.EXPIRED, 0))
        cluster.fault(Outcome, lambda node, request: TxnReply(request.id, TxnStatus.EXPIRED))
        with pytest.raises(OutcomeExpired):
            await db.put(b"k", b"v")

    simulate(test)


def test_a_conflict_outside_a_transaction_is_hidden_by_another_attempt_under_a_new_id():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.refuse(FenceReason.CONFLICT, times=3)
        version = await db.put(b"k", b"v")
        prepares = cluster.of(Prepare)
        assert len({prepare.txn_id for prepare in prepares}) == 4
        assert len({prepare.age for prepare in prepares}) == 1  # it grows older, and wins in the end
        assert [each.ts for each in cluster.data[b"k"]] == [version]
        assert db.stats()["conflicts"] == 3

    simulate(test)


def test_conflicts_without_end_are_a_deadline_and_nothing_has_happened():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.refuse(FenceReason.CONFLICT, times=10_000)
        with pytest.raises(DeadlineExceeded, match="conflict at key b'k'"):
            await db.increment(b"k", timeout=1.0)
        assert now() <= 1001.0
        assert 10 < len(cluster.of(Prepare)) < 60

    simulate(test)


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        (FenceReason.COMPARE_FAILED, CompareFailed),
        (FenceReason.BAD_VALUE, InvalidArgument),
        (FenceReason.TOO_LARGE, TransactionTooLarge),
    ],
)
def test_refusals_for_a_reason_are_typed_and_not_repeated(reason: FenceReason, error: type[KVError]):
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.refuse(reason, version=77)
        with pytest.raises(error) as caught:
            await db.put(b"k", b"v")
        assert getattr(caught.value, "version", 77) == 77
        assert len(cluster.of(Prepare)) == 1

    simulate(test)


# --- many keys and spans --------------------------------------------------------------------------


def test_get_many_is_one_snapshot_over_ranges():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(a=b"1", b=b"2", z=b"3")
        cluster.fault(Read, lambda node, request: _write_between(cluster, node, request))
        found = await db.get_many([b"z", b"a", b"q", b"a", b"b"])
        assert found == {b"z": b"3", b"a": b"1", b"b": b"2"}
        first, *others = cluster.of(Read)
        assert first.at == 0
        assert len({read.at for read in others}) == 1
        assert others[0].at > 0

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


@given(st.integers(0, 2**32))
def test_scans_agree_with_a_sorted_list(seed: int):
    rng = random.Random(seed)
    keys = sorted({bytes(rng.choices(b"abc", k=rng.randint(1, 3))) for _ in range(20)})
    splits = sorted({bytes(rng.choices(b"abc", k=rng.randint(1, 2))) for _ in range(rng.randint(0, 4))})

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
        assert [read.at for read in cluster.of(Read)][0] == 0
        assert [request.at for request in cluster.of(Read)[1:]] == [cluster.ts]
        assert [request.at for request in cluster.of(Scan)] == [cluster.ts] * 2

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
        with pytest.raises(ZeroDivisionError):
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
        told = [each for each in cluster.of(Finalize) if each.txn_id == first.txn_id]
        hints = [each for each in cluster.of(Resolve) if each.txn_id == first.txn_id]
        assert [each.commit_ts for each in [*told, *hints]] == [0, 0]
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


def test_a_cancelled_commit_over_several_ranges_comes_to_its_end_by_itself():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await db.get(b"a")
        cluster.fail(Prepare, "throttled", {"retry_after_s": 0.3})

        async def work() -> None:
            async with db.batch() as batch:
                batch.put(b"a", b"1")
                batch.put(b"z", b"1")

        call = asyncio.ensure_future(work())
        await asyncio.sleep(0.1)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert len(cluster.parts) == 1
        await db.close()  # waits for it
        assert not cluster.parts
        assert len(cluster.data) == 2

    simulate(test, FakeCluster(b"m"))


def test_close_waits_for_such_a_commit_only_so_long():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.ignore(Prepare, times=100)

        async def work() -> None:
            async with db.batch() as batch:
                batch.put(b"a", b"1")
                batch.put(b"z", b"1")

        call = asyncio.ensure_future(work())
        await asyncio.sleep(0.1)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        began = now()
        await db.close()
        assert now() - began < 3.0

    simulate(test, FakeCluster(b"m"))


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


# --- outcome, life --------------------------------------------------------------------------------


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


def test_a_client_that_is_not_open_says_so():
    async def test(cluster: FakeCluster, db: Database) -> None:
        other = cluster.database()
        for call in (lambda: other.put(b"k", b"v"), lambda: other.get(b"k")):
            with pytest.raises(ClientClosed):
                await call()
        with pytest.raises(ClientClosed):
            other.transaction()
        await other.close()
        with pytest.raises(ClientClosed):
            await other.start()
        await db.close()
        await db.close()

    simulate(test)


def test_what_belongs_to_the_client_is_closed_with_it():
    closed: list[str] = []

    async def on_close() -> None:
        closed.append("network")

    async def test(cluster: FakeCluster, db: Database) -> None:
        async with cluster.database(on_close=on_close) as other:
            await other.put(b"k", b"v")
        assert closed == ["network"]

    simulate(test)


def _write_between(cluster: FakeCluster, node: int, request: Read) -> Failure | None:
    """Somebody writes everywhere while the first read's answer is on its way."""
    reply = cluster.handle(node, request)
    cluster.seed(a=b"x", b=b"x", q=b"x", z=b"x")
    return reply  # type: ignore[return-value]
