"""From a failing run to a minimal one that fails in the same way: faults, operations, clients and time are taken away.

Delta debugging (`ddmin`; Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", IEEE TSE 28(2),
2002) over what `Options` can leave out, coarse before fine, since a coarse step saves many fine ones:

1. no faults at all; no nodes that stay in one; fewer workloads, clients, operations, seconds; fewer kinds of faults;
2. single faults (`faults_kept`) and single operations (`ops_kept`), each of which is drawn by itself, so that what
   stays is what it was;
3. again from the start, until a whole round takes nothing away.

A smaller run counts if its first problem is of the same kind (judging.kind_of). The result is 1-minimal in faults and
operations (without any one of them the failure is gone or another) unless the limit of runs or of time was reached, or a
pass was left out, since the run does not heed what to keep, or did not tell its faults.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple, TypeVar

from kvstore.sim.core import NEVER
from kvstore.sim.scenario import Options
from tools.simulation.judging import Verdict

T = TypeVar("T")

RUNS_MAX: Final = 400
SECONDS_MAX: Final = 600.0
SHARES: Final = (0.125, 0.25, 0.5, 0.75)  # of a number, tried in this order
SECONDS_MIN: Final = 0.25


class Shrunk(NamedTuple):
    """`is_minimal`: no limit was reached, and no pass was left out. `runs`: how many were played for it."""

    options: Options
    verdict: Verdict
    runs: int
    is_minimal: bool


def ddmin(items: Sequence[T], fails: Callable[[tuple[T, ...]], bool]) -> tuple[T, ...]:
    """A subset of `items`, in their order, that still fails and of which no single one can be left out.

    Args: fails: of a subset; holds for all of `items`. Asks O(n log n) times when few matter, O(n^2) at worst.
    """
    kept = tuple(items)
    if not kept or fails(()):
        return ()
    parts = 2
    while len(kept) >= 2:
        size = -(-len(kept) // parts)
        chunks = [kept[at : at + size] for at in range(0, len(kept), size)]
        chunk = next((each for each in chunks if fails(each)), None)
        if chunk is not None:
            kept, parts = chunk, 2
            continue
        rests = [kept[: n * size] + kept[n * size + size :] for n in range(len(chunks))]
        rest = next((each for each in rests if fails(each)), None) if len(chunks) > 2 else None
        if rest is not None:
            kept, parts = rest, max(len(chunks) - 1, 2)
        elif size == 1:
            break
        else:
            parts = min(len(kept), 2 * parts)
    return kept


class Shrinker:
    """Args: play: one run with these options. verdict: of the run that failed with `options`. tell: hears of progress."""

    def __init__(
        self,
        play: Callable[[Options], Verdict],
        options: Options,
        verdict: Verdict,
        *,
        runs_max: int = RUNS_MAX,
        seconds_max: float = SECONDS_MAX,
        tell: Callable[[str], None] = lambda _text: None,
    ) -> None:
        assert verdict.problems, "there is nothing to shrink"
        self._play = play
        self._best, self._verdict = options, verdict
        self._kind = verdict.kind
        self._runs, self._runs_max = 0, runs_max
        self._until = time.monotonic() + seconds_max
        self._tell = tell
        self._tried: set[str] = set()
        self._gave_up = False
        self._left_out: set[str] = set()  # fields whose pass was, in the last round

    def shrink(self) -> Shrunk:
        before = None
        while self._best != before and not self._gave_up:
            before = self._best
            self._left_out.clear()
            self._coarse()
            self._faults()
            self._operations()
        is_minimal = not self._gave_up and not self._left_out
        return Shrunk(self._best, self._verdict, self._runs, is_minimal)

    # -- passes

    def _coarse(self) -> None:
        self._try(replace(self._best, faults=False, kinds=(), faults_kept=None, frozen=""))
        if self._verdict.frozen:
            self._try(replace(self._best, frozen=NEVER))
        workloads = self._best.workloads or self._verdict.workloads
        if len(workloads) > 1:
            self._some("workloads", workloads)
        self._lower("clients", 1)
        self._lower("ops", 1)
        self._lower("seconds", SECONDS_MIN)
        kinds = self._best.kinds or tuple(sorted(self._verdict.faults))
        if self._best.faults and self._best.faults_kept is None and len(kinds) > 1:
            self._some("kinds", kinds)

    def _some(self, name: str, names: tuple[str, ...]) -> None:
        """ddmin over names, of which one stays at least: none would mean, as the seed draws them."""
        ddmin(names, lambda some: bool(some) and self._try(self._with(name, some)))

    def _lower(self, name: str, least: float) -> None:
        """Make a number smaller, boldly at first, as long as that works."""
        while True:
            now = getattr(self._best, name)
            whole = isinstance(now, int)
            shares = [int(now * share) if whole else round(now * share, 2) for share in SHARES]
            shares = [*shares, now - 1] if whole else shares
            smaller = sorted({max(least, share) for share in shares})
            if not any(value < now and self._try(self._with(name, value)) for value in smaller):
                return

    def _faults(self) -> None:
        kept = self._best.faults_kept
        numbers = self._verdict.fault_numbers if kept is None else tuple(sorted(kept))
        if self._best.faults and kept is None and not numbers:
            self._leave_out("faults_kept", "the run did not tell its faults")
        elif self._best.faults:
            self._subset("faults_kept", numbers, lambda each: len(each.fault_numbers))

    def _operations(self) -> None:
        kept = self._best.ops_kept
        pairs = (
            sorted(kept)
            if kept is not None
            else [(c, n) for c in range(self._best.clients) for n in range(self._best.ops + 1)]
        )
        self._subset(
            "ops_kept", tuple(pairs), lambda each: each.operations + each.failed + each.unknown
        )

    def _subset(self, name: str, items: tuple[Any, ...], count: Callable[[Verdict], int]) -> None:
        """ddmin over a field that says what to keep; skipped if keeping nothing changes nothing."""
        if getattr(self._best, name) is None and count(self._verdict):
            without = self._with(name, frozenset())
            nothing = self._run(without)
            if nothing is None:
                return
            if count(nothing) >= count(self._verdict):
                self._leave_out(name, f"this scenario does not heed {name}")
                return
            if self._judged(without, nothing):
                return
            if not self._try(self._with(name, frozenset(items))):
                if not self._gave_up:
                    self._leave_out(name, f"{name} with every number is another run")
                return
        ddmin(items, lambda some: self._try(self._with(name, frozenset(some))))

    def _leave_out(self, name: str, why: str) -> None:
        self._left_out.add(name)
        self._tell(f"{why}: that pass is left out")

    # -- runs

    def _with(self, name: str, value: Any) -> Options:
        changes: dict[str, Any] = {name: value}
        return replace(self._best, **changes)

    def _try(self, options: Options) -> bool:
        """Whether it fails in the same way; then it is the best so far."""
        if options == self._best:
            return True
        if _key(options) in self._tried:
            return False  # in vain, or it was the best once, and a smaller one is now
        verdict = self._run(options)
        return verdict is not None and self._judged(options, verdict)

    def _judged(self, options: Options, verdict: Verdict) -> bool:
        """The same, of a run that was played."""
        self._tried.add(_key(options))
        if verdict.kind != self._kind:
            return False
        self._best, self._verdict = options, verdict
        self._tell(f"run {self._runs}: {describe(options, verdict)}")
        return True

    def _run(self, options: Options) -> Verdict | None:
        """None: a limit is reached."""
        if self._runs >= self._runs_max or time.monotonic() > self._until:
            self._gave_up = True
            return None
        self._runs += 1
        return self._play(options)


def describe(options: Options, verdict: Verdict) -> str:
    """A run in a few figures. Operations are those of the clients, and of whoever reads in the end what is left."""
    faults = sum(verdict.faults.values())
    operations = verdict.operations + verdict.failed + verdict.unknown
    workloads = f" ({', '.join(verdict.workloads)})" if verdict.workloads else ""
    return (
        f"{_counted(faults, 'fault')}, {_counted(operations, 'operation')} of {_counted(options.clients, 'client')}"
        f"{workloads}, {options.seconds:g} s of faults"
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _key(options: Options) -> str:
    kept = options.faults_kept
    ops = options.ops_kept
    return repr(
        (
            options.faults,
            options.clients,
            options.ops,
            options.seconds,
            options.kinds,
            options.frozen,
            options.workloads,
            None if kept is None else sorted(kept),
            None if ops is None else sorted(ops),
        )
    )
