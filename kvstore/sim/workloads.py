"""The clients of a simulation: who does the operations of its workloads, and what happens when they die.

Each place has one client process at a time, which does one operation after the other; a killed one is followed by a new
one in its place, which goes on with the next operation. What operation `number` of a place is, and when it comes, is
drawn from `seed/place/number` alone: those that are left out (`kept`) change nothing of the others' draws, and the
time that their pauses take passes all the same.
"""

from __future__ import annotations

import asyncio
import random
import traceback
from collections.abc import Mapping, Sequence
from typing import Final

from kvstore.client import Database
from kvstore.sim.cluster import Client, SimCluster
from kvstore.sim.process import outside
from kvstore.testing.history import History
from kvstore.testing.workloads import WORKLOADS, Counts, Workload
from kvstore.testing.workloads.base import Operation

PLACES: Final = (b"b/", b"k/", b"s/")  # in every range that SPLITS make
WORKLOADS_MAX: Final = 4  # of one seed
WEIGHTS: Final[Mapping[str, int]] = {  # how often a seed has one
    "registers": 4,
    "mixed": 4,
    "bank": 3,
    "list-append": 3,
    "rw-register": 2,
    "ring": 2,
    "counter": 2,
    "skew": 2,
    "sets": 2,
    "exactly-once": 2,
    "queue": 2,
    "watches": 2,
    "locked": 2,
    "sessions": 1,
    "long-fork": 1,
    "causal-reverse": 1,
    "monotonic": 1,
}


def draw_workloads(rng: random.Random, clock: History, names: Sequence[str] = ()) -> list[Workload]:
    """As a seed draws them, or those with these names; each with a history of its own. Raises: KeyError."""
    count = rng.randint(1, WORKLOADS_MAX)
    left = dict(WEIGHTS)
    drawn: list[str] = []
    for _ in range(count):
        name = rng.choices(list(left), list(left.values()))[0]
        del left[name]
        drawn.append(name)
    bits = rng.getrandbits(64)
    return [
        WORKLOADS[name](random.Random(f"{bits}/{name}"), PLACES, history=History(clock))
        for name in names or drawn
    ]


class Clients:
    """Args: ops: of each client. kept: (place, number) of the operations that are done; None: all."""

    def __init__(
        self,
        cluster: SimCluster,
        workloads: Sequence[Workload],
        *,
        clients: int,
        ops: int,
        pause_s: float,
        timeout_s: float,
        kept: frozenset[tuple[int, int]] | None = None,
    ) -> None:
        self.workloads = list(workloads)
        self._cluster = cluster
        self._ops, self._pause_s, self._timeout_s, self._kept = ops, pause_s, timeout_s, kept
        self._next = [0] * clients  # number of the next operation, by place
        self._clients: list[Client | None] = [None] * clients
        self._tasks: list[asyncio.Task[None] | None] = [None] * clients
        self._starting: list[asyncio.Task[None]] = []
        for workload in self.workloads:
            workload.on_end = self._ended

    @property
    def counts(self) -> Counts:
        """Of all workloads together."""
        total = Counts()
        for workload in self.workloads:
            total.ok += workload.counts.ok
            total.failed += workload.counts.failed
            total.unknown += workload.counts.unknown
        return total

    async def prepare(self) -> None:
        """Before anything goes wrong."""
        client = await self._cluster.client("setup")
        for workload in self.workloads:
            await client.process.call(workload.prepare(client.database))

    def begin(self) -> None:
        for place in range(len(self._next)):
            self._launch(place)

    async def finish(self, database: Database) -> None:
        """In peace, within the process of that client. Raises KVError."""
        for workload in self.workloads:
            await workload.finish(database)

    def _launch(self, place: int) -> None:
        async def launched() -> None:
            client = await self._cluster.client(f"c{place + 1}", self._timeout_s)
            self._clients[place] = client
            self._tasks[place] = client.process.spawn(self._work(place, client))

        self._starting.append(asyncio.get_running_loop().create_task(launched()))

    async def _work(self, place: int, client: Client) -> None:
        while self._next[place] < self._ops:
            number = self._next[place]
            self._next[place] += 1
            rng = random.Random(f"{self._cluster.seed}/{place}/{number}")
            await asyncio.sleep(rng.expovariate(1 / self._pause_s))
            workload = rng.choice(self.workloads)
            if self._kept is not None and (place, number) not in self._kept:
                continue
            try:
                await workload.step(client.database, client.name, rng)
            except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
                where = "".join(traceback.format_exception(error))
                text = f"{client.name} fails in {workload.name}: {error!r}\n{where}"
                outside(self._cluster.problem, text)

    def victims(self) -> list[str]:
        return [client.name for client in self._clients if client is not None and not client.dead]

    def crashed(self, name: str) -> None:
        """Its operation under way stays unknown; somebody else goes on in its place."""
        for place, client in enumerate(self._clients):
            if client is not None and client.name == name:
                self._clients[place] = self._tasks[place] = None
                if self._next[place] < self._ops:
                    self._launch(place)

    @property
    def finished(self) -> bool:
        return all(self._finished(place) for place in range(len(self._next)))

    def _finished(self, place: int) -> bool:
        task = self._tasks[place]
        return self._next[place] >= self._ops and (task is None or task.done())

    def _ended(self, op: Operation, told: str) -> None:
        self._cluster.trace.note("op", op.client, told, op.outcome.value, op.version)
