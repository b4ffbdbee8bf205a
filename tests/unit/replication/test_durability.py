"""The gate: nothing leaves before its token is durable, whatever its caller does; misuse is seen at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.durability import BATCHES_MAX, Durable, Gate, covers, follows
from replication.messages import Message, VoteResponse
from replication.ready import Outgoing, Token

GROUP, OTHER = 7, 8
START = Token(1, 0, 10, 1)


def message(number: int) -> Message:
    return VoteResponse(GROUP, 2, 1, number, True, False)


def gate(*groups: int) -> Gate:
    made = Gate()
    for group in groups or (GROUP,):
        made.begin_group(group, START)
    return made


def test_a_message_without_token_leaves_at_once():
    assert gate().admit(GROUP, Outgoing(message(1), None)) == message(1)


def test_a_message_waits_for_the_batch_that_holds_its_token():
    held = gate()
    token = Token(2, 3, 10, 1)
    held.stage(GROUP, token)
    assert held.admit(GROUP, Outgoing(message(1), token)) is None
    assert held.held_messages == 1
    held.seal(1)
    tokens, messages = held.release(Durable(1))
    assert tokens == [(GROUP, token)]
    assert messages == [(GROUP, message(1))]
    assert held.durable(GROUP) == token


def test_a_message_of_a_later_turn_joins_the_batch_under_way():
    held = gate()
    token = Token(2, 3, 10, 1)
    held.stage(GROUP, token)
    held.seal(1)
    assert held.admit(GROUP, Outgoing(message(1), token)) is None
    assert held.release(Durable(1)).messages == [(GROUP, message(1))]


def test_messages_keep_their_order_and_other_batches_keep_theirs():
    held = gate(GROUP, OTHER)
    first, second = Token(1, 0, 11, 1), Token(1, 0, 12, 1)
    held.stage(GROUP, first)
    held.stage(OTHER, first)
    held.admit(GROUP, Outgoing(message(1), first))
    held.admit(OTHER, Outgoing(message(2), first))
    held.seal(1)
    held.stage(GROUP, second)
    held.admit(GROUP, Outgoing(message(3), second))
    held.seal(2)
    assert held.release(Durable(1)).messages == [(GROUP, message(1)), (OTHER, message(2))]
    assert held.release(Durable(2)).messages == [(GROUP, message(3))]


def test_a_token_that_is_durable_already_holds_nothing_back():
    assert gate().admit(GROUP, Outgoing(message(1), START)) == message(1)


@pytest.mark.parametrize(
    "token",
    [Token(2, 0, 10, 1), Token(1, 3, 10, 1), Token(1, 0, 11, 1)],
    ids=["a later term", "another vote", "a longer log"],
)
def test_a_token_that_nobody_staged_is_our_bug(token):
    with pytest.raises(AssertionError, match="D1"):
        gate().admit(GROUP, Outgoing(message(1), token))


def test_a_token_staged_for_another_group_is_of_no_use():
    held = gate(GROUP, OTHER)
    token = Token(2, 0, 10, 1)
    held.stage(OTHER, token)
    with pytest.raises(AssertionError, match="D1"):
        held.admit(GROUP, Outgoing(message(1), token))


def test_nothing_is_released_without_the_proof_for_its_batch():
    held = gate()
    held.stage(GROUP, Token(2, 0, 10, 1))
    with pytest.raises(AssertionError, match="D2"):
        held.release(Durable(1))  # not even sealed
    held.seal(5)
    with pytest.raises(AssertionError, match="D2"):
        held.release(Durable(6))


def test_batches_are_sealed_in_order_and_few_at_a_time():
    held = gate()
    for number in range(1, BATCHES_MAX + 1):
        held.seal(number)
    with pytest.raises(AssertionError, match="D2"):
        held.seal(BATCHES_MAX + 1)
    held.release(Durable(1))
    with pytest.raises(AssertionError, match="D2"):
        held.seal(BATCHES_MAX)


def test_the_term_on_disk_never_falls():
    held = gate()
    held.stage(GROUP, Token(0, 0, 10, 1))
    held.seal(1)
    with pytest.raises(AssertionError, match="falls"):
        held.release(Durable(1))


def test_an_answer_survives_a_later_token_of_the_same_batch():
    """The answer was true when it was given; what came after it in the same batch makes it a late message, no lie."""
    held = gate()
    first, later = Token(1, 0, 14, 1), Token(3, 0, 12, 2)
    held.stage(GROUP, first)
    held.admit(GROUP, Outgoing(message(1), first))
    held.stage(GROUP, later)
    held.seal(1)
    tokens, messages = held.release(Durable(1))
    assert tokens == [(GROUP, later)]
    assert messages == [(GROUP, message(1))]


def test_a_reset_shortens_the_log_on_disk():
    held = gate()
    held.stage_reset(GROUP, (5, 1))
    held.seal(1)
    assert held.release(Durable(1)).tokens == []
    assert held.durable(GROUP) == Token(1, 0, 5, 1)


def test_a_group_that_is_gone_says_nothing_more():
    held = gate(GROUP, OTHER)
    for group in (GROUP, OTHER):
        held.stage(group, Token(2, 0, 10, 1))
        held.admit(group, Outgoing(message(group), Token(2, 0, 10, 1)))
    held.seal(1)
    held.forget(GROUP)
    tokens, messages = held.release(Durable(1))
    assert [group for group, _ in tokens] == [OTHER]
    assert messages == [(OTHER, message(OTHER))]


TOKENS = st.builds(
    Token, st.integers(1, 3), st.integers(0, 2), st.integers(0, 3), st.integers(0, 2)
)


@given(TOKENS, TOKENS)
def test_what_covers_a_token_may_follow_it(state, token):
    assert covers(token, token)
    if covers(state, token):
        assert follows(state, token)
        assert state.term >= token.term
