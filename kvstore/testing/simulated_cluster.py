"""A cluster under virtual time, for users' tests: real nodes and clients of the product on simulated machines.

`SimCluster` is the friendly side of `kvstore.sim.cluster`: clients by `connect`, processes of the user's own code by
`spawn`, and faults by name. Nodes are named n1, n2, ...; the test's own client is `test`; others as they are called.
It lives on the simulated loop alone (`@simulate` brings that), and everything is drawn from the seed.

Whoever calls, faults are done by the world and not by the process that asked for them (`_as_world`): a killed caller
would take its own killing with it.
"""

from __future__ import annotations

import asyncio
import bisect
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

from kvstore.client import Database
from kvstore.sim import cluster as internal
from kvstore.sim.faults import Nemesis
from kvstore.sim.kept import KeptCluster
from kvstore.sim.loop import SimError, SimLoop
from kvstore.sim.process import PROCESS, Process, ProcessDied, outside
from kvstore.sim.trace import Trace

T = TypeVar("T")

NODES_MAX: Final = 9
CALL_TIMEOUT_S: Final = 30.0  # longer than the random faults last: then a call's outcome is known
READY_TIMEOUT_S: Final = 30.0
FIRST_DATA_RANGE: Final = 2  # range 1 keeps the cluster's own rows
TEST: Final = "test"
EVENTS_KEPT: Final = 30
EVENTS: Final = ("crash", "restart", "pause", "resume", "trap", "fault", "problem", "network")

CLIENT_FAULTS: Final = ("client_crash", "client_pause")  # of what `spawn` has started
FAULTS: Final = (
    "crash", "crash_leader", "crash_at_io", "blackout", "pause", "pause_leader", "partition", "one_way", "clog",
    "slow_path", "break", "flaky", "slow_disk", "sync_fails", "wall_jump", "drift", "flush", *CLIENT_FAULTS,
)  # fmt: skip
SHARE: Final = 0.4  # of the faults that a seed has, on average
CHAOS_S: Final = 10.0  # a wave of random faults ends after this, at the latest ...
CHAOS_FAULTS: Final = 25  # ... or after about so many
PEACE_S: Final = 5.0  # between two waves of them
WAVES_MAX: Final = 1_000
MEAN_S: Final = (0.01, 0.05, 0.3, 1.0)  # between two faults; short, for tests are
HOLD_S: Final = (0.1, 0.5, 1.5, 3.0)  # how long a fault lasts, about
DELAYS_S: Final = ((0.000_1, 0.001), (0.000_5, 0.005), (0.005, 0.05))  # of a frame


class Story(Trace):
    """A trace that also keeps the last events that a person wants to read, with their time since the start."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.lines: list[str] = []
        self.left_out = 0
        self._began = loop.time()

    def note(self, kind: str, *details: object) -> None:
        super().note(kind, *details)
        if kind in EVENTS:
            at = asyncio.get_running_loop().time() - self._began
            self.lines.append(f"{at:9.4f} s  {_told(kind, details)}")
            if len(self.lines) > EVENTS_KEPT:
                self.lines.pop(0)
                self.left_out += 1


def _told(kind: str, details: tuple[object, ...]) -> str:
    if kind == "crash" and len(details) == 3:
        name, power, _batches_lost = details
        return f"crash {name}, and its power" if power else f"crash {name}"
    return f"{kind} {' '.join(map(str, details))}".rstrip()


@dataclass
class Run:
    """One seed under way: what the clusters of a test share."""

    seed: int
    clusters: list[SimCluster] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)  # what failed, while there was no cluster


RUN: ContextVar[Run | None] = ContextVar("simulated run", default=None)


class Worker(Generic[T]):
    """The user's own code as a process of its own: it can be killed and paused, at any of its awaits."""

    def __init__(self, name: str, process: Process, task: asyncio.Task[T]) -> None:
        self.name = name
        self.awaited = False  # somebody has heard of its failure
        self._process = process
        self._task = task

    @property
    def running(self) -> bool:
        """Neither ended nor killed."""
        return not self._process.dead and not self._task.done()

    async def wait(self) -> T:
        """What its function returned. Raises what that raised; ProcessDied when it was killed."""
        try:
            return await asyncio.shield(self._task)
        except asyncio.CancelledError:
            raise  # who waited has learned nothing of it
        except BaseException:
            self.awaited = True
            raise

    def failure(self) -> BaseException | None:
        """What it failed with and nobody has been told by `wait`."""
        if self.awaited or not self._task.done() or self._task.cancelled():
            return None
        error = self._task.exception()
        own_death = isinstance(error, ProcessDied) and self._process.dead
        return None if own_death else error


class SimCluster:
    """`async with SimCluster() as cluster`, inside of a test with @simulate (which makes one for who asks for `cluster`).

    Args:
        seed: of every draw; that of the test if None.
        nodes: 1 to 9. splits: the keys at which the key space is cut.
        call_timeout_s: virtual seconds that each call of its clients has, retries included. The default outlasts the
        random faults, so that calls come to a definite end; a short one makes DeadlineExceeded and CommitUnknown frequent.
    """

    def __init__(
        self,
        seed: int | None = None,
        *,
        nodes: int = 3,
        splits: Sequence[bytes] = internal.SPLITS,
        call_timeout_s: float = CALL_TIMEOUT_S,
    ) -> None:
        if not 1 <= nodes <= NODES_MAX:
            raise ValueError(f"a simulated cluster has 1 to {NODES_MAX} nodes, not {nodes}")
        run = RUN.get()
        self.seed = seed if seed is not None else run.seed if run is not None else 0
        self._run = run
        self._number_of_nodes = nodes
        self._splits = tuple(sorted(splits))
        self._call_timeout_s = call_timeout_s
        self._inner: KeptCluster | None = None
        self._story: Story | None = None
        self._names: dict[str, str] = {}  # of clients: as users call them -> as the network does
        self._taken: dict[str, None] = {}  # names of these, and of those that are starting
        self._workers: dict[str, Worker[Any]] = {}
        self._chaos: list[asyncio.Task[None]] = []
        self._nemeses: list[Nemesis] = []
        self._waves = 0

    # --- life -------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Boot the nodes, make them a cluster, and wait until every range has a leader."""
        loop = asyncio.get_running_loop()
        if not isinstance(loop, SimLoop):
            raise SimError(
                "a simulated cluster needs virtual time: decorate the test with @simulate"
            )
        assert self._inner is None, "a cluster starts once"
        if self._run is not None:
            self._run.clusters.append(self)
        seed = f"user/{self.seed}/{len(self._run.clusters) if self._run else 0}"
        self.rng = random.Random(f"{seed}/test")
        self._draw = random.Random(f"{seed}/chaos")
        self._story = Story(loop)
        self._inner = outside(self._made, seed)
        await self._as_world(self._started())

    def _made(self, seed: str) -> KeptCluster:
        assert self._story is not None
        inner = KeptCluster(
            seed, nodes=self._number_of_nodes, splits=self._splits, trace=self._story
        )
        inner.network.delay_s = self._draw.choice(DELAYS_S)
        return inner

    async def _started(self) -> None:
        inner = self._cluster()
        await inner.start()
        until = inner.loop.time() + READY_TIMEOUT_S
        while not all(inner.leader_of(group) for group in inner.range_ids):
            if inner.loop.time() > until:
                raise SimError(f"the cluster does not serve after {READY_TIMEOUT_S:g} s")
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        """End random faults. What runs in the cluster ends with the test."""
        await self._as_world(self._end_chaos())

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    # --- who is there -----------------------------------------------------------------------------

    @property
    def nodes(self) -> list[str]:
        """The names of all nodes, running or not."""
        return list(self._cluster().servers)

    @property
    def running(self) -> list[str]:
        """The names of the nodes whose process is there; a paused one's is."""
        return [server.name for server in self._cluster().running()]

    def leader_of(self, key: bytes) -> str | None:
        """The name of the node that leads the range of this key; None while there is none."""
        number = bisect.bisect_right(self._splits, key)
        leader = self._cluster().leader_of(FIRST_DATA_RANGE + number)
        return leader.name if leader is not None else None

    # --- clients and processes --------------------------------------------------------------------

    async def connect(self, name: str = "", *, timeout_s: float | None = None) -> Database:
        """Another client in the test's own process, on a host of its own (so that it can be cut off by its name).

        Args: timeout_s: of each of its calls, virtual; the cluster's if None.
        """
        inner = self._cluster()
        with self._new_name(name, "client", len(self._names)) as own:
            client = await inner.client(
                own, timeout_s or self._call_timeout_s, process=PROCESS.get()
            )
        self._names[own] = client.name
        return client.database

    async def spawn(
        self,
        work: Callable[[Database], Coroutine[Any, Any, T]],
        name: str = "",
        *,
        timeout_s: float | None = None,
    ) -> Worker[T]:
        """Run `await work(db)` as a process of its own, with a client of its own. It may be killed and paused by name, and
        is by the random faults client_crash and client_pause: then it stops at whatever it awaits, without `finally`.
        """
        inner = self._cluster()
        with self._new_name(name, "worker", len(self._workers)) as own:
            client = await self._as_world(inner.client(own, timeout_s or self._call_timeout_s))
        self._names[own] = client.name
        running = client.process.call(work(client.database))
        task: asyncio.Task[T] = outside(inner.loop.create_task, running)
        outside(task.add_done_callback, _looked_at)
        worker = self._workers[own] = Worker(own, client.process, task)
        return worker

    @contextmanager
    def _new_name(self, name: str, kind: str, count: int) -> Iterator[str]:
        """This name, or the next free one of its kind. It is taken at once, since others may start side by side."""
        while not name:
            count += 1
            name = "" if f"{kind}{count}" in self._taken else f"{kind}{count}"
        if name in self._taken or name in self._cluster().servers:
            raise ValueError(f"there is a {name!r} already")
        self._taken[name] = None
        try:
            yield name
        except BaseException:  # its owner has not come to be
            del self._taken[name]
            raise

    # --- faults by name ---------------------------------------------------------------------------

    def kill(self, name: str, *, power: bool = False) -> None:
        """The process of this node (or of what was spawned) is gone at this instant. `power`: the machine with it, so that
        writes that were not synced are lost. A node stays down until `restart` or `recover`.
        """
        if name in self._cluster().servers:
            outside(lambda: self._cluster().keep_down(name, power=power))
        else:
            outside(self._cluster().crash_client, self._worker(name))

    async def restart(self, name: str) -> None:
        """Boot a node that was killed; returns when it is up, which is before it leads or follows anything."""
        self._cluster().let_go(self._node(name))
        await self._as_world(self._cluster().restart(name))

    def pause(self, name: str) -> None:
        """Stop the process of this node (or of what was spawned), as SIGSTOP does, until `resume` or `recover`; time goes
        on. A node that a fault at random crashes meanwhile comes back with another process, which runs.
        """
        target = name if name in self._cluster().servers else self._worker(name)
        outside(self._cluster().keep_paused, target)

    def resume(self, name: str) -> None:
        target = name if name in self._cluster().servers else self._worker(name)
        self._cluster().let_go(target)
        outside(self._cluster().resume, target)

    def partition(
        self, a: str | Sequence[str], b: str | Sequence[str] | None = None, *, one_way: bool = False
    ) -> None:
        """Let nothing pass between `a` and `b`, or from `a` to `b` alone, until `heal`.

        Args: b: None: everybody else, who comes later too: `connect` and `spawn` return when a node has answered them.
            Empty: nobody.
        """
        left, right = self._sides(a, b)
        self._tell("partition", left, right)
        keep_cut = self._cluster().network.keep_cut
        outside(lambda: keep_cut(left, right, one_way=one_way, and_later=b is None))

    def slow(
        self,
        a: str | Sequence[str],
        b: str | Sequence[str] | None = None,
        *,
        delay_s: tuple[float, float] = (0.05, 0.5),
    ) -> None:
        """Every message between `a` and `b` (None: everybody else, who comes later too) takes so long, at least and at most,
        until `heal`."""
        left, right = self._sides(a, b)
        self._tell("slow", left, right)
        keep_slow = self._cluster().network.keep_slow
        outside(lambda: keep_slow(left, right, delay_s, and_later=b is None))

    def heal(self) -> None:
        """The network is whole and quick again. Processes stay as they are; see `recover`."""
        network, hosts = self._cluster().network, self._hosts()
        self._tell("heal", [], [])
        network.let_go()
        outside(network.heal)
        outside(network.set_delay, hosts, hosts, None)

    async def recover(self) -> None:
        """End every fault, also those by name: random ones come no more, the network is whole, and all nodes run.

        Raises what a task of the random faults has failed with, if one has.
        """
        await self._as_world(self._recovered())

    async def _recovered(self) -> None:
        await self._end_chaos()
        self._cluster().let_go()
        nemesis = Nemesis(self._cluster(), random.Random(0))
        await nemesis.heal()
        nemesis.leave()

    # --- faults at random -------------------------------------------------------------------------

    @asynccontextmanager
    async def chaos(
        self, *faults: str, mean_s: float = 0.0, hold_s: float = 0.0
    ) -> AsyncIterator[None]:
        """Faults at random while the block runs, in waves with some seconds of peace between; at its end, `recover`.

        Args: faults: kinds, of FAULTS; those that the seed draws if there are none. mean_s: between two faults, hold_s: how
        long one lasts, both on average and virtual; as the seed draws it if 0.
        """
        self.begin_chaos(faults, mean_s=mean_s, hold_s=hold_s, waves=WAVES_MAX)
        try:
            yield
        finally:
            await self.recover()

    def begin_chaos(
        self,
        faults: Sequence[str] = (),
        *,
        mean_s: float = 0.0,
        hold_s: float = 0.0,
        waves: int = 1,
    ) -> None:
        """The same from now on. A wave ends after at most CHAOS_S, with every fault of it, and PEACE_S later comes the next.
        What was done by name (`kill`, `pause`, `partition`, `slow`) stays as it is.
        """
        check_faults(faults)
        harm = self._harm(faults, mean_s, hold_s, waves)
        self._chaos.append(outside(self._cluster().loop.create_task, harm))

    async def _harm(self, faults: Sequence[str], mean_s: float, hold_s: float, waves: int) -> None:
        for _ in range(waves):
            await self._wave(faults, mean_s, hold_s)
            await asyncio.sleep(PEACE_S)

    async def _wave(self, faults: Sequence[str], mean_s: float, hold_s: float) -> None:
        inner, draw = self._cluster(), self._draw
        drawn = [name for name in FAULTS if draw.random() < SHARE] or [draw.choice(FAULTS)]
        kinds = faults or drawn
        mean_s = mean_s or draw.choice(MEAN_S)
        hold_s = hold_s or draw.choice(HOLD_S)
        seconds = min(CHAOS_S, mean_s * CHAOS_FAULTS)
        of_clients = [name for name in kinds if name in CLIENT_FAULTS]
        of_nodes = [name for name in kinds if name not in CLIENT_FAULTS]
        rng = random.Random(draw.getrandbits(64))
        nemesis = Nemesis(inner, rng, self._client_hosts, wave=self._waves, rights_clocks=True)
        self._waves += 1
        self._nemeses.append(nemesis)
        workers: asyncio.Task[None] | None = None
        if of_clients:
            harm = self._harm_workers(of_clients, mean_s, hold_s)
            workers = inner.loop.create_task(harm)
        try:
            if of_nodes:
                nemesis.direct(of_nodes, mean_s, hold_s)
                await nemesis.run(seconds)
            else:
                await asyncio.sleep(seconds)
        finally:
            if workers is not None:
                workers.cancel()
        await nemesis.heal()
        nemesis.leave()
        self._nemeses.remove(nemesis)

    async def _harm_workers(self, kinds: list[str], mean_s: float, hold_s: float) -> None:
        rng = random.Random(self._draw.getrandbits(64))
        while True:
            await asyncio.sleep(rng.expovariate(1 / mean_s))
            alive = [worker.name for worker in self._workers.values() if worker.running]
            if not alive:
                continue
            name, kind = self._names[rng.choice(alive)], rng.choice(kinds)
            self._cluster().trace.note("fault", kind)
            if kind == "client_crash":
                self._cluster().crash_client(name)
            else:
                self._cluster().pause(name)
                await asyncio.sleep(min(8.0, rng.expovariate(1 / hold_s)))
                self._cluster().resume(name)

    async def _end_chaos(self) -> None:
        tasks, self._chaos = self._chaos, []
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        nemeses, self._nemeses = self._nemeses, []
        for nemesis in nemeses:
            await nemesis.heal()
            nemesis.leave()
        for error in ends:  # of what has failed nobody would hear
            if isinstance(error, BaseException) and not isinstance(error, asyncio.CancelledError):
                raise error

    # --- for who runs the test --------------------------------------------------------------------

    @property
    def problems(self) -> list[str]:
        """What went wrong in the cluster by itself: it is a defect of Kvorum, or an exception that nobody handled."""
        return self._cluster().problems

    def failures(self) -> list[BaseException]:
        """Of spawned processes that nobody has waited for."""
        failures = (worker.failure() for worker in self._workers.values())
        return [failure for failure in failures if failure is not None]

    def story(self) -> list[str]:
        """What was done to the cluster, the last events of it, each with its virtual time."""
        assert self._story is not None
        if self._story.left_out:
            return [f"({self._story.left_out} earlier ones)", *self._story.lines]
        return list(self._story.lines)

    def fingerprint(self) -> str:
        """A hash of all that has happened: equal for two runs of one seed."""
        return self._cluster().trace.digest()

    # --- inside -----------------------------------------------------------------------------------

    def _cluster(self) -> KeptCluster:
        if self._inner is None:
            raise SimError("the cluster is not started: use `async with`")
        return self._inner

    async def _as_world(self, work: Coroutine[Any, Any, T]) -> T:
        task: asyncio.Task[T] = outside(asyncio.get_running_loop().create_task, work)
        return await task

    def _node(self, name: str) -> str:
        if name not in self._cluster().servers:
            raise ValueError(f"there is no node {name!r}: {', '.join(self.nodes)}")
        return name

    def _worker(self, name: str) -> str:
        if name not in self._workers:
            who = [*self.nodes, *self._workers]
            raise ValueError(f"{name!r} cannot be killed or paused: {', '.join(who)} can")
        return self._names[name]

    def _client_hosts(self) -> list[str]:
        clients = self._cluster().clients
        return [each for each in self._names.values() if not clients[each].dead]

    def _hosts(self) -> list[str]:
        return [*self._cluster().servers, *self._client_hosts()]

    def _sides(
        self, a: str | Sequence[str], b: str | Sequence[str] | None
    ) -> tuple[list[str], list[str]]:
        left = self._resolved(a)
        if b is None:
            return left, [each for each in self._hosts() if each not in left]
        return left, self._resolved(b)

    def _resolved(self, names: str | Sequence[str]) -> list[str]:
        known = {**dict.fromkeys(self._cluster().servers), **self._names}
        given = [names] if isinstance(names, str) else list(names)
        for name in given:
            if name not in known:
                raise ValueError(f"there is no {name!r}: {', '.join(known)}")
        return [known[name] or name for name in given]

    def _tell(self, what: str, a: list[str], b: list[str]) -> None:
        sides = f"{' '.join(a)} | {' '.join(b)}" if a else ""
        self._cluster().trace.note("network", what, sides)


def _looked_at(task: asyncio.Task[Any]) -> None:
    """Its failure is told by `failures`, not by the loop."""
    if not task.cancelled():
        task.exception()


def check_faults(faults: Sequence[str]) -> None:
    """Raises: ValueError: there is no fault of that name."""
    for name in faults:
        if name not in FAULTS:
            raise ValueError(f"there is no fault {name!r}: {', '.join(FAULTS)}")
