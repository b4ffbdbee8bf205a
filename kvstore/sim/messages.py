"""Faults of whole messages, between a node's streams and its host or its store: lost, doubled, late and past others.

Streams keep order and lose nothing but a tail, as TCP does. Raft and closed timestamps do not count on that, and a stream to
come may not promise it; so here single messages go astray after they were received: a late one may arrive after its sender
died, and at the next process of its receiver. Frames of snapshots are only lost, as in a full inbox. Of requests and their
answers the same: see `RequestFaults`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from kvstore.node import Node
from kvstore.peers import CLOSED_TIMESTAMPS
from kvstore.sim.cluster import Server, SimCluster
from kvstore.sim.process import Process, world
from kvstore.store import Asker
from replication.messages import Message
from txn.messages import (
    Ack,
    Changes,
    Fence,
    Finalize,
    GetDirectory,
    GetTimestamps,
    KeepLocks,
    LockRead,
    LockWaits,
    Outcome,
    Prepare,
    QueryPart,
    QuerySettled,
    QueryTxn,
    Read,
    Reply,
    Request,
    Resolve,
    Scan,
    Unlock,
    Validate,
)

# fmt: off
ASTRAY: Final[frozenset[type[Request]]] = frozenset({  # kinds of requests; see RequestFaults
    Read, Scan, QueryTxn, QueryPart, QuerySettled, Validate, GetTimestamps, GetDirectory,
    Prepare, Finalize, Resolve, Fence, Outcome,
    LockRead, KeepLocks, Unlock, LockWaits,
    Changes,
})
# fmt: on
NOTHING: Final = Ack(0)  # to a connection, the end of a request of which it sends nothing

Receive = Callable[[int, Sequence[Message], int], None]
Accept = Callable[[Asker, Sequence[Request], int], None]


class Astray(NamedTuple):
    """Shares of the messages of one path that are lost, doubled, and late by up to `late_s`."""

    loss: float
    double: float
    late: float
    late_s: float


def copies(rng: random.Random, astray: Astray, counters: dict[str, int]) -> list[float]:
    """In how many seconds each copy of a message arrives; 0: at once. None: it is lost."""
    if rng.random() < astray.loss:
        counters["lost"] += 1
        return []
    count = 1
    if rng.random() < astray.double:
        counters["doubled"] += 1
        count = 2
    found = []
    for _ in range(count):
        late = rng.random() < astray.late
        counters["late"] += late
        found.append(rng.uniform(0.0, astray.late_s) if late else 0.0)
    return found


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
                for late_s in copies(self._rng_of_closed, astray, self.counters):
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
            for late_s in copies(self._rng, astray, self.counters):
                if late_s:
                    self._later(server, late_s, partial(self._receive, server, sender, message))
                else:
                    kept.append(message)
        return kept

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


class RequestFaults:
    """Requests of clients and of other nodes, where a node takes them from a stream: of some, the question or its answer is
    lost, or it arrives late and past others, or there is another copy of it, whose answer goes nowhere.

    A stream has an order of its own, and no request may count on it: who hears nothing asks again with the same id, elsewhere
    or over another connection (kvstore/router.py). The first copy may come after that one, after later requests of the same
    client, and after the client has given up. So a node has to bear

    - questions (the first line of ASTRAY) at any time, and twice: what is told was true between question and answer;
    - Prepare, Finalize, Resolve, Fence and Outcome: they name a transaction, whose outcome is one. The log answers copies, and
      what is forgotten is never evaluated anew (txn/DESIGN.md, sections 4 and 8). Plain writes and increments are Prepares;
    - requests about locks: an owner that has ended locks nothing for longer than anything is late here, who asks for a lock
      again has one place in its queue, and reports of waits have numbers (section 16);
    - Changes: of two polls of one watch the later takes the place of the other, which is told that nothing has happened.

    Not GetTimestamps by which a client says what it has open: there the word that comes last counts, and an old one that passes
    a new one would end what that holds. That costs no more than SnapshotTooOld (kvstore/holds.py), but is foreseen by nobody.

    What is on its way at `clear` is lost, as with a connection that breaks. What has arrived at a process that is stopped waits
    there until that goes on, as in a socket.
    """

    def __init__(self, cluster: SimCluster) -> None:
        self.counters = dict.fromkeys(("lost", "unanswered", "doubled", "late", "late_in_vain"), 0)
        self._cluster = cluster
        self._rng = random.Random(f"{cluster.seed}/requests")
        self._servers: dict[str, Astray] = {}
        self._stores: dict[str, tuple[Process | None, Accept]] = {}  # that run, or ran last
        self._heals = 0
        cluster.on_open.append(self._attach)

    def set(self, server: str, astray: Astray) -> None:
        """From now on, of what this node takes."""
        self._servers[server] = astray

    def clear(self, server: str = "") -> None:
        """No more of it at this node; without a name: at none, and nothing is on its way."""
        if server:
            self._servers.pop(server, None)
        else:
            self._servers.clear()
            self._heals += 1

    def leave(self) -> None:
        """Processes to come are not looked at any more; what is still on its way is lost."""
        self._cluster.on_open.remove(self._attach)
        self.clear()

    def _attach(self, server: Server) -> None:
        assert server.node is not None
        store: Any = server.node.store
        direct = store.accept
        self._stores[server.name] = server.process, direct

        def accept(asker: Asker, requests: Sequence[Request], size_bytes: int = 0) -> None:
            astray = self._servers.get(server.name) if self._servers else None
            if astray is None:
                direct(asker, requests, size_bytes)
                return
            share = size_bytes // max(1, len(requests))
            for request in requests:
                for late_s, origin in self._fates(asker, request, astray):
                    if late_s:
                        self._later(late_s, server, origin, request, share)
                    else:
                        direct(origin, [request], share)

        store.accept = accept

    def _fates(self, asker: Asker, request: Request, astray: Astray) -> list[tuple[float, Asker]]:
        """When each copy of a request arrives, as of `copies`, and who gets its answer."""
        holds = isinstance(request, GetTimestamps) and request.session
        if holds or type(request) not in ASTRAY:
            return [(0.0, asker)]
        arrivals = copies(self._rng, astray, self.counters)
        if not arrivals:
            if self._rng.random() < 0.5:
                asker.answer(NOTHING)
                return []
            self.counters["unanswered"] += 1
            return [(0.0, _Deaf(asker))]
        return [(late_s, _Nobody() if n else asker) for n, late_s in enumerate(arrivals)]

    def _later(
        self, late_s: float, server: Server, asker: Asker, request: Request, size_bytes: int
    ) -> None:
        taken_by, heals = server.process, self._heals

        def arrive() -> None:
            """At whatever process the machine runs now; the stream ended with that which took it."""
            process, direct = self._stores[server.name]
            if process is None or process.dead or process is not server.process:
                self.counters["late_in_vain"] += 1
            elif heals != self._heals:
                self.counters["late_in_vain"] += 1
                asker.answer(NOTHING)
            else:
                origin = asker if process is taken_by else _Nobody()
                context = process.context()
                asyncio.get_running_loop().call_soon(
                    direct, origin, [request], size_bytes, context=context
                )

        asyncio.get_running_loop().call_later(late_s, arrive, context=world())


class _Deaf:
    """An asker whom the answer does not reach. His connection counts it all the same."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker

    def answer(self, _reply: Reply) -> None:
        self._asker.answer(NOTHING)


class _Nobody:
    """Of a copy: its answer goes nowhere. One for each, as the store tells askers apart."""

    def answer(self, reply: Reply) -> None:
        pass
