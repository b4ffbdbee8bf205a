"""Watches: every version written to a key or a prefix, in the order of commit, from a version on.

A watch is cut into legs, one for each range that it covers. Each leg has at most one poll under way, which waits at the range's
leader while there is nothing to tell, and at most one page that has not been handed out. An answer is complete up to a
version of its own; what all legs are complete up to, and no more, is handed out, merged by version. When one leg has
events beyond that, the others are asked about everything up to there, and answer at once.

There is no task and no timer: polls leave when the consumer waits, or goes on. A consumer that is slow has no more in
memory than a page of each leg; what it has not asked for stays in the store, until it is collected (`Compacted`).

V1 what is handed out is every version of the span above `version` as it was at the start, each once, in the order of commit.
V2 `version` is the place to go on from: all at or below it has been handed out, nothing above it.
V3 a poll that is given up leaves nothing at the leader: the next one of its leg, or a last word, takes its place.
"""

from __future__ import annotations

import asyncio
import enum
import functools
import random
import weakref
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Final, NamedTuple, Self

from kvstore import limits
from kvstore.errors import (
    ClientClosed,
    EpochMismatch,
    InvalidArgument,
    KVError,
    Throttled,
)
from kvstore.links import Answer, Call
from kvstore.ranges import Piece
from kvstore.router import Router
from replication.probes import reached
from txn.messages import Changed, Changes
from txn.types import TIMESTAMP_MAX, point_end

WATCHES_MAX: Final = 1_000  # open ones of one client
LEGS_MAX: Final = 128  # ranges that one watch covers
PAGE_ROWS: Final = 1_000
PAGE_BYTES: Final = 256 << 10  # more only if one commit has more
WAIT_S: Final = 10.0  # of a poll, for something to happen
MARGIN_S: Final = 5.0  # of a poll besides, to be answered; with a timeout, what is left of that
PAUSE_S: Final = 0.05  # after a poll that came to nothing
FAREWELL_S: Final = 1.0


class EventType(enum.StrEnum):
    PUT = "put"
    DELETE = "delete"


class Event(NamedTuple):
    """One version of one key. All events of one commit have its version, and follow each other."""

    type: EventType
    key: bytes
    value: bytes | None  # None: deleted
    version: int


class Leg:
    """The part of a watch that lies in one range."""

    __slots__ = ("at", "call", "end", "events", "name", "not_before", "start", "upto")

    def __init__(self, start: bytes, end: bytes, upto: int, name: int) -> None:
        self.start, self.end = start, end
        self.upto = upto  # complete up to here, with `events`
        self.name = name  # towards the leader
        self.events: deque[Event] = deque()  # not handed out yet
        self.call: Call | None = None
        self.at = 0  # of the poll under way
        self.not_before = float("-inf")


class Watches:
    """What all watches of one client share."""

    def __init__(self, router: Callable[[], Router], rng: random.Random, timeout_s: float) -> None:
        self._router, self._rng, self._timeout_s = router, rng, timeout_s
        self._open: weakref.WeakKeyDictionary[Watch, None] = weakref.WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._open)

    def open(
        self,
        key: bytes | None,
        prefix: bytes | None,
        since: int | None,
        timeout_s: float | None,
    ) -> Watch:
        """Raises: InvalidArgument, KeyTooLarge; Throttled: WATCHES_MAX are open."""
        router = self._router()
        start, end = span_of(key, prefix)
        if since is not None and (type(since) is not int or not 0 <= since < TIMESTAMP_MAX):
            raise InvalidArgument("since is a version: a number of at most 64 bits")
        if len(self._open) >= WATCHES_MAX:
            raise Throttled(
                1.0, f"{WATCHES_MAX} watches of this client are open: close some, or watch a prefix"
            )
        watch = Watch(router, self._rng, start, end, since, self._timeout_s, timeout_s)
        self._open[watch] = None
        watch.on_close = lambda closed: self._open.pop(closed, None)
        return watch

    async def close(self) -> None:
        """End those that are still open: the client goes."""
        for reference in self._open.keyrefs():  # a copy, made at once: other threads open watches
            watch = reference()
            if watch is not None:
                await watch.close()


def span_of(key: bytes | None, prefix: bytes | None) -> tuple[bytes, bytes]:
    if (key is None) == (prefix is None):
        raise InvalidArgument("give a key or a prefix (b'' for everything)")
    if key is not None:
        limits.validate_key(key)
        return key, point_end(key)
    assert prefix is not None
    return limits.prefix_range(prefix)


class Watch:
    """`async for event in watch`, or `await watch.pull()`. One consumer at a time. Made by `Database.watch`.

    It begins at its first use, or on entering its block (`async with`). Leaving a loop early is harmless; `close` (or the end
    of the block) frees at once what it holds.
    """

    def __init__(
        self,
        router: Router,
        rng: random.Random,
        start: bytes,
        end: bytes,
        since: int | None,
        client_timeout_s: float,
        timeout_s: float | None,
    ) -> None:
        self.on_close: Callable[[Watch], None] = lambda _watch: None
        self._router, self._rng = router, rng
        self._start, self._end = start, end
        self._since = since
        self._client_timeout_s = client_timeout_s
        self._timeout_s = timeout_s
        self._wait_s = WAIT_S if timeout_s is None else min(WAIT_S, timeout_s / 2)
        self._version = since or 0
        self._frontier = 0  # what `version` is once `_ready` is handed out
        self._ready: deque[Event] = deque()
        self._legs: list[Leg] = []
        self._stale = False  # the legs do not fit the ranges any more
        self._failure: KVError | None = None
        self._news = asyncio.Event()
        self._rest: asyncio.TimerHandle | None = None  # until legs that rest are looked at again
        self._pulling = self._closed = False

    # --- what users call --------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Where to go on from (`since`): everything at or below it has been handed out. 0: it has not begun."""
        return self._version

    def move_on(self, every_s: float) -> None:
        """How often `version` moves on while nothing happens, if not every 10 s: for who does not iterate for so long."""
        self._wait_s = min(self._wait_s, every_s)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if not self._ready:
            await self.fill()
            self._ask()  # the next page comes while this one is worked on
        return self.next_ready()

    async def pull(self, rows_max: int = 0) -> list[Event]:
        """Wait for events; all that are there, at least one, whole commits (from about `rows_max` on, no more of them).

        Cancelling it loses nothing. Raises as iterating does.
        """
        if not self._ready:
            await self.fill(rows_max)
        return self.all_ready()

    async def start(self) -> None:
        """Begin, unless it has begun: what is committed from here on is an event. Raises: KVError; InvalidArgument: `since`
        was not issued yet."""
        if self._closed:
            raise ClientClosed("the watch is closed")
        if self._legs:
            return
        until = self._router.monotonic() + self._client_timeout_s
        since = self._since
        if since is None:
            since = (await self._router.timestamps(until)).read_ts
        elif since > self._router.seen_ts:
            issued = (await self._router.timestamps(until)).read_ts
            if since > issued:
                raise InvalidArgument(f"version {since} was not issued yet: {issued} is the last")
        pieces = await self._cut(self._start, self._end, until)
        if not self._legs:
            self._since = self._version = self._frontier = since
            self._legs = [self._leg(piece, since) for piece in pieces]

    async def close(self) -> None:
        """End it: nothing of it is left waiting anywhere. May be called again."""
        if self._closed:
            return
        self._closed = True
        self.on_close(self)
        for leg in self._legs:
            self._leave(leg)
        self._news.set()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    # --- handing out ------------------------------------------------------------------------------

    async def fill(self, rows_max: int = 0) -> None:
        """Wait until there is something for `next_ready`."""
        if self._pulling:
            raise InvalidArgument("a watch has one consumer at a time")
        self._pulling = True
        try:
            await self.start()
            self._news.clear()
            while not self._take(rows_max):
                if self._closed:
                    raise ClientClosed("the watch is closed")
                if self._failure is not None:
                    raise self._failure
                if self._stale:
                    await self._recut()
                self._ask()
                await self._news.wait()
                self._news.clear()  # before anything is looked at: what comes later sets it again
        finally:
            self._pulling = False

    def next_ready(self) -> Event:
        """After `fill`."""
        event = self._ready.popleft()
        if not self._ready:
            self._version = self._frontier
        elif self._ready[0].version != event.version:
            self._version = event.version
        return event

    def all_ready(self) -> list[Event]:
        """After `fill`."""
        events = list(self._ready)
        self._ready.clear()
        self._version = self._frontier
        return events

    @property
    def has_ready(self) -> bool:
        return bool(self._ready)

    def _take(self, rows_max: int) -> bool:
        """Move whole commits that every leg is complete up to into `_ready`. Whether there were any."""
        complete = min(leg.upto for leg in self._legs)
        while True:
            version = min((leg.events[0].version for leg in self._legs if leg.events), default=0)
            if not version or version > complete:
                self._frontier = max(self._frontier, complete)
                break
            for leg in self._legs:
                while leg.events and leg.events[0].version == version:
                    self._ready.append(leg.events.popleft())
            self._frontier = version
            if rows_max and len(self._ready) >= rows_max:
                break
        if not self._ready:
            self._version = self._frontier
        return bool(self._ready)

    # --- asking -----------------------------------------------------------------------------------

    def _ask(self) -> None:
        """Send the polls that are wanted; a leg that has to rest is asked when that is over."""
        if self._closed or self._failure is not None:
            return
        if self._stale:  # its ranges could not be learned just now, or are others again
            self._rest_for(PAUSE_S)
            return
        router = self._router
        now = router.monotonic()
        target = max((leg.upto for leg in self._legs if leg.events), default=0)
        for leg in self._legs:
            if leg.events:
                continue
            at = target if leg.upto < target else 0
            if leg.call is not None:
                if not at or leg.at:
                    continue
                router.forget(
                    leg.call
                )  # it waits for what may never happen: asked anew, by the same name
                leg.call = None
            if now >= leg.not_before:
                self._poll(leg, at, now)
            if leg.call is None:
                self._rest_for(max(0.0, leg.not_before - now) + PAUSE_S / 10)

    def _rest_for(self, rest_s: float) -> None:
        """Wake the consumer after so long, unless something else will."""
        if not self._news.is_set() and self._rest is None:
            self._rest = asyncio.get_running_loop().call_later(rest_s, self._rested)

    def _rested(self) -> None:
        """Whatever the clock says now: a timer may come a hair early, and there is no other."""
        self._rest = None
        self._news.set()

    def _poll(self, leg: Leg, at: int, now: float) -> None:
        router, wait_s = self._router, self._wait_s
        answered = functools.partial(self._answered, leg)
        deadline = now + (wait_s + MARGIN_S if self._timeout_s is None else self._timeout_s)
        try:
            call = router.open(leg.start, leg.end, now, deadline, answered)
        except Throttled:
            leg.not_before = now + PAUSE_S
            return
        call.patience_s = wait_s
        call.expires = min(deadline, call.expires + wait_s)
        leg.call, leg.at = call, at
        request = Changes(
            call.id, call.range_id, call.version, leg.upto, leg.start, leg.end, PAGE_ROWS, PAGE_BYTES, at,
            int(wait_s * 1000), leg.name,
        )  # fmt: skip
        router.submit(call, request, len(leg.start) + len(leg.end))

    def _answered(self, leg: Leg, answer: Answer) -> None:
        leg.call = None
        now = self._router.monotonic()
        self._news.set()
        if isinstance(answer, Changed):
            if answer.upto <= leg.upto:
                leg.not_before = now + PAUSE_S
                return
            leg.upto = answer.upto
            for version, key, value in zip(
                answer.versions, answer.keys, answer.values, strict=True
            ):
                kind = EventType.PUT if value is not None else EventType.DELETE
                leg.events.append(Event(kind, key, value, version))
            return
        assert isinstance(answer, KVError)
        if isinstance(answer, EpochMismatch):
            reached("watch_cut_anew")
            self._stale = True
            return
        leg.not_before = now + PAUSE_S
        mends = answer.retryable or isinstance(answer, TimeoutError)
        if not mends or self._timeout_s is not None or isinstance(answer, Throttled):
            self._failure = answer
        else:
            reached("watch_goes_on")

    def _leave(self, leg: Leg) -> None:
        """Nobody waits for this leg's poll any more; its leader is told so, if it may know of it."""
        call, leg.call = leg.call, None
        if call is None:
            return
        self._router.forget(call)
        if not call.sent:
            return
        last = Changes(0, 0, 0, TIMESTAMP_MAX, leg.start, leg.end, 1, 1, 0, 0, leg.name)
        deadline = self._router.monotonic() + FAREWELL_S
        try:
            self._router.send(last, leg.start, leg.end, deadline, silent=True)
        except KVError:
            reached("watch_left_without_a_word")  # its time is over soon, anyway

    # --- ranges -----------------------------------------------------------------------------------

    def _leg(self, piece: Piece, upto: int) -> Leg:
        return Leg(piece.start, piece.end, upto, self._rng.getrandbits(63) | 1)

    async def _cut(self, start: bytes, end: bytes, until: float) -> list[Piece]:
        while True:
            pieces = self._router.ranges.split(start, end)
            if pieces is not None:
                break
            await self._router.find_out(until)
        if not pieces:
            raise InvalidArgument("the prefix holds no key")
        if len(pieces) > LEGS_MAX:
            raise InvalidArgument(
                f"the watch covers {len(pieces)} ranges, at most {LEGS_MAX} are allowed: watch longer prefixes"
            )
        return pieces

    async def _recut(self) -> None:
        """Ranges were split: a leg for each piece, which goes on where the old one was. What mends is tried again later, unless
        the watch has a timeout of its own."""
        self._stale = False
        until = self._router.monotonic() + (self._timeout_s or self._client_timeout_s)
        for leg in list(self._legs):
            try:
                pieces = await self._cut(leg.start, leg.end, until)
            except KVError as error:
                self._stale = True
                mends = error.retryable or isinstance(error, TimeoutError)
                if not mends or self._timeout_s is not None:
                    raise
                return
            if len(pieces) == 1:
                continue
            self._leave(leg)
            legs = [self._leg(piece, leg.upto) for piece in pieces]
            for event in leg.events:
                next(each for each in legs if event.key < each.end).events.append(event)
            place = self._legs.index(leg)
            self._legs[place : place + 1] = legs


__all__ = ["Event", "EventType", "Watch", "Watches"]
