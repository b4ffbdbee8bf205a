"""Claims of workloads in a simulation: each finds nothing wrong with the product, calm or under faults, and has something
to look at; leaving operations out leaves the others what they were."""

from __future__ import annotations

import io
import random
from typing import Final

import pytest

from kvstore.buffer import ReadSpans
from kvstore.sim.scenario import Options, run
from kvstore.sim.workloads import WEIGHTS, draw_workloads
from kvstore.testing.history import History, TxnOp
from kvstore.testing.workloads import WORKLOADS

CALM: Final = Options(seconds=0.8, clients=3, ops=10, faults=False)
FAULTY: Final = Options(seconds=6.0, clients=4, ops=40)


def with_workloads(options: Options, *names: str) -> Options:
    return Options(
        seconds=options.seconds,
        clients=options.clients,
        ops=options.ops,
        faults=options.faults,
        workloads=names,
    )


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_calm_cluster_has_no_problems(name: str) -> None:
    result = run(5, with_workloads(CALM, name))
    assert result.problems == []
    assert result.finished
    assert result.unknown == 0
    assert result.operations >= 18


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("seed", range(201, 204))
def test_a_cluster_under_faults_has_no_problems(name: str, seed: int) -> None:
    result = run(seed, with_workloads(FAULTY, name))
    assert result.problems == []
    assert result.operations > 40


def test_seeds_draw_different_workloads_and_each_is_drawn() -> None:
    drawn = [
        tuple(each.name for each in draw_workloads(random.Random(seed), History()))
        for seed in range(60)
    ]
    assert {len(names) for names in drawn} == {1, 2, 3, 4}
    assert all(len({*names}) == len(names) for names in drawn)
    assert {name for names in drawn for name in names} == {*WORKLOADS} == {*WEIGHTS}


def test_an_unknown_workload_is_refused() -> None:
    with pytest.raises(KeyError):
        run(1, with_workloads(CALM, "bonk"))


def test_a_workload_that_finds_something_fails_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WORKLOADS["ring"], "inspect", lambda _: ["Broken-ring: planted"])
    assert run(5, with_workloads(CALM, "bank", "ring")).problems == ["Broken-ring: planted"]


def test_a_step_that_raises_fails_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def step(*_: object) -> None:
        raise ValueError("planted")

    monkeypatch.setattr(WORKLOADS["ring"], "step", step)
    assert "ValueError('planted')" in run(5, with_workloads(CALM, "ring")).problems[0]


def test_operations_that_are_left_out_change_nothing_of_the_others() -> None:
    """What an operation writes and where is drawn for its place and number; what it reads is up to the world."""
    whole = moves(None)
    kept = frozenset((place, number) for place in range(3) for number in range(0, 10, 2))
    some = moves(kept)
    assert 0 < len(some) < len(whole)
    assert {*some} < {*whole}


def moves(kept: frozenset[tuple[int, int]] | None) -> list[tuple[bytes, ...]]:
    options = Options(
        seconds=0.8, clients=3, ops=10, faults=False, workloads=("bank",), ops_kept=kept
    )
    result = run(5, options)
    assert result.problems == []
    ops: list[TxnOp] = result.workloads[0].history.transactions
    return [(op.name, *sorted(op.reads)) for op in ops if not op.name.endswith(b"/reads")]


def test_every_operation_is_in_the_trace() -> None:
    sink = io.StringIO()
    result = run(5, with_workloads(CALM, "sessions", "bank"), sink)
    lines = [line for line in sink.getvalue().splitlines() if line.split(" ")[1] == "op"]
    assert len(lines) == result.operations + result.failed
    assert any(" sessions put b'" in line for line in lines)


@pytest.mark.parametrize(
    ("left_out", "name", "anomaly"),
    [
        ("add", "skew", "G2-predicate"),  # guards over spans: a scan guards nothing
        ("add_key", "monotonic", "Lost-update"),  # guards over keys: a read guards nothing
        ("add_key", "ring", "Broken-ring"),
        ("add_key", "list-append", "Serializability"),
    ],
)
def test_a_client_that_does_not_guard_what_it_read_is_caught(
    monkeypatch: pytest.MonkeyPatch, left_out: str, name: str, anomaly: str
) -> None:
    monkeypatch.setattr(ReadSpans, left_out, lambda *_: None)
    options = Options(seconds=0.6, clients=4, ops=12, faults=False, workloads=(name,))
    for seed in range(1, 6):
        if any(problem.startswith(anomaly) for problem in run(seed, options).problems):
            return
    raise AssertionError("five seeds did not show it")
