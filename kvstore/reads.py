"""Reading at one timestamp across ranges: many keys, or a span page by page.

A `View` is the timestamp: 0 until the first read. One that is alone and of one range is sent with `at` 0 and learns it from
the answer; reads that are begun meanwhile wait for that one. Several that are awaited together, or of several ranges, ask
the oracle first and then go side by side, which takes less time. Everything read through one view is one snapshot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from typing import Final, NamedTuple, Protocol

from kvstore.bell import Bell
from kvstore.errors import EpochMismatch, InvalidArgument
from kvstore.holds import HOLD_AFTER_S
from kvstore.links import Call
from kvstore.open_views import OpenViews
from kvstore.ranges import Piece
from kvstore.router import Router
from txn.messages import READ_KEYS_MAX, Read, ReadReply, Reply, Scan, ScanReply
from txn.types import point_end

_FIRST_KEY: Final = b"\x00"  # of no meaning: some key
PAGE_ROWS_FIRST: Final = 128
PAGE_ROWS_MAX: Final = 2_048
PAGE_BYTES_MAX: Final = 1 << 20


class Entry(NamedTuple):
    """A key with its value, and the version (the commit timestamp) that wrote it."""

    key: bytes
    value: bytes
    version: int


class Found(NamedTuple):
    """`value` None: there is no such key (a version may say when it was deleted)."""

    value: bytes | None
    version: int


class Page(NamedTuple):
    """Rows of [start, end), in the scan's order: all that there are in it."""

    rows: list[tuple[bytes, bytes]]
    start: bytes
    end: bytes
    last: bool  # nothing of the span is left


class Pages(Protocol):
    async def next(self) -> Page: ...


class View:
    """A snapshot of the store. `at` 0: as of the first read.

    Args: timeout_s: of each read. checked: `at` is known to have been issued; else that is checked with the oracle.
    deadline: no read goes on beyond it.
    """

    __slots__ = (
        "_checked",
        "_first",
        "_given",
        "_joined",
        "at",
        "deadline",
        "opened_at",
        "rests_on",
        "router",
        "timeout_s",
        "used_at",
        "views",
    )

    def __init__(
        self, router: Router, timeout_s: float, *, at: int = 0, deadline: float = float("inf")
    ) -> None:
        self.at = at
        self.timeout_s = timeout_s
        self.deadline = deadline
        self.router = router
        self.opened_at = self.used_at = router.monotonic()
        self.views: OpenViews | None = None  # where it is to be noted when it lasts
        self.rests_on = 0  # what else its transaction needs, and is to be held (0: nothing)
        self._checked = at == 0
        self._first: Bell[None] | None = None  # of the read that finds out `at`
        self._joined = False  # others wait for that one
        self._given: dict[bytes, Found] = {}

    def begin_with(self, key: bytes, reply: ReadReply) -> None:
        """The view is to be as of this answer, which was given at a fresh timestamp; nothing was read before."""
        assert not self.at, "the view has begun"
        self.at = reply.at
        self._given[key] = Found(reply.values[0], reply.versions[0])

    def rest_on(self, ts: int) -> None:
        """Its transaction began at `ts`, or will have what it read then validated: to be held as well."""
        self.rests_on = min(self.rests_on or ts, ts)

    @property
    def oldest(self) -> int:
        """From where on versions are to be held for it; 0: it needs none yet."""
        return min(self.at or self.rests_on, self.rests_on or self.at)

    def until(self) -> float:
        """When a read that begins now has to be done."""
        now = self.used_at = self.router.monotonic()
        if self.views is not None and now > self.opened_at + HOLD_AFTER_S:
            self.views.add(self, kept=False)
        return min(self.deadline, now + self.timeout_s)

    async def version(self) -> int:
        """The timestamp; taken from the oracle if nothing has been read yet."""
        until = self.until()
        while not self.at:
            if self._first is not None:
                await self._first.wait()
            else:
                chosen = await self._choose((_FIRST_KEY,), until)
                if not self.at and self._first is None:
                    self.at = chosen
        if not self._checked:
            await self._check(until)
        return self.at

    # --- many keys --------------------------------------------------------------------------------

    async def get(self, key: bytes) -> Found:
        """`read` of one key: the most frequent case."""
        until = self.until()
        if key in self._given:
            return self._given[key]
        if not self._checked:
            await self._check(until)
        if not self.at:
            first = (await self._begin([key], until)).get(key)
            if first is not None:
                return first
        while True:
            call = self._ask([key], until)
            try:
                reply = await self._answer(call)
            except EpochMismatch:
                continue
            assert isinstance(reply, ReadReply)
            if reply.values:
                return Found(reply.values[0], reply.versions[0])

    async def read(self, keys: Iterable[bytes]) -> dict[bytes, Found]:
        """What each key has at this view's timestamp; absent ones included."""
        until = self.until()
        left = list(dict.fromkeys(keys))
        found: dict[bytes, Found] = {}
        if self._given:
            found = {key: self._given[key] for key in left if key in self._given}
            left = [key for key in left if key not in found]
        if not left:
            return found
        if not self._checked:
            await self._check(until)
        if not self.at:
            found.update(await self._begin(left, until))
            left = [key for key in left if key not in found]
        while left:
            if len(left) == 1:
                left = await self._collect([(self._ask(left, until), left)], found)
                continue
            groups = await self._groups(left, until)
            left = await self._collect(
                [(self._ask(group, until), group) for group in groups], found
            )
        return found

    async def _begin(self, keys: list[bytes], until: float) -> dict[bytes, Found]:
        """Find out `at`, as of now. Returns what has been read on the way: all, some or nothing of `keys`."""
        found: dict[bytes, Found] = {}
        while not self.at:
            if self._first is not None:
                self._joined = True
                await self._first.wait()
                continue
            self._first = Bell(asyncio.get_running_loop())
            self._joined = False
            try:
                alone = await self._in_one_range(keys, until)
                await asyncio.sleep(0)  # whoever is awaited together with this one joins now
                if self._joined or not alone:
                    self.at = await self._choose(keys, until)
                else:
                    await self._collect([(self._ask(keys, until), keys)], found)
            finally:
                self._first.ring(None)
                self._first = None
        return found

    async def _in_one_range(self, keys: list[bytes], until: float) -> bool:
        """Whether one request is enough for them. They are in known ranges then."""
        if len(keys) == 1 and self.router.ranges.find(keys[0]) is not None:
            return True
        return len(await self._groups(keys, until)) == 1

    async def _groups(self, keys: Sequence[bytes], until: float) -> list[list[bytes]]:
        """The keys by range, in bounded groups."""
        while True:
            groups: dict[int, list[list[bytes]]] = {}
            for key in keys:
                route = self.router.ranges.find(key)
                if route is None:
                    break
                of_range = groups.setdefault(route.range_id, [[]])
                if len(of_range[-1]) >= READ_KEYS_MAX:
                    of_range.append([])
                of_range[-1].append(key)
            else:
                return [group for of_range in groups.values() for group in of_range]
            await self.router.find_out(until)

    def _ask(self, keys: list[bytes], until: float) -> Call:
        request = Read(0, 0, 0, self.at, keys)
        if len(keys) == 1:
            return self._send(request, keys[0], b"", until)
        return self._send(request, min(keys), point_end(max(keys)), until)

    async def _choose(self, keys: Sequence[bytes], until: float) -> int:  # noqa: ARG002 - others look at them
        """The timestamp, before anything is read: the last one issued."""
        return (await self.router.timestamps(until)).read_ts

    def _send(self, request: Read | Scan, key: bytes, end: bytes, until: float) -> Call:
        return self.router.send(request, key, end, until, size_bytes=keys_bytes(request))

    def _answer(self, call: Call) -> Awaitable[Reply]:
        return self.router.answer(call)

    async def _collect(
        self, asked: list[tuple[Call, list[bytes]]], found: dict[bytes, Found]
    ) -> list[bytes]:
        """Await the answers. Returns the keys that have to be asked for again."""
        again: list[bytes] = []
        try:
            for call, keys in asked:
                try:
                    reply = await self._answer(call)
                except EpochMismatch:
                    again.extend(keys)
                    continue
                assert isinstance(reply, ReadReply)
                self.at = self.at or reply.at
                for key, value, version in zip(keys, reply.values, reply.versions, strict=False):
                    found[key] = Found(value, version)
                again.extend(keys[len(reply.values) :])
        finally:
            for call, _keys in asked:
                self.router.forget(call)
        return again

    async def _check(self, until: float) -> None:
        if self.at > self.router.seen_ts:
            issued = (await self.router.timestamps(until)).read_ts
            if self.at > issued:
                raise InvalidArgument(
                    f"version {self.at} has not been issued yet: {issued} is the last"
                )
        self._checked = True

    # --- spans ------------------------------------------------------------------------------------

    def pages(
        self, start: bytes, end: bytes, *, reverse: bool, keys_only: bool, rows_max: int = 0
    ) -> SpanPages:
        """The rows of [start, end), page by page; `rows_max`: no more are wanted (0: all)."""
        return SpanPages(self, start, end, reverse, keys_only, rows_max)

    async def scan_once(self, request: Scan, piece: Piece, until: float) -> ScanReply:
        """One page from one range. Raises EpochMismatch when the piece must be cut anew."""
        if not self._checked:
            await self._check(until)
        while not self.at and self._first is not None:
            self._joined = True
            await self._first.wait()
        if self.at:
            return await self._scan(request, piece, until)
        self._first = Bell(asyncio.get_running_loop())
        try:
            return await self._scan(request, piece, until)
        finally:
            self._first.ring(None)
            self._first = None

    async def _scan(self, request: Scan, piece: Piece, until: float) -> ScanReply:
        asked = Scan(
            0, 0, 0, self.at, piece.start, piece.end, request.rows_max, request.bytes_max,
            request.reverse, request.keys_only,
        )  # fmt: skip
        reply = await self._answer(self._send(asked, piece.start, piece.end, until))
        assert isinstance(reply, ScanReply)
        self.at = self.at or reply.at
        return reply

    async def piece(self, start: bytes, end: bytes, reverse: bool, until: float) -> Piece:
        """The first (or last) part of [start, end) that lies in one range."""
        while True:
            piece = self._edge(start, end, reverse)
            if piece is not None:
                return piece
            await self.router.find_out(until)

    def _edge(self, start: bytes, end: bytes, reverse: bool) -> Piece | None:
        ranges = self.router.ranges
        if not reverse:
            route = ranges.find(start)
            if route is None:
                return None
            return Piece(start, min(end, route.end) if route.end else end, route)
        route = ranges.before(end)
        if route is None:
            return None
        return Piece(max(start, route.start), end, route)


def keys_bytes(request: Read | Scan) -> int:
    """Of the keys that it names, but for those of its span."""
    return sum(map(len, request.keys)) if isinstance(request, Read) else 0


class SpanPages:
    """A scan in progress. `next` may be called until it says `last`."""

    __slots__ = ("_end", "_keys_only", "_left", "_page_rows", "_reverse", "_start", "_view")

    def __init__(
        self, view: View, start: bytes, end: bytes, reverse: bool, keys_only: bool, rows_max: int
    ) -> None:
        self._view = view
        self._start = start
        self._end = end
        self._reverse = bool(reverse)  # nodes take no number for it
        self._keys_only = bool(keys_only)
        self._left = rows_max
        self._page_rows = PAGE_ROWS_FIRST

    @property
    def at(self) -> int:
        """The version that is read at; 0 before the first page."""
        return self._view.at

    def want(self, rows_max: int) -> None:
        """No more than this many rows are wanted from here on (0: all)."""
        self._left = rows_max

    def at_once(self, rows: int) -> None:
        """So many rows, if a message holds them, with the first page already."""
        self._page_rows = rows

    async def next(self) -> Page:
        view = self._view
        if self._start >= self._end:
            return Page([], self._start, self._end, True)
        until = view.until()
        rows = min(self._page_rows, self._left) if self._left else self._page_rows
        while True:
            piece = await view.piece(self._start, self._end, self._reverse, until)
            request = Scan(
                0, 0, 0, 0, b"", b"", rows, PAGE_BYTES_MAX, self._reverse, self._keys_only
            )
            try:
                reply = await view.scan_once(request, piece, until)
                break
            except EpochMismatch:
                continue
        self._page_rows = min(PAGE_ROWS_MAX, self._page_rows * 4)
        if self._left:  # at least 1: 0 means all, and who has enough asks no more
            self._left = max(1, self._left - len(reply.keys))
        return self._page(piece, reply)

    def _page(self, piece: Piece, reply: ScanReply) -> Page:
        keys = reply.keys
        values = reply.values if not self._keys_only else [b""] * len(keys)
        rows = list(zip(keys, values, strict=True))
        start, end = piece.start, piece.end
        if not reply.done:  # how far it came: to `covered_to`, and at least to the last key
            assert keys or reply.covered_to, "a page must come further"
            if self._reverse:
                start = min(reply.covered_to or keys[-1], keys[-1] if keys else end)
            else:
                end = max(reply.covered_to, point_end(keys[-1]) if keys else b"")
        if self._reverse:
            page_start, page_end = start, self._end
            self._end = start
        else:
            page_start, page_end = self._start, end
            self._start = end
        return Page(rows, page_start, page_end, self._start >= self._end)
