"""From a request to the node that can answer it: routing, coalescing, repetition. The client's one way to the cluster.

- All requests made in one turn of the loop leave as ONE message per node (`_flush`, by one call_soon).
- A request is a `Call`: it keeps its id, and goes on with another range version or node, until it is answered or its
  deadline has passed. All are idempotent, so repeating is right; what an answer means is the caller's business.
- `not_leader`, `epoch_mismatch`, `throttled`, `unavailable` and lost connections are dealt with here. A call whose span
  no longer lies in one range is given back with EpochMismatch: only the caller can cut it anew.

Invariants
K1  A call is in exactly one place: `pending` of one link, or parked; or it is done. A forgotten call is in none.
K2  `sent` is true from the first time a call was handed to a connection: from then on its outcome is ambiguous.
K3  At most `calls_max` calls, and OUTGOING_BYTES_MAX bytes waiting for one node: more is refused with Throttled.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, Final

import msgspec

from kvstore.errors import (
    ClientClosed,
    DeadlineExceeded,
    EpochMismatch,
    KVError,
    Throttled,
    Unavailable,
    from_wire,
)
from kvstore.links import (
    BLOCKED_RETRY_S,
    OUTGOING_BYTES_MAX,
    REQUEST_OVERHEAD_BYTES,
    Answer,
    Call,
    Channel,
    ClientLink,
    Dial,
    Links,
    OnReply,
    Parked,
    addressed,
    number,
    undialled,
)
from kvstore.payloads import replies_in
from kvstore.ports import Clock
from kvstore.ranges import META_KEY, RangeCache
from kvstore.streams import Backoff
from kvstore.timestamps import LastIssued
from txn.messages import (
    Directory,
    Failure,
    GetDirectory,
    GetTimestamps,
    PrepareReply,
    RangeInfo,
    ReadReply,
    Reply,
    Request,
    Resolve,
    ScanReply,
    Timestamps,
    TxnReply,
)

TRY_TIMEOUT_S: Final = 1.0  # silence for so long, and another replica is asked; doubled each time
CALLS_MAX: Final = 65_536
PAYLOAD_BYTES: Final = 1 << 20  # a message is cut when it has grown to this
BACKOFF: Final = Backoff(first_s=0.005, max_s=0.25)
REFRESH_INTERVAL_S: Final = 0.05  # between two questions for the directory
THROTTLED_S_MAX: Final = 1.0  # a longer wait is not taken from a server
HOLE_RETRY_S: Final = 0.02  # between two looks at a hole in the ranges
TIMER_S_MAX: Final = 1.0  # our clock goes on in a suspend, the loop's does not: it looks so often

_AGAIN: Final = frozenset(
    {"not_leader", "throttled", "unavailable", "no_quorum", "not_ready", "node_stopped"}
)

_to_ranges = list[RangeInfo]


class Router:
    """Not thread-safe; lives on one loop, from `start` to `close`.

    Args: dial: opens a channel to (address, node id or 0). seeds: addresses to begin with. rng: for jitter.
    """

    def __init__(
        self,
        dial: Dial,
        seeds: Iterable[str],
        clock: Clock,
        rng: random.Random,
        *,
        try_timeout_s: float = TRY_TIMEOUT_S,
        calls_max: int = CALLS_MAX,
    ) -> None:
        self.ranges = RangeCache()
        self.cluster = ""
        self.seen_ts = 0  # the largest timestamp in any answer; it was new at `seen_at`, or later
        self.seen_at = float("-inf")
        self.messages_sent = 0
        self.calls_retried = 0
        self._dial = dial
        self._seeds = list(dict.fromkeys(seeds))
        self._clock = clock
        self.monotonic = clock.monotonic
        self._rng = rng
        self._try_timeout_s = try_timeout_s
        self.calls_max = calls_max
        self._loop: asyncio.AbstractEventLoop
        self._new_future: Callable[[], asyncio.Future[Answer]]
        self._find = self.ranges.find
        self.links = Links()
        self._leaders = self.links.by_node
        self._next_id = 1
        self._calls = 0  # not done yet
        self._dirty: list[ClientLink] = []
        self._parked = Parked()
        self._expiry = float("inf")  # nothing pending expires before this
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._refreshing = False
        self._refreshed_at = self._found_out_at = float("-inf")
        self._last_issued = LastIssued(self._ask_timestamps)
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._closed = False

    # --- life -------------------------------------------------------------------------------------

    async def start(self, timeout_s: float) -> None:
        """Reach any node and learn the ranges. Raises: Unavailable; WrongCluster, VersionMismatch and the like."""
        self._loop = asyncio.get_running_loop()
        self._new_future = self._loop.create_future
        deadline = self.monotonic() + timeout_s
        for address in self._seeds:
            self.links.at(address, 0)
        answered = False
        while not answered or self.monotonic() < deadline - HOLE_RETRY_S:
            await self.refresh(deadline)
            if self.ranges.find(META_KEY) is not None:
                return
            answered = True
            await asyncio.sleep(HOLE_RETRY_S)
        raise Unavailable("the cluster has no ranges yet: it waits for `kvctl init`")

    async def close(self, timeout_s: float) -> None:
        """End all calls (ClientClosed) and all connections, within about `timeout_s`. A cancelled one ends them at once."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for link in self.links:
            self._flush_link(link)
        while (call := self._parked.take(float("inf"))) is not None:
            self._finish(call, ClientClosed())
        for link in self.links:
            while link.pending:  # one by one: who is told of one may forget others
                self._finish(link.pending.pop(next(iter(link.pending))), ClientClosed())
        for task in self._tasks:
            task.cancel()
        ends = [link.channel.close(timeout_s) for link in self.links if link.channel is not None]
        try:
            await asyncio.gather(*self._tasks, *ends, return_exceptions=True)
        finally:
            for link in self.links:
                if link.channel is not None:
                    link.channel.abort()
                    link.channel = None

    @property
    def calls(self) -> int:
        """How many calls are not done yet."""
        return self._calls

    # --- calls ------------------------------------------------------------------------------------

    def open(
        self,
        key: bytes,
        end: bytes,
        now: float,
        deadline: float,
        on_reply: OnReply | None = None,
        *,
        silent: bool = False,
    ) -> Call:
        """A call with its id and its range filled in, to be given to `submit` with the request in the same turn.

        Raises: Throttled, ClientClosed. `silent`: nobody waits for the answer; it is repeated all the same.
        """
        if self._calls >= self.calls_max or self._closed:
            raise ClientClosed() if self._closed else Throttled(BLOCKED_RETRY_S)
        number = self._next_id
        self._next_id = number + 1
        self._calls += 1
        expires = now + self._try_timeout_s
        if expires > deadline:
            expires = deadline
        future = None if silent or on_reply is not None else self._new_future()
        route = self._find(key)
        if route is None or (end and not route.covers(key, end)):
            return Call(number, key, end, deadline, expires, future, on_reply, asked_at=now)
        link = self._leaders.get(route.leader)
        return Call(
            number, key, end, deadline, expires, future, on_reply, route.range_id, route.version, link, now
        )  # fmt: skip

    def submit(self, call: Call, request: Request, size_bytes: int) -> None:
        """Send it with the other requests of this turn."""
        call.request = request
        size_bytes += REQUEST_OVERHEAD_BYTES + len(call.key) + len(call.end)
        call.size_bytes = size_bytes
        link = call.link
        if link is None or link.channel is None or link.ready_bytes > OUTGOING_BYTES_MAX:
            self._place(call, self.monotonic())
            return
        link.pending[call.id] = call
        if call.expires < self._expiry:
            self._expiry = call.expires
            self._arm(call.expires)
        call.sent = True
        link.outgoing.append(request)
        link.outgoing_bytes += size_bytes
        if not link.dirty or link.outgoing_bytes >= PAYLOAD_BYTES:
            self._mark(link)

    def send(
        self,
        request: Request,
        key: bytes,
        end: bytes,
        deadline: float,
        *,
        size_bytes: int = 0,
        on_reply: OnReply | None = None,
        silent: bool = False,
    ) -> Call:
        """`open` and `submit` of a request whose id and range are still to be filled in."""
        call = self.open(key, end, self.monotonic(), deadline, on_reply, silent=silent)
        if request.__class__ is GetDirectory:
            call.link = None  # any node may be asked, not only the leader of the first range
        self.submit(call, addressed(request, call), size_bytes)
        return call

    def hint(self, request: Resolve) -> None:
        """Once, to the presumed leader: its loss does no harm, and no answer comes (id 0)."""
        link = self.links.add_hint(self._find(request.locus), request)
        if link is not None:
            self._mark(link)

    async def ask(
        self, request: Request, key: bytes, end: bytes, deadline: float, *, size_bytes: int = 0
    ) -> Reply:
        """Send and await the answer. Raises: EpochMismatch if the span does not fit one range any more; KVError."""
        return await self.answer(self.send(request, key, end, deadline, size_bytes=size_bytes))

    async def answer(self, call: Call) -> Reply:
        assert call.future is not None
        try:
            reply = await call.future
        except BaseException:
            self.forget(call)
            raise
        if isinstance(reply, KVError):
            raise reply
        return reply

    def forget(self, call: Call) -> None:
        """Nobody waits any more: leave nothing of it behind."""
        if call.link is not None and call.link.pending.pop(call.id, None) is not None:
            self._calls -= 1
        elif call.parked:
            call.parked = False
            self._calls -= 1

    def timestamps(self, deadline: float) -> Awaitable[Timestamps]:
        """The oracle's last issued timestamp, issued after this is awaited."""
        return self._last_issued.ask(deadline)

    def _ask_timestamps(self, deadline: float, on_reply: OnReply) -> None:
        self.send(GetTimestamps(0, 0), META_KEY, b"", deadline, on_reply=on_reply)

    async def refresh(self, deadline: float) -> Directory:
        """Ask any node for its view of the ranges."""
        reply = await self.ask(GetDirectory(0), b"", b"", deadline)
        assert isinstance(reply, Directory)
        return reply

    async def find_out(self, until: float) -> None:
        """There is a hole in what we know of the ranges: ask, but not too often. Raises: DeadlineExceeded."""
        now = self.monotonic()
        if now >= until:
            raise DeadlineExceeded("the time ran out before the ranges were known")
        if now < self._found_out_at + HOLE_RETRY_S:
            await asyncio.sleep(HOLE_RETRY_S)
        self._found_out_at = self.monotonic()
        await self.refresh(until)

    # --- sending ----------------------------------------------------------------------------------

    def _append(self, link: ClientLink, call: Call) -> None:
        assert call.request is not None
        call.sent = True
        link.outgoing.append(call.request)
        link.outgoing_bytes += call.size_bytes
        self._mark(link)

    def _mark(self, link: ClientLink) -> None:
        """Something waits: it leaves at the end of this turn."""
        if not link.dirty:
            link.dirty = True
            if not self._dirty:
                self._loop.call_soon(self._flush)
            self._dirty.append(link)
        if link.outgoing_bytes >= PAYLOAD_BYTES:
            link.seal()

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, []
        for link in dirty:
            link.dirty = False
            self._flush_link(link)

    def _flush_link(self, link: ClientLink) -> None:
        self.messages_sent += link.flush()
        while link.refused:
            self._finish(*link.refused.pop())
        if link.ready and not link.blocked and not self._closed:
            link.blocked = True
            self._loop.call_later(BLOCKED_RETRY_S, self._unblock, link)

    def _unblock(self, link: ClientLink) -> None:
        link.blocked = False
        if link.channel is not None:
            self._flush_link(link)

    def _place(self, call: Call, now: float) -> None:
        """Find where a call goes now; send it there, or park it until something has changed."""
        if now >= call.deadline:
            self._finish(call, call.overdue())
            return
        call.expires = min(call.deadline, now + call.silence_s(self._try_timeout_s))
        link: ClientLink | None = None
        if call.request.__class__ is not GetDirectory:
            route = self.ranges.find(call.key)
            if route is None:
                self._unplaced(call, now)
                return
            if call.end and not route.covers(call.key, call.end):
                self._finish(call, EpochMismatch(route.range_id))
                return
            call.range_id, call.version = route.range_id, route.version
            link = self.links.for_call(call, route, now)
        else:
            link = self.links.anyone(now, strangers=not self.ranges.whole())
        if link is None:
            self._unplaced(call, now)
            return
        if link.ready_bytes > OUTGOING_BYTES_MAX:
            self._hold_back(call, now)
            return
        assert call.request is not None
        call.request = addressed(call.request, call)
        call.goes(link, now)
        link.pending[call.id] = call
        if call.expires < self._expiry:
            self._expiry = call.expires
            self._arm(call.expires)
        if link.channel is not None:
            self._append(link, call)
        elif not link.dialling:
            link.dialling = True
            self._spawn(self._open_link(link))

    def _unplaced(self, call: Call, now: float) -> None:
        """Its range is unknown, or none of its nodes can be reached just now."""
        self.ask_for_directory(now)
        call.tries += 1
        self._park(call, now + self._backoff(call.tries))

    def _hold_back(self, call: Call, now: float) -> None:
        """Its node has enough to take already (K3)."""
        self._park(call, now + self._backoff(call.hold_back()))

    # --- connections ------------------------------------------------------------------------------

    async def _open_link(self, link: ClientLink) -> None:
        try:
            channel = await self._dial(link.address, link.node)
        except Exception as error:  # noqa: BLE001 - `undialled` tells of what is not foreseen
            link.dialling = False
            link.failures += 1
            now = self.monotonic()
            link.not_before = now + self._backoff(link.failures + 2)
            self._lost(link, undialled(link.address, error))
            return
        link.opened(channel)
        channel.on_message = lambda payload: self._on_message(link, payload)
        channel.on_close = lambda error: self._on_close(link, channel, error)
        if channel.peer.node:
            self.links.at(link.address, channel.peer.node)
        now = self.monotonic()
        for call in list(link.pending.values()):
            if link.ready_bytes <= OUTGOING_BYTES_MAX:
                self._append(link, call)
            else:
                del link.pending[call.id]
                self._hold_back(call, now)

    def _on_close(self, link: ClientLink, channel: Channel, error: Exception | None) -> None:
        if link.channel is not channel:
            return
        link.ended()
        link.not_before = self.monotonic() + self._backoff(0)
        self._lost(link, Unavailable(f"the connection to {link.address} ended: {error}"))

    def _lost(self, link: ClientLink, error: KVError) -> None:
        """Everything that waits on this link goes on elsewhere."""
        pending = list(link.pending.values())
        link.pending.clear()
        fatal = not error.retryable and not isinstance(error, TimeoutError)
        for call in pending:
            if fatal and len(self.links) <= 1:
                self._finish(call, error)
                continue
            call.lost(error if fatal else Unavailable(error.message))
            self._again(call, None)

    # --- answers ----------------------------------------------------------------------------------

    def _on_message(self, link: ClientLink, payload: bytes) -> None:
        replies = replies_in(payload)  # what it raises ends the stream
        pop = link.pending.pop
        for reply in replies:
            call = pop(reply.id, None)
            if call is None:
                continue  # forgotten, or answered from elsewhere
            kind = reply.__class__
            if kind is PrepareReply or kind is TxnReply:
                ts: int = reply.ts  # type: ignore[union-attr]
            elif kind is ReadReply or kind is ScanReply:
                ts = reply.at  # type: ignore[union-attr]
            elif isinstance(reply, Failure):
                self._on_failure(call, reply)
                continue
            elif isinstance(reply, Timestamps):
                ts = reply.read_ts
            else:
                ts = 0
                if isinstance(reply, Directory):
                    self._on_directory(reply)
            newest, asked_at = self.seen_ts, call.asked_at
            if ts > newest or (ts == newest and self.seen_at < asked_at and call.asks_for_now):
                self.seen_ts = ts
                if self.seen_at < asked_at and not call.is_stale:
                    self.seen_at = asked_at  # not now: it may be that of an early try
            self._calls -= 1
            future = call.future
            if future is not None:
                if not future.done():
                    future.set_result(reply)
            elif call.on_reply is not None:
                call.on_reply(reply)

    def _on_failure(self, call: Call, failure: Failure) -> None:
        """The call has been taken from its link. Decide where it goes on."""
        details, code = failure.details, failure.code
        now = self.monotonic()
        if code == "epoch_mismatch":
            try:
                self.ranges.update(msgspec.convert(details.get("ranges", []), _to_ranges))
            except msgspec.ValidationError:
                pass  # nothing to learn from it; the directory knows
            route = self.ranges.find(call.key)
            if route is None or (route.range_id, route.version) == (call.range_id, call.version):
                self.ask_for_directory(now)
                self._again(call, self._backoff(call.tries))
            else:
                wait_s = 0.0 if call.tries < 2 else self._backoff(call.tries)
                self._again(call, wait_s, rotate=False)
            return
        if code not in _AGAIN:
            self._finish(call, from_wire(code, failure.message, details))
            return
        call.refused(failure)
        if code == "throttled":
            told_s = max(number(details, "retry_after_s"), number(details, "retry_after"))
            wait_s = max(min(told_s, THROTTLED_S_MAX), self._backoff(call.tries))
            self._again(call, wait_s, rotate=False)
            return
        hinted = self.links.hinted(details) if code == "not_leader" else None
        route = self.ranges.find(call.key)
        if route is None or hinted is None:
            self._again(call, self._backoff(call.tries))
            return
        route.leader = hinted.node
        at_once = hinted is not call.link and call.tries < 3
        self._again(call, 0.0 if at_once else self._backoff(call.tries), rotate=False)

    def _on_directory(self, directory: Directory) -> None:
        self._refreshing = False
        self.cluster = directory.cluster or self.cluster
        self.ranges.update(directory.ranges)
        self.links.learn(directory.addresses)

    def _again(self, call: Call, delay_s: float | None, *, rotate: bool = True) -> None:
        """Try once more, after `delay_s` (None: the usual back-off), at the next replica if `rotate`."""
        if self._closed:
            self._finish(call, ClientClosed())
            return
        self.calls_retried += 1
        now = self.monotonic()
        if rotate and call.link is not None:
            route = self.ranges.find(call.key)
            if route is not None and route.leader == call.link.node:
                route.leader = route.after(route.leader)
        call.link = None
        call.tries += 1
        if call.tries % 4 == 0:
            self.ask_for_directory(now)
        delay_s = self._backoff(call.tries) if delay_s is None else delay_s
        if delay_s <= 0:
            self._place(call, now)
        else:
            self._park(call, now + delay_s)

    def _finish(self, call: Call, answer: Answer) -> None:
        """The call is in no table any more: tell whoever waits."""
        self._calls -= 1
        call.parked = False
        if call.future is not None:
            if not call.future.done():
                call.future.set_result(answer)
        elif call.on_reply is not None:
            call.on_reply(answer)

    # --- time -------------------------------------------------------------------------------------

    def ask_for_directory(self, now: float) -> None:
        """In the background, unless one is on its way or has just come."""
        if self._refreshing or self._closed or now < self._refreshed_at + REFRESH_INTERVAL_S:
            return
        self._refreshing, self._refreshed_at = True, now

        def done(_answer: Answer) -> None:
            self._refreshing = False

        try:
            self.send(GetDirectory(0), b"", b"", now + self._try_timeout_s, on_reply=done)
        except KVError:
            self._refreshing = False

    def _backoff(self, tries: int) -> float:
        return BACKOFF.pause_s(tries, self._rng)

    def _park(self, call: Call, until: float) -> None:
        self._parked.put(call, when := min(until, call.deadline))
        self._arm(when)

    def _arm(self, at: float) -> None:
        if at >= self._timer_at or self._closed:
            return
        if self._timer is not None:
            self._timer.cancel()
        now = self.monotonic()
        self._timer_at = at = min(at, now + TIMER_S_MAX)
        self._timer = self._loop.call_later(max(0.0, at - now), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._timer_at = float("inf")
        now = self.monotonic() + 0.0005  # a timer may come a hair early
        while (call := self._parked.take(now)) is not None:
            self._place(call, now)
        if now >= self._expiry:
            self._sweep(now)
        self._arm(min(self._parked.soonest(), self._expiry))

    def _sweep(self, now: float) -> None:
        """Look at every pending call: silent ones go to another replica, late ones end."""
        overdue, self._expiry = self.links.overdue(now)
        for call in overdue:
            if call.link is None or call.link.pending.pop(call.id, None) is None:
                continue  # whoever was told of another one has forgotten it
            call.unanswered()
            if now >= call.deadline:
                self._finish(call, call.overdue())
            else:
                self._again(call, 0.0)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task: asyncio.Task[None] = self._loop.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)
