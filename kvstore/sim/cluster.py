"""A whole cluster in one process under virtual time: the product's own nodes and clients on simulated machines.

`SimCluster` is driven from the world (no process): it starts nodes, crashes, pauses and restarts them, and gives out
clients, each a process and a host of its own. Nodes are named n1, n2, ...; clients by their user.
A node that gives up because its disk failed (as it was told to) counts as crashed, and `on_failure` hears of it. One
whose engine was damaged may find a row corrupt: then it is retired for good. Any other fatal error, any exception that
nobody handled or looked at, and what is logged as an error is kept in `problems`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from kvstore.adapters.memory_engine import ROTTEN
from kvstore.bootstrap import REPLICAS_DEFAULT, InitRequest, mint_cluster_id, plan
from kvstore.client import Database
from kvstore.config import (
    LogSection,
    NodeConfig,
)
from kvstore.errors import CorruptionError, DiskFull, KVError, StorageError
from kvstore.identity import Identity
from kvstore.node import Node
from kvstore.sim.adapters import WALL_EPOCH_S, Machine, SimAdapters, SimClock
from kvstore.sim.disk import INJECTED
from kvstore.sim.loop import LOOKED_AT_S, UNSEEN, SimLoop
from kvstore.sim.network import SimNetwork
from kvstore.sim.process import Killed, Process, ProcessDied, outside
from kvstore.sim.trace import Trace
from replication.errors import LogDiskFull, LogWriteFailed
from replication.wal import Wal

PORT: Final = 7400
SPLITS: Final = (b"h", b"p")
SEGMENT_BYTES: Final = 256 * 1024
ENGINE_ROT: Final = "engine_rot"  # among what was done to a node's data: rows of its engine


class SimNode(Node):
    """A node that tells when its parts are there, before they run."""

    on_open: Callable[[SimNode], None]

    async def _open(self, found: Identity, wal: Wal | None = None) -> None:
        await super()._open(found, wal)
        self.on_open(self)


class Server:
    """One node: its machine, and its process while there is one."""

    def __init__(self, number: int, machine: Machine) -> None:
        self.number = number
        self.name = machine.name
        self.machine = machine
        self.address = f"{machine.name}:{PORT}"
        self.process: Process | None = None
        self.node: SimNode | None = None
        self.broken = False  # it cannot start any more, or is retired
        self.damage: list[str] = []  # what the faults did to its data

    @property
    def running(self) -> bool:
        return self.process is not None and not self.process.dead


class Client:
    """A client on a host of its own. `dead` after its crash."""

    def __init__(self, name: str, process: Process, database: Database, machine: Machine) -> None:
        self.name = name
        self.process = process
        self.machine = machine
        self.database = database

    @property
    def dead(self) -> bool:
        return self.process.dead


class SimCluster:
    """Args: seed: of every draw. config: for every node; logs are small unless it says more. on_open: sees every
    node's parts before they run (checks of invariants, planted bugs)."""

    def __init__(
        self,
        seed: str,
        *,
        nodes: int = 3,
        splits: Sequence[bytes] = SPLITS,
        config: NodeConfig | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.seed = seed
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        self.loop = loop
        self.trace = trace or Trace(loop)
        self.rng = random.Random(f"{seed}/cluster")
        self.network = SimNetwork(random.Random(f"{seed}/network"), trace=self.trace)
        self.config = config or small_logs(NodeConfig())
        self.problems: list[str] = []
        self.on_open: list[Callable[[Server], None]] = []
        self.on_crash: list[Callable[[Server], None]] = []
        self.on_failure: list[Callable[[Server], None]] = []  # it ended by itself; restart it
        self.splits = tuple(splits)
        self.range_ids: list[int] = []  # once it has started
        self.servers: dict[str, Server] = {}
        self.clients: dict[str, Client] = {}
        self._clients_made = 0
        loop.set_exception_handler(self._unhandled)
        for number in range(1, nodes + 1):
            name = f"n{number}"
            machine = Machine(name, random.Random(f"{seed}/{name}"), self.trace)
            self.servers[name] = Server(number, machine)

    @property
    def minority(self) -> int:
        """So many nodes, whichever, take no range's majority away: a range has REPLICAS_DEFAULT replicas, however many nodes
        there are.
        """
        return (min(REPLICAS_DEFAULT, len(self.servers)) - 1) // 2

    # -- life

    async def start(self) -> None:
        """Boot every machine and make them one cluster."""
        for server in self.servers.values():
            await self._boot(server)
        addresses = [server.address for server in self.servers.values()]
        bits = self.rng.getrandbits(48)
        cluster_id = mint_cluster_id(int(WALL_EPOCH_S * 1000), bits, addresses, self.splits)
        requests = plan(cluster_id, addresses, self.splits)
        self.range_ids = [each.range_id for each in requests[0].ranges]
        for request in requests:
            await self._initialize(self.servers[f"n{request.your_node_id}"], request)

    async def _initialize(self, server: Server, request: InitRequest) -> None:
        assert server.process is not None
        assert server.node is not None
        await server.process.call(server.node.initialize(request))

    async def _boot(self, server: Server) -> None:
        assert not server.running
        machine = server.machine
        process = server.process = Process(server.name)
        machine.boot(process)
        adapters = SimAdapters(machine, self.network, self.seed)

        async def started() -> SimNode:
            node = SimNode("data", server.address, "", self.config, adapters)
            node.on_open = lambda _node: self._opened(server)
            server.node = node
            node.fatal.add_done_callback(lambda fatal: self._fatal(server, process, fatal))
            await node.start()
            return node

        try:
            await process.call(started())
        except ProcessDied:
            pass  # it was killed while it started

    def _opened(self, server: Server) -> None:
        for look in self.on_open:
            look(server)

    async def restart(self, name: str) -> None:
        """Boot a machine whose process is dead."""
        server = self.servers[name]
        if server.running or server.broken:
            return
        self.trace.note("restart", name)
        try:
            await self._boot(server)
        except Exception as error:  # noqa: BLE001 - whatever it is, a restart must not fail
            if injected(error):
                self._failed(server, error)
                return
            if rotten(server, error):
                self._retire(server, error)
                return
            self.problem(f"{name} does not start: {error!r}", error)
            server.broken = True
            self.crash(name, power=False)

    # -- faults

    def crash(self, name: str, *, power: bool = True) -> None:
        """The process is gone, at this instant. `power`: the machine with it, and what was not synced is lost."""
        server = self.servers[name]
        process = server.process
        if process is None or process.dead:
            return
        for look in self.on_crash:
            look(server)
        self.tell_unseen(process)
        process.kill()
        outside(lambda: self.network.crash(name, silent=power))
        lost = server.machine.lose_process(power=power)
        if server.node is not None and server.node.fatal.done():
            server.node.fatal.exception()  # it dies before it could say why: that is not a failure of the product
        server.node = None
        self.trace.note("crash", name, power, lost)

    def crash_within(self, name: str, *, power: bool = True) -> None:
        """The same, from within a call of that very process (see Machine.io)."""
        self.crash(name, power=power)
        raise Killed(name)

    def pause(self, name: str) -> None:
        process = self.process(name)
        if process is not None and not process.dead:
            self.trace.note("pause", name)
            process.pause()

    def resume(self, name: str) -> None:
        process = self.process(name)
        if process is not None and process.paused:
            self.trace.note("resume", name)
            self.loop.resume(process)

    def process(self, name: str) -> Process | None:
        """Of a node or client; None: it never had one."""
        server = self.servers.get(name)
        return server.process if server is not None else self.clients[name].process

    def running(self) -> list[Server]:
        return [server for server in self.servers.values() if server.running]

    def leader_of(self, group: int) -> Server | None:
        """The running node that leads a range in the highest term, if any."""
        best: tuple[int, Server] | None = None
        for server in self.running():
            node = server.node
            if node is None or node.host is None or group not in node.host.groups():
                continue
            raft = node.host.raft(group)
            if raft.is_leader and (best is None or raft.term > best[0]):
                best = (raft.term, server)
        return best[1] if best else None

    # -- clients

    async def client(
        self, name: str, timeout_s: float = 5.0, process: Process | None = None
    ) -> Client:
        """A new client, in a process of its own unless one is given; returns when its database is started."""
        self._clients_made += 1
        unique = f"{name}.{self._clients_made}"
        process = process or Process(unique)
        machine = Machine(unique, random.Random(f"{self.seed}/{unique}"), self.trace)
        machine.boot(process)
        host = self.network.host(unique)

        async def started() -> Database:
            addresses = [server.address for server in self.servers.values()]
            database = Database(
                host,
                addresses,
                SimClock(machine),
                random.Random(f"{self.seed}/{unique}/ids"),
                timeout_s,
            )
            while True:
                try:
                    await database.start()
                except KVError:
                    await asyncio.sleep(0.1)
                    continue
                return database

        database = await process.call(started())
        client = self.clients[unique] = Client(unique, process, database, machine)
        return client

    def crash_client(self, name: str) -> None:
        client = self.clients[name]
        if not client.dead:
            self.trace.note("crash", name)
            self.tell_unseen(client.process)
            client.process.kill()
            outside(self.network.crash, name)

    # -- what goes wrong by itself

    def problem(self, text: str, error: BaseException | None = None) -> None:
        """Something that must not be. The run goes on; its result will say so."""
        import traceback

        if error is not None:
            text += "\n" + "".join(traceback.format_exception(error))
        self.problems.append(f"at {self.loop.time():.6f}: {text}")
        self.trace.note("problem", text.partition("\n")[0])

    def tell_unseen(self, process: Process | None = None) -> None:
        """Of what tasks of a process that is about to die have failed with (None: of the world, and all that live), a
        problem for each that nobody has looked at."""
        age_s = LOOKED_AT_S if process is not None else 0.0
        for error in self.loop.unseen(process, age_s):
            outside(self.problem, f"unhandled: {UNSEEN}: {error!r}", error)

    def log_record(self, text: str) -> None:
        """Kvorum has logged that something is wrong: nothing that a fault does is that, so it is a problem.

        What disks, networks and damage bring about is foreseen, and told by errors, `fatal` and warnings. Records at
        ERROR are of what nobody foresaw (a link or a dial that failed so).
        """
        outside(self.problem, f"logged: {text}")

    def _fatal(self, server: Server, process: Process, fatal: asyncio.Future[None]) -> None:
        error = fatal.exception()
        outside(self._give_up, server, process, error)

    def _give_up(self, server: Server, process: Process, error: BaseException | None) -> None:
        current = server.process is process and not process.dead
        if current and rotten(server, error):
            self._retire(server, error)
        elif current and injected(error):
            self._failed(server, error)
        else:
            if not process.dead:
                self.problem(f"{server.name} failed: {error!r}", error)
            if server.process is process:
                self.crash(server.name, power=False)

    def _failed(self, server: Server, error: BaseException | None) -> None:
        self.trace.note("failed", server.name, error)
        self.crash(server.name, power=False)
        for look in self.on_failure:
            look(server)

    def _retire(self, server: Server, error: BaseException | None) -> None:
        """Its data is damaged, and it says so: an operator takes it out of service."""
        self.trace.note("retired", server.name, error)
        server.broken = True
        self.crash(server.name, power=False)

    def _unhandled(self, _loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, Killed):
            return
        outside(self.problem, f"unhandled: {context.get('message')}: {error!r}", error)


def injected(error: BaseException | None) -> bool:
    """Whether this is a failure that the simulated disk was told to have."""
    if isinstance(error, LogDiskFull | DiskFull):
        return True
    return isinstance(error, OSError | LogWriteFailed | StorageError) and INJECTED in str(error)


def rotten(server: Server, error: BaseException | None) -> bool:
    """Whether damage done to this node may stop all of it: a row of its engine that cannot be read, and nothing else.

    A log that is damaged costs the ranges whose records are lost, each of which is refused; the others go on. A node that
    does not start, or ends, for that is a problem, and so is one whose engine is damaged and which gives another reason.
    """
    return (
        ENGINE_ROT in server.damage and isinstance(error, CorruptionError) and ROTTEN in str(error)
    )


def small_logs(config: NodeConfig) -> NodeConfig:
    """Segments of a size that a simulation of seconds fills."""
    log: LogSection = msgspec.structs.replace(config.log, segment_bytes=SEGMENT_BYTES)
    return msgspec.structs.replace(config, log=log)
