"""Claims: a range's snapshot carries every row of the range and no other; it is cut into bounded chunks; installing it replaces
what was there; until it is finished the marker says that there is no state; and the copy is equal to the source."""

from __future__ import annotations

import os

import pytest

from kvstore.adapters.memory_engine import MemoryDirectory, MemoryEngine
from kvstore.errors import CorruptionError
from kvstore.replica import Replica, new_config
from kvstore.snapshots import SLICE_BYTES_MAX, SLICE_ROWS_MAX, RangeSink, RangeSource, spans_of
from replication.types import Membership
from txn import keycode
from txn.apply import Overlay, apply_batch
from txn.commands import Batch, Commit, Decide, PreparePart
from txn.state import RangeRow, RangeState, decode_range_row, encode_row
from txn.types import Guard, Participant, make_txn_id

MEMBERS = Membership(voters=(1, 2, 3), nodes=((1, 1), (2, 2), (3, 3)))


class FakeStore:
    """What a sink needs of the store."""

    def __init__(self, engine):
        self.engine = engine
        self.told = []

    def installed(self, replica):
        self.told.append(replica.range_id)


def range_row(start=b"b", end=b"d"):
    return RangeRow(7, start, end, 1, 1, 10, 2)


def filled(engine, row, count=20):
    """A range with versions, history, an undecided part, an outbox row; and neighbours outside of it."""
    state = RangeState(row)
    overlay = Overlay(engine)
    for number in range(count):
        for turn in range(2):
            ts = 1_000 + number * 10 + turn
            key = b"c%03d\x00" % number
            command = Commit(make_txn_id(900, ts), key, ts, [key], [b"v%d" % ts])
            apply_batch(state, overlay, Batch(0, 1, [command]))
    participants = [Participant(b"c", b"c", b"c\x00"), Participant(b"x", b"x", b"x\x00")]
    for number, key in ((1, b"c"), (2, b"cc")):
        part = PreparePart(
            make_txn_id(950, number),
            key,
            key,
            2_000 + number,
            950,
            [key],
            [b"new"],
            [Guard(b"b", b"b\x01", 900)],
            [Participant(key, key, key + b"\x00"), *participants[1:]],
        )
        apply_batch(state, overlay, Batch(0, 1, [part]))
    apply_batch(state, overlay, Batch(0, 1, [Decide(make_txn_id(950, 2), b"cc", 3_000)]))
    overlay.put(keycode.node_row(keycode.RANGE, row.range_id), encode_row(row))
    engine.write(overlay.rows)
    for key in (b"a", b"az\xff", b"d", b"d\x00"):
        engine.write({keycode.latest_row(key): b"outside", keycode.history_row(key, 5): b"outside"})
    return state


def rows_of(engine, row):
    return [pair for start, end in spans_of(row) for pair in engine.scan(start, end)]


def copy(source, sink):
    chunks = 0
    while (chunk := source.chunk()) is not None:
        sink.chunk(chunk)
        chunks += 1
    source.close()
    sink.finish()
    sink.flush()
    return chunks


def receiver(engine):
    row = range_row()
    row.applied_index, row.applied_term = 3, 1
    replica = Replica(row, new_config(MEMBERS, 2, 1, 1, 1))
    engine.write({keycode.latest_row(b"cold"): b"stale" * 10, keycode.latest_row(b"d"): b"mine"})
    return replica


def test_a_copy_equals_its_source_and_leaves_neighbours_alone():
    ours, theirs = MemoryEngine(), MemoryEngine()
    row = range_row()
    state = filled(ours, row)
    replica = receiver(theirs)
    source = RangeSource(ours, row, MEMBERS)
    store = FakeStore(theirs)
    sink = RangeSink(store, replica, source.meta)
    copy(source, sink)
    assert rows_of(theirs, row) == rows_of(ours, row)
    assert theirs.get(keycode.latest_row(b"d")) == b"mine"
    assert theirs.get(keycode.latest_row(b"a")) is None
    assert replica.applied == (10, 2)
    assert store.told == [7]
    assert sorted(replica.state.parts) == sorted(state.parts)
    assert sorted(replica.state.outbox) == sorted(state.outbox)
    assert sorted(replica.state.intents) == sorted(state.intents)


def test_a_snapshot_is_of_one_instant():
    engine = MemoryEngine()
    row = range_row()
    filled(engine, row)
    before = rows_of(engine, row)
    source = RangeSource(engine, row, MEMBERS)
    first = source.chunk()
    engine.write({keycode.latest_row(b"c000\x00"): b"later", keycode.latest_row(b"czz"): b"later"})
    target = MemoryEngine()
    replica = receiver(target)
    sink = RangeSink(FakeStore(target), replica, source.meta)
    assert first is not None
    sink.chunk(first)
    copy(source, sink)
    assert rows_of(target, row) == before


def test_chunks_are_bounded_in_rows_and_bytes():
    engine = MemoryEngine()
    row = range_row()
    engine.write({keycode.node_row(keycode.RANGE, 7): encode_row(row)})
    for number in range(SLICE_ROWS_MAX * 2):
        engine.write({keycode.latest_row(b"c%05d" % number): os.urandom(2_000)})
    source = RangeSource(engine, row, MEMBERS)
    sizes = []
    while (chunk := source.chunk()) is not None:
        sizes.append(len(chunk))
    source.close()
    assert max(sizes) <= SLICE_BYTES_MAX + 4_096
    assert len(sizes) > 4


def test_an_unfinished_installation_leaves_its_marker_and_no_old_rows():
    directory = MemoryDirectory()
    engine = MemoryEngine(directory)
    replica = receiver(engine)
    other = MemoryEngine()
    row = range_row()
    filled(other, row)
    source = RangeSource(other, row, MEMBERS)
    sink = RangeSink(FakeStore(engine), replica, source.meta)
    chunk = source.chunk()
    assert chunk is not None
    sink.chunk(chunk)
    sink.abort()
    source.close()
    stored = engine.get(keycode.node_row(keycode.RANGE, 7))
    assert stored is not None
    assert decode_range_row(stored).installing
    assert engine.get(keycode.latest_row(b"cold")) is None


def test_a_stream_that_does_not_begin_with_the_range_is_refused():
    engine = MemoryEngine()
    replica = receiver(engine)
    sink = RangeSink(FakeStore(engine), replica, RangeSource(engine, range_row(), MEMBERS).meta)
    with pytest.raises(CorruptionError):
        sink.chunk(b"\x90")
