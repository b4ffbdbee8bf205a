"""Claims: writers exclude writers and guards, guards exclude writers only, a reader waits only for who was there before it."""

from __future__ import annotations

import random

import pytest

from txn.latches import LatchTable, Pending
from txn.types import Guard, point_end


def pending(
    number: int,
    keys: tuple[bytes, ...] = (),
    guards: tuple[tuple[bytes, bytes], ...] = (),
    spans: tuple[tuple[bytes, bytes], ...] = (),
) -> Pending:
    made = Pending(bytes([number]) * 16, None, None)
    made.keys = list(keys)
    made.guards = [Guard(start, end, 0) for start, end in guards]
    made.spans = list(spans)
    return made


def test_a_written_key_blocks_writers_guards_and_spans_over_it():
    table, holder = LatchTable(), pending(1, (b"b",))
    table.acquire(holder)
    assert table.blocker_of_write(b"b") is holder
    assert table.blocker_of_guard(b"b", point_end(b"b")) is holder
    assert table.blocker_of_guard(b"a", b"c") is holder
    assert table.blocker_of_write_span(b"a", b"c") is holder
    assert table.blocker_of_write(b"b\x00") is None
    assert table.blocker_of_guard(b"c", b"d") is None


@pytest.mark.parametrize("guard", [(b"b", b"b\x00"), (b"a", b"c")])
def test_a_guard_blocks_writers_and_no_guards(guard):
    table, holder = LatchTable(), pending(1, guards=(guard,))
    table.acquire(holder)
    assert table.blocker_of_write(b"b") is holder
    assert table.blocker_of_write_span(b"b", b"bb") is holder
    assert table.blocker_of_write(b"c") is None
    assert table.blocker_of_guard(b"a", b"c") is None
    assert table.blocker_of_read(b"b", 99) is None
    assert table.blocker_of_scan(b"", b"", 99) is None


def test_a_written_span_blocks_everybody_inside_it():
    table, holder = LatchTable(), pending(1, spans=((b"b", b"d"),))
    table.acquire(holder)
    assert table.blocker_of_write(b"c") is holder
    assert table.blocker_of_guard(b"c", b"z") is holder
    assert table.blocker_of_write_span(b"a", b"bb") is holder
    assert table.blocker_of_read(b"b", 99) is holder
    assert table.blocker_of_scan(b"c", b"", 99) is holder
    assert table.blocker_of_write(b"d") is None
    assert table.blocker_of_scan(b"d", b"", 99) is None


def test_a_reader_does_not_wait_for_latches_taken_after_it_came():
    table = LatchTable()
    table.acquire(pending(1, (b"a",), spans=((b"p", b"q"),)))
    came = table.sequence
    table.acquire(pending(2, (b"b",), spans=((b"r", b"s"),)))
    assert table.blocker_of_read(b"a", came) is not None
    assert table.blocker_of_read(b"b", came) is None
    assert table.blocker_of_read(b"pp", came) is not None
    assert table.blocker_of_read(b"rr", came) is None
    assert table.blocker_of_scan(b"b", b"p", came) is None
    assert table.blocker_of_scan(b"", b"", came) is not None


def test_a_transaction_is_latched_once():
    table = LatchTable()
    table.acquire(pending(1, (b"a",)))
    with pytest.raises(AssertionError, match="latched once"):
        table.acquire(pending(1, (b"b",)))


@pytest.mark.parametrize("seed", range(20))
def test_the_table_answers_like_a_list_of_holders_and_is_empty_in_the_end(seed):
    rng = random.Random(seed)
    keys = [bytes([byte]) for byte in range(97, 105)]
    table, held = LatchTable(), list[Pending]()

    def span() -> tuple[bytes, bytes]:
        start, end = sorted(rng.sample(keys, 2))
        return start, rng.choice([end, point_end(start)])

    def writes(holder: Pending, start: bytes, end: bytes) -> bool:
        inside = any(start <= key < end for key in holder.keys)
        return inside or any(low < end and start < high for low, high in holder.spans)

    def guards(holder: Pending, start: bytes, end: bytes) -> bool:
        return any(guard.start < end and start < guard.end for guard in holder.guards)

    for number in range(200):
        start, end = span()
        key = rng.choice(keys)
        after = point_end(key)
        wanted = any(writes(holder, key, after) or guards(holder, key, after) for holder in held)
        assert (table.blocker_of_write(key) is not None) == wanted
        wanted = any(writes(holder, start, end) or guards(holder, start, end) for holder in held)
        assert (table.blocker_of_write_span(start, end) is not None) == wanted
        wanted = any(writes(holder, start, end) for holder in held)
        assert (table.blocker_of_guard(start, end) is not None) == wanted
        assert (table.blocker_of_scan(start, end, table.sequence) is not None) == wanted
        if held and rng.random() < 0.5:
            table.release(held.pop(rng.randrange(len(held))))
            continue
        new = pending(number % 251)
        if table.blocker_of_write(key) is None and rng.random() < 0.7:
            new.keys = [key]
        if table.blocker_of_guard(start, end) is None:
            new.guards = [Guard(start, end, 0)] * rng.randint(0, 2)
        if table.blocker_of_write_span(start, end) is None and rng.random() < 0.3:
            new.spans = [(start, end)]
        if new.txn_id not in table.txns:
            table.acquire(new)
            held.append(new)
    for holder in held:
        table.release(holder)
    left = {name: value for name, value in vars(table).items() if isinstance(value, dict)}
    assert left == {name: {} for name in left}
