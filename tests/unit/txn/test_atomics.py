"""Claims of atomic operations: what each makes of a row and tells, that none conflicts as a read, and that one which changes
nothing writes nothing and yet holds its row."""

from __future__ import annotations

import pytest

from tests.unit.txn.txn_driver import Range, put, settled, stored
from txn.atomics import NO, YES, After, BadValue, after, appended
from txn.commands import Commit
from txn.types import FenceReason, Guard, PartStatus, Write, WriteKind, point_end
from txn.values import RANGE_BYTES_MAX, VALUE_BYTES_MAX

FIVE = (5).to_bytes(8, "big")


@pytest.mark.parametrize(
    ("kind", "operand", "before", "result"),
    [
        (WriteKind.MIN_ASCII, b"3", None, b"3"),
        (WriteKind.MIN_ASCII, b"3", b"5", b"3"),
        (WriteKind.MIN_ASCII, b"5", b"3", b"3"),
        (WriteKind.MIN_ASCII, b"-5", b"3", b"-5"),
        (WriteKind.MAX_ASCII, b"3", None, b"3"),
        (WriteKind.MAX_ASCII, b"10", b"9", b"10"),  # as numbers, not as text
        (WriteKind.MAX_ASCII, b"-1", b"-2", b"-1"),
        (WriteKind.MIN_INT64, b"-1", FIVE, b"\xff" * 8),
        (WriteKind.MIN_INT64, b"6", FIVE, FIVE),
        (WriteKind.MAX_INT64, b"5", None, FIVE),
        (WriteKind.MAX_INT64, b"5", b"\xff" * 8, FIVE),
    ],
)
def test_the_lesser_or_the_greater_number_stays(kind, operand, before, result):
    assert after(kind, operand, before) == After(result, result)


@pytest.mark.parametrize(
    ("before", "piece", "limit", "result"),
    [
        (None, b"ab", 2, After(b"ab", YES)),
        (b"ab", b"c", 3, After(b"abc", YES)),
        (b"ab", b"c", 2, After(b"ab", NO)),
        (None, b"abc", 2, After(None, NO)),
        (b"abc", b"", 2, After(b"abc", NO)),
        (b"", b"", 0, After(b"", YES)),
    ],
)
def test_what_fits_is_appended_and_what_does_not_leaves_the_row(before, piece, limit, result):
    assert after(WriteKind.APPEND, appended(piece, limit), before) == result


@pytest.mark.parametrize(
    ("before", "expected", "result"),
    [
        (b"x", b"x", After(None, YES)),
        (b"y", b"x", After(b"y", NO)),
        (None, b"", After(None, NO)),  # absent is not empty
        (b"", b"", After(None, YES)),
    ],
)
def test_only_what_is_expected_is_cleared(before, expected, result):
    assert after(WriteKind.COMPARE_CLEAR, expected, before) == result


@pytest.mark.parametrize(
    ("kind", "before"),
    [(WriteKind.MIN_ASCII, b"x"), (WriteKind.MAX_INT64, b"5"), (99, b"x")],
)
def test_what_is_no_number_is_refused(kind, before):
    with pytest.raises(BadValue):
        after(kind, b"1", before)
    place = Range()
    stored(place, b"a", before)
    reply = settled(place, place.prepare(1, Write(kind, b"a", b"1"))).reply
    assert (reply.status, reply.reason) == (PartStatus.FENCED, FenceReason.BAD_VALUE)


def test_operations_of_one_transaction_see_each_other_and_tell_in_order():
    place = Range()
    stored(place, b"n", b"5")
    reply = settled(
        place,
        place.prepare(
            1,
            Write(WriteKind.ADD_ASCII, b"n", b"2"),
            Write(WriteKind.MAX_ASCII, b"n", b"6"),
            Write(WriteKind.APPEND, b"n", appended(b"0", 2)),
            Write(WriteKind.COMPARE_CLEAR, b"n", b"70"),
        ),
    ).reply
    assert reply.results == [b"7", b"7", YES, YES]
    assert place.read(b"n", at=place.clock).reply.values == [None]


def test_one_that_changes_nothing_writes_no_version_and_is_found_again():
    place = Range()
    version = stored(place, b"n", b"5")
    minimum = Write(WriteKind.MIN_ASCII, b"n", b"9")
    first = settled(place, place.prepare(1, minimum)).reply
    assert first.status == PartStatus.COMMITTED
    assert first.results == [b"5"]
    assert place.read(b"n", at=place.clock).reply.versions == [version]
    command = place.log[-1]
    assert isinstance(command, Commit)
    assert command.keys == []
    late = settled(place, place.prepare(1, minimum)).reply
    assert (late.status, late.ts) == (PartStatus.COMMITTED, first.ts)


def test_one_that_changes_nothing_holds_its_row_until_the_transaction_ends():
    place = Range()
    stored(place, b"n", b"5")
    part = settled(place, place.part(1, Write(WriteKind.MIN_ASCII, b"n", b"9"))).reply
    assert part.status == PartStatus.PREPARED
    writer = settled(place, place.prepare(2, put(b"n", b"20")))
    assert writer.open
    settled(place, place.resolve(1, b"n", part.ts))
    assert writer.reply.status == PartStatus.COMMITTED


def test_two_on_one_key_do_not_conflict_whoever_reads_meanwhile():
    place = Range()
    first = place.prepare(1, Write(WriteKind.MAX_ASCII, b"n", b"1"))
    second = place.prepare(2, Write(WriteKind.MAX_ASCII, b"n", b"2"))
    place.settle()
    assert [first.reply.status, second.reply.status] == [PartStatus.COMMITTED] * 2
    assert place.read(b"n", at=place.clock).reply.values == [b"2"]


def test_a_guard_over_the_key_is_a_read_all_the_same():
    place = Range()
    version = stored(place, b"n", b"5")
    stored(place, b"n", b"6")
    guard = Guard(b"n", point_end(b"n"), version)
    reply = settled(
        place, place.prepare(1, Write(WriteKind.ADD_ASCII, b"n", b"1"), guards=[guard])
    ).reply
    assert reply.reason == FenceReason.CONFLICT


def test_rows_that_grow_beyond_what_a_range_takes_are_refused():
    place = Range()
    keys = [b"%d" % number for number in range(RANGE_BYTES_MAX // VALUE_BYTES_MAX + 1)]
    for key in keys:
        stored(place, key, bytes(VALUE_BYTES_MAX - 1))
    grown = [Write(WriteKind.APPEND, key, appended(b"x", VALUE_BYTES_MAX)) for key in keys]
    reply = settled(place, place.prepare(1, *grown)).reply
    assert (reply.status, reply.reason) == (PartStatus.FENCED, FenceReason.TOO_LARGE)
