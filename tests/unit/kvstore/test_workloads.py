"""Claims of the workloads: on a store that is right each finds nothing wrong, whatever its commits claim not to know;
on one that errs each finds the anomaly, by its name. Time is virtual."""

from __future__ import annotations

import asyncio
import random
from typing import Any, Final

import pytest

from kvstore.sim import loop as simulated
from kvstore.testing.history import FOREVER, Outcome, RegisterOp
from kvstore.testing.workloads import WORKLOADS, Workload, places_of
from kvstore.testing.workloads.counter import Added, Bounds
from kvstore.testing.workloads.ring import broken_ring
from kvstore.testing.workloads.sessions import check_session
from tests.unit.kvstore.dumb_store import FAULTS, DumbDatabase, DumbStore

CLIENTS: Final = 4
OPS: Final = 60
SEEDS: Final = 6  # within which an anomaly shows

# workload, what is wrong with the store, the name under which it is reported
BITES: Final = (
    ("registers", "lost write", "Linearizability"),
    ("registers", "stale read", "Linearizability"),
    ("registers", "lost update", "Linearizability"),
    ("registers", "applied abort", "Linearizability"),
    ("registers", "falling version", "Linearizability"),
    ("mixed", "lost update", "Serializability"),
    ("mixed", "write skew", "Serializability"),
    ("mixed", "phantom", "Serializability"),
    ("mixed", "stale read", "Serializability"),
    ("mixed", "torn snapshot", "Serializability"),
    ("mixed", "torn answer", "Serializability"),
    ("mixed", "torn transaction", "Serializability"),
    ("mixed", "risen row", "Serializability"),
    ("mixed", "applied abort", "Serializability"),
    ("mixed", "lying outcome", "Serializability"),
    ("mixed", "unordered scan", "Scan-order"),
    ("bank", "lost update", "Lost-money"),
    ("bank", "torn snapshot", "Torn-snapshot"),
    ("bank", "torn transaction", "Torn-snapshot"),
    ("bank", "lost write", "Serializability"),
    ("ring", "lost update", "Broken-ring"),
    ("ring", "torn snapshot", "Broken-ring"),
    ("ring", "torn transaction", "Broken-ring"),
    ("counter", "lost update", "Lost-update"),
    ("counter", "lost write", "Lost-update"),
    ("counter", "doubled write", "Doubled-update"),
    ("counter", "torn transaction", "Torn-transaction"),
    ("counter", "torn snapshot", "Torn-transaction"),
    ("counter", "lying outcome", "Wrong-outcome"),
    ("list-append", "lost update", "Serializability"),
    ("list-append", "write skew", "Serializability"),
    ("list-append", "torn transaction", "Serializability"),
    ("list-append", "applied abort", "Serializability"),
    ("list-append", "stale read", "Serializability"),
    ("rw-register", "lost update", "Serializability"),
    ("rw-register", "write skew", "Serializability"),
    ("rw-register", "torn transaction", "Serializability"),
    ("rw-register", "applied abort", "Serializability"),
    ("rw-register", "falling version", "Serializability"),
    ("long-fork", "torn snapshot", "Long-fork"),
    ("long-fork", "stale read", "Serializability"),
    ("causal-reverse", "torn snapshot", "Causal-reverse"),
    ("causal-reverse", "dropped row", "Causal-reverse"),
    ("causal-reverse", "stale read", "Stale-read"),
    ("monotonic", "lost update", "Lost-update"),
    ("monotonic", "write skew", "Lost-update"),
    ("monotonic", "falling version", "Monotonic"),
    ("monotonic", "stale read", "Monotonic-reads"),
    ("skew", "write skew", "G2-predicate"),
    ("skew", "phantom", "G2-predicate"),
    ("skew", "lost update", "G2-predicate"),
    ("skew", "risen row", "G2-predicate"),
    ("sets", "lost write", "Lost-element"),
    ("sets", "dropped row", "Lost-element"),
    ("sets", "torn transaction", "Lost-element"),
    ("sets", "risen row", "Risen-element"),
    ("sets", "applied abort", "Aborted-read"),
    ("sets", "stale read", "Stale-read"),
    ("sets", "unordered scan", "Scan-order"),
    ("exactly-once", "forgotten key", "Doubled-effect"),
    ("exactly-once", "lying outcome", "Doubled-effect"),
    ("exactly-once", "lost write", "Lost-effect"),
    ("exactly-once", "torn transaction", "Torn-transaction"),
    ("exactly-once", "lost update", "Lost-update"),
    ("queue", "lost write", "Lost-element"),
    ("queue", "torn transaction", "Torn-transaction"),
    ("queue", "applied abort", "Aborted-read"),
    ("queue", "lost update", "Doubled-taking"),
    ("queue", "risen row", "Risen-element"),
    ("queue", "falling version", "Wrong-stamp"),
    ("queue", "dropped row", "Order"),
    ("locked", "lost update", "Serializability"),
    ("locked", "write skew", "Serializability"),
    ("locked", "torn transaction", "Serializability"),
    ("locked", "applied abort", "Serializability"),
    ("locked", "torn answer", "Serializability"),
    ("locked", "torn snapshot", "Serializability"),
    ("sessions", "lost write", "Read-your-writes"),
    ("sessions", "stale read", "Monotonic-reads"),
    ("sessions", "falling version", "Monotonic-writes"),
    ("sessions", "falling version", "Writes-follow-reads"),
    ("watches", "missed event", "Lost-event"),
    ("watches", "torn transaction", "Lost-event"),
    ("watches", "lost write", "Lost-event"),
    ("watches", "doubled event", "Doubled-event"),
    ("watches", "unordered events", "Event-order"),
    ("watches", "applied abort", "Phantom"),
)


def played(name: str, seed: int, fault: str = "", *, unsure: float = 0.05) -> Workload:
    """A whole run with several clients at once, up to its check."""
    store = DumbStore(random.Random(f"{seed}/store"), fault, unsure=unsure)
    db: Any = DumbDatabase(store)
    workload = WORKLOADS[name](random.Random(f"{seed}/{name}"), places_of((b"h", b"p")))

    async def client(place: int) -> None:
        for number in range(OPS):
            await workload.step(db, f"c{place}", random.Random(f"{seed}/{place}/{number}"))

    async def all_of_it() -> None:
        await workload.prepare(db)
        store.calm = False
        await asyncio.gather(*(client(place) for place in range(CLIENTS)))
        store.calm = True
        await workload.finish(db)

    simulated.run(lambda _loop: all_of_it(), seed)
    return workload


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("unsure", [0.0, 0.2])
def test_a_store_that_is_right_has_no_problems(name: str, unsure: float) -> None:
    for seed in range(1, 4):
        workload = played(name, seed, unsure=unsure)
        assert workload.check() == []
        assert workload.counts.ok > OPS
        assert bool(workload.counts.unknown) == bool(unsure)


@pytest.mark.parametrize(("name", "fault", "anomaly"), BITES)
def test_an_anomaly_is_reported_by_its_name(name: str, fault: str, anomaly: str) -> None:
    seen: list[str] = []
    for seed in range(1, SEEDS + 1):
        problems = played(name, seed, fault).check()
        seen += problems
        if any(problem.startswith(f"{anomaly}:") for problem in problems):
            return
    raise AssertionError(f"{SEEDS} seeds did not show it: {seen[:5]}")


def test_every_workload_and_every_fault_is_tried() -> None:
    assert {name for name, _, _ in BITES} == set(WORKLOADS)
    assert {fault for _, fault, _ in BITES} == set(FAULTS)


def test_a_counter_lies_between_what_must_have_happened_and_what_may_have() -> None:
    bounds = Bounds([Added(1, 4, 5), Added(2, FOREVER, 3), Added(3, 6, -2), Added(8, 9, 1)])
    assert bounds.at(0, 1, 0) == (0, 0)
    assert bounds.at(5, 7, 0) == (3, 8)  # 5 is sure, 3 and -2 may be
    assert bounds.at(10, 11, 0) == (4, 7)  # 5, -2 and 1 are sure
    assert bounds.at(1, 4, 5) == (3, 8)  # the 5 itself, after which it is read


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ((1, 2, 3, 0), ""),
        ((2, 3, 1, 0), ""),
        ((1, 0, 3, 2), "a ring 0 -> 1 -> 0 among 4"),
        ((1, 2, 1, 0), "a ring 0 -> 1 -> 2 -> 1 among 4"),
        ((1, 2, None, 0), "no link behind 0 -> 1 -> 2"),
    ],
)
def test_a_ring_is_one_ring_over_all_links(values: tuple[int | None, ...], what: str) -> None:
    links = [b"%d" % number for number in range(len(values))]
    found = [None if value is None else b"%d" % value for value in values]
    assert broken_ring(links, dict(zip(links, found, strict=True))) == what


def op(kind: str, key: bytes, version: int) -> RegisterOp:
    return RegisterOp("c", kind, key, 1, version=version, outcome=Outcome.OK)


@pytest.mark.parametrize(
    ("ops", "guarantee"),
    [
        ([op("put", b"a", 5), op("get", b"a", 5), op("put", b"b", 6), op("get", b"b", 9)], ""),
        ([op("put", b"a", 5), op("get", b"a", 4)], "Read-your-writes"),
        ([op("get", b"a", 5), op("get", b"b", 4), op("get", b"a", 4)], "Monotonic-reads"),
        ([op("put", b"a", 5), op("put", b"b", 4)], "Monotonic-writes"),
        ([op("get", b"a", 5), op("put", b"b", 5)], "Writes-follow-reads"),
    ],
)
def test_a_session_keeps_its_four_guarantees(ops: list[RegisterOp], guarantee: str) -> None:
    assert [problem.partition(":")[0] for problem in check_session("c", ops)] == (
        [guarantee] if guarantee else []
    )
