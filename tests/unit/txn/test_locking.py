"""Claims of locking reads at a leader (txn/locking.py): what they return, whom they keep away, for how long, and that each
request is answered once. The table itself: test_locks.py; the detector: test_deadlocks.py."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.txn.txn_driver import Asked, Range, put, settled, stored, txn_id
from txn import stamps
from txn.deadlocks import DETECTOR_KEY, REPORT_S, WAITED_S
from txn.evaluate import Limits
from txn.messages import (
    FRESH_LEASE_S,
    LOCK_POLL_S,
    Ack,
    Failure,
    KeepLocks,
    LockLeases,
    LockPending,
    LockRead,
    LockWaits,
    PrepareReply,
    ReadReply,
    Resolve,
    Unlock,
    Victim,
    Victims,
)
from txn.types import FenceReason, Guard, PartStatus, Write, WriteKind, point_end

LEASE_S = Limits().lock_lease_s
QUEUE = b"q/"


def push() -> Write:
    return Write(WriteKind.STAMPED_KEY, QUEUE, stamps.stamped(0, b"v"))


def owner(number: int) -> bytes:
    return txn_id(number, 50)


def lock(place: Range, number: int, key: bytes = b"k", **fields: Any) -> Asked:
    """Ask for a lock; it may wait."""
    fields.setdefault("wait_s", LOCK_POLL_S)
    age = fields.pop("age", number)
    asked = place.ask(LockRead(0, 0, 0, key, owner(number), age, **fields))
    place.settle()
    return asked


def commit(place: Range, number: int, key: bytes, at: int, value: bytes = b"new", **fields: Any):
    """The owner writes what it has locked, guarded by its read at `at`."""
    guards = [Guard(key, point_end(key), at)]
    begin_ts = fields.pop("begin_ts", 60)
    return place.prepare(
        number,
        put(key, value),
        guards=guards,
        lock_owner=owner(number),
        begin_ts=begin_ts,
        **fields,
    )


def held(asked: Asked) -> ReadReply:
    assert isinstance(asked.reply, ReadReply)
    assert asked.confirm
    return asked.reply


def unlock(place: Range, number: int, key: bytes = b"k", **fields: Any) -> None:
    asked = place.ask(Unlock(0, 0, 0, key, owner(number), **fields))
    place.settle()
    assert isinstance(asked.reply, Ack)


def test_a_lock_returns_the_newest_version_without_asking_the_oracle():
    place = Range()
    version = stored(place, b"k", b"old")
    asked = place.ask(LockRead(0, 0, 0, b"k", owner(1), 1, False, 0.5))
    reply = held(asked)
    assert (reply.versions, reply.values) == ([version], [b"old"])
    assert reply.at >= version
    assert not place.evaluator.await_read


def test_a_lock_of_an_absent_or_deleted_key_says_so():
    place = Range()
    assert held(lock(place, 1)).values == [None]
    stored(place, b"gone")
    settled(place, place.prepare(5, Write(WriteKind.DELETE, b"gone")))
    reply = held(lock(place, 1, b"gone"))
    assert (reply.versions, reply.values) == ([0], [None])


def test_the_second_waits_until_the_first_has_committed_and_sees_its_value():
    place = Range()
    stored(place, b"k")
    first = held(lock(place, 1))
    second = lock(place, 2)
    assert second.open
    done = settled(place, commit(place, 1, b"k", first.at)).reply
    assert done.status == PartStatus.COMMITTED
    reply = held(second)
    assert (reply.versions, reply.values) == ([done.ts], [b"new"])


def test_no_version_comes_at_or_below_what_a_lock_was_served_at():
    place = Range()
    first = held(lock(place, 1))
    done = settled(place, commit(place, 1, b"k", first.at)).reply
    assert done.ts > first.at
    second = held(lock(place, 2))
    later = settled(place, commit(place, 2, b"k", second.at)).reply
    assert later.ts > second.at >= done.ts


def test_a_writer_that_was_latched_before_is_waited_for():
    place = Range()
    writer = place.prepare(5, put(b"k", b"theirs"))
    asked = place.ask(LockRead(0, 0, 0, b"k", owner(1), 1, False, 0.5))
    assert asked.open
    place.settle()
    assert held(asked).versions == [writer.reply.ts]


@pytest.mark.parametrize("shared", [False, True])
def test_a_part_that_was_prepared_before_is_waited_for(shared):
    place = Range()
    place.part(5, put(b"k", b"theirs"))
    place.settle()
    asked = lock(place, 1, shared=shared)
    assert asked.open
    place.resolve(5, b"k", place.clock)
    place.settle()
    assert held(asked).values == [b"theirs"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_lock_where_an_undecided_stamped_key_may_come_waits_for_it(shared):
    place = Range()
    part = settled(place, place.part(5, push(), locus=QUEUE)).reply
    key = QUEUE + stamps.stamp(part.ts, 0)
    stored(place, b"other")  # newer timestamps are issued than the part may get
    asked = lock(place, 1, key, shared=shared)
    assert asked.open
    place.resolve(5, QUEUE, part.ts)
    place.settle()
    reply = held(asked)
    assert (reply.versions, reply.values) == ([part.ts], [b"v"])


def test_a_stamped_key_waits_for_a_lock_of_what_it_may_become_and_passes_others():
    place = Range()
    older = settled(place, place.prepare(5, push())).reply.ts
    held(lock(place, 1, QUEUE + stamps.stamp(older, 0)))
    held(lock(place, 1, QUEUE))
    assert settled(place, place.prepare(6, push())).reply.status == PartStatus.COMMITTED
    held(lock(place, 1, QUEUE + stamps.stamp(place.clock + 1, 0)))
    writer = place.prepare(7, push())
    place.settle()
    assert writer.open
    unlock(place, 1, QUEUE)
    assert settled(place, writer).reply.status == PartStatus.COMMITTED


def test_a_guard_that_was_prepared_before_keeps_a_writers_lock_waiting_and_no_readers():
    place = Range()
    stored(place, b"k")
    place.part(5, put(b"other"), guards=[Guard(b"k", b"k\x00", place.clock)], locus=b"other")
    place.settle()
    held(lock(place, 1, shared=True))
    unlock(place, 1)
    asked = lock(place, 2)
    assert asked.open
    place.resolve(5, b"other", 0)
    place.settle()
    held(asked)


def test_guards_that_come_without_end_keep_no_locker_waiting():
    place = Range()
    version = stored(place, b"k")

    def read_beside(number: int) -> None:
        guard = Guard(b"k", point_end(b"k"), place.clock)
        place.prepare(100 + number, put(b"x%d" % number), guards=[guard])

    read_beside(0)
    asked = place.ask(LockRead(0, 0, 0, b"k", owner(1), 1, False, LOCK_POLL_S))
    for number in range(1, 5):
        place.stamp()
        read_beside(number)  # while the entry of the one before is in flight
        place.commit()
        place.evaluator.run_again(place.now)
    assert held(asked).versions == [version]


def test_a_part_that_does_not_end_is_asked_about_and_the_client_is_told_to_wait_on():
    place = Range()
    place.part(5, put(b"k", b"theirs"))
    place.settle()
    asked = lock(place, 1)
    place.pass_time(LOCK_POLL_S)
    assert asked.reply == LockPending(0, txn_id(5))
    assert [key for key, _, _ in place.calls] == [b"zz"]


def test_a_client_is_told_of_its_holder_before_it_takes_the_leader_for_dead():
    place = Range()
    lock(place, 1)
    asked = lock(place, 2)
    place.pass_time(LOCK_POLL_S)
    assert asked.reply == LockPending(0, owner(1))
    again = lock(place, 2)
    assert again.open
    assert len(place.evaluator.locking.table.locks[b"k"].queue) == 1


def test_between_two_polls_a_waiter_keeps_its_place():
    place = Range()
    lock(place, 1)
    lock(place, 2)
    place.pass_time(LOCK_POLL_S)  # 2 was answered
    third = lock(place, 3)
    unlock(place, 1)
    assert third.open
    held(lock(place, 2))
    unlock(place, 2)
    held(third)


def test_a_copy_of_a_request_is_answered_too():
    place = Range()
    lock(place, 1)
    one, two = lock(place, 2), lock(place, 2)
    unlock(place, 1)
    assert held(one) == held(two)


def test_who_does_not_want_to_wait_is_told_at_once():
    place = Range()
    lock(place, 1)
    assert lock(place, 2, wait_s=0.0).reply == LockPending(0, owner(1))
    assert place.evaluator.locking.table.waiting == {}


def test_a_foreign_write_waits_for_the_lock_and_then_follows_it():
    place = Range()
    first = held(lock(place, 1))
    writer = place.prepare(5, put(b"k", b"theirs"))
    behind = lock(place, 2)
    place.settle()
    assert writer.open
    done = settled(place, commit(place, 1, b"k", first.at)).reply
    assert writer.reply.ts > done.ts
    assert held(behind).versions == [writer.reply.ts]


def test_a_foreign_write_waits_for_a_bounded_time_and_is_then_refused_with_the_holder():
    place = Range()
    lock(place, 1)
    writer = place.prepare(5, put(b"k"))
    place.pass_time(place.limits.lock_wait_s)
    place.settle()
    reply = writer.reply
    assert (reply.status, reply.reason) == (PartStatus.FENCED, FenceReason.CONFLICT)
    assert (reply.key, reply.other_txn) == (b"k", owner(1))
    assert place.evaluator.locking.table.waiting == {}


def test_a_part_of_a_larger_transaction_waits_only_as_long_as_for_a_part():
    place = Range()
    lock(place, 1)
    part = place.part(5, put(b"k"))
    place.pass_time(place.limits.conflict_wait_s)
    place.settle()
    assert part.reply.reason == FenceReason.CONFLICT


def test_readers_guards_and_other_keys_do_not_meet_a_lock():
    place = Range()
    version = stored(place, b"k")
    lock(place, 1)
    assert settled(place, place.read(b"k")).reply.versions == [version]
    guard = Guard(b"k", b"k\x00", place.clock)
    assert settled(place, place.prepare(5, put(b"x"), guards=[guard])).reply.status == 3


def test_a_deletion_of_a_span_meets_the_locks_inside():
    place = Range(end=b"x")
    lock(place, 1)
    asked = place.prepare(5, Write(WriteKind.DELETE_RANGE, b"a", b"m"), locus=b"a")
    place.settle()
    assert asked.open
    unlock(place, 1)
    assert asked.reply.status == PartStatus.COMMITTED


def test_a_holders_own_write_passes_and_a_shared_one_waits_for_the_other_readers():
    place = Range()
    first = held(lock(place, 1, shared=True))
    held(lock(place, 2, shared=True))
    asked = commit(place, 1, b"k", first.at)
    place.settle()
    assert asked.open
    unlock(place, 2)
    assert asked.reply.status == PartStatus.COMMITTED


def test_a_lock_goes_when_its_owners_part_is_prepared_and_the_next_waits_for_the_part():
    place = Range()
    first = held(lock(place, 1))
    second = lock(place, 2)
    part = commit(place, 1, b"k", first.at, one_range=False, anchor_key=b"zz")
    place.settle()
    assert part.reply.status == PartStatus.PREPARED
    holder = place.evaluator.locking.table.foreign(b"k", b"")
    assert holder is not None
    assert holder.id == owner(2)
    assert second.open
    place.ask(_resolve(1, part.reply.ts))
    place.settle()
    assert held(second).versions == [part.reply.ts]


def _resolve(number: int, ts: int) -> Resolve:
    return Resolve(0, 0, 0, txn_id(number, 60), b"zz", b"k", b"k", b"k\x00", ts)


def test_a_lock_goes_when_its_owners_attempt_is_refused():
    place = Range()
    first = held(lock(place, 1))
    asked = commit(place, 1, b"k", first.at, expects=[])
    place.settle()
    second = held(lock(place, 2))
    third = lock(place, 3)
    assert asked.reply.status == PartStatus.COMMITTED
    refused = settled(place, commit(place, 2, b"k", first.at)).reply
    assert refused.reason == FenceReason.CONFLICT  # it is validated all the same
    assert second.versions == held(third).versions


def test_who_has_read_what_is_no_longer_the_newest_is_refused_instead_of_waiting_for_a_lock():
    place = Range()
    first = held(lock(place, 1))
    settled(place, commit(place, 1, b"k", first.at))
    second = held(lock(place, 2))
    stale = settled(place, commit(place, 3, b"k", first.at)).reply
    assert (stale.status, stale.reason) == (PartStatus.FENCED, FenceReason.CONFLICT)
    assert settled(place, commit(place, 2, b"k", second.at)).reply.status == PartStatus.COMMITTED


def test_a_fresh_one_is_read_at_a_new_timestamp_after_what_was_there_and_is_held_for_a_short_lease():
    place = Range()
    stored(place, b"k", b"old")
    place.part(5, put(b"k", b"theirs"))
    place.settle()
    asked = lock(place, 1, fresh=True)
    assert asked.open
    place.resolve(5, b"k", place.clock)
    before = place.clock
    place.settle()
    reply = held(asked)
    assert reply.values == [b"theirs"]
    assert reply.at >= before, "whatever was committed before shows"
    waiting = lock(place, 2)
    place.pass_time(FRESH_LEASE_S - 0.1)
    place.ask(waiting.request)
    place.settle()
    assert place.evaluator.locking.table.foreign(b"k", owner(2)) is not None
    place.pass_time(0.2)
    assert place.evaluator.locking.table.foreign(b"k", owner(2)) is None


def test_a_lock_that_was_lost_with_its_leader_costs_a_conflict_and_no_update():
    place = Range()
    first = held(lock(place, 1))
    waiting = lock(place, 2)
    place.lead()
    assert waiting.reply == Failure(0, "not_leader")
    other = held(lock(place, 3))
    settled(place, commit(place, 3, b"k", other.at))
    late = settled(place, commit(place, 1, b"k", first.at)).reply
    assert (late.status, late.reason) == (PartStatus.FENCED, FenceReason.CONFLICT)


def test_a_lock_that_nobody_keeps_alive_ends_with_its_lease_and_the_next_is_served():
    place = Range()
    lock(place, 1)
    place.pass_time(LEASE_S - 0.1)
    asked = lock(place, 2)
    place.pass_time(0.1)
    held(asked)


def test_a_lock_that_is_kept_alive_stays():
    place = Range()
    lock(place, 1)
    place.pass_time(LEASE_S - 1)
    kept = place.ask(KeepLocks(0, 0, 0, b"k", [owner(1), owner(9)]))
    assert kept.reply == LockLeases(0, LEASE_S, [owner(9)])
    place.pass_time(LEASE_S - 1)
    assert lock(place, 2).open


def test_a_late_copy_of_a_lock_request_takes_nothing_after_the_end():
    place = Range()
    lock(place, 1)
    unlock(place, 1)
    assert lock(place, 1).reply.code == "transaction_closed"
    held(lock(place, 2))


def test_a_wait_that_is_cancelled_leaves_the_queue_and_keeps_the_other_locks():
    place = Range()
    lock(place, 1)
    lock(place, 2, b"other")
    waiting = lock(place, 2)
    unlock(place, 2, waits_only=True)
    assert waiting.reply == LockPending(0, owner(1))
    assert place.evaluator.locking.table.waiting == {}
    assert lock(place, 3, b"other").open


def test_a_commit_keeps_the_place_of_a_wait_for_the_same_key_and_goes_on_when_that_is_cancelled():
    place = Range()
    lock(place, 1)
    waiting = lock(place, 2)
    writer = place.prepare(2, put(b"k"), lock_owner=owner(2), begin_ts=60)
    place.settle()
    unlock(place, 2, waits_only=True)
    assert waiting.reply == LockPending(0, owner(1))
    assert writer.open
    unlock(place, 1)
    assert writer.reply.status == PartStatus.COMMITTED
    assert place.evaluator.locking.table.waiting == {}


def test_a_commit_that_took_the_place_of_a_wait_is_nobodys_victim():
    place = Range()
    lock(place, 1)
    lock(place, 2)
    place.pass_time(WAITED_S)
    number = place.calls[0][1].edges[0].number
    writer = place.prepare(2, put(b"k"), lock_owner=owner(2), begin_ts=60)
    place.answer(Victims(0, [Victim(number, [owner(2), owner(1)])]))
    place.settle()
    assert writer.open
    unlock(place, 1)
    assert writer.reply.status == PartStatus.COMMITTED


@pytest.mark.parametrize("end", ["dropped", "wrong", "silent behind another"])
@pytest.mark.parametrize("lock_owner", [b"", owner(2)], ids=["without locks", "with a lock"])
def test_a_commit_that_waited_and_failed_waits_again_when_it_is_repeated(end, lock_owner):
    """The end of its first wait was kept, and the next lock in its way refused it at once."""
    place = Range()
    wait_s = place.limits.lock_wait_s
    lock(place, 1)
    if lock_owner:
        lock(place, 2, b"mine")

    def again() -> Asked:
        return place.prepare(2, put(b"k"), put(b"l"), lock_owner=lock_owner, begin_ts=60)

    first = again()
    place.pass_time(wait_s - 0.1)
    if end == "wrong":
        place.state.row.start = b"l"
    elif end == "silent behind another":
        place.prepare(7, put(b"l"))  # is latched
    place.ask(Unlock(0, 0, 0, b"k", owner(1)))
    place.run_again()
    if end == "wrong":
        place.state.row.start = b""
    elif end == "dropped":
        place.stamp()
        place.evaluator.dropped(place.take(), "throttled")
    else:
        place.pass_time(place.limits.read_wait_s)
    assert isinstance(first.reply, Failure)
    place.pass_time(0.15)
    place.settle()
    lock(place, 3, b"l")
    second = again()
    place.settle()
    assert second.open
    unlock(place, 3, b"l")
    assert second.reply.status == PartStatus.COMMITTED


def test_an_end_of_the_transaction_answers_its_waits():
    place = Range()
    lock(place, 1)
    waiting = lock(place, 2)
    unlock(place, 2)
    assert waiting.reply.code == "transaction_closed"


def test_a_full_table_throttles():
    place = Range(limits=Limits(locks_max=1))
    lock(place, 1)
    assert lock(place, 2, b"other").reply.code == "throttled"
    writer = place.prepare(5, put(b"k"))
    place.settle()
    assert writer.reply.reason == FenceReason.CONFLICT


def test_what_is_not_this_ranges_or_malformed_is_refused():
    place = Range(b"b", b"m")
    assert lock(place, 1, b"a").reply.code == "epoch_mismatch"
    asked = place.ask(LockRead(0, 0, 9, b"c", owner(1), 1))
    assert asked.reply.code == "epoch_mismatch"
    asked = place.ask(LockRead(0, 0, 0, b"c", b"short", 1))
    assert asked.reply.code == "invalid_argument"


def test_long_waits_are_reported_to_the_detector_one_report_at_a_time():
    place = Range()
    lock(place, 1)
    lock(place, 2)
    assert place.calls == []
    place.pass_time(WAITED_S)
    ((key, report, _),) = place.calls
    assert key == DETECTOR_KEY
    assert isinstance(report, LockWaits)
    assert [(each.waiter, each.blockers) for each in report.edges] == [(owner(2), [owner(1)])]
    place.pass_time(REPORT_S)
    assert len(place.calls) == 1
    place.answer(Victims(0, []))
    place.pass_time(REPORT_S)
    assert [call[1].after for call in place.calls] == [1]


def test_a_report_that_was_not_answered_is_followed_by_one_that_does_not_name_it():
    """It may come after the next one was made: then it says nothing about when that was."""
    place = Range()
    lock(place, 1)
    lock(place, 2)
    place.pass_time(WAITED_S)
    place.answer(Victims(0, []))
    said = []
    for reply in (Failure(0, "timeout"), Failure(0, "unavailable"), Victims(0, []), Victims(0, [])):
        place.pass_time(REPORT_S)
        ((_, report, _),) = place.calls
        said.append((report.number, report.after))
        place.answer(reply)
    assert said == [(2, 1), (3, 1), (4, 1), (5, 4)]


def test_who_has_to_give_way_is_told_the_cycle_and_the_next_in_the_queue_goes_on():
    place = Range()
    lock(place, 1, shared=True)
    victim = lock(place, 2)
    behind = lock(place, 3, shared=True)
    place.pass_time(WAITED_S)
    number = place.calls[0][1].edges[0].number
    place.answer(Victims(0, [Victim(number, [owner(2), owner(1)])]))
    place.settle()
    failure = victim.reply
    assert failure.code == "deadlock"
    assert failure.details["cycle"] == [owner(2), owner(1)]
    assert owner(1).hex() in failure.message
    held(behind)


def test_who_has_to_give_way_between_two_polls_is_told_at_the_next():
    place = Range()
    lock(place, 1)
    lock(place, 2)
    place.pass_time(WAITED_S)
    number = place.calls[0][1].edges[0].number
    place.pass_time(LOCK_POLL_S)
    place.answer(Victims(0, [Victim(number, [owner(2), owner(1)])]))
    assert lock(place, 2).reply.code == "deadlock"


def test_a_writer_and_a_locker_that_wait_for_each_other_are_reported_as_a_cycle():
    """1 commits a write of what 2 has locked, and 2 waits for 1's other lock: the locker gives way."""
    place = Range()
    first = held(lock(place, 1, b"a"))
    lock(place, 2, b"k")
    waiting = lock(place, 2, b"a")
    guards = [Guard(b"a", b"a\x00", first.at)]
    writer = place.prepare(1, put(b"k"), guards=guards, lock_owner=owner(1), begin_ts=60)
    for _ in range(3):
        place.pass_time(REPORT_S)
        while place.calls:
            _, report, _ = place.calls[0]
            asked = place.ask(report)
            place.answer(asked.reply)
    place.settle()
    assert waiting.reply.code == "deadlock"
    unlock(place, 2, b"a")
    assert isinstance(writer.reply, PrepareReply)
    assert writer.reply.status == PartStatus.COMMITTED
