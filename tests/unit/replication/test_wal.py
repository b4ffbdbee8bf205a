"""The running log: what a batch holds, when a segment may go, and that every written batch is found again.

Recovery of torn and damaged logs: test_wal_recovery.py. Random histories: tests/stateful/test_wal_machine.py.
"""

from __future__ import annotations

import random
import struct

import pytest
from crc32c import crc32c

from kvstore.sim.disk import SimDisk
from replication.errors import LogFormatError, LogMismatch
from replication.types import EntryKind, HardState
from replication.wal import GroupLog, Wal
from replication.wal_format import BLOCK_BYTES
from tests.unit.replication.wal_driver import SEGMENT_BYTES, Node, entry


def recovered(node: Node) -> dict[int, GroupLog]:
    return Wal.recover(node.disk.kill())[1]


def test_nothing_staged_is_no_batch():
    assert Wal().take() is None


def test_a_fresh_log_begins_with_segment_one():
    node = Node()
    node.append(1, entry(1))
    batch = node.write()
    assert batch is not None
    assert (batch.number, batch.segment, batch.offset, batch.create_bytes) == (
        1,
        1,
        0,
        SEGMENT_BYTES,
    )


def test_a_log_that_was_begun_is_there_whatever_happens_and_goes_on():
    disk = SimDisk()
    wal = Wal.begin(disk, segment_bytes=4 * BLOCK_BYTES)
    assert wal.segments == disk.segments() == [1]
    wal.append(1, [entry(1)])
    batch = wal.take()
    assert batch is not None
    assert (batch.number, batch.segment, batch.offset) == (2, 1, BLOCK_BYTES)
    disk.write(batch.segment, batch.offset, batch.data)
    found = []
    for seed in range(20):
        again = disk.fork().crash(random.Random(seed))
        for _ in range(2):
            wal, logs = Wal.recover(again, segment_bytes=4 * BLOCK_BYTES, begun=True)
            assert wal.segments == [1]
            assert wal.recovery is not None
            assert not wal.recovery.damage
        found.append([one.index for log in logs.values() for one in log.entries])
    assert {tuple(each) for each in found} == {(), (1,)}


@pytest.mark.parametrize("damage", ["lost", "rotten", "blank"])
def test_where_a_log_was_begun_none_is_no_new_beginning_and_what_is_left_of_it_stays(damage):
    disk = SimDisk()
    Wal.begin(disk, segment_bytes=4 * BLOCK_BYTES)
    if damage == "lost":
        disk.lose(1)
    else:
        disk.write(1, 0, (b"\xff" if damage == "rotten" else b"\0") * BLOCK_BYTES)
        disk.sync(1)
    before = [disk.read(segment) for segment in disk.segments()]
    for _ in range(2):
        with pytest.raises(LogMismatch, match="nothing of the log is left"):
            Wal.recover(disk, segment_bytes=4 * BLOCK_BYTES, begun=True)
    assert [disk.read(segment) for segment in disk.segments()] == before


def test_batches_stand_one_behind_the_other_at_block_boundaries():
    node = Node()
    end = 0
    for index in range(1, 8):
        node.append(1, entry(index, data=b"x" * (index * 1500)))
        batch = node.commit()
        assert (batch.segment, batch.offset, batch.offset % BLOCK_BYTES) == (1, end, 0)
        assert len(batch.data) % BLOCK_BYTES == 0
        end = batch.offset + len(batch.data)


def test_one_batch_holds_what_all_groups_staged():
    node = Node()
    for group in (7, 3, 2**64 - 1):
        node.append(group, entry(1), entry(2, 2))
        node.hard(group, 2, vote=group, commit=1)
    node.commit()
    assert node.wal.take() is None
    node.restart(node.disk.kill())


@pytest.mark.parametrize("size", [0, 1, 511, 4096, 1 << 20])
def test_data_of_any_size_and_kind_comes_back(size):
    node = Node()
    one = entry(
        1, data=bytes(range(256)) * (size // 256) + b"z" * (size % 256), kind=EntryKind.CONFIG
    )
    node.append(1, one)
    node.commit()
    assert recovered(node)[1].entries == [one]


def test_an_empty_entry_comes_back():
    node = Node()
    one = entry(1, kind=EntryKind.NOOP)
    node.append(1, type(one)(1, 1, EntryKind.NOOP, b""))
    node.commit()
    assert recovered(node)[1].entries[0].data == b""


def test_a_smaller_index_replaces_the_suffix():
    node = Node()
    node.append(1, *(entry(i) for i in range(1, 10)))
    node.commit()
    node.append(1, entry(5, 2), entry(6, 2))
    node.commit()
    assert [(e.index, e.term) for e in recovered(node)[1].entries] == [
        (1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2),
    ]  # fmt: skip


def test_a_suffix_may_be_replaced_within_one_batch():
    node = Node()
    node.append(1, entry(1), entry(2), entry(3))
    node.append(1, entry(2, 2))
    node.append(1, entry(3, 3))
    node.commit()
    node.restart(node.disk.kill())


def test_a_gap_is_our_own_bug():
    wal = Wal()
    with pytest.raises(AssertionError, match="gap"):
        wal.append(1, [entry(2)])


def test_entries_below_the_start_cannot_be_replaced():
    node = Node()
    node.append(1, *(entry(i) for i in range(1, 5)))
    node.compact(1, 3)
    with pytest.raises(AssertionError, match="settled"):
        node.wal.append(1, [entry(3, 2)])


def test_reset_empties_the_log_and_keeps_the_hard_state():
    node = Node()
    node.append(1, entry(1), entry(2))
    node.hard(1, 3, vote=2)
    node.commit()
    node.reset(1, 100, 3)
    node.append(1, entry(101, 3))
    node.commit()
    log = node.restart(node.disk.kill())[1]
    assert (log.hard_state, log.start) == (HardState(3, 2, 0), (100, 3))
    assert log.entries == [entry(101, 3)]


def test_a_tombstone_voids_the_old_replica_and_stays():
    node = Node()
    node.append(1, entry(1), entry(2))
    node.hard(1, 3, vote=2)
    node.tombstone(1, 5)
    node.commit()
    node.tombstone(1, 4)
    node.commit()
    assert node.restart(node.disk.kill())[1] == GroupLog(HardState(), (0, 0), [], tombstone=5)


def test_a_replica_may_begin_anew_after_its_tombstone():
    node = Node()
    node.append(1, *(entry(i) for i in range(1, 9)))
    node.tombstone(1, 5)
    node.reset(1, 3, 1)
    node.append(1, entry(4, 2))
    node.hard(1, 9)
    node.commit()
    assert node.restart(node.disk.kill())[1].tombstone == 5


def test_a_tombstone_survives_a_snapshot_and_every_segment_after_it():
    node = Node()
    node.append(1, *(entry(i) for i in range(1, 9)))
    node.tombstone(1, 5)
    node.commit()
    node.reset(1, 40, 3)  # a snapshot for a later replica of the group
    node.hard(1, 9)
    node.commit()
    first = node.wal.segments[0]
    while first in node.wal.segments:
        node.append(1, entry(node.group(1).last + 1, term=9, data=b"x" * 5000))
        node.commit()
        node.compact(1, node.group(1).last - 1)
    assert node.restart(node.disk.kill())[1].tombstone == 5


def test_a_full_segment_gives_way_to_the_next_which_begins_with_every_group():
    node = Node()
    node.hard(99, 7, vote=3)
    node.tombstone(98, 4)
    while node.wal.segments != [1, 2]:
        node.append(1, entry(node.group(1).last + 1, data=b"x" * 5000))
        node.commit()
    only_newest = SimDisk()
    only_newest.create(2, SEGMENT_BYTES)
    only_newest.write(2, 0, node.disk.read(2))
    logs = Wal.recover(only_newest)[1]
    assert logs[99] == GroupLog(HardState(7, 3, 0), (0, 0), [])
    assert logs[98].tombstone == 4
    assert logs[1].start == (0, 0)


def test_a_batch_larger_than_a_segment_gets_a_segment_of_its_size():
    node = Node()
    node.append(1, entry(1, data=b"x" * 3 * SEGMENT_BYTES))
    batch = node.commit()
    assert batch.create_bytes > 3 * SEGMENT_BYTES
    assert node.wal.bytes_live == batch.create_bytes
    node.restart(node.disk.kill())


def test_a_segment_goes_only_when_the_next_head_is_durable():
    node = Node()
    node.append(1, entry(1))
    node.commit()
    node.compact(1, 1)
    assert node.wal.obsolete() == []
    node.wal.rotate()
    node.append(1, entry(2))
    node.write()
    assert node.wal.obsolete() == []
    for batch in node.unsynced:
        node.disk.sync(batch.segment)
        node.wal.synced(batch.number)
    assert node.wal.obsolete() == [1]
    node.wal.forget(1)
    assert node.wal.segments == [2]


def test_what_is_compacted_after_the_head_keeps_its_segment_until_the_next_head():
    node = Node()
    node.append(1, entry(1))
    node.commit()
    node.wal.rotate()
    node.hard(1, 1)
    node.commit()
    node.compact(1, 1)
    assert node.wal.segments == [1, 2]
    node.wal.rotate()
    node.hard(1, 2)
    node.commit()
    assert node.wal.segments == [3]


def test_a_replaced_suffix_does_not_keep_its_old_segment():
    node = Node()
    node.append(1, entry(1))
    node.commit()
    node.wal.rotate()
    node.append(1, entry(2), entry(3))
    node.commit()
    node.append(1, entry(2, 2))
    node.compact(1, 1)
    node.wal.rotate()
    node.commit()
    assert node.wal.segments == [3]
    node.restart(node.disk.kill())


def test_the_idle_groups_vote_outlives_its_segment():
    node = Node()
    node.hard(42, 9, vote=3, commit=0)
    for index in range(1, 100):
        node.append(1, entry(index, data=b"x" * 4000))
        node.commit()
        node.compact(1, index)
    assert node.wal.segments[0] > 2
    assert node.restart(node.disk.kill())[42].hard_state == HardState(9, 3, 0)


def test_a_lagging_group_is_pinned_and_a_carry_frees_its_segments():
    node = Node()
    node.append(5, entry(1), entry(2, 2))
    for index in range(1, 60):
        node.append(1, entry(index, data=b"x" * 4000))
        node.commit()
        node.compact(1, index)
    assert node.wal.segments[0] == 1
    assert len(node.wal.segments) > 2
    assert node.wal.pinned() == [5]
    node.carry(5)
    node.commit()
    assert node.wal.pinned() == []
    node.wal.rotate()
    node.mark()
    assert node.wal.segments[0] > 1
    assert node.restart(node.disk.kill())[5].entries == [entry(1), entry(2, 2)]


def test_a_carry_that_tears_leaves_the_old_copy():
    node = Node()
    node.append(5, entry(1), entry(2, 2))
    node.commit()
    node.carry(5)
    batch = node.write()
    assert batch is not None
    node.disk.flip(batch.segment, batch.offset + 70)
    node.restart(node.disk.kill())
    assert node.model[5].base == 0


def test_several_batches_may_be_in_flight():
    node = Node()
    for index in range(1, 6):
        node.append(1, entry(index))
        node.write()
    node.wal.synced(3)
    node.append(1, entry(6))
    batch = node.write()
    assert batch is not None
    synced_upto = struct.unpack_from("<Q", batch.data, 48)[0]
    assert synced_upto == 1 << 32 | 3 * BLOCK_BYTES


def test_the_log_goes_on_behind_its_end_after_a_restart():
    node = Node()
    node.append(1, entry(1))
    first = node.commit()
    node.restart(node.disk.kill())
    node.append(1, entry(2))
    second = node.commit()
    assert (second.segment, second.offset) == (1, len(first.data))
    assert second.number > first.number
    node.restart(node.disk.kill())


def test_a_mark_is_wanted_after_anything_else():
    node = Node()
    assert not node.wal.needs_mark
    node.append(1, entry(1))
    node.commit()
    assert node.wal.needs_mark
    node.mark()
    assert not node.wal.needs_mark


def test_a_newer_format_is_refused_and_nothing_is_changed():
    node = Node()
    node.append(1, entry(1))
    batch = node.commit()
    head = bytearray(batch.data[:64])
    head[8] = 2
    head[60:] = struct.pack("<I", crc32c(bytes(head[:60])))
    node.disk.write(1, 0, bytes(head))
    before = node.disk.read(1)
    with pytest.raises(LogFormatError, match="format 2, of a newer version; this one reads 1"):
        Wal.recover(node.disk)
    assert node.disk.read(1) == before


def test_the_format_does_not_change_unnoticed():
    """Bytes of format 1, record by record. A change here needs a new format number."""
    wal = Wal()
    wal.append(2, [entry(1, 3, b"data", kind=1)])
    batch = wal.take()
    assert batch is not None
    data = batch.data
    magic, version, _, count, number, length, segment, offset = struct.unpack_from(
        "<8sHHIQIII", data
    )
    assert (magic, version, count, number, segment, offset) == (b"\xabKVWAL\r\n", 1, 2, 1, 1, 0)
    assert length == 64 + 2 * 48 + 4 + 40
    assert struct.unpack_from("<I", data, 60)[0] == crc32c(data[:60])
    assert struct.unpack_from("<BBHIQQQQI", data, 64) == (1, 1, 0, 4, 2, 1, 3, 0, crc32c(b"data"))
    assert struct.unpack_from("<I", data, 64 + 44)[0] == crc32c(data[64:108], 1)
    assert data[64 + 96 : 64 + 100] == b"data"
    assert not any(data[length:])


def test_only_segments_beyond_the_limit_make_a_group_pinned():
    node = Node()  # with segments_max 2
    for group in (1, 2, 3):
        node.append(group, entry(1))
        node.wal.rotate()
        node.commit()
        assert node.wal.pinned() == ([1] if group == 3 else [])
