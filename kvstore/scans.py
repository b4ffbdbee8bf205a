"""Scans as users iterate them, and a transaction's writes laid over one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from kvstore import limits
from kvstore.buffer import ReadSpans, WriteBuffer, value_over
from kvstore.errors import InvalidArgument, SnapshotTooOld, TransactionTooOld
from kvstore.reads import PAGE_ROWS_MAX, Page, Pages, SpanPages
from txn.types import WriteKind, point_end

ScanFactory = Callable[[], Pages]


class RowScan:
    """An async iterable of (key, value), all at one version. Iterating again scans again.

    `async for key, value in scan`, or `await scan.to_list()`. Leaving the loop early costs nothing.
    Values are b"" with keys_only.
    """

    def __init__(self, begin: ScanFactory, limit: int | None) -> None:
        self._begin = begin
        self._limit = limit

    def __aiter__(self) -> AsyncIterator[tuple[bytes, bytes]]:
        return RowIterator(self._begin(), self._limit)

    async def to_list(self) -> list[tuple[bytes, bytes]]:
        """All rows at once."""
        rows: list[tuple[bytes, bytes]] = []
        walk = RowIterator(self._begin(), self._limit)
        while page := await walk.page():
            rows.extend(page)
        return rows

    async def begin(self) -> tuple[RowIterator, list[tuple[bytes, bytes]]]:
        """An iterator that can be asked for whole pages, and its first one; made on the loop, where the ranges are known."""
        walk = RowIterator(self._begin(), self._limit)
        return walk, await walk.page()


class RowIterator(AsyncIterator[tuple[bytes, bytes]]):
    def __init__(self, pages: Pages, limit: int | None) -> None:
        self._pages = pages
        self._left = limit
        self._rows: list[tuple[bytes, bytes]] = []
        self._at = 0
        self._last = limit == 0

    async def page(self) -> list[tuple[bytes, bytes]]:
        """The next rows; empty only at the end."""
        while not self._last:
            page = await self._pages.next()
            rows = page.rows
            self._last = page.last
            if self._left is not None:
                rows = rows[: self._left]
                self._left -= len(rows)
                self._last = self._last or self._left == 0
            if rows:
                return rows
        return []

    async def __anext__(self) -> tuple[bytes, bytes]:
        at = self._at
        if at >= len(self._rows):
            self._rows = await self.page()
            at = 0
            if not self._rows:
                raise StopAsyncIteration
        self._at = at + 1
        return self._rows[at]


def scan_bounds(
    start: bytes, end: bytes | None, prefix: bytes | None, limit: int | None
) -> tuple[bytes, bytes]:
    """Raises: InvalidArgument, KeyTooLarge."""
    if limit is not None and (type(limit) is not int or limit < 0):
        raise InvalidArgument("limit must be a number, and not negative")
    if prefix is None:
        return limits.validate_range(start, end)
    if start or end is not None:
        raise InvalidArgument("give either a prefix, or start and end")
    return limits.prefix_range(prefix)


class OwnPages:
    """A scan of the store with a transaction's writes laid over it; guards what it returns. bare: `below` has no values."""

    def __init__(
        self,
        below: SpanPages,
        buffer: WriteBuffer,
        guarded: ReadSpans | None,
        require_open: Callable[[], None],
        limit: int | None,
        reverse: bool,
        keys_only: bool,
        bare: bool,
    ) -> None:
        self._below = below
        self._buffer = buffer
        self._guarded = guarded
        self._require_open = require_open
        self._left = limit
        self._share = 1  # it is supposed that one row of so many is not hidden by an own delete
        self._reverse = reverse
        self._keys_only = keys_only
        self._bare = bare

    async def next(self) -> Page:
        self._require_open()
        if self._left is not None:
            self._below.want(self._left * self._share)
        try:
            page = await self._below.next()
        except SnapshotTooOld as error:
            raise TransactionTooOld(error.message) from error
        self._require_open()  # still: else nothing guards what was read
        rows = self._overlaid(page)
        if len(rows) < len(page.rows):
            self._share = min(self._share * 4, PAGE_ROWS_MAX)
        start, end = page.start, page.end
        if self._left is not None:
            if len(rows) >= self._left:  # seen is what is returned, and not what lies behind it
                rows = rows[: self._left]
                if rows:
                    last = rows[-1][0]
                    start, end = (last, end) if self._reverse else (start, point_end(last))
            self._left -= len(rows)
        if self._buffer.stamps:
            self._buffer.require_readable(start, end, self._below.at)
        if self._guarded is not None:
            self._guarded.add(start, end)
        return Page(rows, page.start, page.end, page.last or self._left == 0)

    def _overlaid(self, page: Page) -> list[tuple[bytes, bytes]]:
        buffer = self._buffer
        if not buffer or not buffer.overlays(page.start, page.end):
            return [(key, b"") for key, _ in page.rows] if self._keys_only else page.rows
        rows = dict(page.rows)
        if buffer.clears:
            rows = {key: value for key, value in page.rows if not buffer.cleared(key)}
        for key, point in buffer.points_in(page.start, page.end):
            if self._bare and not buffer.conditional:
                value = None if point.kind == WriteKind.DELETE else b""
            elif self._bare and point.operations:
                raise InvalidArgument("begin the scan after the operations that it is to see")
            else:
                value = value_over(point, rows.get(key))
            if value is None:
                rows.pop(key, None)
            else:
                rows[key] = value
        found = sorted(rows.items(), reverse=self._reverse)
        return [(key, b"") for key, _ in found] if self._keys_only else found
