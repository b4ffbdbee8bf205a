"""The snapshot stream: how a group's state travels to a replica that the log can no longer bring up to date. Pure.

    sender                                receiver
    Chunk 0: the offer (meta, term)      ->
                                          <- Credit(n): chunks below n may be sent; or End(installed=False, reason)
    Chunk 1, 2, ... with data            ->
                                          <- Credit(n) as chunks are taken, slower if the throttle says so
    Chunk last: no data, last=True       ->
                                          <- End(installed=True) when state and log are durable

Nothing is destroyed before the receiver's core would take the offered snapshot, and nothing large is sent before it
said so. A chunk's checksum (crc32c) runs over its address and its data and all chunks before it, so that a damaged,
lost, doubled or foreign chunk shows; then the stream has failed as a whole and a new one begins at 0.

`Wanted` is the other way round: a replica that has lost its state (a crash while it installed) asks its leader, who
may think that the log is all it needs.

Both sides give up after `timeout_s` without progress. The sender counts only as long as it waits for the receiver,
and the throttle withholds credit for half of that at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import crc32c
import msgspec

from replication.errors import FrameError, ReplicationError
from replication.types import SnapshotMeta

KIB: Final = 1024


@dataclass(frozen=True)
class SnapshotLimits:
    """Bounds of one stream, and of all that a node receives."""

    window_chunks: int = (
        8  # that may be under way; a chunk has at most 256 KiB unless one row is larger
    )
    chunk_bytes_max: int = 9 * KIB * KIB  # larger than any row
    rate_bytes_s: float = 64.0 * KIB * KIB  # that a node takes, over all its streams
    burst_bytes: int = 4 * KIB * KIB
    timeout_s: float = 10.0
    receiving_max: int = 2  # streams that a node takes at a time
    inbox_frames_max: int = 64  # arrived and not looked at


class Offer(msgspec.Struct, array_like=True, frozen=True):
    """What the first chunk holds: for whom, from whom, and where the snapshot stands."""

    to: int
    sender: int
    term: int  # the sender's, when it began
    meta: SnapshotMeta


class Chunk(msgspec.Struct, array_like=True, frozen=True, tag=1):
    group: int
    snapshot: int  # the stream's id, the sender's own counter
    sequence: int
    checksum: int
    last: bool
    data: bytes  # the first chunk's is the encoded offer; the last chunk has none


class Credit(msgspec.Struct, array_like=True, frozen=True, tag=2, gc=False):
    group: int
    snapshot: int
    upto: int  # chunks with a sequence below this may be sent


class End(msgspec.Struct, array_like=True, frozen=True, tag=3, gc=False):
    group: int
    snapshot: int
    installed: bool
    reason: str = ""


class Wanted(msgspec.Struct, array_like=True, frozen=True, tag=4, gc=False):
    group: int
    to: int
    sender: int


Frame = Chunk | Credit | End | Wanted

encode = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Frame).decode
_decode_offer: Final = msgspec.msgpack.Decoder(Offer).decode


class SnapshotBroken(ReplicationError):
    """The stream is damaged or incomplete: nothing of it counts. A new one begins at its first chunk."""


def decode(payload: bytes) -> Frame:
    """Raises: FrameError for bytes that are no frame of this protocol."""
    try:
        frame: Frame = _decode(payload)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise FrameError(f"not a snapshot frame: {error}") from None
    return frame


def checksum(previous: int, group: int, snapshot: int, sequence: int, data: bytes) -> int:
    """crc32c over the stream so far, a chunk's address, and its data."""
    address = b"%d,%d,%d" % (group, snapshot, sequence)
    return crc32c.crc32c(data, crc32c.crc32c(address, previous))


class SnapshotSender:
    """One stream to one replica. The owner asks `may_send`, feeds `next_frame`, and watches `outcome`."""

    def __init__(
        self,
        *,
        group: int,
        snapshot: int,
        node: int,
        offer: Offer,
        limits: SnapshotLimits,
        now: float,
    ) -> None:
        self.group, self.snapshot, self.node, self.offer = group, snapshot, node, offer
        self.outcome: bool | None = None
        self.reason = ""
        self._limits = limits
        self._sequence = 0  # of the next chunk
        self._upto = 1  # the offer alone goes without credit
        self._checksum = 0
        self._last_sent = False
        self._deadline = now + limits.timeout_s

    def may_send(self) -> bool:
        """Whether the receiver has room for the next chunk, and there may be one."""
        return self.outcome is None and not self._last_sent and self._sequence < self._upto

    @property
    def offering(self) -> bool:
        """The next frame is the offer: `next_frame` takes no data."""
        return self._sequence == 0

    @property
    def offered(self) -> bool:
        """The offer alone was framed so far."""
        return self._sequence == 1

    def next_frame(self, data: bytes | None, now: float) -> bytes:
        """Frame the next chunk of the state; None: that was all. The first call frames the offer."""
        assert self.may_send()
        sequence = self._sequence
        last = data is None and sequence > 0
        body = encode(self.offer) if sequence == 0 else data or b""
        assert len(body) <= self._limits.chunk_bytes_max
        self._checksum = checksum(self._checksum, self.group, self.snapshot, sequence, body)
        self._sequence += 1
        self._last_sent = last
        self._deadline = now + self._limits.timeout_s
        return encode(Chunk(self.group, self.snapshot, sequence, self._checksum, last, body))

    def receive(self, frame: Credit | End, now: float) -> None:
        """The receiver's word. What belongs to another stream is ignored."""
        if frame.snapshot != self.snapshot or frame.group != self.group or self.outcome is not None:
            return
        if isinstance(frame, End):
            self.outcome, self.reason = frame.installed, frame.reason
        elif frame.upto > self._upto:
            self._upto = min(frame.upto, self._sequence + self._limits.window_chunks)
            self._deadline = now + self._limits.timeout_s

    def fail(self, reason: str) -> None:
        if self.outcome is None:
            self.outcome, self.reason = False, reason

    def deadline(self) -> float | None:
        return self._deadline if self.outcome is None else None

    def tick(self, now: float) -> None:
        if now >= self._deadline:
            self.fail("no progress")


class Throttle:
    """A bucket of bytes that all streams into a node share: it says when the next chunk may be asked for."""

    def __init__(self, rate_bytes_s: float, burst_bytes: int) -> None:
        self._rate, self._burst = rate_bytes_s, float(burst_bytes)
        self._level, self._at = self._burst, 0.0

    def take(self, size_bytes: int, now: float) -> float:
        """`size_bytes` have come in; the time from which more are welcome (not later than now: at once)."""
        self._level = min(self._burst, self._level + max(0.0, now - self._at) * self._rate)
        self._at = now
        self._level -= size_bytes
        return now if self._level >= 0 else now - self._level / self._rate


class SnapshotReceiver:
    """One stream from one node: verifies chunks in order and gives credit as they are taken."""

    def __init__(self, first: Chunk, node: int, limits: SnapshotLimits, now: float) -> None:
        """Raises: SnapshotBroken when `first` is not an intact offer."""
        if first.sequence != 0 or first.last:
            raise SnapshotBroken("a stream begins with its offer")
        self.group, self.snapshot, self.node = first.group, first.snapshot, node
        self.complete = False
        self._limits = limits
        self._sequence = 0
        self._checksum = 0
        self._credited = 1
        self._deadline: float | None = None
        self._credit_at: float | None = now
        self._window = limits.window_chunks  # how much is credited then
        self._verify(first, now)
        try:
            self.offer = _decode_offer(first.data)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise SnapshotBroken(f"not an offer: {error}") from None

    def receive(self, chunk: Chunk, now: float) -> bytes:
        """The data of the next chunk, verified; empty at the end, and then `complete` is set.

        Raises: SnapshotBroken for a damaged, missing, doubled or unasked-for chunk.
        """
        if self.complete:
            raise SnapshotBroken("a chunk after the end")
        if chunk.sequence >= self._credited:
            raise SnapshotBroken(f"chunk {chunk.sequence} was not asked for")
        if chunk.last and chunk.data:
            raise SnapshotBroken("the last chunk carries no data")
        self._verify(chunk, now)
        self.complete = chunk.last
        return chunk.data

    def taken(self, welcome_at: float) -> None:
        """The owner has stored the chunk; the throttle wants no more before `welcome_at`.

        If that is so late that either side would give the stream up, one chunk is welcome halfway: a broken stream costs
        the state, which is worse than a rate that is exceeded for a while.
        """
        assert self._deadline is not None
        latest = self._deadline - self._limits.timeout_s / 2
        self._window = self._limits.window_chunks if welcome_at <= latest else 1
        self._credit_at = None if self.complete else min(welcome_at, latest)

    def credit(self, now: float) -> Credit | None:
        """More room, when it is time to say so."""
        if self._credit_at is None or now < self._credit_at:
            return None
        self._credit_at = None
        upto = self._sequence + self._window
        if upto <= self._credited:
            return None
        self._credited = upto
        return Credit(self.group, self.snapshot, upto)

    def credited(self) -> Credit:
        """What was said last, once more."""
        return Credit(self.group, self.snapshot, self._credited)

    def deadline(self) -> float | None:
        """When to ask for credit or to give up; None once complete."""
        if self.complete or self._deadline is None:
            return None
        return self._deadline if self._credit_at is None else min(self._credit_at, self._deadline)

    def expired(self, now: float) -> bool:
        """No chunk came for too long."""
        return not self.complete and self._deadline is not None and now >= self._deadline

    def _verify(self, chunk: Chunk, now: float) -> None:
        if chunk.sequence != self._sequence:
            raise SnapshotBroken(f"chunk {chunk.sequence} instead of {self._sequence}")
        if len(chunk.data) > self._limits.chunk_bytes_max:
            raise SnapshotBroken(f"chunk {chunk.sequence} has {len(chunk.data)} bytes")
        expected = checksum(self._checksum, chunk.group, chunk.snapshot, chunk.sequence, chunk.data)
        if chunk.checksum != expected:
            raise SnapshotBroken(f"the checksum of chunk {chunk.sequence} does not match")
        self._checksum = expected
        self._sequence += 1
        self._deadline = now + self._limits.timeout_s
