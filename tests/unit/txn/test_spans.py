"""Claims: tables answer about spans like plain lists, and often asked they look at what lies there, not at all they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.unit.txn.txn_driver import txn_id
from txn.latches import LatchTable, Pending
from txn.locks import LockTable
from txn.spans import Joined, Ordered
from txn.stamps import once, span, stamped
from txn.state import Part, PreparedRow, RangeRow, RangeState
from txn.types import Guard, Write, WriteKind, point_end

KEYS = [b"", b"a", b"a\x00", b"b", b"c", b"d"]
keys = st.sampled_from(KEYS)
HELD = 2_000
ASKED = 1_000


class Counted(bytes):
    """A key that counts how often it is compared."""

    compared = 0

    def __lt__(self, other: Any) -> bool:
        Counted.compared += 1
        return bytes(self) < bytes(other)

    def __gt__(self, other: Any) -> bool:
        Counted.compared += 1
        return bytes(self) > bytes(other)

    def __le__(self, other: Any) -> bool:
        Counted.compared += 1
        return bytes(self) <= bytes(other)

    def __ge__(self, other: Any) -> bool:
        Counted.compared += 1
        return bytes(self) >= bytes(other)


def held_keys() -> list[bytes]:
    return [Counted(b"h%06d" % number) for number in range(HELD)]


def free_spans() -> list[tuple[bytes, bytes]]:
    """Between those keys, and none of them."""
    return [(b"h%06dx" % number, b"h%06dy" % number) for number in range(ASKED)]


def compared(ask: Callable[[bytes, bytes], object]) -> int:
    """How many comparisons it takes to ask about all of them."""
    Counted.compared = 0
    for start, end in free_spans():
        assert ask(start, end) is None
    return Counted.compared


def few(count: int) -> bool:
    """A walk and a sort, and some twenty for each question: far from HELD for each."""
    return count < 60 * HELD


def pending(number: int) -> Pending:
    return Pending(txn_id(number), None, None)


def part(number: int, written: list[bytes], guards: list[Guard]) -> Part:
    row = PreparedRow(b"z", 10, 1, written, [b"v"] * len(written), guards)
    return Part(b"l", txn_id(number), row)


def point_guards() -> list[Guard]:
    return [Guard(key, point_end(key), 0) for key in held_keys()]


def span_guards() -> list[Guard]:
    return [Guard(key, Counted(key + b"a"), 0) for key in held_keys()]


@pytest.mark.parametrize("ask", ["blocker_of_guard", "blocker_of_write_span", "blocker_of_scan"])
def test_spans_beside_many_latched_keys(ask):
    table, holder = LatchTable(), pending(1)
    holder.keys = held_keys()
    table.acquire(holder)
    more = (1 << 60,) if ask == "blocker_of_scan" else ()
    assert few(compared(lambda start, end: getattr(table, ask)(start, end, *more)))


@pytest.mark.parametrize("make", [point_guards, span_guards])
def test_written_spans_and_keys_beside_many_guards(make):
    table, holder = LatchTable(), pending(1)
    holder.guards = make()
    table.acquire(holder)
    assert few(compared(table.blocker_of_write_span))
    assert few(compared(lambda start, _: table.blocker_of_write(start)))


def test_a_holder_of_many_spans_goes_without_a_look_at_the_others():
    table, holders = LatchTable(), [pending(1), pending(2)]
    for holder in holders:
        holder.guards = span_guards()
        table.acquire(holder)
    assert table.blocker_of_write(b"h000001") is holders[0]
    Counted.compared = 0
    table.release(holders[0])
    assert Counted.compared == 0
    assert table.blocker_of_write(b"h000001") is holders[1]


def test_spans_beside_many_undecided_writes_and_guards():
    state = RangeState(RangeRow(1, b"", b"", 1, 1, 0, 0))
    state.add_part(part(1, held_keys(), []))
    assert few(compared(lambda start, end: next(state.intents_in(start, end), None)))
    state.add_part(part(2, [], point_guards()))
    state.add_part(part(3, [], span_guards()))
    assert few(compared(lambda start, end: state.foreign_guard_in(start, end, txn_id(9))))
    assert few(compared(lambda start, _: state.foreign_guard(start, txn_id(9))))


def test_spans_beside_many_locks():
    table = LockTable(10 * HELD, 1.0)
    for key in held_keys():
        table.acquire(txn_id(1), 1, key, True, 0.0)
    assert few(compared(lambda start, end: table.foreign_in(start, end, txn_id(2))))


def test_a_prefix_is_looked_at_once_however_many_keys_get_it():
    writes = [Write(WriteKind.STAMPED_KEY, b"q/", stamped(number, b"")) for number in range(9)]
    plain = Write(WriteKind.PUT, b"q/")
    assert list(once([*writes, plain, plain])) == [writes[0], plain, plain]
    assert span(b"q/")[0].startswith(b"q/")


@given(st.lists(st.tuples(st.booleans(), keys, keys, keys)))
def test_keys_in_order_are_those_of_the_table_whenever_it_has_changed(steps):
    table: dict[bytes, None] = {}
    ordered, changes = Ordered(), 0
    for change, key, start, end in steps:
        if change:
            changes += 1
            if key in table:
                del table[key]
            else:
                table[key] = None
        wanted = sorted(each for each in table if start <= each and (not end or each < end))
        assert list(ordered.within(table, changes, start, end)) == wanted


@given(st.lists(st.tuples(keys, keys)), keys, keys)
def test_joined_spans_meet_what_one_of_them_meets(spans, start, end):
    assume(not end or start < end)
    meets = [max(low, start) < (min(high, end) if end else high) for low, high in spans]
    assert Joined(spans).meets(start, end) == any(meets)
