"""Claims of holds: the floor is the oldest that any live client holds, as long as its lease lasts, and not beyond the bound; a
new oracle knows nothing until everybody had time to tell it. And of a client's open views: what is in use is held."""

from __future__ import annotations

import asyncio
import math

import pytest

from kvstore import holds
from kvstore.client import Database
from kvstore.errors import ClientClosed
from kvstore.holds import HOLD_AFTER_S, LEASE_S, RECKON_S, RENEW_S, Holds
from kvstore.open_views import IDLE_S
from tests.unit.kvstore.fake_cluster import FakeCluster, simulate
from txn.messages import GetTimestamps, KeepLocks
from txn.types import TIMESTAMP_SHIFT

HOUR = 3_600_000 << TIMESTAMP_SHIFT
ISSUED = 10 * HOUR


def known(hold_s: float = 3600.0) -> tuple[Holds, float]:
    """One whose term is old enough, and the time."""
    found = Holds(hold_s)
    found.start_term(0.0)
    return found, LEASE_S


def test_a_new_oracle_says_that_it_does_not_know():
    found = Holds(3600.0)
    assert found.floor(ISSUED, 100.0) == 0  # it has no term
    found.start_term(100.0)
    assert found.floor(ISSUED, 100.0 + LEASE_S - 0.01) == 0
    assert found.floor(ISSUED, 100.0 + LEASE_S) == ISSUED


def test_a_new_term_forgets_and_does_not_know_again():
    found, now = known()
    found.hold(1, ISSUED - 5, now)
    found.start_term(now)
    assert len(found) == 0
    assert found.floor(ISSUED, now) == 0


def leaping(retention_s: float = 600.0) -> tuple[Holds, float]:
    """One that knows, of a cluster that keeps versions for so long, and the time; the last timestamp is ISSUED."""
    found = Holds(3600.0, int(retention_s * 1000) << TIMESTAMP_SHIFT)
    found.start_term(0.0)
    assert found.floor(ISSUED, LEASE_S) == ISSUED
    return found, LEASE_S


@pytest.mark.parametrize("idle_s", [301, 3600, 7200, 1_000_000])
def test_after_timestamps_have_leapt_nothing_is_collected_until_everybody_could_tell(idle_s):
    """Seed 944: a reader began, a stuck clock was set, and a sweep took what the reader had just begun to read."""
    found, now = leaping()
    leapt = ISSUED + (idle_s * 1000 << TIMESTAMP_SHIFT)
    now += 0.1
    assert found.floor(leapt, now) == 0
    found.hold(1, ISSUED, now + 1.5)
    assert found.floor(leapt, now + LEASE_S - 0.01) == 0
    assert found.floor(leapt, now + LEASE_S) == ISSUED


def running(found: Holds, issued: int, now: float, seconds: float, rate: float = 1.0) -> int:
    """Time passes, and the session 1 says each second what it holds; timestamps move by `rate`. Returns the last one."""
    for _ in range(int(seconds)):
        now += 1.0
        issued += int(rate * 1000) << TIMESTAMP_SHIFT
        found.hold(1, ISSUED, now)
        found.floor(issued, now)
    return issued


def test_what_is_held_when_timestamps_leap_is_held_as_long_as_all_else_and_no_longer():
    """Leaps are no time: however many there are, and however far."""
    found, now = leaping()
    issued = ISSUED
    for leap_s in (7_200, 100, 86_400):
        issued = running(found, issued + (leap_s * 1000 << TIMESTAMP_SHIFT), now, 1_000)
        now += 1_000
        assert found.floor(issued, now) == ISSUED
    issued, now = running(found, issued, now, 590), now + 590
    assert found.floor(issued, now) == ISSUED
    issued, now = running(found, issued, now, 80), now + 80  # 1 h, and at most 1/64 of that
    assert 0 <= found.floor(issued, now) - (ISSUED + 2 * HOUR) < HOUR // 32, "soon after it leapt"
    found.hold(1, 0, now)
    assert found.floor(issued, now + RECKON_S) == issued


def test_idle_time_ends_no_hold_of_what_is_still_the_newest():
    found, now = leaping()
    assert running(found, ISSUED, now, 7_200, rate=0.0) == ISSUED
    assert found.floor(ISSUED, now + 7_200) == ISSUED
    issued = running(found, ISSUED + 2 * HOUR, now + 7_200, 3_500)
    assert found.floor(issued, now + 7_200 + 3_500) == ISSUED


def test_what_was_issued_when_is_remembered_in_few_places():
    found, now = leaping()
    running(found, ISSUED, now, 10_000)
    assert len(found._passed) <= holds.PLACES + 2
    found.start_term(now + 10_000)
    assert len(found._passed) == 0


def test_an_oracle_that_stood_still_ends_no_lease_before_everybody_could_tell_it():
    found, now = known()
    found.hold(1, ISSUED - 5, now)
    found.hold(2, ISSUED - 9, now)
    assert found.floor(ISSUED, now) == ISSUED - 9
    now += LEASE_S + 1.0  # its process was stopped, or its machine slept: it has heard nobody
    assert found.floor(ISSUED, now) == 0
    found.hold(1, ISSUED - 5, now + 1.0)
    assert found.floor(ISSUED, now + LEASE_S - 0.01) == 0
    assert found.floor(ISSUED, now + LEASE_S) == ISSUED - 5


def test_timestamps_that_move_with_time_or_by_little_do_not_count_as_a_leap():
    found, now = leaping()
    issued = ISSUED
    for step_s, gap_s in (
        (600.0, 600.0),
        (299.0, 0.5),
        (100.0, 500.0),
        (250.0, 1.0),
        (0.0, 3600.0),
    ):
        answers = math.ceil(gap_s / LEASE_S)
        for _ in range(answers):
            issued += int(step_s / answers * 1000) << TIMESTAMP_SHIFT
            now += gap_s / answers
            assert found.floor(issued, now) == issued


def test_a_leap_from_one_term_to_the_next_is_covered_by_the_term_alone():
    found, now = leaping()
    found.start_term(now)
    assert found.floor(ISSUED + 2 * HOUR, now + LEASE_S) == ISSUED + 2 * HOUR


def test_who_keeps_all_versions_knows_no_leaps():
    found, now = known()
    assert found.floor(ISSUED, now) == ISSUED
    assert found.floor(ISSUED + 2 * HOUR, now + RECKON_S) == ISSUED + 2 * HOUR


def test_the_oldest_of_all_counts_at_once_and_until_it_is_given_back():
    found, now = known()
    assert found.floor(ISSUED, now) == ISSUED
    found.hold(1, ISSUED - 5, now)
    found.hold(2, ISSUED - 9, now)
    assert found.floor(ISSUED, now) == ISSUED - 9
    found.hold(2, 0, now)
    assert found.floor(ISSUED, now + RECKON_S) == ISSUED - 5


def test_a_client_that_is_not_heard_of_any_more_holds_nothing_after_its_lease():
    found, now = known()
    found.hold(1, ISSUED - 5, now)
    assert found.floor(ISSUED, now + LEASE_S) == ISSUED - 5
    assert found.floor(ISSUED, now + LEASE_S + RECKON_S + 0.01) == ISSUED
    assert len(found) == 0


def test_a_renewed_hold_lasts():
    found, now = known()
    for number in range(10):
        found.hold(1, ISSUED - 5, now + 3.0 * number)
        assert found.floor(ISSUED + number, now + 3.0 * number) == ISSUED - 5


def test_nobody_holds_back_further_than_the_bound():
    found, now = known()
    found.hold(1, 1, now)
    assert found.floor(ISSUED, now) == ISSUED - HOUR


def test_sessions_are_bounded_and_those_that_are_known_go_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(holds, "SESSIONS_MAX", 2)
    found, now = known()
    for session in (1, 2, 3):
        found.hold(session, ISSUED - session, now)
    assert len(found) == 2
    assert found.floor(ISSUED, now) == ISSUED - 2
    found.hold(1, ISSUED - 7, now)
    assert found.floor(ISSUED, now) == ISSUED - 7


@pytest.mark.parametrize("read_before", [False, True])
def test_a_snapshot_is_held_until_its_end_even_if_it_was_read_before_its_beginning(
    read_before: bool,
):
    async def test(cluster: FakeCluster, db: Database) -> None:
        snapshot = db.snapshot(await db.put(b"k", b"v"))
        if read_before:
            await asyncio.sleep(2.0)
            await snapshot.get(b"k")
        async with snapshot:
            at = await snapshot.version()
            await asyncio.sleep(IDLE_S + 60.0)
            assert cluster.of(GetTimestamps)[-1].oldest == at
        await asyncio.sleep(10.0)
        assert cluster.of(GetTimestamps)[-1].oldest == 0

    simulate(test)


@pytest.mark.parametrize("by", ["lock", "id"])
def test_a_transaction_is_held_from_the_oldest_that_its_commit_rests_on(by: str):
    """The guard of a locking read is of that time; and what began before something was collected has expired."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.ignore(KeepLocks, times=100)
        async with db.transaction() as tx:
            if by == "lock":
                await tx.get_for_update(b"k")
            else:
                tx.put(b"k", b"v")
                assert tx.id
            began = cluster.ts
            await asyncio.sleep(HOLD_AFTER_S + RENEW_S)
            assert cluster.of(GetTimestamps)[-1].oldest == began
            cluster.seed(other=b"v")
            await tx.get(b"other")  # its snapshot is newer
            assert tx.read_version == cluster.ts > began
            await asyncio.sleep(2 * RENEW_S)
            assert cluster.of(GetTimestamps)[-1].oldest == began
        await asyncio.sleep(2 * RENEW_S)
        assert cluster.of(GetTimestamps)[-1].oldest == 0

    simulate(test)


def test_a_snapshot_that_is_read_after_its_client_was_closed_keeps_nothing():
    async def test(cluster: FakeCluster, db: Database) -> None:
        snapshot = db.snapshot()
        await snapshot.get(b"k")
        await asyncio.sleep(HOLD_AFTER_S + 1.0)
        await db.close()
        with pytest.raises(ClientClosed):
            await snapshot.get(b"k")
        assert len(db._views) == 0
        assert db._views._timer is None

    simulate(test)
