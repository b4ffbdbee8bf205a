"""Reads that any replica may answer: bounded-stale ones, and those at an old version.

A `ReplicaView` is a View whose requests go to the replicas of a range in turn. One that is too far behind says so at once
(ReplicaBehind): another is asked, then the leader, which can always answer. The replica that answers the first read chooses
the version: the safe timestamp of the ranges that are read, if everything is in it that was acknowledged `max_staleness` ago;
all else of the view is read at that version. Who judges that is the node (kvstore/closing.py), by its own monotonic clock and
what the oracle told it; nobody's wall clock is believed. A client's stale reads do not go back in time, whoever answers them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from kvstore.errors import InvalidArgument, ReplicaBehind
from kvstore.links import Call, addressed
from kvstore.reads import SpanPages, View, keys_bytes
from kvstore.router import Router
from txn.messages import STALE_RANGES_MAX, Read, ReadReply, Reply, Scan, ScanReply, Stale
from txn.types import milliseconds_of

REPLICAS_TRIED: Final = 2  # then the leader
SURELY_CLOSED_MS: Final = 2_500  # a version that old, by the oracle, is asked of replicas first
STALENESS_S_MAX: Final = 86_400.0

_replace = msgspec.structs.replace


class Replicas:
    """Whose turn it is, and how far stale reads have come: one for each client."""

    def __init__(self, router: Router) -> None:
        self.read_at = 0  # the highest version that a stale read of this client has shown
        self.refused = 0  # answers of replicas that were behind
        self._router = router
        self._turn = 0

    def send(
        self, request: Read | Scan, key: bytes, end: bytes, until: float, tried: int = 0
    ) -> Call:
        """To a replica, each in its turn; to the leader when enough of them were tried."""
        router = self._router
        call = router.open(key, end, router.monotonic(), until)
        if tried < REPLICAS_TRIED:
            self._direct(call)
        else:
            assert request.stale is not None
            request = _replace(request, stale=_replace(request.stale, last=True))
        router.submit(call, addressed(request, call), keys_bytes(request))
        return call

    def _direct(self, call: Call) -> None:
        route = self._router.ranges.find(call.key)
        nodes = route.nodes if route is not None else ()
        now = self._router.monotonic()
        for _ in nodes:
            self._turn += 1
            link = self._router.links.by_node.get(nodes[self._turn % len(nodes)])
            if link is not None and link.usable(now):
                if link.channel is not None:
                    call.link = link
                else:  # to be dialled; where there is a link it would be left for the next try
                    call.link, call.node = None, link.node
                return


class ReplicaView(View):
    """See the module. Args: staleness_s: what may be missing at the first read; None: `at` is given."""

    __slots__ = ("_ms", "_ranges", "_replicas")

    def __init__(
        self,
        replicas: Replicas,
        router: Router,
        timeout_s: float,
        *,
        at: int = 0,
        staleness_s: float | None = None,
    ) -> None:
        super().__init__(router, timeout_s, at=at)
        self._replicas = replicas
        self._ms = 0 if staleness_s is None else max(1, int(staleness_s * 1000))
        self._ranges: list[int] = []  # of a span that is going to be read

    def pages(
        self, start: bytes, end: bytes, *, reverse: bool, keys_only: bool, rows_max: int = 0
    ) -> SpanPages:
        if not self.at:
            pieces = self.router.ranges.split(start, end) or []
            self._ranges = [piece.route.range_id for piece in pieces[:STALE_RANGES_MAX]]
        return super().pages(start, end, reverse=reverse, keys_only=keys_only, rows_max=rows_max)

    async def _choose(self, keys: Sequence[bytes], until: float) -> int:
        """The version for keys of several ranges: one replica looks at all of them that its node has."""
        ranges: dict[int, None] = {}
        for key in keys:
            route = self.router.ranges.find(key)
            if route is not None and len(ranges) < STALE_RANGES_MAX:
                ranges[route.range_id] = None
        self._ranges = list(ranges)
        reply = await self._answer(self._send(Read(0, 0, 0, 0, [keys[0]]), keys[0], b"", until))
        assert isinstance(reply, ReadReply)
        return reply.at

    def _send(self, request: Read | Scan, key: bytes, end: bytes, until: float) -> Call:
        if not self._ms and not self._surely_closed():
            return super()._send(request, key, end, until)
        stale = Stale() if request.at else Stale(self._ms, self._replicas.read_at, self._ranges)
        return self._replicas.send(_replace(request, stale=stale), key, end, until)

    def _surely_closed(self) -> bool:
        """By the oracle's time; or, where that stands still, by how long ago this client asked for what it has seen since.

        The version may be as new as the answer, and the yes too early by as long as that took. All that hangs on it is who is
        asked first, and a replica that is behind says so: a question more, where the time of each answer would cost every one.
        """
        router = self.router
        if self.at <= self._replicas.read_at:
            return True
        if (
            self.at <= router.seen_ts
            and router.seen_at + SURELY_CLOSED_MS / 1000 < router.monotonic()
        ):
            return True
        return milliseconds_of(self.at) + SURELY_CLOSED_MS <= milliseconds_of(router.seen_ts)

    async def _answer(self, call: Call) -> Reply:
        tried = 0
        while True:
            try:
                reply = await self.router.answer(call)
            except ReplicaBehind:
                request = call.request
                if not isinstance(request, Read | Scan) or request.stale is None:
                    raise
                self._replicas.refused += 1
                tried += 1
                call = self._replicas.send(request, call.key, call.end, call.deadline, tried)
                continue
            if self._ms and isinstance(reply, ReadReply | ScanReply):
                self._replicas.read_at = max(self._replicas.read_at, reply.at)
            return reply


def checked_staleness(max_staleness: float | None, at: int | None = None) -> float | None:
    """Raises: InvalidArgument."""
    if max_staleness is None:
        return None
    if at is not None:
        raise InvalidArgument("give at or max_staleness, not both")
    if not 0 < max_staleness <= STALENESS_S_MAX:
        raise InvalidArgument(
            f"max_staleness is in seconds, above 0 and at most {STALENESS_S_MAX:g}"
        )
    return max_staleness


__all__ = ["ReplicaView", "Replicas", "checked_staleness"]
