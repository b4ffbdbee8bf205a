"""The gateway: any key survives the path, every refusal is typed JSON, limits hold, and health tells the truth."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import re

import msgspec
import pytest
from aiohttp import test_utils, web
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from kvstore import bootstrap, errors, limits
from kvstore.adapters import http_server, http_wire
from kvstore.errors import (
    CommitUnknown,
    CompareFailed,
    Conflict,
    NoQuorum,
    Refused,
    Throttled,
)
from tests.unit.kvstore.fake_node import FIRST_VERSION, FakeDatabase, FakeNode


@pytest.fixture
def database():
    return FakeDatabase({b"a": b"1", b"b": b"2", b"b2": b"22", b"c": b"3"})


@pytest.fixture
def node(database):
    return FakeNode(database)


@pytest.fixture
async def http(node):
    """A client of the gateway in front of `node`."""
    async with serving(node) as client:
        yield client


def serving(node):
    app = web.Application()
    http_server.add_routes(app, node, node.metrics.observe_request)
    return test_utils.TestClient(test_utils.TestServer(app))


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def path_of(key: bytes, query: str = "") -> URL:
    return URL(f"/v1/kv/{http_wire.quote(key)}{query}", encoded=True)


async def refusal(response):
    body = await response.json()
    assert {"code", "message", "retryable", "maybe_committed"} <= body.keys()
    return response.status, body["code"]


# --- keys and values


async def test_get_gives_the_raw_value_and_its_version_in_a_header(http):
    response = await http.get("/v1/kv/a")
    assert response.status == 200
    assert await response.read() == b"1"
    assert response.headers["X-Kvorum-Version"] == str(FIRST_VERSION)
    assert response.content_type == "application/octet-stream"


async def test_head_tells_the_version_without_the_value(http):
    response = await http.head("/v1/kv/a")
    assert response.headers["X-Kvorum-Version"] == str(FIRST_VERSION)
    assert await response.read() == b""


async def test_an_absent_key_is_not_found(http):
    assert await refusal(await http.get("/v1/kv/zzz")) == (404, "not_found")


async def test_put_then_get_then_delete(http):
    value = bytes(range(256))
    written = await http.put("/v1/kv/k", data=value)
    version = (await written.json())["version"]
    assert written.headers["X-Kvorum-Version"] == version
    assert int(version) > FIRST_VERSION
    assert await (await http.get("/v1/kv/k")).read() == value
    assert (await http.delete("/v1/kv/k")).status == 200
    assert (await http.get("/v1/kv/k")).status == 404


@pytest.mark.parametrize(
    "key",
    [
        *(
            b"a/b",
            b"/",
            b"//",
            b"a//b/",
            b".",
            b"..",
            b"a/../b",
            b"\x00",
            b"%",
            b"%2F",
            b"a b",
            b"a+b",
        ),
        *(b"\n", b"\r\n", b"?x=1#y", b"\xc3\xa4", b"\xfe\x80", b"\x7f", b"x" * 4096),
    ],
)
async def test_every_key_survives_the_path(http, database, key):
    assert (await http.put(path_of(key), data=b"v")).status == 200
    assert database.plain()[key] == b"v"
    assert await (await http.get(path_of(key))).read() == b"v"


@given(st.binary(max_size=40))
def test_quoting_and_unquoting_give_the_key_back(key):
    assert http_wire.unquote(http_wire.quote(key), "the key") == key


@pytest.mark.parametrize("path", ["/v1/kv/a/b:c@d", "/v1/%6Bv/a%2Fb:c@%64"])
async def test_a_key_may_be_escaped_less_or_more_than_it_must(http, database, path):
    assert (await http.put(URL(path, encoded=True), data=b"")).status == 200
    assert b"a/b:c@d" in database.rows


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v1/kv/", 400, "invalid_argument"),
        ("/v1/kv/%ff", 400, "invalid_argument"),
        ("/v1/kv/%", 400, "invalid_argument"),
        ("/v1/kv/%2", 400, "invalid_argument"),
        ("/v1/kv/%zz", 400, "invalid_argument"),
        ("/v1/kv/" + "x" * 4097, 413, "key_too_large"),
        ("/v1/kv/a?if_versoin=1", 400, "invalid_argument"),
        ("/v1/kv/a?timeout=5", 400, "invalid_argument"),
        ("/v1/kv/a?timeout=1h", 400, "invalid_argument"),
        ("/v1/kv/a?at=-1", 400, "invalid_argument"),
        ("/v1/kv/a?at=1&max_staleness=2s", 400, "invalid_argument"),
        ("/v1/kv/a?max_staleness=0s", 400, "invalid_argument"),
        ("/v1/kv?max_staleness=2", 400, "invalid_argument"),
        ("/v1/kv/a?at=1&at=2", 400, "invalid_argument"),
        (f"/v1/kv/a?at={1 << 64}", 400, "invalid_argument"),
    ],
)
async def test_a_malformed_request_is_refused_with_a_type(http, path, status, code):
    assert await refusal(await http.get(URL(path, encoded=True))) == (status, code)


async def test_a_value_of_a_mebibyte_is_taken_and_one_byte_more_is_not(http, database):
    assert (await http.put("/v1/kv/k", data=b"x" * limits.VALUE_BYTES_MAX)).status == 200
    too_large = io.BytesIO(b"x" * (limits.VALUE_BYTES_MAX + 1))
    assert await refusal(await http.put("/v1/kv/l", data=too_large)) == (413, "value_too_large")
    assert b"l" not in database.rows


async def test_a_body_without_a_length_is_bounded_too(http, database):
    async def endless():
        for _ in range(40):
            yield b"x" * 65_536

    assert await refusal(await http.put("/v1/kv/l", data=endless())) == (413, "value_too_large")
    assert b"l" not in database.rows


async def test_conditions_of_put(http):
    assert (await http.put("/v1/kv/new?if_absent=true", data=b"1")).status == 200
    failed = await http.put("/v1/kv/new?if_absent", data=b"2")
    body = await failed.json()
    assert (failed.status, body["code"]) == (412, "compare_failed")
    present = body["details"]["version"]
    assert isinstance(present, str)  # it exceeds 2^53
    assert (await http.put(f"/v1/kv/new?if_version={present}", data=b"3")).status == 200
    assert (await http.put(f"/v1/kv/new?if_version={present}", data=b"4")).status == 412


async def test_two_conditions_at_once_are_refused(http):
    answer = await http.put("/v1/kv/a?if_absent&if_version=1", data=b"")
    assert await refusal(answer) == (400, "invalid_argument")


async def test_a_timeout_is_handed_to_the_client(http, database):
    await http.put("/v1/kv/a?timeout=250ms", data=b"")
    await http.put("/v1/kv/a", data=b"")
    assert database.timeouts == [0.25, 30.0]


async def test_a_read_has_the_requests_timeout_and_not_the_clients(http, database):
    assert (await http.get("/v1/kv/a?timeout=20s")).status == 200
    assert (await http.get("/v1/kv/a")).status == 200
    assert database.timeouts == [20.0, 30.0]


async def test_a_scan_and_a_read_of_the_past_have_the_requests_timeout_too(http, database):
    for path in ("/v1/kv?timeout=20s", f"/v1/kv/a?at={database.version}&timeout=21s", "/v1/kv"):
        assert (await http.get(path)).status in {200, 404}
    assert database.timeouts == [20.0, 21.0, 30.0]


async def test_a_read_whose_time_is_up_ends_with_what_is_known(http, database, monkeypatch):
    async def lead_by_nobody(key, *, max_staleness, timeout):
        raise NoQuorum(await asyncio.sleep(timeout, "range 2 has no leader"))

    monkeypatch.setattr(database, "get_entry", lead_by_nobody)
    answer = await http.get("/v1/kv/a?timeout=10ms")
    assert await refusal(answer) == (503, "no_quorum")


async def test_a_read_that_takes_too_long_is_a_typed_timeout(http, database, monkeypatch):
    async def never(key, *, max_staleness, timeout):
        await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(database, "get_entry", never)
    answer = await http.get("/v1/kv/a?timeout=10ms")
    assert await refusal(answer) == (504, "deadline_exceeded")


# --- scans


async def scanned(http, query):
    response = await http.get(URL(f"/v1/kv?{query}", encoded=True))
    body = await response.json()
    assert response.status == 200, body
    return [base64.b64decode(item["key"]) for item in body["items"]], body


@pytest.mark.parametrize(
    ("query", "keys"),
    [
        ("", [b"a", b"b", b"b2", b"c"]),
        ("prefix=b", [b"b", b"b2"]),
        ("start=b&end=c", [b"b", b"b2"]),
        ("start=b%00", [b"b2", b"c"]),
        ("reverse=1&limit=2", [b"c", b"b2"]),
        ("prefix=x", []),
    ],
)
async def test_scan_gives_the_keys_of_a_span_in_order(http, query, keys):
    assert (await scanned(http, query))[0] == keys


async def test_scan_gives_values_in_base64_unless_only_keys_are_wanted(http):
    _, body = await scanned(http, "prefix=a")
    assert body["items"] == [{"key": b64(b"a"), "value": b64(b"1")}]
    _, body = await scanned(http, "prefix=a&keys_only=true")
    assert body["items"] == [{"key": b64(b"a")}]


@pytest.mark.parametrize(("direction", "bound"), [("", "start"), ("&reverse=true", "end")])
async def test_pages_follow_each_other_without_gap_or_repeat(http, direction, bound):
    found, following = [], ""
    for _ in range(10):
        keys, body = await scanned(http, f"limit=1{direction}{following}")
        found += keys
        if not body["more"]:
            break
        key = http_wire.quote(base64.b64decode(body["next"]))
        following = f"&{bound}={key}&at={body['version']}"
    assert found == sorted([b"a", b"b", b"b2", b"c"], reverse=bool(direction))


async def test_a_page_is_bounded_in_bytes(http, database):
    database.commit({b"big%d" % n: b"x" * limits.VALUE_BYTES_MAX for n in range(6)})
    keys, body = await scanned(http, "prefix=big")
    assert len(keys) == 4
    assert body["more"]


async def test_a_read_may_be_stale_within_the_bound_that_it_names(http, database):
    database.commit({b"a": b"v"})
    answer = await http.get("/v1/kv/a?max_staleness=1500ms")
    assert answer.status == 200
    await http.get("/v1/kv?max_staleness=2s")
    await http.get("/v1/kv/a")
    assert database.bounds == [1.5, 2.0, None]


async def test_a_version_of_the_future_is_refused(http):
    answer = await http.get(f"/v1/kv?at={FIRST_VERSION * 2}")
    assert await refusal(answer) == (400, "invalid_argument")


@pytest.mark.parametrize(
    "query",
    ["prefix=a&start=b", "limit=0", "limit=10001", "limit=x", "reverse=maybe", "start=%f", "q=1"],
)
async def test_a_malformed_scan_is_refused(http, query):
    answer = await http.get(URL(f"/v1/kv?{query}", encoded=True))
    assert await refusal(answer) == (400, "invalid_argument")


async def test_a_plus_in_a_query_is_a_space_as_in_forms(http, database):
    database.commit({b"x y": b"", b"x+z": b""})
    assert (await scanned(http, "prefix=x+y"))[0] == [b"x y"]
    assert (await scanned(http, "prefix=x%2B"))[0] == [b"x+z"]


# --- transactions


async def test_a_transaction_reads_its_own_writes_and_commits_all_of_them(http, database):
    body = {
        "operations": [
            {"op": "check", "key": b64(b"a"), "value": b64(b"1")},
            {"op": "put", "key": b64(b"n"), "value": b64(b"5")},
            {"op": "increment", "key": b64(b"n"), "by": 2},
            {"op": "get", "key": b64(b"n")},
            {"op": "delete", "key": b64(b"c")},
            {"op": "delete_range", "start": b64(b"b"), "end": b64(b"b9")},
            {"op": "scan"},
        ],
        "idempotency_key": "once",
    }
    response = await http.post("/v1/txn", json=body)
    answer = await response.json()
    assert response.status == 200
    assert answer["version"] == str(FIRST_VERSION + 1)
    assert answer["results"][3] == {"value": b64(b"7")}
    assert [item["key"] for item in answer["results"][6]["items"]] == [b64(b"a"), b64(b"n")]
    assert database.plain() == {b"a": b"1", b"n": b"7"}
    assert database.idempotency_keys == ["once"]


async def test_a_transaction_that_only_reads_has_no_version(http):
    body = {"operations": [{"op": "get", "key": b64(b"zz")}]}
    answer = await (await http.post("/v1/txn", json=body)).json()
    assert answer == {"version": None, "results": [{"value": None}]}


async def test_a_check_that_does_not_hold_writes_nothing(http, database):
    operations = [
        {"op": "put", "key": b64(b"n"), "value": b64(b"5")},
        {"op": "check", "key": b64(b"a")},
    ]
    answer = await http.post("/v1/txn", json={"operations": operations})
    assert await refusal(answer) == (412, "compare_failed")
    assert (await answer.json())["details"] == {"version": str(FIRST_VERSION)}
    assert b"n" not in database.rows


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"{}",
        b'{"operations": 1}',
        b'{"operations": [{"op": "jump"}]}',
        b'{"operations": [{"op": "get"}]}',
        b'{"operations": [{"op": "get", "key": "%%%"}]}',
        b'{"operations": [{"op": "get", "key": "YQ==", "kye": 1}]}',
        b'{"operations": [], "extra": 1}',
        b'{"operations": [{"op": "scan", "limit": 0}]}',
        b"[" * 100_000,
    ],
)
async def test_a_malformed_transaction_is_refused(http, body):
    assert await refusal(await http.post("/v1/txn", data=body)) == (400, "invalid_argument")


async def test_a_transaction_with_too_many_operations_is_refused(http):
    operations = [{"op": "get", "key": b64(b"a")}] * (limits.TXN_ROWS_MAX + 1)
    answer = await http.post("/v1/txn", json={"operations": operations})
    assert await refusal(answer) == (400, "invalid_argument")


@pytest.mark.parametrize("reads", [[{"op": "get", "key": "YmlnMA=="}] * 17, [{"op": "scan"}]])
async def test_a_transaction_that_reads_more_than_an_answer_holds_is_refused(http, database, reads):
    database.commit({b"big%d" % number: bytes(1 << 20) for number in range(17)})
    operations = [{"op": "put", "key": b64(b"n"), "value": b64(b"5")}, *reads]
    answer = await http.post("/v1/txn", json={"operations": operations})
    assert await refusal(answer) == (413, "transaction_too_large")
    assert b"n" not in database.rows


# --- errors


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Conflict(b"\xfe", b"\x01\x02", 1 << 60), 409),
        (CompareFailed(1 << 60), 412),
        (Throttled(2.5), 429),
        (NoQuorum(), 503),
        (CommitUnknown(), 504),
        (errors.KVError("new", code="from_the_future"), 500),
        (errors.KVError("new", code="from_the_future", retryable=True), 503),
    ],
)
async def test_errors_carry_what_the_caller_may_do(http, database, error, status):
    database.fails = error
    response = await http.put("/v1/kv/a", data=b"")
    body = await response.json()
    assert response.status == status
    assert body["code"] == error.code
    assert body["retryable"] is error.retryable
    assert body["maybe_committed"] is error.maybe_committed


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/scan", 404, "unknown_path"),
        ("POST", "/v1/kv/a", 405, "method_not_allowed"),
        ("DELETE", "/", 405, "method_not_allowed"),
    ],
)
async def test_a_path_or_method_that_does_not_exist_is_a_typed_refusal(
    http, method, path, status, code
):
    response = await http.request(method, path)
    assert await refusal(response) == (status, code)
    assert ("Allow" in response.headers) == (status == 405)


async def test_an_error_has_its_fields_as_details(http, database):
    database.fails = Conflict(b"\xfe", b"\x01", 1 << 60)
    body = await (await http.put("/v1/kv/a", data=b"")).json()
    details = {"key": b64(b"\xfe"), "other_txn": b64(b"\x01"), "their_version": str(1 << 60)}
    assert body["details"] == details


async def test_throttled_says_when_to_come_back(http, database):
    database.fails = Throttled(2.5)
    assert (await http.get("/v1/kv/a")).headers["Retry-After"] == "2"


@pytest.mark.parametrize(("method", "maybe"), [("get", False), ("put", True)])
async def test_a_bug_of_ours_is_an_internal_error_that_tells_no_secrets(
    http, database, caplog, method, maybe
):
    caplog.set_level(logging.INFO)
    database.fails = RuntimeError("secret")
    response = await getattr(http, method)("/v1/kv/users-key")
    body = await response.json()
    assert (response.status, body["code"]) == (500, "internal_error")
    assert body["maybe_committed"] is maybe
    assert "secret" not in json.dumps(body)
    logged = str([vars(each) for each in caplog.records if each.name.startswith("kvstore")])
    assert "/v1/kv/{key}" in logged
    assert "RuntimeError" in logged
    assert "in check" in logged  # where it was raised
    assert "users-key" not in logged
    assert "secret" not in logged


@pytest.mark.parametrize("version", ["zzz", "", "1..0", "1.0.x", "-1"])
async def test_metrics_of_a_version_that_is_none_are_text(http, version):
    accepted = f"application/openmetrics-text; version={version}"
    answer = await http.get("/metrics", headers={"Accept": accepted})
    assert answer.status == 200
    assert "kvorum_build_info" in await answer.text()


async def test_requests_are_counted_with_their_outcome(http, database):
    await http.get("/v1/kv/a")
    database.fails = NoQuorum()
    await http.put("/v1/kv/a", data=b"")
    await http.get("/health/live")
    lines = (await (await http.get("/metrics")).text()).splitlines()
    counts = [line for line in lines if line.startswith("kvorum_request_seconds_count")]
    assert counts == [
        'kvorum_request_seconds_count{operation="http_get",outcome="ok"} 1.0',
        'kvorum_request_seconds_count{operation="http_put",outcome="no_quorum"} 1.0',
    ]


# --- administration


@pytest.fixture
async def empty_http():
    """A client of a node that waits for init, and the node."""
    node = FakeNode()
    async with serving(node) as client:
        yield client, node


def init_body(**changes):
    cluster_id = bootstrap.mint_cluster_id(1, 2, ["a:1"], [b"\xfe"])
    return msgspec.json.encode(bootstrap.plan(cluster_id, ["a:1"], [b"\xfe"])[0])


async def test_an_empty_node_says_so_and_serves_no_data(empty_http):
    http, _ = empty_http
    identity = await (await http.get("/v1/admin/identity")).json()
    assert identity == {
        "cluster_id": "",
        "node_id": 0,
        "address": "127.0.0.1:7400",
        "state": "waiting",
        "empty": True,
        "heard": [],
    }
    assert await refusal(await http.get("/v1/kv/a")) == (503, "not_ready")
    assert await refusal(await http.put("/v1/kv/a", data=b"x")) == (503, "not_ready")
    assert (await http.get("/health/live")).status == 200
    ready = await http.get("/health/ready")
    assert ready.status == 503
    assert await ready.json() == {"ready": False, "reason": "waits for init", "state": "waiting"}


async def test_health_is_told_without_a_body_too(http, empty_http):
    for path in ("/health/live", "/health/ready"):
        answer = await http.head(path)
        assert (answer.status, await answer.read()) == (200, b"")
    assert (await empty_http[0].head("/health/ready")).status == 503


async def test_a_member_that_does_not_serve_yet_does_not_speak_of_init(node):
    node.database = None
    async with serving(node) as http:
        answer = await http.get("/v1/kv/a")
        body = await answer.json()
    assert (answer.status, body["code"], body["retryable"]) == (503, "not_ready", True)
    assert "init" not in body["message"]


async def test_init_hands_the_plan_to_the_node_and_answers_who_it_is_now(empty_http):
    http, node = empty_http
    response = await http.post("/v1/admin/init", data=init_body())
    assert response.status == 200
    assert (await response.json())["cluster_id"] == node.initialized[0].cluster_id
    assert node.initialized[0].ranges[2].start == b"\xfe"


async def test_init_passes_the_refusal_of_a_node_on(empty_http):
    http, node = empty_http
    node.refuses = Refused("holds data")
    assert await refusal(await http.post("/v1/admin/init", data=init_body())) == (409, "refused")


@pytest.mark.parametrize(
    "body", [b"{}", init_body().replace(b'"your_node_id":1', b'"your_node_id":2')]
)
async def test_init_refuses_a_plan_that_is_not_whole(empty_http, body):
    http, node = empty_http
    answer = await http.post("/v1/admin/init", data=body)
    assert await refusal(answer) == (400, "invalid_argument")
    assert node.initialized == []


async def test_status_ranges_and_nodes_tell_what_the_node_knows(http):
    assert (await (await http.get("/v1/admin/status")).json())["state"] == "ready"
    ranges = await (await http.get("/v1/admin/ranges")).json()
    assert [each["id"] for each in ranges["ranges"]] == [2]
    locks = await (await http.get("/v1/admin/locks")).json()
    assert locks == {"node": 1, "more": False, "locks": []}
    nodes = await (await http.get("/v1/admin/nodes")).json()
    assert nodes["nodes"] == [{"node_id": 1, "address": "127.0.0.1:7400"}]


async def test_the_page_escapes_what_it_shows_and_runs_no_scripts(http, node):
    node.address = "<script>alert(1)</script>"
    response = await http.get("/")
    text = await response.text()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "script-src" not in response.headers["Content-Security-Policy"]
    assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")


# --- the document


async def test_the_document_is_served_and_its_references_exist(http):
    document = await (await http.get("/v1/openapi.json")).json()
    references = set(re.findall(r'"\$ref": ?"#/components/schemas/(\w+)"', json.dumps(document)))
    assert references <= document["components"]["schemas"].keys()
