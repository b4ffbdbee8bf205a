"""Claims of the fleet: every seed gets a verdict, whatever becomes of its process; workers end when nobody wants them."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterable

import pytest

from kvstore.sim.scenario import Options
from tests.unit.tools import fake_judges
from tests.unit.tools.fake_judges import DIES, EXITS, FAILS, HANGS, PASSES, RAISES, STOPS, TALKS
from tools.simulation.fleet import PROBLEM_CHARACTERS_MAX, Fleet, Judge
from tools.simulation.judging import Verdict

LIMIT_S = 0.5  # of a seed that hangs; those that do not are done in far less


def played(
    seeds: Iterable[int],
    *,
    judge: Judge = fake_judges.judge,
    jobs: int = 2,
    limit_s: float = LIMIT_S,
    recycle: int = 100,
) -> dict[int, Verdict]:
    fleet = Fleet(judge, jobs=jobs, limit_s=limit_s, recycle=recycle, grace_s=3.0)
    work = ((seed, Options()) for seed in seeds)
    return {verdict.seed: verdict for verdict in fleet.play(work) if verdict is not None}


def test_a_killed_worker_is_its_seeds_failure_and_another_one_goes_on() -> None:
    verdicts = played([10 + DIES, 20 + PASSES, 30 + FAILS], jobs=1, limit_s=0.0)
    assert verdicts[10 + DIES].problems == [
        "died: the process of this seed ended, killed by SIGKILL"
    ]
    assert verdicts[20 + PASSES].problems == []
    assert verdicts[30 + FAILS].kind == "V2"


@pytest.mark.slow
def test_every_seed_gets_a_verdict_whatever_becomes_of_its_process() -> None:
    """Workers that hang, stop, die, exit and raise, among others that are well."""
    ends = (PASSES, FAILS, RAISES, EXITS, DIES, HANGS, STOPS, TALKS)
    seeds = [10 * tens + end for tens in range(1, 3) for end in ends]
    verdicts = played(seeds)
    assert sorted(verdicts) == sorted(seeds)
    for seed, verdict in verdicts.items():
        kind, problems = seed % 10, verdict.problems
        if kind == PASSES:
            assert problems == []
        elif kind == FAILS:
            assert verdict.kind == "V2"
        elif kind == RAISES:
            assert "ValueError" in problems[0]
        elif kind == EXITS:
            assert "exit status 7" in problems[0]
        elif kind == DIES:
            assert "killed by SIGKILL" in problems[0]
        elif kind == HANGS:
            assert verdict.kind == "hang"
            assert "in judge" in problems[0], "it says where it hung"
        elif kind == STOPS:
            assert verdict.kind == "hang"
        else:
            assert all(len(text) == PROBLEM_CHARACTERS_MAX for text in problems)


@pytest.mark.slow
def test_a_worker_is_replaced_after_so_many_seeds() -> None:
    verdicts = played(range(6), judge=fake_judges.process_of, jobs=1, recycle=2, limit_s=0.0)
    pids = [verdicts[seed].operations for seed in range(6)]
    assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4] == pids[5]
    assert os.getpid() not in pids


def test_a_worker_has_not_grown_by_what_its_parent_uses() -> None:
    """Else each would be replaced after every seed, wherever the parent is large."""
    child = "from tools.simulation.fleet import _memory_bytes; print(_memory_bytes())"
    parent = f"""
import subprocess, sys
large = b"x" * 300_000_000
subprocess.run([sys.executable, "-c", {child!r}], check=True)
"""
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, check=True)
    assert 1_000_000 < int(done.stdout) < 200_000_000


def test_workers_are_gone_when_the_run_is_given_up() -> None:
    """One that has no work, and one that would never end its own."""
    before = multiprocessing.active_children()
    fleet = Fleet(fake_judges.judge, jobs=2, limit_s=0.0)
    verdicts = fleet.play([(10 + HANGS, Options()), (20 + PASSES, Options())])
    assert next(verdict.seed for verdict in verdicts if verdict is not None) == 20 + PASSES
    verdicts.close()  # type: ignore[attr-defined]
    assert multiprocessing.active_children() == before
