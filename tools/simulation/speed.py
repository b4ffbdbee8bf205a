"""How fast the simulator is: simulated seconds for each second of one core, by what the clients do.

Three nodes, no faults, all checks on, 20 operations/s: single keys, transfers over two ranges, and what seeds draw. CPU
time counts, not the clock on the wall; the checkers at a run's end count too. A first short run is not counted, for it
imports and warms up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from kvstore.sim.scenario import Options
from tools.simulation.judging import Verdict
from tools.simulation.totals import Totals

SEEDS: Final = range(1, 6)
CALM: Final = {"seconds": 25.0, "clients": 8, "ops": 72, "faults": False}
LOADS: Final[dict[str, Options]] = {
    "idle": Options(seconds=25.0, clients=1, ops=50, faults=False, ops_kept=frozenset()),
    "single keys": Options(workloads=("registers",), **CALM),  # type: ignore[arg-type]
    "transfers": Options(workloads=("bank",), **CALM),  # type: ignore[arg-type]
    "drawn": Options(**CALM),  # type: ignore[arg-type]
}
WARM_UP: Final = Options(seconds=1.0, clients=1, ops=4, faults=False)


class Speed(NamedTuple):
    """Of one load. `rate`: operations that were really done in a simulated second."""

    load: str
    totals: Totals

    @property
    def rate(self) -> float:
        return sum(self.totals.operations.values()) / self.totals.seconds

    def line(self) -> str:
        totals = self.totals
        return (
            f"{self.load + ':':<13}{totals.speed:6.1f} simulated seconds per CPU second at {self.rate:4.1f} operations/s "
            f"({totals.seconds:.0f} simulated s, {totals.cpu_s:.1f} CPU s, {totals.failures} of {totals.seeds} seeds failed)"
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "simulated_s_per_cpu_s": self.totals.speed,
            "operations_per_simulated_s": self.rate,
            "simulated_s": self.totals.seconds,
            "cpu_s": self.totals.cpu_s,
            "failures": self.totals.failures,
        }


def measure(play: Callable[[int, Options], Verdict]) -> Iterator[Speed]:
    """One figure for each load, as it is known."""
    play(1, WARM_UP)
    for load, options in LOADS.items():
        totals = Totals()
        for seed in SEEDS:
            totals.add(play(seed, options))
        yield Speed(load, totals)
