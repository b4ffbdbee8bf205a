"""Claims of the lock table (txn/locks.py): who may hold a key together, who is served next, and what leases and endings do;
and that whatever happens to it, its own check holds and nobody waits for nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from txn.locks import BLOCKERS_MAX, ENDED_MAX, WAIT_LEASE_S, LockTable, Verdict, Wait

LEASE_S = 10.0


def owner(number: int) -> bytes:
    return number.to_bytes(16, "big")


class Table(LockTable):
    """With owners by number, their number also being their age."""

    def __init__(self, size_max: int = 100) -> None:
        super().__init__(size_max, LEASE_S)
        self.now = 0.0

    def lock(self, number: int, key: bytes = b"k", *, shared: bool = False, **fields):
        age = fields.pop("age", number)
        found = self.acquire(owner(number), age, key, not shared, self.now, **fields)
        self.check()
        return found

    def end(self, number: int) -> list[int]:
        """Release; returns who has got a lock by that."""
        self.release(owner(number), self.now)
        self.check()
        return self.new()

    def new(self) -> list[int]:
        numbers = [int.from_bytes(wait.owner.id, "big") for wait in self.granted]
        self.granted.clear()
        return numbers


def test_an_exclusive_lock_has_one_holder_and_shared_ones_any_number():
    table = Table()
    assert table.lock(1, shared=True) is Verdict.GRANTED
    assert table.lock(2, shared=True) is Verdict.GRANTED
    assert isinstance(table.lock(3), Wait)
    assert table.end(1) == []
    assert table.end(2) == [3]
    assert isinstance(table.lock(4, shared=True), Wait)


def test_who_asks_again_keeps_what_it_has():
    table = Table()
    assert table.lock(1) is Verdict.GRANTED
    assert table.lock(1, shared=True) is Verdict.GRANTED
    holder = table.foreign(b"k", owner(2))
    assert holder is not None
    assert holder.id == owner(1)
    first = table.lock(2)
    table.now += 1
    assert table.lock(2) is first
    assert len(table.locks[b"k"].queue) == 1


def test_waiters_are_served_in_the_order_of_arrival():
    table = Table()
    table.lock(9)
    for number in (8, 3, 5):
        table.now += 1
        table.lock(number)
    served = [table.end(9), table.end(8), table.end(3)]
    assert served == [[8], [3], [5]]


def test_of_those_who_came_together_the_older_is_first():
    table = Table()
    table.lock(9)
    for number in (8, 3, 5):
        table.lock(number)
    served = [table.end(9), table.end(3), table.end(5)]
    assert served == [[3], [5], [8]]


def test_a_reader_does_not_pass_a_waiting_writer_and_readers_go_together():
    table = Table()
    table.lock(1, shared=True)
    table.lock(2)
    table.now += 1
    assert isinstance(table.lock(3, shared=True), Wait)
    assert isinstance(table.lock(4, shared=True), Wait)
    assert table.end(1) == [2]
    assert table.end(2) == [3, 4]


def test_an_older_reader_that_comes_with_a_writer_goes_beside_the_readers():
    table = Table()
    table.lock(1, shared=True)
    table.lock(5)
    assert table.lock(4, shared=True) is Verdict.GRANTED
    assert table.granted == []


def test_an_upgrade_waits_for_the_other_readers_and_for_nobody_else():
    table = Table()
    table.lock(1, shared=True)
    assert table.lock(1) is Verdict.GRANTED  # alone
    table.end(1)
    table.lock(2, shared=True)
    table.lock(3, shared=True)
    table.lock(4)
    table.now += 1
    upgrade = table.lock(3)
    assert isinstance(upgrade, Wait)
    assert [each.id for each in table.blockers_of(upgrade)] == [owner(2)]
    assert table.end(2) == [3]
    assert table.end(3) == [4]


def test_a_waiter_that_wants_more_than_before_waits_anew():
    table = Table()
    table.lock(1)
    first = table.lock(2, shared=True)
    second = table.lock(2)
    assert second is not first
    assert table.dropped == [first]
    assert table.lock(2, shared=True) is second


def test_who_is_not_to_be_queued_is_told_and_leaves_nothing():
    table = Table()
    table.lock(1)
    assert table.lock(2, queue=False) is Verdict.BUSY
    assert owner(2) not in table.owners
    table.end(1)
    assert table.locks == {}
    assert table.due() is None


def test_a_full_table_refuses_and_still_lets_upgrades_pass():
    table = Table(size_max=2)
    table.lock(1, shared=True)
    table.lock(2, b"other")
    assert table.lock(3, b"third") is Verdict.FULL
    assert table.lock(3) is Verdict.FULL
    assert table.lock(1) is Verdict.GRANTED
    table.end(2)
    assert table.lock(3, b"third") is Verdict.GRANTED


def test_a_lease_ends_unless_it_is_renewed():
    table = Table()
    table.lock(1)
    table.lock(2, b"other")
    table.now = LEASE_S - 1
    assert table.renew([owner(1), owner(7)], table.now) == [owner(7)]
    assert table.expire(LEASE_S) == 1
    table.check()
    assert table.foreign(b"k", b"") is not None
    assert table.foreign(b"other", b"") is None
    assert table.expire(2 * LEASE_S) == 1
    assert table.locks == {}
    assert table.due() is None


def test_a_waiter_that_is_not_asked_for_leaves_the_queue_and_the_next_is_served():
    table = Table()
    table.lock(1, shared=True)
    wait = table.lock(2)
    table.now = 1.0
    table.lock(3, shared=True)
    table.expire(WAIT_LEASE_S)
    table.check()
    assert table.dropped == [wait]
    assert table.new() == [3]


def test_an_owner_that_has_ended_takes_no_lock_again_for_a_lease():
    table = Table()
    table.lock(1)
    table.end(1)
    assert table.lock(1) is Verdict.ENDED
    table.end(5)  # it came later than its end
    assert table.lock(5) is Verdict.ENDED
    table.expire(LEASE_S)
    assert table.lock(1) is Verdict.GRANTED


def test_what_is_remembered_of_the_ended_is_bounded():
    table = Table()
    for number in range(ENDED_MAX + 10):
        table.release(owner(number), 0.0)
    assert table.lock(1) is Verdict.GRANTED
    assert table.lock(ENDED_MAX + 9) is Verdict.ENDED


def test_blockers_are_the_holders_and_those_before_it_up_to_a_writer():
    table = Table()
    table.lock(1, shared=True)
    waits = {}
    for number, shared in ((2, False), (3, True), (4, True), (5, False), (6, True)):
        table.now += 1
        waits[number] = table.lock(number, shared=shared)

    def blockers(number: int) -> list[int]:
        return [int.from_bytes(each.id, "big") for each in table.blockers_of(waits[number])]

    assert blockers(2) == [1]
    assert blockers(3) == [2]
    assert blockers(5) == [2, 1, 3, 4]
    assert blockers(6) == [5]


def test_blockers_that_are_told_are_bounded():
    table = Table()
    for number in range(1, 60):
        table.lock(number, shared=True)
    assert len(table.blockers_of(table.lock(60))) == BLOCKERS_MAX


def test_a_span_is_searched_for_foreign_locks():
    table = Table()
    table.lock(1, b"b")
    assert table.foreign_in(b"a", b"b", owner(2)) is None
    assert table.foreign_in(b"a", b"c", owner(1)) is None
    found = table.foreign_in(b"a", b"c", owner(2))
    assert found is not None
    assert (found[0], found[1].id) == (b"b", owner(1))


def test_a_long_queue_does_not_hide_who_holds_what_others_wait_for():
    """A report is bounded: those who wait and hold nothing here are in no cycle of this range."""
    table = Table(size_max=5_000)
    for number in range(10, 1_111):
        table.acquire(owner(number), number, b"hot", True, table.now)
    table.now += 1
    table.lock(2, b"x")
    table.lock(3, b"y")
    last = table.lock(2, b"hot")
    waits = [table.lock(3, b"x"), table.lock(2, b"y")]
    told = dict(table.long_waits(table.now, 1_000))
    assert len(told) == 1_000
    assert [[each.id for each in told[wait]] for wait in waits] == [[owner(2)], [owner(3)]]
    assert last in told, "its owner holds something, too"
    others = [wait for wait in told if wait.owner.id not in (owner(2), owner(3))]
    assert others == table.locks[b"hot"].queue[:997], "a long queue is cut at its end"
    assert all(table.blockers_of(wait) == blockers for wait, blockers in told.items())


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["exclusive", "shared", "end", "leave", "renew", "pass"]),
        st.integers(1, 5),
        st.sampled_from([b"a", b"b"]),
        st.sampled_from([0.0, 0.001, 0.5, 3.0]),
    ),
    max_size=60,
)


@given(STEPS)
def test_whatever_happens_nobody_waits_for_nothing_and_all_of_it_can_end(steps):
    table = Table(size_max=8)
    for what, number, key, delay_s in steps:
        table.now += delay_s
        table.expire(table.now)
        table.check()
        if what in ("exclusive", "shared"):
            table.lock(number, key, shared=what == "shared")
        elif what == "end":
            table.release(owner(number), table.now, ended=False)
        elif what == "leave":
            known = table.owners.get(owner(number))
            wait = known.waits.get(key) if known is not None else None
            if wait is not None:
                table.leave(wait)
        elif what == "renew":
            table.renew([owner(number)], table.now)
        table.check()
        for wait, blockers in table.long_waits(table.now, 100):
            assert blockers == table.blockers_of(wait)
        assert len(table.long_waits(table.now, 100)) == len(table.waiting)
    for number in range(1, 6):
        table.release(owner(number), table.now)
        table.check()
    assert (table.locks, table.owners, table.waiting, table.held) == ({}, {}, {}, 0)
    assert table.due() is None


@pytest.mark.parametrize("shared", [False, True])
def test_nobody_waits_for_ever_while_others_come_and_go(shared):
    """Every waiter is served after as many endings as there were owners before it."""
    table = Table()
    table.lock(1000)
    patient = 1001
    table.now += 1
    table.lock(patient, shared=shared)
    holder = 1000
    for number in range(20):  # newcomers, each older than the patient one, of both kinds
        table.now += 1
        table.lock(number + 1, shared=number % 2 == 0)
    assert table.end(holder)[0] == patient
