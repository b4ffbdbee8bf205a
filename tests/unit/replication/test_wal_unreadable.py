"""Recovery when the disk does not give some blocks: damage before the end of the log, and no guess about the end."""

from __future__ import annotations

import pytest

from kvstore.sim.disk import SimDisk
from replication.errors import LogUnreadable
from replication.wal import Damage, Wal, WalBatch
from replication.wal_format import BLOCK_BYTES
from tests.unit.replication.wal_driver import Node, entry


class BadDisk(SimDisk):
    """With blocks that cannot be read until they are written; or by one read alone."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: list[tuple[int, int]] = []
        self.bad_read: int | None = None  # the only one that fails; None: all do
        self.reads = 0

    def read(self, segment: int) -> bytes:
        data, holes = bytearray(super().read(segment)), []
        self.reads += 1
        for at, offset in self.bad:
            if at == segment and self.bad_read in (None, self.reads):
                data[offset : offset + BLOCK_BYTES] = b"\xff" * BLOCK_BYTES
                holes.append(offset)
        if holes:
            raise LogUnreadable(segment, bytes(data), holes)
        return bytes(data)

    def write(self, segment: int, offset: int, data: bytes) -> None:
        super().write(segment, offset, data)
        self.bad = [
            (at, hole)
            for at, hole in self.bad
            if at != segment or not offset <= hole < offset + len(data)
        ]


def node_of(size_bytes: int, *, marked: bool) -> tuple[BadDisk, list[WalBatch]]:
    """One group with three entries of so many bytes, a batch for each."""
    disk = BadDisk()
    node = Node(disk)
    batches = []
    for index in (1, 2, 3):
        node.append(1, entry(index, data=b"y" * size_bytes))
        batches.append(node.commit())
    if marked:
        node.mark()
    return disk, batches


def test_a_bad_block_within_a_body_is_a_fault_of_its_entry():
    disk, batches = node_of(6_000, marked=True)
    hole = (batches[1].segment, batches[1].offset + BLOCK_BYTES)
    disk.bad = [hole]
    wal, logs = Wal.recover(disk)
    assert wal.recovery is not None
    assert wal.recovery.unreadable == [hole]
    assert [fault.index for fault in logs[1].faulty] == [2]
    assert [one.index for one in logs[1].entries] == [1, 2, 3]


def test_a_bad_block_with_a_header_is_a_hole_in_the_log():
    disk, batches = node_of(100, marked=True)
    disk.bad = [(batches[1].segment, batches[1].offset)]
    wal, logs = Wal.recover(disk)
    assert wal.recovery is not None
    lost = (batches[1].segment, batches[1].offset, batches[2].segment, batches[2].offset)
    assert wal.recovery.damage == [Damage(*lost)]
    assert logs[1].suspect


@pytest.mark.parametrize("block", [0, 1])
def test_a_bad_block_that_may_be_of_the_last_batch_is_not_taken_for_a_torn_write(block):
    disk, batches = node_of(6_000, marked=False)
    disk.bad = [(batches[2].segment, batches[2].offset + block * BLOCK_BYTES)]
    before = disk.sync_count
    for _ in range(2):
        with pytest.raises(LogUnreadable):
            Wal.recover(disk)
    assert disk.sync_count == before  # nothing was changed


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_the_last_batch_survives_whichever_read_of_it_fails(number, block):
    disk, batches = node_of(6_000, marked=False)
    disk.bad = [(batches[2].segment, batches[2].offset + block * BLOCK_BYTES)]
    disk.bad_read = number
    syncs = disk.sync_count
    if (number, block) in ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1)):
        with pytest.raises(LogUnreadable):
            Wal.recover(disk)
        assert disk.sync_count == syncs  # nothing was changed
    wal, logs = Wal.recover(
        disk
    )  # the others matter not: of a body that is read again, and of what is torn
    assert disk.reads >= 4
    assert wal.recovery is not None
    assert (wal.recovery.damage, wal.recovery.torn_bytes) == ([], 0)
    assert [one.index for one in logs[1].entries] == [1, 2, 3]
    assert not logs[1].faulty


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_bad_block_before_the_end_is_told_whichever_read_meets_it_and_costs_nothing_later(number):
    disk, batches = node_of(6_000, marked=True)
    hole = (batches[1].segment, batches[1].offset + BLOCK_BYTES)
    disk.bad, disk.bad_read = [hole], number
    wal, logs = Wal.recover(disk)
    assert wal.recovery is not None
    assert wal.recovery.unreadable == ([hole] if number < 3 else [])
    assert [fault.index for fault in logs[1].faulty] == ([2] if number == 2 else [])
    assert [one.index for one in logs[1].entries] == [1, 2, 3]
    _, logs = Wal.recover(disk)
    assert [fault.index for fault in logs[1].faulty] == []


def test_a_bad_block_that_was_never_written_is_written_and_costs_nothing():
    disk, batches = node_of(100, marked=False)
    disk.bad = [(batches[2].segment, batches[2].offset + 3 * BLOCK_BYTES)]
    wal, logs = Wal.recover(disk)
    assert wal.recovery is not None
    assert not wal.recovery.damage
    assert [one.index for one in logs[1].entries] == [1, 2, 3]
    assert not logs[1].faulty
    assert not disk.bad


def test_a_blank_end_says_nothing_of_the_next_segment():
    disk = BadDisk()
    node = Node(disk)
    node.append(1, entry(1))
    node.commit()
    node.wal.rotate()
    node.append(1, entry(2))
    last = node.commit()
    assert last.offset == 0
    disk.bad = [(last.segment, 0)]
    with pytest.raises(LogUnreadable):
        Wal.recover(disk)
