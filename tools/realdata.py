"""Real data through the whole product: every assigned character of Unicode, while nodes die.

    python -m tools.realdata [--rows N] [--dir DIR] [-o json]

Loads the character database that Python carries (name, category, numeric value of each code point that is not Cn, Co or
Cs) into three nodes and eight ranges. Half way the node that leads most ranges is killed with SIGKILL and started again;
after the load all three are killed and started again; then every row is compared, and the count, by one scan at one
version. Exit status 0 only if all is there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
import unicodedata
from collections.abc import Iterator
from typing import Any, Final

from rich.console import Console
from rich.progress import Progress

import kvstore
from kvstore.adapters.loop import new_event_loop
from kvstore.client import Database
from kvstore.errors import KVError
from kvstore.testing.cluster import LocalCluster

RANGES: Final = 8
BATCH_ROWS: Final = 200
LOADERS: Final = 16
UNASSIGNED: Final = ("Cn", "Co", "Cs")
PROBE_S: Final = 0.02


def rows() -> Iterator[tuple[bytes, bytes]]:
    """(key, value): the code point in six hex digits; its category, numeric value and name."""
    for point in range(sys.maxunicode + 1):
        character = chr(point)
        category = unicodedata.category(character)
        if category in UNASSIGNED:
            continue
        number = unicodedata.numeric(character, None)
        name = unicodedata.name(character, "")
        value = f"{category};{'' if number is None else number};{name}"
        yield b"unicode/%06X" % point, value.encode()


def splits_of(keys: list[bytes]) -> list[bytes]:
    """Seven keys that cut the rows into eight ranges of equal size."""
    return [keys[len(keys) * part // RANGES] for part in range(1, RANGES)]


def probes_of(keys: list[bytes]) -> list[bytes]:
    """A key in each of the eight ranges that is none of the rows'."""
    return [start + b"/probe" for start in [keys[0], *splits_of(keys)]]


class Loader:
    def __init__(self, db: Database, data: list[tuple[bytes, bytes]]) -> None:
        self._db, self._data = db, data
        self._next = 0
        self.loaded = 0
        self.retries = 0
        self.half = asyncio.Event()

    async def run(self, progress: Progress) -> None:
        task = progress.add_task("loading", total=len(self._data))

        async def work() -> None:
            while self._next < len(self._data):
                part = self._data[self._next : self._next + BATCH_ROWS]
                self._next += BATCH_ROWS
                await self._put(part)
                self.loaded += len(part)
                if 2 * self.loaded >= len(self._data):
                    self.half.set()
                progress.update(task, completed=self.loaded)

        await asyncio.gather(*[work() for _ in range(LOADERS)])

    async def _put(self, part: list[tuple[bytes, bytes]]) -> None:
        """Until it is in: writing the same rows again changes nothing."""
        while True:
            try:
                async with self._db.batch() as batch:
                    for key, value in part:
                        batch.put(key, value)
                return
            except KVError:
                self.retries += 1
                await asyncio.sleep(0.05)


class Outage:
    """How long single writes to some range were not answered, measured from outside: calls that fail make one outage.

    `keys`: one in each range, so that it is seen whichever ranges a dead node led.
    """

    def __init__(self, db: Database, keys: list[bytes]) -> None:
        self._db, self._keys = db, keys
        self.longest_s = 0.0
        self.running = True

    async def run(self) -> None:
        await asyncio.gather(*[self._probe(key) for key in self._keys])

    async def _probe(self, key: bytes) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        while self.running:
            failed = False
            try:
                await self._db.put(key, b"x")
            except KVError:
                failed = True
            self.longest_s = max(self.longest_s, loop.time() - began)
            if not failed:
                await asyncio.sleep(PROBE_S)
                began = loop.time()


async def crash_one(cluster: LocalCluster, loader: Loader, say: Any) -> None:
    """When half is loaded: kill the busiest node, start it again."""
    await loader.half.wait()
    victim = await cluster.busiest_async()
    say(f"half is loaded: SIGKILL to node {victim + 1}, which leads the most ranges")
    cluster.kill(victim)
    await asyncio.sleep(2.0)
    await cluster.restart_async(victim)
    say(f"node {victim + 1} is back")


async def verify(
    db: Database, data: list[tuple[bytes, bytes]], progress: Progress
) -> tuple[int, int]:
    """(rows found, rows that differ), by one scan at one version."""
    task = progress.add_task("verifying", total=len(data))
    wanted = dict(data)
    found = wrong = 0
    async for key, value in db.scan(prefix=b"unicode/"):
        found += 1
        if wanted.pop(key, None) != value:
            wrong += 1
        if found % 1_000 == 0:
            progress.update(task, completed=found)
    progress.update(task, completed=found)
    return found, wrong + len(wanted)


async def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    data = list(rows())[: arguments.rows]
    keys = [key for key, _ in data]
    result: dict[str, Any] = {"rows": len(data)}
    say = console.print
    with tempfile.TemporaryDirectory(dir=arguments.dir) as directory:
        cluster = LocalCluster(nodes=3, directory=directory, splits=splits_of(keys))
        async with cluster:
            with Progress(console=console, transient=True) as progress:
                async with kvstore.connect(cluster.endpoints, timeout=30.0) as db:
                    loader = Loader(db, data)
                    probes = probes_of(keys)
                    outage = Outage(db, probes)
                    crash = asyncio.create_task(crash_one(cluster, loader, say))
                    probing = asyncio.create_task(outage.run())
                    began = time.perf_counter()
                    await loader.run(progress)
                    seconds = time.perf_counter() - began
                    await crash
                    outage.running = False
                    await probing
                    async with db.batch() as batch:
                        for key in probes:
                            batch.delete(key)
                say(
                    f"loaded {len(data):,} rows in {seconds:.1f} s: {len(data) / seconds:,.0f} rows/s, the kill included"
                )
                say(f"longest time without an answer to a write: {outage.longest_s:.2f} s")
                for number in range(3):
                    cluster.kill(number)
                say("SIGKILL to all three nodes")
                began = time.perf_counter()
                await asyncio.gather(*[cluster.restart_async(number) for number in range(3)])
                restart_s = time.perf_counter() - began
                say(f"all three are back after {restart_s:.1f} s")
                async with kvstore.connect(cluster.endpoints, timeout=30.0) as db:
                    began = time.perf_counter()
                    found, wrong = await verify(db, data, progress)
                    scan_s = time.perf_counter() - began
    say(f"verified by one scan: {found:,} rows, {wrong} wrong, {found / scan_s:,.0f} rows/s")
    return result | {
        "rows_per_second": round(len(data) / seconds),
        "longest_outage_s": round(outage.longest_s, 3),
        "batches_retried": loader.retries,
        "restart_of_all_s": round(restart_s, 3),
        "found": found,
        "wrong": wrong,
        "scan_rows_per_second": round(found / scan_s),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.realdata", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rows", type=int, default=None, help="only the first so many")
    parser.add_argument(
        "--dir", default=None, help="where the data goes; default: the temporary directory"
    )
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    arguments = parser.parse_args(argv)
    console = Console(stderr=arguments.output == "json")
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        result = runner.run(run(arguments, console))
    if arguments.output == "json":
        print(json.dumps(result, indent=2))
    held = result["wrong"] == 0 and result["found"] == result["rows"]
    console.print("every row is there" if held else "ROWS ARE MISSING OR WRONG")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
