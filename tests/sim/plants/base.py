"""What a planted bug is, and how it is proven that it is noticed.

A plant is a list of patches of the product, each written as the mistake would be: one rule left out, and nothing else. It
comes with what shows it: `Seeds`, random clusters under given faults; `Directed`, a scenario that goes straight there; or
both. A proof is bounded: the number of seeds, or one run. What fails must be the rule that the bug breaks: a plant says which
kinds of problems count, and no other does, or a mistake in the plant itself would be taken for its being noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from unittest.mock import patch

from kvstore.sim.scenario import Options
from tools.simulate import judge
from tools.simulation.judging import kind_of

Patches = list[tuple[Any, str, Any]]
Kinds = tuple[str, ...]

EVIDENCE_CHARACTERS_MAX: Final = 110


class Caught(NamedTuple):
    """A plant was noticed. tries: seeds that were played; evidence: the first problem that counts, shortened."""

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

    def prove(self, shows: Kinds) -> Caught | None:
        for seed in range(1, self.budget + 1):
            found = first_of(shows, judge(seed, self.options).problems)
            if found is not None:
                return Caught(seed, shortened(found))
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

    def prove(self, shows: Kinds) -> Caught | None:
        found = first_of(shows, self.scenario())
        return None if found is None else Caught(1, shortened(found))


@dataclass(frozen=True)
class Plant:
    """A bug. rule: what is left out, for people. shows: the kinds of problems that count (`kind_of`). model: the bugs of the
    protocol's model that it stands for.
    """

    rule: str
    patches: Callable[[], Patches]
    shows: Kinds
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


def first_of(shows: Kinds, problems: list[str]) -> str | None:
    return next((each for each in problems if kind_of(each) in shows), None)


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
RETRIES: Final = Options(seconds=3.0, clients=4, ops=30, faults=False, workloads=("exactly-once",))
WATCHES: Final = Options(seconds=3.0, clients=4, ops=30, faults=False, workloads=("watches",))

TOO_LOW: Final = ("I7", "I8", "I11", "I12", "I13", "I14", "I19", "M1")
"""What tells of a timestamp that is below what was issued, read, closed or written before."""
