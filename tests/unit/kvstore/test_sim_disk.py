"""Claims of the simulated disk's damage: it is where the log can prove what was durable, so it never goes unnoticed.

(What every log's files promise, and what a crash leaves: tests/contract/test_log_files.py.)
"""

from __future__ import annotations

import random

import pytest

from kvstore.sim.disk import SECTOR_BYTES, SimDisk
from replication.errors import LogDiskFull, LogUnreadable
from replication.turns import refusal_of
from replication.types import Entry, HardState
from replication.wal import Wal
from replication.wal_format import BLOCK_BYTES

GROUPS = (1, 2, 3)
SEGMENT_BYTES = 16 * BLOCK_BYTES
BATCHES = 40


def written(seed: int = 1, batches: int = BATCHES) -> tuple[SimDisk, Wal]:
    """A log of three groups over some segments; every batch is synced, and nothing is compacted."""
    disk, rng = SimDisk(), random.Random(seed)
    wal = Wal(segment_bytes=SEGMENT_BYTES)
    indices = dict.fromkeys(GROUPS, 0)
    for number in range(batches):
        for group in GROUPS:
            if rng.random() < 0.7:
                index = indices[group] = indices[group] + 1
                wal.set_hard_state(group, HardState(1 + number // 9, 1, index - 1))
                data = rng.randbytes(rng.randint(0, 1500))
                wal.append(group, [Entry(index, 1 + number // 9, 1, data)])
        write(disk, wal)
    return disk, wal


def write(disk: SimDisk, wal: Wal) -> None:
    wal.sync_mark()
    batch = wal.take()
    assert batch is not None
    if batch.create_bytes:
        disk.create(batch.segment, batch.create_bytes)
    disk.write(batch.segment, batch.offset, batch.data)
    disk.sync(batch.segment)
    wal.synced(batch.number)


def recovered(disk: SimDisk) -> dict[int, tuple[HardState, list[Entry]] | None]:
    """By group; None: refused."""
    _, logs = Wal.recover(disk, segment_bytes=SEGMENT_BYTES)
    return {
        group: None if refusal_of(log, 1) else (log.hard_state, log.entries)
        for group, log in logs.items()
    }


def test_what_is_provable_is_all_but_the_last_batch() -> None:
    disk, _ = written()
    headers = disk.provable()
    assert [header.number for header in headers] == list(range(1, BATCHES))


def test_what_is_not_synced_proves_nothing() -> None:
    disk, wal = written(batches=3)
    assert len(disk.provable()) == 2
    wal.sync_mark()
    batch = wal.take()
    assert batch is not None
    disk.write(batch.segment, batch.offset, batch.data)
    assert len(disk.provable()) == 2
    disk.sync(batch.segment)
    assert len(disk.provable()) == 3


@pytest.mark.parametrize("kind", ["rot", "misdirect"])
def test_damage_is_never_taken_for_a_torn_tail(kind: str) -> None:
    """Whatever was hit, a group is refused or has all that it ever had."""
    disk, _ = written()
    whole = recovered(disk.fork())
    refused = 0
    for seed in range(150):
        damaged, rng = disk.fork(), random.Random(seed)
        for _ in range(rng.randint(1, 3)):
            assert getattr(damaged, kind)(rng)
        found = recovered(damaged.crash(rng))
        for group, log in found.items():
            assert log is None or log == whole[group]
        refused += None in [found.get(group) for group in GROUPS]
    assert refused > 100


def test_a_second_recovery_of_a_damaged_log_says_the_same() -> None:
    disk, _ = written()
    for seed in range(20):
        damaged = disk.fork()
        damaged.rot(random.Random(seed))
        first = recovered(damaged)
        assert recovered(damaged) == first


def test_a_log_of_one_batch_has_nothing_to_damage() -> None:
    disk, _ = written(batches=1)
    rng = random.Random(1)
    assert disk.rot(rng) == disk.misdirect(rng) == SimDisk().rot(rng) == ""


def test_a_batch_may_be_torn_in_its_middle_and_is_cut() -> None:
    disk, wal = written(batches=5)
    whole = recovered(disk.fork())
    entries = [Entry(100 + n, 5, 1, bytes([n + 1]) * SECTOR_BYTES) for n in range(20)]
    wal.reset(1, 99, 5)
    wal.append(1, entries)
    batch = wal.take()
    assert batch is not None
    disk.write(batch.segment, batch.offset, batch.data)
    holes = 0
    for seed in range(60):
        after = disk.fork().crash(random.Random(seed))
        got = after.read(batch.segment)[batch.offset :][: len(batch.data)]
        sectors = [
            got[at : at + SECTOR_BYTES] == batch.data[at : at + SECTOR_BYTES]
            for at in range(0, len(got), SECTOR_BYTES)
        ]
        if all(sectors):
            continue
        holes += sectors[0] and sectors[-1]
        assert recovered(after) == whole
    assert holes > 5


def test_a_read_fails_once_also_at_the_next_process() -> None:
    disk, _ = written(batches=3)
    disk.fail_read(1)
    disk = disk.kill()
    disk.read(1)
    with pytest.raises(OSError, match="injected"):
        disk.read(1)
    disk.read(1)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_read_that_fails_for_the_last_batch_fails_the_recovery_as_a_real_disk_does(after) -> None:
    disk, _ = written(batches=3)
    whole = recovered(disk.fork())
    disk.fail_read(after)
    with pytest.raises(LogUnreadable, match="1 places, .* injected"):
        recovered(disk)
    assert recovered(disk) == whole


def test_a_read_of_what_the_log_can_prove_fails_as_a_whole() -> None:
    disk, wal = written(batches=3)
    wal.rotate()
    write(disk, wal)
    for segment in (1, 2):  # an older one, and one that has its first batch alone
        disk.fail_read()
        with pytest.raises(OSError, match="injected") as told:
            disk.read(segment)
        assert not isinstance(told.value, LogUnreadable)


def test_a_full_disk_makes_no_segment_until_it_is_emptied() -> None:
    disk, wal = written(batches=3)
    disk.fill()
    write(disk, wal)
    with pytest.raises(LogDiskFull):
        disk.create(99, BLOCK_BYTES)
    disk = disk.kill()
    disk.mend()
    disk.create(99, BLOCK_BYTES)
