"""GET /v1/watch: one long poll of a watch. It answers as soon as there are events, or with none when the wait is over; each
answer's `version` is the next one's `since`, so nothing is missed between two, on whichever node they are asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from kvstore.adapters.http_load import Waits
from kvstore.adapters.http_wire import VERSION_MAX, Query
from kvstore.errors import KVError, Throttled

if TYPE_CHECKING:
    from kvstore.client import Database
    from kvstore.watches import Event, Watch

POLLS_MAX: Final = 256  # of one node's gateway
WAIT_S: Final = 10.0
WAIT_S_MAX: Final = 60.0
LOOK_S: Final = 1.0  # between two looks whether who asked is still there
EVENTS_MAX: Final = 10_000
EVENTS_DEFAULT: Final = 1_000


class WatchPolls:
    """Counts those under way. `waits`: cut it short, and they are answered with what there is."""

    def __init__(self) -> None:
        self.open = 0
        self.waits = Waits()

    async def answer(
        self, database: Database, raw_query: str, gone: Callable[[], bool] = lambda: False
    ) -> dict[str, Any]:
        """{"events", "version"}. Raises: Compacted (410), InvalidArgument, Throttled, KVError.

        gone: whether who asked has hung up: nobody tells us, and the place is wanted by others.
        """
        query = Query(raw_query, ("key", "prefix", "since", "limit", "wait"))
        limit = query.integer("limit", 1, EVENTS_MAX) or EVENTS_DEFAULT
        wait_s = query.seconds("wait", WAIT_S_MAX) or WAIT_S
        since = query.integer("since", 0, VERSION_MAX)
        watch = database.watch(
            key=query.bytes_of("key"), prefix=query.bytes_of("prefix"), since=since
        )
        watch.move_on(
            wait_s / 2
        )  # or an idle one would be told its own `since` until that is compacted
        if self.open >= POLLS_MAX:
            await watch.close()
            raise Throttled(1.0, f"{POLLS_MAX} watches wait at this node: ask another, or fewer")
        self.open += 1
        try:
            async with watch:
                events = [
                    {**event._asdict(), "version": str(event.version)}
                    for event in await self._pull(watch, limit, wait_s, gone)
                ]
                return {"events": events, "version": str(watch.version)}
        finally:
            self.open -= 1

    async def _pull(
        self, watch: Watch, limit: int, wait_s: float, gone: Callable[[], bool]
    ) -> list[Event]:
        """What there is within `wait_s`; nothing, if nothing came, whoever asked is gone, or the node stops."""
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s
        while (now := loop.time()) < until and not gone() and not self.waits.over:
            try:
                async with self.waits.within(min(until - now, LOOK_S)):
                    return await watch.pull(limit)
            except TimeoutError as error:
                if isinstance(error, KVError):
                    raise
        return []
