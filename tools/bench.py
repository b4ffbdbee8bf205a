"""How fast it is here: three nodes as processes on this machine, fsync on, and one client process.

    python -m tools.bench [--seconds 5] [--value-bytes 100] [--nodes 3] [--ranges 8] [--rows put1,put64,...] [-o json]

Each row is one workload for a few seconds, after a short warm-up. Timings on a shared machine are noisy: compare rows of
one run as ratios, never two runs as figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, NamedTuple

from rich.console import Console
from rich.table import Table

import kvstore
from kvstore.adapters.loop import new_event_loop
from kvstore.client import Database, Transaction
from kvstore.errors import Conflict, KVError
from kvstore.testing.cluster import LocalCluster

KEYS = 100_000
HOT = b"03/hot"
WARM_UP_S = 0.5

Call = Callable[[int, int], Awaitable[None]]  # (caller, turn)


class Row(NamedTuple):
    """One line of the table. Latencies in milliseconds; `least`: calls of the caller that came to fewest; `target` is what
    the project wants of this row.
    """

    name: str
    callers: int
    per_second: float
    p50_ms: float
    p99_ms: float
    least: int
    errors: int
    target: str


def key_of(number: int, ranges: int) -> bytes:
    """Keys spread evenly over the ranges: one digit of range, then the number."""
    return b"%02d/%08d" % (number % ranges, number)


async def measure(name: str, callers: int, seconds: float, call: Call, target: str) -> Row:
    """`callers` tasks that each wait for one call before the next."""
    latencies: list[float] = []
    counts = [0] * callers
    errors = 0
    begin_s = time.perf_counter() + WARM_UP_S
    end_s = begin_s + seconds
    clock = time.perf_counter

    async def caller(number: int) -> None:
        nonlocal errors
        turn = 0
        while (began := clock()) < end_s:
            turn += 1
            try:
                await call(number, turn)
            except KVError:
                errors += 1
                continue
            now = clock()
            if began >= begin_s and now <= end_s:
                latencies.append(now - began)
                counts[number] += 1

    await asyncio.gather(*[caller(number) for number in range(callers)])
    latencies.sort()
    count = len(latencies)
    p50, p99 = (latencies[int(count * share)] * 1e3 if count else 0.0 for share in (0.5, 0.99))
    return Row(name, callers, count / seconds, p50, p99, min(counts), errors, target)


class Workloads:
    def __init__(self, db: Database, ranges: int, value_bytes: int) -> None:
        self._db, self._ranges = db, ranges
        self._value = bytes(random.Random(1).randbytes(value_bytes))
        self._random = random.Random(2)

    async def put(self, caller: int, turn: int) -> None:
        number = (turn * 7919 + caller * 104_729) % KEYS
        await self._db.put(key_of(number, self._ranges), self._value)

    async def get(self, caller: int, turn: int) -> None:
        number = (turn * 7919 + caller * 104_729) % KEYS
        await self._db.get(key_of(number, self._ranges))

    async def stale_get(self, caller: int, turn: int) -> None:
        """At any replica, up to 3 s old."""
        number = (turn * 7919 + caller * 104_729) % KEYS
        await self._db.get(key_of(number, self._ranges), max_staleness=3.0)

    async def read_only(self, _caller: int, _turn: int) -> None:
        """Two keys of two ranges, in a transaction that writes nothing."""
        first = self._random.randrange(KEYS)
        second = (first + 1 + self._random.randrange(self._ranges - 1)) % KEYS
        one, two = key_of(first, self._ranges), key_of(second, self._ranges)
        async with self._db.transaction(read_only=True) as tx:
            await asyncio.gather(tx.get(one), tx.get(two))

    async def transfer(self, _caller: int, _turn: int) -> None:
        """Two reads and two writes over two ranges; a conflict is tried again, as part of the call."""
        first = self._random.randrange(KEYS)
        second = (first + 1 + self._random.randrange(self._ranges - 1)) % KEYS
        one, two = key_of(first, self._ranges), key_of(second, self._ranges)
        while True:
            try:
                async with self._db.transaction() as tx:
                    await asyncio.gather(tx.get(one), tx.get(two))
                    tx.put(one, self._value)
                    tx.put(two, self._value)
                return
            except Conflict:
                continue

    async def look_around(self, _caller: int, _turn: int) -> None:
        """Reads in two ranges and a write in a third; a conflict is tried again, as part of the call."""
        first, ranges = self._random.randrange(KEYS), self._ranges
        one, two, three = (key_of((first + step) % KEYS, ranges) for step in range(3))
        while True:
            try:
                async with self._db.transaction() as tx:
                    await asyncio.gather(tx.get(one), tx.get(two))
                    tx.put(three, self._value)
                return
            except Conflict:
                continue

    async def hot(self, _caller: int, _turn: int) -> None:
        """Read one counter and write it, in a transaction that is tried again: what everybody wants at once."""

        async def body(tx: Transaction) -> None:
            tx.put(HOT, b"%d" % (int(await tx.get(HOT) or 0) + 1))

        await self._db.run(body)

    async def hot_locked(self, _caller: int, _turn: int) -> None:
        """The same with a lock on the counter."""

        async def body(tx: Transaction) -> None:
            tx.put(HOT, b"%d" % (int(await tx.get_for_update(HOT) or 0) + 1))

        await self._db.run(body)

    async def load(self) -> None:
        """Every key once, so that gets find something and puts overwrite."""

        async def part(offset: int) -> None:
            for number in range(offset, KEYS, 256):
                await self._db.put(key_of(number, self._ranges), self._value)

        await asyncio.gather(*[part(offset) for offset in range(256)])


PLAN: Final[
    tuple[tuple[str, str, int, Callable[[Workloads, int, int], Awaitable[None]], str], ...]
] = (
    ("put1", "put, sequential", 1, Workloads.put, "p50 <= 2 ms"),
    ("put64", "put", 64, Workloads.put, ">= 8,000/s"),
    ("put512", "put", 512, Workloads.put, ">= 25,000/s"),
    ("get1", "get, sequential", 1, Workloads.get, ""),
    ("get64", "get, linearizable", 64, Workloads.get, ">= 10,000/s"),
    ("get512", "get, linearizable", 512, Workloads.get, ""),
    ("stale1", "get, max_staleness 3 s, sequential", 1, Workloads.stale_get, ""),
    ("stale64", "get, max_staleness 3 s", 64, Workloads.stale_get, ""),
    ("ro64", "read-only transaction, 2 ranges", 64, Workloads.read_only, ""),
    ("txn1", "transfer, 2 ranges, sequential", 1, Workloads.transfer, ""),
    ("txn64", "transfer, 2 ranges", 64, Workloads.transfer, ">= 2,000/s"),
    ("look64", "reads in 2 ranges, a write in a third", 64, Workloads.look_around, ""),
    ("hot1", "one counter, read and written", 1, Workloads.hot, ""),
    ("hotlock1", "one counter, locked", 1, Workloads.hot_locked, ""),
    ("hot64", "one counter, contended", 64, Workloads.hot, ""),
    ("hotlock64", "one counter, contended, locked", 64, Workloads.hot_locked, ">= hot1 / 2"),
)


async def spread(db: Database, nodes: int) -> None:
    """Wait (bounded) until the leaders are spread over the nodes: what a cluster looks like a few seconds after its start."""
    for _ in range(40):
        reply = await db.router.refresh(db.router.monotonic() + 5)
        leaders = {info.leader_node for info in reply.ranges}
        if len(leaders) >= nodes and 0 not in leaders:
            return
        await asyncio.sleep(0.25)


async def run(arguments: argparse.Namespace, console: Console) -> list[Row]:
    splits = [b"%02d" % number for number in range(1, arguments.ranges)]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=arguments.dir) as directory:
        async with (
            LocalCluster(nodes=arguments.nodes, directory=directory, splits=splits) as cluster,
            kvstore.connect(cluster.endpoints, timeout=30.0) as db,
        ):
            loads = Workloads(db, arguments.ranges, arguments.value_bytes)
            await spread(db, arguments.nodes)
            console.print(f"loading {KEYS} rows ...", style="dim")
            await loads.load()
            for short, name, callers, call, target in PLAN:
                if short in arguments.rows:
                    rows.append(
                        await measure(
                            name, callers, arguments.seconds, partial(call, loads), target
                        )
                    )
                    console.print(
                        f"{name}, {callers} callers: {rows[-1].per_second:,.0f}/s", style="dim"
                    )
    return rows


def show(rows: list[Row], console: Console) -> None:
    table = Table(title="Kvorum, three nodes and a client on this machine")
    for column in (
        "workload",
        "callers",
        "per second",
        "p50 ms",
        "p99 ms",
        "least",
        "errors",
        "target",
    ):
        table.add_column(column, justify="left" if column in ("workload", "target") else "right")
    for row in rows:
        table.add_row(
            row.name,
            str(row.callers),
            f"{row.per_second:,.0f}",
            f"{row.p50_ms:.2f}",
            f"{row.p99_ms:.2f}",
            str(row.least),
            str(row.errors),
            row.target,
        )
    console.print(table)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="of each row")
    parser.add_argument("--value-bytes", type=int, default=100)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--ranges", type=int, default=8)
    parser.add_argument("--rows", default="", help="some of the rows, by their short names")
    parser.add_argument(
        "--dir", default=None, help="where the data goes; default: the temporary directory"
    )
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    given = parser.parse_args(argv)
    names = [each[0] for each in PLAN]
    given.rows = given.rows.split(",") if given.rows else names
    if unknown := [name for name in given.rows if name not in names]:
        parser.error(f"no row {unknown[0]!r}; there are {', '.join(names)}")
    return given


def main(argv: list[str] | None = None) -> int:
    arguments = parse(sys.argv[1:] if argv is None else argv)
    console = Console(stderr=arguments.output == "json")
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        rows = runner.run(run(arguments, console))
    if arguments.output == "json":
        result: list[dict[str, Any]] = [row._asdict() for row in rows]
        print(json.dumps(result, indent=2))
    else:
        show(rows, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
