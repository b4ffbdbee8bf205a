"""Claims E1 to E5 of the evaluator: who waits, who is refused, what is durable before it is told.

One range, driven by hand (txn_driver): a transaction of one range is `prepare`, a part of a larger one `part`.
"""

from __future__ import annotations

import pytest

from tests.unit.txn.txn_driver import Range, put, settled, stored, txn_id
from txn.commands import Commit, FencePart, PreparePart
from txn.evaluate import PASSES_MAX, Waiter
from txn.messages import Failure, Prepare, QueryMode, Read, TxnReply
from txn.types import (
    TIMESTAMP_SHIFT,
    Expect,
    ExpectKind,
    FenceReason,
    Guard,
    Participant,
    PartStatus,
    TxnStatus,
    Write,
    WriteKind,
    age_of,
    point_end,
)
from txn.values import RANGE_ROWS_MAX, VALUE_BYTES_MAX

# -- E2: timestamps


def test_a_part_gets_a_timestamp_that_was_asked_for_after_its_latches():
    place = Range()
    asked = place.prepare(1, put(b"a"))
    assert [pending.txn_id for pending in place.evaluator.await_fresh] == [txn_id(1)]
    assert place.evaluator.latches.writes.keys() == {b"a"}
    assert not place.take()
    place.clock = 500
    place.settle()
    assert asked.reply.status == PartStatus.COMMITTED
    assert asked.reply.ts == 501


def test_the_last_timestamp_of_another_batch_is_not_used_for_a_part_latched_since():
    place = Range()
    place.prepare(1, put(b"a"))
    batch, place.evaluator.await_fresh = place.evaluator.await_fresh, []
    place.prepare(2, put(b"b"))
    place.evaluator.give_timestamps(batch, 101, [], 101, 0.0)
    assert [pending.txn_id for pending in place.take()] == [txn_id(1)]
    assert [pending.txn_id for pending in place.evaluator.await_fresh] == [txn_id(2)]


def test_a_timestamp_at_or_below_what_is_closed_is_asked_for_again():
    place = Range()
    assert place.evaluator.closing.close(101) == 101
    asked = place.prepare(1, put(b"a"))
    place.stamp()
    assert not place.take()
    place.settle()
    assert asked.reply.ts == 102


def test_many_timestamps_are_handed_out_one_each_in_order():
    place = Range()
    asked = [place.prepare(number, put(b"k%d" % number)) for number in range(1, 4)]
    place.settle()
    assert [one.reply.ts for one in asked] == [101, 102, 103]


# -- E1: once only


def test_a_second_prepare_waits_for_the_first_and_is_told_the_same():
    place = Range()
    first, second = place.part(1, put(b"a")), place.part(1, put(b"a"))
    place.settle()
    assert first.reply == second.reply
    assert first.reply.status == PartStatus.PREPARED
    assert len(place.log) == 1


def test_a_late_prepare_after_resolve_is_told_the_original_commit():
    place = Range()
    settled(place, place.part(1, put(b"a")))
    settled(place, place.resolve(1, b"a", 150))
    late = settled(place, place.part(1, put(b"a", b"other")))
    assert (late.reply.status, late.reply.ts) == (PartStatus.COMMITTED, 150)
    assert place.read(b"a", at=150).reply.values == [b"v"]


def test_a_late_prepare_of_a_one_range_commit_finds_it_behind_newer_versions():
    place = Range()
    first = settled(place, place.prepare(1, put(b"a")))
    stored(place, b"a")
    late = settled(place, place.prepare(1, put(b"a")))
    assert (late.reply.status, late.reply.ts) == (PartStatus.COMMITTED, first.reply.ts)
    assert len(place.log) == 2


def test_a_late_prepare_of_a_lone_delete_range_finds_its_row():
    place = Range()
    clear = Write(WriteKind.DELETE_RANGE, b"a", b"c")
    first = settled(place, place.prepare(1, clear))
    stored(place, b"b")
    late = settled(place, place.prepare(1, clear))
    assert late.reply.ts == first.reply.ts
    assert place.read(b"b", at=place.clock).reply.values == [b"old"]


def test_after_a_leader_change_the_same_prepare_is_answered_from_the_log():
    place = Range()
    first = settled(place, place.part(1, put(b"a")))
    place.lead()
    second = settled(place, place.part(1, put(b"a")))
    assert second.reply == first.reply


def test_what_was_evaluated_but_not_committed_is_gone_with_the_term():
    place = Range()
    lost = place.part(1, put(b"a"))
    place.stamp()
    place.lead()
    assert isinstance(lost.reply, Failure)
    assert (lost.reply.code, place.state.parts) == ("not_leader", {})
    again = settled(place, place.part(1, put(b"a")))
    assert again.reply.status == PartStatus.PREPARED


def test_below_the_outcome_horizon_nothing_is_said():
    place = Range()
    place.state.row.outcome_horizon = 1
    asked = place.prepare(1, put(b"a"))
    assert asked.reply.status == PartStatus.EXPIRED
    assert place.query_part(1, b"a", 50).reply.status == PartStatus.EXPIRED
    assert place.fence(1, b"a").reply.status == PartStatus.EXPIRED
    assert place.outcome(1, b"a").reply.status == TxnStatus.EXPIRED
    assert not place.evaluator.latches.held()


# -- E4: refusals are durable


def refusals() -> list[tuple[str, list[Write], list[Expect], list[Guard], int]]:
    conflict = [Guard(b"a", point_end(b"a"), 50)]
    span = [Guard(b"", b"b", 50)]
    absent = [Expect(ExpectKind.ABSENT, b"a")]
    version = [Expect(ExpectKind.VERSION, b"a", 1)]
    value = [Expect(ExpectKind.VALUE, b"a", 0, b"new")]
    text = [Write(WriteKind.ADD_ASCII, b"a", b"1")]
    return [
        ("a newer version than was read", [put(b"b")], [], conflict, FenceReason.CONFLICT),
        ("a newer version in a span", [put(b"b")], [], span, FenceReason.CONFLICT),
        ("present, not absent", [put(b"b")], absent, [], FenceReason.COMPARE_FAILED),
        ("another version", [put(b"a")], version, [], FenceReason.COMPARE_FAILED),
        ("another value", [put(b"a")], value, [], FenceReason.COMPARE_FAILED),
        ("not a number", text, [], [], FenceReason.BAD_VALUE),
    ]


@pytest.mark.parametrize(
    ("writes", "expects", "guards", "reason"),
    [r[1:] for r in refusals()],
    ids=[r[0] for r in refusals()],
)
def test_a_refusal_is_in_the_log_before_it_is_told_and_stays(writes, expects, guards, reason):
    place = Range()
    stored(place, b"a", b"text")
    fields = {"expects": expects, "guards": guards}
    asked = place.prepare(1, *writes, **fields)
    assert asked.open
    (command,) = place.commit()
    assert isinstance(command, FencePart)
    assert (asked.reply.status, asked.reply.reason) == (PartStatus.FENCED, reason)
    settled(place, place.prepare(2, Write(WriteKind.DELETE, b"a")))
    again = settled(place, place.prepare(1, *writes, **fields))
    assert again.reply == asked.reply


def test_a_refusal_for_a_newer_version_names_the_key_its_writer_and_its_version():
    place = Range()
    settled(place, place.prepare(5, put(b"a")))
    asked = settled(place, place.prepare(1, put(b"b"), guards=[Guard(b"a", b"b", 50)]))
    assert (asked.reply.key, asked.reply.other_txn) == (b"a", txn_id(5))
    assert asked.reply.other_version == 101


def test_a_failed_condition_tells_the_version_that_is_there_and_zero_for_none():
    place = Range()
    version = stored(place, b"a")
    asked = settled(place, place.prepare(1, put(b"a"), expects=[Expect(ExpectKind.ABSENT, b"a")]))
    assert asked.reply.other_version == version
    settled(place, place.prepare(2, Write(WriteKind.DELETE, b"a")))
    expects = [Expect(ExpectKind.VERSION, b"a", version)]
    asked = settled(place, place.prepare(3, put(b"a"), expects=expects))
    assert (asked.reply.reason, asked.reply.other_version) == (FenceReason.COMPARE_FAILED, 0)


@pytest.mark.parametrize(
    "expect",
    [
        Expect(ExpectKind.ABSENT, b"none"),
        Expect(ExpectKind.VERSION, b"none", 0),
        Expect(ExpectKind.VERSION, b"a", 101),
        Expect(ExpectKind.VALUE, b"a", 0, b"old"),
    ],
)
def test_a_condition_that_holds_commits(expect):
    place = Range()
    assert stored(place, b"a") == 101
    asked = settled(place, place.prepare(1, put(b"b"), expects=[expect]))
    assert asked.reply.status == PartStatus.COMMITTED


def test_a_condition_on_a_key_that_is_not_written_holds_until_the_transaction_ends():
    place = Range()
    expects = [Expect(ExpectKind.ABSENT, b"a")]
    settled(place, place.part(1, put(b"b"), expects=expects))
    blocked = place.prepare(2, put(b"a"))
    place.settle()
    assert blocked.open
    settled(place, place.resolve(1, b"b", 200))
    assert blocked.reply.status == PartStatus.COMMITTED


def test_a_fence_is_durable_before_it_is_told_and_refuses_the_prepare():
    place = Range()
    fence = place.fence(1, b"a")
    late = place.part(1, put(b"a"))
    assert fence.open
    assert late.open
    place.settle()
    assert fence.reply.status == PartStatus.FENCED
    assert (late.reply.status, late.reply.reason) == (PartStatus.FENCED, FenceReason.RECOVERY)


def test_a_fence_that_comes_too_late_is_told_what_was_prepared():
    place = Range()
    prepared, fence = place.part(1, put(b"a")), place.fence(1, b"a")
    place.settle()
    assert prepared.reply.status == fence.reply.status == PartStatus.PREPARED
    assert fence.reply.ts == prepared.reply.ts


# -- conflicts: who waits (protocol 4c)


def test_the_older_waits_for_an_undecided_part_and_then_goes_on():
    place = Range()
    settled(place, place.part(2, put(b"a"), age=20))
    older = place.part(1, put(b"a"), age=10)
    place.settle()
    assert older.open
    settled(place, place.resolve(2, b"a", 150))
    assert older.reply.status == PartStatus.PREPARED
    assert older.reply.ts > 150 or place.clock < 150


def test_the_younger_is_refused_at_once():
    place = Range()
    settled(place, place.part(1, put(b"a"), age=10))
    younger = settled(place, place.part(2, put(b"a"), age=20))
    assert (younger.reply.status, younger.reply.reason) == (PartStatus.FENCED, FenceReason.CONFLICT)
    assert younger.reply.other_txn == txn_id(1)


def test_the_older_that_waits_too_long_is_refused():
    place = Range()
    settled(place, place.part(2, put(b"a"), age=20))
    older = place.part(1, put(b"a"), age=10)
    place.pass_time(0.049)
    place.settle()
    assert older.open
    place.pass_time(0.002)
    place.settle()
    assert older.reply.reason == FenceReason.CONFLICT


def test_a_one_range_transaction_always_waits_then_is_refused():
    place = Range()
    settled(place, place.part(1, put(b"a"), age=10))
    waiting = place.prepare(2, put(b"a"), age=20)
    place.settle()
    assert waiting.open
    place.pass_time(0.051)
    place.settle()
    assert (waiting.reply.status, waiting.reply.reason) == (PartStatus.FENCED, FenceReason.CONFLICT)


def test_who_waits_holds_no_latch_meanwhile():
    place = Range()
    settled(place, place.part(1, put(b"a")))
    place.prepare(2, put(b"a"), put(b"b"))
    other = settled(place, place.prepare(3, put(b"b")))
    assert other.reply.status == PartStatus.COMMITTED


def test_who_gives_up_waiting_asks_the_anchor_once_and_only_asks():
    place = Range()
    settled(place, place.part(1, put(b"a")))
    for number in (2, 3):
        settled(place, place.part(number, put(b"a"), age=50))
    (call,) = place.calls
    assert (call[0], call[1].mode) == (b"zz", QueryMode.BLOCKED)
    place.answer(TxnReply(0, TxnStatus.STAGED))
    settled(place, place.part(4, put(b"a"), age=50))
    assert len(place.calls) == 1


def test_an_outcome_learned_while_blocked_resolves_the_part():
    place = Range()
    settled(place, place.part(1, put(b"a")))
    settled(place, place.part(2, put(b"a"), age=50))
    place.answer(TxnReply(0, TxnStatus.COMMITTED, 150))
    place.settle()
    assert place.state.parts == {}
    assert place.read(b"a", at=150).reply.versions == [150]


def test_writers_of_one_key_queue_up_at_its_latch():
    place = Range()
    asked = [place.prepare(number, put(b"a")) for number in range(1, 5)]
    place.settle()
    assert [one.reply.ts for one in asked] == [101, 102, 103, 104]


def test_a_guard_keeps_others_from_writing_what_was_read():
    place = Range()
    settled(place, place.part(1, put(b"b"), guards=[Guard(b"p", b"q", 100)]))
    inside, outside = place.part(2, put(b"pp"), age=50), place.part(3, put(b"q"), age=50)
    place.settle()
    assert inside.reply.reason == FenceReason.CONFLICT
    assert outside.reply.status == PartStatus.PREPARED


def test_guards_do_not_keep_each_other_out():
    place = Range()
    guards = [Guard(b"p", b"q", 100)]
    asked = [settled(place, place.part(n, put(b"k%d" % n), guards=guards)) for n in (1, 2)]
    assert [one.reply.status for one in asked] == [PartStatus.PREPARED] * 2


def test_a_guard_over_an_undecided_write_is_a_conflict():
    place = Range()
    settled(place, place.part(1, put(b"a")))
    asked = settled(place, place.part(2, put(b"b"), guards=[Guard(b"a", b"b", 100)], age=50))
    assert asked.reply.reason == FenceReason.CONFLICT


def test_who_meets_what_is_decided_waits_for_the_entry_in_flight_however_young():
    place = Range()
    settled(place, place.part(1, put(b"b"), guards=[Guard(b"p", b"q", 100)]))
    place.resolve(1, b"b", 150)
    younger = place.part(2, put(b"pp"), age=50)
    assert younger.open
    place.settle()
    assert younger.reply.status == PartStatus.PREPARED


# -- values


def test_increments_add_to_what_is_there_and_tell_the_sums():
    place = Range()
    by = [Write(WriteKind.ADD_ASCII, b"n", amount) for amount in (b"5", b"-7")]
    first = settled(place, place.prepare(1, *by))
    assert first.reply.results == [b"5", b"-2"]
    assert settled(place, place.prepare(1, *by)).reply.results is None, "read them back at ts"
    assert place.read(b"n", at=place.clock).reply.values == [b"-2"]


def test_delete_range_deletes_what_is_there_and_a_later_write_of_the_same_transaction_wins():
    place = Range()
    for key in (b"a", b"b", b"c", b"d"):
        stored(place, key)
    asked = settled(
        place,
        place.prepare(1, put(b"a", b"lost"), Write(WriteKind.DELETE_RANGE, b"a", b"d"), put(b"b")),
    )
    scan = place.scan(b"", b"e", asked.reply.ts).reply
    assert list(zip(scan.keys, scan.values, strict=True)) == [(b"b", b"v"), (b"d", b"old")]


def test_an_undecided_delete_range_keeps_writers_out_of_its_gaps():
    place = Range()
    settled(place, place.part(1, Write(WriteKind.DELETE_RANGE, b"a", b"d")))
    asked = settled(place, place.part(2, put(b"bb"), age=50))
    assert asked.reply.reason == FenceReason.CONFLICT


def test_whose_priority_is_higher_waits_where_a_younger_one_would_be_refused():
    place = Range()
    begun = 100 * (1000 << TIMESTAMP_SHIFT)
    settled(place, place.part(1, put(b"a"), begin_ts=begun, age=age_of(begun, 0)))
    later = begun + (3000 << TIMESTAMP_SHIFT)
    refused = settled(place, place.part(2, put(b"a"), begin_ts=later, age=age_of(later, 2)))
    assert refused.reply.reason == FenceReason.CONFLICT
    waits = settled(place, place.part(3, put(b"a"), begin_ts=later, age=age_of(later, 4)))
    assert waits.open
    assert age_of(5, 1_000) == 1


def test_a_delete_range_in_flight_makes_writers_inside_it_wait():
    place = Range()
    place.prepare(1, Write(WriteKind.DELETE_RANGE, b"a", b"d"))
    inside, outside = place.prepare(2, put(b"bb")), place.prepare(3, put(b"d"))
    place.stamp()
    assert [pending.txn_id for pending in place.take()] == [txn_id(1), txn_id(3)]
    assert inside.open
    assert outside.open


# -- what is not for this range


@pytest.mark.parametrize(
    ("writes", "fields"),
    [
        ([put(b"k")], {"locus": b"a"}),
        ([put(b"k"), put(b"z")], {}),
        ([put(b"k")], {"guards": [Guard(b"k", b"z", 1)]}),
        ([put(b"k")], {"expects": [Expect(ExpectKind.ABSENT, b"z")]}),
        ([Write(WriteKind.DELETE_RANGE, b"k", b"z")], {"locus": b"k"}),
        ([Write(WriteKind.DELETE_RANGE, b"l", b"k")], {"locus": b"k"}),
    ],
)
def test_a_batch_that_is_not_this_ranges_alone_says_nothing_about_the_outcome(writes, fields):
    place = Range(b"g", b"p")
    asked = settled(place, place.prepare(1, *writes, **fields))
    assert (asked.reply.code, place.log) == ("epoch_mismatch", [])


def test_another_epoch_is_not_served():
    place = Range()
    write = put(b"a")
    request = Prepare(0, 0, 99, txn_id(1), b"a", b"a", [write])
    assert place.ask(request).reply.code == "epoch_mismatch"
    assert place.ask(Read(0, 0, 99, 50, [b"a"])).reply.code == "epoch_mismatch"


@pytest.mark.parametrize(
    "writes",
    [
        [put(b"%d" % number, bytes(VALUE_BYTES_MAX)) for number in range(4)],
        [put(b"%d" % number) for number in range(RANGE_ROWS_MAX + 1)],
    ],
)
def test_a_batch_that_is_too_large_is_refused_before_anything_is_done(writes):
    place = Range()
    assert place.prepare(1, *writes).reply.code == "transaction_too_large"


@pytest.mark.parametrize("identity", [b"", b"short", b"x" * 17])
def test_an_id_of_another_length_is_refused(identity):
    place = Range()
    asked = place.ask(Prepare(0, 0, 0, identity, b"a", b"a", [put(b"a")]))
    assert asked.reply.code == "invalid_argument"


def test_the_anchors_part_lists_the_participants_and_no_other_does():
    place = Range()
    everybody = [Participant(key, key, point_end(key)) for key in (b"a", b"x")]
    for fields in (
        {"one_range": False},
        {"one_range": False, "anchor_key": b"x", "participants": everybody},
        {"participants": everybody},
    ):
        assert place.prepare(1, put(b"a"), **fields).reply.code == "invalid_argument"
    assert place.prepare(1, put(b"a"), one_range=False, participants=everybody).open


def test_when_too_much_is_undecided_new_parts_are_throttled_and_decisions_are_not(monkeypatch):
    monkeypatch.setattr("txn.evaluate.UNDECIDED_MAX", 2)
    place = Range()
    for number in (1, 2):
        settled(place, place.part(number, put(b"k%d" % number)))
    assert place.part(3, put(b"c")).reply.code == "throttled"
    assert settled(place, place.prepare(4, put(b"d"))).reply.status == PartStatus.COMMITTED
    assert settled(place, place.part(2, put(b"k2"))).reply.status == PartStatus.PREPARED
    settled(place, place.resolve(1, b"k1", 150))
    assert settled(place, place.part(3, put(b"c"))).reply.status == PartStatus.PREPARED


# -- the term's ends


def test_before_the_own_term_began_requests_wait():
    place = Range()
    place.evaluator.ready = False
    asked = place.prepare(1, put(b"a"))
    place.evaluator.start(place.now)
    place.settle()
    assert asked.reply.status == PartStatus.COMMITTED


def test_every_request_is_answered_once_when_the_leader_stops():
    place = Range()
    settled(place, place.part(1, put(b"a")))
    settled(place, place.anchor(2, put(b"c"), others=(b"x",)))
    asked = [
        place.read(b"a", at=101),  # asks the anchor
        place.read(b"q"),  # waits for the oracle
        place.prepare(3, put(b"a")),  # waits for the part
        place.prepare(4, put(b"d")),  # waits for the oracle
        place.prepare(5, put(b"d")),  # waits for the latch
        place.query(2, b"c", QueryMode.READ, 101),  # asks the participants
        place.outcome(2, b"c"),  # waits for recovery
        place.fence(6, b"e"),  # is proposed
    ]
    readers, place.evaluator.await_read = place.evaluator.await_read, []
    assert readers, "the oracle was asked, and has not answered"
    place.lead()
    assert [one.reply.code for one in asked] == ["not_leader"] * len(asked)


def test_a_refused_proposal_frees_its_latches_and_its_asker_may_try_again():
    place = Range()
    asked, waiting = place.prepare(1, put(b"a")), place.prepare(2, put(b"a"))
    place.stamp()
    place.evaluator.dropped(place.take(), "throttled")
    place.evaluator.run_again(place.now)
    assert asked.reply.code == "throttled"
    place.settle()
    assert waiting.reply.status == PartStatus.COMMITTED
    assert settled(place, place.prepare(1, put(b"a"))).reply.status == PartStatus.COMMITTED


def test_a_one_range_commit_is_one_command_and_a_part_another():
    place = Range()
    settled(place, place.prepare(1, put(b"a")))
    settled(place, place.part(2, put(b"b")))
    assert [type(command) for command in place.log] == [Commit, PreparePart]


def test_who_is_set_free_again_and_again_does_not_keep_the_node_from_all_else(monkeypatch):
    """It goes on in the next turn; there is no such request, unless we made a mistake."""
    place = Range()
    asked = []

    def again(waiter: Waiter, _now: float) -> None:
        asked.append(waiter)
        waiter.done = False
        place.evaluator.runnable.append(waiter)

    monkeypatch.setattr(place.evaluator, "_again", again)
    place.evaluator.runnable.append(Waiter(None, None, 0.0))
    place.evaluator.run_again(place.now)
    assert len(asked) == PASSES_MAX
    assert len(place.evaluator.runnable) == 1
