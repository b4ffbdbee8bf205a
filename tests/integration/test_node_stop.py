"""Claims: a node that is told to stop answers what it was asked over HTTP before it closes anything, takes nothing new, and
says to those who ask on an old connection that another node is to be asked."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from kvstore.adapters.ws_transport import split_address
from kvstore.bootstrap import mint_cluster_id, plan
from kvstore.config import HttpSection, NodeConfig, RaftSection
from kvstore.node import Node, production_adapters

WITHIN_S = 30.0


@pytest.fixture
async def node(tmp_path):
    """A cluster of one that listens, and serves."""
    config = NodeConfig(
        raft=RaftSection(election_timeout_s=0.2, heartbeat_s=0.05),
        http=HttpSection(shutdown_timeout_s=WITHIN_S),
    )
    node = Node(str(tmp_path), "127.0.0.1:0", "", config, production_adapters(config))
    await node.start()
    cluster = mint_cluster_id(node.adapters.clock.wall_ms(), 1, [node.address], [])
    await node.initialize(plan(cluster, [node.address])[0])
    yield node
    await node.stop(drain=False)


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


@contextlib.asynccontextmanager
async def connected(node):
    reader, writer = await asyncio.open_connection(*split_address(node.address))
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()


def get(path: str) -> str:
    return f"GET {path} HTTP/1.1\r\nHost: n\r\n\r\n"


def put(path: str, length: int) -> str:
    return f"PUT {path} HTTP/1.1\r\nHost: n\r\nContent-Length: {length}\r\n\r\n"


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
        writing.send(put("/v1/kv/slow", 4) + "ab")
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
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*split_address(node.address))
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
