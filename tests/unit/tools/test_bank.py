"""Claims of `tools.bank`: who checked nothing has not held. Time is virtual, and the database is a few lines."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from kvstore.errors import Unavailable
from kvstore.sim import loop as simulated
from tools.bank import ACCOUNTS, OPENING, PEACE_S, Bank


class Accounts:
    """A database whose snapshots fail until an instant. `missing`: what the first account lacks."""

    def __init__(self, ready_at: float = 0.0, missing: int = 0) -> None:
        self.ready_at, self.missing = ready_at, missing

    def snapshot(self) -> Accounts:
        return self

    async def get_many(self, keys: list[bytes]) -> dict[bytes, bytes]:
        if asyncio.get_running_loop().time() < self.ready_at:
            raise Unavailable("not yet")
        return {
            key: b"%d" % (OPENING - (0 if number else self.missing))
            for number, key in enumerate(keys)
        }


def after(work: Coroutine[Any, Any, object], bank: Bank) -> list[str]:
    simulated.run(lambda _loop: work, 1)
    return bank.broken


def made(**accounts: Any) -> Bank:
    """After a run with one transfer and one total."""
    db: Any = Accounts(**accounts)
    bank = Bank(db, seed=1, until=0.0)
    bank.acknowledged[b"marker"] = 5
    bank.snapshots = 1
    return bank


def test_the_last_total_is_asked_for_until_it_is_told() -> None:
    bank = made(ready_at=1000.0 + PEACE_S / 2)
    assert after(bank.last_audit(), bank) == []
    assert bank.snapshots == 2


def test_a_last_total_that_is_never_told_has_not_held() -> None:
    bank = made(ready_at=1e9)
    (told,) = after(bank.last_audit(), bank)
    assert told == f"in peace no total could be read for {PEACE_S:g} s"


def test_a_last_total_that_is_wrong_has_not_held() -> None:
    bank = made(missing=7)
    assert after(bank.last_audit(), bank) == [
        f"a snapshot's total is {ACCOUNTS * OPENING - 7}, not {ACCOUNTS * OPENING}"
    ]


@pytest.mark.parametrize(
    ("snapshots", "acknowledged", "told"),
    [
        (1, {b"m": 5}, []),
        (0, {b"m": 5}, ["no total was checked while money was moved"]),
        (1, {}, ["no transfer was acknowledged"]),
    ],
)
def test_a_run_in_which_nothing_was_done_or_checked_has_not_held(
    snapshots: int, acknowledged: dict[bytes, int], told: list[str]
) -> None:
    bank = made()
    bank.snapshots, bank.acknowledged = snapshots, acknowledged
    assert after(bank.last_audit(), bank) == told


def test_what_fails_while_it_runs_is_counted() -> None:
    bank = made(ready_at=1e9)
    assert after(bank.audit(), bank) == []
    assert bank.errors == {f"snapshot {Unavailable.code}": 1}
