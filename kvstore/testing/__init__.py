"""What users import in their tests: clusters, real and simulated, and what makes rare things happen.

    from kvstore.testing import SimCluster, simulate

    @simulate(seeds=100)
    async def test_transfers_keep_the_sum(cluster: SimCluster, db: kvstore.Database) -> None: ...

`LocalCluster` is real processes on this machine; `simulate` runs a test on many seeds of a simulated cluster under virtual
time, with faults; `inject_retry_errors` makes transactions fail as they may; the pytest plugin `kvorum` is loaded by itself.
How to use them: docs/testing.md. The names are loaded at first use, as those of `kvstore`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from kvstore.sim.loop import SimError, SimTimeout
    from kvstore.sim.process import ProcessDied
    from kvstore.testing.cluster import LocalCluster
    from kvstore.testing.retry import InjectedClient, InjectedDatabase, inject_retry_errors
    from kvstore.testing.simulated_cluster import FAULTS, SimCluster, Worker
    from kvstore.testing.simulation import SimulationFailed, simulate

__all__ = [
    "FAULTS",
    "InjectedClient",
    "InjectedDatabase",
    "LocalCluster",
    "ProcessDied",
    "SimCluster",
    "SimError",
    "SimTimeout",
    "SimulationFailed",
    "Worker",
    "inject_retry_errors",
    "simulate",
]

_HOME: Final = {
    "FAULTS": "kvstore.testing.simulated_cluster",
    "InjectedClient": "kvstore.testing.retry",
    "InjectedDatabase": "kvstore.testing.retry",
    "LocalCluster": "kvstore.testing.cluster",
    "ProcessDied": "kvstore.sim.process",
    "SimCluster": "kvstore.testing.simulated_cluster",
    "SimError": "kvstore.sim.loop",
    "SimTimeout": "kvstore.sim.loop",
    "SimulationFailed": "kvstore.testing.simulation",
    "Worker": "kvstore.testing.simulated_cluster",
    "inject_retry_errors": "kvstore.testing.retry",
    "simulate": "kvstore.testing.simulation",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'kvstore.testing' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
