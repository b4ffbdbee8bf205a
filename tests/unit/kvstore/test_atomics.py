"""Claims of atomic operations and versionstamps as users call them: what they return, also when the answer is lost; that they
do not conflict as reads, but reading after one's own does; and what a transaction cannot read before its commit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import limits, operations
from kvstore.buffer import WriteBuffer, append_write, compare_clear_write, number_write
from kvstore.client import Database
from kvstore.errors import (
    CommitUnknown,
    CompareFailed,
    InvalidArgument,
    TransactionTooLarge,
    ValueTooLarge,
)
from kvstore.transactions import Transaction
from tests.unit.kvstore.fake_cluster import FakeCluster, simulate
from txn import atomics
from txn.messages import Prepare, Read
from txn.stamps import NUMBERS_MAX, stamp
from txn.types import Write, WriteKind

# --- one call, one transaction --------------------------------------------------------------------


@pytest.mark.parametrize("lost", [False, True])
def test_each_returns_what_came_of_it_whether_or_not_the_answer_is_lost(lost: bool):
    async def test(cluster: FakeCluster, db: Database) -> None:
        async def checked(work: Any, expected: Any) -> None:
            if lost:
                cluster.drop_replies(Prepare)
            assert await work == expected

        await db.put(b"warm", b"")
        await checked(db.min(b"n", 5), 5)
        await checked(db.min(b"n", 7), 5)
        await checked(db.max(b"n", 7), 7)
        await checked(db.max(b"i", -3, format="int64"), -3)
        await checked(db.append_if_fits(b"t", b"abc", 4), True)
        await checked(db.append_if_fits(b"t", b"de", 4), False)
        await checked(db.compare_and_clear(b"t", b"x"), False)
        await checked(db.compare_and_clear(b"t", b"abc"), True)
        await checked(db.compare_and_clear(b"t", b"abc"), False)
        assert cluster.value(b"n") == b"7"
        assert cluster.value(b"i") == b"\xff" * 7 + b"\xfd"
        assert cluster.value(b"t") is None
        assert bool(cluster.of(Read)) == lost

    simulate(test)


def test_none_of_them_reads():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await db.max(b"n", 1)
        await db.append_if_fits(b"t", b"x")
        await db.compare_and_clear(b"t", b"y")
        assert cluster.of(Read) == []
        assert all(not prepare.guards and not prepare.expects for prepare in cluster.of(Prepare))

    simulate(test)


def test_one_that_happened_and_whose_result_cannot_be_had_may_have_happened():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.drop_replies(Prepare)
        cluster.ignore(Read, 1000)
        with pytest.raises(CommitUnknown):
            await db.append_if_fits(b"t", b"x")
        assert cluster.value(b"t") == b"x"

    simulate(test)


def test_what_is_no_operand_is_refused_before_anything_is_sent():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.requests.clear()
        for call in (
            db.min(b"n", 1 << 63),
            db.max(b"n", "1"),  # type: ignore[arg-type]
            db.max(b"n", 1, format="float"),  # type: ignore[arg-type]
            db.append_if_fits(b"t", b"x", -1),
            db.append_if_fits(b"t", b"x", limits.VALUE_BYTES_MAX + 1),
            db.compare_and_clear(b"t", None),  # type: ignore[arg-type]
            db.put_versionstamped_key(b"", b"v"),
            db.put_versionstamped_key(b"\xff", b"v"),
            db.put_versionstamped_value(b"k", "text"),  # type: ignore[arg-type]
        ):
            with pytest.raises(InvalidArgument):
                await call
        with pytest.raises(ValueTooLarge):
            await db.put_versionstamped_value(b"k", bytes(limits.VALUE_BYTES_MAX - 9))
        assert cluster.requests == []

    simulate(test)


# --- in a transaction -----------------------------------------------------------------------------


def test_reading_after_ones_own_operation_guards_the_key_and_sees_it():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(n=b"5", t=b"ab", c=b"old")
        async with db.transaction() as tx:
            tx.max(b"n", 9)
            tx.increment(b"n", 1)
            tx.append_if_fits(b"t", b"c", 3)
            tx.append_if_fits(b"t", b"d", 3)
            tx.compare_and_clear(b"c", b"old")
            assert await tx.get_many([b"n", b"t", b"c"]) == {b"n": b"10", b"t": b"abc"}
            assert await tx.scan(keys_only=True).to_list() == [(b"n", b""), (b"t", b"")]
        guards = [guard.start for prepare in cluster.of(Prepare) for guard in prepare.guards]
        assert guards
        async with db.transaction() as tx:
            tx.max(b"n", 20)
            tx.compare_and_clear(b"t", b"abc")
        assert cluster.of(Prepare)[-1].guards == []
        assert (cluster.value(b"n"), cluster.value(b"t")) == (b"20", None)

    simulate(test)


NAMES = ["put", "delete", "clear", "add", "min", "max", "append", "compare"]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.integers(-5, 15)), max_size=12),
    st.sampled_from([None, b"5", b"-3", b"12"]),
)
def test_the_buffers_view_is_what_the_range_computes(
    plan: list[tuple[str, int]], before: bytes | None
):
    """The view of the transaction and the range's result of what it sends are one."""
    buffer, expected, failed = WriteBuffer(), before, False
    for name, number in plan:
        text = b"%d" % number
        write: Write | None = None
        if name == "put":
            buffer.put(b"k", text)
            expected = text
        elif name == "delete":
            buffer.delete(b"k")
            expected = None
        elif name == "clear":
            buffer.clear(b"a", b"z")
            expected = None
        elif name == "append":
            write = append_write(b"k", b"1", abs(number))
        elif name == "compare":
            write = compare_clear_write(b"k", expected if number % 2 and expected else text)
        else:
            write = number_write(b"k", name, number, "ascii")  # type: ignore[arg-type]
        if write is not None:
            try:
                expected = atomics.after(write.kind, write.value, expected).value
            except atomics.BadValue:
                failed = True
            try:
                buffer.atomic(write)
            except InvalidArgument:
                return  # over its own value it is seen at once
    value = before
    try:
        for sent in buffer.writes():
            if sent.kind in (WriteKind.DELETE_RANGE, WriteKind.DELETE):
                value = None
            elif sent.kind == WriteKind.PUT:
                value = sent.value
            else:
                value = atomics.after(sent.kind, sent.value, value).value
    except atomics.BadValue:
        assert failed
        return
    if not failed:
        assert value == expected


def test_operations_count_as_rows():
    buffer = WriteBuffer()
    write = append_write(b"k", b"x", 9)
    for _ in range(limits.TXN_ROWS_MAX):
        buffer.atomic(write)
    with pytest.raises(TransactionTooLarge):
        buffer.atomic(write)
    assert len(buffer.writes()) == limits.TXN_ROWS_MAX
    buffer.put(b"k", b"")
    buffer.put(b"other", b"")


# --- versionstamps --------------------------------------------------------------------------------


def test_a_stamp_is_the_commit_version_and_the_number_of_the_write():
    async def test(cluster: FakeCluster, db: Database) -> None:
        async with db.transaction() as tx:
            first = tx.put_versionstamped_key(b"q/", b"one")
            second = tx.put_versionstamped_value(b"last", b"at:")
            third = tx.put_versionstamped_key(b"q/", b"two")
            with pytest.raises(InvalidArgument):
                tx.versionstamp()
        version = tx.commit_version
        assert version is not None
        assert [first, second, third] == [0, 1, 2]
        assert tx.versionstamp(third) == stamp(version, 2)
        assert tx.versionstamp() == version.to_bytes(8, "big") + b"\x00\x00"
        assert await db.scan(prefix=b"q/").to_list() == [
            (b"q/" + tx.versionstamp(first), b"one"),
            (b"q/" + tx.versionstamp(third), b"two"),
        ]
        assert await db.get(b"last") == b"at:" + tx.versionstamp(second)

    simulate(test, FakeCluster(b"m"))


def test_a_client_and_a_batch_tell_what_they_have_written():
    async def test(cluster: FakeCluster, db: Database) -> None:
        keys = [await db.put_versionstamped_key(b"q/", b"%d" % number) for number in range(3)]
        assert keys == sorted(keys)
        assert [await db.get(key) for key in keys] == [b"0", b"1", b"2"]
        value = await db.put_versionstamped_value(b"last")
        assert await db.get(b"last") == value
        async with db.batch() as batch:
            number = batch.put_versionstamped_key(b"q/", b"3")
        assert await db.get(b"q/" + batch.versionstamp(number)) == b"3"

    simulate(test)


def test_a_lost_answer_is_learned_and_the_key_is_the_same():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await db.put(b"warm", b"")
        cluster.drop_replies(Prepare)
        key = await db.put_versionstamped_key(b"q/", b"v")
        assert await db.scan(prefix=b"q/").to_list() == [(key, b"v")]

    simulate(test)


def test_a_transaction_cannot_read_what_gets_its_stamp_at_the_commit():
    async def test(cluster: FakeCluster, db: Database) -> None:
        old = await db.put_versionstamped_key(b"q/", b"old")
        async with db.transaction() as tx:
            tx.put_versionstamped_key(b"q/", b"new")
            tx.put_versionstamped_value(b"last")
            assert await tx.scan(prefix=b"q/", limit=1).to_list() == [(old, b"old")]
            assert await tx.get(old) == b"old"
            with pytest.raises(InvalidArgument):
                await tx.scan(prefix=b"q/").to_list()
            with pytest.raises(InvalidArgument):
                await tx.get(b"last")
            with pytest.raises(InvalidArgument):
                tx.increment(b"last")

    simulate(test)


def test_a_transaction_has_no_more_stamps_than_there_are_numbers():
    buffer = WriteBuffer()
    for number in range(NUMBERS_MAX):
        assert buffer.stamp_value(b"k", b"") == number
    for refused in (
        lambda: buffer.stamp_value(b"k", b""),
        lambda: buffer.stamp_key(b"q/", b""),
    ):
        with pytest.raises(TransactionTooLarge):
            refused()
    assert len(buffer.writes()) == 1


def test_what_is_locked_and_older_than_a_stamp_is_read_after_it():
    async def test(cluster: FakeCluster, db: Database) -> None:
        old = await db.put_versionstamped_key(b"q/", b"old")
        async with db.transaction() as tx:
            tx.put_versionstamped_key(b"q/", b"new")
            assert await tx.get_for_update(old) == b"old"
            assert await tx.get(old) == b"old"
            with pytest.raises(InvalidArgument):
                await tx.get_for_update(b"q/" + b"\xff" * 10)

    simulate(test)


def test_what_can_follow_a_prefix_must_lie_in_one_range():
    async def test(cluster: FakeCluster, db: Database) -> None:
        with pytest.raises(InvalidArgument, match="one range"):
            await db.put_versionstamped_key(b"q", b"v")
        await db.put_versionstamped_key(b"q\xf0", b"v")

    simulate(test, FakeCluster(b"q\x80"))


def test_operations_of_the_gateway_have_all_of_them():
    async def test(cluster: FakeCluster, db: Database) -> None:
        wanted: list[operations.Operation] = [
            operations.Min(b"n", 5),
            operations.Max(b"n", 7),
            operations.AppendIfFits(b"t", b"ab", 2),
            operations.CompareAndClear(b"t", b"ab"),
            operations.PutVersionstampedKey(b"q/", b"v"),
            operations.PutVersionstampedValue(b"last", b"x"),
        ]
        done: list[Transaction] = []

        async def work(tx: Transaction) -> list[dict[str, Any]]:
            done[:] = [tx]
            return await operations.run_operations(tx, wanted)

        assert await db.run(work) == [{}, {}, {}, {}, {"number": 0}, {"number": 1}]
        assert await db.get_many([b"n", b"t", b"last"]) == {
            b"n": b"7",
            b"last": b"x" + done[0].versionstamp(1),
        }

    simulate(test)


@pytest.mark.parametrize("lock", [None, "exclusive"])
def test_a_check_that_fails_tells_the_version_that_was_committed(lock: Any):
    """Which is not what the transaction itself has written."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        version = await db.put(b"k", b"1")
        await db.put(b"gone", b"1")
        await db.delete(b"gone")
        for key, present in ((b"k", version), (b"gone", 0), (b"never", 0)):
            wanted: list[operations.Operation] = [
                operations.Get(key, lock),
                operations.Put(key, b"mine"),
                operations.Check(key, b"other"),
            ]
            with pytest.raises(CompareFailed) as raised:
                async with db.transaction() as tx:
                    await operations.run_operations(tx, wanted)
            assert raised.value.version == present
            assert cluster.value(key) == (b"1" if present else None)

    simulate(test)


def test_numbers_of_writes_differ():
    buffer = WriteBuffer()
    numbers = [
        buffer.stamp_key(b"q", b""),
        buffer.stamp_value(b"k", b""),
        buffer.stamp_key(b"q", b""),
    ]
    assert all(one < two for one, two in itertools.pairwise(numbers))
