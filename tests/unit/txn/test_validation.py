"""Claims (txn/validation.py): a transaction that writes in one range commits there by one entry, after each range that it has
only read in said, as of the commit timestamp, that nothing has changed; whoever cannot say so costs a conflict or another
attempt, never an anomaly; nobody waits in a circle, and nobody for ever.

By hand: the range under test is [b"", b"m"); what is asked of the others is seen in `range.calls`.
"""

from __future__ import annotations

import pytest

from tests.unit.txn.txn_driver import Asked, Range, put, txn_id
from txn.commands import Commit, FencePart
from txn.coordinator import Part, with_fast_guards
from txn.evaluate import Limits
from txn.messages import (
    FAST_BYTES_MAX,
    FAST_RANGES_MAX,
    FAST_SPANS_MAX,
    Failure,
    Reply,
    Validate,
    Validated,
)
from txn.types import (
    Expect,
    ExpectKind,
    FenceReason,
    Guard,
    Participant,
    PartStatus,
    Write,
    WriteKind,
    point_end,
)

READ = Guard(b"n", b"n\x00", 90)
ALSO_READ = Guard(b"x", b"z", 90)


@pytest.fixture
def here() -> Range:
    return Range(b"", b"m")


def writer(here: Range, *elsewhere: list[Guard], number: int = 1, key: bytes = b"a") -> Asked:
    return here.prepare(number, put(key), elsewhere=list(elsewhere) or [[READ]])


def answer(here: Range, reply: Reply, call: int = 0) -> None:
    here.evaluator.recovery.on_reply(here.calls[call][2], reply, here.now)


def validate(there: Range, at: int, *guards: Guard, number: int = 9, age: int = 50) -> Asked:
    return there.ask(Validate(0, 0, 0, at, txn_id(number), age, list(guards)))


# -- who asks


def test_the_others_are_asked_as_of_the_commit_timestamp_and_only_then_one_entry_commits(here):
    asked = writer(here, [READ], [ALSO_READ])
    here.stamp()
    assert here.take() == []
    at = here.clock
    assert [(key, type(request), request.at, request.guards) for key, request, _ in here.calls] == [
        (b"n", Validate, at, [READ]),
        (b"x", Validate, at, [ALSO_READ]),
    ]
    answer(here, Validated(0, True), 0)
    assert asked.open
    assert here.take() == []
    answer(here, Validated(0, True), 1)
    (command,) = here.commit()
    assert isinstance(command, Commit)
    assert (asked.reply.status, asked.reply.ts) == (PartStatus.COMMITTED, at)
    assert here.evaluator.counters["fast_guards_total"] == 1


def test_an_entry_that_raft_refuses_is_no_commit(here):
    asked = writer(here)
    here.stamp()
    answer(here, Validated(0, True))
    here.evaluator.dropped(here.take(), "throttled")
    assert asked.reply.code == "throttled"
    assert here.evaluator.counters["fast_guards_total"] == 0
    assert here.evaluator.latches.held() == 0


def test_while_the_others_are_asked_the_writes_are_latched(here):
    first = writer(here)
    here.stamp()
    second, reader = here.prepare(2, put(b"a", b"w")), here.read(b"a")
    here.settle()
    assert first.open
    assert second.open
    assert reader.open
    answer(here, Validated(0, True))
    here.settle()
    assert first.reply.ts < second.reply.ts
    assert reader.reply.versions == [first.reply.ts]


def test_what_has_changed_elsewhere_is_a_durable_conflict_that_names_it(here):
    asked = writer(here)
    here.stamp()
    answer(here, Validated(0, False, b"n", txn_id(7), 95))
    (command,) = here.commit()
    assert isinstance(command, FencePart)
    reply = asked.reply
    assert (reply.status, reply.reason) == (PartStatus.FENCED, FenceReason.CONFLICT)
    assert (reply.key, reply.other_txn, reply.other_version) == (b"n", txn_id(7), 95)
    again = writer(here)
    assert again.reply.status == PartStatus.FENCED
    assert len(here.calls) == 1


def test_the_first_refusal_decides_and_later_answers_count_nothing(here):
    asked = writer(here, [READ], [ALSO_READ])
    here.stamp()
    answer(here, Validated(0, False, b"n", b"", 95), 0)
    answer(here, Validated(0, True), 1)
    assert [type(command) for command in here.commit()] == [FencePart]
    assert asked.reply.status == PartStatus.FENCED


@pytest.mark.parametrize("code", ["unavailable", "epoch_mismatch", "not_leader"])
def test_who_cannot_answer_costs_an_attempt_that_nobody_is_blamed_for(here, code):
    asked = writer(here)
    here.stamp()
    answer(here, Failure(0, code))
    here.commit()
    assert (asked.reply.status, asked.reply.reason) == (PartStatus.FENCED, FenceReason.RECOVERY)


def test_who_does_not_answer_holds_the_writes_for_a_bounded_time(here):
    asked = writer(here)
    here.stamp()
    due = here.evaluator.deadline()
    assert due == here.now + Limits().validate_wait_s
    here.pass_time(Limits().validate_wait_s / 2)
    here.evaluator.tick(here.now)
    assert here.take() == []
    here.pass_time(Limits().validate_wait_s)
    here.evaluator.tick(here.now)
    here.commit()
    assert asked.reply.reason == FenceReason.RECOVERY
    answer(here, Validated(0, True))
    assert here.take() == []
    assert here.evaluator.latches.held() == 0


def test_who_was_answered_is_due_no_more(here):
    writer(here)
    here.stamp()
    answer(here, Validated(0, True))
    assert here.evaluator.validation.deadline() is None


def test_an_answer_to_an_earlier_term_counts_nothing(here):
    asked = writer(here)
    here.stamp()
    old = here.evaluator
    (_, _, call_id) = here.calls[0]
    here.lead()
    assert asked.reply.code == "not_leader"
    old.recovery.on_reply(call_id, Validated(0, True), here.now)
    here.evaluator.recovery.on_reply(call_id, Validated(0, True), here.now)
    assert old.proposals == []
    assert here.take() == []


def test_what_is_being_asked_about_is_not_closed(here):
    writer(here)
    here.stamp()
    at = here.clock
    here.clock += 10
    assert here.evaluator.closing.close(here.clock) == at - 1


def test_a_timestamp_below_what_is_closed_is_taken_anew_before_anybody_is_asked(here):
    asked = writer(here)
    here.evaluator.closing.promised = here.clock + 1
    here.stamp()
    assert here.calls == []
    here.stamp()
    assert here.calls[0][1].at == here.clock
    answer(here, Validated(0, True))
    here.commit()
    assert asked.reply.ts == here.clock


@pytest.mark.parametrize(
    "fields",
    [
        {"elsewhere": [[READ]], "one_range": False},
        {"elsewhere": [[READ]], "lock_owner": txn_id(1)},
        {"elsewhere": [[]]},
        {"elsewhere": [[Guard(b"n", b"n", 90)]]},
        {"elsewhere": [[Guard(b"n", b"", 90)]]},
        {"elsewhere": [[READ] * (FAST_SPANS_MAX + 1)]},
        {"elsewhere": [[Guard(b"n", b"n" * FAST_BYTES_MAX, 90)]]},
        {"elsewhere": [[READ]] * (FAST_RANGES_MAX + 1)},
    ],
)
def test_what_cannot_be_guarded_that_way_is_refused_unread(here, fields):
    asked = here.prepare(1, put(b"a"), **fields)
    assert asked.reply.code == "invalid_argument"


def test_what_was_cut_for_other_ranges_than_there_are_is_refused_unread(here):
    asked = writer(here, [Guard(b"b", b"c", 90)])
    assert asked.reply.code == "epoch_mismatch"


# -- who is asked


@pytest.fixture
def there() -> Range:
    return Range(b"m", b"")


def test_what_has_not_changed_is_said_so_after_leadership_was_confirmed(there):
    there.prepare(1, put(b"n"))
    there.settle()
    seen = there.clock
    asked = validate(there, seen + 5, Guard(b"n", point_end(b"n"), seen), Guard(b"p", b"q", seen))
    assert asked.reply.unchanged
    assert asked.confirm


@pytest.mark.parametrize("kind", [WriteKind.PUT, WriteKind.DELETE])
def test_a_version_above_what_was_read_is_named_be_it_a_deletion(there, kind):
    other = there.prepare(1, Write(kind, b"n", b"v" if kind == WriteKind.PUT else b""))
    there.settle()
    asked = validate(there, there.clock + 5, Guard(b"m", b"o", other.reply.ts - 1))
    reply = asked.reply
    assert (reply.unchanged, reply.key) == (False, b"n")
    assert (reply.other_txn, reply.other_version) == (txn_id(1), other.reply.ts)


def test_below_the_threshold_of_collection_a_deletion_may_be_gone(there):
    there.state.row.gc_threshold = 95
    assert not validate(there, 100, READ).reply.unchanged
    assert validate(there, 94, READ).reply.code == "snapshot_too_old"


def test_a_writer_that_was_latched_before_is_waited_for(there):
    writer = there.prepare(1, put(b"n"))
    asked = validate(there, there.clock + 5, READ)
    assert asked.open
    there.settle()
    assert writer.reply.status == PartStatus.COMMITTED
    assert not asked.reply.unchanged


def test_an_undecided_write_above_the_timestamp_is_not_in_the_way(there):
    asked_at = there.clock
    there.part(1, put(b"n"))
    there.settle()
    asked = validate(there, asked_at, Guard(b"n", b"n\x00", asked_at - 1))
    assert asked.reply.unchanged


def test_an_undecided_write_below_the_timestamp_is_asked_about_at_its_anchor(there):
    there.part(1, put(b"n"))
    there.settle()
    asked = validate(there, there.clock, READ)
    assert asked.open
    ((key, question, call_id),) = there.calls
    assert (key, question.read_ts) == (b"zz", there.clock)
    there.resolve(1, b"n", 0)
    there.evaluator.recovery.on_reply(call_id, Failure(0, "unavailable"), there.now)
    there.settle()
    there.pass_time(0.2)
    there.evaluator.tick(there.now)
    there.settle()
    assert asked.reply.unchanged


def test_of_two_that_ask_about_each_others_writes_the_older_waits_and_the_younger_is_refused(
    there,
):
    """T5 began first. The writes of both are latched, each in the range that the other has read in."""
    mine = there.prepare(5, put(b"n"), elsewhere=[[Guard(b"a", b"b", 90)]], begin_ts=60)
    there.stamp()
    younger = validate(there, there.clock, READ, number=6, age=61)
    assert (younger.reply.unchanged, younger.reply.other_txn) == (False, txn_id(5, 60))
    older = validate(there, there.clock, READ, number=4, age=59)
    assert older.open
    there.evaluator.recovery.on_reply(
        there.calls[0][2], Validated(0, False, b"a", b"", 0), there.now
    )
    there.settle()
    assert mine.reply.status == PartStatus.FENCED
    assert older.reply.unchanged


def test_what_is_not_of_this_range_is_not_spoken_about(there):
    assert validate(there, 100, Guard(b"a", b"b", 90)).reply.code == "epoch_mismatch"


@pytest.mark.parametrize(
    "question",
    [
        Validate(0, 0, 0, 100, b"short", 0, [READ]),
        Validate(0, 0, 0, 100, txn_id(9), 0, []),
        Validate(0, 0, 0, 100, txn_id(9), 0, [Guard(b"p", b"", 90)]),
        Validate(0, 0, 0, 100, txn_id(9), 0, [Guard(b"p", b"q" * FAST_BYTES_MAX, 90)]),
        Validate(0, 0, 0, 100, txn_id(9), 0, [READ] * (FAST_SPANS_MAX + 1)),
    ],
)
def test_a_malformed_question_is_refused_unread(there, question):
    """Its answer names a key of it, and has to fit into a message."""
    there.prepare(5, put(b"p"), elsewhere=[[Guard(b"a", b"b", 90)]])
    assert there.ask(question).reply.code == "invalid_argument"


def test_who_meets_a_span_is_told_the_key_where_they_met(there):
    there.prepare(5, put(b"p"), elsewhere=[[Guard(b"a", b"b", 90)]], begin_ts=60)
    there.stamp()
    reply = validate(there, there.clock, Guard(b"n", b"z", 90), number=6, age=61).reply
    assert (reply.unchanged, reply.key, reply.other_version) == (False, b"p", 0)


def test_who_waits_is_told_when_the_leader_stops(there):
    there.prepare(1, put(b"n"))
    asked = validate(there, there.clock + 5, READ)
    there.lead()
    assert asked.reply.code == "not_leader"


# -- which transactions


def part(key: bytes, *writes: Write, guards: int = 0, expects: int = 0) -> Part:
    spans = [
        Guard(b"%s%03d" % (key, number), b"%s%03d~" % (key, number), 9) for number in range(guards)
    ]
    conditions = [Expect(ExpectKind.ABSENT, key)] * expects
    return Part(Participant(key, key, point_end(key)), list(writes), conditions, spans)


def test_one_range_is_written_and_others_only_read():
    first, second, third = (
        part(b"a", put(b"a"), guards=2),
        part(b"n", guards=1),
        part(b"x", guards=3),
    )
    (joined,) = with_fast_guards([first, second, third])
    assert joined.elsewhere == [second.guards, third.guards]
    assert (joined.writes, joined.guards, joined.participant) == (
        first.writes,
        first.guards,
        first.participant,
    )


@pytest.mark.parametrize(
    "parts",
    [
        [part(b"a", put(b"a"), guards=1)],
        [part(b"a", put(b"a")), part(b"n", put(b"n"))],
        [part(b"a", put(b"a")), part(b"n", guards=1, expects=1)],
        [part(b"a", put(b"a")), part(b"n", guards=FAST_SPANS_MAX + 1)],
        [part(b"a", guards=1), part(b"n", guards=1)],
        [part(b"a", put(b"a")), part(b"n" * (FAST_BYTES_MAX // 2), guards=1)],
        [part(b"a", put(b"a")), *[part(b"n%d" % n, guards=1) for n in range(FAST_RANGES_MAX + 1)]],
    ],
)
def test_others_take_part_as_they_always_did(parts):
    assert with_fast_guards(parts) is parts


@pytest.mark.parametrize("key", [b"a", b"b"])
def test_who_has_read_nothing_elsewhere_asks_nobody(here, key):
    """By the way of single keys, and by the long one."""
    asked = here.prepare(1, put(key), guards=[Guard(b"a", b"a\x00", 90)] if key == b"b" else [])
    here.settle()
    assert asked.reply.status == PartStatus.COMMITTED
    assert here.calls == []


def test_a_question_waits_no_longer_than_who_asks(there):
    there.part(1, put(b"n"))
    there.settle()
    asked = validate(there, there.clock, READ)
    there.now += there.evaluator.limits.validate_wait_s + 0.01
    there.resolve(1, b"n", 0)
    there.answer(Failure(0, "unavailable"))
    there.settle()
    there.pass_time(1.0)
    there.settle()
    assert asked.reply.code == "unavailable"
