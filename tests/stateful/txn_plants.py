"""Planted bugs: each breaks one rule of the protocol, to prove that the checker would notice.

A plant replaces methods of the product while a seed runs, or sets a switch that the harness reads. Every one is written as
the mistake would be: the rule left out, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final
from unittest.mock import patch

from msgspec import structs

from tests.stateful.txn_plants_features import FEATURES, Patches
from txn import (
    apply,
    decided,
    evaluate,
    keycode,
    recovery,
    values,
    visibility,
)
from txn.commands import AbortUnstaged, Collect, OutboxDone, PreparePart
from txn.decided import RecentlyDecided
from txn.evaluate import Evaluator, prepare_reply
from txn.gc import Collector, Found
from txn.guards import GuardCheck
from txn.latches import LatchTable, Pending
from txn.messages import Fence, PartReply, Prepare, QueryMode, QueryPart, QueryTxn
from txn.ports import Rows
from txn.reads import Reader
from txn.recovery import Recovery
from txn.state import ABSENT, Answer, Outbox, Part, RangeState, Staged, TerminalRow, encode_row
from txn.types import Guard, PartStatus, TxnStatus


def _guards_not_held() -> Patches:
    """What a transaction read is validated, but not protected until it ends."""
    compute = values.compute

    def without(request: Prepare, pending: Pending, rows: Rows) -> Answer | None:
        refusal = compute(request, pending, rows)
        pending.guards = []
        return refusal

    return [(evaluate, "compute", without)]


def _guards_not_validated() -> Patches:
    """What a transaction read is protected, and not compared with what is there."""
    return [(GuardCheck, "_newer_than", lambda _self, _guard, left, _lately: (None, None, left))]


def _guards_until_prepared() -> Patches:
    """What a transaction read is protected until its part is prepared, and not until it ends."""
    command_of = Evaluator._command

    def command(self: Evaluator, pending: Pending, ts: int) -> Any:
        made = command_of(self, pending, ts)
        return structs.replace(made, guards=[]) if isinstance(made, PreparePart) else made

    return [(Evaluator, "_command", command)]


def _conditions_not_held() -> Patches:
    """Conditions and deleted spans are looked at, but not protected until the transaction ends."""
    return [(values, "hold", lambda start, end: Guard(start, start, 0))]


def _reads_pass_latches() -> Patches:
    """Readers do not wait for writers that were there before."""
    return [
        (LatchTable, "blocker_of_read", lambda *_: None),
        (LatchTable, "blocker_of_scan", lambda *_: None),
    ]


def _reads_pass_intents() -> Patches:
    """Readers do not ask about undecided writes."""
    return [(Reader, "undecided", lambda *_: False)]


def _volatile_refusal() -> Patches:
    """CONFLICT is told, and not written down."""

    def refuse(self: Evaluator, request: Prepare, origin: Any, refusal: Answer) -> None:
        self.out.reply(origin, prepare_reply(request.id, refusal, None), False)

    return [(Evaluator, "refuse", refuse)]


def _volatile_fence() -> Patches:
    """FENCED is told to whoever recovers, and not written down."""

    def fence(self: Evaluator, request: Fence, origin: Any, now: float) -> None:
        answer = self.state.answer_of(self.rows, request.txn_id, request.locus)
        status = PartStatus.FENCED if answer is ABSENT else answer.status
        self.out.reply(origin, PartReply(request.id, status, answer.ts), False)

    return [(Evaluator, "_fence_request", fence)]


def _abort_without_fence() -> Patches:
    """The anchor's timer aborts, instead of asking."""

    def recover(self: Recovery, txn_id: bytes, staged: Staged, *, first: bool = False) -> None:
        if txn_id not in self._deciding:
            self._propose_decision(txn_id, staged.anchor_key, 0)

    return [(Recovery, "_recover", recover)]


def _abort_record_without_fence() -> Patches:
    """Nothing known: ABORTED is written, but the anchor does not fence itself."""

    def abort(state: RangeState, overlay: apply.Overlay, command: AbortUnstaged) -> Answer:
        row = keycode.part_row(keycode.TERMINAL, command.anchor_key, command.txn_id)
        if overlay.get(row) is None and command.txn_id not in state.staged:
            overlay.put(row, encode_row(TerminalRow(0)))
        return Answer(PartStatus.ABORTED)

    table: dict[type, Callable[..., Answer]] = {**apply._APPLY, AbortUnstaged: abort}
    return [(apply, "_APPLY", table)]


def _evaluated_twice() -> Patches:
    """Neither evaluation nor apply looks for what stands already (I1)."""
    return [
        (Evaluator, "_known_outcome", lambda *_: None),
        (apply, "_known", lambda *_: ABSENT),
    ]


def _versions_forgotten() -> Patches:
    """A late duplicate of a one-range commit does not find its versions."""
    return [
        (evaluate, "find_txn", lambda *_: 0),
        (apply, "find_txn", lambda *_: 0),
        (recovery, "find_txn", lambda *_: 0),
    ]


def _resolved_part_forgotten() -> Patches:
    """A part leaves no row when it is resolved."""
    resolve = apply._resolve_part

    def forget(
        state: RangeState, overlay: apply.Overlay, part: Part, ts: int, *, hinted: bool
    ) -> None:
        resolve(state, overlay, part, ts, hinted=hinted)
        overlay.delete(keycode.part_row(keycode.DECIDED, part.locus, part.txn_id))

    return [(apply, "_resolve_part", forget)]


def _decided_with_min() -> Patches:
    """Recovery commits at the smallest min_ts."""

    def conclude(
        self: Recovery, txn_id: bytes, staged: Staged, known: dict[bytes, tuple[int, int]]
    ) -> None:
        answers = [known.get(part.locus, (PartStatus.ABSENT, 0)) for part in staged.participants]
        if any(status in (PartStatus.FENCED, PartStatus.ABORTED) for status, _ in answers):
            self._propose_decision(txn_id, staged.anchor_key, 0)
        elif all(status in (PartStatus.PREPARED, PartStatus.COMMITTED) for status, _ in answers):
            self._propose_decision(txn_id, staged.anchor_key, min(ts for _, ts in answers))

    return [(Recovery, "_conclude", conclude)]


def _any_prepared_is_committed() -> Patches:
    """A reader is told COMMITTED as soon as one part is prepared."""
    learn = visibility.Visibility._learn

    def hasty(self: Any, participant: Any, reply: Any) -> None:
        if isinstance(reply, PartReply) and reply.status == PartStatus.PREPARED:
            self.missing = {participant.locus: participant}
        learn(self, participant, reply)

    return [(visibility.Visibility, "_learn", hasty)]


def _invisible_while_latched() -> Patches:
    """Readers are told that a part is absent, though its entry is in flight."""
    waits = Recovery._waits_or_misses
    query_part = Evaluator._query_part

    def hasty(self: Recovery, request: Any, origin: Any, now: float) -> bool:
        if isinstance(request, QueryTxn) and request.mode == QueryMode.READ:
            return False
        return waits(self, request, origin, now)

    def hasty_part(self: Evaluator, request: QueryPart, origin: Any, now: float) -> None:
        latched = self.latches.txns.pop(request.txn_id, None)
        query_part(self, request, origin, now)
        if latched is not None:
            self.latches.txns[request.txn_id] = latched

    return [(Recovery, "_waits_or_misses", hasty), (Evaluator, "_query_part", hasty_part)]


def _invisible_for_ever() -> Patches:
    """INVISIBLE at one reader's timestamp is taken for INVISIBLE at all."""
    learn = Recovery._on_visibility

    def forever(self: Recovery, part: Any, reply: Any) -> None:
        learn(self, part, reply)
        if getattr(reply, "status", None) == TxnStatus.INVISIBLE:
            part.invisible_to = 1 << 62

    return [(Recovery, "_on_visibility", forever)]


def _outbox_dropped_early() -> Patches:
    """An outbox row goes when its Resolve is sent, not when it is acknowledged."""
    send = Recovery._send_outbox

    def hasty(self: Recovery, key: tuple[bytes, bytes], row: Outbox) -> None:
        send(self, key, row)
        pending = Pending(b"", None, None)
        pending.command = OutboxDone([(row.txn_id, row.anchor_key, row.participant.locus)])
        self.ev.propose(pending)

    return [(Recovery, "_send_outbox", hasty)]


def _horizon_left_behind() -> Patches:
    """Versions are collected, and the outcome horizon does not rise with them."""
    collect = apply._APPLY[Collect]

    def without(state: RangeState, overlay: Any, command: Collect) -> Answer:
        horizon = state.row.outcome_horizon
        answer = collect(state, overlay, command)
        state.row.outcome_horizon = horizon
        return answer

    return [(apply, "_APPLY", {**apply._APPLY, Collect: without})]


def _newest_kept_version_collected() -> Patches:
    """The newest version at or below the threshold goes like those before it."""
    of_history = Collector._slice_of_history

    def greedy(self: Collector, found: Found) -> bool:
        more = of_history(self, found)
        for key in found.versions:
            prefix = keycode.history_prefix(key)
            chain = [
                keycode.history_ts(row)
                for row, _ in self._ev.rows.scan(prefix, prefix + b"\xff" * 9)
            ]
            found.versions[key] = [ts for ts in chain if ts <= self._threshold]
        return more

    return [(Collector, "_slice_of_history", greedy)]


def _hinted_part_collected() -> Patches:
    """A part that a client's word resolved goes, whatever its record is."""
    return [(Collector, "_needed", lambda self, _row: self._threshold)]


def _record_collected_early() -> Patches:
    """A record goes while parts have not acknowledged their Resolve."""
    of_terminal = Collector._slice_of_terminal

    def all_of_them(self: Collector, found: Found) -> bool:
        outbox, self._ev.state.outbox = self._ev.state.outbox, {}
        try:
            return of_terminal(self, found)
        finally:
            self._ev.state.outbox = outbox

    return [(Collector, "_slice_of_terminal", all_of_them)]


def _decided_not_remembered() -> Patches:
    """What was decided is not remembered, so that its row is not looked for."""
    return [(RecentlyDecided, "add", lambda *_: None)]


def _decided_forgotten_below_the_floor() -> Patches:
    """What is forgotten of the decided does not raise the floor."""

    def add(self: RecentlyDecided, txn_id: bytes) -> None:
        self._recent[txn_id] = None
        if len(self._recent) > decided.REMEMBERED_MAX:
            del self._recent[next(iter(self._recent))]

    return [(RecentlyDecided, "add", add)]


def _switch() -> Patches:
    """The harness does it."""
    return []


# Each with the number of seeds, from 0 on, within which it must be found.
PLANTS: Final[dict[str, tuple[Callable[[], Patches], int]]] = {
    "stale_min_ts": (_switch, 5),  # timestamps fetched in advance
    "joins_a_sent_batch": (_switch, 40),  # a timestamp that was asked for before the latches
    "unconfirmed_answers": (_switch, 200),  # a deposed leader's reads are believed
    "proposed_again": (_switch, 120),  # what a term lost is proposed in the next one
    "guards_not_held": (_guards_not_held, 120),
    "guards_not_validated": (_guards_not_validated, 30),
    "guards_until_prepared": (_guards_until_prepared, 60),
    "conditions_not_held": (_conditions_not_held, 240),
    "reads_pass_latches": (_reads_pass_latches, 15),
    "reads_pass_intents": (_reads_pass_intents, 10),
    "volatile_refusal": (_volatile_refusal, 10),
    "volatile_fence": (_volatile_fence, 10),
    "abort_without_fence": (_abort_without_fence, 10),
    "abort_record_without_fence": (_abort_record_without_fence, 15),
    "evaluated_twice": (_evaluated_twice, 5),
    "versions_forgotten": (_versions_forgotten, 15),
    "resolved_part_forgotten": (_resolved_part_forgotten, 15),
    "decided_with_min": (_decided_with_min, 15),
    "any_prepared_is_committed": (_any_prepared_is_committed, 10),
    "invisible_while_latched": (_invisible_while_latched, 15),
    "invisible_for_ever": (_invisible_for_ever, 120),
    "outbox_dropped_early": (_outbox_dropped_early, 10),
    "horizon_left_behind": (_horizon_left_behind, 10),
    "newest_kept_version_collected": (_newest_kept_version_collected, 60),
    "hinted_part_collected": (_hinted_part_collected, 200),
    "record_collected_early": (_record_collected_early, 200),
    "decided_not_remembered": (_decided_not_remembered, 10),
    "decided_forgotten_below_the_floor": (_decided_forgotten_below_the_floor, 10),
    "deposed_leader_closes": (_switch, 150),
    **FEATURES,
}

SWITCHES: Final[dict[str, str]] = {
    "stale_min_ts": "timestamps are fetched in advance",
    "joins_a_sent_batch": "a part takes a timestamp that was asked for before it latched",
    "unconfirmed_answers": "a deposed leader's answers are believed",
    "proposed_again": "what a term lost is proposed in the next one",
    "deposed_leader_closes": "a leader tells what it closed without its leadership being confirmed",
}
"""What the harness does for a switch, for people."""


@contextmanager
def planted(name: str | None) -> Iterator[frozenset[str]]:
    """Plant one bug for the duration; yields the harness's switches."""
    if name is None:
        yield frozenset()
        return
    with ExitStack() as stack:
        for owner, attribute, replacement in PLANTS[name][0]():
            stack.enter_context(patch.object(owner, attribute, replacement))
        yield frozenset({name})
