"""Workloads against real processes that are killed with SIGKILL and started again; then each checks itself.

    python -m tools.workload bank ring --seconds 30 --kill-every 5 --nodes 3 [--clients 16] [--history FILE]

Exit status 0 only if every workload did something, every check found nothing and no transaction is undecided on any node.
What may be named: python -m tools.workload --list. With --history, what clients saw goes to FILE as JSON lines, or EDN if
it is called .edn (of several workloads: FILE with the workload's name before its suffix; of counter, sets and exactly-once
nothing, which only they themselves can judge).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

import kvstore
from kvstore.adapters.loop import new_event_loop
from kvstore.client import Database
from kvstore.errors import KVError
from kvstore.testing.cluster import LocalCluster
from kvstore.testing.workloads import WORKLOADS, Workload, places_of
from tools.histories import write_histories

SPLITS: Final = (b"d", b"h", b"l", b"p", b"t")
DOWN_S: Final = 1.5
SETTLE_S: Final = 15.0
CLIENTS: Final = 16
OPS_MAX: Final = 20_000  # of all clients together: a check of more takes long
OPS_OF_A_SCALE: Final = 400  # what one set of keys is made for
PAUSE_S: Final = 0.02
TIMEOUT_S: Final = (
    2.0  # of an operation: shorter than a node is away at times, so that outcomes stay unknown
)
PEACE_TIMEOUT_S: Final = 20.0
FINISH_S_MAX: Final = 300.0

Say = Callable[[str], None]


def make(names: Sequence[str], seed: int, scale: int) -> list[Workload]:
    """Each with a history of its own. Raises: KeyError."""
    return [
        WORKLOADS[name](random.Random(f"{seed}/{name}"), places_of(SPLITS), scale=scale)
        for name in names
    ]


class Run:
    """Some workloads on one running cluster, for so many seconds from now."""

    def __init__(
        self, cluster: LocalCluster, workloads: Sequence[Workload], seed: int, say: Say
    ) -> None:
        self.cluster, self.workloads, self.seed, self.say = cluster, workloads, seed, say
        self.kills = 0
        self._ops = 0
        self._until = 0.0

    def _connected(self, timeout_s: float) -> AbstractAsyncContextManager[Database]:
        return kvstore.connect(self.cluster.endpoints, timeout=timeout_s)

    async def play(
        self, seconds: float, kill_every_s: float, clients: int, *, pause_s: float = PAUSE_S
    ) -> None:
        """Clients and kills, until the last of them has ended."""
        async with self._connected(PEACE_TIMEOUT_S) as db:
            for workload in self.workloads:
                await workload.prepare(db)
        self._until = time.monotonic() + seconds
        working = [self._client(place, pause_s) for place in range(clients)]
        await asyncio.gather(self._killer(kill_every_s), *working)

    async def _client(self, place: int, pause_s: float) -> None:
        """With connections of its own."""
        number = 0
        async with self._connected(TIMEOUT_S) as db:
            while time.monotonic() < self._until and self._ops < OPS_MAX:
                self._ops += 1
                rng = random.Random(f"{self.seed}/{place}/{number}")
                number += 1
                await asyncio.sleep(rng.expovariate(1 / pause_s))
                await rng.choice(self.workloads).step(db, f"c{place}", rng)

    async def _killer(self, every_s: float) -> None:
        rng = random.Random(self.seed)
        while every_s and time.monotonic() + every_s + DOWN_S < self._until:
            await asyncio.sleep(max(0.1, every_s - DOWN_S))
            victim = rng.randrange(len(self.cluster.nodes))
            self.say(f"SIGKILL node {victim + 1}; {self._ops:,} operations so far")
            self.cluster.kill(victim)
            self.kills += 1
            await asyncio.sleep(DOWN_S)
            await self.cluster.restart_async(victim)

    async def finish(self) -> dict[str, list[str]]:
        """What is wrong, by workload, and under `cluster` what is undecided."""
        idle = [
            each.name for each in self.workloads if not each.counts.ok
        ]  # before it reads the end
        found: dict[str, list[str]] = {}
        async with self._connected(PEACE_TIMEOUT_S) as db:
            for workload in self.workloads:
                try:
                    await asyncio.wait_for(workload.finish(db), FINISH_S_MAX)
                except (KVError, TimeoutError) as error:
                    found[workload.name] = [f"Unreadable: {workload.name}: in peace, {error!r}"]
                else:
                    found[workload.name] = await asyncio.to_thread(workload.check)
        for name in idle:
            found[name].append(f"Idle: {name}: none of its operations was done")
        left = await undecided(self.cluster)
        found["cluster"] = [f"Undecided: {left} things are still undecided"] if left else []
        return found


async def undecided(cluster: LocalCluster) -> int:
    """Prepared parts, staged records and outbox rows, over all nodes, once the timers had their time."""
    until = time.monotonic() + SETTLE_S
    while True:
        left = 0
        for number in range(len(cluster.nodes)):
            figures = (await cluster.status_async(number))["transactions"]
            left += sum(figures.values())
        if not left or time.monotonic() > until:
            return left
        await asyncio.sleep(0.25)


async def run(arguments: argparse.Namespace, say: Say) -> tuple[list[Workload], dict[str, Any]]:
    expected = arguments.seconds * min(arguments.clients / PAUSE_S, 600)
    scale = max(1, round(min(OPS_MAX, expected) / OPS_OF_A_SCALE / len(arguments.names)))
    workloads = make(arguments.names, arguments.seed, scale)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as directory:
        async with LocalCluster(
            nodes=arguments.nodes, directory=directory, splits=SPLITS
        ) as cluster:
            playing = Run(cluster, workloads, arguments.seed, say)
            # a long run is a slow one: the operations are to last until its end
            pause_s = max(PAUSE_S, arguments.seconds * arguments.clients / OPS_MAX)
            await playing.play(
                arguments.seconds, arguments.kill_every, arguments.clients, pause_s=pause_s
            )
            problems = await playing.finish()
    return workloads, {
        "seconds": arguments.seconds,
        "seed": arguments.seed,
        "kills": playing.kills,
        "workloads": {
            each.name: {
                "ok": each.counts.ok,
                "failed": each.counts.failed,
                "unknown": each.counts.unknown,
                "problems": problems[each.name],
            }
            for each in workloads
        },
        "broken": [problem for some in problems.values() for problem in some],
    }


def table(result: dict[str, Any]) -> Table:
    shown = Table("workload", "done", "failed", "unknown", "per second", "problems")
    for name, figures in result["workloads"].items():
        rate = f"{figures['ok'] / result['seconds']:.0f}"
        counts = [str(figures[each]) for each in ("ok", "failed", "unknown")]
        shown.add_row(name, *counts, rate, str(len(figures["problems"]) or "none"))
    return shown


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.workload", description=__doc__.splitlines()[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; default: all")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--kill-every", type=float, default=5.0, help="seconds; 0: never")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--seed", type=int, default=1, help="of operations and victims")
    parser.add_argument("--history", type=Path, default=None, help="where what clients saw goes")
    parser.add_argument("--dir", default=None, help="where the data goes, below a directory there")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    arguments = parser.parse_args(argv)
    if arguments.list:
        print("\n".join(WORKLOADS))
        return 0
    arguments.names = list(dict.fromkeys(arguments.names)) or list(WORKLOADS)
    unknown = [name for name in arguments.names if name not in WORKLOADS]
    if unknown:
        parser.error(f"no workload {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    if arguments.history is not None and not arguments.history.parent.is_dir():
        parser.error(f"no directory for {arguments.history}")
    console = Console(stderr=arguments.output == "json")
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        workloads, result = runner.run(
            run(arguments, lambda text: console.print(text, style="dim"))
        )
    if arguments.history is not None:
        write_histories(workloads, arguments.history)
    if arguments.output == "json":
        print(json.dumps(result, indent=2))
    else:
        console.print(table(result))
    for problem in result["broken"]:
        console.print(problem, markup=False)
    console.print("everything held" if not result["broken"] else "BROKEN")
    return 1 if result["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
