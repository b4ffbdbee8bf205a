"""Claims of `tools.workload`: a workload of which no operation was done has shown nothing, and fails the run."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

from kvstore.testing.workloads import Workload
from tools.workload import Run, make


class Unconnected(Run):
    """On no cluster: what reads the end finds a database that holds nothing."""

    def _connected(self, timeout_s: float) -> AbstractAsyncContextManager[Any]:
        async def get_entry(_key: bytes, *, timeout: float) -> None:
            return None

        return nullcontext(SimpleNamespace(get_entry=get_entry))


def found(*workloads: Workload) -> dict[str, list[str]]:
    nobody: Any = SimpleNamespace(nodes=[], endpoints="")
    return asyncio.run(Unconnected(nobody, workloads, 1, lambda _text: None).finish())


def test_no_operation_is_a_problem_whatever_is_read_in_the_end() -> None:
    (registers,) = make(["registers"], 1, 1)
    idle = "Idle: registers: none of its operations was done"
    assert found(registers) == {"registers": [idle], "cluster": []}
    assert registers.counts.ok  # the reads of the end


def test_one_operation_is_enough() -> None:
    (registers,) = make(["registers"], 1, 1)
    registers.counts.ok = 1
    assert found(registers)["registers"] == []
