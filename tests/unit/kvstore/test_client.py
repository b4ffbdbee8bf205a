"""Claims of `Database`: what is refused before anything is sent, what each call returns and raises, that a write happens
once whatever is lost, and that what one call reads is one snapshot."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvstore import limits
from kvstore.client import Database
from kvstore.errors import (
    CommitUnknown,
    CompareFailed,
    CorruptionError,
    DeadlineExceeded,
    InvalidArgument,
    KeyTooLarge,
    KVError,
    OutcomeExpired,
    TransactionClosed,
    TransactionTooLarge,
    Unavailable,
    ValueTooLarge,
)
from kvstore.transactions import Committed, encode_token
from tests.unit.kvstore.fake_cluster import FakeCluster, simulate
from txn.messages import (
    Ack,
    GetTimestamps,
    Outcome,
    Prepare,
    PrepareReply,
    Read,
    TxnReply,
)
from txn.types import ExpectKind, FenceReason, PartStatus, TxnStatus, begin_ts_of

BIG = bytes(limits.VALUE_BYTES_MAX + 1)
TOO_LONG = 10**400  # seconds that no float holds
TEXT: Any = "5"


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


def test_begin_ts_is_not_that_of_an_old_outcome():
    """Below the outcome horizon soon: what began there cannot be told from what is forgotten."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        token = encode_token(b"\x00" * 16, b"k")
        cluster.records[b"\x00" * 16] = TxnStatus.COMMITTED, 7 << 18
        assert await db.outcome(token) == Committed(7 << 18)
        await db.put(b"k", b"v")
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


def test_an_increment_whose_answer_was_lost_is_computed_from_what_was_there_before_it():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await db.increment(b"a", 5)
        cluster.drop_replies(Prepare)
        assert await db.increment(b"a", 2) == 7
        assert cluster.value(b"a") == b"7"
        assert cluster.of(Read)[-1].at == cluster.data[b"a"][-1].ts - 1

    simulate(test)


def test_an_increment_that_happened_and_cannot_be_read_back_may_have_happened():
    """Its answer was lost, its outcome is known, and then the new number cannot be had in time."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.drop_replies(Prepare)
        cluster.ignore(Read, 1000)
        with pytest.raises(CommitUnknown, match="it was done") as raised:
            await db.increment(b"a", 5)
        assert raised.value.maybe_committed
        assert cluster.value(b"a") == b"5"

    simulate(test)


# --- limits ---------------------------------------------------------------------------------------


def test_what_exceeds_a_limit_is_refused_before_anything_is_sent():
    async def test(cluster: FakeCluster, database: Database) -> None:
        sent = len(cluster.requests)
        db: Any = database
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
            (InvalidArgument, lambda: db.get_many([b"k", bytearray(b"k")])),
            (InvalidArgument, lambda: db.get_many([b"k", memoryview(b"k")])),
            (KeyTooLarge, lambda: db.delete(long_key)),
            (InvalidArgument, lambda: db.increment(b"k", 1 << 63)),
            (InvalidArgument, lambda: db.increment(b"k", 1.5)),
            (InvalidArgument, lambda: db.increment(b"k", 1, format="hex")),
            (ValueTooLarge, lambda: db.cas(b"k", None, BIG)),
            (InvalidArgument, lambda: db.delete_range(b"b", b"a")),
            (InvalidArgument, lambda: db.put(b"k", b"v", timeout=0)),
            (InvalidArgument, lambda: db.get(b"k", timeout=-1.0)),
            (InvalidArgument, lambda: db.put(b"k", b"v", timeout=TOO_LONG)),
            (InvalidArgument, lambda: db.get(b"k", timeout=TOO_LONG)),
            (InvalidArgument, lambda: db.get(b"k", timeout=TEXT)),
            (InvalidArgument, lambda: db.get(b"k", timeout=float("nan"))),
            (InvalidArgument, lambda: db.transaction().get_for_update(b"k", timeout=TOO_LONG)),
            (InvalidArgument, lambda: db.transaction().get_for_update(b"k", timeout=-1)),
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
            lambda: db.transaction(timeout=TOO_LONG),
            lambda: db.snapshot(timeout=TOO_LONG),
            lambda: db.watch(key=b"k", timeout=TOO_LONG),
            lambda: cluster.database(TOO_LONG),
        ]:
            with pytest.raises(InvalidArgument):
                scan()
        assert len(cluster.requests) == sent

    simulate(test)


class Text(bytes):
    """As numpy's bytes_: it is bytes, and a message cannot hold it."""


def test_an_argument_that_no_message_can_hold_takes_no_other_call_along():
    async def test(cluster: FakeCluster, db: Database) -> None:
        odd, plain = await asyncio.gather(
            db.put(b"k", Text(b"v")), db.put(b"a", b"1"), return_exceptions=True
        )
        assert isinstance(odd, InvalidArgument)
        assert isinstance(plain, int)
        assert await db.get(b"a") == b"1"

    simulate(test)


class Seconds(float):
    """As numpy's float64."""


def test_arguments_of_nearly_the_right_type_are_understood_or_refused_and_end_no_connection():
    async def test(cluster: FakeCluster, database: Database) -> None:
        db: Any = database
        cluster.seed(a=b"1", b=b"2")
        for priority in ("high", 1.5, True, 1_001, -1_001):
            with pytest.raises(InvalidArgument):
                db.transaction(priority=priority)
        assert await db.scan(reverse=1, keys_only=1).to_list() == [(b"b", b""), (b"a", b"")]
        async with db.transaction(timeout=Seconds(3.0)) as tx:
            assert await tx.scan(reverse=1).to_list() == [(b"b", b"2"), (b"a", b"1")]
            assert await tx.get_for_update(b"a", shared=1, timeout=Seconds(1.0)) == b"1"
        assert not any(pipe.closed for pipe in cluster.network.pipes)

    simulate(test)


def test_a_write_to_a_batch_whose_block_has_ended_is_refused_and_not_lost():
    async def test(cluster: FakeCluster, db: Database) -> None:
        async with db.batch() as batch:
            batch.put(b"a", b"1")
        for write in (
            lambda: batch.put(b"b", b"2"),
            lambda: batch.delete(b"a"),
            lambda: batch.delete_range(b"a", b"b"),
            lambda: batch.increment(b"n"),
            lambda: batch.put_versionstamped_key(b"q/", b"3"),
        ):
            with pytest.raises(TransactionClosed):
                write()
        with pytest.raises(ZeroDivisionError):
            async with db.batch() as failed:
                raise ZeroDivisionError
        with pytest.raises(TransactionClosed):
            failed.put(b"b", b"2")
        assert await db.scan().to_list() == [(b"a", b"1")]

    simulate(test)


def test_a_batch_beyond_the_limits_is_refused_before_anything_is_sent():
    async def test(cluster: FakeCluster, db: Database) -> None:
        megabyte = bytes(limits.VALUE_BYTES_MAX)
        with pytest.raises(TransactionTooLarge):  # noqa: PT012 - the end of the block is what raises
            async with db.batch() as batch:
                for number in range(9):
                    batch.put(b"%d" % number, megabyte)
        with pytest.raises(TransactionTooLarge):  # noqa: PT012 - the end of the block is what raises
            async with db.batch() as batch:
                for number in range(5):
                    batch.put(b"a%d" % number, megabyte)
        with pytest.raises(TransactionTooLarge):  # noqa: PT012 - the end of the block is what raises
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
        with pytest.raises(TransactionTooLarge, match="129 ranges"):  # noqa: PT012 - the end of the block is what raises
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
        reply = cluster.handle(cluster.ranges[0].leader_node, late)
        assert isinstance(reply, PrepareReply)
        assert reply.status != PartStatus.COMMITTED

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


def test_the_id_of_a_transaction_that_first_deletes_from_behind_the_longest_key_can_be_asked_for():
    async def test(cluster: FakeCluster, db: Database) -> None:
        async with db.transaction() as tx:
            tx.delete_range(b"k" * limits.KEY_BYTES_MAX + b"\x00", b"l")
            token = tx.id
        assert await db.outcome(token) == Committed(tx.commit_version or 0)

    simulate(test)


def test_a_record_that_is_no_longer_kept_is_said_so():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.fault(
            Prepare, lambda node, request: PrepareReply(request.id, PartStatus.EXPIRED, 0)
        )
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
        assert (
            len({prepare.age for prepare in prepares}) == 1
        )  # it grows older, and wins in the end
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
def test_refusals_for_a_reason_are_typed_and_not_repeated(
    reason: FenceReason, error: type[KVError]
):
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.refuse(reason, version=77)
        with pytest.raises(error) as caught:
            await db.put(b"k", b"v")
        assert getattr(caught.value, "version", 77) == 77
        assert len(cluster.of(Prepare)) == 1

    simulate(test)


@pytest.mark.parametrize("status", [PartStatus.PREPARED, PartStatus.COMMITTED])
def test_answers_that_contradict_each_other_are_corruption_and_nobody_hangs(status: PartStatus):
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.fault(Prepare, lambda node, request: PrepareReply(request.id, status, 0))
        with pytest.raises(CorruptionError) as caught:
            await _write_two(db)
        assert caught.value.maybe_committed

    simulate(test, FakeCluster(b"m"))


def test_an_answer_of_the_wrong_kind_says_nothing_and_the_anchor_is_asked():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.fault(Prepare, lambda node, request: Ack(request.id))
        with pytest.raises(CorruptionError):
            await _write_two(db)
        assert len(cluster.of(Outcome)) == 1
        assert cluster.data == {}

    simulate(test, FakeCluster(b"m"))


async def _write_two(db: Database) -> None:
    async with db.batch() as batch:
        batch.put(b"a", b"1")
        batch.put(b"z", b"1")
