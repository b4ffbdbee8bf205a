"""A peer process that is stopped (SIGSTOP) neither blocks nor bloats anyone: its queue is bounded, sends are refused,
the connection is given up in time, others do not notice, and it is welcome again when it wakes."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest
import uvloop

from kvstore.adapters.ws_transport import BUFFER_BYTES_MAX, WsNetwork
from kvstore.link import Hello, LinkLimits, PeerStalled
from kvstore.ports import FramePipe
from kvstore.streams import PeerLink, Stream, accept, connect

ROOT: Final = Path(__file__).parents[2]
LIMITS: Final = LinkLimits(
    queue_bytes_max=4_000_000,
    message_bytes_max=1_000_000,
    ping_interval_s=0.2,
    stall_timeout_s=1.0,
)
LOADED: Final = 5.0  # times the limit, on a machine that is busy with other things
PAYLOAD: Final = bytes(100_000)
PATH: Final = "/v1/peer"

pytestmark = pytest.mark.slow


async def echo(stream: Stream) -> None:
    def answer(message: bytes) -> None:
        stream.send(message[:10])

    stream.on_message = answer
    await stream.wait_closed()


async def on_pipe(path: str, pipe: FramePipe) -> None:
    await echo(await accept(pipe, Hello(), limits=LIMITS))


async def child(role: str, address: str) -> None:
    """The other process: serves, or dials `address`; echoes the first bytes of each message."""
    network = WsNetwork()
    if role == "serve":
        print(await network.serve("127.0.0.1:0", on_pipe), flush=True)
        await asyncio.sleep(60.0)
    else:
        await echo(await connect(network, address, PATH, Hello(), limits=LIMITS))


@asynccontextmanager
async def process(role: str, address: str = "") -> AsyncIterator[asyncio.subprocess.Process]:
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        role,
        address,
        stdout=asyncio.subprocess.PIPE,
        env={"PYTHONPATH": str(ROOT)},
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.send_signal(signal.SIGCONT)
            started.kill()
        await started.wait()


class Neighbour:
    """A healthy peer that is talked to all the time; the longest round trip is kept."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.trips = 0
        self.longest_s = 0.0
        self._sent_at = 0.0
        self._loop = asyncio.get_running_loop()
        stream.on_message = self._on_answer
        self._ask()

    def _ask(self) -> None:
        self._sent_at = self._loop.time()
        self.stream.send(b"how are you")

    def _on_answer(self, _: bytes) -> None:
        self.trips += 1
        self.longest_s = max(self.longest_s, self._loop.time() - self._sent_at)
        self._loop.call_later(0.001, self._ask)


@asynccontextmanager
async def neighbour(network: WsNetwork) -> AsyncIterator[Neighbour]:
    there = WsNetwork()
    address = await there.serve("127.0.0.1:0", on_pipe)
    stream = await connect(network, address, PATH, Hello(), limits=LIMITS)
    try:
        yield Neighbour(stream)
    finally:
        stream.abort()
        await there.close()


async def push(stream: Stream, other: Neighbour) -> None:
    """Send without end into a stopped process, until the stream is given up."""
    loop = asyncio.get_running_loop()
    ends: list[Exception | None] = []
    stream.on_close = ends.append
    refused, began = 0, loop.time()
    while stream.is_open:
        before = loop.time()
        refused += not stream.send(PAYLOAD)
        assert loop.time() - before < 0.5
        assert stream.queue_bytes <= LIMITS.queue_bytes_max
        await asyncio.sleep(0.001)
        assert loop.time() - began < LIMITS.stall_timeout_s * LOADED
    assert isinstance(stream.error, PeerStalled)
    assert loop.time() - began >= LIMITS.stall_timeout_s * 0.9
    assert refused > 0
    assert not stream.send(b"late")
    await asyncio.sleep(0.01)
    assert ends == [stream.error]
    assert other.trips > 20
    assert other.longest_s < 0.5


async def scenario_dialled_peer_stops(network: WsNetwork) -> None:
    async with process("serve") as peer, neighbour(network) as other:
        assert peer.stdout is not None
        address = (await peer.stdout.readline()).decode().strip()
        got: list[bytes] = []
        link = PeerLink(
            network,
            address,
            PATH,
            Hello,
            rng=random.Random(1),
            on_message=got.append,
            limits=LIMITS,
            dial_timeout_s=0.5,
        )
        link.start()
        await until(lambda: link.up)
        assert link.stream is not None
        link.send(b"one")
        await until(lambda: got == [b"one"])

        peer.send_signal(signal.SIGSTOP)
        await push(link.stream, other)
        assert not link.send(b"down")

        peer.send_signal(signal.SIGCONT)
        await until(lambda: link.up)
        del got[:]  # echoes of what was in flight
        await until(lambda: link.send(b"two") and b"two" in got)
        await link.close()


async def scenario_peer_that_dialled_us_stops(network: WsNetwork) -> None:
    accepted = asyncio.Queue[tuple[Stream, FramePipe]]()

    async def take(path: str, pipe: FramePipe) -> None:
        accepted.put_nowait((await accept(pipe, Hello(), limits=LIMITS), pipe))

    address = await network.serve("127.0.0.1:0", take)
    async with process("dial", address) as peer, neighbour(network) as other:
        stream, pipe = await accepted.get()
        got: list[bytes] = []
        stream.on_message = got.append
        stream.send(b"one")
        await until(lambda: got == [b"one"])

        peer.send_signal(signal.SIGSTOP)
        pushing = asyncio.get_running_loop().create_task(push(stream, other))
        await asyncio.sleep(LIMITS.stall_timeout_s / 2)
        assert 0 < pipe.buffered_bytes() <= BUFFER_BYTES_MAX
        await pushing
        assert pipe.buffered_bytes() == 0


async def scenario_idle_peer_stops(network: WsNetwork) -> None:
    async with process("serve") as peer:
        assert peer.stdout is not None
        address = (await peer.stdout.readline()).decode().strip()
        stream = await connect(network, address, PATH, Hello(), limits=LIMITS)
        stream.on_message = lambda _: None
        await asyncio.sleep(LIMITS.stall_timeout_s * 2)
        assert stream.is_open  # idle, and alive
        peer.send_signal(signal.SIGSTOP)
        async with asyncio.timeout(LIMITS.stall_timeout_s * LOADED):
            assert isinstance(await stream.wait_closed(), PeerStalled)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10.0):
        for _ in range(10**9):
            if condition():
                return
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize(
    "scenario",
    [scenario_dialled_peer_stops, scenario_peer_that_dialled_us_stops, scenario_idle_peer_stops],
    ids=lambda scenario: scenario.__name__.removeprefix("scenario_"),
)
def test_a_stopped_process_neither_blocks_nor_bloats_anyone(scenario, loop):
    factory = uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop

    async def main() -> None:
        network = WsNetwork()
        try:
            await scenario(network)
        finally:
            await network.close()

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


if __name__ == "__main__":
    asyncio.run(child(sys.argv[1], sys.argv[2]))
