"""Scenarios that go straight to where a rule matters: pauses, partitions, kills and lost messages at chosen instants.

`play` runs one and returns what is wrong: what the scenario found, and what the observers of the simulation saw meanwhile. It
is empty if the product keeps its promise. A scenario that does not get where it wants to go raises `NotReached`: that proves
nothing, neither way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final

from kvstore import logs
from kvstore.config import NodeConfig
from kvstore.errors import KVError
from kvstore.sim import loop as simulated
from kvstore.sim.cluster import Client, Server, SimCluster, small_logs
from kvstore.sim.observers import Observers
from kvstore.sim.process import outside
from kvstore.sim.scenario import rows_of
from replication.host import Host
from replication.messages import Message
from replication.raft import RaftNode

META: Final = 1
LOW, MIDDLE, HIGH = 2, 3, 4  # ranges up to h, up to p, and from there on
KEYS: Final = {LOW: b"a", MIDDLE: b"k", HIGH: b"z"}
WAIT_S: Final = 30.0
LEVEL_S: Final = 10.0  # within which a claim that replicas become level has to hold
LIMIT_S: Final = 300.0

Look = Callable[[Message], bool]  # whether the message arrives


class NotReached(Exception):
    """The scenario did not come about."""


class Stage:
    """A cluster of three, and what a scenario does with it."""

    def __init__(self, cluster: SimCluster) -> None:
        self.cluster = cluster
        self.network = cluster.network
        self.problems: list[str] = []
        self.looks: dict[
            str, Look
        ] = {}  # at messages of replication, by the node that they come to
        self.requests: dict[str, Callable[[Any], bool]] = {}  # the same, of clients' requests
        cluster.on_open.append(self._opened)

    def claim(self, holds: bool, text: str) -> None:
        if not holds:
            self.problems.append(text)

    # -- processes

    def server(self, name: str) -> Server:
        return self.cluster.servers[name]

    def host(self, name: str) -> Host:
        node = self.server(name).node
        assert node is not None
        assert node.host is not None
        return node.host

    def raft(self, name: str, group: int) -> RaftNode:
        return self.host(name).raft(group)

    def within(self, name: str, call: Callable[[], Any]) -> None:
        """Call it as that node's process."""
        process = self.server(name).process
        assert process is not None
        process.context().run(call)

    def within_client(self, client: Client, call: Callable[[], Any]) -> None:
        """The same, as a client's."""
        client.process.context().run(call)

    async def call(self, name: str, work: Awaitable[Any]) -> Any:
        process = self.server(name).process
        assert process is not None
        return await process.call(work)  # type: ignore[arg-type]

    async def flush(self, *names: str) -> None:
        for name in names:
            node = self.server(name).node
            assert node is not None
            await self.call(name, node.flush())

    def crash_soon(self, name: str, *, power: bool = True) -> None:
        """As soon as whoever runs now has done its turn."""
        loop = self.cluster.loop
        outside(lambda: loop.call_soon(lambda: self.cluster.crash(name, power=power)))

    def later(self, seconds: float, do: Callable[[], None]) -> None:
        loop = self.cluster.loop
        outside(lambda: loop.call_later(seconds, do))

    # -- waiting

    async def until(self, holds: Callable[[], bool], what: str, wait_s: float = WAIT_S) -> None:
        loop = self.cluster.loop
        end = loop.time() + wait_s
        while not holds():
            if loop.time() > end:
                raise NotReached(what)
            await asyncio.sleep(0.001)

    async def until_led_by(self, name: str, *groups: int) -> None:
        for group in groups:
            await self.until(partial(self.leads, name, group), f"{name} leads range {group}")

    async def prefer(self, name: str, group: int) -> None:
        """As if the plan had always preferred this node as the range's leader."""
        number = self.server(name).number
        for server in self.cluster.servers.values():
            assert server.node is not None
            assert server.node.leadership is not None
            server.node.leadership.preferred[group] = number
        await self.until_led_by(name, group)

    def leads(self, name: str, group: int) -> bool:
        """And nobody else thinks so, and it serves."""
        leading = [
            server.name
            for server in self.cluster.running()
            if server.node is not None
            and server.node.host is not None
            and group in server.node.host.groups()
            and server.node.host.raft(group).is_leader
        ]
        if leading != [name]:
            return False
        raft = self.raft(name, group)
        return raft.applied_index >= raft.term_start_index > 0

    async def level(self, *groups: int, wait_s: float = WAIT_S) -> None:
        """All replicas have applied all that the leader has committed."""

        def is_level() -> bool:
            servers = self.cluster.running()
            for group in groups:
                rafts = [self.raft(server.name, group) for server in servers]
                if len({(raft.applied_index, raft.last_index) for raft in rafts}) != 1:
                    return False
            return len(servers) == len(self.cluster.servers)

        await self.until(is_level, "replicas are level", wait_s)

    async def compare(self, group: int) -> None:
        """A claim: the replicas of a range become level, and then their rows are equal."""
        try:
            await self.level(group, wait_s=LEVEL_S)
        except NotReached:
            self.claim(False, f"the replicas of range {group} do not become level")
            return
        found: dict[str, list[tuple[bytes, bytes]]] = {}
        for server in self.cluster.servers.values():
            assert server.node is not None
            assert server.node.store is not None
            found[server.name] = rows_of(server, server.node.store.replicas[group].state.row)
        first, *others = found
        for other in others:
            self.claim(found[first] == found[other], f"range {group} of {first} and {other} differ")

    # -- clients

    async def client(self, name: str, timeout_s: float = 20.0) -> Client:
        return await self.cluster.client(name, timeout_s)

    async def put(self, client: Client, key: bytes, value: bytes) -> int:
        return await client.process.call(client.database.put(key, value))

    async def get(self, client: Client, key: bytes) -> bytes | None:
        return await client.process.call(client.database.get(key))

    async def outcome(self, work: Awaitable[Any], what: str) -> Any:
        """What comes of it, or the error of ours that came instead."""
        try:
            return await asyncio.wait_for(work, WAIT_S)
        except KVError as error:
            return error
        except TimeoutError:
            raise NotReached(what) from None

    # -- messages

    def _opened(self, server: Server) -> None:
        assert server.node is not None
        host: Any = server.node.host
        store: Any = server.node.store
        receive, accept, name = host.receive, store.accept, server.name

        def looked_at(node: int, messages: Sequence[Message], size_bytes: int = 0) -> None:
            look = self.looks.get(name)
            arrived = messages if look is None else [each for each in messages if look(each)]
            if arrived:
                receive(node, arrived, size_bytes)

        def asked(asker: Any, requests: Sequence[Any], size_bytes: int = 0) -> None:
            look = self.requests.get(name)
            arrived = requests if look is None else [each for each in requests if look(each)]
            if arrived:
                accept(asker, arrived, size_bytes)

        host.receive, store.accept = looked_at, asked

    def deliver(self, name: str, message: Message) -> None:
        """A message that was on its way arrives now."""
        host: Any = self.host(name)
        self.within(name, lambda: Host.receive(host, message.sender, [message]))


def play(
    scenario: Callable[[Stage], Awaitable[None]], seed: int = 1, config: NodeConfig | None = None
) -> list[str]:
    """One run of a scenario. Raises: NotReached."""

    async def main(loop: simulated.SimLoop) -> list[str]:
        cluster = SimCluster(str(seed), config=config or small_logs(NodeConfig()))
        observers, stage = Observers(cluster), Stage(cluster)
        with observers.watching_outcomes(), logs.overheard(cluster.log_record):
            watch = loop.create_task(observers.watch())
            try:
                await cluster.start()
                await scenario(stage)
            except Exception:
                if not (cluster.problems or stage.problems):
                    raise  # else it was stopped by what it was looking for
            finally:
                watch.cancel()
                observers.look()
                cluster.tell_unseen()
        return [*cluster.problems, *stage.problems]

    with logs.silenced():
        return simulated.run(main, seed, time_limit_s=LIMIT_S)
