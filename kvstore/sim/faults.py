"""A nemesis: what goes wrong, when, and for how long, all drawn from a seed.

Swarm: each seed draws which kinds of faults it has and how often, since a fault that is always there hides what others
would show; some kinds are drawn apart (kinds.py). Only faults from which a cluster recovers: those that end by themselves,
and damage within the bounds of the atlas (atlas.py). `heal` ends them all, but for damage.

Every fault has a number and a generator of its own; times and kinds come from one generator that nothing else uses. So
a fault can be left out (`kept`) and the others stay what they are, as far as the state that they meet is the same.
The trace says "fault NUMBER KIND who, how long" before a fault begins.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from kvstore.sim.adapters import QUICK_S, Machine
from kvstore.sim.atlas import Atlas
from kvstore.sim.cluster import Server, SimCluster
from kvstore.sim.core import Frozen
from kvstore.sim.kinds import APART, KINDS, RARE, Kinds, Trap, drawn_apart
from kvstore.sim.messages import MessageFaults, RequestFaults
from kvstore.sim.process import PROCESS

SHARE: Final = 0.45  # of the kinds that a seed has, on average
RARE_SHARE: Final = (
    0.12  # the same of kinds that leave a node damaged: the rest of the seed has one node less
)


class Fault(NamedTuple):
    """One that was begun. `at`: virtual seconds."""

    at: float
    kind: str
    details: str


class Nemesis:
    """Args: rng: draws the kinds and their rate. victims: names of client processes that may be paused or killed, asked
    for at each use. kept: numbers of the faults that take place; None: all. wave: of one cluster each has its own draws.
    rights_clocks: `heal` sets the clocks right, too, and only nodes' go wrong: what runs beside a client is a user's own code,
    whose timers would not agree with the loop's clock."""

    def __init__(
        self,
        cluster: SimCluster,
        rng: random.Random,
        victims: Callable[[], list[str]] = list,
        on_client_crash: Callable[[str], None] = lambda _name: None,
        kept: frozenset[int] | None = None,
        wave: int = 0,
        *,
        rights_clocks: bool = False,
    ) -> None:
        self.counts: dict[str, int] = {}  # of those that were begun, by kind
        self.armed: dict[int, str] = {}  # of these, what has not gone off yet: number -> kind
        self.happened: dict[int, Fault] = {}  # by number, in their order
        self.cluster = cluster
        self.atlas = Atlas(cluster, random.Random(f"{cluster.seed}/atlas"))
        self.messages, self.requests = MessageFaults(cluster), RequestFaults(cluster)
        self.victims, self.on_client_crash = victims, on_client_crash
        self.rights_clocks = rights_clocks
        self.traps: dict[str, Trap] = {}  # by server
        self._paused_until: dict[str, float] = {}  # by process
        self.hold_s = rng.choice((0.5, 1.5, 3.0, 5.0))  # how long a fault lasts, about
        self.mean_s = rng.choice((0.3, 0.7, 1.5, 3.0))
        together = [name for name in KINDS if name not in APART]
        shares = {name: RARE_SHARE if name in RARE else SHARE for name in together}
        self.kinds = [name for name, share in shares.items() if rng.random() < share]
        self.kinds += [name for name in APART if drawn_apart(cluster.seed, name)]
        self._kept = kept
        self._seed = f"{cluster.seed}/wave {wave}" if wave else cluster.seed
        self._times = random.Random(f"{self._seed}/faults")
        self._tasks: list[asyncio.Task[None]] = []
        self.flushes: list[asyncio.Task[None]] = []  # kept until the end
        self.left: list[
            Callable[[], None]
        ] = []  # what faults without an end of their own leave, to be taken away
        self._over = False
        for server in cluster.servers.values():
            server.machine.on_io.append(self._on_io)
        cluster.on_failure.append(self._on_failure)

    def direct(self, names: Sequence[str], mean_s: float, hold_s: float) -> None:
        """Instead of what was drawn; empty or 0: leave it."""
        if names:
            assert all(name in KINDS for name in names), f"kinds are {', '.join(KINDS)}"
            self.kinds = list(names)
        self.mean_s = mean_s or self.mean_s
        self.hold_s = hold_s or self.hold_s

    async def run(self, seconds: float) -> None:
        """Do harm for so long. What was begun may go on for a while; see `heal`."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        number = 0
        while self.kinds:
            await asyncio.sleep(self._times.expovariate(1 / self.mean_s))
            if loop.time() >= until:
                return
            number += 1
            name = self._times.choice(self.kinds)
            if self._kept is None or number in self._kept:
                self.inflict(number, name)
        await asyncio.sleep(seconds)

    def inflict(self, number: int, name: str) -> None:
        """Do this one now. It may find nothing to do: then it leaves no trace."""
        rng = random.Random(f"{self._seed}/fault/{number}")
        KINDS[name](Kinds(self, rng, number, name))

    async def heal(self, frozen: Frozen | None = None) -> None:
        """End every fault: all processes run, the network is whole, disks are quick, writable and not full.

        frozen: begins at this instant, and is all that is left. After it ended, `heal` again.
        """
        cluster = self.cluster
        self._over = True
        self.traps.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        network = cluster.network
        network.break_rate = 0.0
        hosts = [*cluster.servers, *cluster.clients]
        network.set_delay(hosts, hosts, None)
        network.heal()
        self.messages.clear()
        self.requests.clear()
        while self.left:
            self.left.pop()()  # the last first: one may stand on another
        for name in hosts:
            process = cluster.process(name)
            if process is not None:
                process.unlight()
            cluster.resume(name)
        for server in cluster.servers.values():
            self.mend(server.machine)
        if frozen is not None:
            frozen.begin()
        for server in cluster.servers.values():
            if frozen is None or not frozen.is_down(server.name):
                await cluster.restart(server.name)
        if frozen is not None:
            frozen.hold()

    def leave(self) -> None:
        """After `heal`: the cluster does not know of it any more. For one of several that come and go."""
        for server in self.cluster.servers.values():
            server.machine.on_io.remove(self._on_io)
        self.cluster.on_failure.remove(self._on_failure)
        self.messages.leave()
        self.requests.leave()

    # -- for the kinds

    def began(self, number: int, kind: str, details: str) -> None:
        """A fault is about to begin."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        at = asyncio.get_running_loop().time()
        self.happened[number] = Fault(at, kind, details)
        self.cluster.trace.note("fault", number, kind, details)

    def went_off(self, number: int) -> None:
        """One that was armed has done its harm."""
        self.armed.pop(number, None)

    def in_vain(self) -> dict[str, int]:
        """How many of each kind were armed and have not gone off."""
        found: dict[str, int] = {}
        for kind in self.armed.values():
            found[kind] = found.get(kind, 0) + 1
        return found

    def later(self, seconds: float, do: Callable[[], None]) -> None:
        """The end of a fault; not done if all have been healed before."""

        async def later() -> None:
            await asyncio.sleep(seconds)
            do()

        self._tasks.append(asyncio.get_running_loop().create_task(later()))

    def pause(self, name: str, seconds: float) -> None:
        """Of several pauses of one process that overlap, the one that ends last ends them all."""
        process, until = self.cluster.process(name), self._paused_until
        end = asyncio.get_running_loop().time() + seconds
        if process is not None and process.paused:
            end = max(end, until.get(name, 0.0))
        until[name] = end
        self.cluster.pause(name)

        def over() -> None:
            if asyncio.get_running_loop().time() >= until[name]:
                self.cluster.resume(name)

        self.later(seconds, over)

    def restart_later(self, name: str, seconds: float) -> None:
        """Boot a machine whose process is gone."""

        async def restart() -> None:
            await asyncio.sleep(seconds)
            await self.cluster.restart(name)

        if not self._over:
            self._tasks.append(asyncio.get_running_loop().create_task(restart()))

    @staticmethod
    def mend(machine: Machine) -> None:
        """The disk works again."""
        machine.call_s = QUICK_S
        machine.disk.mend()
        directory = machine.directory
        directory.write_error = directory.flush_error = directory.read_error = None

    # -- what comes of them

    def _on_failure(self, server: Server) -> None:
        """Its disk failed and it ended: an init system starts it again."""
        rng = random.Random(f"{self.cluster.seed}/{server.name}/{server.machine.boots}/restart")
        self.restart_later(server.name, 0.1 + rng.random())

    def _on_io(self, machine: Machine, point: str) -> None:
        trap = self.traps.get(machine.name)
        if trap is None or trap.point not in {"", point}:
            return
        if trap.calls > 1:
            self.traps[machine.name] = trap._replace(calls=trap.calls - 1)
            return
        del self.traps[machine.name]
        self.went_off(trap.fault)
        cluster = self.cluster
        inside = PROCESS.get() is cluster.servers[machine.name].process
        assert inside, "only the machine's own process works with its disk"
        cluster.trace.note("trap", machine.name, point)
        rng = random.Random(f"{cluster.seed}/{machine.name}/{machine.boots}/trap")
        asyncio.get_running_loop().call_soon(
            self.restart_later,
            machine.name,
            0.05 + rng.expovariate(1 / self.hold_s),
            context=cluster.network.context,
        )
        cluster.crash_within(machine.name, power=trap.power)
