"""Claims of streams and links, over the simulated network: whole messages in order, a send that never waits, bounded
memory, stalls that end connections, and links that come back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kvstore.errors import (
    AuthenticationError,
    KVError,
    NodeStopped,
    PipeClosed,
    VersionMismatch,
    WrongCluster,
)
from kvstore.link import (
    BODY_BYTES_MAX,
    HELLO,
    Hello,
    LinkCore,
    LinkLimits,
    MalformedFrame,
    PeerStalled,
    WrongNode,
    encode_frame,
)
from kvstore.ports import FramePipe
from kvstore.sim import loop as sim
from kvstore.sim.loop import SimLoop
from kvstore.sim.network import SimHost, SimNetwork
from kvstore.streams import REFUSAL_LINGER_S, Backoff, PeerLink, Stream, accept, connect
from replication.errors import FrameError

LIMITS = LinkLimits(queue_bytes_max=2_000_000, message_bytes_max=1_000_000)


class World:
    """Two hosts: "near" dials, "far" serves and keeps what it was told."""

    def __init__(self, loop: SimLoop) -> None:
        self.loop = loop
        self.network = SimNetwork(random.Random(1), window_bytes=300_000)
        self.near: SimHost = self.network.host("near")
        self.far: SimHost = self.network.host("far")
        self.address = ""
        self.accepted: list[Stream] = []
        self.told: list[bytes] = []
        self.refusals: list[Exception] = []
        self.far_hello = Hello(cluster="c", node=2, kind="peer")
        self.check: Callable[[Hello], KVError | None] | None = None

    async def start(self, address: str = "far:0") -> World:
        self.address = await self.far.serve(address, self.on_pipe)
        return self

    async def on_pipe(self, path: str, pipe: FramePipe) -> None:
        try:
            stream = await accept(pipe, self.far_hello, limits=LIMITS, check=self.check)
        except (KVError, FrameError) as error:
            self.refusals.append(error)
            return
        self.accepted.append(stream)
        stream.on_message = self.told.append
        await stream.wait_closed()

    async def connect(self, **fields: Any) -> Stream:
        hello = Hello(**{"cluster": "c", "node": 1, "kind": "peer", **fields})
        return await connect(self.near, self.address, "/v1/peer", hello, limits=LIMITS)

    def link(self, **options: Any) -> PeerLink:
        return PeerLink(
            self.near,
            self.address,
            "/v1/peer",
            lambda: Hello(cluster="c", node=1, kind="peer", to=2),
            **{"rng": random.Random(5), "on_message": print, "limits": LIMITS, **options},
        )


def simulated(test: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test on a loop of virtual time, with a started world."""

    async def main(loop: SimLoop) -> None:
        await test(await World(loop).start())

    def run() -> None:
        sim.run(main, 1, time_limit_s=10_000.0)

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run


async def until(condition: Callable[[], object], limit_s: float = 60.0) -> None:
    async with asyncio.timeout(limit_s):
        for _ in range(10**9):
            if condition():
                return
            await asyncio.sleep(0.01)


# --- streams --------------------------------------------------------------------------------------


@simulated
async def test_each_side_knows_what_the_other_said(world: World) -> None:
    stream = await world.connect(features=("zstd",))
    await until(lambda: world.accepted)
    assert stream.peer.node == 2
    assert world.accepted[0].peer.features == ("zstd",)
    assert stream.is_open


@simulated
async def test_messages_of_any_size_arrive_whole_and_in_order(world: World) -> None:
    stream = await world.connect()
    rng = random.Random(2)
    sent = [rng.randbytes(rng.choice((0, 1, 500, BODY_BYTES_MAX, 600_000))) for _ in range(60)]
    for payload in sent:
        await until(lambda p=payload: stream.send(p))  # type: ignore[misc]
    await until(lambda: len(world.told) == len(sent))
    assert world.told == sent


@simulated
async def test_messages_that_came_before_anyone_listens_are_kept(world: World) -> None:
    stream = await world.connect()
    await until(lambda: world.accepted)
    for number in range(3):
        world.accepted[0].send(b"%d" % number)
    await asyncio.sleep(5.0)
    got: list[bytes] = []
    stream.on_message = got.append
    await until(lambda: len(got) == 3)
    assert got == [b"0", b"1", b"2"]


@simulated
async def test_send_never_waits_and_refuses_beyond_the_queue(world: World) -> None:
    stream = await world.connect()
    world.network.partition("near", "far")
    before = world.loop.time()
    accepted = 0
    while stream.send(bytes(10_000)):
        accepted += 1
    assert world.loop.time() == before
    assert stream.queue_bytes <= LIMITS.queue_bytes_max
    assert LIMITS.queue_bytes_max < accepted * 10_100 < LIMITS.queue_bytes_max + 700_000
    assert stream.stats()["refused_sends"] == 1
    world.network.heal()
    await until(lambda: len(world.told) == accepted)
    assert stream.send(b"again")


@simulated
async def test_a_peer_that_is_cut_off_is_given_up_by_both_sides(world: World) -> None:
    stream = await world.connect()
    stream.on_message = world.told.append
    await until(lambda: world.accepted)
    world.network.partition("near", "far")
    began = world.loop.time()
    assert isinstance(await stream.wait_closed(), PeerStalled)
    assert isinstance(await world.accepted[0].wait_closed(), PeerStalled)
    assert LIMITS.stall_timeout_s <= world.loop.time() - began <= LIMITS.stall_timeout_s * 2


@simulated
async def test_a_peer_that_does_not_read_is_given_up_although_it_talks(world: World) -> None:
    """The far side's frames pass, nothing of ours does."""
    stream = await world.connect()
    stream.on_message = lambda _: None
    await until(lambda: world.accepted)
    far = world.accepted[0]
    world.network.partition("near", "far", one_way=True)
    began = world.loop.time()
    while stream.is_open:
        stream.send(bytes(50_000))
        far.send(b"talking")
        await asyncio.sleep(0.1)
    assert isinstance(stream.error, PeerStalled)
    assert world.loop.time() - began <= LIMITS.stall_timeout_s * 2


@simulated
async def test_a_slow_link_that_moves_is_kept(world: World) -> None:
    stream = await world.connect()
    stream.on_message = lambda _: None
    world.network.set_delay("near", "far", (1.0, 1.5))
    sent = 0
    for _ in range(600):
        sent += stream.send(bytes(100_000))
        await asyncio.sleep(0.1)
    await until(lambda: len(world.told) == sent)
    assert stream.is_open


@simulated
async def test_a_short_clog_only_delays(world: World) -> None:
    stream = await world.connect()
    stream.on_message = lambda _: None
    for number in range(30):
        world.network.clog("near", "far", 2.0)
        stream.send(b"%d" % number)
        await asyncio.sleep(3.0)
    assert world.told == [b"%d" % number for number in range(30)]


@simulated
async def test_an_idle_stream_lives_for_ever(world: World) -> None:
    stream = await world.connect()
    stream.on_message = lambda _: None
    await asyncio.sleep(600.0)
    assert stream.is_open
    assert stream.rtt_s > 0
    assert stream.send(b"still")


@simulated
async def test_close_sends_what_is_queued_first(world: World) -> None:
    stream = await world.connect()
    for _ in range(18):
        assert stream.send(bytes(100_000))
    await stream.close(5.0)
    assert len(world.told) == 18
    assert not stream.send(b"late")
    assert await stream.wait_closed() is None
    await until(lambda: not world.accepted[0].is_open)


@simulated
async def test_close_ends_in_time_although_the_peer_takes_nothing(world: World) -> None:
    stream = await world.connect()
    world.network.partition("near", "far")
    for _ in range(18):
        stream.send(bytes(100_000))
    began = world.loop.time()
    await stream.close(2.0)
    assert world.loop.time() - began == pytest.approx(2.0)
    assert not stream.is_open


@simulated
async def test_a_reason_given_at_close_reaches_the_peer(world: World) -> None:
    stream = await world.connect()
    await until(lambda: world.accepted)
    await stream.close(1.0, reason=NodeStopped("draining"))
    error = await world.accepted[0].wait_closed()
    assert isinstance(error, NodeStopped)
    assert error.message == "draining"


@simulated
async def test_on_close_is_called_once_and_never_from_within_send_or_abort(world: World) -> None:
    stream = await world.connect()
    ends: list[Exception | None] = []
    stream.on_close = ends.append
    stream.abort()
    stream.abort()
    assert not stream.send(b"x")
    assert ends == []
    await asyncio.sleep(1.0)
    assert ends == [None]
    late: list[Exception | None] = []
    stream.on_close = late.append
    await asyncio.sleep(0)
    assert late == [None]
    await until(lambda: isinstance(world.accepted[0].error, PipeClosed))


@simulated
async def test_a_broken_connection_ends_both_sides_with_pipe_closed(world: World) -> None:
    stream = await world.connect()
    stream.on_message = lambda _: None
    await until(lambda: world.accepted)
    assert world.network.break_connections("near", "far") == 1
    assert type(await stream.wait_closed()) is PipeClosed
    assert type(await world.accepted[0].wait_closed()) is PipeClosed


@simulated
async def test_a_callback_may_end_the_stream_and_gets_nothing_after_that(world: World) -> None:
    stream = await world.connect()
    await until(lambda: world.accepted)
    for number in range(5):
        world.accepted[0].send(b"%d" % number)
    got: list[bytes] = []

    def once(message: bytes) -> None:
        got.append(message)
        stream.abort()

    await asyncio.sleep(1.0)
    stream.on_message = once
    await stream.wait_closed()
    await asyncio.sleep(1.0)
    assert got == [b"0"]


@simulated
async def test_damaged_bytes_end_the_stream_with_a_frame_error(world: World) -> None:
    stream = await world.connect()
    await until(lambda: world.accepted)
    pipe = world.network.pipes_of("near")[0]
    await pipe.send(b"not a frame at all")
    assert isinstance(await world.accepted[0].wait_closed(), FrameError)
    assert isinstance(stream, Stream)
    assert world.told == []


@simulated
async def test_who_sent_damaged_bytes_is_told_why(world: World) -> None:
    stream = await world.connect()
    stream.on_message = lambda _: None
    await until(lambda: world.accepted)
    await world.network.pipes_of("near")[0].send(b"not a frame at all")
    error = await stream.wait_closed()
    assert isinstance(error, MalformedFrame)
    assert error.code == "malformed_frame"
    assert error.message == "a frame of the unknown kind 0x72662061"


@simulated
async def test_who_sent_a_message_that_does_not_decode_is_told_why(world: World) -> None:
    class Refusing(list[bytes]):
        def append(self, _: bytes) -> None:
            raise FrameError("not a message of requests")

    world.told = Refusing()
    stream = await world.connect()
    stream.on_message = lambda _: None
    stream.send(b"rubbish")
    error = await stream.wait_closed()
    assert isinstance(error, MalformedFrame)
    assert error.message == "not a message of requests"
    assert isinstance(await world.accepted[0].wait_closed(), FrameError)


@simulated
async def test_who_does_not_listen_to_the_reason_is_cut_off_in_time(world: World) -> None:
    stream = await world.connect()
    await until(lambda: world.accepted)
    far = world.accepted[0]
    while far.send(bytes(100_000)):
        pass  # the near side reads nothing: the wire is full
    ended: list[float] = []
    far.on_close = lambda _: ended.append(world.loop.time())
    await world.network.pipes_of("near")[0].send(b"not a frame at all")
    await until(lambda: not far.is_open)
    began = world.loop.time()
    assert not far.send(b"more")
    assert isinstance(await far.wait_closed(), FrameError)
    assert ended[0] - began <= 2 * REFUSAL_LINGER_S
    stream.abort()


@simulated
async def test_a_malformed_handshake_is_answered_with_the_reason(world: World) -> None:
    pipe = await world.near.dial(world.address, "/v1/peer", 5.0)
    await pipe.send(encode_frame(HELLO, 0, b"rubbish"))
    core = LinkCore(dialler=True, hello=Hello(), limits=LIMITS, now=0.0)
    with pytest.raises(MalformedFrame, match="malformed handshake"):
        core.receive(await pipe.receive(), 0.0)
    await until(lambda: world.refusals)
    assert [type(each) for each in world.refusals] == [FrameError]


class TricklingPipe:
    """A wire that takes one frame, and then lets the rest leave byte by byte for a while; the peer talks all the time."""

    def __init__(self, loop: SimLoop, trickle_s: float) -> None:
        self._loop = loop
        self._until = loop.time() + trickle_s
        self._aborted: asyncio.Future[None] = loop.create_future()
        self._far = LinkCore(dialler=False, hello=Hello(), limits=LIMITS, now=loop.time())
        self.sent = 0

    def try_send(self, frame: bytes) -> bool:
        return False

    async def send(self, frame: bytes) -> None:
        self.sent += 1
        if self.sent == 1:
            self._far.receive(frame, 0.0)
            return
        await self._aborted
        raise PipeClosed

    async def receive(self) -> bytes:
        if self._far.frames_out:
            await asyncio.sleep(0.5)
        if self._aborted.done():
            raise PipeClosed
        return self._far.take(0.0) or self._far.direct(b"talking", 0.0) or b""

    def buffered_bytes(self) -> int:
        return 1_000_000 + max(0, int((self._until - self._loop.time()) * 10))

    def abort(self) -> None:
        if not self._aborted.done():
            self._aborted.set_result(None)

    async def close(self, timeout_s: float) -> None:
        self.abort()


@simulated
async def test_a_wire_is_kept_while_what_it_holds_becomes_less(world: World) -> None:
    pipe = TricklingPipe(world.loop, trickle_s=60.0)

    class Dialled:
        async def dial(self, address: str, path: str, timeout_s: float) -> FramePipe:
            return pipe

        serve = world.far.serve

    stream = await connect(Dialled(), "", "", Hello(), limits=LIMITS)
    stream.on_message = lambda _: None
    began = world.loop.time()
    stream.send(bytes(10))
    assert isinstance(await stream.wait_closed(), PeerStalled)
    assert 60.0 <= world.loop.time() - began < 60.0 + 2 * LIMITS.stall_timeout_s


# --- handshake ------------------------------------------------------------------------------------


@simulated
async def test_refusals_are_typed_on_both_sides(world: World) -> None:
    for fields, error in (
        ({"cluster": "other"}, WrongCluster),
        ({"to": 3}, WrongNode),
        ({"protocol": 99, "protocol_min": 98}, VersionMismatch),
    ):
        with pytest.raises(error):
            await world.connect(**fields)
        await until(lambda: world.refusals)
        assert type(world.refusals.pop()) is error
    world.check = lambda hello: AuthenticationError(f"not node {hello.node}")
    with pytest.raises(AuthenticationError, match="not node 1"):
        await world.connect()
    assert world.network.pipes_of("near") == []


@simulated
async def test_a_server_that_never_answers_is_given_up_in_time(world: World) -> None:
    async def silent(path: str, pipe: FramePipe) -> None:
        await asyncio.sleep(1e6)

    address = await world.far.serve("far:0", silent)
    began = world.loop.time()
    with pytest.raises(PeerStalled):
        await connect(world.near, address, "/v1/peer", Hello(), timeout_s=2.0)
    assert world.loop.time() - began == pytest.approx(2.0)


@simulated
async def test_a_client_that_never_speaks_does_not_hold_a_server_for_long(world: World) -> None:
    pipe = await world.near.dial(world.address, "/v1/peer", 1.0)
    await until(lambda: world.refusals, limit_s=LIMITS.handshake_timeout_s + 0.1)
    assert isinstance(world.refusals[0], PeerStalled)
    with pytest.raises(PipeClosed):
        await pipe.receive()


@simulated
async def test_nobody_listening_is_pipe_closed(world: World) -> None:
    with pytest.raises(PipeClosed):
        await connect(world.near, "far:1", "/v1/peer", Hello())


# --- links ----------------------------------------------------------------------------------------


@simulated
async def test_a_link_comes_up_and_carries_messages(world: World) -> None:
    ups: list[int] = []
    link = world.link(on_up=lambda stream: ups.append(stream.peer.node))
    assert not link.send(b"too early")
    link.start()
    await until(lambda: link.up)
    assert link.send(b"hello")
    await until(lambda: world.told == [b"hello"])
    assert ups == [2]
    assert link.drops == 1
    await link.close()
    assert not link.up


@simulated
async def test_a_link_comes_back_after_every_break(world: World) -> None:
    states: list[str] = []
    link = world.link(
        on_up=lambda _: states.append("up"), on_down=lambda error: states.append(str(error))
    )
    link.start()
    for _ in range(5):
        await until(lambda: link.up)
        world.network.break_connections("near")
        await until(lambda: not link.up)
    await until(lambda: link.up)
    assert states == ["up", "the connection is closed"] * 5 + ["up"]
    await link.close()


@simulated
async def test_pauses_between_dials_grow_to_their_limit_and_are_jittered(world: World) -> None:
    backoff = Backoff(first_s=0.1, max_s=3.0)
    world.network.crash("far")
    link = world.link(backoff=backoff)
    link.start()
    await asyncio.sleep(300.0)
    assert 300 / 3.0 <= link.dials <= 300 / 1.5 + 10
    assert isinstance(link.last_error, PipeClosed)
    await link.close()
    rng = random.Random(1)
    assert all(backoff.pause_s(n, rng) <= 3.0 for n in range(100))
    assert len({backoff.pause_s(0, rng) for _ in range(10)}) == 10


@simulated
async def test_a_peer_that_accepts_and_hangs_up_at_once_is_not_dialled_in_a_hot_loop(
    world: World,
) -> None:
    async def hang_up(path: str, pipe: FramePipe) -> None:
        stream = await accept(pipe, Hello(cluster="c", node=2))
        stream.abort()

    address = await world.far.serve("far:0", hang_up)
    link = world.link()
    link.set_address(address)
    link.start()
    await asyncio.sleep(100.0)
    assert 40 <= link.dials <= 120
    await link.close()


@simulated
async def test_wake_ends_the_pause(world: World) -> None:
    world.network.crash("far")
    link = world.link(backoff=Backoff(first_s=1000.0, max_s=1000.0))
    link.start()
    await asyncio.sleep(10.0)
    world.far = world.network.host("far")
    await world.start(world.address)
    await asyncio.sleep(10.0)
    assert not link.up
    link.wake()
    await until(lambda: link.up, limit_s=1.0)
    await link.close()


@simulated
async def test_a_peer_that_moved_is_followed_at_once(world: World) -> None:
    link = world.link(backoff=Backoff(first_s=1000.0, max_s=1000.0))
    link.start()
    await until(lambda: link.up)
    old = world.accepted[0]
    await world.start("far:0")
    link.set_address(world.address)
    await until(lambda: len(world.accepted) == 2 and link.up, limit_s=1.0)
    await until(lambda: not old.is_open)
    link.set_address(world.address)  # the same: nothing happens
    await asyncio.sleep(1.0)
    assert link.dials == 2
    await link.close()


@simulated
async def test_a_link_reports_a_refusal_and_tries_on(world: World) -> None:
    world.far_hello = Hello(cluster="c", node=9)
    link = world.link()
    link.start()
    await until(lambda: isinstance(link.last_error, WrongNode))
    world.far_hello = Hello(cluster="c", node=2)
    await until(lambda: link.up)
    await link.close()


@simulated
async def test_close_ends_a_link_at_any_moment(world: World) -> None:
    for moment in range(40):
        link = world.link()
        link.start()
        await asyncio.sleep(moment * 0.000_3)
        await link.close()
        assert not link.up
        await asyncio.sleep(1.0)
        assert link.dials <= 1
    assert world.network.pipes_of("near") == []
