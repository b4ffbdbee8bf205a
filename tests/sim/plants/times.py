"""Bugs of timestamps: not fresh, not issued, or handed out by an oracle that may not.

One rule replaces several of earlier drafts: every part's timestamp is asked for after its latches were taken. So there are as
many ways to break it as there were rules: whoever is exempted from it takes a timestamp that was kept in stock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from kvstore.oracle_client import OracleClient
from tests.sim import directed_leaders
from tests.sim.plants.base import CALM, ELECTIONS, TOO_LOW, Directed, Patches, Plant, Seeds
from txn.commands import Command
from txn.evaluate import Evaluator
from txn.latches import Pending
from txn.messages import Prepare
from txn.mvcc import latest_ts
from txn.oracle import Oracle
from txn.reads import Reader
from txn.types import FenceReason

STOCK_MAX: Final = 4
Meant = Callable[[Any, Pending], bool]


class _Spare(Pending):
    """Nobody's: its timestamp goes into the stock."""

    def __init__(self) -> None:
        super().__init__(b"", None, None)


def stocked(meant: Meant, *extra: tuple[Any, str, Any], former: bool = False) -> Patches:
    """Commands that are `meant` take a timestamp that was fetched earlier in their leader's term. former: in the last term
    instead in which this node led, and in no other."""
    give, step, command_of = Evaluator.give_timestamps, Evaluator.step, Evaluator._command

    def stock_of(self: Any) -> deque[int]:
        found: deque[int] = vars(self).setdefault("stock", deque())
        return found

    def left_to(self: Any) -> deque[int]:
        """What this node's last leader of the range had in stock when its term was over."""
        last: Any
        left: deque[int]
        last, left = vars(self.state).get("last_leader", (None, deque()))
        if last is not self:
            left = deque() if last is None else stock_of(last)
            vars(self.state)["last_leader"] = self, left
        return left

    def fill(self: Any) -> None:
        asked = sum(isinstance(each, _Spare) for each in self.await_fresh)
        for _ in range(STOCK_MAX - len(stock_of(self)) - asked):
            self.await_fresh.append(_Spare())

    def filling(self: Any, request: Any, origin: Any, now: float) -> None:
        if self.ready and type(request) is Prepare:
            fill(self)
        step(self, request, origin, now)

    def giving(
        self: Any, pendings: Sequence[Pending], first: int, readers: Any, read_ts: int, now: float
    ) -> None:
        for number, pending in enumerate(pendings):
            if isinstance(pending, _Spare):
                stock_of(self).append(first + number)
        give(self, pendings, first, readers, read_ts, now)

    def command(self: Any, pending: Pending, ts: int) -> Command:
        stock = left_to(self) if former else stock_of(self)
        if stock and meant(self, pending):
            ts = stock.popleft()
        return command_of(self, pending, ts)

    return [
        (Evaluator, "step", filling),
        (Evaluator, "give_timestamps", giving),
        (Evaluator, "_command", command),
        *extra,
    ]


def _remembered(self: Any, name: str) -> dict[bytes, None]:
    found: dict[bytes, None] = vars(self).setdefault(name, {})
    return found


def _any_part() -> Patches:
    return stocked(lambda _evaluator, _pending: True)


def _one_range() -> Patches:
    return stocked(lambda _evaluator, pending: pending.request.one_range)


def _several_ranges() -> Patches:
    return stocked(lambda _evaluator, pending: not pending.request.one_range)


def _former_leader() -> Patches:
    """A leader's first commands use what was fetched when this node led before."""
    return stocked(lambda _evaluator, _pending: True, former=True)


def _who_waited() -> Patches:
    """Who waited for another transaction uses a timestamp from before."""
    again = Evaluator._again

    def noting(self: Any, waiter: Any, now: float) -> None:
        if type(waiter.request) is Prepare:
            _remembered(self, "waited")[waiter.request.txn_id] = None
        again(self, waiter, now)

    return stocked(
        lambda evaluator, pending: pending.txn_id in _remembered(evaluator, "waited"),
        (Evaluator, "_again", noting),
    )


def _after_a_read() -> Patches:
    """Who overwrites a key that was read uses a timestamp from before."""
    look_up = Reader._look_up

    def noting(self: Any, waiter: Any, request: Any) -> Any:
        reply = look_up(self, waiter, request)
        if reply is not None:
            _remembered(self.owner, "read").update(dict.fromkeys(request.keys))
        return reply

    return stocked(
        lambda evaluator, pending: any(k in _remembered(evaluator, "read") for k in pending.keys),
        (Reader, "_look_up", noting),
    )


def _after_a_failed_condition() -> Patches:
    """Who overwrites a key whose version was shown by a failed condition uses a timestamp from before."""
    refuse = Evaluator.refuse

    def noting(self: Any, request: Any, origin: Any, refusal: Any) -> None:
        if refusal.reason == FenceReason.COMPARE_FAILED:
            _remembered(self, "shown")[refusal.key] = None
        refuse(self, request, origin, refusal)

    return stocked(
        lambda evaluator, pending: any(k in _remembered(evaluator, "shown") for k in pending.keys),
        (Evaluator, "refuse", noting),
    )


def _after_a_guard() -> Patches:
    """Who writes into a span that a transaction validated and only read here uses a timestamp from before."""

    def meant(evaluator: Any, pending: Pending) -> bool:
        spans = vars(evaluator).setdefault("guarded", [])
        hit = any(start <= key < end for key in pending.keys for start, end in spans)
        if not pending.keys:
            spans += [(guard.start, guard.end) for guard in pending.guards]
        return hit

    return stocked(meant)


def _joins_a_sent_batch() -> Patches:
    """Who latches while the oracle is asked takes what that answer brings, as if it had been asked for him."""
    ask, give = OracleClient._ask, Evaluator.give_timestamps

    def asking(self: Any, now: float) -> None:
        for replica in self._wanting.values():
            if replica.evaluator is not None and replica.evaluator.await_fresh:
                replica.evaluator.await_fresh += [_Spare() for _ in range(STOCK_MAX)]
        ask(self, now)

    def giving(
        self: Any, pendings: Sequence[Pending], first: int, readers: Any, read_ts: int, now: float
    ) -> None:
        late = [each for each in self.await_fresh if not isinstance(each, _Spare)]
        self.await_fresh = []
        joined = [late.pop(0) if isinstance(each, _Spare) and late else each for each in pendings]
        self.await_fresh = late
        give(self, joined, first, readers, read_ts, now)

    return [(OracleClient, "_ask", asking), (Evaluator, "give_timestamps", giving)]


def _invented() -> Patches:
    """A timestamp is made up, above what the keys have."""
    command_of = Evaluator._command

    def command(self: Evaluator, pending: Pending, _ts: int) -> Command:
        rows = [self.rows.get(b"L" + key) for key in pending.keys]
        above = max((latest_ts(row) for row in rows if row is not None), default=1)
        begin = int.from_bytes(pending.txn_id[:8], "big")
        return command_of(self, pending, max(above, begin) + 1)

    return [(Evaluator, "_command", command)]


def _old_read_timestamps() -> Patches:
    """Readers get the timestamp that was the newest when the last ones asked."""
    give = Evaluator.give_timestamps

    def giving(
        self: Evaluator, pendings: Any, first: int, readers: Any, read_ts: int, now: float
    ) -> None:
        known = vars(self).get("newest", read_ts)
        vars(self)["newest"] = read_ts
        give(self, pendings, first, readers, known, now)

    return [(Evaluator, "give_timestamps", giving)]


def _oracle_serves_at_once() -> Patches:
    start_term = Oracle.start_term

    def start(self: Oracle, now: float) -> None:
        start_term(self, now)
        self._serving, self.hi = True, self.hi + (1 << 40)

    return [(Oracle, "start_term", start), (Oracle, "bound_applied", lambda _self, _hi: None)]


def _oracle_starts_low() -> Patches:
    start_term = Oracle.start_term

    def start(self: Oracle, now: float) -> None:
        start_term(self, now)
        self.last = self._base = self.hi - self._window

    return [(Oracle, "start_term", start)]


TIMES: Final[dict[str, Plant]] = {
    "oracle serves at once": Plant(
        "a new oracle goes on from the old bound, without one of its own",
        _oracle_serves_at_once,
        ("I9",),
        Seeds(ELECTIONS, 4),
    ),
    "oracle starts low": Plant(
        "a new oracle begins below the bound of the one before it",
        _oracle_starts_low,
        ("I9",),
        Seeds(ELECTIONS, 4),
    ),
    "stocked for all": Plant(
        "parts take timestamps that were fetched before they latched",
        _any_part,
        TOO_LOW,
        Seeds(CALM, 5),
        model=("no_read_watermark",),
    ),
    "stocked after a read": Plant(
        "so does who overwrites what was read",
        _after_a_read,
        TOO_LOW,
        Seeds(CALM, 20),
        model=("no_read_bump",),
    ),
    "stocked for one range": Plant(
        "so do commits of one range",
        _one_range,
        TOO_LOW,
        Seeds(CALM, 20),
        model=("one_entry_commit_no_bump",),
    ),
    "stocked for several ranges": Plant(
        "so do parts of larger transactions, though a reader was promised that they come later",
        _several_ranges,
        TOO_LOW,
        Seeds(CALM, 20),
        model=("no_barrier",),
    ),
    "stocked by a former leader": Plant(
        "so do a leader's first commands, from an earlier term in which its node led",
        _former_leader,
        TOO_LOW,
        Seeds(ELECTIONS, 40),
        Directed(directed_leaders.a_term_uses_no_timestamps_of_another),
        model=("no_floor",),
    ),
    "stocked after waiting": Plant(
        "so does who waited for another transaction's end",
        _who_waited,
        TOO_LOW,
        Seeds(CALM, 40),
        model=("waiter_below_commit",),
    ),
    "stocked after a failed condition": Plant(
        "so does who overwrites what a failed condition has shown",
        _after_a_failed_condition,
        TOO_LOW,
        Seeds(CALM, 40),
        model=("failed_condition_without_ts",),
    ),
    "stocked after a guard": Plant(
        "so does who writes into what a transaction read and validated here",
        _after_a_guard,
        TOO_LOW,
        Seeds(CALM, 40),
        model=("no_validate_bump",),
    ),
    "joins a sent batch": Plant(
        "a part takes a timestamp that was asked for before it latched, by others of its range",
        _joins_a_sent_batch,
        TOO_LOW,
        Seeds(CALM, 12),
        model=("barrier_passed_by_fetch",),
    ),
    "timestamps are invented": Plant(
        "a part's timestamp is one above what its keys have, and nobody issued it",
        _invented,
        ("I7",),
        Seeds(CALM, 5),
        model=("invent_ts",),
    ),
    "old read timestamps": Plant(
        "readers get the timestamp that the readers before them had asked for",
        _old_read_timestamps,
        ("Serializability",),
        Seeds(CALM, 10),
        model=("stale_tso",),
    ),
}
