"""Streams: messages over one connection, without ever blocking on a slow peer; and links that keep one alive.

The asyncio shell of `kvstore.link`. A stream has one reader task and one timer; `send` hands frames straight to the
wire while that takes them, and only when it does not is there a writer task (one), which goes on with the queue.
What the queue has no room for is refused by `send`, never waited for. A stream is always read, whatever it sends.

`connect` and `accept` do the handshake. A `PeerLink` dials an address again and again, with a growing pause, and
says when a stream is up or down.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kvstore import logs
from kvstore.errors import KVError, PipeClosed
from kvstore.link import (
    MESSAGE_OVERHEAD_BYTES,
    Hello,
    LinkCore,
    LinkLimits,
    LinkState,
    MalformedFrame,
    PeerStalled,
)
from kvstore.ports import FramePipe, Network
from replication.errors import FrameError

REFUSAL_LINGER_S: Final = 0.5  # how long a refusal may take to leave before the connection is cut

OnMessage = Callable[[bytes], None]
OnClose = Callable[[Exception | None], None]
Check = Callable[[Hello], KVError | None]

log = logs.logger(__name__)


class Stream:
    """One connection after its handshake. Made by `connect` and `accept`.

    Reading begins when `on_message` is set (soon: a stream that is never read ends as stalled); it is called with every
    whole message, in order, and must not block. `on_close` is called once,
    from the loop, never from within `send`: with None after our own `close` or `abort`, else with what ended it
    (PipeClosed, PeerStalled, FrameError, the error that the peer gave as its reason, or what `on_message` raised).
    """

    __slots__ = (
        "_buffered", "_closed", "_closing", "_core", "_ended", "_loop", "_monotonic", "_on_close", "_on_message",
        "_pipe", "_reader", "_timer", "_writer", "error", "peer",
    )  # fmt: skip

    def __init__(self, pipe: FramePipe, core: LinkCore, monotonic: Callable[[], float]) -> None:
        assert core.peer is not None, "the handshake comes first"
        self.peer: Hello = core.peer
        self.error: Exception | None = None  # what ended it
        self._pipe = pipe
        self._core = core
        self._monotonic = monotonic
        self._loop = asyncio.get_running_loop()
        self._on_message: OnMessage | None = None
        self._on_close: OnClose | None = None
        self._reader: asyncio.Task[None] | None = None
        self._writer: asyncio.Task[None] | None = (
            None  # only while the wire does not take all at once
        )
        self._timer: asyncio.TimerHandle | None = None
        self._buffered = 0  # what the pipe held at the last tick
        self._closing = False
        self._ended = False
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._arm()

    @property
    def on_message(self) -> OnMessage | None:
        return self._on_message

    @on_message.setter
    def on_message(self, callback: OnMessage) -> None:
        self._on_message = callback
        if self._reader is None and not self._ended:
            self._reader = self._loop.create_task(self._read())

    @property
    def on_close(self) -> OnClose | None:
        return self._on_close

    @on_close.setter
    def on_close(self, callback: OnClose) -> None:
        self._on_close = callback
        if self._closed.done():
            self._loop.call_soon(callback, self.error)

    @property
    def version(self) -> int:
        """The protocol version agreed upon."""
        return self._core.version

    @property
    def is_open(self) -> bool:
        return not self._closing and not self._ended

    @property
    def queue_bytes(self) -> int:
        """What waits in our queue; what the pipe still holds is not in it."""
        return self._core.queue_bytes

    @property
    def room_bytes(self) -> int:
        """The largest message that `send` would queue now; what the wire takes at once comes on top."""
        return self._core.limits.queue_bytes_max - self._core.queue_bytes - MESSAGE_OVERHEAD_BYTES

    @property
    def rtt_s(self) -> float:
        """Round trip of the last answered ping; 0: none yet."""
        return self._core.rtt_s

    def stats(self) -> dict[str, float]:
        """Counters since the connection began, for metrics."""
        core = self._core
        return {
            "frames_in": core.frames_in,
            "frames_out": core.frames_out,
            "bytes_in": core.bytes_in,
            "bytes_out": core.bytes_out,
            "refused_sends": core.refused_sends,
            "queue_bytes": core.queue_bytes,
            "rtt_s": core.rtt_s,
        }

    def send(self, payload: bytes, lane: int = 0) -> bool:
        """Send a message; never blocks. False: closed, or no room in the queue; nothing was queued.

        True says only that it was queued. Messages of one lane stay in order. Raises: InvalidArgument: too large.
        """
        if self._closing:
            return False
        now = self._monotonic()
        if self._writer is None and not lane:
            frame = self._core.direct(payload, now)
            if frame is not None:
                self._hand_over(frame, now)
                return True
        if not self._core.send(payload, now, lane):
            return False
        if self._writer is None:
            self._pump()
        return True

    def abort(self) -> None:
        """End it at once; what is queued is lost. May be called again."""
        self._end(None)

    async def close(self, timeout_s: float = 1.0, reason: KVError | None = None) -> None:
        """Send what is queued, tell the peer the reason, then end; at the latest after `timeout_s`."""
        if self._closing or self._ended:
            return
        self._closing = True
        until = self._loop.time() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                while self._writer is not None:
                    await self._writer
            if reason is not None and not self._ended:
                self._core.refuse(reason)
                self._pump()
            await self._pipe.close(max(0.0, until - self._loop.time()))
        except TimeoutError:
            pass  # the rest is lost
        finally:
            self._end(None)

    async def wait_closed(self) -> Exception | None:
        """Return what ended it (see `on_close`) when it has ended."""
        await asyncio.shield(self._closed)
        return self.error

    # --- inside -----------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Hand frames to the wire until it takes no more; from there on the writer task does it."""
        now = self._monotonic()
        while self._writer is None and (frame := self._core.take(now)) is not None:
            self._hand_over(frame, now)

    def _hand_over(self, frame: bytes, now: float) -> None:
        try:
            if not self._pipe.try_send(frame):
                self._core.blocked(now)
                self._writer = self._loop.create_task(self._write(frame))
        except PipeClosed as error:
            self._end(error)

    async def _write(self, frame: bytes | None) -> None:
        core, pipe = self._core, self._pipe
        try:
            while frame is not None:
                await pipe.send(frame)
                now = self._monotonic()
                core.unblocked(now)
                while (frame := core.take(now)) is not None and pipe.try_send(frame):
                    pass
                if frame is not None:
                    core.blocked(now)
        except PipeClosed as error:
            self._end(error)
        finally:
            self._writer = None

    async def _read(self) -> None:
        core, receive, monotonic = self._core, self._pipe.receive, self._monotonic
        on_message = self._on_message
        assert on_message is not None
        try:
            while not self._ended:
                message = core.receive(await receive(), monotonic())
                if message is not None:
                    on_message(message)
                elif self._writer is None and core.has_output():
                    self._pump()
        except FrameError as error:
            await self._say_why(error)
        except KVError as error:
            self._end(error)
        except Exception as error:
            self._end(error)
            raise  # a fault of the callback: let the loop report it

    async def _say_why(self, error: FrameError) -> None:
        """Tell the peer what was wrong with its words, for a bounded time, and end. Nothing else is sent any more."""
        if self._ended or self._closing:
            self._end(error)
            return
        self.error = error
        self._closing = True
        if self._core.state is not LinkState.CLOSED:  # `on_message` found the fault
            self._core.refuse(MalformedFrame(str(error)))
        try:
            async with asyncio.timeout(REFUSAL_LINGER_S):
                self._pump()
                while self._writer is not None:
                    await self._writer
                await self._pipe.close(REFUSAL_LINGER_S)
        except TimeoutError:
            pass  # it will learn that the connection ended
        finally:
            self._end(error)

    def _arm(self) -> None:
        deadline = self._core.deadline()
        if deadline is None:
            return  # a refusal leaves, for a bounded time
        delay = max(0.0, deadline - self._monotonic())
        self._timer = self._loop.call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = self._monotonic()
        buffered = self._pipe.buffered_bytes()
        if buffered < self._buffered:
            self._core.progress(now)
        self._buffered = buffered
        try:
            self._core.tick(now)
        except PeerStalled as error:
            self._end(error)
            return
        if self._writer is None:
            self._pump()
        if not self._ended:
            self._arm()

    def _end(self, error: Exception | None) -> None:
        if self._ended:
            return
        self._ended = True
        if not self._closing:
            self.error = error
        self._core.close()
        self._pipe.abort()  # the reader and the writer wake with PipeClosed
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._loop.call_soon(self._notify)

    def _notify(self) -> None:
        self._closed.set_result(None)
        if self._on_close is not None:
            self._on_close(self.error)


async def connect(
    network: Network,
    address: str,
    path: str,
    hello: Hello,
    *,
    limits: LinkLimits | None = None,
    timeout_s: float = 3.0,
    monotonic: Callable[[], float] | None = None,
) -> Stream:
    """Dial and shake hands, within `timeout_s`. `hello.to`: the node id that must be there (0: any).

    Raises: PipeClosed: could not connect. PeerStalled: no answer in time. VersionMismatch, WrongCluster, WrongNode,
    or another KVError: refused, by either side. FrameError: the other side does not speak this protocol.
    """
    clock = monotonic or asyncio.get_running_loop().time
    until = clock() + timeout_s
    pipe = await network.dial(address, path, timeout_s)
    core = LinkCore(dialler=True, hello=hello, limits=limits or LinkLimits(), now=clock())
    return await _shake_hands(pipe, core, clock, until - clock())


async def accept(
    pipe: FramePipe,
    hello: Hello,
    *,
    limits: LinkLimits | None = None,
    check: Check | None = None,
    monotonic: Callable[[], float] | None = None,
) -> Stream:
    """Answer a handshake. `check` may refuse what the other side said with an error. Raises as `connect` does."""
    clock = monotonic or asyncio.get_running_loop().time
    limits = limits or LinkLimits()
    core = LinkCore(dialler=False, hello=hello, limits=limits, now=clock(), check=check)
    return await _shake_hands(pipe, core, clock, limits.handshake_timeout_s)


async def _shake_hands(
    pipe: FramePipe, core: LinkCore, clock: Callable[[], float], timeout_s: float
) -> Stream:
    done = False
    try:
        async with asyncio.timeout(timeout_s):
            await _flush(pipe, core, clock)
            while core.state is not LinkState.OPEN:
                core.receive(await pipe.receive(), clock())
                await _flush(pipe, core, clock)
        done = True
        return Stream(pipe, core, clock)
    except TimeoutError:
        raise PeerStalled(f"no handshake within {timeout_s:g} s") from None
    except (KVError, FrameError):
        if core.has_output():  # a refusal: the other side should learn why
            await _linger(pipe, core, clock)
        raise
    finally:
        if not done:
            pipe.abort()


async def _flush(pipe: FramePipe, core: LinkCore, clock: Callable[[], float]) -> None:
    while (frame := core.take(clock())) is not None:
        await pipe.send(frame)


async def _linger(pipe: FramePipe, core: LinkCore, clock: Callable[[], float]) -> None:
    try:
        async with asyncio.timeout(REFUSAL_LINGER_S):
            await _flush(pipe, core, clock)
            await pipe.close(REFUSAL_LINGER_S)
    except (PipeClosed, TimeoutError):
        pass  # it will learn that the connection ended


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses between dials: doubling from `first_s` to `max_s`, each drawn from its upper half."""

    first_s: float = 0.05
    max_s: float = 2.0
    stable_s: float = 1.0  # a stream that was up for so long makes the next pause short again

    def pause_s(self, failures: int, rng: random.Random) -> float:
        longest = min(self.max_s, self.first_s * 2.0 ** min(failures, 30))
        return rng.uniform(longest / 2, longest)


class PeerLink:
    """Keeps a stream to an address alive, from `start` to `close`.

    Args:
        hello: what to say at each dial. on_message: for every message of every stream.
        on_up, on_down: a stream is there; it ended, with its error. Called in turn, from the loop.
    """

    def __init__(
        self,
        network: Network,
        address: str,
        path: str,
        hello: Callable[[], Hello],
        *,
        rng: random.Random,
        on_message: OnMessage,
        on_up: Callable[[Stream], None] | None = None,
        on_down: OnClose | None = None,
        limits: LinkLimits | None = None,
        backoff: Backoff | None = None,
        dial_timeout_s: float = 3.0,
        monotonic: Callable[[], float] | None = None,
    ) -> None:
        self.address = address
        self.stream: Stream | None = None  # while it is up
        self.last_error: Exception | None = None  # of the last dial or stream
        self.dials = 0
        self.drops = 0  # messages that `send` refused
        self._network = network
        self._path = path
        self._hello = hello
        self._rng = rng
        self._on_message = on_message
        self._on_up = on_up
        self._on_down = on_down
        self._limits = limits or LinkLimits()
        self._backoff = backoff or Backoff()
        self._dial_timeout_s = dial_timeout_s
        self._monotonic = monotonic
        self._failures = 0
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def up(self) -> bool:
        return self.stream is not None and self.stream.is_open

    def start(self) -> None:
        assert self._task is None, "started before"
        self._task = asyncio.get_running_loop().create_task(self._run())

    def send(self, payload: bytes, lane: int = 0) -> bool:
        """As `Stream.send`; False while no stream is up."""
        if self.stream is not None and self.stream.send(payload, lane):
            return True
        self.drops += 1
        return False

    def set_address(self, address: str) -> None:
        """The peer is elsewhere now: an open stream ends, and the new address is dialled at once."""
        if address == self.address:
            return
        self.address = address
        self._failures = 0
        self.wake()
        if self.stream is not None:
            self.stream.abort()

    def wake(self) -> None:
        """Dial now rather than after the pause (there are news of the peer)."""
        self._wake.set()

    async def close(self, timeout_s: float = 1.0) -> None:
        """Send what is queued, within `timeout_s`, and end. May be called again."""
        if self.stream is not None:
            await self.stream.close(timeout_s)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            self.dials += 1
            try:
                await self._dial_once()
            except Exception as error:
                self.last_error = error
                self._failures += 1
                if not isinstance(error, KVError | FrameError):
                    # Nobody foresaw it. Without the link the node is cut off from its peer, and no state of either is in
                    # doubt: to say so and to dial again helps more than to give up the link, or the node.
                    log.exception("link failed unexpectedly", address=self.address, path=self._path)
            await self._pause()

    async def _dial_once(self) -> None:
        """From the dial to the end of the stream. Raises as `connect` does."""
        clock = self._monotonic or asyncio.get_running_loop().time
        stream = await connect(
            self._network,
            self.address,
            self._path,
            self._hello(),
            limits=self._limits,
            timeout_s=self._dial_timeout_s,
            monotonic=self._monotonic,
        )
        began = clock()
        await self._attend(stream)
        self._failures = 0 if clock() - began >= self._backoff.stable_s else self._failures + 1

    async def _attend(self, stream: Stream) -> None:
        """From up to down."""
        self.stream = stream
        stream.on_message = self._on_message
        try:
            if self._on_up is not None:
                self._on_up(stream)
            self.last_error = await stream.wait_closed()
        finally:
            stream.abort()
            self.stream = None
            if self._on_down is not None:
                self._on_down(stream.error)

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(self._backoff.pause_s(self._failures, self._rng)):
                await self._wake.wait()
        except TimeoutError:
            pass
