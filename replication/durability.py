"""The gate: what must be on disk first does not leave before it is (pitfall 2).

A message with a token may leave only when that token's content (term, vote, log) is durable. The host cannot send
an `Outgoing` itself: `admit` hands out the message when it may go at once and keeps it otherwise, and `release`
gives kept messages back only against a `Durable`, which the host makes in one place: where a sync has returned.

The gate keeps its own account, independent of the cores' and of the log's, and asserts on it:
- D1 a token is in a batch that is not durable yet (then the message waits for that batch), or it is durable; a token
  that nobody staged would hold its message for ever, or let it out too early: our bug, seen at once.
- D2 batches become durable in the order in which they were sealed, each once.
- D3 what leaves waited in the batch that became durable, and its token is one that this batch makes durable, or one
  that a later token of the same batch replaced.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from replication.messages import Message
from replication.ready import Outgoing, Token

BATCHES_MAX = 2  # one that fills and one that is being synced


class Durable(NamedTuple):
    """Proof that batch `number` and all before it are on disk. Made only where a sync has returned."""

    number: int


class Released(NamedTuple):
    """What a durable batch sets free: per group the last token it made durable, and messages in order."""

    tokens: list[tuple[int, Token]]
    messages: list[tuple[int, Message]]


class _Batch:
    """What one batch of the log makes durable, and which messages wait for it."""

    __slots__ = ("held", "number", "resets", "tokens")

    def __init__(self) -> None:
        self.number = 0  # 0 until sealed
        self.tokens: dict[int, Token] = {}  # the newest of each group
        self.resets: dict[
            int, tuple[int, int]
        ] = {}  # groups whose log begins anew behind (index, term)
        self.held: list[tuple[int, Message, Token]] = []


class Gate:
    """Holds messages until their token is durable. One per node; see the module for what it asserts."""

    def __init__(self) -> None:
        self._disk: dict[int, Token] = {}  # per group: what is durable
        self._open = _Batch()
        self._sealed: deque[_Batch] = deque()
        self._last_number = 0

    def begin_group(self, group: int, token: Token) -> None:
        """What a group begins with: what its log says at start, or how it is created. No promise rests on more."""
        self._disk[group] = token

    def forget(self, group: int) -> None:
        """The group is gone; its messages are dropped."""
        del self._disk[group]
        for batch in (*self._sealed, self._open):
            batch.tokens.pop(group, None)
            batch.resets.pop(group, None)
            batch.held = [held for held in batch.held if held[0] != group]

    def stage(self, group: int, token: Token) -> None:
        """The content of `token` is staged into the batch that fills; it replaces an earlier token of the group."""
        assert group in self._disk, f"group {group} is unknown to the gate"
        self._open.tokens[group] = token

    def stage_reset(self, group: int, last: tuple[int, int]) -> None:
        """That the group's log begins anew behind `last` is staged into the batch that fills."""
        assert group in self._disk, f"group {group} is unknown to the gate"
        self._open.resets[group] = last

    def admit(self, group: int, outgoing: Outgoing) -> Message | None:
        """The message if it may leave now; None if it is kept until its token is durable."""
        message, token = outgoing
        if token is None:
            return message
        if self._open.tokens.get(group) == token:
            self._open.held.append((group, message, token))
            return None
        for batch in reversed(self._sealed):
            if batch.tokens.get(group) == token:
                batch.held.append((group, message, token))
                return None
        assert covers(self._disk[group], token), f"D1: {token} was not staged"
        return message

    def seal(self, number: int) -> None:
        """The batch that fills is batch `number` of the log; a new one begins to fill."""
        assert number > self._last_number, f"D2: batch {number} after {self._last_number}"
        assert len(self._sealed) < BATCHES_MAX, "D2: too many batches at once"
        self._last_number = number
        self._open.number = number
        self._sealed.append(self._open)
        self._open = _Batch()

    def release(self, proof: Durable) -> Released:
        """What the next sealed batch sets free, now that it is durable."""
        assert self._sealed, f"D2: {proof} of no batch"
        batch = self._sealed.popleft()
        assert batch.number == proof.number, f"D2: {proof}, but batch {batch.number} comes first"
        disk = self._disk
        for group, token in batch.tokens.items():
            assert token.term >= disk[group].term, f"the term of group {group} falls to {token}"
            disk[group] = token
        for group, (index, term) in batch.resets.items():
            disk[group] = disk[group]._replace(last_index=index, last_term=term)
        messages: list[tuple[int, Message]] = []
        for group, message, token in batch.held:
            assert follows(batch.tokens[group], token), f"D3: {token} is not durable"
            messages.append((group, message))
        return Released(list(batch.tokens.items()), messages)

    def durable(self, group: int) -> Token:
        """What is on disk for a group, by the gate's account."""
        return self._disk[group]

    @property
    def held_messages(self) -> int:
        """How many messages wait, for metrics."""
        return len(self._open.held) + sum(len(batch.held) for batch in self._sealed)


def follows(later: Token, token: Token) -> bool:
    """Whether a replica that handed out `token` may have handed out `later` after it: terms and votes stay."""
    if later.term != token.term:
        return later.term > token.term
    return token.vote in {0, later.vote}


def covers(state: Token, token: Token) -> bool:
    """Whether a log in `state` has what `token` asks for, or had it before its term rose."""
    if state.term == token.term and state.last_term == token.last_term:
        return follows(state, token) and state.last_index >= token.last_index
    return follows(state, token)
