"""Claims of messages that go astray, and of points: what was drawn happens, on the paths that were named."""

from __future__ import annotations

import asyncio
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from kvstore.peers import CLOSED_TIMESTAMPS
from kvstore.sim import loop as simulated
from kvstore.sim.messages import ASTRAY, Astray, MessageFaults, RequestFaults
from kvstore.sim.points import EXPECTED, RARE, UNREACHED, Points, never_reached
from kvstore.sim.process import PROCESS, Process
from kvstore.store import Asker
from replication.messages import Heartbeat, Message
from txn.messages import Ack, GetTimestamps, Read, Reply, Request

ROOT: Final = Path(__file__).parents[3]
LOST = Astray(1.0, 0.0, 0.0, 0.0)
DOUBLED = Astray(0.0, 1.0, 0.0, 0.0)
LATE = Astray(0.0, 0.0, 1.0, 2.0)


class Receiver:
    """A server n2 with a host that keeps what it gets, and its faults."""

    def __init__(self) -> None:
        cluster: Any = SimpleNamespace(seed="1", on_open=[])
        self.cluster, self.faults = cluster, MessageFaults(cluster)
        self.server: Any = SimpleNamespace(name="n2")
        self.boot()

    def boot(self) -> None:
        self.got: list[int] = []
        self.chunks: list[bytes] = []
        self.closed: list[bytes] = []
        self.contexts: list[Process | None] = []

        def receive(_sender: int, messages: Sequence[Message], _size_bytes: int = 0) -> None:
            self.got += [message.term for message in messages]
            self.contexts.append(PROCESS.get())

        self.host = SimpleNamespace(
            receive=receive,
            receive_snapshot_chunk=lambda _sender, chunk: self.chunks.append(chunk),
        )
        store = SimpleNamespace(closer=SimpleNamespace(hear=self.closed.append))
        self.server.process = Process("n2")
        self.server.node = SimpleNamespace(
            host=self.host, store=store, _receiver=lambda _kind, _sender: self._from_peer
        )
        for look in self.cluster.on_open:
            look(self.server)

    def _from_peer(self, payload: bytes) -> None:
        assert payload[:1] == CLOSED_TIMESTAMPS
        self.closed.append(payload[1:])

    def close(self, *payloads: bytes, sender: int = 1) -> None:
        """Of a stream that this node's process has had from its start."""
        receive = self.server.node._receiver("raft", sender)
        for payload in payloads:
            receive(CLOSED_TIMESTAMPS + payload)

    def send(self, *terms: int, sender: int = 1) -> None:
        self.host.receive(sender, [Heartbeat(1, 2, 1, term, 0, 0) for term in terms])


class Client:
    """A connection that keeps what it is to send, and how many of its requests have ended."""

    def __init__(self) -> None:
        self.told: list[int] = []
        self.ended = 0

    def answer(self, reply: Reply) -> None:
        self.ended += 1
        if reply.id:
            self.told.append(reply.id)


class Taker:
    """A server n2 whose store answers all that it is asked, and keeps it; and its faults."""

    def __init__(self) -> None:
        cluster: Any = SimpleNamespace(seed="1", on_open=[])
        self.cluster, self.faults = cluster, RequestFaults(cluster)
        self.server: Any = SimpleNamespace(name="n2")
        self.boot()

    def boot(self) -> None:
        self.got: list[int] = []
        self.bytes = 0
        self.contexts: list[Process | None] = []

        def accept(asker: Asker, requests: Sequence[Request], size_bytes: int = 0) -> None:
            self.bytes += size_bytes
            for request in requests:
                self.got.append(request.id)
                self.contexts.append(PROCESS.get())
                asker.answer(Ack(request.id))

        self.store = SimpleNamespace(accept=accept)
        self.server.process = Process("n2")
        self.server.node = SimpleNamespace(store=self.store)
        for look in self.cluster.on_open:
            look(self.server)

    def ask(self, client: Client, *ids: int) -> None:
        """In one message of 10 bytes for each."""
        self.store.accept(client, [Read(each, 0, 0, 0, [b"k"]) for each in ids], 10 * len(ids))


def simulate(test: Any) -> Any:
    world = typing.get_type_hints(test)["world"]

    def run() -> None:
        async def main(_loop: simulated.SimLoop) -> None:
            await test(world())

        simulated.run(main, 1)

    return run


@simulate
async def test_lost_messages_do_not_arrive_and_those_of_others_do(world: Receiver) -> None:
    world.faults.set("n1", "n2", LOST)
    world.send(1, 2)
    world.send(3, sender=3)
    world.host.receive_snapshot_chunk(1, b"lost")
    world.host.receive_snapshot_chunk(3, b"kept")
    world.faults.clear("n1", "n2")
    world.send(4)
    await asyncio.sleep(10.0)
    assert world.got == [3, 4]
    assert world.chunks == [b"kept"]


@simulate
async def test_doubled_messages_arrive_twice(world: Receiver) -> None:
    world.faults.set("n1", "n2", DOUBLED)
    world.send(1, 2)
    assert world.got == [1, 1, 2, 2]


@simulate
async def test_closed_timestamps_go_astray_as_raft_s_messages_do(world: Receiver) -> None:
    world.faults.set("n1", "n2", LOST)
    world.close(b"lost")
    world.close(b"kept", sender=3)
    world.faults.set("n1", "n2", DOUBLED)
    world.close(b"twice")
    world.faults.set("n1", "n2", LATE)
    world.close(b"late")
    world.faults.clear()
    world.close(b"last")
    world.server.process.kill()
    told, world.closed = world.closed, []
    world.boot()
    await asyncio.sleep(3.0)
    assert told == [b"kept", b"twice", b"twice", b"last"]
    assert world.closed == [b"late"]


@simulate
async def test_late_messages_are_overtaken(world: Receiver) -> None:
    world.faults.set("n1", "n2", LATE)
    world.send(*range(1, 21))
    world.faults.clear()
    world.send(99)
    await asyncio.sleep(3.0)
    assert world.got[0] == 99
    assert world.got != sorted(world.got)
    assert sorted(world.got) == [*range(1, 21), 99]


@simulate
async def test_a_late_message_finds_the_receivers_next_process(world: Receiver) -> None:
    world.faults.set("n1", "n2", LATE)
    world.send(7)
    world.server.process.kill()
    world.boot()
    await asyncio.sleep(3.0)
    assert world.got == [7]
    assert world.contexts == [world.server.process]


@simulate
async def test_who_left_looks_at_no_later_process(world: Receiver) -> None:
    world.faults.set("n1", "n2", LATE)
    world.send(7)
    world.faults.leave()
    assert world.cluster.on_open == []
    world.server.process.kill()
    world.boot()
    world.send(8)
    await asyncio.sleep(3.0)
    assert world.got == [8]
    assert world.faults.counters["late_in_vain"] == 1


@simulate
async def test_a_late_message_to_nobody_is_lost(world: Receiver) -> None:
    world.faults.set("n1", "n2", LATE)
    world.send(7)
    world.server.process.kill()
    await asyncio.sleep(3.0)
    assert world.got == []
    assert world.faults.counters["late_in_vain"] == 1


@simulate
async def test_of_lost_requests_the_question_or_the_answer_is_lost(world: Taker) -> None:
    client = Client()
    world.faults.set("n2", LOST)
    world.ask(client, *range(1, 101))
    assert 30 < len(world.got) < 70
    assert world.faults.counters["unanswered"] == len(world.got)
    assert world.bytes == 10 * len(world.got)
    assert client.told == []
    assert client.ended == 100  # so his connection has room for others
    world.faults.clear("n2")
    world.ask(client, 101)
    assert client.told == [101]


@simulate
async def test_requests_of_other_nodes_are_left_alone(world: Taker) -> None:
    client = Client()
    world.faults.set("n1", LOST)
    world.ask(client, 1, 2)
    assert client.told == world.got == [1, 2]


@simulate
async def test_of_a_doubled_request_one_answer_arrives(world: Taker) -> None:
    client = Client()
    world.faults.set("n2", DOUBLED)
    world.ask(client, 1, 2)
    assert world.got == [1, 1, 2, 2]
    assert client.told == [1, 2]
    assert client.ended == 2


@simulate
async def test_late_requests_are_overtaken_and_answered(world: Taker) -> None:
    client = Client()
    world.faults.set("n2", LATE)
    world.ask(client, *range(1, 21))
    world.faults.clear("n2")
    world.ask(client, 99)
    await asyncio.sleep(3.0)
    assert world.got == client.told
    assert world.got[0] == 99
    assert world.got != sorted(world.got)
    assert sorted(world.got) == [*range(1, 21), 99]
    assert set(world.contexts[1:]) == {world.server.process}


@simulate
async def test_a_late_request_at_the_next_process_is_answered_to_nobody(world: Taker) -> None:
    client = Client()
    world.faults.set("n2", LATE)
    world.ask(client, 7)
    world.server.process.kill()
    world.boot()
    await asyncio.sleep(3.0)
    assert world.got == [7]
    assert world.contexts == [world.server.process]
    assert client.told == []
    world.ask(client, 8)
    world.server.process.kill()
    await asyncio.sleep(3.0)
    assert world.got == [7]
    assert world.faults.counters["late_in_vain"] == 1


@simulate
async def test_what_is_on_its_way_when_all_heals_is_lost(world: Taker) -> None:
    client = Client()
    world.faults.set("n2", LATE)
    world.ask(client, 7)
    world.faults.clear()
    world.ask(client, 8)
    await asyncio.sleep(3.0)
    assert world.got == client.told == [8]
    assert client.ended == 2
    world.faults.leave()
    assert world.cluster.on_open == []


@simulate
async def test_what_a_client_says_to_hold_keeps_its_place(world: Taker) -> None:
    client = Client()
    for astray in (LOST, DOUBLED, LATE):
        world.faults.set("n2", astray)
        world.store.accept(client, [GetTimestamps(5, 0, 77, 1_000)], 10)
    assert world.got == client.told == [5, 5, 5]


def test_every_kind_of_request_may_go_astray_which_is_written_down_for_each() -> None:
    """Who adds one says why a copy of it may come late, or leaves it out here."""
    assert frozenset(typing.get_args(Request)) == ASTRAY


def test_a_seed_switches_on_about_a_quarter_of_the_points_and_always_the_same() -> None:
    names = [f"point{n}" for n in range(400)]
    points = Points("1")
    on = [name for name in names if any(points(name) for _ in range(1000))]
    assert 70 < len(on) < 130
    again = Points("1")
    assert on == [name for name in reversed(names) if any(again(name) for _ in range(1000))][::-1]
    other = Points("2")
    assert on != [name for name in names if any(other(name) for _ in range(1000))]


def test_every_probe_of_the_product_is_on_one_list() -> None:
    """A new one has to say how many seeds it takes; one that is gone must not be waited for."""
    pattern = re.compile(r'\b(reached|chance)\(\s*"([a-z_]+)"')
    found = set()
    for package in ("kvstore", "txn", "replication"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for kind, name in pattern.findall(path.read_text()):
                found.add(f"chance:{name}" if kind == "chance" else name)
    listed = [*EXPECTED, *RARE, *UNREACHED]
    assert sorted(found) == sorted(listed)
    assert len(EXPECTED) >= 50


def test_what_a_run_never_reached_depends_on_its_size() -> None:
    assert never_reached({}, seeds=10) == []
    assert never_reached(dict.fromkeys(EXPECTED[1:], 1), seeds=150) == [EXPECTED[0]]
    assert never_reached(dict.fromkeys(EXPECTED, 1), seeds=2_000) == list(RARE)


def test_points_that_are_off_take_nothing() -> None:
    points = Points("1", off=True)
    assert not any(points(f"point{n}") for n in range(200) for _ in range(50))
