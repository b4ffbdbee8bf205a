"""Simulated clusters under faults, seed by seed. A seed that fails prints how to replay it.

python -m tools.simulate --seed 17 [--hash] [--trace]     one seed
python -m tools.simulate --seeds 200 --start 1 --jobs 2   many; exits with 1 if any fails
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TextIO

from kvstore.sim.scenario import Options, Result, run
from kvstore.sim.workloads import ACCOUNTS, BALANCE
from kvstore.testing.checkers import (
    CheckTooLong,
    check_registers,
    check_totals,
    check_transactions,
)


class Verdict(NamedTuple):
    """One seed, judged. `problems` empty: it passed."""

    seed: int
    problems: list[str]
    seconds: float
    operations: int
    unknown: int
    faults: dict[str, int]
    digest: str
    result: Result | None = None


def judge(seed: int, options: Options | None = None, sink: TextIO | None = None) -> Verdict:
    """Run a seed and check what its clients saw."""
    result = run(seed, options, sink)
    problems = list(result.problems)
    try:
        problems += check_registers(result.history.registers)
    except CheckTooLong as error:
        problems.append(f"the check of registers was given up: {error}")
    transactions = result.history.transactions
    problems += check_transactions(result.initial, transactions, result.final, result.markers)
    snapshots = (op for op in transactions if not op.writes)
    problems += check_totals(snapshots, ACCOUNTS, len(ACCOUNTS) * BALANCE)
    return Verdict(
        seed,
        problems,
        result.seconds,
        result.operations,
        result.unknown,
        result.faults,
        result.digest,
        result,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    if given.seed is not None:
        return _one(given)
    return _many(given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.simulate", description=__doc__)
    parser.add_argument("--seed", type=int, help="play this one")
    parser.add_argument("--hash", action="store_true", help="print the hash of its trace")
    parser.add_argument("--trace", action="store_true", help="print everything that happens")
    parser.add_argument("--seeds", type=int, default=50, help="how many to play (%(default)s)")
    parser.add_argument("--start", type=int, default=1, help="the first one (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (%(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of faults (%(default)s)")
    parser.add_argument("--ops", type=int, default=50, help="of each client (%(default)s)")
    parser.add_argument("--clients", type=int, default=4, help="at once (%(default)s)")
    parser.add_argument("--nodes", type=int, default=3, help="of the cluster (%(default)s)")
    parser.add_argument("--calm", action="store_true", help="no faults")
    parser.add_argument("--only", default="", help="kinds of faults, with commas; else as drawn")
    return parser


def _options(given: argparse.Namespace) -> Options:
    return Options(
        seconds=given.seconds,
        clients=given.clients,
        ops=given.ops,
        nodes=given.nodes,
        faults=not given.calm,
        kinds=tuple(name for name in given.only.split(",") if name),
    )


def _command(given: argparse.Namespace, seed: int) -> str:
    words = ["python -m tools.simulate", f"--seed {seed}"]
    defaults = _parser()
    for name in ("seconds", "ops", "clients", "nodes", "only"):
        value = getattr(given, name)
        if value != defaults.get_default(name):
            words.append(f"--{name} {value}")
    return " ".join([*words, "--calm"] if given.calm else words)


def _one(given: argparse.Namespace) -> int:
    began = time.monotonic()
    verdict = judge(given.seed, _options(given), sys.stdout if given.trace else None)
    if given.hash:
        print(verdict.digest)
    else:
        print(_line(verdict), f"in {time.monotonic() - began:.1f} s")
        if verdict.result is not None:
            print({name: round(value, 3) for name, value in verdict.result.counters.items()})
    for problem in verdict.problems:
        print(problem)
    return 1 if verdict.problems else 0


def _line(verdict: Verdict) -> str:
    return (
        f"seed {verdict.seed}: {'FAILED' if verdict.problems else 'ok'}, {verdict.seconds:.1f} simulated seconds, "
        f"{verdict.operations} operations ({verdict.unknown} unknown), faults {verdict.faults}"
    )


def _many(given: argparse.Namespace) -> int:
    began = time.monotonic()
    failed: list[int] = []
    seconds, operations, unknown = 0.0, 0, 0
    faults: dict[str, int] = {}
    for count, verdict in enumerate(_verdicts(given), 1):
        seconds += verdict.seconds
        operations += verdict.operations
        unknown += verdict.unknown
        for name, times in verdict.faults.items():
            faults[name] = faults.get(name, 0) + times
        if verdict.problems:
            failed.append(verdict.seed)
            print(f"\nseed {verdict.seed} FAILED; replay: {_command(given, verdict.seed)}")
            for problem in verdict.problems[:3]:
                print(f"  {problem}"[:2000])
        elapsed = time.monotonic() - began
        print(f"\r{count} of {given.seeds} seeds, {len(failed)} failed, {elapsed:.0f} s", end="")
        sys.stdout.flush()
    print(f"\n{seconds:.0f} simulated seconds, {operations} operations, {unknown} unknown")
    print("faults: " + ", ".join(f"{name} {times}" for name, times in sorted(faults.items())))
    if failed:
        print(f"failed: {' '.join(map(str, failed))}")
    return 1 if failed else 0


def _verdicts(given: argparse.Namespace) -> Iterator[Verdict]:
    seeds = range(given.start, given.start + given.seeds)
    work: Iterable[tuple[int, Options]] = ((seed, _options(given)) for seed in seeds)
    if given.jobs == 1:
        yield from map(_judged, work)
        return
    with multiprocessing.get_context("spawn").Pool(given.jobs, maxtasksperchild=50) as pool:
        yield from pool.imap_unordered(_judged, work)


def _judged(work: tuple[int, Options]) -> Verdict:
    return judge(*work)._replace(result=None)


if __name__ == "__main__":
    sys.exit(main())
