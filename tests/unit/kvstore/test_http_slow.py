"""Claims: a caller who does not read his answer is counted as long as it waits, and that is bounded; so are the
time for which a connection may be idle, or its request half there, and the number of connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest
from aiohttp import test_utils, web

from kvstore.adapters import http_load, http_server, ws_transport
from kvstore.adapters.loop import new_event_loop
from tests.unit.kvstore.fake_node import FakeDatabase, FakeNode

ENDED_WITHIN_S = 20.0
LARGE = bytes(16 << 20)  # more than the buffers of a connection hold


@contextlib.asynccontextmanager
async def served():
    """A gateway, and events that are set when the first request's handler begins and has ended."""
    begun, ended = asyncio.Event(), asyncio.Event()

    @web.middleware
    async def note(request, handler):
        begun.set()
        try:
            return await handler(request)
        finally:
            ended.set()

    app = web.Application(middlewares=[note])
    node = FakeNode(FakeDatabase({b"large": LARGE, b"small": b"1"}))
    http_server.add_routes(app, node, node.metrics.observe_request)
    async with test_utils.TestClient(test_utils.TestServer(app)) as http:
        yield http, begun, ended


@contextlib.asynccontextmanager
async def unread(http, path: str):
    """A connection that has asked for `path`, and reads nothing until told to."""
    asking = socket.create_connection((http.host, http.port))
    asking.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_sendall(
            asking, f"GET {path} HTTP/1.1\r\nHost: n\r\n\r\n".encode()
        )
        yield asking
    finally:
        asking.close()


async def read_to_the_end(asking: socket.socket) -> int:
    total = 0
    with contextlib.suppress(ConnectionResetError):
        while data := await asyncio.get_running_loop().sock_recv(asking, 1 << 20):
            total += len(data)
            if total >= len(LARGE):
                break
    return total


async def test_an_answer_that_is_not_read_in_time_ends_with_its_connection(monkeypatch):
    monkeypatch.setattr(http_server, "ANSWER_TIMEOUT_S", 0.05)
    async with served() as (http, _, ended), unread(http, "/v1/kv/large") as asking:
        await ended.wait()
        assert await read_to_the_end(asking) < len(LARGE)
        assert (await http.get("/v1/kv/small")).status == 200


async def test_an_answer_that_is_read_slowly_arrives_whole():
    async with served() as (http, _, _), unread(http, "/v1/kv/large") as asking:
        assert await read_to_the_end(asking) >= len(LARGE)


async def test_a_request_is_under_way_until_its_answer_has_left(monkeypatch):
    monkeypatch.setattr(http_load, "REQUESTS_IN_FLIGHT_MAX", 1)
    async with served() as (http, begun, ended), unread(http, "/v1/kv/large") as asking:
        await begun.wait()
        refused = await http.get("/v1/kv/small")
        assert refused.status == 429
        assert (await http.get("/health/live")).status == 200
        await read_to_the_end(asking)
        await ended.wait()


async def test_an_answer_that_is_not_read_takes_room_from_others_until_it_is(monkeypatch):
    monkeypatch.setattr(http_load, "ANSWER_BYTES_IN_FLIGHT_MAX", len(LARGE) + 100)
    async with served() as (http, begun, ended), unread(http, "/v1/kv/large") as asking:
        await begun.wait()
        refused = await http.get("/v1/kv/large")
        assert (refused.status, (await refused.json())["code"]) == (429, "throttled")
        assert refused.headers["Retry-After"] == "1"
        assert (await http.get("/v1/kv/small")).status == 200
        await read_to_the_end(asking)
        await ended.wait()
        assert len(await (await http.get("/v1/kv/large")).read()) == len(LARGE)


async def listening():
    """A gateway on a node's port, and its address."""

    async def on_pipe(path, pipe):
        raise AssertionError("nobody asked for a stream")

    app = web.Application()
    node = FakeNode(FakeDatabase())
    http_server.add_routes(app, node, node.metrics.observe_request)
    network = ws_transport.WsNetwork()
    return network, await network.serve("127.0.0.1:0", on_pipe, app)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /health/live HTTP/1.1\r\nHost:",
        b"GET /health/live HTTP/1.1\r\nHost: n\r\n\r\n",
        b"GET /health/live HTTP/1.1\r\nHost: n\r\n\r\nGET",
    ],
)
async def test_a_connection_that_asks_nothing_more_is_ended(monkeypatch, sent):
    monkeypatch.setattr(ws_transport, "KEEPALIVE_TIMEOUT_S", 0.05)

    network, address = await listening()
    reader, writer = await asyncio.open_connection(*ws_transport.split_address(address))
    try:
        writer.write(sent)
        async with asyncio.timeout(ENDED_WITHIN_S):
            answer = await reader.read()
        assert answer.count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\n")
    finally:
        writer.close()
        await network.close()


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, new_event_loop])
def test_a_connection_too_many_is_told_so_and_another_may_come_when_one_has_gone(
    monkeypatch, loop_factory
):
    monkeypatch.setattr(ws_transport, "connections_max", lambda: 2)
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(one_connection_too_many())


async def one_connection_too_many() -> None:
    network, address = await listening()
    writers = []

    async def asked() -> bytes:
        """The first line of the answer to one request, over a connection of its own that stays."""
        reader, writer = await asyncio.open_connection(*ws_transport.split_address(address))
        writers.append(writer)
        writer.write(b"GET /health/live HTTP/1.1\r\nHost: n\r\n\r\n")
        try:
            return await reader.readline()
        except ConnectionResetError:  # refused before it was read
            return b""

    try:
        assert [await asked() for _ in range(2)] == [b"HTTP/1.1 200 OK\r\n"] * 2
        reader, writer = await asyncio.open_connection(*ws_transport.split_address(address))
        writers.append(writer)
        refusal = await reader.read()
        assert refusal.startswith(b"HTTP/1.1 429 ")
        assert b'"code":"throttled"' in refusal
        writers[0].close()
        async with asyncio.timeout(ENDED_WITHIN_S):
            while await asked() != b"HTTP/1.1 200 OK\r\n":  # until the node has seen that it went
                pass
    finally:
        for writer in writers:
            writer.close()
        await network.close()
