"""A core that must go on: while everything else heals, a minority of the nodes stays in its fault.

A healed cluster in which everything must end does not show that a majority suffices: the node that was away is there again,
and may be what the others had waited for. So in a share of the seeds some node is left down, stopped, or cut off from
everybody, both ways or one way; or its disk goes on to stall, or to be full: of a log, when its segment is. With that, and no
other fault, all clients must end, reads and writes of all ranges succeed, nothing stay undecided, and the others' replicas
become equal. Then that node heals, too. (As TigerBeetle's VOPR does.)

Not where damage was done: a core needs whole replicas of every range, and damage takes the minority already (atlas.py).
A client is never on the wrong side: what is cut are the paths between the frozen nodes and all others.
"""

from __future__ import annotations

import random
from typing import Final

from kvstore.sim.adapters import NO_SPACE, STALL_TIMEOUTS
from kvstore.sim.cluster import SimCluster

SHARE: Final = 0.35  # of the seeds, if damage permits
DOWN, PAUSED, CUT_OFF, DEAF, MUTE = "down", "paused", "cut_off", "deaf", "mute"
FROZEN: Final = (DOWN, PAUSED, CUT_OFF, DEAF, MUTE)  # deaf: it hears nobody; mute: nobody hears it
STALLED, FULL = "stalled", "full"
DISKS: Final = (STALLED, FULL)  # they are drawn apart, before the others
DISK_SHARE: Final = 0.05  # the same of those
NEVER: Final = "none"


class Frozen:
    """Nodes that stay in one fault. `begin` when everything else heals, `end` after that."""

    def __init__(self, cluster: SimCluster, kind: str, names: list[str]) -> None:
        assert kind in (*FROZEN, *DISKS)
        assert len(names) <= cluster.minority
        self.kind, self.names = kind, names
        self._cluster = cluster
        rng = random.Random(f"{cluster.seed}/core/disk")
        self._stall_s = rng.uniform(*STALL_TIMEOUTS) * cluster.config.raft.election_timeout_s
        self._full_log, self._full_engine = rng.choice(NO_SPACE)

    def __str__(self) -> str:
        return f"{'+'.join(self.names)} {self.kind.replace('_', ' ')}"

    def begin(self) -> None:
        """The network is whole at this instant, and all processes that are there run."""
        cluster = self._cluster
        cluster.trace.note("frozen", self.kind, *self.names)
        if self.kind == DOWN:
            for name in self.names:
                cluster.crash(name)
        self.hold()
        if self.kind in (CUT_OFF, DEAF, MUTE):
            cluster.network.on_host.append(self._cut)
            for host in (*cluster.servers, *cluster.clients):
                self._cut(host)

    def hold(self) -> None:
        """Stop them, also one that was down and has been started since; what went from a full disk is taken at once."""
        for name in self.names:
            if self.kind == PAUSED:
                self._cluster.pause(name)
            elif self.kind == STALLED:
                self._cluster.servers[name].machine.stall(self._stall_s)
            elif self.kind == FULL:
                machine = self._cluster.servers[name].machine
                machine.fill(log=self._full_log, engine=self._full_engine)

    def _cut(self, host: str) -> None:
        """Also of hosts that are made later."""
        if host in self.names:
            return
        network, one_way = self._cluster.network, self.kind != CUT_OFF
        if self.kind == MUTE:
            network.partition(self.names, host, one_way=one_way)
        else:
            network.partition(host, self.names, one_way=one_way)

    def end(self) -> None:
        """Whoever heals does the rest."""
        on_host = self._cluster.network.on_host
        if self._cut in on_host:
            on_host.remove(self._cut)

    def is_down(self, name: str) -> bool:
        """Whether this node is not to be started."""
        return self.kind == DOWN and name in self.names


def drawn_disk(seed: str) -> str:
    """In what a seed's minority has its disk, of DISKS; empty: in nothing of that kind. By a generator of its own: all other
    seeds stay as they are."""
    rng = random.Random(f"{seed}/core/disks")
    drawn, kind = rng.random() < DISK_SHARE, rng.choice(DISKS)
    return kind if drawn else ""


def draw_frozen(cluster: SimCluster, wish: str = "") -> Frozen | None:
    """Of this seed; None: there is none, or damage does not permit it.

    Args: wish: a kind that it shall be, or NEVER; empty: as the seed draws it.
    """
    rng = random.Random(f"{cluster.seed}/core")
    drawn, kind = rng.random() < SHARE, rng.choice(FROZEN)
    kind = wish or drawn_disk(cluster.seed) or (kind if drawn else "")
    minority = cluster.minority
    names = rng.sample(list(cluster.servers), rng.randint(min(1, minority), minority))
    if kind in ("", NEVER) or not names:
        return None
    if any(server.damage for server in cluster.servers.values()):
        return None
    return Frozen(cluster, kind, names)
