"""The real world for one node: files, RocksDB, sockets, threads, clocks."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import sys
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from aiohttp import web

from kvstore.adapters.http_server import Gateway, add_routes
from kvstore.adapters.rocks_engine import RocksConfig, RocksEngine
from kvstore.adapters.system import SystemClock, SystemRandom, ThreadExecutor
from kvstore.adapters.wal_files import DirectoryFiles, DirectoryLogFiles, make_directory
from kvstore.adapters.ws_transport import WsNetwork, connections_max
from kvstore.bootstrap import parse_address
from kvstore.config import NodeConfig
from kvstore.errors import CorruptionError, DataDirectoryError
from kvstore.identity import FILE_NAME, left_by_init
from kvstore.metrics import NodeMetrics
from kvstore.ports import FramePipe, Network
from kvstore.roster import FILE_NAME as ROSTER_NAME
from kvstore.starting import NOT_ALLOWED, not_allowed
from kvstore.status import VERSION
from replication.errors import LogFormatError
from replication.wal_scan import scan

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from kvstore.client import Database
    from kvstore.node import Node

THREADS_MAX = 4
LOOP_LAG_EVERY_S = 0.1
OF_THE_DISK = "lost+found"  # a directory at the top of a file system, which is nobody's
OnPipe = Callable[[str, FramePipe], Awaitable[None]]


class ClosableNetwork(Network, Protocol):
    async def close(self) -> None: ...


class ProductionAdapters:
    """See kvstore.node.Adapters."""

    def __init__(self, config: NodeConfig, network: ClosableNetwork | None = None) -> None:
        self.clock = SystemClock()
        self.random = SystemRandom()
        self.executor = ThreadExecutor(THREADS_MAX, "kvorum")
        self.network: ClosableNetwork = network or WsNetwork()
        self._config = config
        self._directory = Path()
        self._loop_lag = _LoopLag()
        self._gateway: Gateway | None = None
        self._lock = -1
        self._locked_by = 0  # process id

    def open_directory(self, directory: str) -> DirectoryFiles:
        self._directory = Path(directory)
        try:
            for path in (self._directory, self._directory / "rocks", self._directory / "wal"):
                _check_link(path)
            make_directory(self._directory)
            self._lock = os.open(
                self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644
            )
        except OSError as error:
            raise DataDirectoryError(
                f"{directory} cannot hold the data ({error.strerror}): name another --dir"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            self._lock = -1
            raise DataDirectoryError(
                f"{directory} is in use by another process: stop it, or name another --dir"
            ) from None
        self._locked_by = os.getpid()
        try:
            if not (self._directory / FILE_NAME).exists() and (what := self._of_a_member()):
                # it comes after node.toml is durable: `kvctl init` would wipe what this member held
                raise DataDirectoryError(
                    f"{directory} holds {what} but no {FILE_NAME}: put back what is missing, or name another --dir"
                )
        except BaseException:
            self._unlock()
            raise
        return DirectoryFiles(self._directory)

    def _of_a_member(self) -> str:
        """What no directory holds unless it was a member's; empty if it holds nothing of that kind."""
        if _holds_records(self._directory / "wal"):
            return "a log"
        if self._holds_rows():
            return "rows"
        if (self._directory / ROSTER_NAME).exists():
            return ROSTER_NAME  # of a former cluster, it would be taken for what this one has heard
        return ""

    def _holds_rows(self) -> bool:
        """Whether `rocks` has more than an unfinished initialisation leaves, or may have had.

        Raises: KVError, if it cannot be opened for a reason that says nothing of that.
        """
        rocks = self._directory / "rocks"
        if not any(rocks.glob("*.sst")):  # all rows are in these: RocksDB's own log is off
            return False
        if not (rocks / "CURRENT").exists():
            return True
        try:
            with closing(RocksEngine(rocks, self._rocks_config())) as engine:
                return not left_by_init(engine.scan(b"", None))
        except CorruptionError:
            return True

    def open_engine(self, *, empty: bool = False) -> RocksEngine:
        path = self._directory / "rocks"
        if empty:
            _empty(path)
            _empty(self._directory / "wal")
        elif not (path / "CURRENT").exists():
            # RocksDB would make an empty one: a member that knows nothing of its ranges, and seems to be well
            raise DataDirectoryError(
                f"{self._directory} belongs to a member of a cluster, but its rows are gone ({path} holds none): put rocks and "
                "wal back as they were, or name the right --dir"
            )
        return RocksEngine(path, self._rocks_config())

    def _rocks_config(self) -> RocksConfig:
        storage = self._config.storage
        return RocksConfig(
            block_cache_bytes=storage.cache_bytes,
            write_buffer_bytes=storage.write_buffer_bytes,
            open_files_max=_tables_open_max(),
        )

    def open_log(self) -> DirectoryLogFiles:
        try:
            return DirectoryLogFiles(self._directory / "wal")
        except OSError as error:
            if error.errno not in NOT_ALLOWED:
                raise
            raise not_allowed("the log cannot be opened", error) from error

    async def serve(self, address: str, on_pipe: OnPipe, node: Node) -> str:
        metrics = NodeMetrics(node.status, VERSION, node.measures)
        app = web.Application(client_max_size=self._config.http.body_bytes_max)
        surface = _Surface(node, metrics.registry, address)
        self._gateway = add_routes(app, surface, metrics.observe_request, self._config.http)
        assert isinstance(self.network, WsNetwork)
        served_at = await self.network.serve(address, on_pipe, app)
        self._loop_lag.start(metrics.observe_loop_lag)
        return served_at

    async def finish(self) -> None:
        if self._gateway is not None:
            await self._gateway.finish(self._config.http.shutdown_timeout_s)

    async def close(self) -> None:
        self._loop_lag.stop()
        try:
            await self.network.close()
        finally:
            self.executor.close()
            self._unlock()

    def _unlock(self) -> None:
        if self._lock >= 0:
            if (
                os.getpid() == self._locked_by
            ):  # not a forked child that tidies up: the lock is its parent's
                fcntl.flock(self._lock, fcntl.LOCK_UN)  # a child may hold the file open still
            os.close(self._lock)
            self._lock = -1


def _tables_open_max() -> int:
    """Half of the files that connections leave (`connections_max`): the log, and whatever else there is, have the rest."""
    most = connections_max()
    return -1 if most == sys.maxsize else most // 6


def _check_link(path: Path) -> None:
    """Raises: DataDirectoryError: it links to nothing, for that disk is not mounted, say; making it would fail of the link."""
    if path.is_symlink() and not path.exists():
        raise DataDirectoryError(
            f"{path} links to {path.readlink()}, which is not there: mount its disk, or name another --dir"
        )


def _holds_records(wal: Path) -> bool:
    """Whether the log in it has records of any range, or may have had; one that was only begun has none, and one segment."""
    if not any(wal.glob("*.log")):
        return False
    files = DirectoryLogFiles(wal, spare=False)
    try:
        if files.segments() != [1]:
            return True
        recovery, found, _ = scan(files)
        return bool(found or recovery.damage)
    except (OSError, LogFormatError):
        return True
    finally:
        files.close()


def _empty(directory: Path) -> None:
    """Of what is in it, or where it links to. Raises: DataDirectoryError: something stayed."""
    try:  # the directory itself stays: it may be a link, or a disk of its own
        found = list(directory.iterdir()) if directory.exists() else []
        # tables first: what a cut leaves then has no rows, so it is no obstacle to the next initialisation
        for each in sorted(found, key=lambda each: each.suffix != ".sst"):
            if each.is_dir() and not each.is_symlink():
                if each.name != OF_THE_DISK:
                    shutil.rmtree(each)
            else:
                each.unlink()
    except OSError as error:
        raise DataDirectoryError(
            f"{directory} cannot be emptied ({error.strerror}): remove what an unfinished `kvctl init` left there, or name "
            "another --dir"
        ) from error


class _LoopLag:
    """Tells ten times a second how late the running loop's timer was, from `start` to `stop`."""

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None

    def start(self, observe: Callable[[float], None]) -> None:
        loop = asyncio.get_running_loop()

        def tick(due: float) -> None:
            now = loop.time()
            if due:
                observe(max(0.0, now - due))
            due = now + LOOP_LAG_EVERY_S
            self._timer = loop.call_at(due, tick, due)

        tick(0.0)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class _Surface:
    """A node as the HTTP gateway wants it."""

    def __init__(self, node: Node, registry: CollectorRegistry, listen: str) -> None:
        self._node = node
        self.names = frozenset(parse_address(each)[0].lower() for each in (listen, node.address))
        self.registry = registry
        self.status, self.live, self.ready = node.status, node.live, node.ready
        self.initialize, self.locks = node.initialize, node.locks

    @property
    def database(self) -> Database | None:
        return self._node.database

    @property
    def cluster_id(self) -> str:
        return self._node.cluster_id

    @property
    def node_id(self) -> int:
        return self._node.node_id

    @property
    def state(self) -> str:
        return self._node.state
