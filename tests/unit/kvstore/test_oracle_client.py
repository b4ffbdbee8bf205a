"""Claims of a node's way to the oracle: no batch is larger than what the oracle answers, and everybody is served in time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvstore import oracle_client
from kvstore.holds import Holds
from kvstore.oracle_client import OracleClient
from txn.messages import Failure, GetTimestamps, Timestamps


class FakeStore:
    """Remembers what the oracle is asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.answer: Any = None
        self.replicas: dict[int, Any] = {}
        self.counters = {"oracle_rounds": 0}
        self.woken = 0
        self.oracle = SimpleNamespace(serving=False)
        self.clock = SimpleNamespace(monotonic=lambda: 0.0)
        self.closer = SimpleNamespace(sample=lambda at, ts: None)
        self.measures = SimpleNamespace(oracle_seconds=SimpleNamespace(note=lambda seconds: None))

    def ask_oracle(self, request: GetTimestamps, answer: Any) -> None:
        self.asked.append(request.fresh)
        self.answer = answer

    def on_deadline(self, when: float) -> None: ...

    def touch(self, range_id: int) -> None: ...

    def wake(self) -> None:
        self.woken += 1


class FakeEvaluator:
    def __init__(self, wanted: int) -> None:
        self.await_fresh: list[Any] = list(range(wanted))
        self.await_read: list[Any] = []
        self.given: list[tuple[Any, int]] = []
        self.silence = self

    def ask_again(self, pendings: list[Any], readers: list[Any]) -> None:
        self.await_fresh[:0] = pendings
        self.await_read[:0] = readers

    def give_timestamps(
        self, pendings: list[Any], first: int, readers: list[Any], read_ts: int, now: float
    ) -> None:
        self.given += zip(pendings, range(first, first + len(pendings)), strict=True)


@pytest.mark.parametrize("wanted", [(25,), (4, 4, 4), (9, 9), (10, 1), (0, 31, 3)])
@pytest.mark.parametrize("fails", [False, True])
def test_more_than_the_oracle_gives_at_once_is_asked_for_in_parts(wanted, fails, monkeypatch):
    monkeypatch.setattr(oracle_client, "FRESH_MAX", 10)
    store = FakeStore()
    client = OracleClient(cast("Any", store), Holds(hold_s=1.0))
    evaluators = [FakeEvaluator(count) for count in wanted]
    touched = {
        number: cast("Any", SimpleNamespace(range_id=number, evaluator=evaluator))
        for number, evaluator in enumerate(evaluators)
    }
    now, next_ts = 0.0, 100
    client.turn(now, touched)
    for _ in range(20):
        if store.answer is None:
            break
        answer, store.answer = store.answer, None
        if fails:
            fails = False
            answer(Failure(0, "unavailable"))
            now += 1.0
        else:
            count = store.asked[-1]
            answer(Timestamps(0, next_ts + count, next_ts, count))
            next_ts += count
        assert client.has_work or all(not each.await_fresh for each in evaluators)
        client.turn(now, {})
    assert max(store.asked) <= 10
    for evaluator, count in zip(evaluators, wanted, strict=True):
        assert [pending for pending, _ in evaluator.given] == list(range(count))
    stamps = [stamp for evaluator in evaluators for _, stamp in evaluator.given]
    assert len(set(stamps)) == sum(wanted)
    assert not client.has_work
