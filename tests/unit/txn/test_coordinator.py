"""Claims of the coordinator: its state table is the law, a decision is told once to everybody, only a durable refusal
means no, and whatever order answers come in, one history has one outcome."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from txn.coordinator import (
    DECIDED,
    NEXT,
    ContradictoryAnswers,
    Coordinator,
    Event,
    Part,
    State,
)
from txn.messages import Finalize, Outcome, PrepareReply, Request, Resolve, TxnReply
from txn.types import (
    FenceReason,
    Guard,
    Participant,
    PartStatus,
    TxnStatus,
    Write,
    WriteKind,
    make_txn_id,
    point_end,
)

TXN = make_txn_id(500, 9)


def part(key: bytes) -> Part:
    write = Write(WriteKind.PUT, key, b"v")
    return Part(Participant(key, key, point_end(key)), [write], [], [Guard(key, key + b"\xff", 3)])


def coordinator(parts: int, **options: Any) -> Coordinator:
    return Coordinator(TXN, [part(b"k%d" % number) for number in range(parts)], **options)


def prepared(ts: int) -> PrepareReply:
    return PrepareReply(0, PartStatus.PREPARED, ts)


def answer(status: PartStatus, ts: int = 0) -> PrepareReply:
    return PrepareReply(0, status, ts)


FENCED = PrepareReply(0, PartStatus.FENCED, 0, FenceReason.CONFLICT, b"k1", b"other", 77)


def test_every_pair_of_the_table_is_walked_and_the_others_contradict():
    illegal = {
        (State.PREPARING, Event.FORGOTTEN),
        (State.COMMITTED, Event.REFUSED),
        (State.ABORTED, Event.ALL_PREPARED),
        (State.ABORTED, Event.COMMITTED),
    }
    for state, event in itertools.product(State, Event):
        one = coordinator(2)
        one.state, one.commit_ts = state, 9 if state is State.COMMITTED else 0
        if (state, event) in illegal:
            assert (state, event) not in NEXT
            with pytest.raises(ContradictoryAnswers):
                one._step(event, 9)
        else:
            one._step(event, 9)
            assert one.state is NEXT[state, event]


def test_a_decision_never_changes():
    for state, event in NEXT:
        if state in DECIDED:
            assert NEXT[state, event] is state


def test_one_range_is_one_message_without_participants():
    (prepare,) = coordinator(1).start()
    assert prepare.one_range
    assert prepare.participants == []
    assert prepare.locus == prepare.anchor_key == b"k0"
    assert prepare.age == 500


def test_only_the_anchors_part_lists_the_participants_itself_included():
    first, second, third = coordinator(3).start()
    assert [each.locus for each in first.participants] == [b"k0", b"k1", b"k2"]
    assert second.participants == third.participants == []
    assert not first.one_range
    assert {first.anchor_key, second.anchor_key, third.anchor_key} == {b"k0"}


def test_a_part_carries_its_writes_and_guards_and_the_first_attempts_age():
    one = coordinator(2, age=123)
    prepare = one.start()[1]
    assert prepare.writes == one.parts[1].writes
    assert prepare.guards == one.parts[1].guards
    assert prepare.age == 123


def test_one_range_that_committed_is_committed_and_nobody_need_be_told():
    one = coordinator(1)
    one.start()
    assert one.on_prepare(0, PrepareReply(0, PartStatus.COMMITTED, 900, results=[b"7"])) == []
    assert (one.state, one.commit_ts, one.results) == (State.COMMITTED, 900, [[b"7"]])


def test_all_prepared_commits_at_the_largest_and_tells_each_once():
    one = coordinator(3)
    one.start()
    assert one.on_prepare(2, prepared(902)) == []
    assert one.on_prepare(0, prepared(905)) == []
    finalize, *hints = one.on_prepare(1, prepared(901))
    assert (one.state, one.commit_ts) == (State.COMMITTED, 905)
    assert finalize == Finalize(0, 0, 0, TXN, b"k0", 905)
    assert [(hint.locus, hint.commit_ts) for hint in hints if isinstance(hint, Resolve)] == [
        (b"k1", 905),
        (b"k2", 905),
    ]
    assert one.on_prepare(1, prepared(901)) == []


def test_a_fence_aborts_at_once_and_tells_all():
    one = coordinator(3)
    one.start()
    effects = one.on_prepare(1, FENCED)
    assert one.state is State.ABORTED
    assert one.refusal is FENCED
    assert [type(effect) for effect in effects] == [Finalize, Resolve, Resolve]
    assert all(
        effect.commit_ts == 0 for effect in effects if isinstance(effect, Finalize | Resolve)
    )
    assert one.on_prepare(0, prepared(905)) == []  # late


def test_a_fence_in_one_range_needs_no_cleaning_up():
    one = coordinator(1)
    one.start()
    assert one.on_prepare(0, FENCED) == []
    assert one.state is State.ABORTED


@pytest.mark.parametrize("status", [PartStatus.EXPIRED, PartStatus.ABSENT])
def test_an_answer_that_says_nothing_makes_it_ask_the_anchor(status: PartStatus):
    one = coordinator(2)
    one.start()
    assert one.on_prepare(1, answer(status)) == [Outcome(0, 0, 0, TXN, b"k0")]
    assert one.state is State.ASKING


def test_a_lost_part_is_asked_for_once():
    one = coordinator(3)
    one.start()
    assert len(one.on_part_lost(1)) == 1
    assert one.on_part_lost(2) == []


def test_the_anchor_knows_the_outcome_of_a_lost_part():
    one = coordinator(2)
    one.start()
    one.on_part_lost(1)
    effects = one.on_outcome(TxnReply(0, TxnStatus.COMMITTED, 940))
    assert (one.state, one.commit_ts) == (State.COMMITTED, 940)
    assert [type(effect) for effect in effects] == [Finalize, Resolve]


def test_an_outcome_that_is_not_final_is_asked_for_again():
    one = coordinator(2)
    one.start()
    one.on_part_lost(0)
    assert one.on_outcome(TxnReply(0, TxnStatus.STAGED)) == [Outcome(0, 0, 0, TXN, b"k0")]
    assert one.state is State.ASKING


def test_what_the_anchor_has_forgotten_is_unknown_for_ever():
    one = coordinator(1)
    one.start()
    one.on_part_lost(0)
    assert one.on_outcome(TxnReply(0, TxnStatus.EXPIRED)) == []
    assert one.state is State.UNKNOWN
    assert one.forgotten


def test_time_out_tells_nobody_anything():
    one = coordinator(2)
    one.start()
    one.on_prepare(0, prepared(905))
    assert one.on_time_out() == []
    assert one.state is State.UNKNOWN
    assert (
        one.on_prepare(1, prepared(906)) == []
    )  # recovery commits it: nothing may be decided here


def test_while_the_anchor_is_asked_the_last_part_may_still_decide():
    one = coordinator(2)
    one.start()
    one.on_prepare(0, prepared(905))
    one.on_part_lost(1)
    one.on_prepare(1, prepared(904))
    assert (one.state, one.commit_ts) == (State.COMMITTED, 905)


def test_a_participant_that_was_resolved_already_tells_the_outcome():
    one = coordinator(2)
    one.start()
    one.on_prepare(1, answer(PartStatus.COMMITTED, 930))
    assert (one.state, one.commit_ts) == (State.COMMITTED, 930)


def test_contradictions_are_loud():
    one = coordinator(2)
    one.start()
    with pytest.raises(ContradictoryAnswers):
        one.on_prepare(0, prepared(0))
    with pytest.raises(ContradictoryAnswers):
        one.on_prepare(0, answer(PartStatus.COMMITTED, 0))
    one.on_prepare(0, prepared(905))
    with pytest.raises(ContradictoryAnswers):
        one.on_prepare(0, prepared(906))
    one.on_prepare(1, prepared(907))
    with pytest.raises(ContradictoryAnswers):
        one.on_prepare(1, FENCED)
    with pytest.raises(ContradictoryAnswers):
        one.on_outcome(TxnReply(0, TxnStatus.COMMITTED, 908))


@given(st.data())
def test_any_order_of_a_consistent_history_gives_its_outcome(data: st.DataObject):
    """Answers of one history, doubled and shuffled and with losses: never the opposite decision, each told at most once."""
    parts = data.draw(st.integers(1, 4))
    commits = data.draw(st.booleans())
    stamps = [900 + 7 * number for number in range(parts)]
    answers: list[tuple[int, PrepareReply | TxnReply | None]] = [
        (
            number,
            answer(PartStatus.COMMITTED, stamps[0]) if parts == 1 else prepared(stamps[number]),
        )
        for number in range(parts)
    ]
    if not commits:
        answers[data.draw(st.integers(0, parts - 1))] = (0, FENCED)
        answers = [(n if a is not FENCED else i, a) for i, (n, a) in enumerate(answers)]
    final = (
        TxnReply(0, TxnStatus.COMMITTED, max(stamps)) if commits else TxnReply(0, TxnStatus.ABORTED)
    )
    extra = data.draw(st.lists(st.sampled_from([*answers, (0, None)]), max_size=4))
    one = coordinator(parts)
    one.start()
    told: list[Request] = []
    for number, reply in data.draw(st.permutations(answers + extra)):
        if reply is None:
            effects = one.on_part_lost(number)
            told += [each for each in effects if not isinstance(each, Outcome)]
            if any(isinstance(each, Outcome) for each in effects) and data.draw(st.booleans()):
                told += one.on_outcome(final)
        else:
            assert isinstance(reply, PrepareReply)
            told += [
                each for each in one.on_prepare(number, reply) if not isinstance(each, Outcome)
            ]
    assert one.state is (State.COMMITTED if commits else State.ABORTED)
    assert one.commit_ts == (max(stamps) if commits else 0)
    assert len(told) == (0 if parts == 1 else parts)
