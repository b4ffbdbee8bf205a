"""What the Network and FramePipe ports promise, claimed of WebSockets (on asyncio's loop and on uvloop) and of the
simulated network alike; and, at the end, what only the WebSockets must do."""

from __future__ import annotations

import asyncio
import gzip
import random
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import aiohttp
import pytest
import uvloop
from aiohttp import web
from yarl import URL

from kvstore.adapters.ws_transport import (
    HIGH_WATER_BYTES,
    SHUTDOWN_TIMEOUT_S,
    WsNetwork,
    split_address,
)
from kvstore.errors import PipeClosed
from kvstore.limits import BOUND_BYTES_MAX
from kvstore.link import WIRE_BYTES_MAX, Hello, LinkCore, LinkLimits, MalformedFrame
from kvstore.ports import FramePipe
from kvstore.sim import loop as sim
from kvstore.sim.network import SimHost, SimNetwork
from kvstore.streams import accept
from replication.errors import FrameError

FRAME: Final = bytes(64 * 1024)
PATH: Final = "/v1/peer"
BACKENDS: Final = ("ws", "ws-uvloop", "sim")
UNREAD_BYTES_MAX: Final = (
    64 << 20
)  # more than any kernel takes from a sender whose peer does not read


class World:
    """A side that dials and a side that serves; what was served is kept."""

    def __init__(self, near: WsNetwork | SimHost, far: WsNetwork | SimHost, host: str) -> None:
        self.near = near
        self.far = far
        self.host = host
        self.address = ""
        self.served: asyncio.Queue[tuple[str, FramePipe]] = asyncio.Queue()
        self.behave: Callable[[FramePipe], Awaitable[None]] | None = None

    async def on_pipe(self, path: str, pipe: FramePipe) -> None:
        self.served.put_nowait((path, pipe))
        if self.behave is not None:
            await self.behave(pipe)

    async def pair(self) -> tuple[FramePipe, FramePipe]:
        near = await self.near.dial(self.address, PATH, 5.0)
        return near, (await self.served.get())[1]


Scenario = Callable[[World], Coroutine[Any, Any, None]]


async def play(scenario: Scenario, near: Any, far: Any, host: str) -> None:
    world = World(near, far, host)
    try:
        async with asyncio.timeout(15.0):
            world.address = await far.serve(f"{host}:0", world.on_pipe)
            await scenario(world)
    finally:
        await near.close()
        await far.close()


def on(backend: str, scenario: Scenario) -> None:
    async def on_websockets() -> None:
        await play(scenario, WsNetwork(), WsNetwork(), "127.0.0.1")

    async def on_simulation(_: sim.SimLoop) -> None:
        network = SimNetwork(random.Random(3))
        await play(scenario, network.host("near"), network.host("far"), "far")

    if backend == "sim":
        sim.run(on_simulation, 1, time_limit_s=1000.0)
    else:
        factory = uvloop.new_event_loop if backend == "ws-uvloop" else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(on_websockets())


def contract(scenario: Scenario) -> Callable[[str], None]:
    @pytest.mark.parametrize("backend", BACKENDS)
    def test(backend: str) -> None:
        on(backend, scenario)

    return test


async def fill(pipe: FramePipe) -> int:
    """Send until the pipe takes no more; how many frames it took."""
    taken = quiet = 0
    while quiet < 20:
        if pipe.try_send(FRAME):
            taken += 1
            quiet = 0
        else:
            quiet += 1
            await asyncio.sleep(0.01)  # a real kernel takes some more now and then
        assert taken * len(FRAME) < UNREAD_BYTES_MAX
        if taken % 4 == 0:
            await asyncio.sleep(0)
    return taken


async def drained(pipe: FramePipe) -> int:
    """Read to the end; how many frames came."""
    frames = 0
    try:
        while await pipe.receive():
            frames += 1
    except PipeClosed:
        pass
    return frames


@contract
async def test_the_address_is_real_and_the_path_is_told(world: World) -> None:
    host, port = split_address(world.address)
    assert host == world.host
    assert port > 0
    for path in ("/v1/stream", "/v1/peer", "/v1/snapshot"):
        pipe = await world.near.dial(world.address, path, 5.0)
        assert (await world.served.get())[0] == path
        pipe.abort()


@contract
async def test_frames_arrive_whole_and_in_order_both_ways(world: World) -> None:
    near, far = await world.pair()
    rng = random.Random(4)
    sizes = (1, 8, 125, 126, 65_535, 65_536, WIRE_BYTES_MAX)
    frames = [rng.randbytes(size) for size in sizes * 3]

    async def talk(sender: FramePipe, receiver: FramePipe) -> list[bytes]:
        async def send() -> None:
            for frame in frames:
                if not sender.try_send(frame):
                    await sender.send(frame)

        sending = asyncio.get_running_loop().create_task(send())
        got = [await receiver.receive() for _ in frames]
        await sending
        return got

    there, back = await asyncio.gather(talk(near, far), talk(far, near))
    assert there == frames
    assert back == frames
    assert type(there[0]) is bytes


@contract
async def test_a_peer_that_does_not_read_stops_the_sender_and_all_arrives_later(
    world: World,
) -> None:
    near, far = await world.pair()
    taken = await fill(near)
    held = near.buffered_bytes()
    assert held > 0

    sending = asyncio.get_running_loop().create_task(near.send(FRAME))
    await asyncio.sleep(0.05)
    for _ in range(taken):
        assert await far.receive() == FRAME
    async with asyncio.timeout(5.0):
        await sending
    await asyncio.sleep(0.05)
    assert near.buffered_bytes() < held
    assert await far.receive() == FRAME
    assert near.try_send(b"free again")
    assert await far.receive() == b"free again"


@contract
async def test_abort_wakes_whoever_waits_on_either_side(world: World) -> None:
    near, far = await world.pair()
    await fill(near)
    loop = asyncio.get_running_loop()

    async def keep_sending() -> None:
        while True:
            await near.send(FRAME)

    waiting = [loop.create_task(work) for work in (keep_sending(), near.receive())]
    await asyncio.sleep(0.05)
    near.abort()
    near.abort()
    for error in await asyncio.gather(*waiting, return_exceptions=True):
        assert type(error) is PipeClosed
    await drained(far)
    with pytest.raises(PipeClosed):
        near.try_send(b"x")
    with pytest.raises(PipeClosed):
        await near.send(b"x")
    with pytest.raises(PipeClosed):
        await near.receive()


@contract
async def test_what_was_sent_before_close_arrives_before_the_end(world: World) -> None:
    near, far = await world.pair()
    for _ in range(3):
        assert near.try_send(FRAME)

    reading = asyncio.get_running_loop().create_task(drained(far))
    await near.close(5.0)
    assert await reading == 3
    await near.close(5.0)


@contract
async def test_close_ends_in_time_although_the_peer_does_not_read(world: World) -> None:
    near, _ = await world.pair()
    await fill(near)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await near.close(0.3)
    assert loop.time() - began < 2.0
    with pytest.raises(PipeClosed):
        near.try_send(b"x")


@contract
async def test_close_wakes_our_own_reader(world: World) -> None:
    near, far = await world.pair()
    reading = asyncio.get_running_loop().create_task(near.receive())
    await asyncio.sleep(0.01)
    far_reading = asyncio.get_running_loop().create_task(far.receive())
    await near.close(1.0)
    for task in (reading, far_reading):
        with pytest.raises(PipeClosed):
            await task


@contract
async def test_dialling_where_nobody_listens_is_pipe_closed(world: World) -> None:
    with pytest.raises(PipeClosed):
        await world.near.dial(f"{world.host}:1", PATH, 5.0)


@contract
async def test_an_address_is_served_once(world: World) -> None:
    with pytest.raises(OSError, match=r"address.* in use"):
        await world.near.serve(world.address, world.on_pipe)


@contract
async def test_a_pipe_outlives_the_return_of_on_pipe(world: World) -> None:
    near, far = await world.pair()  # `behave` is not set: on_pipe returns at once
    await asyncio.sleep(0.05)
    assert far.try_send(b"still here")
    assert await near.receive() == b"still here"


@contract
async def test_a_pipe_ends_when_on_pipe_gives_up_on_it(world: World) -> None:
    async def give_up(_: FramePipe) -> None:
        raise PipeClosed("no")

    world.behave = give_up
    near, _ = await world.pair()
    with pytest.raises(PipeClosed):
        await near.receive()


@contract
async def test_many_pipes_do_not_mix(world: World) -> None:
    pairs = [await world.pair() for _ in range(30)]
    for number, (near, _) in enumerate(pairs):
        assert near.try_send(b"%d" % number)
    for number, (_, far) in enumerate(pairs):
        assert await far.receive() == b"%d" % number


@contract
async def test_closing_the_network_ends_its_pipes(world: World) -> None:
    near, far = await world.pair()
    await world.far.close()
    with pytest.raises(PipeClosed):
        await near.receive()
    with pytest.raises(PipeClosed):
        await far.receive()
    with pytest.raises(PipeClosed):
        await world.near.dial(world.address, PATH, 5.0)


# --- WebSockets alone -----------------------------------------------------------------------------


def websockets(scenario: Scenario) -> Callable[[], None]:
    def test() -> None:
        on("ws", scenario)

    return test


@websockets
async def test_a_connection_that_comes_just_as_the_network_closes_ends_with_it(
    world: World,
) -> None:
    def to_its_end(wire: socket.socket) -> None:
        try:
            while wire.recv(1024):
                pass
        except ConnectionResetError:
            pass

    for turns in range(6):  # of the loop: from before it is taken until it is being read
        network = WsNetwork()
        address = await network.serve("127.0.0.1:0", world.on_pipe)
        with socket.create_connection(split_address(address), 5.0) as wire:
            for _ in range(turns):
                await asyncio.sleep(0)
            await network.close()
            await asyncio.to_thread(to_its_end, wire)


@websockets
async def test_a_server_that_accepts_and_says_nothing_is_given_up_in_time(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        began = asyncio.get_running_loop().time()
        with pytest.raises(PipeClosed, match="within 0.2 s"):
            await world.near.dial(f"127.0.0.1:{deaf.getsockname()[1]}", PATH, 0.2)
        assert asyncio.get_running_loop().time() - began < 2.0


@websockets
async def test_what_this_process_buffers_for_a_peer_that_does_not_read_is_bounded(
    world: World,
) -> None:
    near, _ = await world.pair()
    await fill(near)
    assert HIGH_WATER_BYTES <= near.buffered_bytes() <= HIGH_WATER_BYTES + WIRE_BYTES_MAX + 100


@websockets
async def test_http_routes_share_the_port_with_streams(world: World) -> None:
    async def hello(_: web.Request) -> web.Response:
        return web.Response(text="hello")

    app = web.Application()
    app.add_routes([web.get("/health", hello)])
    assert isinstance(world.far, WsNetwork)
    address = await world.far.serve("127.0.0.1:0", world.on_pipe, app)
    pipe = await world.near.dial(address, PATH, 5.0)
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://{address}/health") as response:
            assert await response.text() == "hello"
        async with session.get(f"http://{address}{PATH}") as response:
            assert response.status == 400
    pipe.abort()


@websockets
async def test_a_request_may_hold_two_of_the_longest_keys_with_every_byte_escaped(
    world: World,
) -> None:
    async def length(request: web.Request) -> web.Response:
        return web.Response(text=str(len(request.rel_url.raw_query_string)))

    app = web.Application()
    app.add_routes([web.get("/v1/kv", length)])
    assert isinstance(world.far, WsNetwork)
    address = await world.far.serve("127.0.0.1:0", world.on_pipe, app)
    bound = "%FE" * BOUND_BYTES_MAX
    query = f"start={bound}&end={bound}"
    url = URL(f"http://{address}/v1/kv?{query}", encoded=True)
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        assert await response.text() == str(len(query))


@websockets
async def test_a_body_is_given_as_it_was_sent_whatever_its_encoding(world: World) -> None:
    async def echo(request: web.Request) -> web.Response:
        return web.Response(body=await request.read())

    app = web.Application()
    app.add_routes([web.put("/v1/kv", echo)])
    assert isinstance(world.far, WsNetwork)
    address = await world.far.serve("127.0.0.1:0", world.on_pipe, app)
    async with aiohttp.ClientSession() as session:
        for body in (gzip.compress(b"value"), b"no gzip at all"):
            headers = {"Content-Encoding": "gzip"}
            url = f"http://{address}/v1/kv"
            async with session.put(url, data=body, headers=headers) as response:
                assert (response.status, await response.read()) == (200, body)


@websockets
async def test_an_application_that_someone_else_runs_closes_its_streams_at_shutdown(
    world: World,
) -> None:
    assert isinstance(world.far, WsNetwork)
    app = web.Application()
    world.far.attach(app, world.on_pipe)
    runner = web.AppRunner(app, shutdown_timeout=SHUTDOWN_TIMEOUT_S)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    pipe = await world.near.dial(f"{host}:{port}", PATH, 5.0)
    began = asyncio.get_running_loop().time()
    await runner.cleanup()
    assert asyncio.get_running_loop().time() - began < 2.0
    with pytest.raises(PipeClosed):
        await pipe.receive()


async def test_a_stream_whose_client_is_gone_before_the_answer_is_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    left = asyncio.Event()

    @web.middleware
    async def gone(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        left.set()
        return await handler(request)

    far = WsNetwork()
    world = World(WsNetwork(), far, "127.0.0.1")
    address = await far.serve("127.0.0.1:0", world.on_pipe, web.Application(middlewares=[gone]))
    with pytest.raises(PipeClosed):
        await world.near.dial(address, PATH, 5.0)
    await left.wait()
    await world.near.close()
    await far.close()
    assert world.served.empty()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


@websockets
async def test_why_nobody_was_reached_is_said_in_the_systems_words(world: World) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(PipeClosed) as caught:
            await world.near.dial(address, PATH, 5.0)
    assert caught.value.message == f"no connection to {address}: connection refused"


async def test_a_name_that_nobody_knows_is_said_in_the_systems_words_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", unknown)
    near = WsNetwork()
    with pytest.raises(PipeClosed) as caught:
        await near.dial("no.such.host:7400", PATH, 5.0)
    await near.close()
    assert caught.value.message == "no connection to no.such.host:7400: name or service not known"


@websockets
async def test_web_pages_are_refused(world: World) -> None:
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await session.ws_connect(
                f"http://{world.address}{PATH}", headers={"Origin": "http://evil.example"}
            )
    assert caught.value.status == 403


@websockets
async def test_text_and_oversized_messages_are_no_frames(world: World) -> None:
    async with aiohttp.ClientSession() as session:
        for send in (
            lambda ws: ws.send_str("text"),
            lambda ws: ws.send_bytes(bytes(WIRE_BYTES_MAX + 1000)),
        ):
            async with session.ws_connect(f"http://{world.address}{PATH}") as ws:
                _, far = await world.served.get()
                await send(ws)
                with pytest.raises(FrameError):
                    await far.receive()


@websockets
async def test_who_sends_too_large_a_frame_is_told_so(world: World) -> None:
    near, far = await world.pair()
    await near.send(bytes(WIRE_BYTES_MAX + 1000))
    reading = asyncio.ensure_future(far.receive())
    with pytest.raises(MalformedFrame, match="too large"):
        await near.receive()
    with pytest.raises(FrameError):
        await reading


@websockets
async def test_who_sends_what_is_no_frame_is_told_why_over_the_stream(world: World) -> None:
    told: asyncio.Queue[Exception | None] = asyncio.Queue()

    async def serve(pipe: FramePipe) -> None:
        stream = await accept(pipe, Hello(node=2))
        stream.on_message = lambda _: None
        told.put_nowait(await stream.wait_closed())

    world.behave = serve
    near = await world.near.dial(world.address, PATH, 5.0)
    core = LinkCore(dialler=True, hello=Hello(), limits=LinkLimits(), now=0.0)
    hello = core.take(0.0)
    assert hello is not None
    await near.send(hello)
    core.receive(await near.receive(), 0.0)
    await near.send(b"\0" * 100)
    with pytest.raises(MalformedFrame, match="checksum"):
        core.receive(await near.receive(), 0.0)
    with pytest.raises(PipeClosed):
        await near.receive()
    assert isinstance(await told.get(), FrameError)


def test_addresses_are_split_at_the_last_colon():
    assert split_address("127.0.0.1:7400") == ("127.0.0.1", 7400)
    assert split_address("[::1]:7400") == ("::1", 7400)
    for wrong in ("", "host", "host:", "host:http", "host:-1"):
        with pytest.raises(ValueError, match="not an address"):
            split_address(wrong)
