"""One seed: a cluster, clients, a nemesis, and afterwards peace, in which everything must come to its end.

Between the two, in some seeds, a minority of the nodes stays in a fault, and the others must go on without it (core.py).
"""

from __future__ import annotations

import asyncio
import random
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, TextIO

import msgspec

from kvstore import logs
from kvstore.client import Database
from kvstore.config import LimitsSection, LogSection, NodeConfig, StorageSection, TxnSection
from kvstore.errors import KVError
from kvstore.limits import KIB, MIB
from kvstore.sim import loop as simulated
from kvstore.sim.cluster import Server, SimCluster, small_logs
from kvstore.sim.core import Frozen, draw_frozen
from kvstore.sim.faults import Fault, Nemesis
from kvstore.sim.observers import Observers
from kvstore.sim.points import Points
from kvstore.sim.process import ProcessDied
from kvstore.sim.trace import Trace
from kvstore.sim.workloads import PLACES, Clients, draw_workloads
from kvstore.snapshots import spans_of
from kvstore.testing.history import History
from kvstore.testing.workloads import Workload
from kvstore.testing.workloads.base import TOO_OLD, first_of_each_kind
from kvstore.testing.workloads.traced import Traced
from kvstore.transactions import Transaction
from replication import probes
from txn.state import RangeRow

PEACE_S: Final = 60.0  # within which everything must be decided, once nothing goes wrong any more
CALL_S: Final = 20.0  # of who asks in peace, for each call
LIMIT_S: Final = 600.0  # and the time for faults, and a second for each operation of a client
PAUSE_SHARE: Final = (
    0.75  # of a client's time that passes between operations, if nothing goes wrong
)


@dataclass(frozen=True)
class Options:
    """What a seed does not draw. `plant`: sees every node's parts before they run (planted bugs)."""

    seconds: float = 20.0
    clients: int = 4
    ops: int = 100  # of each client
    faults: bool = True
    nodes: int = 3
    kinds: tuple[str, ...] = ()  # exactly these kinds of faults; what the seed draws if empty
    mean_s: float = 0.0  # between two faults; as the seed draws it if 0
    hold_s: float = 0.0  # how long a fault lasts, about; as the seed draws it if 0
    workloads: tuple[str, ...] = ()  # exactly these; what the seed draws if empty
    frozen: str = (
        ""  # what a minority stays in; as the seed draws it if empty, core.NEVER: there is none
    )
    faults_kept: frozenset[int] | None = None  # numbers of the faults that happen; all if None
    ops_kept: frozenset[tuple[int, int]] | None = None  # (client's place, number); all if None
    config: NodeConfig | None = None  # as the seed draws it if None
    plant: Callable[[SimCluster, Server], None] | None = None


@dataclass
class Result:
    """What a run found. `problems` empty: nothing is wrong, by the invariants and by the checks of every workload."""

    seed: int
    problems: list[str] = field(default_factory=list)
    workloads: list[Workload] = field(default_factory=list)
    seconds: float = 0.0
    operations: int = 0
    unknown: int = 0
    failed: int = 0
    finished: bool = False  # the workloads have read what is left, and can be checked
    entries: int = 0
    states: int = 0  # of the database, that were held against what the workloads promise (I24)
    faults: dict[str, int] = field(default_factory=dict)
    in_vain: dict[str, int] = field(default_factory=dict)  # of these: whose moment has never come
    frozen: str = (
        ""  # in what a minority stayed while the others had to go on; empty: there was none
    )
    happened: dict[int, Fault] = field(default_factory=dict)  # each fault, by its number
    probes: dict[str, int] = field(default_factory=dict)  # rare paths: how often each was taken
    digest: str = ""
    counters: dict[str, float] = field(default_factory=dict)


def run(seed: int, options: Options | None = None, sink: TextIO | None = None) -> Result:
    """Play one seed. Raises for options that nothing can be made of, never for what the product does: that is in the result."""
    chosen = options or Options()
    result = Result(seed)

    points = Points(str(seed), off=not chosen.faults)

    async def play(loop: simulated.SimLoop) -> None:
        scenario = _Scenario(loop, seed, chosen, result, points, sink)
        try:
            await scenario.play()
        except simulated.SimError:
            raise
        except Exception as error:  # noqa: BLE001 - whoever plays many seeds wants a verdict of each
            text = "".join(traceback.format_exception(error))
            result.problems.append(f"{type(error).__name__}: {error}\n{text}")

    with logs.silenced(), probes.counting() as result.probes, probes.choosing(points):
        try:
            simulated.run(play, seed, time_limit_s=LIMIT_S + chosen.seconds + chosen.ops)
        except simulated.SimError as error:
            result.problems.append(f"{type(error).__name__}: {error}")
    for workload in result.workloads:  # what it saw while it ran stands, whatever became of the end
        found = workload.check() if result.finished else first_of_each_kind(workload.problems)
        result.problems += found
    return result


class _Scenario:
    def __init__(
        self,
        loop: simulated.SimLoop,
        seed: int,
        options: Options,
        result: Result,
        points: Points,
        sink: TextIO | None,
    ) -> None:
        self._loop, self._options, self._result = loop, options, result
        self._points = points
        rng = self._rng = random.Random(f"{seed}/scenario")
        self._trace = Trace(loop, sink)
        drawn = draw_config(rng, seed)
        config = options.config or drawn
        self._cluster = cluster = SimCluster(
            str(seed), nodes=options.nodes, config=config, trace=self._trace
        )
        network = cluster.network
        network.delay_s = rng.choice(((0.000_1, 0.001), (0.000_5, 0.005), (0.005, 0.05)))
        for server in cluster.servers.values():
            server.machine.drift(1.0 + rng.uniform(-0.04, 0.04))
        self._observers = Observers(cluster)
        self._tail_bytes = rng.choice((2_000, 100_000, 16 << 20))
        cluster.on_open.append(self._opened)
        result.workloads = draw_workloads(rng, History(), options.workloads)
        self._excused: Collection[str] = TOO_OLD if config.txn.retention_s < LIMIT_S else ()
        if self._excused:
            for workload in result.workloads:
                workload.foreseen |= set(TOO_OLD)
                if isinstance(workload, Traced):
                    workload.token_share = 0.0
        self._clients = Clients(
            cluster,
            result.workloads,
            clients=options.clients,
            ops=options.ops,
            pause_s=options.seconds / options.ops * PAUSE_SHARE,
            timeout_s=rng.choice((1.0, 3.0, 5.0)),
            kept=options.ops_kept,
        )
        self._nemesis = Nemesis(
            cluster, rng, self._clients.victims, self._clients.crashed, options.faults_kept
        )
        self._nemesis.direct(options.kinds, options.mean_s, options.hold_s)

    def _opened(self, server: Server) -> None:
        assert server.node is not None
        assert server.node.host is not None
        host = server.node.host
        host.limits = replace(host.limits, log_tail_bytes_max=self._tail_bytes)
        if self._options.plant is not None:
            self._options.plant(self._cluster, server)

    async def play(self) -> None:
        result, cluster = self._result, self._cluster
        began = self._loop.time()
        with self._observers.watching_outcomes(), logs.overheard(cluster.log_record):
            watch = self._loop.create_task(self._observers.watch())
            try:
                await cluster.start()
                await self._clients.prepare()
                self._clients.begin()
                if self._options.faults:
                    await self._nemesis.run(self._options.seconds)
                await self._core()
                await self._nemesis.heal()
                self._observers.calm()
                self._points.off = True
                supervisor = self._loop.create_task(self._supervise())
                await self._peace()
                supervisor.cancel()
            finally:
                watch.cancel()
                self._observers.look()
                self._observers.compare_states(result.workloads)
                cluster.tell_unseen()
                result.problems += cluster.problems
                counts = self._clients.counts
                result.operations = counts.ok
                result.unknown, result.failed = counts.unknown, counts.failed
                result.faults, result.in_vain = self._nemesis.counts, self._nemesis.in_vain()
                result.happened = self._nemesis.happened
                result.seconds = self._loop.time() - began
                result.entries, result.states = self._observers.entries, self._observers.states
                self._trace.note("end", cluster.network.fingerprint)
                result.digest = self._trace.digest()

    # -- peace

    async def _core(self) -> None:
        """Liveness with a majority: a minority stays in its fault, and clients end, all ranges are read and written, nothing
        stays undecided, and the others' replicas are equal all the same. In some seeds, see core.py."""
        frozen = draw_frozen(self._cluster, self._options.frozen) if self._options.faults else None
        if frozen is None:
            return
        self._result.frozen = frozen.kind
        await self._nemesis.heal(frozen)
        self._points.off = True
        supervisor = self._loop.create_task(self._supervise(frozen))
        where = f"with {frozen}"
        try:
            if await self._ended(where) and await self._served("core", where):
                await self._converged(where, frozen.names)
        finally:
            supervisor.cancel()
            frozen.end()

    async def _ended(self, where: str) -> bool:
        """Whether all clients come to their end."""
        return await self._until(
            lambda: self._clients.finished,
            f"{where} nothing succeeds, and the clients do not finish",
            lambda: self._clients.counts.ok,
        )

    async def _served(self, name: str, where: str) -> bool:
        """Whether one who was not there before can write a key of each range, all of them at once, and read them.

        No workload has such keys, or looks at them.
        """
        keys = [place + b"peace/" + name.encode() for place in PLACES]

        async def serve() -> None:
            client = await self._cluster.client(name, CALL_S)
            while True:
                try:
                    await client.process.call(_write_and_read(client.database, keys))
                    return
                except (
                    KVError
                ) as error:  # an election may take as long as such a seed keeps anything
                    if error.code not in self._excused:
                        raise

        try:
            async with asyncio.timeout(PEACE_S):
                await serve()
        except (KVError, TimeoutError, ProcessDied) as error:
            self._cluster.problem(f"{where} a new client is not served: {error!r}", error)
            return False
        return True

    async def _peace(self) -> None:
        """Liveness: every client ends, a new one writes and reads, nothing stays undecided, replicas are equal."""
        if not await self._ended("in peace"):
            return
        if not await self._served("writer", "in peace"):
            return
        reader = await self._cluster.client("reader", CALL_S)
        try:
            await reader.process.call(self._clients.finish(reader.database))
        except KVError as error:
            self._cluster.problem(f"in peace, a read fails: {error!r}", error)
            return
        self._result.finished = True
        await self._converged("in peace")
        self._count()

    async def _converged(self, where: str, frozen: Sequence[str] = ()) -> None:
        """Nothing stays undecided, and the replicas of a range come to be equal, but for those of frozen nodes."""
        decided, level = partial(self._decided, frozen), partial(self._level, frozen)
        if await self._until(decided, f"{where} transactions stay undecided"):
            if await self._until(level, f"{where} replicas do not reach one applied index"):
                self._compare(frozen)

    async def _supervise(self, frozen: Frozen | None = None) -> None:
        """A disk that failed just before peace ends its node a little later: boot it again, as an init system would.
        Whose process is to stand still is stopped again after that."""
        while True:
            await asyncio.sleep(0.5)
            for name in self._cluster.servers:
                if frozen is None or not frozen.is_down(name):
                    await self._cluster.restart(name)
            if frozen is not None:
                frozen.hold()

    async def _until(
        self, holds: Callable[[], bool], what: str, progress: Callable[[], int] = lambda: 0
    ) -> bool:
        """progress: a figure that grows as long as it is worth waiting; how much there is left to do is the seed's draw."""
        until, before = self._loop.time() + PEACE_S, progress()
        while not holds():
            if (now := progress()) > before:
                until, before = self._loop.time() + PEACE_S, now
            if self._loop.time() > until:
                self._cluster.problem(f"for {PEACE_S:g} s {what}: {self._picture()}")
                return False
            await asyncio.sleep(0.1)
        return True

    def _picture(self) -> str:
        lines = []
        for server in self._cluster.servers.values():
            if server.node is None or not server.running:
                lines.append(f"{server.name} is down")
                continue
            status = server.node.status()
            ranges = [
                (each["id"], each["role"], each["term"], each["commit"], each["applied"])
                for each in status["ranges"]
            ]
            lines.append(f"{server.name} {status.get('transactions')} {ranges}")
        return "; ".join(lines)

    def _decided(self, frozen: Sequence[str]) -> bool:
        for server in self._whole(frozen):
            if not server.running or server.node is None or server.node.store is None:
                return False
            for number, replica in server.node.store.replicas.items():
                state = replica.state
                undecided = state.parts or state.staged or state.outbox
                if undecided and not self._nemesis.atlas.excused(server.name, number):
                    return False
        return True

    def _whole(self, frozen: Sequence[str]) -> list[Server]:
        """The nodes that must run."""
        gone, servers = self._nemesis.atlas.gone, self._cluster.servers
        return [each for name, each in servers.items() if not gone(name) and name not in frozen]

    def _level(self, frozen: Sequence[str]) -> bool:
        applied: dict[int, tuple[int, int]] = {}
        for server in self._whole(frozen):
            if not server.running or server.node is None or server.node.store is None:
                return False
            for number, replica in server.node.store.replicas.items():
                if self._nemesis.atlas.excused(server.name, number):
                    continue
                if applied.setdefault(number, replica.applied) != replica.applied:
                    return False
        return True

    def _compare(self, frozen: Sequence[str]) -> None:
        """All rows of a range are equal on all replicas."""
        states: dict[int, tuple[str, list[tuple[bytes, bytes]]]] = {}
        for server in self._whole(frozen):
            assert server.node is not None
            assert server.node.store is not None
            for number, replica in server.node.store.replicas.items():
                if self._nemesis.atlas.excused(server.name, number):
                    continue
                rows = rows_of(server, replica.state.row)
                name, others = states.setdefault(number, (server.name, rows))
                if rows != others:
                    differing = sorted(set(rows) ^ set(others))[:4]
                    self._cluster.problem(
                        f"range {number} of {name} and {server.name} differ: {differing}"
                    )

    def _count(self) -> None:
        """Figures that show whether a run went where it should."""
        counters = self._result.counters
        for server in self._cluster.servers.values():
            if server.node is not None and server.node.host is not None:
                for name, value in server.node.host.stats().items():
                    if isinstance(value, (int, float)):
                        counters[name] = counters.get(name, 0) + value


async def _write_and_read(database: Database, keys: Sequence[bytes]) -> None:
    """Each alone, then all in one transaction, then all at one version. Raises: KVError."""
    for key in keys:
        await database.put(key, b"alone")

    async def put(tx: Transaction) -> None:
        for key in keys:
            tx.put(key, b"together")

    await database.run(put)
    found = await database.snapshot().get_many(keys)
    if found != dict.fromkeys(keys, b"together"):
        raise KVError(f"what was written is not what is read: {found}", code="lost_write")


def rows_of(server: Server, row: RangeRow) -> list[tuple[bytes, bytes]]:
    assert server.node is not None
    engine = server.node.engine
    assert engine is not None
    rows: list[tuple[bytes, bytes]] = []
    for start, end in spans_of(row):
        rows += list(engine.scan(start, end))
    return rows


def draw_config(rng: random.Random, seed: int) -> NodeConfig:
    config = small_logs(NodeConfig())
    log: LogSection = msgspec.structs.replace(
        config.log,
        sync_mode=rng.choice(("inline", "thread", "auto")),
        flush_interval_s=rng.choice((0.5, 2.0, 60.0)),
        segment_bytes=rng.choice((64, 256, 1024)) * 1024,
    )
    txn: TxnSection = msgspec.structs.replace(
        config.txn,
        conflict_wait_s=rng.choice((0.0, 0.05, 0.5)),
        anchor_timer_s=rng.choice((0.3, 1.0)),
        orphan_timer_s=rng.choice((1.1, 2.0)),
        oracle_window_s=rng.choice((0.3, 3.0)),
        retention_s=rng.choice((3.0, 10.0, 600.0)),
    )
    limits: LimitsSection = msgspec.structs.replace(
        config.limits, watch_recent_rows=rng.choice((16, 64, 4_096))
    )
    of_cache = random.Random(f"{seed}/read cache")
    storage: StorageSection = msgspec.structs.replace(
        config.storage, read_cache_bytes=of_cache.choice((0, 4 * KIB, 16 * KIB, 64 * MIB))
    )
    return msgspec.structs.replace(config, log=log, txn=txn, limits=limits, storage=storage)
