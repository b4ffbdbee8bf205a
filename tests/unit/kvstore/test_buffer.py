"""Claims of a transaction's buffers: read spans never lose a key, deleted ranges merge, numbers are those of the server."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import limits
from kvstore.buffer import NumberKind, ReadSpans, WriteBuffer, number_write
from kvstore.errors import InvalidArgument, TransactionTooLarge
from txn.types import Write, WriteKind


def test_many_read_spans_are_merged_and_still_cover_what_was_read():
    spans = ReadSpans(100)
    keys = [b"%05d" % number for number in range(0, 5000, 7)]
    random.Random(5).shuffle(keys)
    for key in keys:
        spans.add_key(key)
        assert len(spans) <= 100
    merged = spans.guards(9)
    assert all(any(guard.start <= key < guard.end for guard in merged) for key in keys)
    assert all(one.end < two.start for one, two in itertools.pairwise(merged))


def test_read_spans_with_long_bounds_are_merged_by_their_bytes():
    spans = ReadSpans(100, 10_000)
    keys = [b"%03d" % number + bytes(200) for number in range(0, 500, 3)]
    for key in keys:
        spans.add_key(key)
        assert sum(len(each.start) + len(each.end) for each in spans.guards(9)) <= 10_000
    merged = spans.guards(9)
    assert len(merged) > 10
    assert all(any(guard.start <= key < guard.end for guard in merged) for key in keys)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=60))
def test_read_spans_never_lose_a_key(spans: list[tuple[int, int]]):
    kept = ReadSpans(8)
    for start, size in spans:
        kept.add(b"%03d" % start, b"%03d" % (start + size))
    merged = kept.guards(1)
    for start, size in spans:
        for number in range(start, start + size):
            assert any(guard.start <= b"%03d" % number < guard.end for guard in merged)


# --- conflicts, once ------------------------------------------------------------------------------


def test_the_anchor_stays_a_point_whatever_is_deleted_later():
    buffer = WriteBuffer()
    buffer.put(b"k", b"v")
    buffer.clear(b"a", b"z")
    assert buffer.anchor_key == b"k"
    assert buffer.writes() == [
        Write(WriteKind.DELETE_RANGE, b"a", b"z"),
        Write(WriteKind.DELETE, b"k"),
    ]
    buffer.clear(b"j", b"l")
    assert buffer.writes() == [
        Write(WriteKind.DELETE_RANGE, b"a", b"z"),
        Write(WriteKind.DELETE, b"k"),
    ]


def test_deleted_ranges_that_touch_become_one():
    buffer = WriteBuffer()
    for start, end in [(b"a", b"c"), (b"x", b"y"), (b"c", b"e"), (b"g", b"h"), (b"d", b"x")]:
        buffer.clear(start, end)
    assert buffer.clears == [(b"a", b"y")]
    buffer.clear(b"", b"\x00")  # no key is there
    assert buffer.clears == [(b"a", b"y")]


def test_a_range_that_is_one_too_many_is_refused_and_takes_no_earlier_write_along():
    buffer = WriteBuffer()
    buffer.put(b"y", b"first")
    for number in range(limits.TXN_READ_SPANS_MAX):
        buffer.clear(b"a%05d" % number, b"a%05d!" % number)
    before = buffer.writes()
    with pytest.raises(TransactionTooLarge):
        buffer.clear(b"x", b"z")
    assert buffer.writes() == before
    buffer.delete(b"y")
    assert buffer.writes()[-1] == Write(WriteKind.DELETE, b"y")


def number(key: bytes, kind: NumberKind, by: int, wide: bool = False) -> Write:
    return number_write(key, kind, by, "int64" if wide else "ascii")


def test_numbers_are_computed_as_the_server_does():
    buffer = WriteBuffer()
    buffer.atomic(number(b"n", "add", 5))
    buffer.atomic(number(b"n", "add", -7))
    assert buffer.writes() == [Write(WriteKind.ADD_ASCII, b"n", b"-2")]
    buffer.put(b"p", b"40")
    buffer.atomic(number(b"p", "add", 2))
    buffer.delete(b"q")
    buffer.atomic(number(b"q", "add", -1, wide=True))
    assert buffer.writes()[1:] == [
        Write(WriteKind.PUT, b"p", b"42"),
        Write(WriteKind.PUT, b"q", b"\xff" * 8),
    ]
    buffer.put(b"t", b"text")
    with pytest.raises(InvalidArgument):
        buffer.atomic(number(b"t", "add", 1))
    with pytest.raises(InvalidArgument):
        buffer.atomic(number(b"n", "add", 1, wide=True))
    with pytest.raises(InvalidArgument):
        buffer.atomic(number(b"n", "add", -(1 << 63)))
