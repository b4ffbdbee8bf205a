"""Claims of transactions: they read one snapshot and their own writes, guard what they read and no more, commit once or
not at all, and are run again only when that helps. A plain dict judges the overlay."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import limits
from kvstore.client import Database
from kvstore.errors import (
    CommitUnknown,
    Conflict,
    DeadlineExceeded,
    InvalidArgument,
    KeyTooLarge,
    TransactionClosed,
    TransactionTooLarge,
    TransactionTooOld,
    ValueTooLarge,
)
from kvstore.transactions import Transaction, decode_token
from tests.unit.kvstore.fake_cluster import FakeCluster, simulate
from txn.messages import GetTimestamps, LockRead, Outcome, Prepare, Read, Scan, ScanReply
from txn.types import FenceReason, Write, WriteKind


def now() -> float:
    return asyncio.get_running_loop().time()


def guards(cluster: FakeCluster) -> list[tuple[bytes, bytes]]:
    """The spans guarded by the latest attempt."""
    last = cluster.of(Prepare)[-1].txn_id
    found = [
        (guard.start, guard.end)
        for prepare in cluster.of(Prepare)
        if prepare.txn_id == last
        for guard in prepare.guards
    ]
    return sorted(dict.fromkeys(found))


# --- one snapshot, own writes ---------------------------------------------------------------------


def test_a_transaction_reads_what_it_wrote():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(a=b"1", b=b"2", n=b"10")
        async with db.transaction() as tx:
            tx.put(b"a", b"x")
            tx.delete(b"b")
            tx.increment(b"n", 5)
            assert await tx.get(b"a") == b"x"
            assert await tx.get(b"b") is None
            assert await tx.get(b"b", b"none") == b"none"
            assert await tx.get(b"n") == b"15"
            assert await tx.get_many([b"a", b"b", b"n", b"q"]) == {b"a": b"x", b"n": b"15"}
            assert await tx.scan().to_list() == [(b"a", b"x"), (b"n", b"15")]
            assert cluster.of(Prepare) == []
        assert await db.get_many([b"a", b"b", b"n"]) == {b"a": b"x", b"n": b"15"}

    simulate(test)


def test_reading_ones_own_writes_asks_nobody_and_guards_nothing():
    async def test(cluster: FakeCluster, db: Database) -> None:
        async with db.transaction() as tx:
            tx.put(b"a", b"x")
            tx.delete_range(b"c", b"e")
            assert await tx.get(b"a") == b"x"
            assert await tx.get_many([b"c", b"d"]) == {}
        assert cluster.of(Read) == []
        assert guards(cluster) == []

    simulate(test)


def test_deleted_ranges_overlay_reads_and_later_writes_win():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(a=b"1", b=b"2", c=b"3", d=b"4")
        async with db.transaction() as tx:
            tx.put(b"bb", b"gone")
            tx.delete_range(b"b", b"d")
            tx.put(b"c", b"new")
            tx.increment(b"b", 7)
            assert await tx.scan().to_list() == [
                (b"a", b"1"), (b"b", b"7"), (b"c", b"new"), (b"d", b"4"),
            ]  # fmt: skip
            assert await tx.scan(reverse=True, limit=2).to_list() == [(b"d", b"4"), (b"c", b"new")]
            assert await tx.get(b"bb") is None
        (prepare,) = cluster.of(Prepare)
        assert prepare.writes[0] == Write(WriteKind.DELETE_RANGE, b"b", b"d")
        assert (await db.scan().to_list())[1:3] == [(b"b", b"7"), (b"c", b"new")]

    simulate(test)


def test_all_reads_see_one_snapshot_whoever_writes_meanwhile():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(a=b"1", z=b"1")
        async with db.transaction(read_only=True) as tx:
            assert await tx.get(b"a") == b"1"
            await db.put(b"z", b"2")
            await db.put(b"y", b"2")
            assert await tx.get(b"z") == b"1"
            assert await tx.get_many([b"y", b"z"]) == {b"z": b"1"}
            assert await tx.scan().to_list() == [(b"a", b"1"), (b"z", b"1")]
            assert tx.read_version == cluster.of(Read)[-1].at
        assert tx.commit_version is None
        assert {request.at for request in cluster.of(Scan)} == {tx.read_version}

    simulate(test, FakeCluster(b"m"))


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_the_overlay_agrees_with_a_dict(seed: int):
    """Random writes and reads of one transaction, over random ranges; then the store is what the dict is."""
    rng = random.Random(seed)

    def key() -> bytes:
        return bytes(rng.choices(b"abc", k=rng.randint(1, 2)))

    model = {key(): b"%d" % number for number in range(6)}
    splits = sorted({key() for _ in range(rng.randint(0, 3))})

    async def check(tx: Transaction) -> None:
        low, high = sorted((key(), key()))
        limit = rng.choice([None, 1, 2])
        reverse = rng.random() < 0.5
        wanted = sorted((k, v) for k, v in model.items() if low <= k < high)
        wanted = wanted[::-1] if reverse else wanted
        assert await tx.scan(low, high, reverse=reverse, limit=limit).to_list() == wanted[:limit]
        keys = await tx.scan(low, high, reverse=reverse, limit=limit, keys_only=True).to_list()
        assert keys == [(k, b"") for k, _ in wanted][:limit]
        probe = [key() for _ in range(3)]
        assert await tx.get_many(probe) == {k: model[k] for k in probe if k in model}

    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.page_rows_max = rng.randint(1, 4)
        cluster.seed(**{k.decode(): v for k, v in model.items()})
        async with db.transaction() as tx:
            for _ in range(12):
                kind = rng.randrange(5)
                if kind == 0:
                    one, value = key(), b"%d" % rng.randint(0, 99)
                    tx.put(one, value)
                    model[one] = value
                elif kind == 1:
                    one = key()
                    tx.delete(one)
                    model.pop(one, None)
                elif kind == 2:
                    low, high = sorted((key(), key()))
                    tx.delete_range(low, high)
                    for k in [k for k in model if low <= k < high]:
                        del model[k]
                elif kind == 3:
                    one, by = key(), rng.randint(-9, 9)
                    tx.increment(one, by)
                    model[one] = b"%d" % (int(model.get(one, b"0")) + by)
                else:
                    await check(tx)
            await check(tx)
        await cluster.settled()
        assert dict(await db.scan().to_list()) == model

    simulate(test, FakeCluster(*splits))


# --- guards ---------------------------------------------------------------------------------------


def test_what_was_read_is_guarded_at_the_read_version():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(a=b"1", b=b"2", p=b"3")
        async with db.transaction() as tx:
            await tx.get(b"a")
            await tx.get(b"missing")
            await tx.get_many([b"x", b"y"])
            await tx.scan(b"p", b"r").to_list()
            tx.put(b"k", b"v")
        assert guards(cluster) == [
            (b"a", b"a\x00"),
            (b"missing", b"missing\x00"),
            (b"p", b"r"),
            (b"x", b"x\x00"),
            (b"y", b"y\x00"),
        ]
        assert {guard.read_ts for guard in cluster.of(Prepare)[-1].guards} == {tx.read_version}

    simulate(test)


def test_a_limited_scan_guards_up_to_the_last_key_returned_and_a_reverse_one_from_it():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(a=b"1", c=b"2", e=b"3", g=b"4")
        async with db.transaction() as tx:
            await tx.scan(b"a", b"z", limit=2).to_list()
            tx.put(b"k", b"v")
        assert guards(cluster) == [(b"a", b"c\x00")]
        async with db.transaction() as tx:
            await tx.scan(b"a", b"z", limit=2, reverse=True).to_list()
            tx.put(b"b", b"v")
        assert guards(cluster) == [(b"g", b"z")]
        async with db.transaction() as tx:
            await tx.scan(b"a", b"z", limit=100).to_list()  # it met the end: that is guarded too
            tx.put(b"k", b"v")
        assert guards(cluster) == [(b"a", b"z")]

    simulate(test)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_of_short_and_empty_pages_keeps_its_limit_and_guards_all_that_it_looked_at(reverse):
    async def test(cluster: FakeCluster, db: Database) -> None:
        at = cluster.seed(a=b"1", c=b"2", e=b"3", g=b"4")
        cluster.page_rows_max = 1

        def empty(_node: int, request: Scan) -> ScanReply:
            return ScanReply(request.id, at, [], [], [], False, b"f" if reverse else b"b")

        cluster.fault(Scan, empty)
        async with db.transaction() as tx:
            rows = await tx.scan(b"a", b"g", limit=2, reverse=reverse).to_list()
            tx.put(b"k", b"v")
        wanted = [(b"e", b"3"), (b"c", b"2")] if reverse else [(b"c", b"2"), (b"e", b"3")]
        assert rows == wanted
        assert guards(cluster) == ([(b"c", b"g")] if reverse else [(b"a", b"e\x00")])

    simulate(test)


def test_rows_hidden_by_own_deletes_are_guarded_with_what_follows():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(a=b"1", b=b"2", c=b"3")
        async with db.transaction() as tx:
            tx.delete(b"a")
            assert await tx.scan(limit=1).to_list() == [(b"b", b"2")]
        assert guards(cluster) == [(b"", b"b\x00")]

    simulate(test)


@pytest.mark.parametrize("reverse", [False, True])
def test_rows_hidden_by_own_deletes_are_not_asked_for_one_by_one(reverse: bool):
    """Four times as many with each page, and guarded is what is before the row that is returned, as ever."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(**{f"k{number:02}": b"v" for number in range(60)})
        async with db.transaction() as tx:
            for _ in range(30):
                ((key, _),) = await tx.scan(prefix=b"k", limit=1, reverse=reverse).to_list()
                tx.delete(key)
            assert len(cluster.of(Scan)) == 1 + 4 * 2 + 16 * 3 + 9 * 4
            await tx.rollback()
        cluster.requests.clear()
        async with db.transaction() as tx:
            if reverse:
                tx.delete_range(b"k10", b"z")
            else:
                tx.delete_range(b"k", b"k50")
            ((key, _),) = await tx.scan(prefix=b"k", limit=1, reverse=reverse).to_list()
        assert key == (b"k09" if reverse else b"k50")
        assert [scan.rows_max for scan in cluster.of(Scan)] == [1, 4, 16, 64]
        assert guards(cluster) == [(b"k09", b"l") if reverse else (b"k", b"k50\x00")]

    simulate(test)


def test_a_guard_over_ranges_goes_to_each_and_makes_it_a_participant():
    async def test(cluster: FakeCluster, db: Database) -> None:
        async with db.transaction() as tx:
            await tx.scan(b"a", b"z").to_list()
            tx.put(b"k", b"v")
            tx.put(b"x", b"v")
        prepares = sorted(cluster.of(Prepare), key=lambda each: each.locus)
        assert [(each.locus, [(g.start, g.end) for g in each.guards]) for each in prepares] == [
            (b"a", [(b"a", b"g")]),
            (b"k", [(b"g", b"p")]),
            (b"x", [(b"p", b"z")]),
        ]
        anchor = prepares[1]
        assert anchor.anchor_key == b"k"
        assert [(each.start, each.end) for each in anchor.participants] == [
            (b"g", b"p"),
            (b"p", b"z"),
            (b"a", b"g"),
        ]

    simulate(test, FakeCluster(b"g", b"p"))


def test_where_one_range_is_written_what_was_read_in_others_goes_with_its_part():
    async def test(cluster: FakeCluster, db: Database) -> None:
        async with db.transaction() as tx:
            await tx.scan(b"a", b"z").to_list()
            tx.put(b"k", b"v")
        (prepare,) = cluster.of(Prepare)
        assert prepare.one_range
        assert prepare.participants == []
        assert [(g.start, g.end) for g in prepare.guards] == [(b"g", b"p")]
        elsewhere = [[(g.start, g.end) for g in guards] for guards in prepare.elsewhere]
        assert elsewhere == [[(b"a", b"g")], [(b"p", b"z")]]

    simulate(test, FakeCluster(b"g", b"p"))


def test_a_later_attempt_guards_in_the_log_what_it_reads_elsewhere():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(a=b"1")
        attempts = 0

        async def fn(tx: Transaction) -> None:
            nonlocal attempts
            attempts += 1
            await tx.get(b"a")
            tx.put(b"k", b"v")
            if attempts == 1:
                await db.put(b"a", b"2")

        await db.run(fn)
        await cluster.settled()
        prepares = [each for each in cluster.of(Prepare) if each.locus == b"k"]
        assert [(each.one_range, len(each.elsewhere)) for each in prepares] == [
            (True, 1),
            (False, 0),
        ]

    simulate(test, FakeCluster(b"g", b"p"))


def test_add_read_conflict_guards_a_key_or_a_span_unread():
    async def test(cluster: FakeCluster, db: Database) -> None:
        async with db.transaction() as tx:
            tx.add_read_conflict(b"a")
            tx.add_read_conflict(b"c", b"e")
            tx.put(b"k", b"v")
        assert guards(cluster) == [(b"a", b"a\x00"), (b"c", b"e")]

    simulate(test)


def test_increments_that_were_not_read_guard_nothing_and_so_never_conflict():
    async def test(cluster: FakeCluster, db: Database) -> None:
        one, two = db.transaction(), db.transaction()
        one.increment(b"n", 1)
        two.increment(b"n", 2)
        await one.commit()
        await two.commit()
        assert await db.get(b"n") == b"3"
        async with db.transaction() as tx:
            tx.increment(b"n", 1)
            await tx.get(b"n")
        assert guards(cluster) == [(b"n", b"n\x00")]

    simulate(test)


def test_a_transaction_that_wrote_nothing_sends_nothing_to_commit():
    async def test(cluster: FakeCluster, db: Database) -> None:
        async with db.transaction() as tx:
            await tx.get(b"a")
        assert cluster.of(Prepare) == []
        assert tx.commit_version is None

    simulate(test)


def test_a_conflict_names_the_key_the_other_and_its_version():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await db.put(b"a", b"1")
        with pytest.raises(Conflict) as caught:  # noqa: PT012 - the end of the block is what raises
            async with db.transaction() as tx:
                await tx.get(b"a")
                theirs = await db.put(b"a", b"2")
                tx.put(b"b", b"x")
        error = caught.value
        assert (error.key, error.their_version) == (b"a", theirs)
        assert error.other_txn == cluster.data[b"a"][-1].txn_id
        assert error.retryable
        assert await db.get(b"b") is None
        with pytest.raises(TransactionClosed):
            await tx.commit()

    simulate(test)


def test_write_skew_does_not_happen():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(a=b"1", z=b"1")
        one, two = db.transaction(), db.transaction()
        for tx, other in ((one, b"z"), (two, b"a")):
            assert len(await tx.scan().to_list()) == 2
            tx.delete(other)
        outcomes = await asyncio.gather(one.commit(), two.commit(), return_exceptions=True)
        await cluster.settled()
        assert sum(isinstance(each, Conflict) for each in outcomes) >= 1
        assert len(await db.scan().to_list()) >= 1

    simulate(test, FakeCluster(b"m"))


def test_a_user_exception_rolls_back_and_nothing_is_sent():
    async def test(cluster: FakeCluster, db: Database) -> None:
        with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the end of the block is what raises
            async with db.transaction() as tx:
                tx.put(b"a", b"1")
                raise ZeroDivisionError
        assert cluster.of(Prepare) == []
        with pytest.raises(TransactionClosed):
            tx.put(b"a", b"1")
        with pytest.raises(TransactionClosed):
            await tx.get(b"a")

    simulate(test)


def test_a_lost_commit_is_learned_and_told_with_its_version():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.drop_replies(Prepare, times=100)
        async with db.transaction(timeout=2.0) as tx:
            tx.put(b"a", b"1")
        assert tx.commit_version == cluster.data[b"a"][-1].ts
        cluster.drop_replies(Outcome, times=100)
        with pytest.raises(CommitUnknown):
            async with db.transaction(timeout=2.0) as tx:
                tx.put(b"a", b"2")
        assert tx.commit_version is None

    simulate(test)


def test_the_id_of_an_unknown_commit_is_that_of_its_last_attempt():
    """The first attempt was given up and is aborted for ever: an outcome asked by its id would say so of both."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.refuse(FenceReason.RECOVERY)
        cluster.drop_replies(Prepare, times=100)
        cluster.drop_replies(Outcome, times=100)
        tx = db.transaction(timeout=2.0)
        with pytest.raises(CommitUnknown):
            async with tx:
                tx.put(b"a", b"1")
        attempts = list(dict.fromkeys(each.txn_id for each in cluster.of(Prepare)))
        assert len(attempts) == 2
        assert decode_token(tx.id) == (attempts[1], b"a")

    simulate(test)


def test_its_timeout_is_for_the_whole_transaction():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.ignore(Read, times=100)
        began = now()
        with pytest.raises(DeadlineExceeded):  # noqa: PT012 - the end of the block is what raises
            async with db.transaction(timeout=1.0) as tx:
                await asyncio.sleep(0.6)
                await tx.get(b"a")
        assert now() - began == pytest.approx(1.0, abs=0.02)

    simulate(test)


def test_a_lock_of_a_silent_leader_is_not_waited_for_beyond_its_timeout():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.ignore(LockRead, times=100)
        began = now()
        with pytest.raises(DeadlineExceeded):
            async with db.transaction(timeout=1.0) as tx:
                await tx.get_for_update(b"a")
        assert now() - began == pytest.approx(1.0, abs=0.02)

    simulate(test)


def test_a_transaction_that_could_not_begin_is_not_kept_for_an_open_one():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.ignore(GetTimestamps, times=100)
        with pytest.raises(DeadlineExceeded):
            async with db.transaction(timeout=1.0):
                pass
        assert db._views is not None
        assert len(db._views) == 0

    simulate(test)


def test_a_transaction_open_for_too_long_is_too_old():
    async def test(cluster: FakeCluster, db: Database) -> None:
        with pytest.raises(TransactionTooOld) as caught:  # noqa: PT012 - the end of the block is what raises
            async with db.transaction() as tx:
                tx.put(b"a", b"1")
                await asyncio.sleep(limits.TXN_AGE_S_MAX + 1)
        assert caught.value.retryable
        cluster.fail(Read, "snapshot_too_old")
        with pytest.raises(TransactionTooOld):
            async with db.transaction() as tx:
                await tx.get(b"a")

    simulate(test)


def test_its_id_exists_from_the_first_write_and_is_that_of_the_commit():
    async def test(cluster: FakeCluster, db: Database) -> None:
        async with db.transaction() as tx:
            with pytest.raises(InvalidArgument):
                assert tx.id
            tx.put(b"k", b"v")
            tx.put(b"a", b"v")
            token = tx.id
        assert tx.id == token
        txn_id, anchor_key = decode_token(token)
        assert anchor_key == b"k"
        assert {prepare.txn_id for prepare in cluster.of(Prepare)} == {txn_id}

    simulate(test, FakeCluster(b"g"))


def test_an_attempt_whose_id_was_told_is_not_tried_again_under_another():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await db.get(b"a")
        cluster.set_ranges(b"b", version=2)
        with pytest.raises(Conflict):  # noqa: PT012 - the end of the block is what raises
            async with db.transaction() as tx:
                tx.put(b"a", b"1")
                tx.put(b"c", b"1")
                assert tx.id
        cluster.set_ranges(version=3)
        await db.get(b"a")
        cluster.set_ranges(b"b", version=4)
        async with db.transaction() as tx:
            tx.put(b"a", b"1")
            tx.put(b"c", b"1")
        assert tx.commit_version

    simulate(test)


# --- limits ---------------------------------------------------------------------------------------


def test_limits_are_refused_as_soon_as_they_are_met():
    async def test(cluster: FakeCluster, db: Database) -> None:
        tx = db.transaction()
        for error, call in [
            (KeyTooLarge, lambda: tx.put(bytes(limits.KEY_BYTES_MAX + 1), b"")),
            (InvalidArgument, lambda: tx.put(b"\xff", b"")),
            (ValueTooLarge, lambda: tx.put(b"k", bytes(limits.VALUE_BYTES_MAX + 1))),
            (InvalidArgument, lambda: tx.delete(b"")),
            (InvalidArgument, lambda: tx.delete_range(b"b", b"a")),
            (InvalidArgument, lambda: tx.increment(b"k", 1, format="roman")),  # type: ignore[arg-type]
            (InvalidArgument, lambda: tx.scan(limit=-1)),
        ]:
            with pytest.raises(error):
                call()
        for number in range(limits.TXN_ROWS_MAX):
            tx.put(b"%d" % number, b"")
        with pytest.raises(TransactionTooLarge):
            tx.put(b"k", b"")
        tx.put(b"0", b"again")  # a row that is there already
        await tx.rollback()
        large = db.transaction()
        for number in range(7):
            large.put(b"%d" % number, bytes(limits.VALUE_BYTES_MAX))
        large.put(b"0", b"")
        large.put(b"8", bytes(limits.VALUE_BYTES_MAX))
        with pytest.raises(TransactionTooLarge):
            large.put(b"9", bytes(limits.VALUE_BYTES_MAX))
        assert cluster.of(Prepare) == []

    simulate(test)


def test_read_only_transactions_refuse_writes():
    async def test(cluster: FakeCluster, db: Database) -> None:
        async with db.transaction(read_only=True) as tx:
            for write in (
                lambda: tx.put(b"k", b""),
                lambda: tx.delete(b"k"),
                lambda: tx.delete_range(b"a", b"b"),
                lambda: tx.increment(b"k"),
            ):
                with pytest.raises(InvalidArgument):
                    write()

    simulate(test)
