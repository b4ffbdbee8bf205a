"""A network in one process, under the simulated loop: ordered connections with delay, and the faults of the world.

Each host is a `Network` of its own (`SimNetwork.host`). A connection behaves as TCP does: frames arrive in order and
once, or the connection breaks, and then a tail of what was sent is lost without the sender knowing how much of it.
A blocked path (partition, clog) holds frames back and lets nothing through, neither data nor acknowledgements, dials
nor the news that a connection ended; what was held travels on when the path is free again. A sender whose bytes are
not consumed is stopped after `window_bytes`. There is no limit to bandwidth.

Everything is drawn from one generator, and `fingerprint` covers every frame delivered with its time: equal seeds give
equal fingerprints.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from crc32c import crc32c

from kvstore.errors import KVError, PipeClosed
from kvstore.ports import FramePipe
from kvstore.sim.loop import SimLoop
from kvstore.sim.process import PROCESS, world
from kvstore.sim.reader import Reader
from kvstore.sim.trace import Trace
from replication.errors import FrameError

FIRST_PORT: Final = 40_000
DIAL_RETRY_S: Final = 0.5  # a lost SYN is sent again after so long, then after twice that
FOREVER: Final = float("inf")

OnPipe = Callable[[str, FramePipe], Awaitable[None]]
Names = str | Sequence[str]


class SimNetwork:
    """Args: delay_s: shortest and longest time of one frame. break_rate: chance that a frame breaks its connection.
    trace: is told of every frame that arrives."""

    def __init__(
        self,
        rng: random.Random,
        *,
        delay_s: tuple[float, float] = (0.000_2, 0.002),
        break_rate: float = 0.0,
        window_bytes: int = 1 << 20,
        trace: Trace | None = None,
    ) -> None:
        self.rng = rng
        self._trace = trace
        self.delay_s = delay_s
        self.break_rate = break_rate
        self.window_bytes = window_bytes
        self.counters: dict[str, int] = dict.fromkeys(
            ("dials", "refused", "timed_out", "connections", "breaks", "frames", "bytes"), 0
        )
        self.fingerprint = 0
        self._delays: dict[tuple[str, str], tuple[float, float]] = {}
        self.blocked: dict[tuple[str, str], float] = {}  # path -> until when; nearly always empty
        self._hosts: dict[str, SimHost] = {}
        self._off: dict[str, None] = {}  # machines without power
        self.on_host: list[Callable[[str], None]] = []  # hear of each new host
        self._listeners: dict[str, tuple[SimHost, OnPipe]] = {}
        self._pipes: dict[int, SimPipe] = {}  # ends that are not closed, by number
        self._number = 0
        self._port = FIRST_PORT
        self.context = world()  # frames on their way are nobody's process

    def host(self, name: str) -> SimHost:
        """The network as one host sees it. After `crash` a new one of the same name may be made."""
        assert name not in self._hosts, f"{name} runs already"
        self._off.pop(name, None)
        self._hosts[name] = SimHost(self, name)
        for look in self.on_host:
            look(name)
        return self._hosts[name]

    # --- faults -----------------------------------------------------------------------------------------------

    def partition(self, a: Names, b: Names, *, one_way: bool = False) -> None:
        """Let nothing pass from `a` to `b`, nor back unless `one_way`, until `heal`."""
        self._block(a, b, FOREVER, one_way)

    def clog(self, a: Names, b: Names, seconds: float, *, one_way: bool = False) -> None:
        """As `partition`, but it ends by itself."""
        loop = asyncio.get_running_loop()
        self._block(a, b, loop.time() + seconds, one_way)
        loop.call_later(seconds, self._kick)

    def isolate(self, name: str, seconds: float = FOREVER) -> None:
        """Cut one host off from all others; with `seconds`, as a process that is stopped for a while."""
        others = [other for other in self._hosts if other != name]
        if seconds == FOREVER:
            self.partition(name, others)
        else:
            self.clog(name, others, seconds)

    def heal(self, a: Names | None = None, b: Names | None = None) -> None:
        """End partitions and clogs: all of them, or those between `a` and `b`, either way."""
        if a is None or b is None:
            self.blocked.clear()
        else:
            for path in paths(a, b, one_way=False):
                self.blocked.pop(path, None)
        self._kick()

    def set_delay(self, a: Names, b: Names, delay_s: tuple[float, float] | None) -> None:
        """Make the paths between `a` and `b` slow, both ways; None: as all others again."""
        for path in paths(a, b, one_way=False):
            if delay_s is None:
                self._delays.pop(path, None)
            else:
                self._delays[path] = delay_s

    def break_connections(self, a: str, b: str | None = None) -> int:
        """Reset every connection of `a` (with `b`); both ends learn of it, and tails are lost. Returns how many."""
        mine = [
            pipe
            for pipe in self._pipes.values()
            if pipe.local == a and b in (None, pipe.remote) and not pipe.is_reset
        ]
        for pipe in mine:
            self.reset(pipe)
        return len(mine)

    def crash(self, name: str, *, silent: bool = False) -> None:
        """The host is gone: nobody listens, its connections end. `silent`: the machine is off, and no answer comes from it;
        the others get no word of that until it is made again, and then each by what it sends next.
        """
        host = self._hosts.pop(name)
        if silent:
            self._off[name] = None
        for address in [a for a, (owner, _) in self._listeners.items() if owner is host]:
            del self._listeners[address]
        for pipe in [pipe for pipe in self._pipes.values() if pipe.local == name]:
            pipe.drop(tell=not silent)
        host.cancel()

    # --- for hosts and pipes ----------------------------------------------------------------------------------

    def draw_delay(self, source: str, target: str) -> float:
        low, high = self._delays.get((source, target), self.delay_s)
        return low + (high - low) * self.rng.random()  # as `uniform` does

    def blocked_until(self, source: str, target: str) -> float:
        return self.blocked.get((source, target), 0.0)

    def delivered(self, at: float, number: int, frame: bytes) -> None:
        """The fingerprint is one checksum for each frame: its time, and the connection, go into what it begins with."""
        counters, size = self.counters, len(frame)
        counters["frames"] += 1
        counters["bytes"] += size
        self.fingerprint = crc32c(frame, (self.fingerprint ^ hash((at, number))) & 0xFFFFFFFF)
        if self._trace is not None:
            self._trace.frame(number, size, self.fingerprint)

    def lose(self) -> bool:
        return self.break_rate > 0 and self.rng.random() < self.break_rate

    def reset(self, pipe: SimPipe) -> None:
        self.counters["breaks"] += 1
        pipe.is_reset = pipe.peer.is_reset = True
        pipe.outgoing.cut()
        pipe.incoming.cut()

    def listen(self, host: SimHost, address: str, on_pipe: OnPipe) -> str:
        name, _, port = address.rpartition(":")
        if port == "0":
            self._port += 1
            address = f"{name}:{self._port}"
        if address in self._listeners:
            raise OSError(f"address in use: {address}")
        self._listeners[address] = (host, on_pipe)
        return address

    def unlisten(self, host: SimHost) -> None:
        for address in [a for a, (owner, _) in self._listeners.items() if owner is host]:
            del self._listeners[address]

    def is_off(self, name: str) -> bool:
        return name in self._off

    def is_up(self, name: str) -> bool:
        """Whether a host of this name runs."""
        return name in self._hosts

    def listener(self, address: str) -> tuple[SimHost, OnPipe] | None:
        return self._listeners.get(address)

    def join(self, client: SimHost, server: SimHost) -> tuple[SimPipe, SimPipe]:
        self.counters["connections"] += 1
        self._number += 2
        there = _Direction(self, self._number, client.name, server.name)
        back = _Direction(self, self._number + 1, server.name, client.name)
        there.opposite, back.opposite = back, there
        near = SimPipe(self, self._number, outgoing=there, incoming=back)
        far = SimPipe(self, self._number + 1, outgoing=back, incoming=there)
        near.peer, far.peer = far, near
        self._pipes[near.number], self._pipes[far.number] = near, far
        return near, far

    def forget(self, pipe: SimPipe) -> None:
        self._pipes.pop(pipe.number, None)

    def pipes_of(self, name: str) -> list[SimPipe]:
        return [pipe for pipe in self._pipes.values() if pipe.local == name]

    def _block(self, a: Names, b: Names, until: float, one_way: bool) -> None:
        for path in paths(a, b, one_way=one_way):
            self.blocked[path] = max(until, self.blocked.get(path, 0.0))

    def _kick(self) -> None:
        for pipe in list(self._pipes.values()):
            pipe.outgoing.kick()
            pipe.incoming.kick()  # its other end may be gone already


class SimHost:
    """One host's view: the Network port."""

    def __init__(self, network: SimNetwork, name: str) -> None:
        self.name = name
        self._network = network
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._served = 0
        self._context = contextvars.copy_context()  # of the process that listens

    async def dial(self, address: str, path: str, timeout_s: float) -> SimPipe:
        network = self._network
        network.counters["dials"] += 1
        try:
            async with asyncio.timeout(timeout_s):
                return await self._dial(address, path)
        except TimeoutError:
            network.counters["timed_out"] += 1
            raise PipeClosed(f"no connection to {address} within {timeout_s:g} s") from None

    async def serve(self, address: str, on_pipe: OnPipe) -> str:
        """Raises: OSError: somebody listens there already."""
        self._context = contextvars.copy_context()
        return self._network.listen(self, address, on_pipe)

    async def close(self) -> None:
        """Stop listening and end every connection."""
        self._network.unlisten(self)
        for pipe in self._network.pipes_of(self.name):
            pipe.abort()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def cancel(self) -> None:
        for task in list(self._tasks.values()):
            task.cancel()

    async def _dial(self, address: str, path: str) -> SimPipe:
        network, pause_s = self._network, DIAL_RETRY_S
        while True:
            found = network.listener(address)
            target = found[0].name if found else address.rpartition(":")[0]
            await asyncio.sleep(network.draw_delay(self.name, target))
            if self._reaches(target):
                break
            await asyncio.sleep(pause_s)
            pause_s *= 2
        found = network.listener(address)
        if found is None:
            await asyncio.sleep(network.draw_delay(target, self.name))
            network.counters["refused"] += 1
            raise PipeClosed(f"no connection to {address}: refused")
        server, on_pipe = found
        near, far = network.join(self, server)
        server.attend(path, far, on_pipe)
        try:
            await asyncio.sleep(network.draw_delay(server.name, self.name))
            while True:
                if self._reaches(server.name):
                    return near
                await asyncio.sleep(DIAL_RETRY_S)
        except BaseException:
            near.abort()
            raise

    def _reaches(self, target: str) -> bool:
        now, network = asyncio.get_running_loop().time(), self._network
        there = network.blocked_until(self.name, target)
        back = network.blocked_until(target, self.name)
        return max(there, back) <= now and not network.is_off(target)

    def attend(self, path: str, pipe: SimPipe, on_pipe: OnPipe) -> None:
        self._served += 1
        number = self._served

        async def attended() -> None:
            try:
                await on_pipe(path, pipe)
                await pipe.wait_closed()
            except (KVError, FrameError):
                pass  # a refused handshake, or the end of the connection
            finally:
                pipe.abort()

        task = asyncio.get_running_loop().create_task(attended(), context=self._context.copy())
        self._tasks[number] = task
        task.add_done_callback(lambda _: self._tasks.pop(number, None))


class SimPipe:
    """One end of a connection: the FramePipe port."""

    peer: SimPipe

    def __init__(
        self, network: SimNetwork, number: int, *, outgoing: _Direction, incoming: _Direction
    ) -> None:
        self.number = number
        self.outgoing = outgoing
        self.incoming = incoming
        self.is_reset = False
        self._network = network
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._shut = False  # closed, or about to be: nothing is sent any more

    @property
    def local(self) -> str:
        return self.outgoing.source

    @property
    def remote(self) -> str:
        return self.outgoing.target

    def try_send(self, frame: bytes) -> bool:
        outgoing, network = self.outgoing, self._network
        if self._shut or self.incoming.arrived_end:
            raise PipeClosed("the connection is closed")
        if outgoing.unacked_bytes >= network.window_bytes:
            return False
        if network.break_rate and network.lose():
            network.reset(self)
        else:
            outgoing.put(frame)
        return True

    async def send(self, frame: bytes) -> None:
        self._check()
        self._put(frame)
        while self.outgoing.unacked_bytes >= self._network.window_bytes:
            await self.outgoing.wait_acked()
            self._check()

    async def receive(self) -> bytes:
        incoming = self.incoming
        while not incoming.discards:
            if incoming.inbox:
                return incoming.consume()
            if incoming.arrived_end:
                break
            await incoming.reader
        raise PipeClosed("the connection is closed")

    def buffered_bytes(self) -> int:
        return self.outgoing.unacked_bytes

    def abort(self) -> None:
        self.drop(tell=True)

    async def close(self, timeout_s: float) -> None:
        if self._shut:
            return
        self._shut = True
        self.outgoing.finish()
        try:
            async with asyncio.timeout(timeout_s):
                while self.outgoing.unacked_bytes and not self.incoming.arrived_end:
                    await self.outgoing.wait_acked()
        except TimeoutError:
            pass
        finally:
            self.abort()

    async def wait_closed(self) -> None:
        await asyncio.shield(self._closed)

    def drop(self, *, tell: bool) -> None:
        """End this end; `tell`: the other one hears of it."""
        if self._closed.done():
            return
        self._shut = True
        self._closed.set_result(None)
        self._network.forget(self)
        self.incoming.discard()
        if tell:
            self.outgoing.cut()
        else:
            self.outgoing.silence()
        self.outgoing.wake_writers()

    def _check(self) -> None:
        if self._shut or self.incoming.arrived_end:
            raise PipeClosed("the connection is closed")

    def _put(self, frame: bytes) -> None:
        if self._network.lose():
            self._network.reset(self)
        else:
            self.outgoing.put(frame)


class _Direction:
    """The frames of one connection that go one way."""

    opposite: _Direction

    def __init__(self, network: SimNetwork, number: int, source: str, target: str) -> None:
        self.source = source
        self.target = target
        self.unacked_bytes = 0  # sent, and not known to be consumed
        self.inbox: deque[bytes] = deque()
        self.arrived_end = False
        self._network = network
        self._number = number
        self._flight: deque[tuple[float, bytes | None]] = deque()  # (arrival, frame); None: the end
        self._consumed_bytes = 0  # whose acknowledgement is held back
        self._last_at = 0.0
        self._ended = self._departed_end = False  # nothing is sent any more
        self.discards = False  # the receiving end is closed
        self.is_silent = False  # the sending end is gone, and nobody was told
        self._writers: deque[asyncio.Future[None]] = deque()
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        self._loop = loop
        self._timer = loop.timer(self._arrive)  # for one arrival after the other
        self._armed = False
        self.reader = Reader(loop)

    def put(self, frame: bytes) -> None:
        if self._ended:
            return  # lost: the connection has been reset, and the sender does not know yet
        self.unacked_bytes += len(frame)
        if not self.discards:
            self._launch(frame)
        elif self.opposite.is_silent and self._network.is_up(self.target):
            self.opposite.refuse()

    def finish(self) -> None:
        """The end travels behind everything that was sent."""
        if not self._ended:
            self._ended = True
            if not self.discards:
                self._launch(None)

    def cut(self) -> None:
        """Reset: of what is in flight a part is lost, from some frame on; then comes the end."""
        if self._ended:
            return
        for _ in range(self._network.rng.randint(0, len(self._flight))):
            self._flight.pop()
        self.finish()

    def silence(self) -> None:
        """Nothing more comes, and no word of it, but for `refuse`."""
        self._ended = self.is_silent = True

    def refuse(self) -> None:
        """The source was away, and knows nothing of the connection by which it has got something now."""
        self.is_silent = False
        self._depart(None)

    def discard(self) -> None:
        """The receiving end is gone: what arrives from now on is thrown away, and never acknowledged."""
        self.discards = True
        self._flight.clear()
        self.inbox.clear()
        self._cancel()
        self.reader.wake()

    def kick(self) -> None:
        """The path may have changed."""
        self._cancel()
        self._arm()
        self._acknowledge()

    def consume(self) -> bytes:
        frame = self.inbox.popleft()
        self._consumed_bytes += len(frame)
        if not self._network.blocked and not self._writers:
            self.unacked_bytes -= self._consumed_bytes
            self._consumed_bytes = 0
        else:
            self._acknowledge()
        return frame

    async def wait_acked(self) -> None:
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._writers.append(waiter)
        await waiter

    def wake_writers(self) -> None:
        while self._writers:
            waiter = self._writers.popleft()
            if not waiter.done():
                waiter.set_result(None)

    def _launch(self, frame: bytes | None) -> None:
        process = PROCESS.get()
        if process is not None and process.held:
            if process.leaves_later(lambda: self._depart(frame)):
                return
        self._depart(frame)

    def _depart(self, frame: bytes | None) -> None:
        if self._departed_end or self.discards:
            return  # meanwhile
        self._departed_end = frame is None
        at = self._loop.now + self._network.draw_delay(self.source, self.target)
        if at < self._last_at:
            at = self._last_at  # not before the frame that is before it
        self._last_at = at
        self._flight.append((at, frame))
        if not self._armed:
            self._arm()

    def _arm(self) -> None:
        if not self._armed and self._flight:
            at, network = self._flight[0][0], self._network
            if network.blocked:
                at = max(at, network.blocked_until(self.source, self.target))
            if at != FOREVER:
                self._armed = True
                self._loop.arm(self._timer, at)

    def _arrive(self) -> None:
        self._armed = False
        now, network, flight = self._loop.now, self._network, self._flight
        if not network.blocked or network.blocked_until(self.source, self.target) <= now:
            while flight and flight[0][0] <= now:
                _, frame = flight.popleft()
                if frame is None:
                    self.arrived_end = True
                    self.opposite.wake_writers()  # the receiver's own, for whom it is over
                else:
                    network.delivered(now, self._number, frame)
                    self.inbox.append(frame)
            self.reader.step()
        if flight:
            self._arm()

    def _acknowledge(self) -> None:
        if not self._consumed_bytes:
            return
        if self._network.blocked_until(self.target, self.source) <= self._loop.time():
            self.unacked_bytes -= self._consumed_bytes
            self._consumed_bytes = 0
            if self._writers:
                self.wake_writers()

    def _cancel(self) -> None:
        if self._armed:
            self._armed = False
            self._timer.cancel()
            self._timer = self._loop.timer(self._arrive)


def paths(a: Names, b: Names, *, one_way: bool) -> list[tuple[str, str]]:
    first = [a] if isinstance(a, str) else list(a)
    second = [b] if isinstance(b, str) else list(b)
    there = [(x, y) for x in first for y in second if x != y]
    return there if one_way else there + [(y, x) for x, y in there]
