"""Claims V1 to V3 of versionstamps: what they are, who meets an undecided one, and who does not."""

from __future__ import annotations

import pytest

from tests.unit.txn.txn_driver import Range, put, settled, stored
from txn import stamps
from txn.commands import PreparePart
from txn.messages import TxnReply
from txn.types import FenceReason, Guard, PartStatus, TxnStatus, Write, WriteKind, point_end

Q = b"q/"


def push(value: bytes = b"v", number: int = 0, prefix: bytes = Q) -> Write:
    return Write(WriteKind.STAMPED_KEY, prefix, stamps.stamped(number, value))


def key_of(version: int, number: int = 0) -> bytes:
    return Q + stamps.stamp(version, number)


def test_keys_carry_the_commit_version_and_the_number_of_the_write():
    place = Range()
    reply = settled(place, place.prepare(1, push(b"one"), push(b"two", 1))).reply
    assert reply.status == PartStatus.COMMITTED
    rows = place.scan(Q, b"q0", at=place.clock).reply
    assert rows.keys == [key_of(reply.ts), key_of(reply.ts, 1)]
    assert rows.values == [b"one", b"two"]


def test_values_carry_it_behind_what_was_given():
    place = Range()
    write = Write(WriteKind.STAMPED_VALUE, b"last", stamps.stamped(3, b"at:"))
    reply = settled(place, place.prepare(1, write)).reply
    assert place.read(b"last", at=place.clock).reply.values == [b"at:" + stamps.stamp(reply.ts, 3)]


def test_a_part_is_filled_in_with_the_version_of_the_commit_and_not_with_its_own():
    place = Range()
    value = Write(WriteKind.STAMPED_VALUE, b"last", stamps.stamped(1, b""))
    part = settled(place, place.part(1, push(), value, locus=Q)).reply
    place.clock += 50
    version = place.clock
    settled(place, place.resolve(1, Q, version))
    assert version > part.ts
    assert place.scan(Q, b"q0", at=version).reply.keys == [key_of(version)]
    assert place.read(b"last", at=version).reply.values == [stamps.stamp(version, 1)]
    assert place.state.stamped == {}


def test_what_is_undecided_survives_a_change_of_leader():
    place = Range()
    part = settled(place, place.part(1, push(), locus=Q)).reply
    place.lead()
    reader = place.scan(Q, b"q0", at=part.ts)
    place.settle()
    assert reader.open
    place.answer(TxnReply(0, TxnStatus.COMMITTED, part.ts))
    place.settle()
    assert reader.reply.keys == [key_of(part.ts)]


def test_an_aborted_one_leaves_nothing():
    place = Range()
    settled(place, place.part(1, push(), locus=Q))
    settled(place, place.resolve(1, Q, 0))
    assert place.scan(Q, b"q0", at=place.clock).reply.keys == []
    assert place.state.stamped == {}


def test_two_with_one_prefix_do_not_conflict():
    place = Range()
    assert settled(place, place.part(1, push(), locus=Q)).reply.status == PartStatus.PREPARED
    assert settled(place, place.part(2, push(), locus=Q)).reply.status == PartStatus.PREPARED
    assert settled(place, place.prepare(3, push())).reply.status == PartStatus.COMMITTED
    first, second = place.prepare(4, push()), place.prepare(5, push())
    place.settle()
    assert first.reply.ts < second.reply.ts


@pytest.mark.parametrize("get", [False, True])
def test_a_reader_that_may_have_to_see_it_asks(get: bool):
    place = Range()
    part = settled(place, place.part(1, push(), locus=Q)).reply
    before = place.read(key_of(part.ts), at=part.ts - 1)
    place.stamp()
    assert before.reply.values == [None]
    assert place.scan(b"a", b"q", at=part.ts).reply.keys == []
    reader = place.read(key_of(part.ts), at=part.ts) if get else place.scan(Q, b"q0", at=part.ts)
    assert reader.open
    assert len(place.calls) == 1
    place.answer(TxnReply(0, TxnStatus.COMMITTED, part.ts))
    place.settle()
    assert reader.reply.versions == [part.ts]


def test_a_reader_waits_for_one_whose_entry_is_in_flight():
    place = Range()
    writer = place.prepare(1, push())
    place.stamp()
    reader, point = place.scan(Q, b"q0", at=101), place.read(key_of(101), at=101)
    assert reader.open
    assert point.open
    place.settle()
    assert reader.reply.keys == [key_of(writer.reply.ts)]
    assert point.reply.values == [b"v"]


def test_a_guard_over_where_it_may_come_to_stand_conflicts_and_one_over_older_stamps_does_not():
    place = Range()
    old = settled(place, place.prepare(1, push())).reply.ts
    settled(place, place.part(2, push(), locus=Q))
    above = Guard(Q, b"q0", place.clock)
    taken = Guard(Q, point_end(key_of(old)), place.clock)
    refused = place.part(3, put(b"a"), guards=[above], locus=b"a", age=10**6)
    place.settle()
    assert refused.reply.reason == FenceReason.CONFLICT
    taker = place.part(4, Write(WriteKind.DELETE, key_of(old)), guards=[taken], locus=key_of(old))
    assert settled(place, taker).reply.status == PartStatus.PREPARED


def test_it_conflicts_with_a_guard_over_where_it_may_come_to_stand():
    place = Range()
    guard = Guard(Q, b"q0", place.clock)
    settled(place, place.part(1, put(b"a"), guards=[guard], locus=b"a"))
    reply = settled(place, place.part(2, push(), locus=Q, age=10**6)).reply
    assert reply.reason == FenceReason.CONFLICT


def test_it_waits_for_a_guard_whose_entry_is_in_flight():
    place = Range()
    place.part(1, put(b"a"), guards=[Guard(Q, b"q0", place.clock)], locus=b"a")
    place.prepare(2, push())
    assert len(place.evaluator.await_fresh) == 1


def test_elements_are_taken_while_others_are_added():
    place = Range()
    old = settled(place, place.prepare(1, push())).reply.ts
    place.prepare(2, push())  # latched, and not applied
    place.prepare(3, Write(WriteKind.DELETE, key_of(old)))
    assert len(place.evaluator.await_fresh) == 2
    place.settle()
    assert len(place.scan(Q, b"q0", at=place.clock).reply.keys) == 1


def test_a_plain_write_where_it_may_come_to_stand_waits_for_it():
    place = Range()
    part = settled(place, place.part(1, push(), locus=Q)).reply
    writer = place.prepare(2, put(key_of(part.ts + 5)))
    clearer = place.prepare(3, Write(WriteKind.DELETE_RANGE, Q, b"q0"))
    place.settle()
    assert writer.open
    assert clearer.open
    settled(place, place.resolve(1, Q, part.ts))
    assert writer.reply.status == clearer.reply.status == PartStatus.COMMITTED


def test_a_prefix_whose_keys_do_not_lie_in_one_range_is_not_this_ranges():
    place = Range(end=Q + b"\x80")
    assert settled(place, place.prepare(1, push())).reply.code == "epoch_mismatch"


def test_a_late_prepare_finds_the_commit_though_no_version_stands_at_its_locus():
    place = Range()
    first = settled(place, place.prepare(1, push())).reply
    late = settled(place, place.prepare(1, push())).reply
    assert (late.status, late.ts) == (PartStatus.COMMITTED, first.ts)
    assert settled(place, place.outcome(1, Q)).reply.ts == first.ts
    assert len(place.scan(Q, b"q0", at=place.clock).reply.keys) == 1


def test_the_entry_of_a_part_keeps_what_was_asked_for():
    place = Range()
    stored(place, b"x")
    settled(place, place.part(1, put(b"k"), push(b"one"), locus=b"k"))
    command = place.log[-1]
    assert isinstance(command, PreparePart)
    assert command.keys == [b"k"]
    assert [(each.key, each.value, each.in_key) for each in command.stamps] == [(Q, b"one", True)]
