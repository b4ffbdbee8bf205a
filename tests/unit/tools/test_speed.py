"""Claims of the measurement of speed: each load has figures of its own, of what was done; a warm-up is not counted."""

from __future__ import annotations

from kvstore.sim.scenario import Options
from tools.simulation.judging import Verdict
from tools.simulation.speed import LOADS, SEEDS, measure


def test_each_load_has_figures_of_its_own_and_the_warm_up_is_not_counted() -> None:
    played: list[tuple[int, Options]] = []

    def play(seed: int, options: Options) -> Verdict:
        played.append((seed, options))
        if options not in LOADS.values():
            return Verdict(seed, [], seconds=1e6, operations=1, cpu_s=1.0)
        fast = options.workloads == ("registers",)
        return Verdict(seed, [], seconds=10.0, operations=200, cpu_s=0.1 if fast else 0.4)

    found = {speed.load: speed for speed in measure(play)}
    assert list(found) == list(LOADS)
    assert [seed for seed, options in played if options == LOADS["drawn"]] == list(SEEDS)
    assert round(found["single keys"].totals.speed) == 100
    assert (
        found["transfers"]
        .line()
        .startswith("transfers:     25.0 simulated seconds per CPU second at 20.0 operations/s")
    )
    assert found["drawn"].as_json()["operations_per_simulated_s"] == 20.0


def test_a_load_is_three_nodes_without_faults_and_twenty_operations_a_second() -> None:
    for load, options in LOADS.items():
        assert (options.nodes, options.faults, options.plant) == (3, False, None)
        if load != "idle":
            assert options.clients * options.ops / options.seconds >= 20.0
