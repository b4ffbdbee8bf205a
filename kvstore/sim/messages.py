"""Faults of whole messages, between a node's streams and its host: lost, doubled, late and past others.

Streams keep order and lose nothing but a tail, as TCP does. Raft and closed timestamps do not count on that, and a stream to
come may not promise it; so here single messages go astray after they were received: a late one may arrive after its sender
died, and at the next process of its receiver. Frames of snapshots are only lost, as in a full inbox.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from kvstore.node import Node
from kvstore.peers import CLOSED_TIMESTAMPS
from kvstore.sim.cluster import Server, SimCluster
from kvstore.sim.process import world
from replication.messages import Message

Receive = Callable[[int, Sequence[Message], int], None]


class Astray(NamedTuple):
    """Shares of the messages of one path that are lost, doubled, and late by up to `late_s`."""

    loss: float
    double: float
    late: float
    late_s: float


class MessageFaults:
    """Attach it before the cluster starts. `set` and `clear` as faults come and go."""

    def __init__(self, cluster: SimCluster) -> None:
        self.counters = dict.fromkeys(("lost", "doubled", "late", "late_in_vain"), 0)
        self._cluster = cluster
        self._rng = random.Random(f"{cluster.seed}/messages")
        self._rng_of_closed = random.Random(f"{cluster.seed}/closed")
        self._paths: dict[tuple[str, str], Astray] = {}
        self._direct: dict[str, Receive] = {}  # of the host that runs, by server
        cluster.on_open.append(self._attach)

    def set(self, source: str, target: str, astray: Astray) -> None:
        """From now on, from one server to another."""
        self._paths[source, target] = astray

    def clear(self, source: str = "", target: str = "") -> None:
        """No more of it on this path; without names: on none."""
        if source:
            self._paths.pop((source, target), None)
        else:
            self._paths.clear()

    def leave(self) -> None:
        """Processes to come are not looked at any more; what is still on its way is lost."""
        self._cluster.on_open.remove(self._attach)
        self._direct.clear()

    def _attach(self, server: Server) -> None:
        assert server.node is not None
        host: Any = server.node.host
        direct, direct_chunk = host.receive, host.receive_snapshot_chunk
        self._direct[server.name] = direct

        def receive(sender: int, messages: Sequence[Message], size_bytes: int = 0) -> None:
            paths = self._paths
            astray = paths.get((f"n{sender}", server.name)) if paths else None
            kept = messages if astray is None else self._filter(server, sender, messages, astray)
            if kept:
                direct(sender, kept, size_bytes)

        def receive_chunk(sender: int, payload: bytes) -> None:
            astray = self._paths.get((f"n{sender}", server.name))
            if astray is not None and self._rng.random() < astray.loss:
                self.counters["lost"] += 1
            else:
                direct_chunk(sender, payload)

        host.receive, host.receive_snapshot_chunk = receive, receive_chunk
        self._look_at_closed(server)

    def _look_at_closed(self, server: Server) -> None:
        """What other leaders have closed comes beside Raft's messages, on the same stream."""
        node: Any = server.node
        receiver = node._receiver  # noqa: SLF001

        def looked_at(kind: str, sender: int) -> Callable[[bytes], None]:
            direct: Callable[[bytes], None] = receiver(kind, sender)

            def receive(payload: bytes) -> None:
                astray = self._paths.get((f"n{sender}", server.name)) if self._paths else None
                if astray is None or payload[:1] != CLOSED_TIMESTAMPS:
                    direct(payload)
                    return
                for late_s in self._copies(self._rng_of_closed, astray):
                    if late_s:
                        self._later(server, late_s, partial(_hear, payload[1:]))
                    else:
                        direct(payload)

            return receive

        node._receiver = looked_at  # noqa: SLF001

    def _filter(
        self, server: Server, sender: int, messages: Sequence[Message], astray: Astray
    ) -> list[Message]:
        """What arrives at once; the rest is lost, or on its way."""
        kept: list[Message] = []
        for message in messages:
            for late_s in self._copies(self._rng, astray):
                if late_s:
                    self._later(server, late_s, partial(self._receive, server, sender, message))
                else:
                    kept.append(message)
        return kept

    def _copies(self, rng: random.Random, astray: Astray) -> list[float]:
        """In how many seconds each copy of a message arrives; 0: at once. None: it is lost."""
        if rng.random() < astray.loss:
            self.counters["lost"] += 1
            return []
        copies = 1
        if rng.random() < astray.double:
            self.counters["doubled"] += 1
            copies = 2
        found = []
        for _ in range(copies):
            late = rng.random() < astray.late
            self.counters["late"] += late
            found.append(rng.uniform(0.0, astray.late_s) if late else 0.0)
        return found

    def _receive(self, server: Server, sender: int, message: Message, _node: Node) -> None:
        direct = self._direct.get(server.name)
        if direct is not None:
            direct(sender, [message], 0)

    def _later(self, server: Server, seconds: float, arrive: Callable[[Node], None]) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(seconds, self._arrive, server, arrive, context=world())

    def _arrive(self, server: Server, arrive: Callable[[Node], None]) -> None:
        """At whatever process the machine runs now."""
        process, node = server.process, server.node
        opened = server.name in self._direct and node is not None and node.host is not None
        if not opened or process is None or process.dead:
            self.counters["late_in_vain"] += 1
            return
        assert node is not None
        asyncio.get_running_loop().call_soon(arrive, node, context=process.context())


def _hear(payload: bytes, node: Node) -> None:
    assert node.store is not None
    node.store.closer.hear(payload)
