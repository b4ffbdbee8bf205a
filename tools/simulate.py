"""Simulated clusters under faults, seed by seed. A seed that fails prints how to replay it.

python -m tools.simulate --seed 17 [--hash | --trace | --timeline]   one seed
python -m tools.simulate --seed 17 --history FILE                    what its clients saw, for tools.check_history
python -m tools.simulate --seed 17 --shrink                          a failing seed, made small
python -m tools.simulate --seeds 200 --start 1 --jobs 2 [--stop]     many, on worker processes
python -m tools.simulate --speed                                     simulated seconds per second of a core

Ends with 0 if all is well, 1 if a seed failed (or a probe was never reached, with --require-probes), 130 after Ctrl-C or
SIGTERM: many seeds print their totals all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from kvstore.sim.scenario import Options
from kvstore.sim.timeline import Event, events, table
from tools.histories import write_histories
from tools.simulation.flags import add_flags, command, options_of
from tools.simulation.fleet import Fleet
from tools.simulation.judging import Verdict, judge
from tools.simulation.shrink import RUNS_MAX, SECONDS_MAX, Shrinker, Shrunk, describe
from tools.simulation.speed import measure
from tools.simulation.totals import Progress, Totals, faults_told, went_off

__all__ = ["Verdict", "judge", "main"]

SEED_LIMIT_S: Final = 120.0
INTERRUPTED: Final = 130
PROBLEMS_SHOWN: Final = 3


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.history is not None:
        if given.seed is None or given.shrink or given.speed:
            parser.error("--history is for one seed (--seed), and not with --shrink")
        if not given.history.parent.is_dir():
            parser.error(f"no directory for {given.history}")
    with contextlib.suppress(BrokenPipeError):
        if given.speed:
            return _speed(given)
        if given.seed is None:
            return _many(given)
        return _shrink(given) if given.shrink else _one(given)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    parser.add_argument(
        "--seed-limit",
        type=float,
        default=SEED_LIMIT_S,
        help="real seconds for one seed; 0: no limit (%(default)g)",
    )
    one = parser.add_argument_group("one seed")
    one.add_argument("--seed", type=int, help="play this one")
    one.add_argument("--hash", action="store_true", help="print the hash of its trace alone")
    one.add_argument("--trace", action="store_true", help="print everything that happens")
    one.add_argument("--timeline", action="store_true", help="print what matters of it, as a table")
    one.add_argument(
        "--history",
        type=Path,
        metavar="FILE",
        help="write what clients saw; of several workloads, FILE with the name of each before its suffix",
    )
    one.add_argument("--shrink", action="store_true", help="make a failing run small")
    one.add_argument("--shrink-runs", type=int, default=RUNS_MAX, help="at most (%(default)s)")
    one.add_argument("--shrink-s", type=float, default=SECONDS_MAX, help="at most (%(default)g)")
    many = parser.add_argument_group("many seeds")
    many.add_argument("--seeds", type=int, default=50, help="how many (%(default)s)")
    many.add_argument("--start", type=int, default=1, help="the first one (%(default)s)")
    many.add_argument("--jobs", type=int, default=2, help="processes at once (%(default)s)")
    many.add_argument("--stop", action="store_true", help="at the first failure")
    many.add_argument(
        "--failures", type=int, default=5, help="printed in full, at most (%(default)s)"
    )
    many.add_argument(
        "--require-probes",
        nargs="?",
        const="",
        metavar="NAMES",
        help="a probe that was never reached is a failure: those that runs tell of, and these",
    )
    parser.add_argument("--speed", action="store_true", help="measure it, on one core")
    add_flags(parser)
    return parser


# ---------------------------------------------------------------- one seed


def _one(given: argparse.Namespace) -> int:
    options = options_of(given)
    told = io.StringIO() if given.timeline else None
    with _watchdog(given.seed_limit):
        verdict = judge(given.seed, options, sys.stdout if given.trace else told)
    written = []
    if given.history is not None and verdict.result is not None:
        result = verdict.result
        written = write_histories(result.workloads, given.history, finished=result.finished)
    if given.output == "json":
        files = {"histories": [str(path) for path in written]} if given.history else {}
        print(json.dumps(_as_json(verdict, options) | files, indent=2))
    elif given.hash:
        print(verdict.digest)
    else:
        if told is not None:
            print(table(list(events(told.getvalue().splitlines()))))
        print(_line(verdict), f"in {verdict.cpu_s:.1f} s")
        if verdict.result is not None and verdict.result.counters:
            counters = verdict.result.counters.items()
            print(", ".join(f"{name} {value:g}" for name, value in counters if value))
        _report(verdict, options, print, problems_max=len(verdict.problems))
        if given.history is not None:
            print("histories:", ", ".join(map(str, written)) or "none of these workloads has one")
    return 1 if verdict.problems else 0


def _line(verdict: Verdict) -> str:
    faults = faults_told(verdict.faults, verdict.in_vain)
    if verdict.frozen:
        faults += f"; frozen while the others went on: {verdict.frozen}"
    return (
        f"seed {verdict.seed}: {'FAILED' if verdict.problems else 'ok'}, {verdict.seconds:.1f} simulated seconds, "
        f"{verdict.operations} operations ({verdict.failed} failed, {verdict.unknown} unknown), faults: {faults}"
    )


def _report(
    verdict: Verdict, options: Options, say: Callable[[str], None], *, problems_max: int
) -> None:
    """A failure, and what to do about it."""
    if not verdict.problems:
        return
    for problem in verdict.problems[:problems_max]:
        say(f"  {problem}")
    if len(verdict.problems) > problems_max:
        say(f"  and {len(verdict.problems) - problems_max} more")
    say(f"replay: {command(verdict.seed, options)}")
    say(f"shrink: {command(verdict.seed, options)} --shrink")


def _as_json(verdict: Verdict, options: Options) -> dict[str, Any]:
    return {
        "seed": verdict.seed,
        "problems": verdict.problems,
        "kind": verdict.kind,
        "digest": verdict.digest,
        "simulated_s": verdict.seconds,
        "cpu_s": verdict.cpu_s,
        "operations": {
            "ok": verdict.operations,
            "failed": verdict.failed,
            "unknown": verdict.unknown,
        },
        "faults": verdict.faults,
        "faults_went_off": went_off(verdict.faults, verdict.in_vain),
        "frozen": verdict.frozen,
        "probes": verdict.probes,
        "command": command(verdict.seed, options),
    }


@contextmanager
def _watchdog(limit_s: float) -> Iterator[None]:
    """After so many real seconds: say where it hangs, and end the process."""
    if not limit_s:
        yield
        return
    faulthandler.dump_traceback_later(limit_s, exit=True, file=sys.__stderr__ or 2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


# ---------------------------------------------------------------- shrinking


def _shrink(given: argparse.Namespace) -> int:
    options, seed = options_of(given), given.seed
    progress = sys.stderr

    def tell(text: str) -> None:
        print(text, file=progress, flush=True)

    def play(chosen: Options) -> Verdict:
        """In a process of its own: a run that dies or hangs is a result like any other."""
        verdicts = Fleet(judge, jobs=1, limit_s=given.seed_limit).play([(seed, chosen)])
        return next(verdict for verdict in verdicts if verdict is not None)

    verdict = play(options)
    if not verdict.problems:
        print(_line(verdict))
        return 0
    tell(f"seed {seed} fails: {verdict.kind}; {describe(options, verdict)}")
    shrinker = Shrinker(
        play, options, verdict, runs_max=given.shrink_runs, seconds_max=given.shrink_s, tell=tell
    )
    shrunk = shrinker.shrink()
    for line in shrunk_lines(seed, shrunk, timeline_of(seed, shrunk)):
        print(line)
    return 1


def timeline_of(seed: int, shrunk: Shrunk) -> list[Event]:
    """Of a minimal run, played once more; nothing if it would end this process or hang."""
    if shrunk.verdict.kind in {"hang", "died"}:
        return []
    told = io.StringIO()
    judge(seed, shrunk.options, told)
    return list(events(told.getvalue().splitlines()))


def shrunk_lines(seed: int, shrunk: Shrunk, rows: Sequence[Event]) -> Iterator[str]:
    """What a minimal run looks like, for people."""
    word = "minimal" if shrunk.is_minimal else "smaller (a limit was reached, or a pass left out)"
    yield f"{word} after {shrunk.runs} runs: {describe(shrunk.options, shrunk.verdict)}"
    if rows:
        yield table(rows)
    for problem in shrunk.verdict.problems[:PROBLEMS_SHOWN]:
        yield f"  {problem.partition(chr(10))[0]}"  # where it was raised, the command below tells
    yield f"replay: {command(seed, shrunk.options)} --timeline"


# ---------------------------------------------------------------- many seeds


def _many(given: argparse.Namespace) -> int:
    options = options_of(given)
    in_json = given.output == "json"
    progress = Progress(sys.stderr if in_json else sys.stdout, given.seeds)
    names = (given.require_probes or "").split(",")
    totals = Totals(name for name in names if name)
    fleet = Fleet(judge, jobs=given.jobs, limit_s=given.seed_limit)
    work = ((seed, options) for seed in range(given.start, given.start + given.seeds))
    verdicts = fleet.play(work)
    status = 0

    def say(text: str) -> None:
        progress.clear()
        print(text, file=sys.stderr if in_json else sys.stdout, flush=True)

    try:
        with _told_to_end():
            for verdict in verdicts:
                if verdict is not None:
                    totals.add(verdict)
                    if verdict.problems and totals.failures <= given.failures:
                        say(f"seed {verdict.seed} FAILED: {verdict.kind}")
                        _report(verdict, options, say, problems_max=PROBLEMS_SHOWN)
                    if verdict.problems and given.stop:
                        break
                progress.show(totals)
    except KeyboardInterrupt:
        say("interrupted")
        status = INTERRUPTED
    finally:
        verdicts.close()  # type: ignore[attr-defined]  # a generator, whose end ends the workers
    totals.elapsed_s = progress.elapsed_s()
    progress.clear()
    print(json.dumps(totals.as_json(), indent=2) if in_json else "\n".join(totals.lines()))
    missed = totals.missed() if given.require_probes is not None else []
    if missed:
        say(f"FAILED: probes that were never reached: {', '.join(missed)}")
    return status or (1 if totals.failures or missed else 0)


@contextmanager
def _told_to_end() -> Iterator[None]:
    """SIGTERM is as Ctrl-C, and that also where a shell that began this in the background has it ignored."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {each: signal.signal(each, interrupt) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _speed(given: argparse.Namespace) -> int:
    """In this process."""

    def play(seed: int, options: Options) -> Verdict:
        with _watchdog(given.seed_limit):
            return judge(seed, options)

    found = []
    for speed in measure(play):
        found.append(speed)
        if given.output == "text":
            print(speed.line(), flush=True)
    if given.output == "json":
        print(json.dumps({speed.load: speed.as_json() for speed in found}, indent=2))
    return 1 if any(speed.totals.failures for speed in found) else 0


if __name__ == "__main__":
    sys.exit(main())
