"""A node: the composition of log, engine, replication host, store and streams, and its life from empty directory to stop.

`Node(directory, listen, advertise, config, adapters)` knows no clock, socket or file of its own: `production_adapters` gives
it the real ones, the simulator others. An empty directory waits for `initialize` (kvctl init); `node.toml` is written last,
so that a cluster is joined wholly or not at all: where it is, rows and a log have been, and a start without them is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from kvstore import identity as identities
from kvstore import logs, starting
from kvstore.bootstrap import InitRequest, check, parse_address
from kvstore.config import NodeConfig
from kvstore.connections import Connections
from kvstore.errors import (
    ConfigError,
    DataDirectoryError,
    InvalidArgument,
    KVError,
    NodeStopped,
    NotReady,
    WrongCluster,
)
from kvstore.leadership import Leadership
from kvstore.link import MESSAGE_OVERHEAD_BYTES, Hello, LinkLimits, WrongNode
from kvstore.measures import NodeMeasures
from kvstore.peers import CLOSED_TIMESTAMPS, PEER_PATH, RAFT_MESSAGES, SNAPSHOT_PATH, PeerSet
from kvstore.ports import Clock, Engine, Executor, FramePipe, Network, Random
from kvstore.read_cache import cached
from kvstore.remote import RemoteRanges
from kvstore.replica import tell_damage
from kvstore.roster import Roster
from kvstore.settings import raft_config, txn_limits
from kvstore.status import node_locks, node_status
from kvstore.store import Store
from kvstore.streams import Backoff, Stream, accept
from replication.codec import decode_messages
from replication.errors import FrameError
from replication.host import Host
from replication.ports import LogFiles
from replication.probes import chance
from replication.turns import HostLimits
from replication.wal import GroupLog, Wal

if TYPE_CHECKING:
    from kvstore.client import Database

CLIENT_PATH: Final = "/v1/stream"
FLUSH_CHECK_S: Final = 0.5
CLOCKS_APART_S_MAX: Final = 3600  # of who makes a cluster and its nodes

log = logs.logger("kvstore.node")
OnPipe = Callable[[str, FramePipe], Awaitable[None]]


class NodeFiles(Protocol):
    """Small files of the data directory, each replaced as a whole."""

    def read_file(self, name: str) -> bytes | None: ...

    def write_file(self, name: str, data: bytes) -> None: ...


class Adapters(Protocol):
    """The world, as one node sees it."""

    @property
    def clock(self) -> Clock: ...
    @property
    def random(self) -> Random: ...
    @property
    def executor(self) -> Executor: ...
    @property
    def network(self) -> Network: ...
    def open_directory(self, directory: str) -> NodeFiles:
        """Take the data directory; nobody else may use it until `close`. Raises DataDirectoryError."""

    def open_engine(self, *, empty: bool = False) -> Engine:
        """`empty`: without anything that an earlier, unfinished initialisation left."""

    def open_log(self) -> LogFiles: ...
    async def serve(self, address: str, on_pipe: OnPipe, node: Node) -> str:
        """Streams, and what else this world has at a node's address. Returns the real address."""

    async def finish(self) -> None:
        """Let what was asked over HTTP come to its end, for a bounded time. Connections are still taken."""

    async def close(self) -> None: ...


class Node:
    """One node. `start`, then `stop`; `fatal` gets an exception when the node must end at once."""

    def __init__(
        self,
        directory: str,
        listen: str,
        advertise: str,
        config: NodeConfig,
        adapters: Adapters,
        join: Sequence[str] = (),
    ) -> None:
        self.config = config
        self.address = advertise or listen
        self.node_id = 0
        self.cluster_id = ""
        self.database: Database | None = None
        self.store: Store | None = None
        self.host: Host | None = None
        self.wal: Wal | None = None
        self.engine: Engine | None = None
        self.peers: PeerSet | None = None
        self.leadership: Leadership | None = None
        self.connections = Connections(config.limits.requests_per_connection)
        self.fatal: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.started_at = adapters.clock.monotonic()
        self.state = "starting"
        self.adapters = adapters
        self.flushes = 0
        self._directory, self._listen = directory, listen
        self._advertise, self._join = advertise, join
        self._files: NodeFiles
        self.roster: Roster | None = None
        self._log: LogFiles | None = None
        self._remote: RemoteRanges | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._streams: dict[int, Stream] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._initializing = asyncio.Lock()
        self._refusal: KVError | None = None  # what clients are told instead of an answer
        self._flushed_bytes = 0.0
        self._flushed_at = self.started_at
        self._link_limits = LinkLimits(
            queue_bytes_max=config.network.queue_bytes + MESSAGE_OVERHEAD_BYTES,
            handshake_timeout_s=config.network.connect_timeout_s,
            ping_interval_s=config.network.ping_interval_s,
            stall_timeout_s=config.network.stall_timeout_s,
        )

    # -- life

    async def start(self) -> None:
        """Listen, and serve what the directory holds.

        Raises: DataDirectoryError, ConfigError, VersionMismatch, CorruptionError, DiskFull, StorageError, OSError; of the log,
        LogMismatch and LogFormatError.
        """
        self._files = self.adapters.open_directory(self._directory)
        self.roster = Roster(self._files)
        stored = self._files.read_file(identities.FILE_NAME)
        found = identities.decode_identity(stored) if stored is not None else None
        if found is not None:
            self._check_address(found)
        elif self._join:
            raise ConfigError(
                "a node cannot join a running cluster yet: name all nodes in `kvctl init`, and start this one without "
                "--join (node.join)"
            )
        served_at = await self.adapters.serve(self._listen, self._on_pipe, self)
        if not self._advertise and parse_address(self._listen)[1] == 0:
            self.address = served_at
        if found is None:
            self.state = "waiting"
            log.info("waiting", address=self.address, hint="run kvctl init")
        else:
            await self._open(found)

    def _check_address(self, found: identities.Identity) -> None:
        """The others look for this node at the address of init; elsewhere, this is the directory of another node."""
        known = {node.node_id: node.address for node in found.nodes}[found.node_id]
        if self.address != known:
            raise DataDirectoryError(
                f"{self._directory} belongs to node {found.node_id}, which is at {known}, not at {self.address}:"
                " name the right --dir, or start it with that --listen or --advertise"
            )

    async def initialize(self, request: InitRequest) -> None:
        """Become a member of a new cluster. Again with the same request: nothing.

        Raises: WrongCluster, InvalidArgument (a wrong plan, another address than ours, or a clock far ahead), NotReady,
        StorageError. It can be tried again, unless the node failed.
        """
        check(request)
        if self.state in ("draining", "stopped"):
            raise NodeStopped
        if self.cluster_id:
            if (self.cluster_id, self.node_id) != (request.cluster_id, request.your_node_id):
                raise WrongCluster(f"this node is node {self.node_id} of cluster {self.cluster_id}")
            if self.fatal.done():
                raise NotReady("the node failed: its log tells why; start it again")
            return
        if self._initializing.locked() or self.state != "waiting":
            raise NotReady("an initialisation is under way; try again")
        self._check_plan(request)
        async with self._initializing:
            engine = self.adapters.open_engine(empty=True)
            try:
                engine.write(identities.first_rows(request))
                await self.adapters.executor.run(engine.flush)
            finally:
                engine.close()
            if self.state != "waiting":
                raise NodeStopped("the node was stopped before it was initialized")
            found = identities.identity_of(request)
            files = self.adapters.open_log()
            try:
                wal = starting.begin_log(files, self.config.log.segment_bytes)
                self._files.write_file(identities.FILE_NAME, identities.encode_identity(found))
            except BaseException:
                files.close()
                raise
            self._log = files
            try:
                await self._open(found, wal)
            except Exception as error:
                self._on_fatal(error)  # a member that is half open: only a new start helps
                raise

    def _check_plan(self, request: InitRequest) -> None:
        """Under another address than ours, the next start would refuse the directory (`_check_address`). And timestamps would
        begin at a time that is far ahead, and stand there until it has come: nothing would grow old.
        """
        planned = {node.node_id: node.address for node in request.nodes}[request.your_node_id]
        if planned != self.address:
            raise InvalidArgument(
                f"this node is at {self.address}, not at {planned}: start it with --advertise {planned}, or give "
                f"`kvctl init` {self.address}"
            )
        ahead_s = (request.created_ms - self.adapters.clock.wall_ms()) // 1000
        if ahead_s > CLOCKS_APART_S_MAX:
            raise InvalidArgument(
                f"the clock of who sends this plan is {ahead_s} s ahead of this node's: correct one of them, and run "
                "`kvctl init` again"
            )

    async def stop(self, drain: bool = True) -> None:
        """Answer what is under way and hand over leadership (drain), then end everything in order. May be called again.

        Until then we are there for everybody: for new streams of clients and peers, and for who asks how we are. Whoever still
        writes through us finds the next leader.
        """
        if self.state == "stopped":
            return
        if drain and not self.fatal.done():
            self.state = "draining"
            finishing = asyncio.ensure_future(self.adapters.finish())
            try:
                if self.leadership is not None and self.host and self.host.failure is None:
                    await self.leadership.drain_during(finishing)
                await finishing
            finally:
                finishing.cancel()
        self.state = "stopped"
        async with self._initializing:
            pass  # it looks at the state when it goes on: nothing is opened behind our back
        if self._timer is not None:
            self._timer.cancel()
        if self._remote is not None:
            await self._remote.close()
        for stream in list(self._streams.values()):
            stream.abort()
        if self.peers is not None:
            await self.peers.close()
        if self.host is not None:
            self.host.stop()
        for task in self._tasks[1:]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:  # each is given up, whatever becomes of the others: nobody asks twice
            if self.engine is not None:
                await self.adapters.executor.run(self.engine.close)
        finally:
            try:
                if self._log is not None:
                    self._log.close()
            finally:
                await self.adapters.close()

    async def _open(self, found: identities.Identity, wal: Wal | None = None) -> None:
        """Recover log and engine, build the rest, begin to turn. `wal`: of a new member, begun in `_log`."""
        born, self.state = self.state == "waiting", "starting"
        config, adapters = self.config, self.adapters
        self.cluster_id, self.node_id = found.cluster_id, found.node_id
        engine = self.engine = cached(adapters.open_engine(), config.storage.read_cache_bytes)
        ranges = starting.ranges_of(engine, found)  # of another member: its log is left alone, too
        recovered: dict[int, GroupLog] = {}
        if wal is None:
            files = self._log = adapters.open_log()
            wal, recovered = starting.recover_log(files, config.log.segment_bytes)
            starting.check_log(ranges, recovered)
        assert self._log is not None
        self.wal = wal
        store = self.store = self._new_store(found, engine)
        peers = self.peers = PeerSet(
            network=adapters.network,
            hello=self._hello,
            rng=adapters.random.stream("peers"),
            clock=adapters.clock,
            limits=self._link_limits,
            backoff=Backoff(max_s=config.network.reconnect_max_s),
            dial_timeout_s=config.network.connect_timeout_s,
        )
        host = self.host = Host(
            node=found.node_id,
            wal=wal,
            files=self._log,
            machine=store,
            peers=peers,
            clock=adapters.clock,
            rng=adapters.random.stream("raft"),
            raft_config=raft_config(config.raft),
            sync_mode=config.log.sync_mode,
            run_in_thread=adapters.executor.run,
            on_fatal=self._on_fatal,
            limits=HostLimits(inbox_bytes_max=config.limits.inbox_bytes),
        )
        timeout_s = config.raft.election_timeout_s
        leading = self.leadership = Leadership(host, store, peers, adapters.clock, timeout_s)
        self._remote = RemoteRanges(self, self._link_limits)
        store.attach(host, self._remote)
        store.on_deadline = self._arm
        store.on_settled = self.connections.flush
        store.send_closed, peers.on_snapshot_link_lost = peers.send_closed, host.snapshot_link_lost
        self._add_replicas(ranges, wal, recovered, born=born)
        for node in found.nodes:
            if node.node_id != found.node_id:
                peers.add(node.node_id, node.address)
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(host.run()),
            loop.create_task(self._flush_forever()),
            loop.create_task(leading.balance_forever()),
        ]
        for task in self._tasks:
            task.add_done_callback(self._on_task_end)
        self._remote.start()
        self.state = "ready"
        log.info("ready", node=self.node_id, cluster=self.cluster_id, ranges=len(store.replicas))

    def _new_store(self, found: identities.Identity, engine: Engine) -> Store:
        config = self.config
        store = Store(
            node=found.node_id,
            cluster=found.cluster_id,
            engine=engine,
            clock=self.adapters.clock,
            limits=txn_limits(config.txn),
            requests_max=config.limits.requests_in_flight,
            inbox_bytes_max=config.limits.inbox_bytes,
            oracle_window_ms=int(config.txn.oracle_window_s * 1000),
            closed_lag_s=config.txn.closed_lag_s,
            snapshot_hold_s=config.txn.snapshot_hold_s,
            watches_max=config.limits.watches,
            watch_recent_rows=config.limits.watch_recent_rows,
        )
        store.addresses = {node.node_id: node.address for node in found.nodes}
        return store

    def _add_replicas(
        self,
        ranges: Sequence[starting.FoundRange],
        wal: Wal,
        recovered: dict[int, GroupLog],
        *,
        born: bool,
    ) -> None:
        """If the log is damaged, records of any range may be lost: one without any may have voted, and is not begun anew.

        Raises: LogMismatch.
        """
        assert self.store is not None
        assert self.host is not None
        assert self.leadership is not None
        for row, config, membership in ranges:
            kept = recovered.get(row.range_id)
            if kept is None and wal.recovery and wal.recovery.damage:
                kept = wal.doubt(row.range_id)
            self.leadership.preferred[row.range_id] = config.preferred_node
            replica = self.store.add(row, config)
            self.host.add_group(
                row.range_id,
                config.replica_id,
                kept,
                membership,
                replica.applied,
                installed=(config.installed_index, config.installed_term),
                installing=row.installing,
                born=born,
            )
            tell_damage(row.range_id, kept, self.host.refused)

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        """A task of ours that fails must not fail in silence: without flushes, say, the log grows for ever."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_fatal(error)

    def _on_fatal(self, error: BaseException) -> None:
        self.state = "failed"
        if not self.fatal.done():
            self.fatal.set_exception(error)

    # -- streams

    def refuse_clients(self, error: KVError) -> None:
        """End their streams, and tell `error` to those that come from now on: for clients that have no other node."""
        self._refusal = error
        for stream in list(self._streams.values()):
            if stream.peer.kind == "client":
                stream.abort()

    def _hello(self, kind: str, to: int) -> Hello:
        return Hello(
            cluster=self.cluster_id, node=self.node_id, kind=kind, to=to, address=self.address
        )

    def _check(self, kind: str) -> Callable[[Hello], KVError | None]:
        def refusal(hello: Hello) -> KVError | None:
            if kind == "client" and self._refusal is not None:
                return self._refusal
            if not self.cluster_id:
                return NotReady("the node is not a member of a cluster yet: run kvctl init")
            if hello.kind != kind:
                return WrongNode(f"this path is for streams of kind {kind}, not {hello.kind}")
            if kind != "client" and (self.store is None or hello.node not in self.store.addresses):
                return WrongNode(f"node {hello.node} is not a member")
            return None

        return refusal

    async def _on_pipe(self, path: str, pipe: FramePipe) -> None:
        kind = {CLIENT_PATH: "client", PEER_PATH: "peer", SNAPSHOT_PATH: "snapshot"}[path]
        try:
            stream = await accept(
                pipe,
                Hello(
                    cluster=self.cluster_id, node=self.node_id, kind="node", address=self.address
                ),
                limits=self._link_limits,
                check=self._check(kind),
                monotonic=self.adapters.clock.monotonic,
            )
        except FrameError as error:
            self._malformed(kind, error)
            raise
        self._streams[id(stream)] = stream
        try:
            if self.store is None or self.state == "stopped":
                return
            if kind == "client":
                self.connections.add(self.store, stream)
            else:
                assert self.peers is not None
                assert self.roster is not None
                self.roster.note(stream.peer.node)
                self.peers.heard_from(stream.peer.node)
                stream.on_message = self._receiver(kind, stream.peer.node)
            ended = await stream.wait_closed()
            if isinstance(ended, FrameError):
                self._malformed(kind, ended)
        except OSError as error:
            self._on_fatal(error)  # nothing may be read from a member that could not be noted
        finally:
            stream.abort()
            self._streams.pop(id(stream), None)

    def _malformed(self, kind: str, error: FrameError) -> None:
        """Somebody does not speak our protocol: his connection ends, and the operator can see it."""
        self.connections.malformed += 1
        log.warning("malformed", kind=kind, error=str(error))

    def _receiver(self, kind: str, node: int) -> Callable[[bytes], None]:
        host, store = self.host, self.store
        assert host is not None
        assert store is not None
        if kind == "snapshot":
            return lambda payload: host.receive_snapshot_chunk(node, payload)

        def receive(payload: bytes) -> None:
            if payload[:1] == CLOSED_TIMESTAMPS:
                store.closer.hear(payload[1:])
                return
            if payload[:1] != RAFT_MESSAGES:
                raise FrameError("not a message of replication")
            host.receive(node, decode_messages(memoryview(payload)[1:]), len(payload))

        return receive

    # -- time and upkeep

    def _arm(self, when: float) -> None:
        """Wake the store at a time (monotonic seconds of our clock)."""
        if self._timer is not None:
            if self._timer_at <= when:
                return
            self._timer.cancel()
        self._timer_at = when
        delay = max(0.0005, when - self.adapters.clock.monotonic())
        self._timer = asyncio.get_running_loop().call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self.store is not None:
            self.store.wake()

    async def _flush_forever(self) -> None:
        """Flush the engine by size and by age, then let the log go (note, flush, only then cut)."""
        assert self.host is not None
        while True:
            await asyncio.sleep(FLUSH_CHECK_S)
            written = self.host.stats()["synced_bytes"] - self._flushed_bytes
            age_s = self.adapters.clock.monotonic() - self._flushed_at
            limits = self.config.log
            due = written >= limits.flush_bytes or age_s >= limits.flush_interval_s
            if written > 0 and (due or chance("flush_early")):
                await self.flush()

    async def flush(self) -> None:
        """Make what is applied durable in the engine, and cut the log below it."""
        assert self.host is not None
        assert self.store is not None
        assert self.engine is not None
        self._flushed_bytes = self.host.stats()["synced_bytes"]
        self._flushed_at = self.adapters.clock.monotonic()
        noted = {
            number: replica.applied[0]
            for number, replica in self.store.replicas.items()
            if not replica.state.row.installing
        }
        try:
            await self.adapters.executor.run(self.engine.flush)
        except KVError as error:
            self._on_fatal(error)
            return
        self.flushes += 1
        for range_id, replica_id in self.host.flushed(noted):
            log.warning(
                "too much was written since a replica's snapshot began: it needs another one",
                range=range_id,
                replica=replica_id,
            )

    # -- what operators see

    def live(self) -> bool:
        return not self.fatal.done()

    def ready(self) -> tuple[bool, str]:
        """Whether requests are served, and if not, why."""
        if self.state != "ready":
            return False, self.state
        if self.database is None or self.leadership is None:
            return False, "no node of the cluster has told the ranges yet"
        leaderless = self.leadership.leaderless()
        if leaderless:
            more = f" and {len(leaderless) - 1} more have" if leaderless[1:] else " has"
            return False, f"range {leaderless[0]}{more} no leader that this node knows of"
        return True, "ready"

    def measures(self) -> NodeMeasures | None:
        """What was noted of times and sizes; None until the node is a member."""
        if self.host is None or self.store is None:
            return None
        return NodeMeasures(self.host.measures, self.store.measures)

    def status(self) -> dict[str, Any]:
        """A JSON-able picture of the node."""
        return node_status(self)

    def locks(self) -> dict[str, Any]:
        """The same of the locks of transactions."""
        return node_locks(self)


def production_adapters(config: NodeConfig) -> Adapters:
    """The real world: RocksDB, files, sockets, threads, clocks."""
    from kvstore.adapters.production import ProductionAdapters

    return ProductionAdapters(config)
