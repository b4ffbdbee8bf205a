"""`kvstore demo`: a cluster on this machine that tries itself, and says in a few lines what happened.

A small bank: accounts in four cities, each city a range of its own. Money moves between cities while the node that leads
the most ranges is killed, and comes back. Two things must hold, or the exit status is 1: the money in the bank is what it
was at first, and every write that was acknowledged is there.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console

from kvstore.bootstrap import META_RANGE_ID
from kvstore.cli.output import console
from kvstore.errors import KVError
from kvstore.testing.cluster import LocalCluster

if TYPE_CHECKING:
    from kvstore.client import Database
    from kvstore.transactions import Transaction

CITIES: Final = ("berlin", "lima", "osaka", "tunis")
PEOPLE: Final = ("ada", "ben", "cleo", "dan", "eve")
OPENING_BALANCE: Final = 100
TELLERS: Final = 4
BEFORE_KILL_S: Final = 1.5
AFTER_KILL_S: Final = 4.0
AFTER_RESTART_S: Final = 1.0
CALL_TIMEOUT_S: Final = 10.0

Say = Callable[[str], None]


def run(nodes: int, directory: Path | None, *, stay: bool) -> int:
    """Run it; `stay`: leave the cluster up until Ctrl-C. Returns the exit status: 0 if what must hold held."""
    out = console()
    splits = [city.encode() + b"/" for city in CITIES[1:]]
    began = time.monotonic()
    with LocalCluster(nodes, directory=directory, splits=splits) as cluster:
        ranges = len(cluster.leaders())
        _say(
            out,
            f"{nodes} nodes are up after {time.monotonic() - began:.1f} s, with {ranges} ranges: "
            f"{len(CITIES)} of the bank, one for each city, and {ranges - len(CITIES)} of the system",
        )
        for node in cluster.nodes:
            _say(
                out,
                f"  node {node.number + 1}  {node.address}  process {node.pid}  {node.directory}",
            )
        held = asyncio.run(_Demo(cluster, out).run())
        if not held:
            cluster.keep = True
            _say(out, f"data and logs are kept in {cluster.directory}")
        if stay:
            _invite(out, cluster)
            try:
                while True:
                    time.sleep(3_600)
            except KeyboardInterrupt:
                _say(out, "stopping")
        return 0 if held else 1


class _Demo:
    def __init__(self, cluster: LocalCluster, out: Console) -> None:
        self._cluster = cluster
        self._out = out
        self._transfers = 0
        self._unknown = 0
        self._failed = 0
        self._pulses = {city: _Pulse(city) for city in CITIES}
        self._running = True

    async def run(self) -> bool:
        import kvstore

        async with kvstore.connect(self._cluster.endpoints, timeout=CALL_TIMEOUT_S) as database:
            await self._open_accounts(database)
            async with self._traffic(database):
                await asyncio.sleep(BEFORE_KILL_S)
                self._tell_traffic()
                if len(self._cluster.nodes) >= 3:
                    await self._kill_and_restart()
            return await self._verify(database)

    async def _open_accounts(self, database: Database) -> None:
        began = time.monotonic()
        for city in CITIES:
            async with database.batch() as batch:
                for person in PEOPLE:
                    batch.put(_account(city, person), str(OPENING_BALANCE).encode())
        count, taken_ms = len(CITIES) * len(PEOPLE), (time.monotonic() - began) * 1000
        total = OPENING_BALANCE * count
        _say(
            self._out,
            f"opened {count} accounts with {total} in all, in {len(CITIES)} cities, in {taken_ms:.0f} ms",
        )

    @asynccontextmanager
    async def _traffic(self, database: Database) -> Any:
        work: list[Awaitable[None]] = [self._teller(database, number) for number in range(TELLERS)]
        work += [self._pulse(database, pulse) for pulse in self._pulses.values()]
        tasks = [asyncio.ensure_future(each) for each in work]
        try:
            yield
        finally:
            self._running = False
            await asyncio.gather(*tasks)

    async def _teller(self, database: Database, seed: int) -> None:
        draw = random.Random(seed)
        while self._running:
            cities = draw.sample(CITIES, 2)
            payer, payee = (_account(city, draw.choice(PEOPLE)) for city in cities)
            try:
                await database.run(_transfer(payer, payee, draw.randint(1, 10)))
                self._transfers += 1
            except KVError as error:
                if error.maybe_committed:
                    self._unknown += 1
                else:
                    self._failed += 1
            await asyncio.sleep(0.002)

    async def _pulse(self, database: Database, pulse: _Pulse) -> None:
        """Write a counter in one city over and over; the gaps between two acknowledgements are what users feel."""
        while self._running:
            try:
                await database.put(pulse.key, str(pulse.count + 1).encode())
                pulse.acknowledged(time.monotonic())
            except KVError:
                self._failed += 1
            await asyncio.sleep(0.01)

    def _tell_traffic(self) -> None:
        rate = self._transfers / BEFORE_KILL_S
        _say(
            self._out,
            f"{TELLERS} tellers move money between cities: {self._transfers} transfers ({rate:.0f}/s)",
        )

    async def _kill_and_restart(self) -> None:
        cluster = self._cluster
        leaders = await asyncio.to_thread(cluster.leaders)
        victim = await cluster.busiest_async()
        led = [range_id for range_id, number in leaders.items() if number == victim]
        for pulse in self._pulses.values():
            pulse.gap_s = 0.0
        before = self._transfers
        cluster.kill(victim)
        _say(
            self._out,
            f"killed node {victim + 1} (SIGKILL), the leader of {len(led)} of {len(leaders)} ranges: "
            + ", ".join(map(_name_of, led)),
        )
        await asyncio.sleep(AFTER_KILL_S)
        now = time.monotonic()
        gaps = {pulse.city: pulse.longest_gap(now) for pulse in self._pulses.values()}
        told = ", ".join(f"{city} {gap:.1f} s" for city, gap in gaps.items())
        _say(self._out, f"longest wait for a write, by city: {told}")
        since = self._transfers - before
        _say(self._out, f"{since} transfers since, on {len(cluster.nodes) - 1} nodes")
        began = time.monotonic()
        await cluster.restart_async(victim)
        await cluster.wait_ready_async([victim])
        _say(
            self._out,
            f"restarted node {victim + 1}; it was ready after {time.monotonic() - began:.1f} s",
        )
        await asyncio.sleep(AFTER_RESTART_S)

    async def _verify(self, database: Database) -> bool:
        accounts = [_account(city, person) for city in CITIES for person in PEOPLE]
        keys = [*accounts, *(pulse.key for pulse in self._pulses.values())]
        found = await database.get_many(keys)
        total = sum(int(found.get(key) or 0) for key in accounts)
        wanted = OPENING_BALANCE * len(accounts)
        lost = [
            pulse.city
            for pulse in self._pulses.values()
            if int(found.get(pulse.key) or 0) < pulse.count
        ]
        held = total == wanted and not lost
        writes = sum(pulse.count for pulse in self._pulses.values())
        say = "[green]held[/]" if held else "[red]BROKEN[/]"
        self._out.print(f"{say}: the accounts sum to {total} (of {wanted})", markup=True)
        told = f"{self._transfers} transfers and {writes} writes were acknowledged"
        _say(
            self._out,
            f"{told}; lost: {', '.join(lost) or 'none'}; failed {self._failed}, unknown {self._unknown}",
        )
        return held


class _Pulse:
    """A counter that one task writes, and the longest time between two acknowledgements."""

    def __init__(self, city: str) -> None:
        self.city = city
        self.key = f"{city}/pulse".encode()
        self.count = 0
        self.gap_s = 0.0
        self._last: float | None = None

    def acknowledged(self, now: float) -> None:
        self.count += 1
        if self._last is not None:
            self.gap_s = max(self.gap_s, now - self._last)
        self._last = now

    def longest_gap(self, now: float) -> float:
        """With the one that has not ended yet."""
        return max(self.gap_s, 0.0 if self._last is None else now - self._last)


def _name_of(range_id: int) -> str:
    """Whose range it is: `kvctl init` numbers them, the meta range first, then by their start."""
    place = range_id - META_RANGE_ID - 1
    if 0 <= place < len(CITIES):
        return CITIES[place]
    return (
        "the directory and the oracle" if range_id == META_RANGE_ID else "the system's other keys"
    )


def _account(city: str, person: str) -> bytes:
    return f"{city}/account/{person}".encode()


def _transfer(payer: bytes, payee: bytes, amount: int) -> Callable[[Transaction], Awaitable[None]]:
    async def transfer(tx: Transaction) -> None:
        has, gets = await asyncio.gather(tx.get(payer), tx.get(payee))
        if int(has or 0) >= amount:
            tx.put(payer, str(int(has or 0) - amount).encode())
            tx.put(payee, str(int(gets or 0) + amount).encode())

    return transfer


def _invite(out: Console, cluster: LocalCluster) -> None:
    _say(out, "the cluster stays up until Ctrl-C. Try:")
    for command in _commands(cluster.endpoints):
        _say(out, f"  {command}")
    _say(out, f"  http://{cluster.addresses[0]}/")


def _commands(endpoints: str) -> Sequence[str]:
    tools = Path(sys.executable).parent  # an environment need not be activated for `make demo`
    away = shutil.which("kvctl") is None and (tools / "kvctl").exists()
    return (
        *([f'export PATH="{tools}:$PATH"'] if away else []),
        f"export KVORUM_ENDPOINTS={endpoints}",
        "kvctl status",
        "kvctl ranges ls",
        "kvctl scan --prefix berlin/",
        'kvctl txn "get lima/account/ada; incr lima/visits"',
    )


def _say(out: Console, text: str) -> None:
    out.print(text)
    out.file.flush()
