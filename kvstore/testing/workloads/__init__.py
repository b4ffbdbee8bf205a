"""Workloads that check themselves, for simulated clusters and real ones alike. `WORKLOADS` has them by name.

workload = WORKLOADS["bank"](random.Random(1), places_of(splits))
await workload.prepare(db)
...                                       # while things go wrong, as many clients as you like:
await workload.step(db, "client 1", rng)  # one operation; never raises for what the cluster does
...
await workload.finish(db)                 # in peace
assert workload.check() == []
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from kvstore.testing.workloads.bank import Bank
from kvstore.testing.workloads.base import Counts, Workload, places_of
from kvstore.testing.workloads.causal_reverse import CausalReverse
from kvstore.testing.workloads.counter import Counter
from kvstore.testing.workloads.exactly_once import ExactlyOnce
from kvstore.testing.workloads.locked import Locked
from kvstore.testing.workloads.long_fork import LongFork
from kvstore.testing.workloads.micro import ListAppend, RwRegister
from kvstore.testing.workloads.mixed import Mixed
from kvstore.testing.workloads.monotonic import Monotonic
from kvstore.testing.workloads.queue import Queue
from kvstore.testing.workloads.registers import Registers
from kvstore.testing.workloads.ring import Ring
from kvstore.testing.workloads.sessions import Sessions
from kvstore.testing.workloads.sets import Sets
from kvstore.testing.workloads.skew import Skew
from kvstore.testing.workloads.watches import Watching

__all__ = ["WORKLOADS", "Counts", "Workload", "places_of"]

WORKLOADS: Final[Mapping[str, type[Workload]]] = {
    each.name: each
    for each in (
        Registers,
        Mixed,
        Bank,
        Ring,
        Counter,
        ListAppend,
        RwRegister,
        LongFork,
        CausalReverse,
        Monotonic,
        Skew,
        Sets,
        ExactlyOnce,
        Queue,
        Sessions,
        Watching,
        Locked,
    )
}
