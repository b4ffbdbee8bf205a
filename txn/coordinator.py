"""One attempt of one transaction, from its first Prepare to a decision. Sans-I/O: replies in, requests out.

An attempt is immutable: one txn_id, one write set, one list of participants. The coordinator holds nothing that a crash
may not take away: what decides is in the ranges' logs, and recovery there finishes what it leaves behind
(DESIGN.md sections 4 to 6 and 9).

Invariants
C1  COMMITTED is told only when every part is PREPARED, or when the anchor or a part says so itself; the commit timestamp
    is then max(min_ts), or the one that was said. It never changes.
C2  ABORTED is told only after a durable FENCED or ABORTED. Every other refusal says nothing (LOST): the anchor is asked.
C3  After a decision each part is told once, the anchor by Finalize and the others by Resolve hints; before it, never.
C4  Contradictory answers (a decision, then its opposite) are nobody's right: ContradictoryAnswers, at once.

Requests leave with id, range_id and version 0: whoever sends them fills those in, and repeats them until answered.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from txn.messages import (
    Finalize,
    Outcome,
    Prepare,
    PrepareReply,
    Request,
    Resolve,
    TxnReply,
    fast,
)
from txn.types import Expect, Guard, Participant, PartStatus, TxnStatus, Write, begin_ts_of


class Part(msgspec.Struct, frozen=True, gc=False):
    """One range's share of a transaction. `participant.locus` is a key of it (the anchor's: the anchor key)."""

    participant: Participant
    writes: list[Write]
    expects: list[Expect]
    guards: list[Guard]
    elsewhere: list[
        list[Guard]
    ] = []  # of a transaction's only part: what it has read in other ranges


def with_fast_guards(parts: list[Part]) -> list[Part]:
    """The one part that writes, together with what was read elsewhere; or the parts as they are, if that cannot be.

    Args: parts: the anchor's first; of a transaction that holds no locks.
    """
    first, *others = parts
    if not others or not first.writes or any(part.writes or part.expects for part in others):
        return parts
    elsewhere = [part.guards for part in others]
    return [msgspec.structs.replace(first, elsewhere=elsewhere)] if fast(elsewhere) else parts


class State(enum.Enum):
    PREPARING = "preparing"
    ASKING = "asking"  # some part was lost; the anchor is asked for the outcome
    COMMITTED = "committed"
    ABORTED = "aborted"
    UNKNOWN = "unknown"  # the time ran out, or the record is no longer kept


class Event(enum.Enum):
    PREPARED = "prepared"  # one more part, and others are missing
    ALL_PREPARED = "all_prepared"
    COMMITTED = "committed"  # somebody who knows says so
    REFUSED = "refused"  # FENCED or ABORTED
    LOST = "lost"  # a part, or the anchor, gave an answer that says nothing
    FORGOTTEN = "forgotten"  # the anchor's record is below the outcome horizon
    TIME_OUT = "time_out"


NEXT: Final[Mapping[tuple[State, Event], State]] = {  # a pair not listed contradicts C4
    (State.PREPARING, Event.PREPARED): State.PREPARING,
    (State.PREPARING, Event.ALL_PREPARED): State.COMMITTED,
    (State.PREPARING, Event.COMMITTED): State.COMMITTED,
    (State.PREPARING, Event.REFUSED): State.ABORTED,
    (State.PREPARING, Event.LOST): State.ASKING,
    (State.PREPARING, Event.TIME_OUT): State.UNKNOWN,
    (State.ASKING, Event.PREPARED): State.ASKING,
    (State.ASKING, Event.ALL_PREPARED): State.COMMITTED,
    (State.ASKING, Event.COMMITTED): State.COMMITTED,
    (State.ASKING, Event.REFUSED): State.ABORTED,
    (State.ASKING, Event.LOST): State.ASKING,
    (State.ASKING, Event.FORGOTTEN): State.UNKNOWN,
    (State.ASKING, Event.TIME_OUT): State.UNKNOWN,
    (State.COMMITTED, Event.PREPARED): State.COMMITTED,
    (State.COMMITTED, Event.ALL_PREPARED): State.COMMITTED,
    (State.COMMITTED, Event.COMMITTED): State.COMMITTED,
    (State.COMMITTED, Event.LOST): State.COMMITTED,
    (State.COMMITTED, Event.FORGOTTEN): State.COMMITTED,
    (State.COMMITTED, Event.TIME_OUT): State.COMMITTED,
    (State.ABORTED, Event.PREPARED): State.ABORTED,
    (State.ABORTED, Event.REFUSED): State.ABORTED,
    (State.ABORTED, Event.LOST): State.ABORTED,
    (State.ABORTED, Event.FORGOTTEN): State.ABORTED,
    (State.ABORTED, Event.TIME_OUT): State.ABORTED,
    (State.UNKNOWN, Event.PREPARED): State.UNKNOWN,
    (State.UNKNOWN, Event.ALL_PREPARED): State.UNKNOWN,
    (State.UNKNOWN, Event.COMMITTED): State.UNKNOWN,
    (State.UNKNOWN, Event.REFUSED): State.UNKNOWN,
    (State.UNKNOWN, Event.LOST): State.UNKNOWN,
    (State.UNKNOWN, Event.FORGOTTEN): State.UNKNOWN,
    (State.UNKNOWN, Event.TIME_OUT): State.UNKNOWN,
}

DECIDED: Final = (State.COMMITTED, State.ABORTED, State.UNKNOWN)

_PART_EVENTS: Final[Mapping[int, Event]] = {
    PartStatus.COMMITTED: Event.COMMITTED,
    PartStatus.FENCED: Event.REFUSED,
    PartStatus.ABORTED: Event.REFUSED,
    PartStatus.EXPIRED: Event.LOST,
    PartStatus.ABSENT: Event.LOST,
}
_OUTCOME_EVENTS: Final[Mapping[int, Event]] = {
    TxnStatus.COMMITTED: Event.COMMITTED,
    TxnStatus.ABORTED: Event.REFUSED,
    TxnStatus.EXPIRED: Event.FORGOTTEN,
}


class ContradictoryAnswers(Exception):
    """A transaction was said to be committed and aborted. The cluster's state is damaged."""


class Coordinator:
    """Drives one attempt. Call `start` once, then `on_...` for each answer; send what they return.

    Args: parts: the anchor's first. age: begin_ts of the transaction's first attempt (0: this is the first).
    lock_owner: the id under which it holds locks (empty: it has none).
    `state` tells when it is decided; then `commit_ts`, `refusal` and `results` say more.
    """

    __slots__ = (
        "_missing",
        "_prepared_ts",
        "age",
        "anchor_key",
        "commit_ts",
        "forgotten",
        "lock_owner",
        "one_range",
        "parts",
        "refusal",
        "results",
        "state",
        "txn_id",
    )

    def __init__(
        self,
        txn_id: bytes,
        parts: Sequence[Part],
        *,
        age: int = 0,
        lock_owner: bytes = b"",
    ) -> None:
        assert parts
        self.txn_id = txn_id
        self.parts = list(parts)
        self.one_range = len(parts) == 1
        self.anchor_key = parts[0].participant.locus
        self.age = age or begin_ts_of(txn_id)
        self.lock_owner = lock_owner
        self.state = State.PREPARING
        self.commit_ts = 0
        self.refusal: PrepareReply | None = None  # the first part's refusal, if a part refused
        self.results: list[list[bytes] | None] = [None] * len(parts)  # of each part's ADD writes
        self.forgotten = False  # the outcome cannot be learned any more
        self._prepared_ts = [0] * len(parts)
        self._missing = len(parts)

    @property
    def decided(self) -> bool:
        return self.state in DECIDED

    def start(self) -> list[Prepare]:
        """One Prepare for each part, in the order of the parts."""
        everybody = [] if self.one_range else [part.participant for part in self.parts]
        return [
            Prepare(
                id=0,
                range_id=0,
                version=0,
                txn_id=self.txn_id,
                locus=part.participant.locus,
                anchor_key=self.anchor_key,
                writes=part.writes,
                expects=part.expects,
                guards=part.guards,
                participants=everybody if number == 0 else [],
                one_range=self.one_range,
                age=self.age,
                lock_owner=self.lock_owner,
                elsewhere=part.elsewhere,
            )
            for number, part in enumerate(self.parts)
        ]

    def on_prepare(self, part: int, reply: PrepareReply) -> list[Request]:
        """A part's answer; may come twice."""
        if reply.status == PartStatus.PREPARED:
            return self._on_prepared(part, reply)
        event = _PART_EVENTS.get(reply.status, Event.LOST)
        if event is Event.COMMITTED:
            self.results[part] = reply.results
        elif event is Event.REFUSED and self.refusal is None:
            self.refusal = reply
        return self._step(event, reply.ts)

    def on_part_lost(self, part: int) -> list[Request]:  # noqa: ARG002 - which one makes no difference
        """A part was given up: its range changed so that the batch does not fit any more, or its time ran out."""
        return self._step(Event.LOST)

    def on_outcome(self, reply: TxnReply) -> list[Request]:
        """The anchor's answer to Outcome. One that is not final is asked for again."""
        event = _OUTCOME_EVENTS.get(reply.status, Event.LOST)
        self.forgotten = self.forgotten or event is Event.FORGOTTEN
        effects = self._step(event, reply.ts)
        if event is Event.LOST and self.state is State.ASKING:
            effects.append(self._ask())
        return effects

    def on_time_out(self) -> list[Request]:
        return self._step(Event.TIME_OUT)

    # --- inside -----------------------------------------------------------------------------------

    def _on_prepared(self, part: int, reply: PrepareReply) -> list[Request]:
        known = self._prepared_ts[part]
        if known:
            if known != reply.ts:
                raise ContradictoryAnswers(f"min_ts of a part moved from {known} to {reply.ts}")
            return []
        if reply.ts <= 0:
            raise ContradictoryAnswers("a part is prepared without a timestamp")
        self._prepared_ts[part] = reply.ts
        self.results[part] = reply.results
        self._missing -= 1
        if self._missing:
            return self._step(Event.PREPARED)
        return self._step(Event.ALL_PREPARED, max(self._prepared_ts))

    def _step(self, event: Event, ts: int = 0) -> list[Request]:
        before = self.state
        after = NEXT.get((before, event))
        if event in (Event.COMMITTED, Event.ALL_PREPARED) and ts <= 0:
            raise ContradictoryAnswers("a commit without a timestamp")
        if after is None or (before is after is State.COMMITTED and ts and ts != self.commit_ts):
            raise ContradictoryAnswers(
                f"{event.value} at {ts} after {before.value} at {self.commit_ts}"
            )
        self.state = after
        if before is after:
            return []
        if after is State.ASKING:
            return [self._ask()]
        if after is State.COMMITTED:
            self.commit_ts = ts
        if after is State.UNKNOWN or self.one_range:
            return []
        return self._tell_all()

    def _ask(self) -> Outcome:
        return Outcome(0, 0, 0, self.txn_id, self.anchor_key)

    def _tell_all(self) -> list[Request]:
        effects: list[Request] = [Finalize(0, 0, 0, self.txn_id, self.anchor_key, self.commit_ts)]
        for part in self.parts[1:]:
            locus, start, end = part.participant.locus, part.participant.start, part.participant.end
            effects.append(
                Resolve(0, 0, 0, self.txn_id, self.anchor_key, locus, start, end, self.commit_ts)
            )
        return effects
