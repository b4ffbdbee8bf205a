"""Claims: a node that is told to stop answers what it was asked over HTTP before it closes anything, and says to those who ask
it for something new that another node is to be asked. Meanwhile it leads nothing, but is there: for its health, its status, its
peers, and for clients that come only now."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

import kvstore
from kvstore.adapters.ws_transport import split_address
from kvstore.bootstrap import mint_cluster_id, plan
from kvstore.config import HttpSection, NodeConfig, RaftSection
from kvstore.node import Node, production_adapters

WITHIN_S = 30.0
SOON_S = 10.0


@contextlib.asynccontextmanager
async def clustered(tmp_path, count):
    """Nodes that listen, and are a cluster."""
    config = NodeConfig(
        raft=RaftSection(election_timeout_s=0.2, heartbeat_s=0.05),
        http=HttpSection(shutdown_timeout_s=WITHIN_S),
    )
    nodes = [
        Node(str(tmp_path / str(n)), "127.0.0.1:0", "", config, production_adapters(config))
        for n in range(count)
    ]
    try:
        for node in nodes:
            await node.start()
        addresses = [node.address for node in nodes]
        cluster = mint_cluster_id(nodes[0].adapters.clock.wall_ms(), 1, addresses, [])
        for node, request in zip(nodes, plan(cluster, addresses), strict=True):
            await node.initialize(request)
        yield nodes
    finally:
        for node in nodes:
            await node.stop(drain=False)


@pytest.fixture
async def node(tmp_path):
    """A cluster of one."""
    async with clustered(tmp_path, 1) as nodes:
        yield nodes[0]


class Connection:
    """One that is kept, and takes whole answers."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    def send(self, text: str) -> None:
        self.writer.write(text.encode())

    async def answer(self):
        """(status, body as JSON)."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
        return int(head.split()[1]), json.loads(await self.reader.readexactly(length))

    async def ask(self, text: str):
        self.send(text)
        return await self.answer()

    async def begin_put(self) -> None:
        """A request that the node has taken up, and that waits for the last two bytes of its body."""
        self.send(put("/v1/kv/slow", 4, "Expect: 100-continue\r\n"))
        assert await self.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        self.send("ab")


@contextlib.asynccontextmanager
async def connected(node):
    reader, writer = await asyncio.open_connection(*split_address(node.address))
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()


def get(path: str) -> str:
    return f"GET {path} HTTP/1.1\r\nHost: n\r\n\r\n"


def put(path: str, length: int, more: str = "") -> str:
    return f"PUT {path} HTTP/1.1\r\nHost: n\r\n{more}Content-Length: {length}\r\n\r\n"


async def leads(node) -> bool:
    async with connected(node) as operator:
        _, status = await operator.ask(get("/v1/admin/status"))
    return any(each["role"] == "leader" for each in status["ranges"])


async def test_a_node_that_stops_answers_what_is_under_way_and_takes_nothing_new(node):
    async with (
        connected(node) as writing,
        connected(node) as watching,
        connected(node) as kept,
        connected(node) as operator,
        asyncio.timeout(WITHIN_S),
    ):
        assert (await operator.ask(get("/health/live")))[0] == 200
        while (await kept.ask(put("/v1/kv/a", 1) + "1"))[0] != 200:
            pass  # until it serves
        await writing.begin_put()
        watching.send(get("/v1/watch?key=a&wait=60s"))
        while not node.database.stats()["watches"]:
            await kept.ask(get("/health/live"))
        stopping = asyncio.ensure_future(node.stop())
        await asyncio.sleep(0)
        assert node.state == "draining"
        assert (await watching.answer())[1]["events"] == []
        assert (await operator.ask(get("/v1/admin/status")))[1]["state"] == "draining"
        refused, told = await kept.ask(get("/v1/kv/a"))
        assert (refused, told["code"], told["retryable"]) == (503, "node_stopped", True)
        async with connected(node) as late:
            refused, told = await late.ask(get("/v1/kv/a"))
            assert (refused, told["code"], told["retryable"]) == (503, "node_stopped", True)
        writing.send("cd")
        assert (await writing.answer())[0] == 200
        await stopping


async def test_the_health_of_a_node_that_stops_is_answered_to_the_end_on_old_connections_and_new_ones(
    node,
):
    async with connected(node) as writing, connected(node) as probing, asyncio.timeout(WITHIN_S):
        while (await probing.ask(get("/health/ready")))[0] != 200:
            pass
        await writing.begin_put()
        stopping = asyncio.ensure_future(node.stop())
        await asyncio.sleep(0)
        for _ in range(2):
            status, told = await probing.ask(get("/health/ready"))
            assert (status, told["state"]) == (503, "draining")
        async with connected(node) as late:
            assert (await late.ask(get("/health/ready")))[0] == 503
            assert (await late.ask(get("/health/live")))[0] == 200
        writing.send("cd")
        assert (await writing.answer())[0] == 200
        await stopping


async def test_while_a_node_waits_for_a_slow_request_others_lead_and_new_clients_are_served(
    tmp_path,
):
    async with clustered(tmp_path, 3) as nodes, asyncio.timeout(WITHIN_S):
        for node in nodes:
            async with connected(node) as probing:
                while (await probing.ask(get("/health/ready")))[0] != 200 or not await leads(
                    nodes[0]
                ):
                    pass
        others = ",".join(node.address for node in nodes[1:])
        async with connected(nodes[0]) as writing:
            await writing.begin_put()
            stopping = asyncio.ensure_future(nodes[0].stop())
            async with kvstore.connect(others, timeout=SOON_S) as database:
                await database.put(b"a", b"1")
                assert await database.get(b"a") == b"1"
            async with kvstore.connect(nodes[0].address, timeout=SOON_S) as database:
                assert await database.get(b"a") == b"1"
            while await leads(nodes[0]):
                pass
            assert not stopping.done()
            writing.send("cd")
            assert (await writing.answer())[0] == 200
            await stopping


async def test_a_node_that_stops_without_draining_says_so_to_whom_it_leaves(node):
    async with connected(node) as watching, connected(node) as kept, asyncio.timeout(WITHIN_S):
        while (await kept.ask(put("/v1/kv/a", 1) + "1"))[0] != 200:
            pass  # until it serves
        watching.send(get("/v1/watch?key=a&wait=60s"))
        while not node.database.stats()["watches"]:
            await kept.ask(get("/health/live"))
        stopping = asyncio.ensure_future(node.stop(drain=False))
        status, told = await watching.answer()
        assert (status, told["code"], told["retryable"]) == (503, "node_stopped", True)
        await stopping
