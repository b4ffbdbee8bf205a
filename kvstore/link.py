"""One connection between two processes: frames, handshake, bounded queue, pings and stalls. Sans-I/O.

A frame is a header (crc32c over all that is behind it, u32; flags u8, lane u16, a zero; little-endian) and a body of at
most 256 KiB. A message is one frame, or several with MORE on all but the last, up to `message_bytes_max`. Messages of one
lane arrive whole, once, in the order in which they were sent; two lanes share the connection frame by frame, so that
a large message in lane 1 does not hold up lane 0.

The dialling side says Hello first; the other answers with its own Hello, or refuses with a typed error.

Invariants
L1  Nothing is delivered before the handshake is done, nor from or after a frame that is damaged, too large, of an
    unknown kind or not legal in the present state: that is a FrameError and the end of the connection, of which the
    other side is told the reason (MalformedFrame).
L2  What waits to be sent is at most `queue_bytes_max`, and one ping, one pong, one hello or refusal; what waits to be
    reassembled at most `message_bytes_max` for each lane, in parts of at least MORE_BYTES_MIN. A message that was begun
    goes on within PART_STALLS times `stall_timeout_s`, or the peer is given up (PeerStalled), whatever else it sends.
L3  A side that sent or heard nothing for a while pings (at most two ping intervals pass). A peer from which nothing
    comes for `stall_timeout_s` after a ping left, or that takes nothing for so long while something waits, is given up
    (PeerStalled). A pause of our own process (a tick that comes late) is not held against the peer.

The owner calls `receive` for every frame, `take` for what to write, `blocked`, `progress` and `unblocked` as the wire
behaves, and `tick` at `deadline()`. A raised error closes the link; `take` may still hold a refusal: it should be sent.
"""

from __future__ import annotations

import enum
import struct
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec
from crc32c import crc32c

from kvstore.errors import (
    InvalidArgument,
    KVError,
    PipeClosed,
    VersionMismatch,
    WrongCluster,
    from_wire,
    to_wire,
)
from kvstore.limits import FRAME_BYTES_MAX, KIB, MESSAGE_BYTES_MAX, MIB
from replication.errors import FrameError
from replication.probes import reached

PROTOCOL_VERSION: Final = 3  # 3: a Prepare has no priority, its age has it
PROTOCOL_VERSION_MIN: Final = 3  # the oldest that this program still speaks

_HEADER = struct.Struct("<II")
HEADER_BYTES: Final = _HEADER.size
BODY_BYTES_MAX: Final = FRAME_BYTES_MAX
WIRE_BYTES_MAX: Final = HEADER_BYTES + BODY_BYTES_MAX
MORE_BYTES_MIN: Final = (
    4 * KIB
)  # a frame with MORE is not smaller: else tiny parts would bloat reassembly
HELLO_BYTES_MAX: Final = 16 * KIB
# A part of a message comes within so many `stall_timeout_s` of the one before: at most one frame of the other lane is
# between them, and before each of the two the peer may be silent for two ping intervals and a `stall_timeout_s`.
PART_STALLS: Final = 4
LANES: Final = 2
MESSAGE_OVERHEAD_BYTES: Final = (
    64  # what a queued message costs beyond its bytes, so that tiny ones are bounded too
)

MORE, PING, PONG, HELLO, REFUSE = (
    1,
    2,
    4,
    8,
    16,
)  # flags; no two of them together; 0 is the last frame of a message

_SEED: Final[
    Mapping[int, int]
] = {  # flags | lane << 8 -> crc32c of that half of the header, to go on from with the body
    flags | lane << 8: crc32c(struct.pack("<I", flags | lane << 8))
    for flags in (0, MORE, PING, PONG, HELLO, REFUSE)
    for lane in range(LANES)
}
_PLAIN_SEED: Final = _SEED[0]
_pack = _HEADER.pack
_unpack_from = _HEADER.unpack_from
_PING_BODY: Final = struct.Struct("<d")


T = TypeVar("T")


class WrongNode(KVError):
    """The node at that address is not the one that was dialled. Learn its address anew."""

    code = "wrong_node"
    retryable = True


class PeerStalled(PipeClosed):
    """The other side took or sent nothing for too long. What was sent last may or may not have arrived."""

    code = "peer_stalled"
    retryable = True
    maybe_committed = True


class MalformedFrame(PipeClosed):
    """The other side could not read what it got: damaged on the way, too large, or of another program. It ended the
    connection; a request that was on it may have been carried out.
    """

    code = "malformed_frame"


class Hello(msgspec.Struct, array_like=True, frozen=True):
    """What each side says first. Fields are only ever appended, with defaults."""

    protocol: int = PROTOCOL_VERSION  # the newest version spoken
    cluster: str = ""  # cluster id; empty: not known yet, or any
    node: int = 0  # node id; 0: a client, or not known yet
    kind: str = "client"  # "peer", "snapshot", "client"
    features: tuple[str, ...] = ()
    protocol_min: int = PROTOCOL_VERSION_MIN
    to: int = 0  # the node id that the dialling side wants; 0: whoever is there
    address: str = ""  # where the speaker can be dialled; empty: nowhere


class Refusal(msgspec.Struct, array_like=True, frozen=True):
    code: str
    message: str
    details: dict[str, Any]


@dataclass(frozen=True, slots=True)
class LinkLimits:
    queue_bytes_max: int = 32 * MIB
    message_bytes_max: int = MESSAGE_BYTES_MAX
    handshake_timeout_s: float = 3.0
    ping_interval_s: float = 1.25
    stall_timeout_s: float = 5.0

    def __post_init__(self) -> None:
        assert self.message_bytes_max + MESSAGE_OVERHEAD_BYTES <= self.queue_bytes_max
        assert 0 < 2 * self.ping_interval_s <= self.stall_timeout_s


class LinkState(enum.Enum):
    HELLO_SENT = "hello_sent"  # the dialling side waits for the answer
    EXPECT_HELLO = "expect_hello"  # the accepting side waits for the first word
    OPEN = "open"
    CLOSED = "closed"


LEGAL: Final = frozenset(  # a pair of state and flags that is not listed is the peer's error
    {
        (LinkState.HELLO_SENT, HELLO),
        (LinkState.HELLO_SENT, REFUSE),
        (LinkState.EXPECT_HELLO, HELLO),
        (LinkState.EXPECT_HELLO, REFUSE),
        (LinkState.OPEN, 0),
        (LinkState.OPEN, MORE),
        (LinkState.OPEN, PING),
        (LinkState.OPEN, PONG),
        (LinkState.OPEN, REFUSE),
    }
)


def agreed_version(mine: Hello, theirs: Hello) -> int | None:
    """The newest protocol version that both speak, or None."""
    newest = min(mine.protocol, theirs.protocol)
    return newest if newest >= max(mine.protocol_min, theirs.protocol_min) else None


def encode_frame(flags: int, lane: int, body: bytes | memoryview) -> bytes:
    kind = flags | lane << 8
    return _pack(crc32c(body, _SEED[kind]), kind) + body


class LinkCore:
    """One end of a connection.

    Args:
        dialler: this side speaks first. hello: what it says; its `to` is the node id wanted.
        check: asked by the accepting side about a Hello that is otherwise fine; an error it returns is the refusal.
    """

    __slots__ = (
        "_check", "_control", "_dialler", "_hello", "_lane", "_last_progress", "_last_received", "_last_sent",
        "_offset", "_part_at", "_part_bytes", "_parts", "_ping", "_pinged_at", "_queues", "_started", "_ticked", "_writing",
        "bytes_in", "bytes_out", "frames_in", "frames_out", "limits", "peer", "queue_bytes", "refused_sends",
        "rtt_s", "state", "version",
    )  # fmt: skip

    def __init__(
        self,
        *,
        dialler: bool,
        hello: Hello,
        limits: LinkLimits,
        now: float,
        check: Callable[[Hello], KVError | None] | None = None,
    ) -> None:
        self.limits = limits
        self.state = LinkState.HELLO_SENT if dialler else LinkState.EXPECT_HELLO
        self.peer: Hello | None = None
        self.version = 0  # the protocol version agreed upon
        self.queue_bytes = 0
        self.refused_sends = 0
        self.frames_in = self.frames_out = self.bytes_in = self.bytes_out = 0
        self.rtt_s = 0.0  # of the last ping; 0: none was answered yet
        self._dialler = dialler
        self._hello = hello
        self._check = check
        self._control: dict[int, bytes] = {}  # flag -> body: at most one of each waits
        self._queues: tuple[deque[bytes], ...] = tuple(deque() for _ in range(LANES))
        self._offset = [0] * LANES  # how much of the first message of a lane has been taken
        self._lane = 0  # the lane that was served last
        self._parts: tuple[list[bytes], ...] = tuple([] for _ in range(LANES))
        self._part_bytes = [0] * LANES
        self._part_at = [now] * LANES  # when the last part came, of a lane that waits for more
        self._ping: bytes | None = None  # body of the last ping, while it is not answered
        self._pinged_at: float | None = None  # when the first ping since the last frame was taken
        self._writing = False  # the wire holds up a frame that was taken
        self._started = self._ticked = now
        self._last_received = self._last_sent = self._last_progress = now
        if dialler:
            self._control[HELLO] = msgspec.msgpack.encode(hello)

    # --- sending ----------------------------------------------------------------------------------------------

    def send(self, payload: bytes, now: float, lane: int = 0) -> bool:
        """Queue a message. False: not open, or the queue has no room for it; nothing was queued.

        Raises: InvalidArgument: larger than `message_bytes_max`.
        """
        size = len(payload)
        if size > self.limits.message_bytes_max:
            raise InvalidArgument(
                f"a message of {size} bytes; at most {self.limits.message_bytes_max}"
            )
        if self.state is not LinkState.OPEN:
            return False
        queued = self.queue_bytes + size + MESSAGE_OVERHEAD_BYTES
        if queued > self.limits.queue_bytes_max:
            self.refused_sends += 1
            return False
        if not self._waits():
            self._last_progress = now
        self.queue_bytes = queued
        self._queues[lane].append(payload)
        return True

    def direct(self, payload: bytes, now: float) -> bytes | None:
        """`send` and `take` in one, for lane 0 when nothing waits and one frame is enough; else None: use `send`."""
        if self.queue_bytes or self._control or self._writing or self.state is not LinkState.OPEN:
            return None
        size = len(payload)
        if size > BODY_BYTES_MAX or size > self.limits.message_bytes_max:
            return None
        self._last_sent = now
        self.frames_out += 1
        self.bytes_out += HEADER_BYTES + size
        return _pack(crc32c(payload, _PLAIN_SEED), 0) + payload

    def take(self, now: float) -> bytes | None:
        """The next frame to write, or None. What it held is not in `queue_bytes` any more."""
        if self._control:
            return self._take_control(now)
        if not self.queue_bytes:
            return None
        lane = (self._lane + 1) % LANES
        if not self._queues[lane]:
            lane = self._lane
        self._lane = lane
        queue, offset = self._queues[lane], self._offset[lane]
        payload = queue[0]
        left = len(payload) - offset
        if left > BODY_BYTES_MAX:
            body = memoryview(payload)[offset : offset + BODY_BYTES_MAX]
            self._offset[lane] = offset + BODY_BYTES_MAX
            self.queue_bytes -= BODY_BYTES_MAX
            return self._out(encode_frame(MORE, lane, body), now)
        queue.popleft()
        self._offset[lane] = 0
        self.queue_bytes -= left + MESSAGE_OVERHEAD_BYTES
        return self._out(
            encode_frame(0, lane, memoryview(payload)[offset:] if offset else payload), now
        )

    def _take_control(self, now: float) -> bytes:
        flag, body = next(iter(self._control.items()))
        del self._control[flag]
        if flag == PING and self._pinged_at is None:
            self._pinged_at = now
        return self._out(encode_frame(flag, 0, body), now)

    def _out(self, frame: bytes, now: float) -> bytes:
        self._last_sent = now
        self.frames_out += 1
        self.bytes_out += len(frame)
        return frame

    def has_output(self) -> bool:
        return bool(self._control) or self.queue_bytes > 0

    def blocked(self, now: float) -> None:
        """The wire holds up a frame that was taken: `stall_timeout_s` counts until `progress` or `unblocked`."""
        if not self._waits():
            self._last_progress = now
        self._writing = True

    def progress(self, now: float) -> None:
        """The wire took something."""
        self._last_progress = now

    def unblocked(self, now: float) -> None:
        self._last_progress = now
        self._writing = False

    def _waits(self) -> bool:
        return self.queue_bytes > 0 or self._writing or bool(self._control)

    def refuse(self, error: KVError) -> None:
        """Say why, and close: what waits is dropped, and `take` gives the refusal."""
        code, message, details = to_wire(error)
        self.close()
        self._control[REFUSE] = msgspec.msgpack.encode(Refusal(code, message[:1000], details))

    def close(self) -> None:
        """Nothing is sent or delivered any more. May be called again."""
        self.state = LinkState.CLOSED
        self.queue_bytes = 0
        self._control.clear()
        for lane in range(LANES):
            self._queues[lane].clear()
            self._parts[lane].clear()
            self._offset[lane] = self._part_bytes[lane] = 0

    def _fail(self, what: str) -> FrameError:
        if self.state is not LinkState.CLOSED:
            self.refuse(MalformedFrame(what))
        return FrameError(what)

    # --- receiving --------------------------------------------------------------------------------------------

    def receive(self, frame: bytes, now: float) -> bytes | None:
        """One frame from the wire; the message that it completes, or None.

        Raises (closed from then on): FrameError. VersionMismatch, WrongCluster, WrongNode and whatever `check` gave,
        on both sides of a refusal. PipeClosed: closed already.
        """
        size = len(frame)
        if not HEADER_BYTES <= size <= WIRE_BYTES_MAX:
            raise self._fail(f"a frame of {size} bytes")
        crc, kind = _unpack_from(frame)
        seed = _SEED.get(kind)
        if seed is None:
            raise self._fail(f"a frame of the unknown kind {kind:#x}")
        body = frame[HEADER_BYTES:]
        if crc32c(body, seed) != crc:
            raise self._fail("a frame's checksum is wrong")
        self._last_received = now
        self._pinged_at = None
        self.frames_in += 1
        self.bytes_in += size
        flags, lane = kind & 0xFF, kind >> 8
        if not flags and self.state is LinkState.OPEN and not self._parts[lane]:
            return body
        if self.state is LinkState.CLOSED:
            raise PipeClosed("the link is closed")
        if (self.state, flags) not in LEGAL:
            raise self._fail(f"flags {flags:#x} in state {self.state.value}")
        if flags == 0:
            return self._on_last(body, lane)
        if flags == MORE:
            self._on_part(body, lane, now)
        elif flags == PING:
            self._on_ping(body, now)
        elif flags == PONG:
            self._on_pong(body, now)
        elif flags == HELLO:
            self._on_hello(body, now)
        else:
            self._on_refusal(body)
        return None

    def _on_part(self, body: bytes, lane: int, now: float) -> None:
        if len(body) < MORE_BYTES_MIN:
            raise self._fail(f"a part of {len(body)} bytes")
        self._part_at[lane] = now
        self._add_part(body, lane)

    def _on_last(self, body: bytes, lane: int) -> bytes:
        parts = self._parts[lane]
        self._add_part(body, lane)
        message = b"".join(parts)
        parts.clear()
        self._part_bytes[lane] = 0
        return message

    def _add_part(self, body: bytes, lane: int) -> None:
        self._part_bytes[lane] += len(body)
        if self._part_bytes[lane] > self.limits.message_bytes_max:
            raise self._fail("a message is too large")
        self._parts[lane].append(body)

    def _on_ping(self, body: bytes, now: float) -> None:
        if len(body) != _PING_BODY.size:
            raise self._fail("a ping of a wrong length")
        if not self._waits():
            self._last_progress = now
        self._control[PONG] = body

    def _on_pong(self, body: bytes, now: float) -> None:
        if body != self._ping:
            return  # of an older ping
        self._ping = None
        (sent_at,) = _PING_BODY.unpack(body)
        self.rtt_s = max(0.0, now - sent_at)

    def _on_hello(self, body: bytes, now: float) -> None:
        theirs = self._decode(body, Hello)
        error = self._judge(theirs)
        if error is not None:
            self.refuse(error)  # the other side learns why, whichever it is
            raise error
        self.peer = theirs
        self.version = agreed_version(self._hello, theirs) or 0
        self.state = LinkState.OPEN
        self._ticked = self._last_progress = now
        if not self._dialler:
            self._control[HELLO] = msgspec.msgpack.encode(self._hello)

    def _on_refusal(self, body: bytes) -> None:
        refusal = self._decode(body, Refusal)
        self.close()
        raise from_wire(refusal.code, refusal.message, refusal.details)

    def _judge(self, theirs: Hello) -> KVError | None:
        mine = self._hello
        if agreed_version(mine, theirs) is None:
            return VersionMismatch(
                f"protocol versions {mine.protocol_min} to {mine.protocol} here, "
                f"{theirs.protocol_min} to {theirs.protocol} there"
            )
        if mine.cluster and theirs.cluster and mine.cluster != theirs.cluster:
            return WrongCluster(f"cluster {mine.cluster} here, {theirs.cluster} there")
        wanted, found = (mine.to, theirs.node) if self._dialler else (theirs.to, mine.node)
        if wanted and wanted != found:
            return WrongNode(f"node {wanted} was dialled, but this is node {found}")
        return self._check(theirs) if self._check is not None else None

    def _decode(self, body: bytes, kind: type[T]) -> T:
        if len(body) > HELLO_BYTES_MAX:
            raise self._fail(f"a handshake of {len(body)} bytes")
        try:
            return msgspec.msgpack.decode(body, type=kind)
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise self._fail(f"a malformed handshake: {error}") from error

    # --- time -------------------------------------------------------------------------------------------------

    def deadline(self) -> float | None:
        """When to call `tick`. Once the link is open, a later deadline is never before one that was given earlier."""
        if self.state is LinkState.CLOSED:
            return None
        if self.state is not LinkState.OPEN:
            return self._started + self.limits.handshake_timeout_s
        at = self._ticked + self.limits.ping_interval_s
        if self._pinged_at is not None:
            at = min(at, self._pinged_at + self.limits.stall_timeout_s)
        if self._waits():
            at = min(at, self._last_progress + self.limits.stall_timeout_s)
        return at

    def tick(self, now: float) -> None:
        """Ping when due. Raises PeerStalled: the handshake, the writer, the reader or a message came to nothing in time."""
        due = self.deadline()
        if due is None or now < due:
            return
        limits = self.limits
        if self.state is not LinkState.OPEN:
            self.close()
            raise PeerStalled(f"no handshake within {limits.handshake_timeout_s:g} s")
        self._ticked = now
        if now - due > limits.ping_interval_s:  # we were paused, not the peer
            self._last_progress = now
            self._pinged_at = None
            self._part_at = [now] * LANES
        elif self._waits() and now - self._last_progress >= limits.stall_timeout_s:
            reached("peer_takes_nothing")
            waiting = self.queue_bytes
            self.close()
            raise PeerStalled(
                f"nothing was taken for {limits.stall_timeout_s:g} s; {waiting} bytes wait"
            )
        elif self._pinged_at is not None and now - self._pinged_at >= limits.stall_timeout_s:
            reached("peer_silent")
            self.close()
            raise PeerStalled(f"nothing came for {limits.stall_timeout_s:g} s, pings unanswered")
        elif self._unfinished(now - PART_STALLS * limits.stall_timeout_s):
            self.close()
            limit_s = PART_STALLS * limits.stall_timeout_s
            raise PeerStalled(f"a message that was begun did not go on for {limit_s:g} s")
        quiet_since = min(self._last_sent, self._last_received)
        if now - quiet_since >= limits.ping_interval_s / 2 and PING not in self._control:
            if not self._waits():
                self._last_progress = now
            self._ping = self._control[PING] = _PING_BODY.pack(now)

    def _unfinished(self, since: float) -> bool:
        """Whether a message was begun, and no part of it has come since then."""
        return any(
            parts and at <= since for parts, at in zip(self._parts, self._part_at, strict=True)
        )
