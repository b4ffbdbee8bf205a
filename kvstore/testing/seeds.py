"""Which seeds a simulated test plays, and how it tells to play one again.

What the command line says (`--kvorum-seed`, `--kvorum-seeds`) goes over the environment (KVORUM_SEED, KVORUM_SEEDS), and
that over the test. Imports nothing of the product: the pytest plugin loads this before anything is measured.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

ONE_VARIABLE: Final = "KVORUM_SEED"
MANY_VARIABLE: Final = "KVORUM_SEEDS"
TEST_VARIABLE: Final = "PYTEST_CURRENT_TEST"  # pytest's own: "path::name (phase)"
SEEDS_MAX: Final = 1_000_000  # of one test


class Wish(NamedTuple):
    """What somebody outside the test asked for. None: nothing."""

    seed: int | None = None
    seeds: int | None = None


command_lines: list[Wish] = []  # of the pytest runs in this process; the last one counts


def chosen(seeds: int | Sequence[int], environment: Mapping[str, str] = os.environ) -> list[int]:
    """The seeds to play, in order. Args: seeds: what the test says: 1 to so many, or exactly these.

    Raises: ValueError for what is no number, or not from 1 to SEEDS_MAX, or for no seeds at all.
    """
    line = command_lines[-1] if command_lines else Wish()
    one = line.seed if line.seed is not None else _number(environment, ONE_VARIABLE)
    if one is not None:
        return [one]
    if not isinstance(seeds, int):
        if not seeds:
            raise ValueError("a test that plays no seeds would pass whatever it does")
        return list(seeds)
    many = line.seeds if line.seeds is not None else _number(environment, MANY_VARIABLE)
    count = seeds if many is None else many
    if not 1 <= count <= SEEDS_MAX:
        raise ValueError(f"a test plays from 1 to {SEEDS_MAX} seeds, not {count}")
    return list(range(1, count + 1))


def replay_line(seed: int, environment: Mapping[str, str] = os.environ) -> str:
    """The command that plays this seed of the present test alone."""
    test = environment.get(TEST_VARIABLE, "").rpartition(" (")[0]
    if test:
        return f"pytest {shlex.quote(test)} --kvorum-seed {seed}"
    return f"set {ONE_VARIABLE}={seed} and run the same again"


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "").strip()
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} is not a number: {text!r}") from None
