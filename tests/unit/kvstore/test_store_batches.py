"""Claims: what the engine gets is whole. Wherever a crash cuts the sequence of write batches, each range's applied index says
exactly which entries its rows hold (pitfall 1); the log is never cut above what the engine has flushed (pitfall 23); and what
the engine says is told only by who still leads after it was asked (pitfall 5).

And what one turn reads is bounded (T1, T2), so that no client's reads hold up all others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast, get_args

import msgspec
import pytest

from kvstore.adapters.memory_engine import MemoryDirectory, MemoryEngine
from kvstore.config import NodeConfig
from kvstore.errors import StorageError
from kvstore.node import Node
from kvstore.replica import BATCH_BYTES_MAX, BATCH_COMMANDS_MAX, new_config
from kvstore.store import BUSY, WRITE_BATCH_ROWS_MAX, Store
from replication.errors import EntryTooLarge, NotLeader
from replication.probes import choosing, counting
from replication.types import Entry, EntryKind, Membership
from txn import keycode, reads
from txn.commands import (
    AbortUnstaged,
    Batch,
    Collect,
    Command,
    Commit,
    Decide,
    FencePart,
    Garbage,
    OracleBound,
    OutboxDone,
    PreparePart,
    ResolvePart,
    decode_batch,
    encode_batch,
    size_bytes,
)
from txn.evaluate import Limits
from txn.latches import Pending
from txn.messages import Failure, Prepare, Read, ReadReply, Stale
from txn.mvcc import encode_latest
from txn.state import RangeRow, decode_range_row
from txn.types import Guard, Participant, Stamp, Write, WriteKind, make_txn_id

MEMBERS = Membership(voters=(1, 2, 3), nodes=((1, 1), (2, 2), (3, 3)))
RANGES = {7: b"b", 8: b"d"}  # number -> start
CREATED = (10, 2)  # (index, term) at which both begin


class RecordingEngine(MemoryEngine):
    def __init__(self) -> None:
        super().__init__(MemoryDirectory())
        self.batches: list[dict[bytes, bytes | None]] = []

    def write(self, rows: Any) -> None:
        self.batches.append(dict(rows))
        super().write(rows)


def store_of(engine: MemoryEngine) -> Store:
    store = Store(
        node=1,
        cluster="c" * 32,
        engine=engine,
        clock=cast("Any", SimpleNamespace(monotonic=lambda: 0.0)),
        limits=Limits(),
        requests_max=10,
        inbox_bytes_max=1 << 20,
        oracle_window_ms=1_000,
        closed_lag_s=1.0,
        snapshot_hold_s=3600.0,
    )
    store.attach(cast("Any", SimpleNamespace(wake=lambda: None)), cast("Any", None))
    for number, start in RANGES.items():
        row = RangeRow(number, start, bytes([start[0] + 2]), 1, 1, *CREATED)
        store.add(row, new_config(MEMBERS, 1, *CREATED, 1))
    return store


def entry(number: int, index: int, keys: int = 3) -> Entry:
    """An entry that puts its index under keys of its own, and under one that all entries share."""
    start = RANGES[number]
    commands: list[Any] = []
    for key in [start, *(start + b"%d/%d" % (index, each) for each in range(keys))]:
        txn_id = make_txn_id(1, index * 10_000 + len(commands))
        commands.append(Commit(txn_id, key, index * 100 + len(commands), [key], [b"%d" % index]))
    return Entry(index, 2, EntryKind.COMMAND, encode_batch(Batch(0, 1, commands)))


def after_a_crash(batches: list[dict[bytes, bytes | None]]) -> MemoryEngine:
    """What stands in an engine that got these batches and no other."""
    engine = MemoryEngine(MemoryDirectory())
    for rows in batches:
        engine.write(rows)
    return engine


def entries_whose_rows_are_there(engine: MemoryEngine, number: int, upto: int) -> list[int]:
    return [
        index
        for index in range(CREATED[0] + 1, upto + 1)
        if engine.get(b"L" + RANGES[number] + b"%d/0" % index) is not None
    ]


@pytest.mark.parametrize("cut", [False, True], ids=["as it comes", "cut after each entry"])
@pytest.mark.parametrize("keys", [3, WRITE_BATCH_ROWS_MAX // 3], ids=["small", "large"])
def test_the_applied_index_is_atomic_with_the_data(cut, keys):
    engine = RecordingEngine()
    store = store_of(engine)
    last = CREATED[0] + 6
    with choosing(lambda name: cut and name == "write_batch_cut"):
        for first in range(CREATED[0] + 1, last, 2):
            for number in RANGES:
                store.apply(number, [entry(number, first, keys), entry(number, first + 1, keys)])
            store.finish()
    assert len(engine.batches) >= 3
    for count in range(len(engine.batches) + 1):
        left = after_a_crash(engine.batches[:count])
        for number, start in RANGES.items():
            stored = left.get(keycode.node_row(keycode.RANGE, number))
            applied = decode_range_row(stored).applied_index if stored else CREATED[0]
            expected = list(range(CREATED[0] + 1, applied + 1))
            assert entries_whose_rows_are_there(left, number, last) == expected
            newest = left.get(b"L" + start)
            assert (newest or b"").endswith(b"" if applied == CREATED[0] else b"%d" % applied)
            assert (newest is None) == (applied == CREATED[0])


def node_of(store: Store, flush: Any) -> tuple[Any, list[dict[int, int]]]:
    """A node around a store, whose engine is flushed by `flush`; and what its log was told to be cut at."""
    cuts: list[dict[int, int]] = []

    async def run(work: Any) -> Any:
        return work()

    adapters = SimpleNamespace(
        clock=SimpleNamespace(monotonic=lambda: 0.0), executor=SimpleNamespace(run=run)
    )
    node: Any = Node("d", "a:1", "", NodeConfig(), cast("Any", adapters))
    node.store, node.engine = store, SimpleNamespace(flush=flush)

    def flushed(noted: dict[int, int]) -> list[tuple[int, int]]:
        cuts.append(noted)
        return []

    node.host = SimpleNamespace(stats=lambda: {"synced_bytes": 0.0}, flushed=flushed)
    return node, cuts


async def test_the_log_is_not_cut_above_what_is_flushed():
    store = store_of(RecordingEngine())
    store.apply(7, [entry(7, 11), entry(7, 12)])
    store.finish()

    def flush() -> None:  # while it runs, turns go on
        store.apply(7, [entry(7, 13)])
        store.apply(8, [entry(8, 11)])
        store.finish()

    node, cuts = node_of(store, flush)
    await node.flush()
    assert cuts == [{7: 12, 8: CREATED[0]}]
    assert store.applied(7) == (13, 2)


async def test_a_flush_that_fails_cuts_nothing_and_stops_the_node():
    def flush() -> None:
        raise StorageError("no space")

    node, cuts = node_of(store_of(RecordingEngine()), flush)
    await node.flush()
    assert cuts == []
    with pytest.raises(StorageError):
        await asyncio.wait_for(node.fatal, 1.0)


async def test_a_range_whose_state_is_being_replaced_is_not_cut():
    store = store_of(RecordingEngine())
    store.replicas[8].state.row.installing = True
    node, cuts = node_of(store, lambda: None)
    await node.flush()
    assert cuts == [{7: CREATED[0]}]


def test_an_entry_has_the_same_rows_whoever_proposed_it():
    """Apply is a function of entry and state: the leader's answers and latches leave no trace in the rows."""
    entries = [entry(7, 11), entry(7, 12)]
    follower, leader = RecordingEngine(), RecordingEngine()
    for engine, proposed in ((follower, False), (leader, True)):
        store = store_of(engine)
        replica = store.replicas[7]
        if proposed:
            replica.evaluator = cast("Any", SimpleNamespace(term=2))
            for each in entries:
                replica.inflight[each.index] = (decode_batch(each.data), [])
        store.apply(7, entries)
        replica.evaluator = None  # nobody waits for answers here
        store.finish()
    assert follower.batches == leader.batches


LONG = bytes(1_000)
GUARDS = [Guard(LONG, LONG + b"\x00", 1)] * 75
PARTICIPANTS = [Participant(LONG, LONG, LONG + b"\x00")] * 50
ID = bytes(16)
EXAMPLES: dict[type, Command] = {  # each as long as it may be for its number of keys
    Commit: Commit(ID, LONG, 1 << 62, [LONG] * 9, [LONG] * 8 + [None]),
    PreparePart: PreparePart(
        ID, LONG, LONG, 1 << 62, 1 << 62, [LONG], [LONG], GUARDS, PARTICIPANTS, [Stamp(LONG, LONG, 9_999, True)]
    ),
    FencePart: FencePart(ID, LONG, LONG, 1, LONG, ID, 1 << 62),
    Decide: Decide(ID, LONG, 1 << 62),
    ResolvePart: ResolvePart(ID, LONG, LONG, 1 << 62, True),
    AbortUnstaged: AbortUnstaged(ID, LONG),
    OutboxDone: OutboxDone([(ID, LONG, LONG)] * 256),
    OracleBound: OracleBound(1 << 62),
    Collect: Collect(1 << 62, [Garbage(LONG, [1 << 62] * 9, 1 << 62, [ID] * 9, [ID] * 9)] * 50),
}  # fmt: skip


def batches_of(commands: Sequence[Command], adds_bytes: int = 0) -> list[Batch]:
    replica = store_of(RecordingEngine()).replicas[7]
    proposals = []
    for number, command in enumerate(commands):
        pending = Pending(make_txn_id(1, number), None, None)
        pending.command = command
        pending.adds_bytes = adds_bytes
        proposals.append(pending)
    replica.evaluator = cast(
        "Any", SimpleNamespace(proposals=proposals, closing=SimpleNamespace(promised=0))
    )
    return [batch for batch, _ in replica.take_batches()]


@pytest.mark.parametrize("kind", get_args(Command))
def test_entries_are_cut_by_all_that_they_hold_whatever_kind_of_command(kind):
    """An entry has to fit into a message to the followers; 3,300 fences with long keys were 10 MB in one."""
    command = EXAMPLES[kind]
    size = len(encode_batch(Batch(0, 1, [command])))
    count = min(3 * BATCH_BYTES_MAX // size, 5_000)
    batches = batches_of([command] * count)
    assert sum(len(batch.commands) for batch in batches) == count
    sizes = [len(encode_batch(batch)) for batch in batches]
    assert max(sizes) <= BATCH_BYTES_MAX
    if kind is not OracleBound:  # of which there is never more than one
        least = -(-count // BATCH_COMMANDS_MAX)
        assert len(sizes) <= max(4, least), "and they are not cut much smaller than they may be"


def test_entries_are_cut_by_what_they_make_apply_write():
    """Seven thousand deletes of 1 MiB each were one entry, and 7 GiB in one write of the engine."""
    command = Commit(ID, b"k", 5, [b"k"], [None])
    batches = batches_of([command] * 100, BATCH_BYTES_MAX // 10)
    assert [len(batch.commands) for batch in batches] == [9] * 11 + [1]
    batches = batches_of([command] * 3, 2 * BATCH_BYTES_MAX)
    assert [len(batch.commands) for batch in batches] == [1] * 3, "one command at least"


def test_an_entry_has_no_more_than_512_commands():
    """Ten thousand small refusals were one entry, and what is one entry is applied in one go, on every replica at once."""
    batches = batches_of([FencePart(ID, b"k", b"k", 1, b"k", ID, 9)] * 1_100)
    assert [len(batch.commands) for batch in batches] == [512, 512, 76]


@pytest.mark.parametrize("length", [0, 1, 300, 70_000])
@pytest.mark.parametrize("kind", get_args(Command))
def test_no_command_is_larger_in_an_entry_than_it_counts_for(kind, length):
    def scaled(value: Any) -> Any:
        if isinstance(value, bytes) and len(value) == len(LONG):
            return bytes(length)
        if isinstance(value, (list, tuple)):
            return [scaled(each) for each in value]
        return value

    plain = msgspec.to_builtins(EXAMPLES[kind], builtin_types=[bytes])
    command = msgspec.convert(scaled(plain), type=kind)
    assert len(encode_batch(Batch(0, 1, [command]))) <= size_bytes(command) + len(
        encode_batch(Batch(0, 1, []))
    )


def test_a_command_that_no_entry_may_hold_fails_alone_and_the_leader_goes_on():
    """In the log it could never leave: the stream to the followers refused it, and that ended the node."""
    store = store_of(RecordingEngine())
    taken: list[bytes] = []

    def propose(_range: int, _term: int, data: bytes) -> int:
        if len(data) > 4 << 20:
            raise EntryTooLarge("an entry of so many bytes")
        taken.append(data)
        return len(taken)

    store.attach(
        cast("Any", SimpleNamespace(wake=lambda: None, propose=propose)), cast("Any", None)
    )
    store.leadership(7, 2, True)
    replica = store.replicas[7]
    evaluator = replica.evaluator
    assert evaluator is not None
    evaluator.start(0.0)
    answers: dict[str, list[Any]] = {"small": [], "large": [], "late": []}
    for number, (name, size) in enumerate((("small", 1), ("large", 4 << 20), ("late", 1))):
        key = b"b%d" % number
        writes = [Write(WriteKind.PUT, key, bytes(size))]
        request = Prepare(number, 0, 0, make_txn_id(1, number), key, key, writes)
        evaluator.latches.acquire(pending := Pending(request.txn_id, request, name))
        pending.command = Commit(request.txn_id, key, 5, [key], [bytes(size)])
        evaluator.proposals.append(pending)
    store._propose(replica, evaluator)
    for origin, reply in replica.output.replies:
        answers[origin].append(reply)
    (refused,) = answers.pop("large")
    assert isinstance(refused, Failure)
    assert (refused.code, refused.message) == ("transaction_too_large", "an entry of so many bytes")
    assert answers == {"small": [], "late": []}
    commands = [command for data in taken for command in decode_batch(data).commands]
    proposed = [command.txn_id for command in commands if isinstance(command, Commit)]
    assert proposed == [make_txn_id(1, 0), make_txn_id(1, 2)]
    assert set(evaluator.latches.txns) == set(proposed), "what it had latched is free"


def test_what_a_deposed_leader_proposes_has_not_happened():
    def refuse(*_: Any) -> int:
        raise NotLeader

    store = store_of(RecordingEngine())
    store.attach(cast("Any", SimpleNamespace(wake=lambda: None, propose=refuse)), cast("Any", None))
    replica = store.replicas[7]
    store.leadership(7, 3, is_leader=True)
    evaluator = replica.evaluator
    assert evaluator is not None
    writes = [Write(WriteKind.PUT, b"b", b"v")]
    pending = Pending(
        make_txn_id(1, 1), Prepare(5, 7, 1, make_txn_id(1, 1), b"b", b"b", writes), "who asks"
    )
    evaluator.latches.acquire(pending)
    pending.command = Commit(pending.txn_id, b"b", 5, [b"b"], [b"v"])
    evaluator.proposals.append(pending)
    with counting() as reached:
        store._propose(replica, evaluator)
    assert reached["deposed_before_it_proposed"] == 1
    assert replica.output.replies == [("who asks", Failure(5, "not_leader"))]
    assert evaluator.latches.held() == 0


@pytest.mark.parametrize("ends", [True, False], ids=["the lease ends", "the lease lasts"])
def test_a_lease_that_ends_while_rows_are_looked_at_does_not_confirm(ends):
    """It was valid when the request came, and when the look began; another leader may have answered since (N2)."""
    lease, asked, answers = [True], list[int](), list[Any]()

    class Engine(RecordingEngine):
        def get(self, key: bytes) -> bytes | None:
            lease[0] = lease[0] and not (ends and key == b"Lb")
            return super().get(key)

    host = SimpleNamespace(
        wake=lambda: None,
        lease_valid=lambda _group: lease[0],
        read_index=lambda _group, context: asked.append(context),
    )
    store = store_of(Engine())
    store.attach(cast("Any", host), cast("Any", SimpleNamespace(call=lambda *_: None)))
    store.apply(7, [entry(7, 11)])
    store.finish()
    store.leadership(7, 2, is_leader=True)
    evaluator = store.replicas[7].evaluator
    assert evaluator is not None
    evaluator.start(0.0)
    evaluator.issued = 2_000
    lease[0] = True
    asker = SimpleNamespace(answer=answers.append)
    store.accept(cast("Any", asker), [Read(5, 7, 1, 2_000, [b"b"])])
    store.drain(0.0)
    assert (len(asked), len(answers)) == ((1, 0) if ends else (0, 1))
    store.read_confirmed(7, asked, True)
    assert answers == [ReadReply(5, 2_000, [1_100], [b"11"])]


# -- what one turn reads

MIB = 1 << 20


class ReadHost:
    """A host that leads every range; what it is asked for is counted."""

    def __init__(self) -> None:
        self.leased = True
        self.woken = False
        self.refused: dict[int, str] = {}
        self.contexts: list[tuple[int, int]] = []

    def wake(self) -> None:
        self.woken = True

    def lease_valid(self, _range: int) -> bool:
        return self.leased

    def read_index(self, number: int, context: int) -> None:
        self.contexts.append((number, context))


class Reading:
    """A store that leads both of its ranges, in each of them a row of 1 MiB; and who asks it for them."""

    def __init__(self) -> None:
        self.engine = RecordingEngine()
        self.store = store_of(self.engine)
        self.host = ReadHost()
        remote = SimpleNamespace(call=lambda *_: None)
        self.store.attach(cast("Any", self.host), cast("Any", remote))
        for number, start in RANGES.items():
            key = keycode.latest_row(start)
            self.engine.write({key: encode_latest(50, make_txn_id(1, number), bytes(MIB))})
            self.store.replicas[number].state.row.closed_ts = 60
            self.store.leadership(number, 2, True)
            evaluator = self.store.replicas[number].evaluator
            assert evaluator is not None
            evaluator.start(0.0)
        self.replies: list[Any] = []
        self.store._requests_max = 1_000

    def answer(self, reply: Any) -> None:
        self.replies.append(reply)

    def ask(self, number: int, request_id: int, *, stale: Stale | None = None) -> None:
        request = Read(request_id, number, 0, 60, [RANGES[number]], stale)
        self.store.accept(self, [request])

    def turn(self, now: float = 0.0) -> list[int]:
        """The numbers of those who are answered in it."""
        self.host.woken, self.replies = False, []
        self.store.drain(now)
        return [reply.id for reply in self.replies]


def test_answers_of_one_turn_are_bounded_in_bytes():
    """60 reads of 4 MiB were 240 MiB in one turn."""
    place = Reading()
    for request_id in range(10):
        place.ask(7, request_id)
    turns = [place.turn()]
    while place.host.woken:
        turns.append(place.turn())
    assert turns == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert place.store.open_requests == place.store.turn.waiting_bytes == 0


def test_who_is_put_off_goes_on_before_newcomers_whatever_their_range():
    place = Reading()
    for request_id in range(6):
        place.ask(8, request_id)
    place.turn()
    for request_id in range(10, 16):
        place.ask(7, request_id)
    assert place.turn() == [4, 5, 10, 11]
    place.ask(8, 20)
    assert place.turn() == [12, 13, 14, 15]
    assert place.turn() == [20]


def test_who_is_put_off_does_not_hold_up_writes():
    place = Reading()
    for request_id in range(20):
        place.ask(7, request_id)
    writes = [Write(WriteKind.PUT, b"bb", b"v")]
    identity = make_txn_id(60, 1)
    place.store.accept(place, [Prepare(100, 7, 0, identity, b"bb", b"bb", writes)])
    place.turn()
    evaluator = place.store.replicas[7].evaluator
    assert evaluator is not None
    assert identity in evaluator.latches.txns


def test_stale_reads_share_what_a_turn_has():
    place = Reading()
    place.store.leadership(8, 3, False)
    for request_id in range(0, 6, 2):
        place.ask(8, request_id, stale=Stale())
        place.ask(7, request_id + 1)
    assert place.turn() == [0, 2, 1, 3], "what needs no leader is answered first"
    assert place.turn() == [4, 5]
    assert not place.host.woken


def test_who_waits_for_longer_than_a_read_may_is_refused_without_a_look():
    place = Reading()
    for request_id in range(10):
        place.ask(7, request_id)
    place.turn()
    assert place.turn(now=6.0) == [4, 5, 6, 7, 8, 9]
    assert {(reply.code, reply.message) for reply in place.replies} == {("throttled", BUSY)}
    assert place.store.counters["requests_throttled"] == 6
    assert place.store.open_requests == place.store.turn.waiting_bytes == 0


def test_answers_that_wait_for_a_read_index_are_bounded_in_bytes(monkeypatch):
    """Without a lease nothing leaves before the others have said who leads; while they are silent, nobody looks."""
    monkeypatch.setattr(reads, "UNCONFIRMED_BYTES_MAX", 8 * MIB)
    place = Reading()
    place.host.leased = False
    for request_id in range(12):
        place.ask(7, request_id)
    assert [place.turn(), place.turn()] == [[], []]
    assert place.store.turn.unconfirmed_bytes == 8 * MIB
    place.ask(8, 100)
    assert place.turn() == [8, 9, 10, 11]
    assert {reply.code for reply in place.replies} == {"throttled"}
    assert place.turn() == [100]
    for number, context in place.host.contexts:
        place.store.read_confirmed(number, [context], True)
    assert place.store.turn.unconfirmed_bytes == 0
    assert len(place.replies) == 1 + 8
    place.ask(8, 101)
    place.turn()
    assert place.store.turn.unconfirmed_bytes == MIB


def test_requests_that_are_put_off_count_as_bytes_that_wait():
    place = Reading()
    for request_id in range(4):
        place.ask(7, request_id)
    long = Read(9, 7, 0, 60, [b"b" + bytes(1_000)] * 250)
    for _ in range(6):
        place.store.accept(place, [long])
    place.turn()
    assert place.store.turn.waiting_bytes > MIB
    place.ask(7, 5)
    assert [reply.code for reply in place.replies if isinstance(reply, Failure)] == ["throttled"]
    place.turn()
    place.ask(7, 6)
    assert place.turn()[-1:] == [6]
