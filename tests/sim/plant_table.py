"""Runs every planted bug within its budget, and writes the table of what caught it into README.md.

    python -m tests.sim.plant_table [--jobs 2]       all of them; the table is written anew
    python -m tests.sim.plant_table --only NAME      those whose name contains this; printed, and nothing is written

Exits with 1 if a bug was not caught, with 2 if a scenario did not get where it wants to go.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from tests.sim.plants import MODEL, NOT_BUILT, PLANTS, equivalents, planted
from tests.sim.plants.base import Caught, shortened
from tests.stateful import txn_plants
from tests.stateful.txn_harness import find

README: Final = Path(__file__).with_name("README.md")
BEGIN: Final = "<!-- planted bugs: written by `make plants` -->"
END: Final = "<!-- end of planted bugs -->"
PROOF_LIMIT_S: Final = 600.0  # real; a worker that was killed never answers
KINDS: Final = {"seeds": "seeds", "directed": "directed", "core": "transaction core"}


class Job(NamedTuple):
    """One proof of one plant. kind: how it is caught, as the table says it."""

    name: str
    kind: str
    rule: str
    budget: int


class Done(NamedTuple):
    job: Job
    caught: Caught | None
    seconds: float
    error: str = ""


def jobs() -> list[Job]:
    """Everything that has to be proven, in the table's order."""
    found = [
        Job(name, KINDS[proof.kind], plant.rule, proof.budget)
        for name, plant in PLANTS.items()
        for proof in plant.proofs
    ]
    for name, (patches, budget) in txn_plants.PLANTS.items():
        story = (patches.__doc__ or "").strip().partition("\n")[0].rstrip(".")
        rule = txn_plants.SWITCHES.get(name, story)
        found.append(Job(name, KINDS["core"], rule, budget))
    return found


def prove(job: Job) -> Done:
    """Run one. Bounded by its budget."""
    began = time.monotonic()
    caught: Caught | None = None
    error = ""
    try:
        caught = _in_core(job) if job.kind == KINDS["core"] else _in_cluster(job)
    except Exception as why:  # noqa: BLE001 - NotReached, or something that the scenario asserts on its way
        error = f"did not come about: {shortened(repr(why))}"
    return Done(job, caught, time.monotonic() - began, error)


def _in_cluster(job: Job) -> Caught | None:
    plant = PLANTS[job.name]
    for proof in plant.proofs:
        if KINDS[proof.kind] == job.kind:
            with planted(job.name):
                return proof.prove(plant.shows)
    raise AssertionError(job)


def _in_core(job: Job) -> Caught | None:
    found = find(job.name, job.budget)
    if found is None:
        return None
    seed, error = found
    return Caught(seed + 1, shortened(f"{type(error).__name__}: {error}"))


def _left(asked: Iterable[Job], done: Mapping[Job, Done]) -> Iterator[str]:
    return (f"{job.name} ({job.kind})" for job in asked if job not in done)


def table(done: Iterable[Done]) -> str:
    """The section's text, from what was found."""
    lines = [
        "| bug | instrument | rule left out | budget | needed | caught by |",
        "|---|---|---|---|---|---|",
    ]
    for job, caught, _, error in done:
        budget = f"{job.budget} seeds" if job.kind != KINDS["directed"] else "1 run"
        needed = str(caught.tries) if caught else "-"
        evidence = f"`{caught.evidence.replace('`', '')}`" if caught else error or "not caught"
        lines.append(f"| {job.name} | {job.kind} | {job.rule} | {budget} | {needed} | {evidence} |")
    lines += ["", "| bug of the protocol's first model | its equivalents here |", "|---|---|"]
    lines += [f"| {bug} | {', '.join(equivalents(bug)) or NOT_BUILT[bug]} |" for bug in MODEL]
    return "\n".join(lines)


def write(text: str) -> None:
    readme = README.read_text(encoding="utf-8")
    before, _, rest = readme.partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, f"{README} has no place for the table"
    README.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.plant_table", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (%(default)s)")
    parser.add_argument("--only", default="", help="plants whose name contains this")
    given = parser.parse_args(arguments)
    asked = [job for job in jobs() if given.only in job.name]
    began, done = time.monotonic(), dict[Job, Done]()
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        proofs = pool.imap_unordered(prove, asked)
        for _ in asked:
            try:
                each = proofs.next(PROOF_LIMIT_S)
            except multiprocessing.TimeoutError:
                print(f"no proof has ended for {PROOF_LIMIT_S:g} s: {[*_left(asked, done)]}")
                return 2
            done[each.job] = each
            what = f"{each.caught.tries}: {each.caught.evidence}" if each.caught else "NOT CAUGHT"
            print(
                f"{len(done)} of {len(asked)}, {time.monotonic() - began:.0f} s: {each.job.name} ({each.job.kind}, "
                f"{each.seconds:.1f} s) {each.error or what}",
                flush=True,
            )
    if not given.only:
        write(table(done[job] for job in asked))
    if any(each.error for each in done.values()):
        return 2
    return 1 if any(each.caught is None for each in done.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
