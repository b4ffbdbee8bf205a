"""Claims of a transaction's buffers: read spans never lose a key, deleted ranges merge, numbers are those of the server."""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import buffer as buffers
from kvstore import limits
from kvstore.buffer import (
    NumberKind,
    ReadSpans,
    WriteBuffer,
    append_write,
    compare_clear_write,
    number_write,
    value_over,
)
from kvstore.errors import InvalidArgument, TransactionTooLarge
from kvstore.reads import Page, SpanPages
from kvstore.scans import OwnPages
from txn import atomics
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


def test_operations_on_one_key_are_numbers_of_one_format_and_the_last_two_of_a_kind_are_one():
    buffer = WriteBuffer()
    buffer.atomic(append_write(b"k", b"1", 9))
    for by in (5, 6, -2):
        buffer.atomic(number(b"k", "add", by))
    buffer.atomic(number(b"k", "min", 30))
    buffer.atomic(number(b"k", "min", 20))
    with pytest.raises(InvalidArgument):
        buffer.atomic(number(b"k", "max", 1, wide=True))
    kinds = [WriteKind.APPEND, WriteKind.ADD_ASCII, WriteKind.MIN_ASCII]
    assert [write.kind for write in buffer.writes()] == kinds
    assert [write.value for write in buffer.writes()][1:] == [b"9", b"20"]
    assert value_over(buffer.points[b"k"], b"4") == b"20"
    assert value_over(buffer.points[b"k"], None) == b"10"


def test_appends_over_what_is_below_are_computed_as_the_server_does():
    buffer = WriteBuffer()
    for piece, limit in ((b"cd", 4), (b"", 4), (b"e", 4), (b"e", 5)):
        buffer.atomic(append_write(b"k", piece, limit))
    assert value_over(buffer.points[b"k"], b"ab") == b"abcde"
    assert value_over(buffer.points[b"k"], None) == b"cdee"
    buffer.atomic(compare_clear_write(b"k", b"abcde"))
    assert value_over(buffer.points[b"k"], b"ab") is None
    assert value_over(buffer.points[b"k"], b"a2") == b"a2cde"
    buffer.atomic(append_write(b"k", b"f", 1))
    assert value_over(buffer.points[b"k"], b"ab") == b"f"


def test_appends_to_an_own_value_are_computed_as_the_server_does():
    buffer = WriteBuffer()
    buffer.put(b"k", b"ab")
    for piece, limit in ((b"cd", 4), (b"", 4), (b"e", 4), (b"e", 5)):
        buffer.atomic(append_write(b"k", piece, limit))
    assert buffer.points[b"k"].value == b"abcde"
    buffer.atomic(append_write(b"k", b"f", 6))
    buffer.atomic(compare_clear_write(b"k", b"abcde"))
    assert buffer.writes() == [Write(WriteKind.PUT, b"k", b"abcdef")]
    buffer.atomic(append_write(b"k", b"7", 7))
    with pytest.raises(InvalidArgument):
        buffer.atomic(number(b"k", "add", 1))
    buffer.atomic(compare_clear_write(b"k", b"abcdef7"))
    assert buffer.writes() == [Write(WriteKind.DELETE, b"k")]
    buffer.atomic(append_write(b"k", b"gone", 3))
    buffer.atomic(append_write(b"k", b"new", 3))
    assert buffer.writes() == [Write(WriteKind.PUT, b"k", b"new")]


def test_what_is_appended_to_an_own_value_counts_as_written():
    buffer = WriteBuffer()
    for key in range(8):
        buffer.put(b"%d" % key, bytes(limits.VALUE_BYTES_MAX - 2))
    for key in (1, 1, 1, 2, 2, 3, 3, 4, 4):  # the third one does not fit into the value
        buffer.atomic(append_write(b"%d" % key, b"x", limits.VALUE_BYTES_MAX))
    writes = buffer.writes()
    assert sum(len(write.key) + len(write.value) for write in writes) == limits.TXN_BYTES_MAX
    with pytest.raises(TransactionTooLarge):
        buffer.atomic(append_write(b"5", b"x", limits.VALUE_BYTES_MAX))
    assert buffer.writes() == writes


# --- what it costs --------------------------------------------------------------------------------


class CountedKey(bytes):
    """A key whose comparisons are counted, those of sorts and searches too."""

    compared = 0

    def __lt__(self, other: bytes) -> bool:
        CountedKey.compared += 1
        return bytes.__lt__(self, other)


def steps(work: Callable[[], object]) -> int:
    """The lines of the buffer's code that `work` runs, and the comparisons of CountedKeys."""
    lines, before = 0, sys.gettrace()
    CountedKey.compared = 0

    def trace(frame: FrameType, _event: str, _argument: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != buffers.__file__:
            return None
        lines += 1
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return lines + CountedKey.compared


def alternating(count: int) -> None:
    buffer = WriteBuffer()
    for by in range(count):
        buffer.atomic(number(b"k", "add", 1))
        buffer.atomic(number(b"k", "min", by))


def merged_after_many(count: int) -> None:
    buffer = WriteBuffer()
    for _ in range(count):
        buffer.atomic(append_write(b"k", b"1", 9))
    for _ in range(count):
        buffer.atomic(number(b"k", "add", 1))


def clears_between_puts(count: int) -> None:
    buffer, rng = WriteBuffer(), random.Random(3)
    for at in range(count):
        buffer.put(CountedKey(b"a" + rng.randbytes(8)), b"")
        buffer.clear(b"b%06d" % (2 * at), b"b%06d" % (2 * at + 1))


@pytest.mark.parametrize("work", [alternating, merged_after_many, clears_between_puts])
def test_many_operations_cost_linear_time(work: Callable[[int], None]):
    few, many = (steps(partial(work, size)) for size in (100, 800))
    assert many < 8 * few * 1.5


@pytest.mark.parametrize("own", [True, False])
def test_many_appends_do_not_copy_the_value_each_time(monkeypatch: pytest.MonkeyPatch, own: bool):
    """Neither an own one, nor one that was read below them; nor is it copied to compare it with another one."""
    copied, after = 0, atomics.after

    def counted(kind: int, operand: bytes, before: bytes | None) -> atomics.After:
        nonlocal copied
        copied += len(before or b"")
        return after(kind, operand, before)

    monkeypatch.setattr(atomics, "after", counted)
    buffer, value = WriteBuffer(), bytes(100_000)
    if own:
        buffer.put(b"k", value)
    for _ in range(100):
        buffer.atomic(append_write(b"k", b"x", limits.VALUE_BYTES_MAX))
        if not own:
            buffer.atomic(compare_clear_write(b"k", b"other"))
    assert value_over(buffer.points[b"k"], value) == value + b"x" * 100
    assert copied == 0


def test_a_scan_over_many_deleted_spans_looks_for_each_row_once():
    """And not at each row for every span."""

    class Below:
        at = 1

        async def next(self) -> Page:
            return Page(rows, b"a", b"z", last=True)

    rows: list[tuple[bytes, bytes]] = [
        (CountedKey(b"k%04d" % number), b"") for number in range(1_000)
    ]
    buffer = WriteBuffer()
    for at in range(0, 1_000, 2):
        buffer.clear(b"k%04d" % at, b"k%04d\x00" % at)
    pages = OwnPages(
        cast(SpanPages, Below()), buffer, None, lambda: None, None, False, False, False
    )
    CountedKey.compared = 0
    page = asyncio.run(pages.next())
    assert [key for key, _ in page.rows] == [b"k%04d" % at for at in range(1, 1_000, 2)]
    assert CountedKey.compared < 30_000
