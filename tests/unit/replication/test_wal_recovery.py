"""Torn tails are cut, rot is told: each claim of wal_scan.py, small logs damaged at every place.

Invariants W4 to W8 of the log (replication/DESIGN.md, section 6).
"""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from kvstore.sim.disk import SECTOR_BYTES, SimDisk
from replication.errors import LogWriteFailed
from replication.types import HardState
from replication.wal import Damage, Wal
from replication.wal_format import (
    BATCH_HEADER_BYTES,
    BLOCK_BYTES,
    RECORD_HEADER_BYTES,
    BatchHeader,
    encode_batch_header,
    position,
)
from tests.unit.replication.wal_driver import (
    BODY,
    Node,
    check_told,
    difference,
    entry,
    node_of,
    place,
)


@pytest.mark.parametrize("survivors", range(256))
def test_of_a_torn_batch_nothing_counts_unless_all_that_matters_survived(survivors):
    node = Node()
    node.append(1, entry(1))
    node.commit()
    node.append(1, entry(2, data=b"y" * 3900))
    batch = node.wal.take()
    assert batch is not None
    assert len(batch.data) == 8 * SECTOR_BYTES
    for sector in range(8):
        if survivors >> sector & 1:
            at = sector * SECTOR_BYTES
            node.disk.write(batch.segment, batch.offset + at, batch.data[at : at + SECTOR_BYTES])
    disk = node.disk.kill()
    logs = Wal.recover(disk)[1]
    assert [e.index for e in logs[1].entries] == ([1, 2] if survivors == 255 else [1])
    again = Wal.recover(disk.kill())
    assert again[1] == logs
    assert again[0].recovery is not None
    assert again[0].recovery.torn_bytes == 0


def test_what_follows_a_torn_batch_is_cut_with_it():
    node = Node()
    node.append(1, entry(1))
    node.commit()
    node.append(1, entry(2))
    torn = node.write()
    node.append(1, entry(3))
    node.write()
    assert torn is not None
    node.disk.write(torn.segment, torn.offset, bytes(SECTOR_BYTES))
    logs = node.restart(node.disk.kill())
    assert [e.index for e in logs[1].entries] == [1]
    node.append(1, entry(2, 5))
    node.commit()
    assert [e.term for e in node.restart(node.disk.kill())[1].entries] == [1, 5]


def test_a_torn_head_leaves_the_log_in_the_segment_before():
    node = Node()
    node.append(1, entry(1))
    node.commit()
    node.wal.rotate()
    node.append(1, entry(2))
    torn = node.write()
    assert torn is not None
    node.disk.write(torn.segment, BODY, bytes(SECTOR_BYTES))
    logs = node.restart(node.disk.kill())
    assert [e.index for e in logs[1].entries] == [1]
    assert node.wal.segments == [1]
    node.append(1, entry(2, 2))
    assert node.commit().segment == 1


def test_a_segment_without_a_single_batch_is_removed():
    node, _ = node_of(1, 2)
    node.disk.create(2, 4 * BLOCK_BYTES)
    node.restart(node.disk.kill())
    assert node.wal.segments == [1]
    assert node.disk.segments() == [1]


def test_the_first_batch_of_all_may_tear():
    node = Node()
    node.append(1, entry(1))
    batch = node.write()
    assert batch is not None
    node.disk.write(1, 0, bytes(SECTOR_BYTES))
    assert node.restart(node.disk.kill()) == {}
    node.append(1, entry(1))
    assert node.commit().segment == 1


def test_a_damaged_body_is_a_fault_that_names_its_place_group_index_and_term():
    node = Node()
    node.append(7, entry(1, 4), entry(2, 4, b"to be damaged", kind=2), entry(3, 5))
    batch = node.commit()
    node.mark()
    node.mark()
    at = batch.data.index(b"to be damaged")
    node.disk.flip(batch.segment, batch.offset + at + 3, bit=6)
    log = Wal.recover(node.disk)[1][7]
    assert [(e.index, e.term, e.data) for e in log.entries] == [
        (1, 4, b"1.4"), (2, 4, b""), (3, 5, b"3.5"),
    ]  # fmt: skip
    (fault,) = log.faulty
    assert (fault.group, fault.index, fault.term, fault.kind) == (7, 2, 4, 2)
    assert (fault.segment, fault.offset, fault.length) == (batch.segment, batch.offset + at, 13)
    assert fault.crc is not None
    assert not log.suspect


def test_damage_behind_the_last_known_sync_is_a_torn_tail():
    node = Node()
    node.append(1, entry(1))
    node.commit()
    node.append(1, entry(2))
    batch = node.commit()
    node.disk.flip(batch.segment, batch.offset + BODY)
    log = Wal.recover(node.disk)[1][1]
    assert [e.index for e in log.entries] == [1]
    assert not log.faulty


def test_a_sync_mark_turns_the_same_damage_into_rot():
    node = Node()
    node.append(1, entry(1))
    node.commit()
    node.append(1, entry(2))
    batch = node.commit()
    node.mark()
    node.disk.flip(batch.segment, batch.offset + BODY)
    log = Wal.recover(node.disk)[1][1]
    assert [fault.index for fault in log.faulty] == [2]


def test_a_lost_batch_makes_every_group_suspect_and_names_the_hole():
    node, batches = node_of(1, 2, 3)
    node.disk.flip(batches[1].segment, batches[1].offset + 20)
    wal, logs = Wal.recover(node.disk)
    assert wal.recovery is not None
    assert wal.recovery.damage == [Damage(*place(batches[1]), *place(batches[2]))]
    log = logs[1]
    assert log.suspect  # no hard state was found behind the hole
    assert [e.index for e in log.entries] == [1, 2, 3]
    (fault,) = log.faulty
    assert (fault.index, fault.term, fault.crc) == (2, 1, None)  # one leader wrote 1 and 3
    assert (fault.segment, fault.offset) == place(batches[1])


def test_a_hard_state_behind_the_hole_ends_the_suspicion():
    node, batches = node_of(1, 2, 3)
    node.hard(1, 1, vote=2, commit=1)
    node.commit()
    node.mark()
    node.disk.flip(batches[1].segment, batches[1].offset + 20)
    log = Wal.recover(node.disk)[1][1]
    assert not log.suspect
    assert log.hard_state == HardState(1, 2, 1)
    assert [fault.index for fault in log.faulty] == [2]


def test_a_lost_last_entry_is_told_by_the_next_head():
    node, batches = node_of(1, 2, 3)
    node.wal.rotate()
    node.mark()
    node.mark()
    node.disk.flip(batches[2].segment, batches[2].offset + 20)
    log = Wal.recover(node.disk)[1][1]
    assert not log.suspect
    assert [fault.index for fault in log.faulty] == [3]
    assert (log.entries[-1].index, log.entries[-1].term) == (3, 1)


def test_a_lost_batch_at_the_end_of_a_segment_does_not_cost_the_next_segment():
    """Its only batch was durable and acknowledged, and was cut as a torn tail with the damage before it."""
    node, _ = node_of(1, 2)
    node.append(1, entry(3))
    lost = node.commit()
    node.wal.rotate()
    node.append(1, entry(4))
    node.hard(1, 1, vote=2, commit=2)
    node.commit()
    node.disk.flip(lost.segment, lost.offset + 20)
    for _ in range(3):
        wal, logs = Wal.recover(node.disk, segment_bytes=node.segment_bytes)
        assert wal.recovery is not None
        assert [hole[:2] for hole in wal.recovery.damage] == [place(lost)]
        log = logs[1]
        assert not log.suspect
        assert log.hard_state == HardState(1, 2, 2)
        assert [fault.index for fault in log.faulty] == [3]
        assert log.entries[-1] == entry(4)
        node.disk = node.disk.kill()


def test_a_torn_segment_behind_a_lost_batch_is_cut_and_the_hole_is_still_told():
    node, _ = node_of(1, 2)
    node.append(1, entry(3))
    lost = node.commit()
    node.wal.rotate()
    node.append(1, entry(4))
    torn = node.write()
    assert torn is not None
    node.disk.write(torn.segment, BATCH_HEADER_BYTES + 20, b"torn")
    node.disk.flip(lost.segment, lost.offset + 20)
    for _ in range(3):
        wal, logs = Wal.recover(node.disk, segment_bytes=node.segment_bytes)
        assert wal.recovery is not None
        assert [hole[:2] for hole in wal.recovery.damage] == [place(lost)]
        assert logs[1].suspect
        assert logs[1].entries == [entry(1), entry(2)]
        node.disk = node.disk.kill()


def test_a_lost_overwrite_is_not_taken_for_what_it_replaced():
    """2 and 3 of term 1 were replaced by a batch that is lost; 4 of term 3 came behind. Only the commit is believed."""
    node = Node()
    node.append(1, *(entry(i) for i in range(1, 4)))
    node.hard(1, 1, commit=1)
    node.hard(1, 1, commit=1)
    node.commit()
    node.append(1, entry(2, 2), entry(3, 3))
    lost = node.commit()
    node.append(1, entry(4, 3))
    node.hard(1, 3, commit=1)
    node.commit()
    node.mark()
    node.disk.flip(lost.segment, lost.offset + 20)
    log = Wal.recover(node.disk)[1][1]
    assert not log.suspect
    assert [(f.index, f.term) for f in log.faulty] == [(2, 0), (3, 3)]
    assert [e.index for e in log.entries] == [1, 2, 3, 4]
    assert log.entries[0] == entry(1)


def test_a_commit_staged_before_its_entries_proves_nothing_of_what_they_replace():
    node = Node()
    node.append(1, *(entry(i) for i in range(1, 6)))
    node.commit()
    node.hard(1, 2, commit=4)
    node.append(1, entry(3, 2), entry(4, 2))
    batch = node.commit()
    node.append(1, entry(5, 2))
    node.commit()
    node.mark()
    for record in (1, 2):
        at = BATCH_HEADER_BYTES + record * RECORD_HEADER_BYTES
        node.disk.flip(batch.segment, batch.offset + at)
    log = Wal.recover(node.disk)[1][1]
    assert {3, 4} <= {fault.index for fault in log.faulty}
    assert log.entries[-1] == entry(5, 2)


def test_suspicion_survives_further_restarts_and_ends_by_trust():
    node, batches = node_of(1, 2, 3)
    node.disk.flip(batches[2].segment, batches[2].offset + 20)
    disk = node.disk
    for round_ in range(3):
        wal, logs = Wal.recover(disk, segment_bytes=node.segment_bytes)
        assert logs[1].suspect
        wal.set_hard_state(1, HardState(8 + round_, 0, 0))
        batch = wal.take()
        assert batch is not None
        if batch.create_bytes:
            disk.create(batch.segment, batch.create_bytes)
        disk.write(batch.segment, batch.offset, batch.data)
        disk.sync(batch.segment)
        disk = disk.kill()
    wal, _ = Wal.recover(disk, segment_bytes=node.segment_bytes)
    wal.trust(1)
    batch = wal.take()
    assert batch is not None
    disk.write(batch.segment, batch.offset, batch.data)
    log = Wal.recover(disk.kill())[1][1]
    assert not log.suspect
    assert log.hard_state == HardState(10, 0, 0)


def test_suspicion_outlives_the_damaged_segment():
    node, batches = node_of(1, 2, 3)
    node.disk.flip(batches[2].segment, batches[2].offset + 20)
    disk = node.disk
    wal, _ = Wal.recover(disk, segment_bytes=node.segment_bytes)
    wal.compact(1, 3)
    wal.rotate()
    wal.append(1, [entry(3, 2)])
    batch = wal.take()
    assert batch is not None
    disk.create(batch.segment, batch.create_bytes)
    disk.write(batch.segment, batch.offset, batch.data)
    disk.sync(batch.segment)
    wal.synced(batch.number)
    for segment in wal.obsolete():
        disk.delete(segment)
    assert disk.segments() == [batch.segment]
    wal, logs = Wal.recover(disk.kill())
    assert logs[1].suspect
    assert wal.recovery is not None
    assert not wal.recovery.damage


def test_suspicion_of_a_group_that_no_record_names_outlives_the_damaged_segment():
    """It was known from the damage alone, and once that was deleted the group began anew, its vote forgotten."""
    node, batches = node_of(1, 2, 3)
    node.append(2, entry(1))
    lost = node.commit()
    node.mark()
    node.mark()
    node.disk.flip(lost.segment, lost.offset + 20)
    disk = node.disk
    wal, logs = Wal.recover(disk, segment_bytes=node.segment_bytes)
    assert 2 not in logs
    assert wal.doubt(2).suspect
    wal.rotate()
    wal.carry(1, logs[1].entries)
    for _ in range(2):
        batch = wal.take()
        assert batch is not None
        if batch.create_bytes:
            disk.create(batch.segment, batch.create_bytes)
        disk.write(batch.segment, batch.offset, batch.data)
        disk.sync(batch.segment)
        wal.synced(batch.number)
        wal.rotate()
        wal.sync_mark()
    for segment in wal.obsolete():
        disk.delete(segment)
    assert batches[0].segment not in disk.segments()
    wal, logs = Wal.recover(disk.kill())
    assert wal.recovery is not None
    assert not wal.recovery.damage
    assert logs[2].suspect


def test_rot_is_still_told_after_the_tail_that_proved_it_was_cut():
    """Only the header of the torn batch says that the damaged one was durable."""
    node = Node()
    for index in (1, 2):
        node.append(1, entry(index))
        rotten = node.commit()
    node.append(1, entry(3))
    torn = node.write()
    assert torn is not None
    node.disk.write(torn.segment, torn.offset + BODY, b"torn")
    node.disk.flip(rotten.segment, rotten.offset + BODY)
    disk = node.disk.kill()
    for _ in range(3):
        log = Wal.recover(disk, segment_bytes=node.segment_bytes)[1][1]
        assert [fault.index for fault in log.faulty] == [2]
        assert len(log.entries) == 2
        disk = disk.kill()


def test_a_batch_with_a_smaller_number_is_a_leftover_and_does_not_count():
    node, _ = node_of(1, 2)
    end = len(node.disk.read(1).rstrip(b"\0")) // BLOCK_BYTES * BLOCK_BYTES + BLOCK_BYTES
    here = position(1, end)
    stale = BatchHeader(2, 1, end, BATCH_HEADER_BYTES, 0, previous_end=here, synced_upto=0)
    node.disk.write(1, end, encode_batch_header(stale))
    wal, _ = Wal.recover(node.disk)
    assert wal.recovery is not None
    assert (wal.recovery.batches, wal.recovery.torn_bytes) == (4, BATCH_HEADER_BYTES)
    assert wal.recovery.cut == (1, end)


def test_a_new_replicas_log_is_not_taken_for_the_tail_of_the_old_ones():
    node = Node()
    node.reset(1, 100, 3)
    node.commit()
    node.tombstone(1, 5)
    node.append(1, *(entry(i, 4) for i in range(1, 121)))
    lost = node.commit()
    node.wal.rotate()
    node.mark()
    node.mark()
    node.disk.flip(lost.segment, lost.offset + 20)
    log = Wal.recover(node.disk)[1][1]
    assert (log.start, log.tombstone, log.suspect) == ((0, 0), 5, False)
    assert [fault.index for fault in log.faulty] == list(range(1, 121))


def test_a_missing_segment_is_told():
    node = Node()
    for index in range(1, 4):
        node.append(1, entry(index))
        node.wal.rotate()
        node.commit()
    node.mark()
    node.disk.lose(2)
    wal, logs = Wal.recover(node.disk)
    assert wal.recovery is not None
    assert wal.recovery.damage
    assert [fault.index for fault in logs[1].faulty] == [2]


def test_the_only_head_of_a_log_whose_older_segments_are_gone_is_not_a_torn_tail():
    node, _ = node_of(1, 2)
    node.compact(1, 2)
    node.wal.rotate()
    node.mark()
    assert node.disk.segments() == [2]
    node.disk.flip(2, 9)
    wal, logs = Wal.recover(node.disk)
    assert logs == {}
    assert wal.recovery is not None
    assert wal.recovery.damage


def test_damage_below_the_start_of_the_live_log_is_of_no_consequence():
    node, batches = node_of(1, 2, 3)
    node.compact(1, 2)
    node.wal.rotate()
    node.mark()
    node.mark()
    node.disk.flip(batches[0].segment, batches[0].offset + BODY)
    log = Wal.recover(node.disk)[1][1]
    assert (log.faulty, log.suspect, log.start) == ([], False, (2, 1))


def test_a_carry_heals_a_fault():
    node, batches = node_of(1, 2, 3)
    node.disk.flip(batches[1].segment, batches[1].offset + BODY)
    disk = node.disk
    wal, logs = Wal.recover(disk, segment_bytes=node.segment_bytes)
    assert [fault.index for fault in logs[1].faulty] == [2]
    wal.carry(1, [entry(1), entry(2), entry(3)])
    batch = wal.take()
    assert batch is not None
    disk.write(batch.segment, batch.offset, batch.data)
    log = Wal.recover(disk.kill())[1][1]
    assert log.faulty == []
    assert log.entries == [entry(1), entry(2), entry(3)]


def test_what_a_failed_sync_left_in_the_cache_is_written_again_before_it_is_believed():
    node = Node()
    node.append(1, entry(1))
    node.commit()
    node.append(1, entry(2))
    node.write()
    node.disk.fail_sync()
    with pytest.raises(LogWriteFailed):
        node.sync()
    disk = node.disk.kill()
    logs = Wal.recover(disk)[1]
    after = Wal.recover(disk.crash(random.Random(1)))[1]
    assert [e.index for e in logs[1].entries] == [1, 2]
    assert after == logs


def small_log() -> Node:
    """Two segments, three groups, every kind of record, all of it known to be durable."""
    node = Node(segment_bytes=5 * BLOCK_BYTES)
    node.append(1, entry(1), entry(2), entry(3))
    node.hard(1, 1, vote=1, commit=1)
    node.append(2, entry(1, data=b"q" * 100))
    node.commit()
    node.append(1, entry(3, 2), entry(4, 2))
    node.hard(2, 6, vote=2)
    node.tombstone(3, 9)
    node.commit()
    node.reset(2, 50, 6)
    node.append(2, entry(51, 6))
    node.carry(1)
    node.commit()
    node.wal.rotate()
    node.append(1, entry(5, 3))
    node.hard(1, 3, vote=2, commit=4)
    node.commit()
    node.mark()
    node.mark()
    return node


def used(node: Node) -> list[tuple[int, int]]:
    """Every byte that is not zero, but for the last two batches: before S."""
    places = []
    for segment in node.disk.segments():
        data = node.disk.read(segment)
        end = len(data.rstrip(b"\0")) // BLOCK_BYTES * BLOCK_BYTES
        last = segment == node.disk.segments()[-1]
        stop = end if last else end + BLOCK_BYTES
        places += [(segment, at) for at in range(stop) if data[at]]
    return places


def test_no_flipped_bit_before_the_last_sync_goes_untold():
    node = small_log()
    assert not difference(node.model, Wal.recover(node.disk.fork())[1])
    for segment, at in used(node):
        disk = node.disk.fork()
        disk.flip(segment, at, bit=at % 8)
        _, logs = Wal.recover(disk, segment_bytes=node.segment_bytes)
        check_told(node.model, list(logs.items()))
        assert Wal.recover(disk.kill(), segment_bytes=node.segment_bytes)[1] == logs


def test_no_lost_block_before_the_last_sync_goes_untold():
    node = small_log()
    blocks = sorted({(segment, at // BLOCK_BYTES) for segment, at in used(node)})
    for first, second in [*((b, b) for b in blocks), *pairwise(blocks)]:
        disk = node.disk.fork()
        for segment, block in (first, second):
            disk.write(segment, block * BLOCK_BYTES, bytes(BLOCK_BYTES))
            disk.sync(segment)
        wal, logs = Wal.recover(disk, segment_bytes=node.segment_bytes)
        assert wal.recovery is not None
        assert wal.recovery.damage
        check_told(node.model, list(logs.items()))
        assert Wal.recover(disk.kill(), segment_bytes=node.segment_bytes)[1] == logs


@pytest.mark.parametrize("seed", range(30))
def test_a_crash_within_recovery_changes_nothing(seed):
    """Recovery itself writes, creates and deletes: it is cut short at any of these, and done again."""
    rng = random.Random(seed)
    node = small_log()
    segment, at = rng.choice(used(node))
    node.append(1, entry(6, 3, b"t" * 5000))
    node.write()
    node.wal.rotate()
    node.append(1, entry(7, 3))
    node.write()
    disk = node.disk.crash(rng)
    if seed % 3:
        disk.flip(segment, at)
    expected = Wal.recover(disk.fork(), segment_bytes=node.segment_bytes)[1]
    for step in range(12):
        if rng.random() < 0.5:
            disk.fail_sync(after=step // 3)
        else:
            disk.fail_write(after=step // 3)
        try:
            logs = Wal.recover(disk, segment_bytes=node.segment_bytes)[1]
        except LogWriteFailed:
            disk = disk.crash(rng)
            continue
        assert logs == expected
        return
    assert Wal.recover(disk.kill(), segment_bytes=node.segment_bytes)[1] == expected


def test_an_empty_disk_is_an_empty_log():
    wal, logs = Wal.recover(SimDisk())
    assert (wal.segments, logs, wal.bytes_live) == ([], {}, 0)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_lost_record_header_leaves_the_other_records_of_its_batch(lost):
    node = Node()
    for group in (1, 2, 3):
        node.append(group, entry(1, data=b"body of %d" % group))
    batch = node.commit()
    node.mark()
    node.mark()
    node.disk.flip(batch.segment, BATCH_HEADER_BYTES + lost * RECORD_HEADER_BYTES + 5)
    _, logs = Wal.recover(node.disk)
    whole = [group for group, log in logs.items() if log.entries and not log.faulty]
    assert whole == [group for group in (1, 2, 3) if group != lost + 1]
    assert all(logs[group].entries[0].data == b"body of %d" % group for group in whole)


def test_between_two_lost_record_headers_a_body_is_a_fault_of_its_group():
    node = Node()
    for group in (1, 2, 3):
        node.append(group, entry(1))
    batch = node.commit()
    node.mark()
    node.mark()
    for lost in (0, 2):
        node.disk.flip(batch.segment, BATCH_HEADER_BYTES + lost * RECORD_HEADER_BYTES + 5)
    _, logs = Wal.recover(node.disk)
    assert [(fault.group, fault.index, fault.term) for fault in logs[2].faulty] == [(2, 1, 1)]
