"""Claims: every error has an HTTP status of its own kind, and its versions are strings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvstore.adapters import http_wire
from kvstore.errors import (
    CODES,
    Compacted,
    CompareFailed,
    Conflict,
    InvalidArgument,
    NotLeader,
    from_wire,
)


def test_every_code_has_a_status_of_its_own_kind():
    for code, cls in CODES.items():
        if not cls.__module__.startswith("kvstore"):
            continue
        status = http_wire.STATUS.get(code, 503 if cls.retryable else 500)
        assert (status in (400, 401, 403, 404, 410, 412, 413, 421)) <= (not cls.retryable), code
        assert issubclass(cls, InvalidArgument) == (status in (400, 413)), code


@pytest.mark.parametrize("version", [0, 7, 1 << 60])
@pytest.mark.parametrize(
    ("kind", "field"),
    [(CompareFailed, "version"), (Conflict, "their_version"), (Compacted, "oldest")],
)
def test_a_version_is_a_string_however_small_it_is(kind: Any, field: str, version: int) -> None:
    body = json.loads(http_wire.error_body(kind(**{field: version})))
    assert body["details"][field] == str(version)
    back = from_wire(body["code"], body["message"], body["details"])
    assert getattr(back, field) == version


def test_other_numbers_of_an_error_stay_numbers():
    body = json.loads(http_wire.error_body(NotLeader(3, 2)))
    assert body["details"] == {"range_id": 3, "node": 2, "address": ""}


@pytest.mark.parametrize(
    ("host", "own"),
    [
        *((each, True) for each in ("127.0.0.1:7400", "10.0.0.1", "[::1]:7400", "[fe80::1]")),
        *((each, True) for each in ("localhost", "LocalHost:7400", "db1:7400", "DB1.:7400", "db1")),
        *((each, False) for each in ("", "evil.example", "evil.example:7400", "db1.evil:7400")),
        *((each, False) for each in ("127.0.0.1.evil:80", "[evil]:80", ":7400", "db1:80:80")),
    ],
)
def test_of_hosts_only_addresses_localhost_and_own_names_are_ours(host: str, own: bool) -> None:
    assert http_wire.is_own_host(host, {"db1"}) == own


def test_rows_are_encoded_as_all_else_only_at_once():
    rows = [{"key": bytes([at]), "value": bytes(range(at))} for at in range(256)]
    results = [{}, {"value": None}, {"number": 65_535}, {"items": rows}]
    answer = {"version": str(1 << 60), "more": False, "next": b"\xff", "results": results}
    assert http_wire.rows_bytes(answer) == http_wire.json_bytes(answer)
