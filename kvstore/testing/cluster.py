"""A cluster of real processes on this machine, for tests and demonstrations.

Every node is a child process in a session of its own, so that Ctrl-C at a terminal does not reach it, and holds one
end of a pipe from us: when our end closes, however we ended, the node stops. Ports are chosen by the operating system
at the first start and kept from then on. Signals go to the process id of one child only, never to one that was reaped.

    with LocalCluster(nodes=3) as cluster:
        with kvstore.Client(cluster.endpoints) as db: ...
        cluster.kill(0)

    async with LocalCluster(nodes=3) as cluster:
        async with kvstore.connect(cluster.endpoints) as db: ...
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import kvstore
from kvstore import bootstrap
from kvstore.adapters import http_client
from kvstore.errors import KVError, Unavailable

POLL_S: Final = 0.02
REQUEST_TIMEOUT_S: Final = 5.0
LOG_TAIL_BYTES: Final = 4_000


class NodeProcess:
    """One node: its directory, its address once known, and its process while there is one."""

    def __init__(self, number: int, directory: Path, environment: Mapping[str, str]) -> None:
        self.number = number
        self.directory = directory
        self.log_path = directory / "node.log"
        self.address = _first_line(directory / "address")  # of an earlier run on this directory
        self.paused = False
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._stop_pipe = -1

    @property
    def running(self) -> bool:
        """Whether the process exists (a paused one does)."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id. Raises Unavailable when it does not run."""
        if self._process is None or self._process.poll() is not None:
            raise Unavailable(f"node {self.number} does not run")
        return self._process.pid

    def spawn(self) -> None:
        """Start the process; `wait_address` tells when it listens."""
        assert not self.running, f"node {self.number} runs already"
        self.directory.mkdir(parents=True, exist_ok=True)
        self._address_file.unlink(missing_ok=True)
        theirs, ours = (
            os.pipe()
        )  # neither is inherited but for pass_fds: no sibling holds our end open
        try:
            with self.log_path.open("ab") as log:
                self._process = subprocess.Popen(  # noqa: S603  (our own interpreter and module)
                    self._command(theirs),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    pass_fds=(theirs,),
                    start_new_session=True,
                )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self._close_pipe()
        self._stop_pipe = ours
        self.paused = False

    def wait_address(self, deadline: float) -> None:
        """Wait until the node listens. Raises Unavailable with the end of its log when it ends, or time runs out."""
        while True:
            with contextlib.suppress(FileNotFoundError):
                self.address = self._address_file.read_text().strip()
                (self.directory / "address").write_text(self.address)
                return
            if not self.running:
                raise Unavailable(f"node {self.number} ended at start: {self.log_tail()}")
            if time.monotonic() > deadline:
                raise Unavailable(f"node {self.number} does not listen yet: {self.log_tail()}")
            time.sleep(POLL_S)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this process alone. Raises Unavailable when it does not run."""
        os.kill(self.pid, number)

    def wait(self, timeout_s: float) -> int | None:
        """The exit status; None if it still runs when time is up."""
        if self._process is None:
            return None
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def ended(self) -> None:
        """Release the pipe of a process that has ended."""
        self._close_pipe()

    def log_tail(self) -> str:
        try:
            text = self.log_path.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
        except FileNotFoundError:
            return "(no log)"
        return text or "(the log is empty)"

    @property
    def _address_file(self) -> Path:
        return self.directory / "listening"

    def _command(self, parent_fd: int) -> list[str]:
        command = [sys.executable, "-P", "-m", "kvstore.cli.server", "start"]
        command += [
            "--dir",
            str(self.directory / "data"),
            "--listen",
            self.address or "127.0.0.1:0",
        ]
        return [*command, "--address-file", str(self._address_file), "--parent-fd", str(parent_fd)]

    def _close_pipe(self) -> None:
        if self._stop_pipe >= 0:
            os.close(self._stop_pipe)
            self._stop_pipe = -1


class LocalCluster:
    """`nodes` processes that form one cluster. Nodes are numbered from 0 here; node ids are one higher.

    Args: directory: where data and logs go; a temporary one, made at the start and removed at the end, if None. A directory
    that holds a cluster already is opened again only if its ports are free. splits: the keys at which the key space is cut
    at first.
    settings: configuration by environment name, such as {"KVORUM_RAFT__ELECTION_TIMEOUT": "300ms"}.

    `start`, `stop`, `restart`, `wait_ready`, `status` and `busiest` have a twin for asyncio that ends in `_async`.
    """

    def __init__(
        self,
        nodes: int = 3,
        *,
        directory: str | os.PathLike[str] | None = None,
        splits: Sequence[bytes] = (),
        replicas: int = bootstrap.REPLICAS_DEFAULT,
        settings: Mapping[str, str] | None = None,
        start_timeout_s: float = 30.0,
        stop_timeout_s: float = 10.0,
    ) -> None:
        if nodes < 1:
            raise ValueError("a cluster has at least one node")
        self._temporary = directory is None
        self._made = False  # the temporary directory is there
        own = Path(tempfile.gettempdir()) / f"kvorum-{secrets.token_hex(8)}"
        self.directory = Path(own if directory is None else directory).resolve()
        self._spawning = threading.Lock()  # between a spawn and the end: none may come after it
        self._stopped = False
        self._splits = tuple(splits)
        self._replicas = replicas
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        environment = _child_environment(settings or {})
        self.nodes = [
            NodeProcess(n, self.directory / f"node{n + 1}", environment) for n in range(nodes)
        ]
        self.cluster_id = ""
        self.keep = False  # set it to keep a temporary directory, for who wants to look at it

    @property
    def addresses(self) -> list[str]:
        """HOST:PORT of every node, running or not."""
        return [node.address for node in self.nodes]

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called, and no start since: no node can be started alone."""
        return self._stopped

    @property
    def endpoints(self) -> str:
        """The addresses as one text, as `kvstore.connect` takes them."""
        return ",".join(self.addresses)

    def start(self) -> None:
        """Start all nodes, make them a cluster, and wait until it serves. Stops them again if that fails."""
        self._stopped = False
        self._start()

    def _start(self) -> None:
        try:
            self._start_processes()
            self.init()
            self.wait_ready()
            self.wait_leaders()
        except BaseException:
            self.stop()
            raise

    def start_processes(self) -> None:
        """Start all nodes, without `init`: they listen and wait."""
        self._stopped = False
        self._start_processes()

    def _start_processes(self) -> None:
        deadline = self._deadline()
        for node in self.nodes:
            self._spawn(node)
        for node in self.nodes:
            node.wait_address(deadline)

    def init(self) -> None:
        """Make the nodes a cluster, as `kvctl init` does; may be repeated."""
        from kvstore.cli.init import initialize

        self.cluster_id = initialize(
            self.addresses,
            self._splits,
            replicas=self._replicas,
            timeout_s=self._start_timeout_s,
        ).cluster_id

    def wait_ready(
        self, numbers: Sequence[int] | None = None, timeout_s: float | None = None
    ) -> None:
        """Wait until these nodes (all that run, if None) say that they are ready. Raises Unavailable when time is up."""
        deadline = self._deadline(timeout_s)
        for node in self._running() if numbers is None else [self.nodes[n] for n in numbers]:
            self._wait_node_ready(node, deadline)

    def wait_leaders(self, timeout_s: float | None = None) -> None:
        """Wait until every range has a leader. Raises Unavailable if time runs out."""
        deadline = self._deadline(timeout_s)
        while True:
            leaders, known = self._leaders()
            leaderless = [range_id for range_id in known if range_id not in leaders]
            if known and not leaderless:
                return
            if self._stopped or time.monotonic() > deadline:
                raise Unavailable(f"ranges without a leader: {leaderless or 'all'}")
            time.sleep(POLL_S)

    def stop(self) -> None:
        """End every process: SIGTERM, and SIGKILL for what is still there later. May be repeated.

        After it no node starts, not even by a `restart` under way, until the cluster is started again.
        """
        with self._spawning:
            self._stopped = True
        for node in self._running():
            with contextlib.suppress(Unavailable):
                node.signal(signal.SIGTERM)
                if node.paused:
                    node.signal(signal.SIGCONT)
        deadline = self._deadline(self._stop_timeout_s)
        for node in self.nodes:
            node.wait(max(0.0, deadline - time.monotonic()))
            self._end(node)
        if self._made and not self.keep:
            shutil.rmtree(self.directory, ignore_errors=True)
            self._made = False

    def terminate(self, number: int) -> int | None:
        """Ask one node to drain and stop; its exit status, None if it had to be killed."""
        node = self.nodes[number]
        node.signal(signal.SIGTERM)
        status = node.wait(self._stop_timeout_s)
        self._end(node)
        return status

    def kill(self, number: int) -> None:
        """SIGKILL to one node; returns when it is gone."""
        self._kill(self.nodes[number])

    def restart(self, number: int, *, ready: bool = True) -> None:
        """Start a node that has ended, on its directory and its address, and wait until it is a member again (or listens).

        It serves as soon as enough of the others run: `wait_ready` waits for that.
        Raises: Unavailable: it does not come up in time, or the cluster was stopped.
        """
        node = self.nodes[number]
        deadline = self._deadline()
        while True:
            self._spawn(node)
            try:
                node.wait_address(deadline)
                break
            except (
                Unavailable
            ):  # for a moment, another process may have our port as the source of a connection
                if (
                    node.running
                    or "address_in_use" not in node.log_tail()
                    or time.monotonic() > deadline
                ):
                    raise
                time.sleep(0.2)
        if ready:
            self._wait_node_ready(node, deadline, serves=False)

    def pause(self, number: int) -> None:
        """SIGSTOP: the node lives and answers nothing."""
        self.nodes[number].signal(signal.SIGSTOP)
        self.nodes[number].paused = True

    def resume(self, number: int) -> None:
        self.nodes[number].signal(signal.SIGCONT)
        self.nodes[number].paused = False

    def status(self, number: int) -> dict[str, Any]:
        """What a node says of itself. Raises Unavailable when it does not answer."""
        address = self.nodes[number].address
        answer = http_client.request_json(
            address, "GET", "/v1/admin/status", timeout_s=REQUEST_TIMEOUT_S
        )
        return dict(answer)

    def leaders(self) -> dict[int, int]:
        """Range id -> number of the node that leads it, as the nodes that answer see it; the highest term wins."""
        return self._leaders()[0]

    def busiest(self) -> int:
        """The running node that leads the most ranges (the first of several). Raises Unavailable if no node runs."""
        led = list(self.leaders().values())
        running = [node.number for node in self._running()]
        if not running:
            raise Unavailable("no node runs")
        return max(running, key=lambda number: (led.count(number), -number))

    async def start_async(self) -> None:
        """As `start`. If it is cancelled, what it began ends first: nothing is left running."""
        self._stopped = False
        loop = asyncio.get_running_loop()
        starting = loop.run_in_executor(
            None, self._start
        )  # no task, which the end of a loop cancels
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            self._stopped = True
            await _to_its_end(starting)
            await _to_its_end(loop.run_in_executor(None, self.stop))
            raise

    async def stop_async(self) -> None:
        await asyncio.to_thread(self.stop)

    async def restart_async(self, number: int, *, ready: bool = True) -> None:
        await asyncio.to_thread(self.restart, number, ready=ready)

    async def wait_ready_async(
        self, numbers: Sequence[int] | None = None, timeout_s: float | None = None
    ) -> None:
        await asyncio.to_thread(self.wait_ready, numbers, timeout_s)

    async def status_async(self, number: int) -> dict[str, Any]:
        return await asyncio.to_thread(self.status, number)

    async def busiest_async(self) -> int:
        return await asyncio.to_thread(self.busiest)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        await self.start_async()
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        await self.stop_async()

    def _leaders(self) -> tuple[dict[int, int], list[int]]:
        """And the ids of all ranges that are known."""
        best: dict[int, tuple[int, int]] = {}
        known: dict[int, None] = {}
        for node in self._running():
            if node.paused:
                continue
            with contextlib.suppress(KVError):
                for each in self.status(node.number).get("ranges", []):
                    known[int(each["id"])] = None
                    term = int(each.get("term", 0))
                    if (
                        each.get("role") == "leader"
                        and term >= best.get(int(each["id"]), (0, 0))[0]
                    ):
                        best[int(each["id"])] = (term, node.number)
        return {range_id: number for range_id, (_, number) in sorted(best.items())}, sorted(known)

    def _spawn(self, node: NodeProcess) -> None:
        with self._spawning:
            if self._stopped:
                raise Unavailable(f"node {node.number} does not start: the cluster is stopped")
            if self._temporary and not self._made:
                self.directory.mkdir(mode=0o700)  # raises if somebody has one of that name
                self._made = True
            node.spawn()

    def _running(self) -> list[NodeProcess]:
        return [node for node in self.nodes if node.running]

    def _end(self, node: NodeProcess) -> None:
        """Kill it, unless it ends by itself just now."""
        with contextlib.suppress(Unavailable):
            self._kill(node)
        node.ended()

    def _kill(self, node: NodeProcess) -> None:
        node.signal(signal.SIGKILL)
        node.wait(self._stop_timeout_s)
        node.ended()

    def _wait_node_ready(self, node: NodeProcess, deadline: float, *, serves: bool = True) -> None:
        """serves: else it need not have found the leaders of its ranges."""
        while True:
            try:
                answer = http_client.request(
                    node.address, "GET", "/health/ready", timeout_s=REQUEST_TIMEOUT_S
                )
                if answer.status == 200:
                    return
                if not serves and json.loads(answer.body).get("state") == "ready":
                    return
                reason = answer.body.decode(errors="replace")
            except Unavailable as error:
                reason = error.message
            if not node.running or self._stopped:
                raise Unavailable(f"node {node.number} ended: {node.log_tail()}")
            if time.monotonic() > deadline:
                raise Unavailable(f"node {node.number} is not ready: {reason}\n{node.log_tail()}")
            time.sleep(POLL_S)

    def _deadline(self, timeout_s: float | None = None) -> float:
        return time.monotonic() + (self._start_timeout_s if timeout_s is None else timeout_s)


async def _to_its_end(work: asyncio.Future[None]) -> None:
    """Wait for what a thread does, however often who waits is cancelled. Its failure is nobody's any more."""
    while not work.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(asyncio.shield(work), return_exceptions=True)
    work.exception()


def _first_line(path: Path) -> str:
    try:
        return path.read_text().partition("\n")[0].strip()
    except FileNotFoundError:
        return ""


def _child_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Ours, with the settings, and with our own package first on the path unless it is installed."""
    environment = {**os.environ, **settings, "PYTHONUNBUFFERED": "1"}
    environment.pop("KVORUM_PARENT_FD", None)
    root = Path(kvstore.__file__).resolve().parent.parent
    if root.name not in ("site-packages", "dist-packages"):
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, (str(root), environment.get("PYTHONPATH")))
        )
    return environment
