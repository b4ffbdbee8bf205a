"""Which keys lie in a span, and whose spans meet one: for tables that one request asks about thousands of times in one turn.

A table changes with each request, and most of what changes it never asks about spans: so nothing is kept in order, but put in
order when somebody asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

Holder = TypeVar("Holder")


class Ordered:
    """The keys of one table, as a question about spans needs them.

    The first question after a change walks all keys; the second sorts them, and each from then on costs a bisection.
    """

    __slots__ = ("_keys", "_state")

    def __init__(self) -> None:
        self._state: object = None
        self._keys: list[bytes] | None = None

    def within(
        self, table: Mapping[bytes, Any], state: object, start: bytes, end: bytes
    ) -> Iterator[bytes]:
        """Its keys in [start, end), in order; end b"": to the end. `state` is another whenever the table has other keys."""
        if state != self._state:
            self._state, self._keys = state, None
            return iter(sorted(key for key in table if start <= key and (not end or key < end)))
        keys = self._keys
        if keys is None:
            keys = self._keys = sorted(table)
        low = bisect_left(keys, start)
        high = bisect_left(keys, end, low) if end else len(keys)
        return (keys[place] for place in range(low, high))


class Joined:
    """The spans of one holder. Once somebody asks they are joined and sorted, and a question costs a bisection."""

    __slots__ = ("_ends", "_starts", "spans")

    def __init__(self, spans: Iterable[tuple[bytes, bytes]]) -> None:
        self.spans = list(spans)
        self._starts: list[bytes] | None = None
        self._ends: list[bytes] = []

    def meets(self, start: bytes, end: bytes) -> bool:
        """Whether one of them has a key in common with [start, end); end b"": the end of all keys."""
        starts = self._starts
        if starts is None:
            starts = self._join()
        place = bisect_left(starts, end) if end else len(starts)
        return place > 0 and start < self._ends[place - 1]

    def _join(self) -> list[bytes]:
        starts: list[bytes] = []
        ends: list[bytes] = []
        for start, end in sorted(self.spans):
            if ends and start <= ends[-1]:
                ends[-1] = max(ends[-1], end)
            elif start < end:
                starts.append(start)
                ends.append(end)
        self._starts, self._ends = starts, ends
        return starts


def meeting(table: Mapping[Holder, Joined], start: bytes, end: bytes) -> Iterator[Holder]:
    """Holders of spans that meet [start, end), in the order of the table."""
    for holder, spans in table.items():
        if spans.meets(start, end):
            yield holder
