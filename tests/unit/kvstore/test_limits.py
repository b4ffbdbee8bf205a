"""Claims of kvstore.limits: what is within a limit passes, one more is refused with the error of that limit; and that what a
client sends fits into messages, however long the keys are."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import limits
from kvstore.client import Database
from kvstore.commits import DRIVES_MAX
from kvstore.errors import InvalidArgument, KeyTooLarge, TransactionTooLarge, ValueTooLarge
from kvstore.links import ClientLink
from kvstore.router import CALLS_MAX
from tests.unit.kvstore.fake_cluster import FakeCluster, simulate
from txn import values
from txn.messages import Prepare, Read, Request


class Text(bytes):
    """As numpy's bytes_: it is bytes, and a message cannot hold it."""


@pytest.mark.parametrize("key", [b"a", b"\x00", b"\xfe\xff", b"k" * 4096])
def test_a_key_within_the_limits_passes(key: bytes):
    limits.validate_key(key)


@pytest.mark.parametrize(
    ("key", "error"),
    [
        (b"", InvalidArgument),
        (b"k" * 4097, KeyTooLarge),
        (b"\xff", InvalidArgument),
        (b"\xffmeta", InvalidArgument),
        ("text", InvalidArgument),
        (bytearray(b"k"), InvalidArgument),
        (Text(b"k"), InvalidArgument),
        (None, InvalidArgument),
        (7, InvalidArgument),
    ],
)
def test_a_key_outside_the_limits_is_refused(key: Any, error: type[Exception]):
    with pytest.raises(error) as caught:
        limits.validate_key(key)
    assert caught.type is error


def test_a_value_has_up_to_a_mebibyte_and_may_be_empty():
    limits.validate_value(b"")
    limits.validate_value(b"v" * 1024 * 1024)
    with pytest.raises(ValueTooLarge):
        limits.validate_value(b"v" * (1024 * 1024 + 1))
    for wrong in ("text", None, bytearray(b"v"), memoryview(b"v"), Text(b"v")):
        with pytest.raises(InvalidArgument):
            limits.validate_value(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (b"", None, (b"", b"\xff")),
        (b"a", b"b", (b"a", b"b")),
        (b"a", b"a", (b"a", b"a")),
        (b"a", b"\xff", (b"a", b"\xff")),
        (b"\xff", None, (b"\xff", b"\xff")),
        (b"k" * 4096 + b"\x00", None, (b"k" * 4096 + b"\x00", b"\xff")),
    ],
)
def test_a_range_of_user_keys_passes_with_its_end_made_explicit(
    start: bytes, end: bytes | None, expected: tuple[bytes, bytes]
):
    assert limits.validate_range(start, end) == expected


@pytest.mark.parametrize(
    ("start", "end", "error"),
    [
        (b"b", b"a", InvalidArgument),
        (b"a", b"", InvalidArgument),
        (b"a", b"\xff\x00", InvalidArgument),
        (b"\xff\x00", None, InvalidArgument),
        (b"k" * 4098, None, KeyTooLarge),
        (b"", b"k" * 4098, KeyTooLarge),
        ("a", None, InvalidArgument),
        (b"a", "b", InvalidArgument),
        (None, None, InvalidArgument),
    ],
)
def test_a_range_outside_the_user_keys_is_refused(start: Any, end: Any, error: type[Exception]):
    with pytest.raises(error):
        limits.validate_range(start, end)


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        (b"", (b"", b"\xff")),
        (b"a", (b"a", b"b")),
        (b"a\xff", (b"a\xff", b"b")),
        (b"\xfe\xff\xff", (b"\xfe\xff\xff", b"\xff")),
        (b"a\x00", (b"a\x00", b"a\x01")),
    ],
)
def test_a_prefix_is_a_range(prefix: bytes, expected: tuple[bytes, bytes]):
    assert limits.prefix_range(prefix) == expected


@pytest.mark.parametrize("prefix", [b"\xff", b"\xff\x01", "a", None])
def test_a_prefix_outside_the_user_keys_is_refused(prefix: Any):
    with pytest.raises(InvalidArgument):
        limits.prefix_range(prefix)


@given(st.binary(max_size=4), st.binary(max_size=6))
def test_the_end_of_a_prefix_divides_its_keys_from_those_above(prefix: bytes, key: bytes):
    end = limits.prefix_end(prefix)
    inside = key >= prefix and (end is None or key < end)
    assert inside == key.startswith(prefix)


def test_only_prefixes_without_keys_above_them_have_no_end():
    assert limits.prefix_end(b"") is None
    assert limits.prefix_end(b"\xff\xff") is None


@pytest.mark.parametrize(
    ("sizes", "too_large"),
    [
        ((8 * 1024 * 1024, 20_000, 128), False),
        ((8 * 1024 * 1024 + 1, 1, 1), True),
        ((1, 20_001, 1), True),
        ((1, 1, 129), True),
    ],
)
def test_a_transaction_has_a_size_in_bytes_rows_and_ranges(
    sizes: tuple[int, int, int], too_large: bool
):
    if too_large:
        with pytest.raises(TransactionTooLarge):
            limits.validate_transaction_size(*sizes)
    else:
        limits.validate_transaction_size(*sizes)


def test_a_part_of_a_transaction_in_one_range_has_a_size_of_its_own():
    limits.validate_range_batch_size(4 * 1024 * 1024, 5_000)
    with pytest.raises(TransactionTooLarge):
        limits.validate_range_batch_size(4 * 1024 * 1024 + 1, 1)
    with pytest.raises(TransactionTooLarge):
        limits.validate_range_batch_size(1, 5_001)


def test_limits_fit_into_each_other():
    assert limits.KEY_BYTES_MAX + limits.VALUE_BYTES_MAX < limits.TXN_RANGE_BYTES_MAX
    assert limits.TXN_RANGE_BYTES_MAX < limits.TXN_BYTES_MAX < limits.MESSAGE_BYTES_MAX
    assert limits.TXN_RANGE_ROWS_MAX < limits.TXN_ROWS_MAX


LIMITS_PAGE = (Path(__file__).parents[3] / "docs" / "transactions.md").read_text()
INTERNAL = (
    "ENTRY_BYTES_MAX",
    "APPLY_BATCH_BYTES_MAX",
    "APPLY_BATCH_ROWS_MAX",
)  # users do not meet them
TOLD = {name: limit for name, limit in vars(limits).items() if name.endswith("_MAX")}
TOLD |= {"DRIVES_MAX": DRIVES_MAX, "CALLS_MAX": CALLS_MAX}


def figure(name: str, limit: float) -> str:
    """As the page writes it."""
    for unit, size in (("MiB", limits.MIB), ("KiB", limits.KIB)):
        if "_BYTES_" in name and limit % size == 0:
            return f"{limit // size} {unit}"
    return f"{limit:g} s" if "_S_" in name else f"{limit:,}"


@pytest.mark.parametrize("name", [name for name in TOLD if name not in INTERNAL])
def test_each_limit_that_users_can_meet_is_told_by_its_figure(name: str):
    section = LIMITS_PAGE.partition("\n## Limits\n")[2]
    assert re.search(rf"\b{figure(name, TOLD[name])}\b", section)


@pytest.mark.parametrize(
    ("row", "limits_of_ranges"),
    [
        ("rows that its `delete_range`s meet", [values.RANGE_LOOKED_MAX]),
        (
            "rows that its `delete_range`s delete",
            [values.RANGE_ROWS_MAX, values.RANGE_BYTES_MAX >> 20],
        ),
        ("values that it appends to", [values.RANGE_BYTES_MAX >> 20]),
        ("old values", [values.MOVED_BYTES_MAX >> 20]),
    ],
)
def test_each_limit_that_only_ranges_know_has_a_row_of_its_own(
    row: str, limits_of_ranges: list[int]
):
    section = LIMITS_PAGE.partition("\n## Limits\n")[2]
    (line,) = [each for each in section.splitlines() if each.startswith("|") and row in each]
    assert all(f"{limit:,}" in line for limit in limits_of_ranges)


# --- messages ---------------------------------------------------------------------------------------


def test_what_does_not_fit_into_a_message_is_refused_unsent_and_the_client_goes_on():
    async def test(cluster: FakeCluster, db: Database) -> None:
        with pytest.raises(TransactionTooLarge):  # noqa: PT012 - the end of the block is what raises
            async with db.transaction() as tx:
                for number in range(1_200):
                    start = b"%04d" % number + bytes(4_000)
                    tx.delete_range(start, start + b"\x01")
        assert cluster.of(Prepare) == []
        assert await db.get(b"a") is None

    simulate(test)


def test_reads_of_many_long_keys_leave_in_messages_of_bounded_size_and_are_guarded_within_one():
    async def test(cluster: FakeCluster, db: Database) -> None:
        keys = [b"%04d" % number + bytes(4_000) for number in range(2_500)]
        async with db.transaction() as tx:
            assert await tx.get_many(keys) == {}
            tx.put(b"a", b"1")
        guarded = [(guard.start, guard.end) for guard in cluster.of(Prepare)[-1].guards]
        assert len(guarded) < len(keys)
        assert all(any(low <= key < high for low, high in guarded) for key in keys)
        assert await db.get(b"a") == b"1"

    simulate(test)


def test_transactions_that_have_read_much_and_commit_together_leave_in_messages_of_bounded_size():
    async def test(cluster: FakeCluster, db: Database) -> None:
        async def one(number: int) -> None:
            async with db.transaction() as tx:
                for each in range(0, 512, 128):
                    await tx.get_many(b"%04d" % (each + at) + bytes(2_000) for at in range(128))
                tx.put(b"a%d" % number, b"1")

        await asyncio.gather(*map(one, range(8)))
        assert len(await db.scan(prefix=b"a").to_list()) == 8

    simulate(test)


def test_requests_whose_sizes_were_told_too_low_become_messages_that_fit() -> None:
    link = ClientLink("n1:1", 1)
    sent = [Read(number, 1, 1, 0, [b"k" * limits.KEY_BYTES_MAX] * 700) for number in range(9)]
    link.outgoing.extend(sent)
    link.seal()
    assert max(map(len, link.ready)) <= limits.MESSAGE_BYTES_MAX
    assert link.ready_bytes == sum(map(len, link.ready))
    decoder = msgspec.msgpack.Decoder(list[Request])
    assert [each for payload in link.ready for each in decoder.decode(payload[1:])] == sent
    assert not link.outgoing
