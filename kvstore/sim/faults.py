"""A nemesis: what goes wrong, when, and for how long, all drawn from a seed.

Swarm: each seed draws which kinds of faults it has and how often, since a fault that is always there hides what others
would show. Only faults from which a cluster recovers by itself: processes die, stop and lose power, disks are slow or
fail once, the network is what networks are, clocks jump and drift within their bound. `heal` ends them all.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Final

from kvstore.sim.adapters import DRIFT_MAX, QUICK_S, Machine
from kvstore.sim.cluster import Server, SimCluster
from kvstore.sim.process import PROCESS

SHARE: Final = 0.45  # of the kinds that a seed has, on average
IO_POINTS_MAX: Final = 60


class Nemesis:
    """Args: victims: names of client processes that may be paused or killed, asked for at each use."""

    def __init__(
        self,
        cluster: SimCluster,
        rng: random.Random,
        victims: Callable[[], list[str]] = list,
        on_client_crash: Callable[[str], None] = lambda _name: None,
    ) -> None:
        self.counts: dict[str, int] = {}
        self._cluster = cluster
        self._rng = rng
        self._victims, self._on_client_crash = victims, on_client_crash
        self._tasks: list[asyncio.Task[None]] = []
        self._flushes: list[asyncio.Task[None]] = []
        self._traps: dict[str, int] = {}
        self._over = False
        kinds: dict[str, Callable[[], None]] = {
            "crash": self._crash,
            "crash_leader": self._crash_leader,
            "crash_at_io": self._crash_at_io,
            "blackout": self._blackout,
            "pause": self._pause,
            "pause_leader": self._pause_leader,
            "partition": self._partition,
            "one_way": self._one_way,
            "clog": self._clog,
            "slow_path": self._slow_path,
            "break": self._break,
            "flaky": self._flaky,
            "slow_disk": self._slow_disk,
            "sync_fails": self._sync_fails,
            "wall_jump": self._wall_jump,
            "drift": self._drift,
            "flush": self._flush,
            "client_pause": self._client_pause,
            "client_crash": self._client_crash,
        }
        self._all = kinds
        self.kinds = {name: do for name, do in kinds.items() if rng.random() < SHARE}
        self.mean_s = rng.choice((0.3, 0.7, 1.5, 3.0))
        self._hold_s = rng.choice((0.5, 1.5, 3.0, 5.0))  # how long a fault lasts, about
        for server in cluster.servers.values():
            server.machine.on_io = self._on_io

    def direct(self, names: Sequence[str], mean_s: float, hold_s: float) -> None:
        """Instead of what was drawn; empty or 0: leave it."""
        if names:
            self.kinds = {name: self._all[name] for name in names}
        self.mean_s = mean_s or self.mean_s
        self._hold_s = hold_s or self._hold_s

    async def run(self, seconds: float) -> None:
        """Do harm for so long. What was begun may go on for a while; see `heal`."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        names = list(self.kinds)
        while names:
            await asyncio.sleep(self._rng.expovariate(1 / self.mean_s))
            if loop.time() >= until:
                return
            name = self._rng.choice(names)
            self.counts[name] = self.counts.get(name, 0) + 1
            self._cluster.trace.note("fault", name)
            self.kinds[name]()
        await asyncio.sleep(seconds)

    async def heal(self) -> None:
        """End every fault: all processes run, the network is whole, disks are quick."""
        cluster = self._cluster
        self._over = True
        self._traps.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        network = cluster.network
        network.break_rate = 0.0
        hosts = [*cluster.servers, *cluster.clients]
        network.set_delay(hosts, hosts, None)
        network.heal()
        for name in hosts:
            cluster.resume(name)
        for server in cluster.servers.values():
            server.machine.call_s = QUICK_S
            server.machine.disk.mend()
            await cluster.restart(server.name)

    # -- helpers

    def _later(self, seconds: float, do: Callable[[], None]) -> None:
        async def later() -> None:
            await asyncio.sleep(seconds)
            do()

        self._tasks.append(asyncio.get_running_loop().create_task(later()))

    def _restart_later(self, name: str) -> None:
        async def restart() -> None:
            await asyncio.sleep(self._duration_s())
            await self._cluster.restart(name)

        self._tasks.append(asyncio.get_running_loop().create_task(restart()))

    def _duration_s(self) -> float:
        return min(8.0, 0.05 + self._rng.expovariate(1 / self._hold_s))

    def _server(self) -> Server | None:
        running = self._cluster.running()
        return self._rng.choice(running) if running else None

    def _leader(self) -> Server | None:
        group = self._rng.randint(1, len(self._cluster.splits) + 3)
        return self._cluster.leader_of(group)

    # -- processes

    def _kill(self, server: Server | None) -> None:
        if server is not None and server.running:
            self._cluster.crash(server.name, power=self._rng.random() < 0.7)
            self._restart_later(server.name)

    def _crash(self) -> None:
        self._kill(self._server())

    def _crash_leader(self) -> None:
        self._kill(self._leader())

    def _blackout(self) -> None:
        for server in self._cluster.running():
            self._kill(server)

    def _crash_at_io(self) -> None:
        server = self._server()
        if server is not None:
            self._traps[server.name] = self._rng.randint(1, IO_POINTS_MAX)

    def _on_io(self, machine: Machine, point: str) -> None:
        left = self._traps.get(machine.name)
        if left is None:
            return
        if left > 1:
            self._traps[machine.name] = left - 1
            return
        del self._traps[machine.name]
        cluster = self._cluster
        inside = PROCESS.get() is cluster.servers[machine.name].process
        assert inside, "only the machine's own process works with its disk"
        cluster.trace.note("trap", machine.name, point)
        asyncio.get_running_loop().call_soon(
            self._restart_later, machine.name, context=cluster.network.context
        )
        cluster.crash_within(machine.name, power=self._rng.random() < 0.8)

    def _pause_for(self, name: str) -> None:
        self._cluster.pause(name)
        self._later(self._duration_s(), lambda: self._cluster.resume(name))

    def _pause(self) -> None:
        server = self._server()
        if server is not None:
            self._pause_for(server.name)

    def _pause_leader(self) -> None:
        server = self._leader()
        if server is not None:
            self._pause_for(server.name)

    def _client_pause(self) -> None:
        victims = self._victims()
        if victims:
            self._pause_for(self._rng.choice(victims))

    def _client_crash(self) -> None:
        victims = self._victims()
        if victims:
            name = self._rng.choice(victims)
            self._cluster.crash_client(name)
            self._on_client_crash(name)

    # -- network

    def _hosts(self) -> list[str]:
        return [*self._cluster.servers, *self._victims()]

    def _sides(self) -> tuple[list[str], list[str]]:
        hosts = self._hosts()
        self._rng.shuffle(hosts)
        cut = self._rng.randint(1, max(1, len(hosts) - 1))
        return hosts[:cut], hosts[cut:]

    def _partition(self) -> None:
        network = self._cluster.network
        a, b = self._sides()
        network.partition(a, b)
        self._later(self._duration_s(), lambda: network.heal(a, b))

    def _one_way(self) -> None:
        network = self._cluster.network
        a, b = self._sides()
        network.partition(a, b, one_way=True)
        self._later(self._duration_s(), lambda: network.heal(a, b))

    def _clog(self) -> None:
        a, b = self._sides()
        self._cluster.network.clog(a[:1], b, self._duration_s(), one_way=self._rng.random() < 0.5)

    def _slow_path(self) -> None:
        network = self._cluster.network
        a, b = self._sides()
        longest = self._rng.choice((0.02, 0.1, 0.5))
        network.set_delay(a, b, (longest / 10, longest))
        self._later(self._duration_s(), lambda: network.set_delay(a, b, None))

    def _break(self) -> None:
        for name in self._rng.sample(self._hosts(), 2):
            self._cluster.network.break_connections(name)

    def _flaky(self) -> None:
        network = self._cluster.network
        network.break_rate = self._rng.choice((0.001, 0.01))

        def end() -> None:
            network.break_rate = 0.0

        self._later(self._duration_s(), end)

    # -- disks and clocks

    def _slow_disk(self) -> None:
        machine = self._rng.choice(list(self._cluster.servers.values())).machine
        longest = self._rng.choice((0.05, 0.3, 3.0))
        machine.call_s = (longest / 20, longest)

        def end() -> None:
            machine.call_s = QUICK_S

        self._later(self._duration_s(), end)

    def _sync_fails(self) -> None:
        server = self._server()
        if server is None:
            return
        server.failures_expected = 1
        if self._rng.random() < 0.5:
            server.machine.disk.fail_sync(self._rng.randint(0, 20))
        else:
            server.machine.disk.fail_write(self._rng.randint(0, 20))
        self._watch(server)

    def _watch(self, server: Server) -> None:
        """Boot it again when it has failed."""

        async def watched() -> None:
            for _ in range(200):
                await asyncio.sleep(0.1)
                if not server.running:
                    await asyncio.sleep(self._duration_s())
                    await self._cluster.restart(server.name)
                    return

        self._tasks.append(asyncio.get_running_loop().create_task(watched()))

    def _wall_jump(self) -> None:
        machine = self._rng.choice(list(self._cluster.servers.values())).machine
        machine.wall_jump_s = self._rng.choice((-86_400.0, -3.0, -0.5, 0.0, 0.5, 3.0, 86_400.0))

    def _drift(self) -> None:
        machine = self._rng.choice(list(self._cluster.servers.values())).machine
        machine.drift(1.0 + self._rng.uniform(-DRIFT_MAX, DRIFT_MAX))

    def _flush(self) -> None:
        server = self._server()
        if server is not None and server.process is not None and server.node is not None:
            node = server.node
            if node.host is not None and not node.fatal.done():
                self._flushes.append(server.process.spawn(node.flush()))
