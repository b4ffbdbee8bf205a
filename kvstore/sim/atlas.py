"""The atlas: where damage may be done so that the cluster can still recover, and every failure is a bug.

Most faults end by themselves and destroy nothing that was promised: what is synced stays, what is not was never
acknowledged. Of those there may be any number anywhere, since afterwards every replica has all that it ever promised.
Damage (rot, misdirected writes) takes back promises, and repair from peers is not built yet: a damaged range of a node
stays refused, a node with a damaged engine stays down. So it is confined by four rules.

1. Only the nodes of `frail` are ever damaged, drawn once a seed: a minority of each range's replicas (one node, since a
   range has at most three), so each range keeps a majority of whole ones. Why that is enough: let d be the damaged
   replicas, at most a minority. Whatever was committed is on disk on some majority, hence on at least one whole replica;
   a refused replica neither votes nor acknowledges, so every later election needs more than half of all, and all of them
   whole. With three replicas it needs both whole ones, so the one that has the entry is asked, and refuses its vote to a
   shorter log: the winner has the entry. The same for votes: what a refused replica voted is forgotten, and it cannot
   vote again. Power failures of the whole ones add nothing: what they promised is durable there. They only cost time,
   until both are up again.
2. A replica with damage that it has not noticed (it reads its log at its start only) still votes and acknowledges rightly:
   it does so from memory, and writes what follows. It counts among the whole until it restarts, then as refused.
3. In the log only what the log can prove to have been durable is damaged (`SimDisk.provable`): behind that a lost batch
   looks like a torn write, is cut, and the replica would go on as if it had never acknowledged it. No log of this kind
   can do better with the last batch before a crash. In the engine only what was flushed.
4. The first error of a damaged engine retires the node, as an operator would: it is not started again.

What is refused or down for such a reason need not answer, nor be level with others: `excused`.
"""

from __future__ import annotations

import random

from kvstore.sim.cluster import Server, SimCluster


class Atlas:
    """What may be damaged in a seed, and what was. Args: rng: draws the minority."""

    def __init__(self, cluster: SimCluster, rng: random.Random) -> None:
        self._cluster = cluster
        names = list(cluster.servers)
        self.frail = rng.sample(names, cluster.minority)

    def damageable(self, rng: random.Random) -> Server | None:
        """A node to damage; None if there is none, or it is retired already."""
        left = [self._cluster.servers[name] for name in self.frail]
        left = [server for server in left if not server.broken]
        return rng.choice(left) if left else None

    def gone(self, server: str) -> bool:
        """The node is down for good, and rightly."""
        found = self._cluster.servers[server]
        return found.broken and bool(found.damage)

    def excused(self, server: str, group: int) -> bool:
        """Whether this replica may be silent, behind, or unreadable for ever: damage was done to it, and it says so."""
        found = self._cluster.servers[server]
        if not found.damage:
            return False
        if found.broken or found.machine.directory.damaged:
            return True
        node = found.node
        return node is not None and node.host is not None and group in node.host.refused
