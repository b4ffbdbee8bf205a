"""Claims: the history of a workload, written down and read again, is judged as the workload judges itself: nothing is found
in a healthy run, and what was invented afterwards is. So is that of a simulated seed; an anomaly's cycle is told by both."""

from __future__ import annotations

import asyncio
import io
import random
from itertools import takewhile
from pathlib import Path
from typing import Final

import pytest

from kvstore import Database
from kvstore.testing import SimCluster, simulate
from kvstore.testing.history import History, Outcome
from kvstore.testing.jsonl import read_history
from kvstore.testing.workloads import WORKLOADS, Workload
from tests.sim.plants import planted
from tools.check_history import judge, kinds_of
from tools.check_history import main as check_command
from tools.histories import write_histories
from tools.simulate import main as simulate_command

OPERATIONS = 12


def played(name: str, path: Path) -> History:
    """What is read from the file after a few operations of two clients."""
    workload = WORKLOADS[name](random.Random(7), [b"a/", b"k/", b"z/"])

    @simulate(seeds=1, faults=False)
    async def run(cluster: SimCluster) -> None:
        await play(workload, await cluster.connect())

    run()
    assert write_histories([workload], path) == [path]
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


# ---------------------------------------------------------------- of a simulated seed

SHORT: Final = ("--seconds", "3", "--clients", "3", "--ops", "12")


def simulated(path: Path, *words: str) -> int:
    return simulate_command(["--seed", "3", *SHORT, *words, "--history", str(path)])


def test_the_history_of_a_seed_is_judged_clean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulated(tmp_path / "seed.jsonl", "--workloads", "bank,counter,registers") == 0
    files = [tmp_path / "seed.bank.jsonl", tmp_path / "seed.registers.jsonl"]
    assert sorted(tmp_path.iterdir()) == files  # a counter's can be judged by itself alone
    assert f"histories: {files[0]}, {files[1]}\n" in capsys.readouterr().out
    assert [check_command([str(path)]) for path in files] == [0, 0]
    history = read_history(io.BytesIO(files[0].read_bytes()))
    assert history.transactions
    assert history.initial
    assert history.final
    assert history.markers


def test_a_seed_with_one_workload_writes_the_file_that_was_named(tmp_path: Path) -> None:
    assert simulated(tmp_path / "seed.edn", "--workloads", "list-append") == 0
    (path,) = tmp_path.iterdir()
    assert path.name == "seed.edn"
    lines = path.read_text().splitlines()
    assert lines[0].startswith("{:type :invoke, :process 0, :f :txn, :value [[:")
    assert len(lines) > 20


def test_a_seed_that_ends_in_between_leaves_what_was_seen(tmp_path: Path) -> None:
    workload = WORKLOADS["bank"](random.Random(7), [b"a/", b"k/", b"z/"])
    (path,) = write_histories([workload], tmp_path / "seed.jsonl", finished=False)
    history = read_history(io.BytesIO(path.read_bytes()))
    assert history.initial == workload.rows()
    assert (history.final, history.markers) == (None, None)  # nobody looked


@pytest.mark.parametrize("words", [(), ("--seed", "3", "--shrink"), ("--seed", "3", "--speed")])
def test_a_history_is_of_one_seed(words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        simulate_command([*words, "--history", str(tmp_path / "seed.jsonl")])
    assert list(tmp_path.iterdir()) == []


def test_a_seed_that_shows_an_anomaly_tells_its_cycle_as_its_file_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "seed.jsonl"
    calm = ("--workloads", "rw-register", "--calm", "--clients", "6")
    with planted("guards not validated"):
        assert simulated(path, *calm) == 1
    told = capsys.readouterr().out
    assert check_command([str(path), "--by-version"]) == 1
    name, *printed = capsys.readouterr().out.splitlines()
    cycle = list(takewhile(lambda line: line.startswith("  T"), printed))
    assert any("-rw->" in line for line in cycle)
    assert "\n".join([f"  {name} (rw-register)", *cycle]) in told
