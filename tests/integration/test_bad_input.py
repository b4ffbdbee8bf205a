"""Claims: what is malformed, too new, meant for another cluster, or too much, gets a clear typed error; the connection may
end, the node goes on, and nothing was done."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from kvstore import errors
from kvstore.bootstrap import mint_cluster_id, plan
from kvstore.client import Database
from kvstore.config import LimitsSection, NetworkSection, NodeConfig, RaftSection
from kvstore.embedded import ADDRESS, EmbeddedAdapters
from kvstore.link import Hello, MalformedFrame
from kvstore.node import Node
from kvstore.streams import connect
from txn.messages import Failure, Prepare, Read, ReadReply, Reply
from txn.types import Write

CLIENT_PATH = "/v1/stream"
encode = msgspec.msgpack.encode
decode_replies = msgspec.msgpack.Decoder(list[Reply]).decode


@asynccontextmanager
async def one_node(path, limits=None):
    config = NodeConfig(
        raft=RaftSection(election_timeout_s=0.2, heartbeat_s=0.05), limits=limits or LimitsSection()
    )
    adapters = EmbeddedAdapters(config)
    node = Node(str(path), ADDRESS, "", config, adapters)
    await node.start()
    try:
        cluster = mint_cluster_id(adapters.clock.wall_ms(), 1, [ADDRESS], [])
        await node.initialize(plan(cluster, [ADDRESS])[0])
        async with Database(
            adapters.network, [ADDRESS], adapters.clock, adapters.random.stream("t")
        ) as db:
            await db.put(b"before", b"1")
            yield node, db
            assert await db.get(b"before") == b"1"
            assert node.live()
    finally:
        await node.stop(drain=False)


def hello(to, **changes):
    return msgspec.structs.replace(Hello(cluster=to.cluster_id, kind="client"), **changes)


async def stream_of(node):
    return await connect(node.adapters.network, ADDRESS, CLIENT_PATH, hello(node))


async def ask(node, payload):
    """The node's answer to one message, or what ended the stream."""
    stream = await stream_of(node)
    answer = asyncio.get_running_loop().create_future()

    def tell(found):
        if not answer.done():
            answer.set_result(found)

    stream.on_close = tell
    stream.on_message = tell
    stream.send(payload)
    async with asyncio.timeout(5):
        found = await answer
    stream.abort()
    return decode_replies(found[1:]) if isinstance(found, bytes) else found


async def test_another_cluster_is_refused_by_name(tmp_path):
    async with one_node(tmp_path) as (node, _):
        with pytest.raises(errors.WrongCluster):
            await connect(
                node.adapters.network, ADDRESS, CLIENT_PATH, hello(node, cluster="0" * 32)
            )


async def test_a_protocol_that_is_too_new_is_refused(tmp_path):
    async with one_node(tmp_path) as (node, _):
        with pytest.raises(errors.VersionMismatch):
            await connect(
                node.adapters.network,
                ADDRESS,
                CLIENT_PATH,
                hello(node, protocol=99, protocol_min=99),
            )


async def test_somebody_who_is_no_member_gets_no_peer_stream(tmp_path):
    async with one_node(tmp_path) as (node, _):
        for path, kind in (("/v1/peer", "peer"), ("/v1/snapshot", "snapshot")):
            with pytest.raises(errors.KVError):
                await connect(node.adapters.network, ADDRESS, path, hello(node, kind=kind, node=77))


@pytest.mark.parametrize(
    "payload",
    [
        b"\x09rubbish",
        b"\x02rubbish",
        b"\x02" + encode([[99, 1]]),
        b"\x02" + encode([[1, "not a number"]]),
        b"\x02" + b"\x91" * 5_000,
        b"\x02" + encode([[11, 1]] * 20_000),
        b"\x02" + encode([[1, 1, 0, 0, 0, [b""] * 30_000]]),
        b"\x01" + encode([]),
    ],
)
async def test_a_malformed_message_ends_its_stream_and_nothing_else(tmp_path, payload):
    async with one_node(tmp_path) as (node, db):
        ended = await ask(node, payload)
        assert isinstance(ended, MalformedFrame)
        await db.get(b"before")
        assert node.status()["connections"]["malformed_total"] == 1


async def until_it_ends(pipe):
    while True:
        await pipe.receive()


async def test_a_malformed_handshake_ends_its_connection_and_is_counted(tmp_path):
    async with one_node(tmp_path) as (node, db):
        pipe = await node.adapters.network.dial(ADDRESS, CLIENT_PATH, 1.0)
        await pipe.send(b"rubbish")
        with pytest.raises(errors.PipeClosed):
            await until_it_ends(pipe)
        await db.get(b"before")
        assert node.status()["connections"]["malformed_total"] == 1


async def test_who_does_not_shake_hands_is_given_up_after_the_connect_timeout(tmp_path):
    config = NodeConfig(network=NetworkSection(connect_timeout_s=0.05))
    node = Node(str(tmp_path), ADDRESS, "", config, EmbeddedAdapters(config))
    await node.start()
    try:
        pipe = await node.adapters.network.dial(ADDRESS, CLIENT_PATH, 1.0)
        async with asyncio.timeout(2.0):  # the default of a link is 3 s
            with pytest.raises(errors.PipeClosed):
                await until_it_ends(pipe)
    finally:
        await node.stop(drain=False)


async def test_a_prepare_for_a_key_that_the_range_does_not_hold_is_refused(tmp_path):
    async with one_node(tmp_path) as (node, _):
        request = Prepare(5, 1, 1, bytes(15) + b"\x01", b"k", b"k", [Write(0, b"k", b"v")])
        (reply,) = await ask(node, b"\x02" + encode([request]))
        assert isinstance(reply, Failure) or reply.status == 5  # refused, or below any timestamp
        assert reply.id == 5


async def test_more_requests_than_the_node_takes_on_are_throttled(tmp_path):
    async with one_node(tmp_path, LimitsSection(requests_in_flight=10)) as (node, _):
        requests = [Read(number, 0, 0, 0, [b"before"]) for number in range(1, 31)]
        replies = await ask(node, b"\x02" + encode(requests))
        throttled = [each for each in replies if isinstance(each, Failure)]
        assert len(throttled) == 20
        assert {each.code for each in throttled} == {"throttled"}


async def test_more_requests_than_one_connection_may_have_in_flight_are_throttled(tmp_path):
    async with one_node(tmp_path, LimitsSection(requests_per_connection=10)) as (node, db):
        requests = [Read(number, 0, 0, 0, [b"before"]) for number in range(1, 31)]
        replies = await ask(node, b"\x02" + encode(requests))
        throttled = [each.id for each in replies if isinstance(each, Failure)]
        assert throttled == list(range(11, 31))  # the first ones are answered
        assert node.status()["connections"]["throttled_total"] == 20
        assert node.store.open_requests == 0
        found = await asyncio.gather(*(db.get(b"before") for _ in range(100)))
        assert len({*found}) == 1  # a client tries again, and others have room


async def test_watches_that_wait_leave_their_connection_its_requests(tmp_path):
    async with one_node(tmp_path, LimitsSection(requests_per_connection=10)) as (node, db):
        async with AsyncExitStack() as stack:
            watches = [await stack.enter_async_context(db.watch(key=b"watched")) for _ in range(20)]
            pulls = [asyncio.ensure_future(anext(aiter(each))) for each in watches]
            async with asyncio.timeout(5):
                while node.store.polls.open < 20:  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(0.01)
            refused = node.status()["connections"]["throttled_total"]
            assert await asyncio.gather(*(db.get(b"before") for _ in range(10))) == [b"1"] * 10
            assert node.status()["connections"]["throttled_total"] == refused
            await db.put(b"watched", b"1")
            async with asyncio.timeout(5):
                await asyncio.gather(*pulls)
        assert not node.store.polls.askers


async def test_more_bytes_than_wait_for_a_turn_are_throttled_and_there_is_room_afterwards(tmp_path):
    limits_ = LimitsSection(inbox_bytes=10 << 20)
    async with one_node(tmp_path, limits_) as (node, _):
        told: asyncio.Queue[Any] = asyncio.Queue()
        asker = SimpleNamespace(answer=told.put_nowait)
        for number in range(1, 5):  # frames of 4 MiB, before any turn: two fit
            node.store.accept(asker, [Read(number, 0, 0, 0, [b"before"])], 4 << 20)
        refused = [told.get_nowait() for _ in range(told.qsize())]
        assert [(each.id, each.code) for each in refused] == [(3, "throttled"), (4, "throttled")]
        assert [type(await told.get()) for _ in range(2)] == [ReadReply, ReadReply]
        node.store.accept(asker, [Read(5, 0, 0, 0, [b"before"])], 8 << 20)
        assert type(await told.get()) is ReadReply


async def test_a_node_that_is_to_join_says_that_it_cannot(tmp_path):
    adapters = EmbeddedAdapters(NodeConfig())
    node = Node(str(tmp_path), ADDRESS, "", NodeConfig(), adapters, join=("127.0.0.1:7400",))
    with pytest.raises(errors.ConfigError, match="kvctl init"):
        await node.start()
    await node.stop(drain=False)
    assert not (tmp_path / "node.toml").exists()


async def test_a_node_of_another_cluster_does_not_take_a_second_init(tmp_path):
    async with one_node(tmp_path) as (node, _):
        other = mint_cluster_id(1_700_000_000_000, 2, [ADDRESS], [])
        with pytest.raises(errors.WrongCluster):
            await node.initialize(plan(other, [ADDRESS])[0])


async def test_the_directory_of_another_node_is_refused_and_left_alone(tmp_path):
    async with one_node(tmp_path):
        pass
    config = NodeConfig()
    for _ in range(2):
        elsewhere = Node(str(tmp_path), "embedded:2", "", config, EmbeddedAdapters(config))
        with pytest.raises(errors.DataDirectoryError, match="belongs to node 1"):
            await elsewhere.start()
        await elsewhere.stop(drain=False)
