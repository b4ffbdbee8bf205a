"""Planted bugs of versionstamps, closed timestamps, watches and locks. See txn_plants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final
from unittest.mock import patch

from msgspec import structs

from txn import (
    closed,
    deadlocks,
    stamps,
)
from txn.changes import Feed, Poll, Search
from txn.commands import PreparePart
from txn.evaluate import Evaluator
from txn.guards import GuardCheck
from txn.latches import LatchTable, Pending
from txn.locking import Locking
from txn.locks import Lock, LockTable
from txn.messages import Prepare
from txn.recent import Recent
from txn.state import RangeState
from txn.types import TIMESTAMP_MAX
from txn.validation import Validation

Patches = list[tuple[Any, str, Any]]


def _stamp_is_the_parts() -> Patches:
    """A stamp is the timestamp of its part, and not that of the commit."""
    command_of = Evaluator._command

    def command(self: Evaluator, pending: Pending, ts: int) -> Any:
        made = command_of(self, pending, ts)
        if isinstance(made, PreparePart):
            rows = stamps.filled(made.keys, made.values, made.stamps, ts)
            keys, stored = list(rows), list(rows.values())
            return structs.replace(made, keys=keys, values=stored, stamps=[])
        return made

    return [(Evaluator, "_command", command)]


def _stamped_intents_unseen() -> Patches:
    """Nobody meets the intent of a stamped key."""
    return [(RangeState, "stamped_in", lambda *_: iter(()))]


def _stamped_keys_not_latched() -> Patches:
    """Nobody waits for a stamped key whose entry is in flight."""
    acquire = LatchTable.acquire

    def without(self: LatchTable, pending: Pending) -> None:
        pending.stamp_spans = []
        acquire(self, pending)

    return [(LatchTable, "acquire", without)]


def _stamped_keys_pass_guards() -> Patches:
    """A stamped key does not wait for whoever guards where it may come to stand."""
    return [(LatchTable, "blocker_of_stamp", lambda *_: None)]


def _closed_against(promised_of: Callable[[Evaluator], int]) -> Patches:
    give = Evaluator.give_timestamps

    def gave(self: Evaluator, *arguments: Any) -> None:
        promised, self.closing.promised = self.closing.promised, promised_of(self)
        give(self, *arguments)
        self.closing.promised = promised

    return [(Evaluator, "give_timestamps", gave)]


def _closed_checked_against_applied() -> Patches:
    """A timestamp is compared with what is closed in applied entries, not with what was promised in others, and in messages."""
    return _closed_against(lambda evaluator: evaluator.state.row.closed_ts)


def _closed_passed_by_fetch() -> Patches:
    """A timestamp is not compared with what was closed while it was asked for."""
    return _closed_against(lambda _: 0)


def _closed_above_in_flight() -> Patches:
    """What has its timestamp, and is not applied, does not hold back what is closed."""
    return [(closed.Closing, "_lowest_in_flight", lambda _: TIMESTAMP_MAX)]


def _safe_above_undecided() -> Patches:
    """Replicas read at what is closed, whatever is undecided."""
    return [(closed, "safe_ts", lambda _state, closed_ts: closed_ts)]


def _heard_before_applied() -> Patches:
    """A replica takes what its leader closed for its own, without having applied as much."""
    return [(closed.Heard, "closed", lambda self, row: max(row.closed_ts, self._next_closed))]


def _watch_passes_intents() -> Patches:
    """A poll does not ask about undecided writes."""
    look = Feed._look

    def hasty(self: Feed, poll: Poll, now: float) -> None:
        state = self._ev.state
        intents, state.intents = state.intents, {}
        try:
            look(self, poll, now)
        finally:
            state.intents = intents

    return [(Feed, "_look", hasty)]


def _watch_passes_latches() -> Patches:
    """A poll does not wait for writers that were there before."""
    look = Feed._look

    def hasty(self: Feed, poll: Poll, now: float) -> None:
        poll.sequence = -1
        look(self, poll, now)

    return [(Feed, "_look", hasty)]


def _watch_unconfirmed() -> Patches:
    """A deposed leader's pages are believed."""
    tell = Feed._tell

    def at_once(self: Feed, poll: Poll, reply: Any, *, confirm: bool = False) -> None:
        tell(self, poll, reply)

    return [(Feed, "_tell", at_once)]


def _page_cut_inside_a_version() -> Patches:
    """A page ends where it is full."""
    page = Feed._page

    def cut(self: Feed, poll: Poll, upto: int, items: Iterator[Any]) -> None:
        rows = list(items)
        rows_max = poll.request.rows_max
        if len(rows) > rows_max:
            upto = rows[rows_max - 1][0]
        page(self, poll, upto, iter(rows[:rows_max]))

    return [(Feed, "_page", cut)]


def _recent_forgets() -> Patches:
    """What went from Recent is taken for never written."""
    trim = Recent._trim

    def quietly(self: Recent) -> None:
        low = self.low
        trim(self)
        self.low = low

    return [(Recent, "_trim", quietly)]


def _recent_begins_at_nothing() -> Patches:
    """A replica that has loaded its rows believes that there were none."""
    begin = Recent.begin
    return [(Recent, "begin", lambda self, _newest: begin(self, 0))]


def _waiting_poll_misses_a_late_commit() -> Patches:
    """A poll that has waited trusts Recent, although it was trimmed above what was written meanwhile."""

    def trusting(self: Feed, poll: Poll) -> bool:
        return poll.listens or self._ev.state.recent.low <= poll.request.since

    return [(Feed, "_reaches_back", trusting)]


def _search_of_latest_alone() -> Patches:
    """A search does not look at versions that were overwritten."""
    return [(Search, "_older", lambda *_: iter(()))]


def _full_backlog_speaks_of_all() -> Patches:
    """A search that found too much leaves the newest out, and says that it has all."""
    add = Search._add

    def silent(self: Search, version: int, key: bytes) -> None:
        upto = self.upto
        add(self, version, key)
        self.upto = upto

    return [(Search, "_add", silent)]


def _watch_from_what_was_collected() -> Patches:
    """A poll from below gc_threshold is answered with what is left."""
    refusal = Feed._refusal

    def blind(self: Feed, poll: Poll) -> Any:
        row = self._ev.state.row
        threshold, row.gc_threshold = row.gc_threshold, 0
        try:
            return refusal(self, poll)
        finally:
            row.gc_threshold = threshold

    return [(Feed, "_refusal", blind)]


def _locks_trusted() -> Patches:
    """What was read under a lock is not validated: the lock is taken for a proof."""
    prepare = Evaluator._prepare

    def trusting(self: Any, request: Prepare, *rest: Any) -> None:
        if not request.lock_owner:
            return prepare(self, request, *rest)
        with patch.object(GuardCheck, "look", lambda *_: (None, [])):
            return prepare(self, request, *rest)

    return [(Evaluator, "_prepare", trusting)]


def _lock_passes_intents() -> Patches:
    """A lock is granted over undecided writes of others, and reads below them."""
    look = Locking._look

    def hasty(self: Locking, *rest: Any) -> None:
        state = self.ev.state
        intents, state.intents = state.intents, {}
        look(self, *rest)
        state.intents = intents

    return [(Locking, "_look", hasty)]


def _lock_passes_stamps() -> Patches:
    """A lock is granted where an undecided transaction may yet put a stamped key."""
    look = Locking._look

    def hasty(self: Locking, *rest: Any) -> None:
        with patch.object(self.ev.state, "stamped", {}):
            look(self, *rest)

    return [(Locking, "_look", hasty)]


def _lock_passes_latches() -> Patches:
    """A lock's read does not wait for writers that were evaluated before."""
    look = Locking._look

    def hasty(self: Locking, *rest: Any) -> None:
        latches, self.ev.latches = self.ev.latches, LatchTable()
        look(self, *rest)
        self.ev.latches = latches

    return [(Locking, "_look", hasty)]


def _writers_pass_locks() -> Patches:
    """A lock keeps no writer away: two may be told, one after the other, that they have the newest version."""
    return [(Lock, "free_for", lambda *_: True)]


def _lock_left_to_nobody() -> Patches:
    """Who gives a lock back does not look for the next."""

    def advance(self: LockTable, lock: Lock) -> None:
        if not lock.queue and not lock.holders:
            self.locks.pop(lock.key, None)

    return [(LockTable, "_advance", advance)]


def _lock_outlives_its_owner() -> Patches:
    """A lock stays until its lease ends, whatever became of its owner."""
    return [(Locking, "applied", lambda *_: None)]


def _deadlock_unseen() -> Patches:
    """The detector hears of waits, and never finds a cycle."""
    return [(deadlocks, "_cycle_in", lambda *_: [])]


def _validated_before_its_time() -> Patches:
    """What was read elsewhere is looked at as of the begin, and not of the commit."""
    begin = Validation.begin

    def early(self: Validation, pending: Pending, _at: int, now: float) -> None:
        begin(self, pending, pending.request.elsewhere[0][0].read_ts, now)

    return [(Validation, "begin", early)]


def _committed_before_validated() -> Patches:
    """What was read elsewhere is never asked about."""

    def begin(self: Validation, pending: Pending, _at: int, _now: float) -> None:
        pending.asking = 0
        self.owner.proposals.append(pending)

    return [(Validation, "begin", begin)]


def _one_range_answers_for_all() -> Patches:
    """The first range that says "unchanged" decides."""
    on_reply = Validation._on_reply

    def first(self: Validation, pending: Pending, reply: Any) -> None:
        pending.asking = min(pending.asking, 1)
        on_reply(self, pending, reply)

    return [(Validation, "_on_reply", first)]


def _validation_passes_latches() -> Patches:
    """A writer whose entry is in flight is not waited for."""
    return [(Validation, "_writer", lambda *_: None)]


def _validation_passes_intents() -> Patches:
    """Undecided writes in what was read elsewhere are not asked about."""
    return [(Validation, "_undecided", lambda *_: False)]


def _guards_half_walked() -> Patches:
    """What was not looked at in the first slice of a walk is never looked at."""

    def hasty(self: GuardCheck, pending: Pending, _rest: Any, _now: float) -> None:
        self.owner.await_fresh.append(pending)

    return [(GuardCheck, "begin", hasty)]


# Each with the number of seeds, from 0 on, within which it must be found.
FEATURES: Final[dict[str, tuple[Callable[[], Patches], int]]] = {
    "stamp_is_the_parts": (_stamp_is_the_parts, 10),
    "stamped_intents_unseen": (_stamped_intents_unseen, 60),
    "stamped_keys_not_latched": (_stamped_keys_not_latched, 80),
    "stamped_keys_pass_guards": (_stamped_keys_pass_guards, 120),
    "closed_checked_against_applied": (_closed_checked_against_applied, 15),
    "closed_passed_by_fetch": (_closed_passed_by_fetch, 15),
    "closed_above_in_flight": (_closed_above_in_flight, 15),
    "safe_above_undecided": (_safe_above_undecided, 10),
    "heard_before_applied": (_heard_before_applied, 100),
    "watch_passes_intents": (_watch_passes_intents, 10),
    "watch_passes_latches": (_watch_passes_latches, 10),
    "watch_unconfirmed": (_watch_unconfirmed, 600),
    "page_cut_inside_a_version": (_page_cut_inside_a_version, 10),
    "recent_forgets": (_recent_forgets, 40),
    "recent_begins_at_nothing": (_recent_begins_at_nothing, 10),
    "waiting_poll_misses_a_late_commit": (_waiting_poll_misses_a_late_commit, 100),
    "search_of_latest_alone": (_search_of_latest_alone, 60),
    "full_backlog_speaks_of_all": (_full_backlog_speaks_of_all, 300),
    "watch_from_what_was_collected": (_watch_from_what_was_collected, 80),
    "locks_trusted": (_locks_trusted, 20),
    "lock_passes_intents": (_lock_passes_intents, 10),
    "lock_passes_stamps": (_lock_passes_stamps, 80),
    "lock_passes_latches": (_lock_passes_latches, 60),
    "writers_pass_locks": (_writers_pass_locks, 10),
    "lock_left_to_nobody": (_lock_left_to_nobody, 10),
    "lock_outlives_its_owner": (_lock_outlives_its_owner, 10),
    "deadlock_unseen": (_deadlock_unseen, 60),
    "validated_before_its_time": (_validated_before_its_time, 20),
    "committed_before_validated": (_committed_before_validated, 20),
    "one_range_answers_for_all": (_one_range_answers_for_all, 200),
    "validation_passes_latches": (_validation_passes_latches, 120),
    "validation_passes_intents": (_validation_passes_intents, 200),
    "guards_half_walked": (_guards_half_walked, 20),
}
