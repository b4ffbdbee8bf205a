"""What operators and HTTP see of locks: `kvctl txn locks` as a table and as JSON, the node's own account, a locking `get`."""

from __future__ import annotations

import base64
import json
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from kvstore.adapters import http_client
from kvstore.cli import admin, locks
from kvstore.errors import Unavailable
from kvstore.operations import Get, run_operations
from kvstore.status import LOCKS_SHOWN_MAX, node_locks
from tests.unit.kvstore.fake_node import FakeDatabase, FakeTransaction
from txn.locks import LockTable


def owner(number: int) -> bytes:
    return number.to_bytes(16, "big")


def node(table: LockTable | None, now: float = 0.0) -> Any:
    """As much of a node as is looked at."""
    evaluator = SimpleNamespace(locking=SimpleNamespace(table=table)) if table else None
    replicas = {2: SimpleNamespace(range_id=2, evaluator=evaluator)}
    clock = SimpleNamespace(monotonic=lambda: now)
    return SimpleNamespace(
        node_id=1,
        store=SimpleNamespace(replicas=replicas),
        adapters=SimpleNamespace(clock=clock),
    )


def contended() -> LockTable:
    table = LockTable(10_000, 10.0)
    table.acquire(owner(1), 1, b"hot", True, 0.0)
    table.acquire(owner(2), 2, b"hot", False, 1.0)
    table.acquire(owner(3), 3, b"hot", True, 2.0, committing=True)
    return table


def test_a_node_tells_who_holds_a_key_and_who_waits_in_order():
    shown = node_locks(node(contended(), now=3.0))
    assert shown["node"] == 1
    (lock,) = shown["locks"]
    assert (lock["range"], base64.b64decode(lock["key"])) == (2, b"hot")
    assert lock["holders"] == [
        {"transaction": owner(1).hex(), "exclusive": True, "lease_s": 7.0},
    ]
    assert [(w["transaction"][-1], w["waits_s"], w["committing"]) for w in lock["waiters"]] == [
        ("2", 2.0, False),
        ("3", 1.0, True),
    ]


def test_a_node_that_leads_nothing_has_no_locks():
    assert node_locks(node(None))["locks"] == []
    empty = node(None)
    empty.store = None
    assert node_locks(empty)["locks"] == []


def test_what_a_node_tells_is_bounded():
    table = LockTable(10_000, 10.0)
    for number in range(LOCKS_SHOWN_MAX + 5):
        table.acquire(owner(1), 1, b"%d" % number, True, 0.0)
    shown = node_locks(node(table))
    assert (len(shown["locks"]), shown["more"]) == (LOCKS_SHOWN_MAX, True)


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes: one has a hot key, the other does not answer about locks."""
    answers = {
        ("h:1", "/v1/admin/status"): {"nodes": [{"node_id": 2, "address": "h:2"}]},
        ("h:2", "/v1/admin/status"): {"nodes": []},
        ("h:1", "/v1/admin/locks"): node_locks(node(contended(), now=3.0)),
    }

    def request_all(addresses, method, path, bodies=None, *, timeout_s=5.0):
        return [answers.get((address, path), Unavailable(address)) for address in addresses]

    monkeypatch.setattr(http_client, "request_all", request_all)
    return answers


def kvctl(*words: str):
    return CliRunner().invoke(admin.app, ["--endpoints", "h:1", *words])


def test_kvctl_lists_locks_as_a_table(cluster):
    result = kvctl("txn", "locks")
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines()]
    assert ["hot", "holds", "exclusive", owner(1).hex(), "lease", "7.0", "s"] in lines
    assert ["hot", "waits", "shared", owner(2).hex(), "for", "2.0", "s"] in lines
    assert ["hot", "waits", "commits", owner(3).hex(), "for", "1.0", "s"] in lines
    assert "no answer from h:2" in result.output


def test_kvctl_lists_locks_as_json(cluster):
    result = kvctl("-o", "json", "txn", "locks")
    found = json.loads(result.output)
    assert found["silent"] == ["h:2"]
    (lock,) = found["locks"]
    assert base64.b64decode(lock["key"]) == b"hot"
    assert [len(lock["holders"]), len(lock["waiters"])] == [1, 2]


def test_no_locks_are_said_in_words_and_no_cluster_is_an_error(cluster):
    cluster["h:1", "/v1/admin/locks"] = node_locks(node(None))
    assert "no locks" in kvctl("txn", "locks").output
    cluster.clear()
    result = kvctl("txn", "locks")
    assert result.exit_code == 1
    with pytest.raises(Unavailable):
        locks.collect(["h:1"], 1.0)


async def test_a_get_of_a_script_or_of_http_may_lock():
    database = FakeDatabase({b"k": b"v"})
    tx: Any = FakeTransaction(database)
    results = await run_operations(tx, [Get(b"k"), Get(b"k", "exclusive"), Get(b"x", "shared")])
    assert results == [{"value": b"v"}, {"value": b"v"}, {"value": None}]
    assert database.locked == [(b"k", False), (b"x", True)]
