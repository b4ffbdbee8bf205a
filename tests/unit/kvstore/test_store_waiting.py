"""Claims of what waits in a node's store: the bytes of requests that have left the inbox and wait (for a leader, the oracle,
a latch, a lock) are bounded, counted once each, and free when they are answered."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvstore.adapters.memory_engine import MemoryDirectory, MemoryEngine
from kvstore.replica import new_config
from kvstore.store import Store
from kvstore.waiting import HEAVY_BYTES, WAITING_INBOXES
from replication.types import Membership
from txn.evaluate import Limits
from txn.messages import Changes, Finalize, Prepare, Reply, Request
from txn.state import RangeRow
from txn.types import Write, WriteKind, make_txn_id

MIB = 1 << 20
INBOX_BYTES = 10 * MIB
CREATED = (10, 2)  # (index, term) at which the range begins
TERM = 2


class Asked:
    """A connection that notes what is answered."""

    def __init__(self) -> None:
        self.replies: list[Any] = []

    def answer(self, reply: Reply) -> None:
        self.replies.append(reply)

    def codes(self) -> list[str]:
        replies, self.replies = self.replies, []
        return [reply.code for reply in replies]


@pytest.fixture
def store() -> Store:
    """A node that has been elected to lead its one range, and has applied nothing of its term: all who ask wait."""
    store = Store(
        node=1,
        cluster="c" * 32,
        engine=MemoryEngine(MemoryDirectory()),
        clock=cast("Any", SimpleNamespace(monotonic=lambda: 0.0)),
        limits=Limits(),
        requests_max=20_000,
        inbox_bytes_max=INBOX_BYTES,
        oracle_window_ms=1_000,
        closed_lag_s=1.0,
        snapshot_hold_s=3600.0,
    )
    host: Any = SimpleNamespace(
        wake=lambda: None, raft=lambda _: SimpleNamespace(is_caretaker=True)
    )
    store.attach(host, cast("Any", SimpleNamespace(call=lambda *_: None)))
    members = Membership(voters=(1, 2, 3), nodes=((1, 1), (2, 2), (3, 3)))
    store.add(RangeRow(7, b"a", b"z", 1, 1, *CREATED), new_config(members, 1, *CREATED, 1))
    store.leadership(7, TERM, is_leader=True)
    return store


def write(number: int) -> Request:
    identity = make_txn_id(1, number)
    return Prepare(number, 7, 1, identity, b"k", b"k", [Write(WriteKind.PUT, b"k", b"v")])


def accepted(store: Store, asked: Asked, requests: list[Request], size_bytes: int) -> list[str]:
    """Of one frame, after a turn: what is said to it at once."""
    store.accept(asked, requests, size_bytes)
    store.drain(0.0)
    assert store.inbox_bytes == 0
    return asked.codes()


def test_bytes_that_wait_are_bounded_when_they_have_left_the_inbox(store: Store):
    """A thousand clients wrote values of 1 MiB while a range had no leader: gigabytes waited, of twenty thousand requests."""
    asked = Asked()
    fit = WAITING_INBOXES * INBOX_BYTES // MIB
    for number in range(fit):
        assert accepted(store, asked, [write(number)], MIB) == []
    assert accepted(store, asked, [write(fit)], MIB) == ["throttled"]
    assert accepted(store, asked, [write(number) for number in range(100, 104)], MIB) == (
        ["throttled"] * 4
    )
    assert store.waiting.bytes == fit * MIB
    store.leadership(7, TERM, is_leader=False)
    assert asked.codes() == ["not_leader"] * fit
    assert store.waiting.bytes == store.open_requests == 0
    store.leadership(7, TERM + 1, is_leader=True)
    assert accepted(store, asked, [write(fit)], MIB) == []


def test_small_requests_are_bounded_by_their_number_and_pass_when_large_ones_wait(store: Store):
    """Decisions are among them, which let others go on."""
    asked = Asked()
    while not accepted(store, asked, [write(store.open_requests)], 9 * MIB):
        pass
    held = store.waiting.bytes
    decision = Finalize(1_000, 7, 1, make_txn_id(1, 1_000), b"k", 5)
    assert accepted(store, asked, [decision] * 10, 10 * HEAVY_BYTES) == []
    assert store.waiting.bytes == held
    store.leadership(7, TERM, is_leader=False)
    assert store.waiting.bytes == store.open_requests == 0


def test_polls_are_their_connections_own_and_bounded_elsewhere(store: Store):
    asked = Asked()
    poll = Changes(1, 7, 1, 1, b"b", b"c", 1, 1)
    assert accepted(store, asked, [poll], 2 * HEAVY_BYTES) == []
    assert store.waiting.bytes == 0
    replica = store.replicas[7]
    assert replica.evaluator is not None
    replica.evaluator.start(0.0)
    assert store.polls.of(asked) == 1
