"""Claims of how large one transaction's part in one range may become (txn/values.py): what it asks for, what its delete_ranges
find and what its values grow to are limited together, since all of it is one entry, which goes to followers in one message."""

from __future__ import annotations

import pytest

from kvstore import limits
from tests.unit.txn.txn_driver import Range, put, settled, stored
from txn.apply import Overlay, apply_batch
from txn.atomics import appended
from txn.commands import Batch, encode_batch, size_bytes
from txn.latches import SEEN_BYTES_MAX
from txn.messages import NAMED_MAX, PARTICIPANTS_MAX
from txn.reads import SCAN_READ_BYTES_MAX
from txn.types import (
    TIMESTAMP_MAX,
    Expect,
    ExpectKind,
    FenceReason,
    Guard,
    PartStatus,
    Write,
    WriteKind,
)
from txn.values import (
    BOUND_BYTES_MAX,
    GUARD_BYTES,
    KEY_BYTES_MAX,
    KEYS_UNSEEN_MAX,
    MOVED_BYTES_MAX,
    PART_BYTES_MAX,
    RANGE_BYTES_MAX,
    RANGE_ROWS_MAX,
    VALUE_BYTES_MAX,
)

LONG = bytes(4_000)


def clear(start: bytes, end: bytes) -> Write:
    return Write(WriteKind.DELETE_RANGE, start, end)


def fill(place: Range, prefixes: bytes, rows: int) -> None:
    """Rows with long keys under each prefix, as one leader after another has stored them."""
    row = stored(place, b"~")
    data = place.rows.get(b"L~")
    assert row
    assert data is not None
    place.rows.write(
        {
            b"L%c%04d" % (prefix, number) + LONG: data
            for prefix in prefixes
            for number in range(rows)
        }
    )


def guards(count: int) -> list[Guard]:
    return [
        Guard(b"g%04d" % number + LONG, b"g%04d" % number + LONG + b"\x00", TIMESTAMP_MAX)
        for number in range(count)
    ]


def largest_entry(place: Range) -> int:
    return max(len(encode_batch(Batch(0, 1, [command]))) for command in place.log)


def refused(place: Range, *writes: Write, **fields) -> bool:
    """Whether it is too large; if not, that it is done."""
    asked = settled(place, place.prepare(1, *writes, **fields))
    if asked.reply.reason == FenceReason.TOO_LARGE:
        assert asked.reply.status == PartStatus.FENCED
        return True
    assert asked.reply.status in (PartStatus.COMMITTED, PartStatus.PREPARED)
    assert largest_entry(place) < PART_BYTES_MAX + (1 << 20)
    return False


def test_the_limits_are_those_that_clients_check():
    assert PART_BYTES_MAX == limits.TXN_RANGE_MESSAGE_BYTES_MAX
    assert GUARD_BYTES == limits.SPAN_OVERHEAD_BYTES
    assert (RANGE_BYTES_MAX, RANGE_ROWS_MAX) == (
        limits.TXN_RANGE_BYTES_MAX,
        limits.TXN_RANGE_ROWS_MAX,
    )
    assert (KEY_BYTES_MAX, VALUE_BYTES_MAX, BOUND_BYTES_MAX) == (
        limits.KEY_BYTES_MAX,
        limits.VALUE_BYTES_MAX,
        limits.BOUND_BYTES_MAX,
    )
    assert PARTICIPANTS_MAX == limits.TXN_PARTICIPANTS_MAX
    assert NAMED_MAX >= limits.TXN_READ_SPANS_MAX + limits.TXN_LOCKS_MAX
    assert MOVED_BYTES_MAX == limits.TXN_RANGE_MOVED_BYTES_MAX
    assert limits.VALUE_BYTES_MAX * 31 < MOVED_BYTES_MAX, (
        "transactions of large values are possible"
    )
    assert SCAN_READ_BYTES_MAX + 2 * RANGE_BYTES_MAX < MOVED_BYTES_MAX, (
        "what a page names, one deletes"
    )
    assert (KEYS_UNSEEN_MAX + 1) * RANGE_BYTES_MAX <= MOVED_BYTES_MAX


def test_a_delete_range_over_too_many_rows_is_refused_durably(monkeypatch):
    monkeypatch.setattr("txn.values.RANGE_ROWS_MAX", 2)
    place = Range()
    for key in (b"a", b"b", b"c"):
        stored(place, key)
    asked = settled(place, place.prepare(1, Write(WriteKind.DELETE_RANGE, b"a", b"d")))
    assert asked.reply.reason == FenceReason.TOO_LARGE
    assert place.read(b"a", at=place.clock).reply.values == [b"old"]


def test_a_delete_range_over_a_desert_of_deleted_rows_is_refused_and_holds_no_node(monkeypatch):
    monkeypatch.setattr("txn.values.RANGE_LOOKED_MAX", 3)
    place = Range()
    for key in (b"a", b"b", b"c", b"d"):
        stored(place, key)
        settled(place, place.prepare(place.clock, Write(WriteKind.DELETE, key)))
    asked = settled(place, place.prepare(1, Write(WriteKind.DELETE_RANGE, b"a", b"d")))
    assert asked.reply.status == PartStatus.COMMITTED
    asked = settled(place, place.prepare(2, Write(WriteKind.DELETE_RANGE, b"a", b"e")))
    assert asked.reply.reason == FenceReason.TOO_LARGE


def test_delete_ranges_of_one_transaction_find_no_more_keys_together_than_one_may():
    """Three of them, each below the limit, made an entry of 12 MB: no message held it, and its leader ended."""
    place = Range()
    fill(place, b"abc", 1_000)
    assert not refused(place, clear(b"a", b"b"))
    place = Range()
    fill(place, b"abc", 1_000)
    assert refused(place, clear(b"a", b"b"), clear(b"b", b"c"), clear(b"c", b"d"))
    assert place.state.row.newest == 101, "nothing was written"


def test_a_key_that_two_delete_ranges_find_counts_once():
    place = Range()
    fill(place, b"a", 600)
    assert not refused(place, clear(b"a", b"b"), clear(b"a", b"b"), put(b"b"))


def test_delete_ranges_of_one_transaction_look_at_no_more_rows_together_than_one_may(monkeypatch):
    monkeypatch.setattr("txn.values.RANGE_LOOKED_MAX", 4)
    place = Range()
    for key in (b"a", b"b", b"c", b"d", b"e"):
        stored(place, key)
        settled(place, place.prepare(place.clock, Write(WriteKind.DELETE, key)))
    assert not refused(place, clear(b"a", b"c"), clear(b"c", b"e"))
    asked = settled(
        place, place.prepare(2, clear(b"a", b"c"), clear(b"c", b"e"), clear(b"e", b"f"))
    )
    assert asked.reply.reason == FenceReason.TOO_LARGE


@pytest.mark.parametrize(
    ("part", "count", "too_large"),
    [(False, 700, False), (True, 300, False), (True, 400, True)],
    ids=["of one range: guards are not in its entry", "small enough", "too large"],
)
def test_what_is_read_counts_with_what_is_written_and_found(part, count, too_large):
    place = Range()
    fill(place, b"a", 900)
    fields = {"one_range": False, "anchor_key": b"zz"} if part else {}
    writes = (clear(b"a", b"b"), put(b"b", bytes(1 << 20)))
    assert refused(place, *writes, guards=guards(count), **fields) == too_large


def test_conditions_on_what_is_not_written_are_kept_as_guards_and_count():
    place = Range()
    expects = [Expect(ExpectKind.ABSENT, b"g%04d" % number + LONG) for number in range(500)]
    fields = {"one_range": False, "anchor_key": b"zz"}
    writes = [put(b"b%d" % number, bytes(VALUE_BYTES_MAX - 2)) for number in range(4)]
    assert refused(place, *writes, expects=expects, **fields)
    place = Range()
    assert not refused(place, *writes[:2], expects=expects, **fields)


def test_values_that_grow_count_with_what_is_found():
    place = Range()
    fill(place, b"a", 1_000)
    keys = [b"n%d" % number for number in range(4)]
    for key in keys:
        stored(place, key, bytes(VALUE_BYTES_MAX - 1))
    newest = place.state.row.newest
    grown = [Write(WriteKind.APPEND, key, appended(b"x", VALUE_BYTES_MAX)) for key in keys]
    assert refused(place, clear(b"a", b"b"), *grown)
    assert place.state.row.newest == newest, "nothing was written"


PART = {"one_range": False, "anchor_key": b"zz"}


def large(place: Range, count: int, value_bytes: int = limits.VALUE_BYTES_MAX) -> list[bytes]:
    """Keys that each hold a value of so many bytes: the same one, so that a test needs no memory for them."""
    stored(place, b"~", bytes(value_bytes))
    keys = [b"k%04d" % number for number in range(count)]
    place.rows.write({b"L" + key: place.rows.get(b"L~") for key in keys})
    return keys


def overwrite(keys: list[bytes]) -> list[Write]:
    return [put(key, b"small") for key in keys]


@pytest.mark.parametrize("fields", [{}, PART], ids=["of one range", "a part"])
@pytest.mark.parametrize("kind", ["delete_range", "puts", "deletes"])
def test_what_would_move_more_than_a_replica_writes_at_once_is_refused_durably(kind, fields):
    """A small entry made each replica write gigabytes in one batch, and again at each replay."""
    for count, too_large in ((31, False), (40, True)):
        place = Range()
        keys = large(place, count)
        writes = {
            "delete_range": [clear(b"k", b"l")],
            "puts": overwrite(keys),
            "deletes": [Write(WriteKind.DELETE, key) for key in keys],
        }[kind]
        assert refused(place, *writes, **fields) == too_large
        assert (place.state.row.newest == 101) == (too_large or bool(fields)), "else it is written"
        assert bool(place.state.parts) == (bool(fields) and not too_large)


def test_one_key_of_the_largest_value_may_always_be_written():
    for fields in ({}, PART):
        for write in (put(b"k0000"), Write(WriteKind.DELETE, b"k0000"), clear(b"k", b"l")):
            place = Range()
            large(place, 1)
            assert not refused(place, write, **fields)


def test_a_delete_range_looks_at_no_more_than_it_may_move():
    place = Range()
    large(place, 1_000)
    looked: list[bytes] = []
    scan = place.rows.scan

    def counting(start: bytes, end: bytes | None, **how: bool):
        for row in scan(start, end, **how):
            looked.append(row[0])
            yield row

    place.rows.scan = counting  # type: ignore[method-assign]
    assert refused(place, clear(b"k", b"l"))
    assert len(looked) == 32


def test_what_few_keys_hold_is_not_read_when_a_part_is_prepared():
    place = Range()
    keys = large(place, KEYS_UNSEEN_MAX)
    got: list[bytes] = []
    get = place.rows.get

    def counting(key: bytes, /) -> bytes | None:
        got.append(key)
        return get(key)

    place.rows.get = counting  # type: ignore[method-assign]
    assert not refused(place, *overwrite(keys), **PART)
    assert got == []


@pytest.mark.parametrize("value_bytes", [10, SEEN_BYTES_MAX // 4], ids=["little", "much"])
@pytest.mark.parametrize("fields", [{}, PART], ids=["of one range", "a part"])
def test_what_was_read_to_be_counted_apply_does_not_read_again_if_it_is_little(value_bytes, fields):
    place = Range()
    keys = large(place, 9, value_bytes)
    asked = place.prepare(1, *overwrite(keys), **fields)
    if fields:
        place.settle()
        place.resolve(1, keys[0], asked.reply.ts)
    else:
        place.stamp()
    (pending,) = place.take()
    assert place.rows.get(b"L" + keys[0]) is not None
    expected = tuple((b"L" + key, place.rows.get(b"L" + key)) for key in keys)
    assert pending.seen == (expected if value_bytes == 10 else ())
    assert pending.adds_bytes >= 9 * value_bytes
    place.commit([pending])
    assert place.read(keys[0], at=place.clock).reply.values == [b"small"]


@pytest.mark.parametrize(
    "kind", ["one put", "the hot path", "puts", "part", "anchor's part", "aborted"]
)
def test_what_a_command_makes_apply_write_is_counted_with_it(kind):
    """Its entry is cut by that: thousands of commands fit into one, and each may write a hundred times what it holds."""
    place = Range()
    keys = large(place, 5, 50_000 if kind != "anchor's part" else 10)
    anchor = keys[0]
    others = tuple(b"z%d" % number + LONG for number in range(20))
    if kind == "one put":
        place.prepare(1, put(anchor))
    elif kind == "the hot path":
        place.prepare(1, put(anchor), begin_ts=place.clock)
    elif kind == "puts":
        place.prepare(1, *overwrite(keys))
    else:
        writes = [put(key, bytes(20_000 if kind == "part" else 10)) for key in keys]
        if kind == "anchor's part":
            asked = settled(place, place.anchor(1, *writes, others=others))
            place.finalize(1, anchor, asked.reply.ts)
        else:
            asked = settled(place, place.part(1, *writes))
            place.resolve(1, anchor, asked.reply.ts if kind == "part" else 0)
    place.stamp()
    (pending,) = place.take()
    assert pending.command is not None
    overlay = Overlay(place.rows)
    apply_batch(place.state, overlay, Batch(0, 1, [pending.command]))
    counted = size_bytes(pending.command) + pending.adds_bytes
    assert overlay.bytes // 2 <= counted <= overlay.bytes + 1_000


@pytest.mark.parametrize(("value_bytes", "kept"), [(10, True), (SEEN_BYTES_MAX, False)])
def test_a_write_of_one_key_keeps_no_large_old_value_until_it_is_applied(value_bytes, kept):
    """Thousands of them wait for a round of the log."""
    place = Range()
    (key,) = large(place, 1, value_bytes)
    place.prepare(1, put(key, b"new"))
    place.stamp()
    (pending,) = place.take()
    assert pending.seen == (((b"L" + key, place.rows.get(b"L" + key)),) if kept else ())
    assert pending.adds_bytes > value_bytes
