"""What the client knows of the ranges: a cache that is corrected by those who know better, never trusted.

Two sorted lists beside each other (start keys, routes), because looking a key up is on the path of every request and a
change is rare. A report replaces what overlaps it and is older; where an overlapping range is newer the report is stale
and is dropped whole. What is replaced in part leaves a hole, and a hole means "ask", never "no such key".
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from txn.messages import RangeInfo

META_KEY: Final = b"\xff\x00"  # the meta range holds it; its leader runs the timestamp oracle
META_END: Final = b"\xff\x01"


class Route:
    """One range as last heard of. `leader` is a guess (a node id, 0: none); the rest is true for `version`."""

    __slots__ = ("conf_ver", "end", "leader", "nodes", "range_id", "start", "version")

    def __init__(self, info: RangeInfo) -> None:
        self.range_id = info.range_id
        self.start = info.start
        self.end = info.end
        self.version = info.version
        self.conf_ver = info.conf_ver
        self.nodes = tuple(node for node, _replica in info.replicas)
        self.leader = info.leader_node

    def covers(self, key: bytes, end: bytes) -> bool:
        """Does [key, end) lie inside? An empty `end` stands for the key alone."""
        if key < self.start:
            return False
        return not self.end or (end <= self.end if end else key < self.end)

    def after(self, node: int) -> int:
        """The replica to try when `node` is of no use: the next in the list; 0 if there is none."""
        if not self.nodes:
            return 0
        try:
            return self.nodes[(self.nodes.index(node) + 1) % len(self.nodes)]
        except ValueError:
            return self.nodes[0]

    def __repr__(self) -> str:
        return f"Route({self.range_id}, [{self.start!r}, {self.end!r}), v{self.version}, leader {self.leader})"


class Piece(NamedTuple):
    """A part of a span that lies in one range."""

    start: bytes
    end: bytes
    route: Route


class RangeCache:
    """At most one route for each key. Not for use from several threads."""

    def __init__(self) -> None:
        self._starts: list[bytes] = []
        self._routes: list[Route] = []

    def __len__(self) -> int:
        return len(self._routes)

    def __iter__(self) -> Iterator[Route]:
        return iter(self._routes)

    def whole(self) -> bool:
        """Whether there is no hole. A node tells of the ranges that it has replicas of, and of no others."""
        at: bytes | None = b""
        for route in self._routes:
            if route.start != at:
                return False
            at = route.end or None
        return at is None

    def find(self, key: bytes) -> Route | None:
        """The range of a key; None if nobody told us."""
        at = bisect_right(self._starts, key) - 1
        if at < 0:
            return None
        route = self._routes[at]
        end = route.end
        return route if not end or key < end else None

    def before(self, end: bytes) -> Route | None:
        """The range that holds the keys just below `end`; None if nobody told us."""
        at = bisect_left(self._starts, end) - 1
        if at < 0:
            return None
        route = self._routes[at]
        return route if not route.end or end <= route.end else None

    def split(self, start: bytes, end: bytes) -> list[Piece] | None:
        """[start, end) cut at range boundaries, ascending; None if there is a hole in it."""
        pieces: list[Piece] = []
        at = start
        while at < end:
            route = self.find(at)
            if route is None:
                return None
            upto = min(end, route.end) if route.end else end
            pieces.append(Piece(at, upto, route))
            at = upto
        return pieces

    def update(self, infos: Iterable[RangeInfo]) -> None:
        for info in infos:
            self._update_one(info)

    def _update_one(self, info: RangeInfo) -> None:
        low = bisect_right(self._starts, info.start) - 1
        if low < 0 or (self._routes[low].end and self._routes[low].end <= info.start):
            low += 1
        high = low
        while high < len(self._routes) and (not info.end or self._starts[high] < info.end):
            known = self._routes[high]
            if known.version > info.version:
                return
            if known.version == info.version and known.range_id == info.range_id:
                self._refresh(known, info)
                return
            high += 1
        self._starts[low:high] = [info.start]
        self._routes[low:high] = [Route(info)]

    @staticmethod
    def _refresh(known: Route, info: RangeInfo) -> None:
        """The same range at the same version: the replicas and the leader may be news."""
        if info.conf_ver >= known.conf_ver:
            known.conf_ver = info.conf_ver
            known.nodes = tuple(node for node, _replica in info.replicas)
        if info.leader_node:
            known.leader = info.leader_node
