"""Claims: the observer of I21 tells of a table that is not right, and of a deadlock that lasts in peace; of nothing else."""

from __future__ import annotations

from kvstore.sim.observers.locks import LATE_S, Locks
from kvstore.sim.observers.report import Report
from txn.deadlocks import CYCLE_S
from txn.locks import LockTable

BOUND_S = CYCLE_S + LATE_S


def owner(number: int) -> bytes:
    return number.to_bytes(16, "big")


def world() -> tuple[list[str], Locks, list[tuple[str, int, LockTable]]]:
    """Two ranges: 1 holds a and waits for z, 2 holds z; not yet a deadlock."""
    told: list[str] = []
    low, high = LockTable(100, 10.0), LockTable(100, 10.0)
    low.acquire(owner(1), 1, b"a", True, 0.0)
    high.acquire(owner(2), 2, b"z", True, 0.0)
    high.acquire(owner(1), 1, b"z", True, 0.0)
    return told, Locks(Report(told.append)), [("n1", 2, low), ("n2", 3, high)]


def test_a_wait_is_no_deadlock_however_long_it_lasts():
    told, locks, tables = world()
    for now in (0.0, BOUND_S, 9 * BOUND_S):
        locks.look(tables, now, True)
    assert told == []


def test_a_deadlock_over_two_ranges_is_told_when_it_lasts_in_peace():
    told, locks, tables = world()
    tables[0][2].acquire(owner(2), 2, b"a", True, 0.0)
    locks.look(tables, 0.0, False)
    locks.look(tables, 2 * BOUND_S, True)  # since now, as far as it matters
    locks.look(tables, 3 * BOUND_S - 0.1, True)
    assert told == []
    locks.look(tables, 3 * BOUND_S + 0.1, True)
    assert len(told) == 2
    assert all("I21" in text for text in told)


def test_a_waiter_that_nobody_holds_up_is_told_at_once():
    told, locks, tables = world()
    lock = tables[1][2].locks[b"z"]
    lock.holders.clear()
    locks.look(tables, 0.0, False)
    assert "I21" in told[0]
    assert "held by nobody" in told[0]
