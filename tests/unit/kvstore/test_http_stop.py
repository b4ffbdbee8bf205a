"""Claims of the gateway of a node that stops: what is under way comes to its end within the time, what comes later is told to
ask another node, and nobody is told of the inside of the node."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from aiohttp import test_utils, web

from kvstore.adapters import http_server
from kvstore.errors import ClientClosed, CommitUnknown, EngineClosed
from tests.unit.kvstore.fake_node import FakeDatabase, FakeNode
from tests.unit.kvstore.test_http_watch import QuietWatch

WITHIN_S = 20.0
DATA = ("/v1/kv/a", "/v1/kv", "/v1/watch?key=a")


@pytest.fixture
def node():
    return FakeNode(FakeDatabase({b"a": b"1"}))


@contextlib.asynccontextmanager
async def served(node):
    """A client of the node's gateway, and the gateway."""
    app = web.Application()
    gateway = http_server.add_routes(app, node, node.metrics.observe_request)
    async with test_utils.TestClient(test_utils.TestServer(app)) as http:
        yield http, gateway


async def refusal(response):
    body = await response.json()
    return response.status, body["code"], body["retryable"], body["maybe_committed"]


NODE_STOPPED = (503, "node_stopped", True, False)


async def test_while_leaderships_go_requests_for_data_are_refused_and_operators_served(node):
    async with served(node) as (http, _):
        node.state = "draining"
        for path in DATA:
            answer = await http.get(path)
            assert await refusal(answer) == NODE_STOPPED
            assert answer.headers["Connection"] == "close"
        assert await refusal(await http.put("/v1/kv/n", data=b"1")) == NODE_STOPPED
        for path in ("/metrics", "/v1/admin/status", "/health/live"):
            answer = await http.get(path)
            assert (answer.status, answer.headers.get("Connection")) == (200, None)
    assert b"n" not in node.database.rows


async def test_when_the_engine_may_be_closed_only_health_is_answered(node, monkeypatch):
    def closed():
        raise EngineClosed

    async with served(node) as (http, _):
        node.state = "stopped"
        monkeypatch.setattr(node, "status", closed)
        for path in (*DATA, "/metrics", "/v1/admin/status", "/v1/admin/identity", "/"):
            assert await refusal(await http.get(path)) == NODE_STOPPED
        assert (await http.get("/health/live")).status == 200


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ClientClosed(), NODE_STOPPED),
        (EngineClosed(), NODE_STOPPED),
        (CommitUnknown(), (504, "commit_unknown", False, True)),
    ],
)
async def test_what_is_cut_off_by_the_end_says_whether_it_may_have_happened(
    node, monkeypatch, error, told
):
    async def ended(*_, **__):
        node.state = "stopped"
        raise error

    monkeypatch.setattr(node.database, "put", ended)
    async with served(node) as (http, _):
        assert await refusal(await http.put("/v1/kv/a", data=b"2")) == told


async def test_a_stop_waits_for_the_answers_of_what_is_under_way(node, monkeypatch):
    begun, go_on = asyncio.Event(), asyncio.Event()
    real = node.database.put

    async def slow(*args, **options):
        begun.set()
        await go_on.wait()
        return await real(*args, **options)

    monkeypatch.setattr(node.database, "put", slow)
    async with served(node) as (http, gateway), asyncio.timeout(WITHIN_S):
        putting = asyncio.ensure_future(http.put("/v1/kv/n", data=b"1"))
        await begun.wait()
        node.state = "draining"
        finishing = asyncio.ensure_future(gateway.finish(WITHIN_S))
        assert await refusal(await http.get("/v1/kv/a")) == NODE_STOPPED
        assert not finishing.done()
        go_on.set()
        assert (await putting).status == 200
        await finishing


async def test_a_body_that_has_not_come_when_the_time_is_up_is_refused(node):
    sent = asyncio.Event()

    async def stuck():
        yield b"x"
        sent.set()
        await asyncio.get_running_loop().create_future()

    async with served(node) as (http, gateway), asyncio.timeout(WITHIN_S):
        putting = asyncio.ensure_future(http.put("/v1/kv/n", data=stuck()))
        await sent.wait()
        await http.get("/v1/kv/a")  # the other one has been taken up by then
        node.state = "draining"
        await gateway.finish(0.01)
        assert await refusal(await putting) == NODE_STOPPED


async def test_a_watch_that_waits_is_answered_at_once_and_says_where_to_go_on(node):
    watch = QuietWatch()
    node.database.watch = lambda **_: watch
    async with served(node) as (http, gateway), asyncio.timeout(WITHIN_S):
        polling = asyncio.ensure_future(http.get("/v1/watch?key=a&wait=60s"))
        await watch.asked.wait()
        node.state = "draining"
        await gateway.finish(WITHIN_S)
        answer = await polling
        assert answer.status == 200
        assert await answer.json() == {"events": [], "version": "7"}
        assert watch.closed.is_set()


async def test_who_is_refused_does_not_keep_a_stop_waiting(node, monkeypatch):
    refusing, go_on = asyncio.Event(), asyncio.Event()
    real = http_server._sent

    async def slow(request, response):
        refusing.set()
        await go_on.wait()
        return await real(request, response)

    monkeypatch.setattr(http_server, "_sent", slow)
    async with served(node) as (http, gateway), asyncio.timeout(WITHIN_S):
        node.state = "draining"
        getting = asyncio.ensure_future(http.get("/v1/kv/a"))
        await refusing.wait()
        await gateway.finish(10 * WITHIN_S)
        go_on.set()
        assert await refusal(await getting) == NODE_STOPPED


async def test_two_that_wait_for_the_same_requests_both_learn_that_they_have_ended(
    node, monkeypatch
):
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(*_, **__):
        begun.set()
        await go_on.wait()
        return 1

    monkeypatch.setattr(node.database, "put", slow)
    async with served(node) as (http, gateway), asyncio.timeout(WITHIN_S):
        putting = asyncio.ensure_future(http.put("/v1/kv/n", data=b"1"))
        await begun.wait()
        node.state = "draining"
        stops = [asyncio.ensure_future(gateway.finish(10 * WITHIN_S)) for _ in range(2)]
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(*stops, putting)


async def test_an_init_that_comes_while_a_node_stops_is_refused_before_its_body_has_come(node):
    async def stuck():
        yield b"x"
        await asyncio.get_running_loop().create_future()

    async with served(node) as (http, _), asyncio.timeout(WITHIN_S):
        node.state = "draining"
        assert await refusal(await http.post("/v1/admin/init", data=stuck())) == NODE_STOPPED


async def test_a_stop_without_requests_waits_for_nothing(node):
    async with served(node) as (_, gateway), asyncio.timeout(WITHIN_S):
        await gateway.finish(10 * WITHIN_S)
