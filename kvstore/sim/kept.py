"""A cluster in which what a test has done by name stays until the test undoes it, whatever faults at random come and go.

The end of a fault heals paths, restarts nodes and resumes processes without asking who cut, killed or stopped them. Here
the test's own doings are remembered, and such an end stops before them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvstore.sim.cluster import SimCluster
from kvstore.sim.network import FOREVER, Names, SimHost, SimNetwork, paths
from kvstore.sim.process import Process
from kvstore.sim.trace import Trace


class KeptNetwork(SimNetwork):
    """`keep_cut` and `keep_slow` hold until `let_go`, which ends slowness at once; cuts end with the next `heal`.

    With `and_later` they hold for every host that is made later, too, between it and `a`.
    """

    def __init__(self, rng: random.Random, *, trace: Trace | None = None) -> None:
        super().__init__(rng, trace=trace)
        self._cut: dict[tuple[str, str], float] = {}  # as `blocked`
        self._slow: dict[tuple[str, str], tuple[float, float]] = {}
        self._cut_later: list[tuple[list[str], bool]] = []
        self._slow_later: list[tuple[list[str], tuple[float, float]]] = []

    def keep_cut(self, a: list[str], b: list[str], *, one_way: bool, and_later: bool) -> None:
        if and_later:
            self._cut_later.append((a, one_way))
        self._cut.update(dict.fromkeys(paths(a, b, one_way=one_way), FOREVER))
        self.partition(a, b, one_way=one_way)

    def keep_slow(
        self, a: list[str], b: list[str], delay_s: tuple[float, float], *, and_later: bool
    ) -> None:
        if and_later:
            self._slow_later.append((a, delay_s))
        self._slow.update(dict.fromkeys(paths(a, b, one_way=False), delay_s))
        self.set_delay(a, b, delay_s)

    def host(self, name: str) -> SimHost:
        for a, one_way in self._cut_later:
            if name not in a:
                self.keep_cut(a, [name], one_way=one_way, and_later=False)
        for a, delay_s in self._slow_later:
            if name not in a:
                self.keep_slow(a, [name], delay_s, and_later=False)
        return super().host(name)

    def let_go(self) -> None:
        for (
            path
        ) in self._slow:  # also of hosts whose client is still coming up, whom nobody knows yet
            self._delays.pop(path, None)
        self._cut.clear()
        self._slow.clear()
        self._cut_later.clear()
        self._slow_later.clear()

    def set_delay(self, a: Names, b: Names, delay_s: tuple[float, float] | None) -> None:
        super().set_delay(a, b, delay_s)
        self._delays.update(self._slow)

    def _kick(self) -> None:
        self.blocked.update(self._cut)
        super()._kick()


class KeptCluster(SimCluster):
    """`keep_down` and `keep_paused` hold until `let_go`; before that `restart` and `resume` do nothing."""

    network: KeptNetwork

    def __init__(self, seed: str, *, nodes: int, splits: Sequence[bytes], trace: Trace) -> None:
        super().__init__(seed, nodes=nodes, splits=splits, trace=trace)
        self.network = KeptNetwork(random.Random(f"{seed}/network"), trace=trace)
        self._down: dict[str, None] = {}
        self._paused: dict[str, Process] = {}

    def keep_down(self, name: str, *, power: bool) -> None:
        """Of a node. It may be down already, and about to come back."""
        self._down[name] = None
        self.crash(name, power=power)

    def keep_paused(self, name: str) -> None:
        """Of a node or client: its process of now, not one that a later restart brings."""
        self.pause(name)
        process = self.process(name)
        if process is not None and process.paused:
            self._paused[name] = process

    def let_go(self, name: str = "") -> None:
        """Of this one; without a name: of all, and of the network."""
        if name:
            self._down.pop(name, None)
            self._paused.pop(name, None)
        else:
            self._down.clear()
            self._paused.clear()
            self.network.let_go()

    def crash_client(self, name: str) -> None:
        """What tasks of a user's process have failed with was his to look at, maybe later: it dies with the process."""
        self.loop.unseen(self.clients[name].process)
        super().crash_client(name)

    async def restart(self, name: str) -> None:
        if name not in self._down:
            await super().restart(name)

    def resume(self, name: str) -> None:
        process = self.process(name)
        if process is None or self._paused.get(name) is not process:
            super().resume(name)
