"""What a planted bug is, and how it is proven that it is noticed.

A plant is a list of patches of the product, each written as the mistake would be: one rule left out, and nothing else. It
comes with what shows it: `Seeds`, random clusters under given faults; `Directed`, a scenario that goes straight there; or
both. A proof is bounded: the number of seeds, or one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from unittest.mock import patch

from kvstore.sim.scenario import Options
from tools.simulate import judge

Patches = list[tuple[Any, str, Any]]

EVIDENCE_CHARACTERS_MAX: Final = 110


class Caught(NamedTuple):
    """A plant was noticed. tries: seeds that were played; evidence: the first problem, shortened."""

    tries: int
    evidence: str


@dataclass(frozen=True)
class Seeds:
    """Random clusters: the plant must show within `budget` seeds, from 1 on."""

    options: Options
    budget: int

    @property
    def kind(self) -> str:
        return "seeds"

    def prove(self) -> Caught | None:
        for seed in range(1, self.budget + 1):
            problems = judge(seed, self.options).problems
            if problems:
                return Caught(seed, shortened(problems[0]))
        return None


@dataclass(frozen=True)
class Directed:
    """One scenario, which returns what is wrong: something with the plant, nothing without it."""

    scenario: Callable[[], list[str]]

    @property
    def kind(self) -> str:
        return "directed"

    @property
    def budget(self) -> int:
        return 1

    def prove(self) -> Caught | None:
        problems = self.scenario()
        return Caught(1, shortened(problems[0])) if problems else None


@dataclass(frozen=True)
class Plant:
    """A bug. rule: what is left out, for people. model: the bugs of the protocol's model that it stands for."""

    rule: str
    patches: Callable[[], Patches]
    seeds: Seeds | None = None
    directed: Directed | None = None
    model: tuple[str, ...] = ()

    @property
    def proofs(self) -> list[Seeds | Directed]:
        return [proof for proof in (self.directed, self.seeds) if proof is not None]


@contextmanager
def patched(patches: Patches) -> Iterator[None]:
    """The bug is in the product until the block ends."""
    with ExitStack() as stack:
        for owner, attribute, value in patches:
            stack.enter_context(patch.object(owner, attribute, value))
        yield


def shortened(problem: str) -> str:
    """The first line of a problem, without its time, and for an exception with its last line."""
    lines = problem.strip().splitlines()
    text = lines[0]
    if text.startswith("at ") and ": " in text:
        text = text.partition(": ")[2]
    return text[:EVIDENCE_CHARACTERS_MAX].replace("|", "/")


ELECTIONS: Final = Options(
    seconds=10.0, ops=40, kinds=("crash_leader", "pause_leader", "crash"), mean_s=0.5, hold_s=0.7
)
CRASHES: Final = Options(
    seconds=8.0, ops=40, kinds=("crash", "flush", "crash_at_io"), mean_s=0.4, hold_s=0.4
)
SNAPSHOTS: Final = Options(
    seconds=12.0,
    ops=60,
    kinds=("crash_leader", "flush", "partial", "crash"),
    mean_s=0.4,
    hold_s=1.0,
)
PARTITIONS: Final = Options(
    seconds=10.0,
    ops=60,
    kinds=("partition", "one_way", "pause_leader", "clog", "break"),
    mean_s=0.4,
    hold_s=0.8,
)
CLIENTS: Final = Options(
    seconds=8.0,
    clients=6,
    ops=60,
    kinds=("client_crash", "client_pause", "pause_leader", "slow_path", "break"),
    mean_s=0.3,
    hold_s=0.5,
)
CALM: Final = Options(seconds=4.0, clients=8, ops=80, faults=False)
WATCHES: Final = Options(seconds=3.0, clients=4, ops=30, faults=False, workloads=("watches",))
