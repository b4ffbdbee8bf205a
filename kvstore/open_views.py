"""What a client has open, for the oracle to hold (kvstore/holds.py has the policy).

A transaction or a snapshot counts from `async with` to its end. A snapshot or a scan that is used without it counts once it is
read from HOLD_AFTER_S after it began, and until IDLE_S after its last read. One timer for all, while there is anything.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from kvstore.errors import KVError
from kvstore.holds import HOLD_AFTER_S, RENEW_S
from kvstore.links import Answer
from kvstore.ranges import META_KEY
from txn.messages import GetTimestamps

if TYPE_CHECKING:
    from kvstore.reads import View
    from kvstore.router import Router

IDLE_S: Final = 300.0
VIEWS_MAX: Final = 10_000  # what is opened beyond it is not held


class OpenViews:
    """One for each client. Args: session: its number at the oracle, not 0."""

    def __init__(self, router: Router, session: int) -> None:
        self.session = session
        self._router = router
        self._views: dict[int, tuple[View, bool]] = {}  # by id; kept until it is removed
        self._held = self._closed = False
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._views)

    def add(self, view: View, *, kept: bool) -> None:
        """kept: until `remove`; else while it is used."""
        noted = self._views.get(id(view))
        if noted is not None:
            self._views[id(view)] = view, kept or noted[1]
        elif len(self._views) < VIEWS_MAX and not self._closed:
            self._views[id(view)] = view, kept
            if self._timer is None:
                self._arm(HOLD_AFTER_S)

    def remove(self, view: View) -> None:
        self._views.pop(id(view), None)

    def close(self) -> None:
        self._closed = True
        self._views.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, delay_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._tick)

    def _tick(self) -> None:
        now = self._router.monotonic()
        idle = [
            number
            for number, (view, kept) in self._views.items()
            if not kept and now > view.used_at + IDLE_S
        ]
        for number in idle:
            del self._views[number]
        ages = [
            view.oldest
            for view, _ in self._views.values()
            if view.oldest and view.opened_at + HOLD_AFTER_S <= now
        ]
        oldest = min(ages, default=0)
        if oldest or self._held:
            self._held = bool(oldest)
            self._tell(oldest, now)
        self._timer = None
        if self._views or self._held:
            self._arm(RENEW_S if self._held else HOLD_AFTER_S)

    def _tell(self, oldest: int, now: float) -> None:
        def heard(_answer: Answer) -> None:
            """If it failed: the next one comes soon, and the lease lasts longer than that."""

        request = GetTimestamps(0, 0, self.session, oldest)
        try:
            self._router.send(request, META_KEY, b"", now + RENEW_S, on_reply=heard)
        except KVError:
            pass
