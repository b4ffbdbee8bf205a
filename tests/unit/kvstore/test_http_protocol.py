"""Claims of what is not well-formed HTTP, at a node's own port: a body that turns out to be malformed is refused at once,
nothing that clients sent is logged, and neither malformed requests nor lost clients are errors of ours."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from unittest import mock

import pytest
from aiohttp import web

from kvstore.adapters import http_server, ws_transport
from kvstore.adapters.http_protocol import ServerProtocol
from tests.unit.kvstore.fake_node import FakeDatabase, FakeNode

WITHIN_S = 20.0
CHUNKED = b"PUT /v1/kv/SECRET HTTP/1.1\r\nHost: n\r\nTransfer-Encoding: chunked\r\n\r\n"
LONG = b"PUT /v1/kv/SECRET HTTP/1.1\r\nHost: n\r\nContent-Length: 10\r\n\r\n"
HEALTH = b"GET /health/live HTTP/1.1\r\nHost: n\r\n\r\n"


@pytest.fixture(autouse=True)
def _logged(caplog):
    caplog.set_level(logging.INFO)


@contextlib.asynccontextmanager
async def listening(only=None):
    """(host, port, requests of which something has been read) of a gateway; or of `only`, for everything."""
    begun: asyncio.Queue[web.Request] = asyncio.Queue()

    async def on_pipe(path, pipe):
        raise AssertionError("nobody asked for a stream")

    @web.middleware
    async def note(request, handler):
        begun.put_nowait(request)
        return await handler(request)

    app = web.Application(middlewares=[note])
    if only is None:
        http_server.add_routes(app, FakeNode(FakeDatabase()))
    else:
        app.router.add_route("*", "/{path:.*}", only)
    network = ws_transport.WsNetwork()
    try:
        async with asyncio.timeout(WITHIN_S):
            address = await network.serve("127.0.0.1:0", on_pipe, app)
            yield *ws_transport.split_address(address), begun
    finally:
        await network.close()


@contextlib.asynccontextmanager
async def connected(host, port):
    reader, writer = await asyncio.open_connection(host, port)
    try:
        yield reader, writer
    finally:
        writer.close()


def errors_of(caplog):
    return [each for each in caplog.records if each.levelno > logging.INFO]


def text_of(caplog):
    return caplog.text + "".join(str(vars(each)) for each in caplog.records)


async def test_a_body_that_turns_out_malformed_is_refused_at_once(caplog):
    async with listening() as (host, port, begun), connected(host, port) as (reader, writer):
        writer.write(CHUNKED + b"3\r\nabc\r\n")
        await begun.get()
        writer.write(b"SECRET\r\n")
        answer = await reader.read()  # and the connection ends
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b'"code":"invalid_argument"' in answer
    assert errors_of(caplog) == []


@contextlib.contextmanager
def reading_bodies(go_on):
    """A connection whose handler reads the body of a PUT once it may, and a future of what that raised, in words."""
    told = asyncio.get_running_loop().create_future()

    async def only(request):
        await go_on.wait()
        if request.method == "PUT":
            with pytest.raises(web.RequestPayloadError) as raised:
                await request.read()
            told.set_result(str(raised.value))
        return web.Response()

    protocol = ServerProtocol(web.Server(only), loop=asyncio.get_running_loop())
    transport = mock.create_autospec(asyncio.Transport)
    transport.is_closing.return_value = False
    protocol.connection_made(transport)
    yield protocol, told
    protocol.connection_lost(None)


async def test_a_malformed_body_that_waits_for_its_turn_is_told_when_that_comes():
    go_on = asyncio.Event()
    with reading_bodies(go_on) as (protocol, told):
        protocol.data_received(HEALTH + CHUNKED + b"3\r\nabc\r\n")
        protocol.data_received(b"SECRET\r\n")
        go_on.set()
        assert await asyncio.wait_for(told, WITHIN_S) == "the body is malformed"


@pytest.mark.parametrize("turns", range(4))
async def test_a_body_that_turns_malformed_while_its_request_is_taken_up_is_told(turns):
    go_on = asyncio.Event()
    go_on.set()
    with reading_bodies(go_on) as (protocol, told):
        await asyncio.sleep(0)  # the connection waits for its first request
        protocol.data_received(CHUNKED)
        for _ in range(turns):  # of the loop; in one, the request is neither queued nor current
            await asyncio.sleep(0)
        protocol.data_received(b"SECRET\r\n")
        assert await asyncio.wait_for(told, 1.0) == "the body is malformed"


@pytest.mark.parametrize("turns", range(4))
async def test_a_body_behind_a_request_for_an_upgrade_that_turns_malformed_is_told(turns):
    """Such bytes come to the parser once that request has been answered."""
    go_on = asyncio.Event()
    with reading_bodies(go_on) as (protocol, told):
        await asyncio.sleep(0)
        upgrade = HEALTH.replace(b"Host", b"Connection: upgrade\r\nUpgrade: websocket\r\nHost")
        protocol.data_received(upgrade + CHUNKED)
        answered = asyncio.Event()
        protocol.transport.write.side_effect = lambda _: answered.set()
        go_on.set()
        await answered.wait()
        for _ in range(turns):
            await asyncio.sleep(0)
        protocol.data_received(b"SECRET\r\n")
        assert await asyncio.wait_for(told, 1.0) == "the body is malformed"


async def test_requests_that_follow_each_other_on_a_connection_are_all_answered():
    async with listening() as (host, port, _), connected(host, port) as (reader, writer):
        whole = CHUNKED.replace(b"SECRET", b"k") + b"3\r\nabc\r\n0\r\n\r\n"
        writer.write((HEALTH + whole) * 3)
        found = b""
        while found.count(b"HTTP/1.1 200 ") < 6 and (some := await reader.read(1 << 16)):
            found += some
    assert found.count(b"HTTP/1.1 ") == 6


@pytest.mark.parametrize(
    "sent",
    [
        b"PUT /v1/kv/SECRET\xff HTTP/1.1\r\nHost: n\r\nContent-Length: 1\r\n\r\na",
        CHUNKED + b"SECRET\r\n",
        b"SECRET\r\n\r\n",
        b"GET /v1/kv/k HTTP/1.1\r\nHost: n\r\nSECRET\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_refused_and_not_logged(caplog, sent):
    async with listening() as (host, port, _), connected(host, port) as (reader, writer):
        writer.write(sent)
        assert (await reader.read()).split()[1] == b"400"
    assert errors_of(caplog) == []
    assert "SECRET" not in text_of(caplog)


async def test_a_client_that_goes_away_in_the_midst_of_its_request_is_no_error(caplog):
    async with listening() as (host, port, begun):
        async with connected(host, port) as (_, writer):
            writer.write(LONG + b"abc")
            await begun.get()
            writer.transport.abort()
        async with connected(host, port) as (reader, writer):
            writer.write(HEALTH)
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
    assert errors_of(caplog) == []


@pytest.mark.parametrize("number", [errno.EHOSTUNREACH, errno.ENETDOWN, errno.ETIMEDOUT])
async def test_a_body_that_the_network_loses_is_no_error(caplog, number):
    async with listening() as (host, port, begun), connected(host, port) as (reader, writer):
        writer.write(LONG + b"abc")
        request = await begun.get()
        request.protocol.connection_lost(OSError(number, os.strerror(number)))
        assert await reader.read() == b""
    assert errors_of(caplog) == []


async def test_a_handler_that_fails_is_an_error_and_tells_where_but_no_data(caplog):
    async def failing(request):
        raise ValueError("SECRET")

    async with listening(failing) as (host, port, _), connected(host, port) as (reader, writer):
        writer.write(HEALTH)
        assert await reader.readline() == b"HTTP/1.1 500 Internal Server Error\r\n"
    assert len(errors_of(caplog)) == 1
    assert "ValueError" in text_of(caplog)
    assert "in failing" in text_of(caplog)
    assert "SECRET" not in text_of(caplog)
