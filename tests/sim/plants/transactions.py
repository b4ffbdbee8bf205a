"""Bugs of the transaction protocol, under whole clusters. Those of `tests/stateful/txn_plants.py` are planted here as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import kvstore.closing
import kvstore.replica
import txn.apply
from kvstore.attempts import KeptResult
from kvstore.reads import Page
from kvstore.scans import OwnPages
from kvstore.transactions import Transaction
from tests.sim import directed_txn
from tests.sim.plants.base import (
    CALM,
    CLIENTS,
    PARTITIONS,
    RETRIES,
    Directed,
    Patches,
    Plant,
    Seeds,
)
from tests.stateful import txn_plants
from txn import keycode
from txn.state import Part, RangeState


def _core(name: str) -> Callable[[], Patches]:
    return txn_plants.PLANTS[name][0]


def _outbox_lost() -> Patches:
    return [(txn.apply, "_post", lambda _state, _overlay, _row: None)]


def _status_forgotten(*, hinted_only: bool) -> Callable[[], Patches]:
    """A part that was resolved (by a client's hint, though the record is not terminal yet) leaves no row."""

    def patches() -> Patches:
        resolve = txn.apply._resolve_part

        def forget(state: RangeState, overlay: Any, part: Part, ts: int, *, hinted: bool) -> None:
            resolve(state, overlay, part, ts, hinted=hinted)
            if hinted or not hinted_only:
                overlay.delete(keycode.part_row(keycode.DECIDED, part.locus, part.txn_id))

        return [(txn.apply, "_resolve_part", forget)]

    return patches


def _guards_without_gaps() -> Patches:
    """A span that was read is guarded where rows were found, and not between them."""
    following = OwnPages.next

    async def points(self: Any) -> Page:
        guarded, self._guarded = self._guarded, None
        page = await following(self)
        self._guarded = guarded
        for key, _ in page.rows:
            if guarded is not None:
                guarded.add_key(key)
        return page

    return [(OwnPages, "next", points)]


def _bound_not_kept() -> Patches:
    """As if the oracle had said at once, for ever, that nothing was issued."""
    samples = kvstore.closing.Samples
    return [
        (samples, "since", lambda _self, _when: 0),
        (samples, "last_asked_at", float("inf")),
    ]


def _safe_above_undecided() -> Patches:
    return [(kvstore.replica, "safe_ts", lambda _state, closed_ts: closed_ts)]


def _result_not_recalled() -> Patches:
    async def recall(_self: KeptResult, _tx: Transaction) -> bytes | None:
        return None

    return [(KeptResult, "recall", recall)]


TRANSACTIONS: Final[dict[str, Plant]] = {
    "stale beyond the bound": Plant(
        "a replica answers a read that may be stale, however stale it is",
        _bound_not_kept,
        ("Too-stale",),
        Seeds(PARTITIONS, 12),
    ),
    "safe above what is undecided": Plant(
        "replicas read at what is closed, whatever is undecided",
        _safe_above_undecided,
        ("I14",),
        Seeds(CLIENTS, 8),
    ),
    "outbox lost": Plant(
        "the anchor's decision is not posted to the others",
        _outbox_lost,
        ("I19",),
        directed=Directed(directed_txn.a_decision_reaches_everybody),
    ),
    "outbox dropped early": Plant(
        "an outbox row goes when its message is sent, not when that is acknowledged",
        _core("outbox_dropped_early"),
        ("I19",),
        directed=Directed(directed_txn.a_decision_reaches_everybody),
    ),
    "hint leaves no status": Plant(
        "a part that a hint resolved is forgotten before the anchor's record is terminal",
        _status_forgotten(hinted_only=True),
        ("I1",),
        directed=Directed(directed_txn.a_hint_is_remembered_for_recovery),
        model=("recovery_of_dropped_status",),
    ),
    "resolved part leaves no status": Plant(
        "a part is forgotten as soon as it is resolved",
        _status_forgotten(hinted_only=False),
        ("I1",),
        Seeds(CLIENTS, 8),
        Directed(directed_txn.a_hint_is_remembered_for_readers),
        model=("forget",),
    ),
    "guards not validated": Plant(
        "what a transaction read is protected, and not compared with what is there",
        _core("guards_not_validated"),
        ("I11",),
        Seeds(CALM, 6),
        model=("no_guards",),
    ),
    "guards not held": Plant(
        "what a transaction read is compared, and not protected until it ends",
        _core("guards_not_held"),
        ("each of two did not see the other",),
        directed=Directed(directed_txn.what_was_read_stays),
        model=("no_guards",),
    ),
    "guards until prepared": Plant(
        "what a transaction read is protected until its part is prepared only",
        _core("guards_until_prepared"),
        ("each of two did not see the other",),
        directed=Directed(directed_txn.what_was_read_stays),
        model=("no_cmax",),
    ),
    "guards without gaps": Plant(
        "a span that was read is guarded where rows were found, and not between them",
        _guards_without_gaps,
        ("two found a span empty, and both wrote",),
        directed=Directed(directed_txn.nothing_appears_where_nothing_was),
    ),
    "committed before validated": Plant(
        "what was read in other ranges is never asked about",
        _core("committed_before_validated"),
        ("FG2",),
        Seeds(CALM, 6),
        model=("no_validate_bump",),
    ),
    "validation passes latches": Plant(
        "a range says that nothing has changed, though a writer's entry is in flight",
        _core("validation_passes_latches"),
        ("I11",),
        Seeds(CALM, 15),
    ),
    "validation passes intents": Plant(
        "a range says that nothing has changed, though a write is undecided",
        _core("validation_passes_intents"),
        ("I11",),
        Seeds(CALM, 15),
    ),
    "reads pass latches": Plant(
        "readers do not wait for writers that were there before",
        _core("reads_pass_latches"),
        ("I11", "I12"),
        Seeds(CALM, 5),
    ),
    "reads pass intents": Plant(
        "readers do not ask about undecided writes",
        _core("reads_pass_intents"),
        ("I11",),
        Seeds(CALM, 5),
    ),
    "volatile fence": Plant(
        "FENCED is told to whoever recovers, and not written down",
        _core("volatile_fence"),
        ("I6",),
        Seeds(CLIENTS, 10),
        model=("volatile_fence",),
    ),
    "abort without fence": Plant(
        "the anchor's timer aborts, instead of asking",
        _core("abort_without_fence"),
        ("I3",),
        Seeds(CLIENTS, 6),
        model=("abort_without_fence",),
    ),
    "evaluated twice": Plant(
        "neither evaluation nor apply looks for what stands already",
        _core("evaluated_twice"),
        ("I1",),
        Seeds(CLIENTS, 6),
    ),
    "versions forgotten": Plant(
        "a commit of one range that is sent again does not find what it wrote: it is applied twice",
        _core("versions_forgotten"),
        ("I5",),
        Seeds(CALM, 12),
    ),
    "decided with min": Plant(
        "recovery commits at the smallest timestamp of the parts",
        _core("decided_with_min"),
        ("I4", "I6"),
        Seeds(CLIENTS, 6),
    ),
    "any prepared is committed": Plant(
        "a reader is told COMMITTED as soon as one part is prepared",
        _core("any_prepared_is_committed"),
        ("I4", "I6"),
        Seeds(CALM, 6),
    ),
    "invisible while latched": Plant(
        "readers are told that a part is absent, though its entry is in flight",
        _core("invisible_while_latched"),
        ("I11", "I12"),
        Seeds(CALM, 6),
    ),
    "result not recalled": Plant(
        "a run does not look for what an earlier one with its idempotency key has left",
        _result_not_recalled,
        ("Doubled-effect",),
        Seeds(RETRIES, 4),
    ),
}
