"""What travels and where to: calls, the connections to nodes, and the choice between them. `router` makes them act."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Protocol

import msgspec

from kvstore import logs
from kvstore.errors import (
    DeadlineExceeded,
    KVError,
    NoQuorum,
    NotReady,
    Throttled,
    Unavailable,
    from_wire,
)
from kvstore.link import Hello
from kvstore.payloads import payloads
from kvstore.ranges import Route
from replication.errors import FrameError
from txn.messages import (
    Failure,
    GetDirectory,
    GetTimestamps,
    LockRead,
    Outcome,
    Prepare,
    Read,
    Reply,
    Request,
    Resolve,
    Scan,
)

REQUEST_OVERHEAD_BYTES: Final = 96
BLOCKED_RETRY_S: Final = 0.005  # a full queue is tried again after this
HELD_BACK_MAX: Final = (
    4  # doublings of the pause of a call for which there is no room: 0.08 s at most
)
OUTGOING_BYTES_MAX: Final = (
    32 << 20
)  # of messages that a channel had no room for; then calls wait elsewhere

_REQUESTS: Final = b"\x02"  # the first byte of a message of requests
_replace = msgspec.structs.replace
log = logs.logger(__name__)

Answer = Reply | KVError
OnReply = Callable[[Answer], None]


class Channel(Protocol):
    """What the router needs of a stream (kvstore.streams.Stream): whole messages, in order."""

    peer: Hello

    @property
    def on_message(self) -> Callable[[bytes], None] | None: ...
    @on_message.setter
    def on_message(self, callback: Callable[[bytes], None]) -> None: ...

    @property
    def on_close(self) -> Callable[[Exception | None], None] | None: ...
    @on_close.setter
    def on_close(self, callback: Callable[[Exception | None], None]) -> None: ...

    def send(self, payload: bytes) -> bool:
        """False: its queue is full, and nothing was taken."""

    def abort(self) -> None: ...

    async def close(self, timeout_s: float) -> None: ...


Dial = Callable[[str, int], Awaitable[Channel]]


class Call(msgspec.Struct, eq=False):
    """One request on its way. `future` gets an Answer as its result, never an exception; or `on_reply` is called.

    (A Struct because making one is on the path of every request, and these are made quickly.)
    """

    id: int
    key: bytes
    end: bytes  # empty: the key alone
    deadline: float
    expires: float  # silence until then, and it is tried elsewhere
    future: asyncio.Future[Answer] | None = None
    on_reply: OnReply | None = None
    range_id: int = 0
    version: int = 0
    link: ClientLink | None = None
    asked_at: float = float("-inf")  # nothing that is in its answer is older
    request: Request | None = None
    size_bytes: int = 0
    tries: int = 0  # that came to nothing
    silences: int = 0  # those of them that got no answer at all
    held_back: int = 0  # how often there was no room to wait for its node
    silent: tuple[
        ClientLink, ...
    ] = ()  # where: the answer may come yet, if it is asked there again
    sent: bool = False
    parked: bool = False
    node: int = 0  # where its caller wishes it to go, once
    failure: KVError | None = None  # what the last try came to
    patience_s: float = 0.0  # of silence that is no sign of trouble: the answer may wait there

    def silence_s(self, try_timeout_s: float) -> float:
        """How long to wait for an answer before it is tried elsewhere."""
        return self.patience_s + try_timeout_s * (1 << min(self.silences, 4))

    @property
    def asks_for_now(self) -> bool:
        """The timestamp of its answer is the newest that there was, not one that the request named (a snapshot's)."""
        request = self.request
        if isinstance(request, Read | Scan):
            return not request.at and request.stale is None
        return isinstance(request, GetTimestamps)

    @property
    def is_stale(self) -> bool:
        """The timestamp of its answer may be as old as the reader allowed, as the transaction that it asks about, or as what a
        leader that gives a lock has last heard of."""
        request = self.request
        if isinstance(request, Read | Scan):
            return request.stale is not None
        return isinstance(request, Outcome | LockRead)

    def refused(self, failure: Failure) -> None:
        """A node said no, for now. Of a range that is led by nobody it knows: that is what its caller should learn."""
        code, details = failure.code, failure.details
        if code == "not_leader" and not number(details, "leader_node"):
            node = self.link.address if self.link is not None else "a node"
            self.failure = NoQuorum(
                f"range {self.range_id} has no leader: {node} answers, and knows of none. Most of its nodes must be up and "
                "reach each other; `kvctl status` tells which are not"
            )
        else:
            self.failure = from_wire(code, failure.message, details)

    def lost(self, error: KVError) -> None:
        """A node could not be reached. That others know of no leader is worth more than that."""
        if not isinstance(self.failure, NoQuorum):
            self.failure = error

    def hold_back(self) -> int:
        """Too much waits for its node already. There may be thousands, which must not ask all the time: returns how often its
        pause is to be doubled.
        """
        self.failure = Throttled(BLOCKED_RETRY_S, "too much waits to be sent to the node")
        self.held_back = min(HELD_BACK_MAX, self.held_back + 1)
        return self.held_back

    def goes(self, link: ClientLink, now: float) -> None:
        """The next try. It is a new question, but for a Prepare, whose answer is the first one's if that was taken."""
        self.link = link
        if link not in self.silent and self.request.__class__ is not Prepare:
            self.asked_at = now

    def unanswered(self) -> None:
        """A try got no answer in time. So it was taken, as far as anybody knows, and an overload before that is over."""
        self.silences += 1
        if self.link is not None and self.link not in self.silent:
            self.silent += (self.link,)
        if isinstance(self.failure, Throttled):
            told = self.failure.message
            self.failure = DeadlineExceeded(
                f"the call's time ran out without an answer; before: {told}"
            )

    def overdue(self) -> KVError:
        """What its caller is told when the time has run out: what a server said is worth more than that."""
        failure = self.failure
        if failure is None:
            return DeadlineExceeded()
        if isinstance(failure, Throttled | Unavailable | NotReady) or not failure.retryable:
            return failure
        return DeadlineExceeded(f"the call's time ran out: {failure.message}")


class Parked:
    """Calls that wait for a time to go on. One that is forgotten leaves when that comes."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Call]] = []
        self._sequence = 0

    def put(self, call: Call, when: float) -> None:
        call.parked = True
        self._sequence += 1
        heapq.heappush(self._heap, (when, self._sequence, call))

    def take(self, now: float) -> Call | None:
        """One whose time has come."""
        while self._heap and self._heap[0][0] <= now:
            call = heapq.heappop(self._heap)[2]
            if call.parked:
                call.parked = False
                return call
        return None

    def soonest(self) -> float:
        return self._heap[0][0] if self._heap else float("inf")


class ClientLink:
    """One node's connection: what waits to be sent to it, and what waits for its answers."""

    __slots__ = (
        "address",
        "blocked",
        "channel",
        "dialling",
        "dirty",
        "failures",
        "node",
        "not_before",
        "outgoing",
        "outgoing_bytes",
        "pending",
        "ready",
        "ready_bytes",
        "refused",
    )

    def __init__(self, address: str, node: int) -> None:
        self.address = address
        self.node = node  # 0: not known before the handshake
        self.channel: Channel | None = None
        self.dialling = False
        self.dirty = False  # it is in the router's list of links to flush
        self.failures = 0  # dials that failed in a row
        self.not_before = float("-inf")  # not to be dialled earlier
        self.outgoing: list[Request] = []  # of this turn
        self.outgoing_bytes = 0
        self.ready: deque[bytes] = (
            deque()
        )  # encoded messages, which the channel had no room for yet
        self.ready_bytes = 0
        self.blocked = False  # it had none, and is tried again soon
        self.pending: dict[int, Call] = {}
        self.refused: list[tuple[Call, KVError]] = []  # of no message: to be told why

    def opened(self, channel: Channel) -> None:
        self.channel = channel
        self.dialling = False
        self.failures = 0

    def ended(self) -> None:
        self.channel = None
        self.outgoing = []
        self.outgoing_bytes = 0
        self.ready.clear()
        self.ready_bytes = 0

    def seal(self) -> None:
        """What this turn has asked so far becomes one message."""
        if self.outgoing:
            for payload in payloads(_REQUESTS, self.outgoing, self._refuse):
                self.ready.append(payload)
                self.ready_bytes += len(payload)
            self.outgoing = []
            self.outgoing_bytes = 0

    def _refuse(self, request: Request, error: KVError) -> None:
        call = self.pending.pop(request.id, None)
        if call is not None:
            self.refused.append((call, error))

    def flush(self) -> int:
        """Hand over what the channel has room for; how many messages that was."""
        self.seal()
        sent = 0
        while self.ready and self.channel is not None and self.channel.send(self.ready[0]):
            self.ready_bytes -= len(self.ready.popleft())
            sent += 1
        return sent

    def usable(self, now: float) -> bool:
        return self.channel is not None or now >= self.not_before


class Links:
    """The nodes that we know, by address and by id."""

    def __init__(self) -> None:
        self.by_node: dict[int, ClientLink] = {}
        self._by_address: dict[str, ClientLink] = {}
        self._rotation = 0

    def __iter__(self) -> Iterator[ClientLink]:
        return iter(self._by_address.values())

    def __len__(self) -> int:
        return len(self._by_address)

    def at(self, address: str, node: int) -> ClientLink:
        """The link to an address; `node` (0: unknown) is who is there."""
        link = self._by_address.get(address)
        if link is None:
            link = self._by_address[address] = ClientLink(address, node)
        if node:
            link.node = node
            known = self.by_node.get(node)
            if known is None or known.channel is None:
                self.by_node[node] = link
        return link

    def add_hint(self, route: Route | None, request: Resolve) -> ClientLink | None:
        """Put it with what leaves this turn for the presumed leader, which is returned; None if there is no way just now."""
        link = self.by_node.get(route.leader) if route is not None else None
        if route is None or link is None or link.channel is None or link.ready_bytes:
            return None
        link.outgoing.append(_replace(request, range_id=route.range_id, version=route.version))
        keys = request.anchor_key, request.locus, request.start, request.end
        link.outgoing_bytes += sum(map(len, keys)) + REQUEST_OVERHEAD_BYTES
        return link

    def overdue(self, now: float) -> tuple[list[Call], float]:
        """Calls that were silent until they expired; and when the next one will have been."""
        soonest = float("inf")
        overdue: list[Call] = []
        for link in self:
            for call in link.pending.values():
                if call.expires <= now:
                    overdue.append(call)
                elif call.expires < soonest:
                    soonest = call.expires
        return overdue, soonest

    def learn(self, addresses: Iterable[tuple[int, str]]) -> None:
        """Where nodes are now. A connection that is up is kept, whatever its address is called."""
        for node, address in addresses:
            known = self.by_node.get(node)
            if known is None or (known.address != address and known.channel is None):
                self.by_node.pop(node, None)
                self.at(address, node)

    def hinted(self, details: Mapping[str, Any]) -> ClientLink | None:
        """The leader that a `not_leader` names, if it is known or its address was said too."""
        node = int(number(details, "leader_node") or number(details, "node"))
        known, address = self.by_node.get(node), details.get("address")
        if known is None and node and address and isinstance(address, str):
            return self.at(address, node)
        return known

    def for_call(self, call: Call, route: Route, now: float) -> ClientLink | None:
        """The link of the node that its caller wishes, at the first try; else of the presumed leader."""
        node, call.node = call.node, 0
        link = self.by_node.get(node) if node else None
        return link if link is not None and link.usable(now) else self.of_range(route, now)

    def of_range(self, route: Route, now: float) -> ClientLink | None:
        """The presumed leader's link, or that of another replica if it cannot be reached just now."""
        if not route.leader and route.nodes:
            self._rotation += 1
            route.leader = route.nodes[self._rotation % len(route.nodes)]
        node = route.leader
        for _ in range(len(route.nodes) + 1):
            link = self.by_node.get(node)
            if link is not None and link.usable(now):
                return link
            node = route.after(node)
        return None

    def anyone(self, now: float, *, strangers: bool = False) -> ClientLink | None:
        """Some node, each in its turn: one to which there is a connection, if possible.

        strangers: any that can be dialled as well; who is connected may not know what we want to know.
        """
        usable = [link for link in self if link.channel is not None or link.usable(now)]
        connected = [] if strangers else [link for link in usable if link.channel is not None]
        links = connected or usable
        if not links:
            return None
        self._rotation += 1
        return links[self._rotation % len(links)]


def undialled(address: str, error: Exception) -> KVError:
    """Why there is no connection; what nobody foresaw is told loudly, and the dial repeated as after any other failure."""
    if isinstance(error, KVError):
        return error
    if not isinstance(error, FrameError | OSError):
        log.error("dial failed unexpectedly", address=address, exc_info=error)
    return Unavailable(f"no connection to {address}: {error}")


def addressed(request: Request, call: Call) -> Request:
    """The request with the call's id, and the range and version that it goes to now."""
    kind = request.__class__
    if kind is GetTimestamps or kind is GetDirectory:
        return _replace(request, id=call.id)
    return _replace(request, id=call.id, range_id=call.range_id, version=call.version)


def number(details: Mapping[str, Any], name: str) -> float:
    """A field of a failure's details; 0 if it is absent or no number."""
    value = details.get(name, 0)
    return value if isinstance(value, int | float) else 0
