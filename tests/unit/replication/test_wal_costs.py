"""What a damaged log costs: no entry for each index that is missing, however many are, and no segment for each restart."""

from __future__ import annotations

import pytest

from replication.turns import begin_of
from replication.wal import Wal
from tests.unit.replication.wal_driver import BODY, Node, entry, node_of, place


def test_a_lost_reset_costs_no_entry_for_each_index():
    """A snapshot was installed far ahead, and the batch that says so rots: all between is missing, in one stretch."""
    far = 10**9
    node = Node()
    node.append(1, *(entry(i) for i in range(1, 11)))
    node.hard(1, 1, commit=10)
    node.commit()
    node.reset(1, far, 5)
    lost = node.commit()
    node.hard(1, 5, commit=far)
    node.append(1, entry(far + 1, 5))
    node.commit()
    node.mark()
    node.mark()
    node.disk.flip(lost.segment, lost.offset + 20)
    log = Wal.recover(node.disk)[1][1]
    (fault,) = log.faulty
    assert (fault.index, fault.last_index, fault.term) == (11, far, 0)
    assert (fault.segment, fault.offset) == place(lost)
    assert (log.start, log.entries, log.suspect) == ((far, 5), [entry(far + 1, 5)], False)
    assert str(begin_of(log, 1, (10, 1))).startswith(f"{far - 10} damaged entries; the first is 11")
    assert str(begin_of(log, 1, (far, 4))).startswith(f"{far - 10} damaged entries")
    for applied in ((far, 5), (far + 1, 5)):  # the engine has them
        start = begin_of(log, 1, applied)
        assert not isinstance(start, str)
        assert start.log_start == applied
        assert [each.index for each in start.entries] == list(range(applied[0] + 1, far + 2))


def test_a_lost_head_costs_no_entry_for_each_index():
    far = 10**9
    node = Node()
    for group in (1, 2):
        node.reset(group, far, 5)
        node.hard(group, 5, commit=far)
    node.commit()
    node.wal.rotate()
    node.mark()
    assert node.disk.segments() == [2]
    for group in (1, 2):
        node.hard(group, 5, commit=far)
        node.append(group, entry(far + 1, 5))
    node.commit()
    node.mark()
    node.disk.flip(2, 8)
    _, logs = Wal.recover(node.disk, segment_bytes=node.segment_bytes)
    for log in logs.values():
        assert [(fault.index, fault.last_index) for fault in log.faulty] == [(1, far)]
        assert log.entries == [entry(far + 1, 5)]


def test_what_is_damaged_before_a_long_stretch_is_told_beside_it():
    node, batches = node_of(1, 2, 3)
    node.append(1, *(entry(i) for i in range(4, 504)))
    lost = node.commit()
    node.append(1, entry(504))
    node.commit()
    node.mark()
    node.mark()
    node.disk.flip(batches[1].segment, batches[1].offset + BODY)
    node.disk.flip(lost.segment, lost.offset + 20)
    log = Wal.recover(node.disk)[1][1]
    assert [(fault.index, fault.last_index) for fault in log.faulty] == [(2, 2), (4, 503)]
    assert (log.start, log.entries) == ((503, 1), [entry(504)])


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("lost", [1, 2])
def test_restarts_of_a_damaged_log_do_not_add_segments(lost, torn):
    """Each took 64 MiB. Where nothing is cut, nothing is destroyed, and the log goes on where it ended; `lost` 2: of a group
    in doubt, which stays in it.
    """
    node, batches = node_of(1, 2, 3)
    node.hard(1, 1, vote=2, commit=1)
    batches.append(node.commit())
    node.mark()
    node.mark()
    if torn:
        node.append(1, entry(4))
        cut = node.write()
        assert cut is not None
        node.disk.write(cut.segment, cut.offset, bytes(8))
    gone = batches[1 if lost == 1 else 3]
    node.disk.flip(gone.segment, gone.offset + 20)
    disk = node.disk
    for number in range(6):
        wal, logs = Wal.recover(disk, segment_bytes=node.segment_bytes)
        assert wal.recovery is not None
        assert [hole[:2] for hole in wal.recovery.damage] == [place(gone)]
        assert disk.segments() == ([1, 2] if torn else [1])
        assert logs[1].suspect == (lost == 2)
        assert [fault.index for fault in logs[1].faulty] == ([2] if lost == 1 else [])
        assert logs[1].hard_state.term == (0 if lost == 2 else 1)
        if number % 2:
            wal.append(2, [entry(number // 2 + 1)])
        else:
            wal.sync_mark()
        batch = wal.take()
        assert batch is not None
        assert not batch.create_bytes
        disk.write(batch.segment, batch.offset, batch.data)
        disk.sync(batch.segment)
        disk = disk.kill()
    wal, logs = Wal.recover(disk, segment_bytes=node.segment_bytes)
    assert logs[2].entries == [entry(1), entry(2), entry(3)]
