"""Claims: what requests take of a gateway is bounded in number and in bytes; who comes when there is no room is told so and
nothing was done; what was committed is answered in any case; and no request keeps the loop to itself."""

from __future__ import annotations

import asyncio
import base64
from collections import Counter

import pytest
from aiohttp import test_utils, web

from kvstore.adapters import http_load, http_server, http_watch
from tests.unit.kvstore.fake_node import FakeDatabase, FakeNode, FakeTransaction

VALUE = bytes(1_000)


@pytest.fixture
def database():
    return FakeDatabase({b"a": VALUE, b"b": VALUE})


def serving(database):
    node = FakeNode(database)
    app = web.Application()
    http_server.add_routes(app, node, node.metrics.observe_request)
    return test_utils.TestClient(test_utils.TestServer(app))


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def reading(*keys: bytes):
    return [{"op": "get", "key": b64(key)} for key in keys]


WRITE = {"op": "put", "key": b64(b"n"), "value": b64(b"1")}


async def refusal(response):
    return response.status, (await response.json())["code"]


async def test_too_many_requests_at_once_are_throttled_but_those_of_operators_are_not(
    database, monkeypatch
):
    monkeypatch.setattr(http_load, "REQUESTS_IN_FLIGHT_MAX", 0)
    async with serving(database) as http:
        assert await refusal(await http.get("/v1/kv/a")) == (429, "throttled")
        for path in ("/health/live", "/health/ready", "/metrics", "/v1/admin/status"):
            assert (await http.get(path)).status == 200


@pytest.mark.parametrize("path", ["/metrics", "/v1/admin/status", "/v1/openapi.json", "/"])
async def test_requests_of_operators_have_places_of_their_own_which_end_too(
    database, monkeypatch, path
):
    monkeypatch.setattr(http_load, "ADMIN_REQUESTS_IN_FLIGHT_MAX", 0)
    async with serving(database) as http:
        assert await refusal(await http.get(path)) == (429, "throttled")
        for served in ("/v1/kv/a", "/health/live", "/health/ready"):
            assert (await http.get(served)).status == 200


async def test_bodies_of_administration_that_do_not_arrive_keep_nobody_from_looking(
    database, monkeypatch
):
    monkeypatch.setattr(http_load, "ADMIN_REQUESTS_IN_FLIGHT_MAX", 1)
    monkeypatch.setattr(http_load, "ADMIN_BODIES_IN_FLIGHT_MAX", 1)
    begun, ended = asyncio.Event(), asyncio.Event()

    async def stuck():
        yield b"x"
        begun.set()
        await ended.wait()

    async with serving(database) as http:
        slow = asyncio.ensure_future(http.post("/v1/admin/init", data=stuck()))
        await begun.wait()
        await http.get("/health/live")  # the other one has been taken up by then
        assert await refusal(await http.post("/v1/admin/init", data=b"")) == (429, "throttled")
        for path in ("/metrics", "/v1/admin/status", "/v1/kv/a"):
            assert (await http.get(path)).status == 200
        ended.set()
        assert (await slow).status == 400


async def test_too_many_bytes_in_flight_are_throttled(database, monkeypatch):
    monkeypatch.setattr(http_load, "BODY_BYTES_IN_FLIGHT_MAX", 10)
    async with serving(database) as http:
        assert await refusal(await http.put("/v1/kv/a", data=b"x" * 11)) == (429, "throttled")
        assert (await http.put("/v1/kv/a", data=b"x" * 10)).status == 200
        assert (await http.put("/v1/kv/a", data=b"x" * 10)).status == 200


async def test_a_body_that_does_not_arrive_is_given_up(database, monkeypatch):
    monkeypatch.setattr(http_load, "BODY_TIMEOUT_S", 0.01)

    async def stuck():
        yield b"x"
        await asyncio.get_running_loop().create_future()

    async with serving(database) as http:
        answer = await http.put("/v1/kv/a", data=stuck())
        assert await refusal(answer) == (408, "request_timeout")


# --- answers


@pytest.mark.parametrize("path", ["/v1/kv/a", "/v1/kv", "/v1/kv?prefix=a"])
async def test_a_read_for_whose_answer_there_is_no_room_is_throttled(database, monkeypatch, path):
    monkeypatch.setattr(http_load, "ANSWER_BYTES_IN_FLIGHT_MAX", len(VALUE) - 1)
    async with serving(database) as http:
        assert await refusal(await http.get(path)) == (429, "throttled")
        assert await refusal(await http.get("/v1/kv/zz")) == (404, "not_found")


async def test_the_room_that_answers_took_comes_back(database, monkeypatch):
    monkeypatch.setattr(http_load, "ANSWER_BYTES_IN_FLIGHT_MAX", 3 * len(VALUE))
    async with serving(database) as http:
        for _ in range(5):
            assert (await http.get("/v1/kv/a")).status == 200
            assert (await http.get("/v1/kv?prefix=a")).status == 200
            assert (await http.post("/v1/txn", json={"operations": reading(b"a")})).status == 200
            refused = await http.post("/v1/txn", json={"operations": reading(b"a", b"b", b"a")})
            assert await refusal(refused) == (429, "throttled")


async def test_a_transaction_for_whose_results_there_is_no_room_writes_nothing(
    database, monkeypatch
):
    monkeypatch.setattr(http_load, "ANSWER_BYTES_IN_FLIGHT_MAX", 2 * len(VALUE))
    async with serving(database) as http:
        for operations in ([WRITE, *reading(b"a", b"b")], [WRITE, {"op": "scan"}]):
            answer = await http.post("/v1/txn", json={"operations": operations})
            body = await answer.json()
            assert (answer.status, body["code"]) == (429, "throttled")
            assert body["maybe_committed"] is False
    assert b"n" not in database.rows


async def test_what_was_committed_is_answered_whether_there_is_room_or_not(database, monkeypatch):
    monkeypatch.setattr(http_load, "ANSWER_BYTES_IN_FLIGHT_MAX", http_load.RESULT_JSON_BYTES)
    async with serving(database) as http:
        assert (await http.put("/v1/kv/m", data=b"1")).status == 200
        assert (await http.delete("/v1/kv/m")).status == 200
        answer = await http.post("/v1/txn", json={"operations": [WRITE]})
        assert answer.status == 200
        assert len(await answer.read()) > http_load.RESULT_JSON_BYTES
    assert b"n" in database.rows


async def test_an_attempt_of_a_transaction_gives_back_what_the_one_before_it_took(
    database, monkeypatch
):
    monkeypatch.setattr(http_load, "ANSWER_BYTES_IN_FLIGHT_MAX", 2 * len(VALUE))
    once = database.run

    async def thrice(fn, **options):
        async def again(tx):
            for _ in range(3):
                results = await fn(tx)
            return results

        return await once(again, **options)

    monkeypatch.setattr(database, "run", thrice)
    async with serving(database) as http:
        answer = await http.post("/v1/txn", json={"operations": reading(b"a")})
        assert answer.status == 200


async def test_events_for_which_there_is_no_room_can_be_asked_for_again(database, monkeypatch):
    monkeypatch.setattr(http_load, "ANSWER_BYTES_IN_FLIGHT_MAX", len(VALUE))

    async def answer(self, database, raw_query, gone):
        return {"events": [{"key": b"a", "value": VALUE}], "version": "9"}

    monkeypatch.setattr(http_watch.WatchPolls, "answer", answer)
    async with serving(database) as http:
        assert await refusal(await http.get("/v1/watch?key=a")) == (429, "throttled")


async def test_a_result_that_another_program_kept_is_json_as_any_other(database, monkeypatch):
    """Rows of idempotency keys are shared: `run` of a Python program keeps what it likes."""

    async def run(_work, **_):
        return {"n": 1 << 60, "b": {True: 1}}

    monkeypatch.setattr(database, "run", run)
    async with serving(database) as http:
        body = {"operations": [{"op": "get", "key": "YQ=="}], "idempotency_key": "k"}
        answer = await (await http.post("/v1/txn", json=body)).json()
    assert answer == {"version": None, "results": {"n": str(1 << 60), "b": {"True": 1}}}


@pytest.mark.parametrize(("operation", "most"), [(WRITE, 100), (*reading(b"a"), 1)])
async def test_a_long_transaction_lets_others_go_on(database, monkeypatch, operation, most):
    """Though nothing in it waits: writes are kept, and so is what was read. A read may have to look at all that was written."""
    turns, done = 0, Counter[int]()
    work = getattr(FakeTransaction, operation["op"])

    async def others():
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    def noted(*arguments):
        done[turns] += 1
        return work(*arguments)

    monkeypatch.setattr(FakeTransaction, operation["op"], noted)
    async with serving(database) as http:
        going_on = asyncio.ensure_future(others())
        response = await http.post("/v1/txn", json={"operations": [operation] * 300})
        going_on.cancel()
        assert response.status == 200
    assert done.total() == 300
    assert max(done.values()) <= most
