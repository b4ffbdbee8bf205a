"""Clients of this node: requests come in as whole messages, answers leave once a turn, one message for each connection.

Nobody's answers wait in memory: what a client reads faster than it takes it is told Throttled, as far as the bounded queue
has no room; a client that does not even take that, or the answers to its writes, is cut off. One that asks for more than
`requests_max` things at once is told Throttled, so that it cannot take all that the node has room for; polls of watches that
wait are not counted.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from kvstore.errors import KVError
from kvstore.payloads import payloads
from kvstore.store import Store
from kvstore.streams import Stream
from replication.errors import FrameError
from txn.messages import (
    Changed,
    Failure,
    PrepareReply,
    ReadReply,
    Reply,
    Request,
    ScanReply,
    Validated,
)

REQUESTS: Final = 2  # the first byte of a message
REPLIES: Final = b"\x03"
REQUESTS_MAX: Final = 10_000  # in flight, of one connection
REQUESTS_PER_MESSAGE_MAX: Final = (
    16_384  # a client cuts its messages at 1 MiB, and counts 96 bytes for a request
)
UNSENDABLE: Final = "the answer is too large for a message, or nothing that one can hold"
RETRY_AFTER_S: Final = 0.02
MESSAGE_BYTES: Final = 4 << 20  # a message of answers is cut when it has grown to about this
ROW_OVERHEAD_BYTES: Final = 20  # of a row in an answer: its version, and three lengths
KEPT_BYTES: Final = 2 << 20  # of the queue, which large answers to reads leave to all others
FULL: Final = "this connection has no room for the answer until earlier ones were taken"
FULL_RETRY_AFTER_S: Final = 0.1  # the client takes megabytes first
FAILURE_BYTES: Final = 256  # more than the answer that says so

_decode: Final = msgspec.msgpack.Decoder(
    Annotated[list[Request], msgspec.Meta(max_length=REQUESTS_PER_MESSAGE_MAX)]
)


class ClientConnection:
    """One client's stream. The store's Asker."""

    __slots__ = ("_connections", "_open", "_replies", "_store", "_stream")

    def __init__(self, connections: Connections, store: Store, stream: Stream) -> None:
        self._connections = connections
        self._store = store
        self._stream = stream
        self._replies: list[Reply] = []
        self._open = 0  # requests that are not answered, polls among them

    @property
    def queue_bytes(self) -> int:
        """What waits to be sent."""
        return self._stream.queue_bytes

    def on_message(self, payload: bytes) -> None:
        """Raises FrameError for what is not a list of requests, or too long a one: the stream ends, the node goes on."""
        if not payload or payload[0] != REQUESTS:
            raise FrameError("not a message of requests")
        try:
            requests = _decode.decode(memoryview(payload)[1:])
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise FrameError(f"requests do not decode: {error}") from error
        self._open += len(requests)
        excess = self._open - self._connections.requests_max
        if excess > 0:
            excess -= self._store.polls.of(self)  # they wait for long, and do not count as load
        if excess > 0:
            self._refuse(requests[-excess:])
            requests = requests[:-excess]
        self._store.accept(self, requests, len(payload))

    def _refuse(self, requests: list[Request]) -> None:
        self._connections.throttled += len(requests)
        reason = "this connection has too many requests in flight"
        for request in requests:
            self.answer(Failure(request.id, "throttled", reason, {"retry_after": RETRY_AFTER_S}))
        self._store.wake()

    def answer(self, reply: Reply) -> None:
        self._open -= 1
        if not reply.id:  # a hint: nobody waits for its answer
            return
        if not self._replies:
            self._connections.dirty.append(self)
        self._replies.append(reply)

    def flush(self) -> None:
        replies, self._replies = self._replies, []
        refused: list[Reply] = []

        def refuse(reply: Reply, _error: KVError) -> None:
            refused.append(reply)

        while replies:
            for part, size in _parts(replies):
                self._shed(part, size)
                for payload in payloads(REPLIES, part, refuse):
                    if not self._stream.send(payload) and self._stream.is_open:
                        self._connections.cut_off += 1
                        self._stream.abort()
                        return
            replies = [Failure(each.id, "internal_error", UNSENDABLE) for each in refused]
            refused.clear()

    def _shed(self, part: list[Reply], size: int) -> None:
        """What does not fit beside what waits can be read again: of such answers, the largest become small failures.

        An answer to a write never does: its asker could not tell what has happened. Nothing is shed from an empty queue,
        so however small that is, who asks again gets something each time.
        """
        stream = self._stream
        excess = size + KEPT_BYTES - stream.room_bytes
        if excess <= 0 or not stream.queue_bytes:
            return
        sizes = [
            _size_of(reply) if isinstance(reply, (ReadReply, ScanReply, Changed)) else 0
            for reply in part
        ]
        for place in sorted(range(len(part)), key=sizes.__getitem__, reverse=True):
            if excess <= 0 or sizes[place] <= FAILURE_BYTES:
                return
            details = {"retry_after": FULL_RETRY_AFTER_S}
            part[place] = Failure(part[place].id, "throttled", FULL, details)
            self._connections.throttled += 1
            excess -= sizes[place] - FAILURE_BYTES


class Connections:
    """All clients of a node."""

    def __init__(self, requests_max: int = REQUESTS_MAX) -> None:
        self.requests_max = requests_max
        self.throttled = 0
        self.dirty: list[ClientConnection] = []
        self.open: dict[int, ClientConnection] = {}
        self.cut_off = 0
        self.malformed = 0  # streams of any kind that ended because of what was sent on them

    def add(self, store: Store, stream: Stream) -> None:
        connection = ClientConnection(self, store, stream)
        self.open[id(connection)] = connection
        stream.on_close = lambda _error: self._forget(connection)
        stream.on_message = connection.on_message

    def _forget(self, connection: ClientConnection) -> None:
        self.open.pop(id(connection), None)

    def flush(self) -> None:
        """Send what was answered this turn."""
        dirty, self.dirty = self.dirty, []
        for connection in dirty:
            connection.flush()


def _parts(replies: list[Reply]) -> list[tuple[list[Reply], int]]:
    """Cut so that no message is too large, with about the bytes of each; nearly always it is one."""
    parts: list[tuple[list[Reply], int]] = []
    part: list[Reply] = []
    size = 0
    for reply in replies:
        taken = _size_of(reply)
        if part and size + taken > MESSAGE_BYTES:
            parts.append((part, size))
            part, size = [], 0
        part.append(reply)
        size += taken
    parts.append((part, size))
    return parts


def _size_of(reply: Reply) -> int:
    """About the bytes of what may be long in it: a message that the stream refuses ends the node."""
    if isinstance(reply, Validated):
        return len(reply.key)
    if isinstance(reply, PrepareReply):
        return len(reply.key) + (sum(map(len, reply.results)) if reply.results else 0)
    if not isinstance(reply, (ReadReply, ScanReply, Changed)):
        return 0
    size = ROW_OVERHEAD_BYTES * len(reply.versions)
    size += sum(len(value) for value in reply.values if value is not None)
    return size if isinstance(reply, ReadReply) else size + sum(map(len, reply.keys))
