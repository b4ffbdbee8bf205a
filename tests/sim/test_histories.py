"""Claim: the history of a workload, written down and read again, is judged as the workload judges itself: nothing is found in a
healthy run, and what was invented afterwards is."""

from __future__ import annotations

import asyncio
import io
import random
from pathlib import Path

import pytest

from kvstore import Database
from kvstore.testing import SimCluster, simulate
from kvstore.testing.history import History, Outcome
from kvstore.testing.jsonl import read_history
from kvstore.testing.workloads import WORKLOADS, Workload
from tools.check_history import judge, kinds_of
from tools.workload import history_writer, write_histories

OPERATIONS = 12


def played(name: str, path: Path) -> History:
    """What is read from the file after a few operations of two clients."""
    workload = WORKLOADS[name](random.Random(7), [b"a/", b"k/", b"z/"])

    @simulate(seeds=1, faults=False)
    async def run(cluster: SimCluster) -> None:
        await play(workload, await cluster.connect())

    run()
    write_histories(history_writer(), [workload], path)
    return read_history(io.BytesIO(path.read_bytes()))


async def play(workload: Workload, database: Database) -> None:
    await workload.prepare(database)

    async def client(who: str) -> None:
        rng = random.Random(who)
        for _ in range(OPERATIONS):
            await workload.step(database, who, rng)

    await asyncio.gather(client("c1"), client("c2"))
    await workload.finish(database)
    assert workload.check() == []


@pytest.mark.parametrize("name", [name for name in WORKLOADS if WORKLOADS[name].exact])
def test_what_is_written_down_is_judged_clean(name: str, tmp_path: Path) -> None:
    history = played(name, tmp_path / "history.jsonl")
    found = {kind: judge(history, kind) for kind in kinds_of(history)}
    assert [each for each in found.values() if each] == []


def test_a_read_that_was_changed_afterwards_is_found(tmp_path: Path) -> None:
    history = played("bank", tmp_path / "history.jsonl")
    op = next(each for each in history.transactions if each.outcome is Outcome.OK and each.reads)
    op.reads[next(iter(op.reads))] = b"never"
    assert judge(history, "transactions")
