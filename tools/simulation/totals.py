"""What many seeds came to, and how far they have come: figures for people and for programs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TextIO

from kvstore.sim.points import never_reached
from tools.simulation.judging import Verdict

LINE_S: Final = 15.0  # between two lines of progress where there is no terminal
FAILED_MAX: Final = 1_000  # seeds whose numbers are kept
HOUR_S: Final = 3600.0
OUTCOMES: Final = ("ok", "failed", "unknown")


@dataclass
class Totals:
    """Args: expected: probes that should be reached. Those that a run reports with 0 are expected, too."""

    expected: Iterable[str] = ()
    seeds: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0
    elapsed_s: float = 0.0
    operations: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    faults: dict[str, int] = field(default_factory=dict)
    in_vain: dict[str, int] = field(default_factory=dict)
    frozen: dict[str, int] = field(
        default_factory=dict
    )  # seeds in which a core had to go on, by the others' fault
    probes: dict[str, int] = field(default_factory=dict)
    failures: int = 0
    failed: list[int] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.probes = dict.fromkeys(self.expected, 0)

    def add(self, verdict: Verdict) -> None:
        self.seeds += 1
        self.seconds += verdict.seconds
        self.cpu_s += verdict.cpu_s
        for outcome, count in zip(
            OUTCOMES, (verdict.operations, verdict.failed, verdict.unknown), strict=True
        ):
            self.operations[outcome] += count
        _add(self.faults, verdict.faults)
        _add(self.in_vain, verdict.in_vain)
        _add(self.frozen, {verdict.frozen: 1} if verdict.frozen else {})
        _add(self.probes, verdict.probes)
        if verdict.problems:
            self.failures += 1
            _add(self.kinds, {verdict.kind: 1})
            if len(self.failed) < FAILED_MAX:
                self.failed.append(verdict.seed)

    def missed(self) -> list[str]:
        """Probes that should have been reached and never were: by so many seeds of the default size, too."""
        told = [name for name, count in self.probes.items() if not count]
        return sorted(dict.fromkeys((*told, *never_reached(self.probes, seeds=self.seeds))))

    @property
    def speed(self) -> float:
        """Simulated seconds for each second of one core."""
        return self.seconds / self.cpu_s if self.cpu_s else 0.0

    def lines(self) -> list[str]:
        """For people."""
        real = self.seconds / self.elapsed_s if self.elapsed_s else 0.0
        speed = (
            f"{real:.0f} simulated seconds per real one, {self.speed:.0f} per second of one core"
        )
        lines = [
            f"{self.seeds} seeds, {self.failures} failed, in {self.elapsed_s:.0f} s",
            f"{self.seconds / HOUR_S:.2f} simulated hours: {speed}",
            f"operations: {_listed(self.operations)}",
            f"faults: {faults_told(dict(sorted(self.faults.items())), self.in_vain)}",
            f"frozen while the others went on: {_listed(self.frozen, in_order=True)}",
        ]
        if self.probes:
            reached = {name: count for name, count in self.probes.items() if count}
            lines.append(f"probes reached: {_listed(reached, in_order=True)}")
            lines.append(f"probes never reached: {', '.join(self.missed()) or 'none'}")
        if self.failures:
            lines.append(f"kinds of failures: {_listed(self.kinds, in_order=True)}")
            more = " ..." if self.failures > len(self.failed) else ""
            lines.append(f"failed seeds: {' '.join(map(str, sorted(self.failed)))}{more}")
        return lines

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "seeds": self.seeds,
            "failures": self.failures,
            "failed_seeds": sorted(self.failed),
            "kinds_of_failures": self.kinds,
            "simulated_hours": self.seconds / HOUR_S,
            "elapsed_s": self.elapsed_s,
            "simulated_s_per_cpu_s": self.speed,
            "operations": self.operations,
            "faults": dict(sorted(self.faults.items())),
            "faults_went_off": went_off(dict(sorted(self.faults.items())), self.in_vain),
            "frozen": dict(sorted(self.frozen.items())),
            "probes": dict(sorted(self.probes.items())),
            "probes_missed": self.missed(),
        }


class Progress:
    """One line that is written over on a terminal; elsewhere a line every LINE_S, as logs want it."""

    def __init__(self, stream: TextIO, seeds: int) -> None:
        self._stream = stream
        self._seeds = seeds
        self._is_terminal = stream.isatty()
        self._began_at = self._shown_at = time.monotonic()
        self._width = 0

    def elapsed_s(self) -> float:
        return time.monotonic() - self._began_at

    def show(self, totals: Totals) -> None:
        now = time.monotonic()
        if not self._is_terminal and now - self._shown_at < LINE_S:
            return
        self._shown_at = now
        elapsed_s = now - self._began_at
        left_s = elapsed_s / totals.seeds * (self._seeds - totals.seeds) if totals.seeds else 0.0
        text = (
            f"{totals.seeds} of {self._seeds} seeds, {totals.failures} failed, "
            f"{totals.seconds / HOUR_S:.2f} simulated hours, {elapsed_s:.0f} s, about {left_s:.0f} s left"
        )
        if self._is_terminal:
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def clear(self) -> None:
        """Before something else is printed."""
        if self._is_terminal and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
            self._width = 0


def went_off(faults: Mapping[str, int], in_vain: Mapping[str, int]) -> dict[str, int]:
    """How many of each kind have really happened, of kinds of which some have not."""
    return {name: count - in_vain[name] for name, count in faults.items() if in_vain.get(name)}


def faults_told(faults: Mapping[str, int], in_vain: Mapping[str, int]) -> str:
    """How many were begun, and of which kinds fewer went off."""
    fewer = went_off(faults, in_vain)
    told = (
        f"{name} {count} ({fewer[name]} went off)" if name in fewer else f"{name} {count}"
        for name, count in faults.items()
    )
    return ", ".join(told) or "none"


def _add(sums: dict[str, int], more: dict[str, int]) -> None:
    for name, count in more.items():
        sums[name] = sums.get(name, 0) + count


def _listed(counts: dict[str, int], *, in_order: bool = False) -> str:
    pairs = sorted(counts.items()) if in_order else counts.items()
    return ", ".join(f"{name} {count}" for name, count in pairs) or "none"
