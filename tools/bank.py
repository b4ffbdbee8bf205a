"""Transfers between accounts on eight ranges while nodes are killed with SIGKILL; no money may be lost or made.

    python -m tools.bank [--seconds 60] [--kill-every 5] [--tellers 32] [--seed N] [-o json]

Checked all the time: the total, by snapshots. At the end: the total, which must be readable then; the marker of every
acknowledged transfer is there; the marker of every transfer that definitely failed is not; no transaction is undecided on
any node; exit status 0 only if all of it held, and there were transfers and totals at all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from typing import Any, Final

from rich.console import Console

import kvstore
from kvstore.adapters.loop import new_event_loop
from kvstore.client import Database
from kvstore.errors import KVError
from kvstore.testing.cluster import LocalCluster
from tools.workload import undecided

RANGES: Final = 8
ACCOUNTS: Final = 64
OPENING: Final = 1_000
DOWN_S: Final = 1.5
SNAPSHOT_EVERY_S: Final = 0.1
PEACE_S: Final = 60.0  # within which the last total must have been read


def account(number: int) -> bytes:
    return b"%d/account/%03d" % (number % RANGES, number)


class Bank:
    def __init__(self, db: Database, seed: int, until: float) -> None:
        self.db, self.until = db, until
        self._rng = random.Random(seed)
        self.accounts = [account(number) for number in range(ACCOUNTS)]
        self.acknowledged: dict[bytes, int] = {}  # marker -> version
        self.failed: list[bytes] = []  # markers of transfers that definitely did not happen
        self.unknown = 0
        self.conflicts = 0
        self.errors: dict[str, int] = {}
        self.snapshots = 0
        self.broken: list[str] = []
        self._number = 0

    async def open(self) -> None:
        async with self.db.batch() as batch:
            for key in self.accounts:
                batch.put(key, b"%d" % OPENING)

    async def teller(self) -> None:
        while time.monotonic() < self.until:
            self._number += 1
            source, target = self._rng.sample(self.accounts, 2)
            amount = self._rng.randint(1, 50)
            marker = b"%d/transfer/%08d" % (self._number % RANGES, self._number)
            await self._transfer(source, target, amount, marker)

    async def _transfer(self, source: bytes, target: bytes, amount: int, marker: bytes) -> None:
        try:
            async with self.db.transaction() as tx:
                one, two = await asyncio.gather(tx.get(source), tx.get(target))
                assert one is not None
                assert two is not None
                tx.put(source, b"%d" % (int(one) - amount))
                tx.put(target, b"%d" % (int(two) + amount))
                tx.put(marker, b"%d" % amount)
        except KVError as error:
            if error.maybe_committed:
                self.unknown += 1
            else:
                self.failed.append(marker)
            if error.code == "conflict":
                self.conflicts += 1
            else:
                self.errors[error.code] = self.errors.get(error.code, 0) + 1
            return
        assert tx.commit_version is not None
        self.acknowledged[marker] = tx.commit_version

    async def auditor(self) -> None:
        while time.monotonic() < self.until:
            await self.audit()
            await asyncio.sleep(SNAPSHOT_EVERY_S)

    async def last_audit(self) -> None:
        """In peace: the total, which must come now. And whether anything was done and checked before."""
        if not self.acknowledged:
            self.broken.append("no transfer was acknowledged")
        if not self.snapshots:
            self.broken.append("no total was checked while money was moved")
        loop = asyncio.get_running_loop()
        until = loop.time() + PEACE_S
        while not await self.audit():
            if loop.time() > until:
                self.broken.append(f"in peace no total could be read for {PEACE_S:g} s")
                return
            await asyncio.sleep(SNAPSHOT_EVERY_S)

    async def audit(self) -> bool:
        """Compare the total; whether it could be read."""
        try:
            values = await self.db.snapshot().get_many(self.accounts)
        except KVError as error:
            self.errors["snapshot " + error.code] = self.errors.get("snapshot " + error.code, 0) + 1
            return False
        self.snapshots += 1
        total = sum(int(value) for value in values.values())
        if total != ACCOUNTS * OPENING:
            self.broken.append(f"a snapshot's total is {total}, not {ACCOUNTS * OPENING}")
        return True

    async def check_markers(self) -> None:
        """By one scan each range, at one version."""
        found = {key async for key, _ in self.db.scan() if b"/transfer/" in key}
        lost = [marker for marker in self.acknowledged if marker not in found]
        risen = [marker for marker in self.failed if marker in found]
        if lost:
            self.broken.append(f"{len(lost)} acknowledged transfers are lost: {lost[:3]}")
        if risen:
            self.broken.append(f"{len(risen)} failed transfers happened: {risen[:3]}")


async def killer(cluster: LocalCluster, bank: Bank, every_s: float, seed: int, say: Any) -> int:
    rng = random.Random(seed)
    kills = 0
    while time.monotonic() + every_s + DOWN_S < bank.until:
        await asyncio.sleep(max(0.1, every_s - DOWN_S))
        victim = rng.randrange(len(cluster.nodes))
        say(f"SIGKILL node {victim + 1}; {len(bank.acknowledged):,} transfers so far", style="dim")
        cluster.kill(victim)
        kills += 1
        await asyncio.sleep(DOWN_S)
        await cluster.restart_async(victim)
    return kills


async def rows_collected(cluster: LocalCluster) -> int:
    """Of old versions and outcomes, by the processes that run now."""
    found = [await cluster.status_async(number) for number in range(len(cluster.nodes))]
    return sum(int(status["outcomes"]["rows_collected_total"]) for status in found)


async def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    splits = [b"%d" % number for number in range(1, RANGES)]
    with tempfile.TemporaryDirectory(dir=arguments.dir) as directory:
        async with (
            LocalCluster(
                nodes=3,
                directory=directory,
                splits=splits,
                settings={"KVORUM_TXN__RETENTION": arguments.retention},
            ) as cluster,
            kvstore.connect(cluster.endpoints, timeout=20.0) as db,
        ):
            bank = Bank(db, arguments.seed, time.monotonic() + arguments.seconds)
            await bank.open()
            tellers = [bank.teller() for _ in range(arguments.tellers)]
            kills, *_ = await asyncio.gather(
                killer(cluster, bank, arguments.kill_every, arguments.seed, console.print),
                bank.auditor(),
                *tellers,
            )
            await bank.last_audit()
            await bank.check_markers()
            left = await undecided(cluster)
            if left:
                bank.broken.append(f"{left} things are still undecided")
            collected = await rows_collected(cluster)
    return {
        "seconds": arguments.seconds,
        "seed": arguments.seed,
        "kills": kills,
        "acknowledged": len(bank.acknowledged),
        "per_second": round(len(bank.acknowledged) / arguments.seconds),
        "conflicts": bank.conflicts,
        "unknown": bank.unknown,
        "errors": bank.errors,
        "snapshots": bank.snapshots,
        "undecided": left,
        "collected": collected,
        "broken": bank.broken,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bank", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--kill-every", type=float, default=5.0, help="seconds from kill to kill")
    parser.add_argument("--tellers", type=int, default=32, help="transfers under way at a time")
    parser.add_argument("--seed", type=int, default=1, help="of accounts, amounts and victims")
    parser.add_argument(
        "--retention", default="10m", help="of old versions; 3s: collect all the time"
    )
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
    else:
        for name, value in result.items():
            console.print(f"{name:>14}  {value}")
    console.print("everything held" if not result["broken"] else "BROKEN")
    return 1 if result["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
