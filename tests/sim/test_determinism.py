"""Claims of determinism: one seed is one run, in whatever process, with whatever hash seed and memory behind it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from kvstore.sim.scenario import Options, run

ROOT: Final = Path(__file__).parents[2]
SHORT: Final = Options(seconds=3.0, clients=2, ops=12)
BRIEF: Final = ("--seconds", "3", "--clients", "2", "--ops", "12")  # the same, for the command


def digest_in_a_process(seed: int, hash_seed: str, *extra: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tools.simulate", "--seed", str(seed), "--hash", *extra],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_a_seed_gives_the_same_trace_again() -> None:
    first = run(11, SHORT).digest
    ballast = [bytearray(1000 + each) for each in range(5_000)]  # other addresses, other gc
    assert run(11, SHORT).digest == first
    assert ballast


def test_another_seed_gives_another_trace() -> None:
    assert run(11, SHORT).digest != run(12, SHORT).digest


@pytest.mark.parametrize(
    ("seed", "flags"),
    [
        (11, BRIEF),
        pytest.param(3, (), marks=pytest.mark.slow),
        pytest.param(11, (), marks=pytest.mark.slow),
    ],
)
def test_a_seed_gives_the_same_trace_in_two_processes_with_different_hash_seeds(
    seed: int, flags: tuple[str, ...]
) -> None:
    assert digest_in_a_process(seed, "1", *flags) == digest_in_a_process(seed, "77", *flags)


@pytest.mark.slow
def test_the_written_trace_of_two_processes_is_the_same_line_by_line() -> None:
    """300 tasks and more, so that an order by address would show."""
    lines = [digest_in_a_process(5, hash_seed, "--trace").splitlines() for hash_seed in "12"]
    assert len(lines[0]) > 3_000
    assert lines[0] == lines[1]
