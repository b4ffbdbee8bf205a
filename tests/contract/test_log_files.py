"""One suite for every implementation of LogFiles and of small files: real directories, and the simulated disk.

The port's promises (replication/ports.py), poisoning after the first failure, and that the log runs on either alike.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.adapters import wal_files
from kvstore.adapters.wal_files import DirectoryFiles, DirectoryLogFiles
from kvstore.sim.disk import SECTOR_BYTES, SimDisk
from replication.errors import LogDiskFull, LogUnreadable, LogWriteFailed
from replication.ports import LogFiles
from replication.types import Entry, HardState
from replication.wal import Wal

SIZE = 64 << 10
Breaker = Callable[[LogFiles, str], None]


@pytest.fixture(params=["directory", "simulated"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LogFiles]:
    made: LogFiles = (
        DirectoryLogFiles(tmp_path / "wal") if request.param == "directory" else SimDisk()
    )
    yield made
    made.close()


@pytest.fixture
def break_next(monkeypatch: pytest.MonkeyPatch) -> Breaker:
    """Makes the next write, sync or create fail; "full" is a create without space."""

    def fail(number: int) -> Callable[..., int]:
        def call(*args: object) -> int:
            raise OSError(number, os.strerror(number))

        return call

    def break_real(what: str) -> None:
        if what == "write":
            monkeypatch.setattr(os, "pwrite", fail(errno.EIO))
        elif what == "sync":
            monkeypatch.setattr(wal_files, "_sync_data", fail(errno.EIO))
        else:
            monkeypatch.setattr(wal_files, "_reserve", fail(errno.ENOSPC))

    def break_simulated(disk: SimDisk, what: str) -> None:
        if what == "write":
            disk.fail_write()
        elif what == "sync":
            disk.fail_sync()
        else:
            disk.capacity_bytes = 0

    def break_one(files: LogFiles, what: str) -> None:
        if isinstance(files, SimDisk):
            break_simulated(files, what)
        else:
            break_real(what)

    return break_one


def test_a_created_segment_is_listed_and_full_of_zeros(files):
    files.create(2, SIZE)
    files.create(1, 2 * SIZE)
    assert files.segments() == [1, 2]
    assert files.read(2) == bytes(SIZE)
    assert files.read(1) == bytes(2 * SIZE)


def test_what_is_written_is_read_before_and_after_the_sync(files):
    files.create(1, SIZE)
    files.write(1, 4096, b"one")
    files.write(1, 4097, b"two")
    assert files.read(1)[4094:4102] == b"\0\0otwo\0\0"
    files.sync(1)
    assert files.read(1)[4094:4102] == b"\0\0otwo\0\0"
    assert len(files.read(1)) == SIZE


def test_a_deleted_segment_is_gone_and_its_id_may_be_used_again(files):
    files.create(1, SIZE)
    files.write(1, 0, b"old")
    files.delete(1)
    assert files.segments() == []
    files.create(1, SIZE)
    assert files.read(1) == bytes(SIZE)


def test_reading_what_does_not_exist_is_an_error_of_its_own(files):
    with pytest.raises(FileNotFoundError):
        files.read(7)
    files.create(7, SIZE)


@pytest.mark.parametrize("what", ["write", "sync"])
def test_after_a_failure_everything_is_refused(files, break_next, what):
    files.create(1, SIZE)
    files.write(1, 0, b"x")
    break_next(files, what)

    def write_and_sync() -> None:
        files.write(1, 0, b"y" * 4096)
        files.sync(1)

    with pytest.raises(LogWriteFailed):
        write_and_sync()
    for again in (
        lambda: files.write(1, 0, b"z"),
        lambda: files.sync(1),
        lambda: files.create(2, SIZE),
        lambda: files.delete(1),
    ):
        with pytest.raises(LogWriteFailed, match="refused"):
            again()
    assert files.segments() == [1]


def test_a_full_disk_is_told_apart(files, break_next):
    break_next(files, "create")
    with pytest.raises(LogDiskFull):
        files.create(1, SIZE)
    with pytest.raises(LogWriteFailed, match="refused"):
        files.create(2, SIZE)


def test_a_segment_is_not_created_twice(files):
    files.create(1, SIZE)
    files.write(1, 0, b"precious")
    with pytest.raises(LogWriteFailed):
        files.create(1, SIZE)
    assert files.read(1).startswith(b"precious")


def test_the_log_runs_and_recovers_on_either(files):
    wal, logs = Wal.recover(files, segment_bytes=SIZE)
    assert logs == {}
    for index in range(1, 101):
        wal.append(1, [Entry(index, 1, 0, b"%d" % index * 1000)])
        wal.set_hard_state(1, HardState(1, 1, index))
        wal.compact(1, index - 10)
        batch = wal.take()
        assert batch is not None
        if batch.create_bytes:
            files.create(batch.segment, batch.create_bytes)
        files.write(batch.segment, batch.offset, batch.data)
        files.sync(batch.segment)
        wal.synced(batch.number)
        for segment in wal.obsolete():
            files.delete(segment)
            wal.forget(segment)
    assert files.segments() == wal.segments
    assert wal.segments[0] > 1
    again, logs = Wal.recover(files, segment_bytes=SIZE)
    assert again.segments == wal.segments
    assert logs[1].hard_state == HardState(1, 1, 100)
    assert [one.index for one in logs[1].entries][-10:] == list(range(91, 101))
    assert all(one.data == b"%d" % one.index * 1000 for one in logs[1].entries)


# -- what only a directory has ---------------------------------------------------------------------------------------


def bad_blocks(monkeypatch: pytest.MonkeyPatch, *offsets: int, number: int = errno.EIO) -> None:
    """Of every file, these blocks cannot be read."""
    pread = os.pread

    def read_bytes(path: Path) -> bytes:
        raise OSError(number, os.strerror(number))

    def read_block(handle: int, length: int, offset: int) -> bytes:
        if offset in offsets:
            raise OSError(number, os.strerror(number))
        return pread(handle, length, offset)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr(os, "pread", read_block)


def test_around_bad_blocks_everything_is_read_and_they_are_named(tmp_path, monkeypatch):
    files = DirectoryLogFiles(tmp_path)
    files.create(1, SIZE)
    files.write(1, 0, b"x" * SIZE)
    bad_blocks(monkeypatch, 4096, 3 * 4096)
    with pytest.raises(
        LogUnreadable, match="segment 1 .* 2 places, the first at offset 4096"
    ) as told:
        files.read(1)
    bad = b"\xff" * 4096
    good = b"x" * 4096
    assert told.value.data == good + bad + good + bad + good * 12
    assert list(told.value.holes) == [4096, 3 * 4096]
    assert told.value.errno == errno.EIO
    files.close()


def test_a_disk_that_gives_nothing_is_given_up(tmp_path, monkeypatch):
    files = DirectoryLogFiles(tmp_path)
    files.create(1, 300 * 4096)
    bad_blocks(monkeypatch, *range(0, 300 * 4096, 4096))
    with pytest.raises(OSError, match="Input/output") as told:
        files.read(1)
    assert not isinstance(told.value, LogUnreadable)
    files.close()


def test_files_with_other_names_are_left_alone(tmp_path):
    for name in ("notes.txt", "00000001.log.bak", "x.log"):
        (tmp_path / name).write_bytes(b"")
    files = DirectoryLogFiles(tmp_path)
    assert files.segments() == []
    files.close()
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    "kind", [DirectoryLogFiles, lambda path: DirectoryFiles(path).write_file("f", b"")]
)
def test_every_directory_that_is_made_has_a_durable_name(tmp_path, monkeypatch, kind):
    synced: list[Path] = []
    monkeypatch.setattr(wal_files, "_sync_directory", synced.append)
    kind(tmp_path / "data" / "n1" / "wal")
    assert synced[:3] == [tmp_path, tmp_path / "data", tmp_path / "data" / "n1"]


def test_a_spare_becomes_the_next_segment_and_is_full_of_zeros(tmp_path):
    files = DirectoryLogFiles(tmp_path)
    files.create(1, SIZE)
    files.write(1, SIZE // 2, b"x")
    spare = files._spare
    assert spare is not None
    spare._thread.join()
    number = spare.path.stat().st_ino
    files.create(2, SIZE)
    assert (tmp_path / "00000002.log").stat().st_ino == number
    assert files.read(2) == bytes(SIZE)
    assert not spare.path.exists()
    files.write(2, 0, b"y")
    files.sync(2)
    files.close()


def test_a_spare_of_another_size_is_not_taken(tmp_path):
    files = DirectoryLogFiles(tmp_path)
    files.create(1, SIZE)
    files.write(1, SIZE // 2, b"x")
    assert files._spare is not None
    files._spare._thread.join()
    files.create(2, 2 * SIZE)
    assert files.read(2) == bytes(2 * SIZE)
    files.close()


def test_a_spare_that_nobody_takes_keeps_no_space(tmp_path, monkeypatch):
    """The space that it held was what the next segment lacked."""
    files = DirectoryLogFiles(tmp_path)
    files.create(1, SIZE)
    files.write(1, SIZE // 2, b"x")
    assert files._spare is not None
    files._spare._thread.join()
    files.create(2, 2 * SIZE)
    assert not (tmp_path / "spare").exists()

    def full(handle: int, start: int, end: int) -> None:
        os.pwrite(handle, b"some of it", start)
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(wal_files, "_fill_zeros", full)
    files.write(2, SIZE, b"x")
    assert files._spare is not None
    files._spare._thread.join()
    assert not files._spare.ready
    assert not (tmp_path / "spare").exists()
    files.close()


def test_a_spare_left_by_a_crash_is_not_used(tmp_path):
    (tmp_path / "spare").write_bytes(b"unknown" * 10000)
    files = DirectoryLogFiles(tmp_path)
    files.create(1, SIZE)
    assert files.read(1) == bytes(SIZE)
    files.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001.log"]


def test_closing_stops_the_spare(tmp_path):
    files = DirectoryLogFiles(tmp_path)
    files.create(1, SIZE)
    files.write(1, SIZE // 2, b"x")
    files.close()
    assert [path.name for path in tmp_path.iterdir()] == ["00000001.log"]


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    files = DirectoryLogFiles(tmp_path, spare=False)
    files.create(1, SIZE)
    whole = os.pwrite

    def some(handle: int, data: bytes, offset: int) -> int:
        return whole(handle, bytes(data)[:1000], offset)

    monkeypatch.setattr(os, "pwrite", some)
    data = random.Random(1).randbytes(4096)
    files.write(1, 4096, data)
    monkeypatch.undo()
    assert files.read(1)[4096:8192] == data
    files.close()


# -- what only the simulated disk has --------------------------------------------------------------------------------


def test_of_an_unsynced_write_any_subset_of_sectors_survives_a_crash():
    seen = set()
    for seed in range(60):
        disk = SimDisk()
        disk.create(1, 4 * SECTOR_BYTES)
        disk.write(1, 0, b"a" * 2 * SECTOR_BYTES)
        disk.sync(1)
        disk.write(1, 0, b"b" * 4 * SECTOR_BYTES)
        seen.add(disk.crash(random.Random(seed)).read(1)[::SECTOR_BYTES])
    assert {b"aa\0\0", b"bbbb"} <= seen
    assert len(seen) > 6
    assert all(set(one[:2]) <= set(b"ab") and set(one[2:]) <= set(b"\0b") for one in seen)


def test_one_seed_gives_one_crash():
    outcomes = []
    for _ in range(2):
        disk = SimDisk()
        disk.create(1, SIZE)
        disk.write(1, 0, b"b" * SIZE)
        outcomes.append(disk.crash(random.Random(5)).read(1))
    assert outcomes[0] == outcomes[1]


def test_a_killed_process_leaves_what_it_wrote_in_the_cache():
    disk = SimDisk()
    disk.create(1, SIZE)
    disk.write(1, 0, b"x")
    disk = disk.kill()
    assert disk.read(1)[:1] == b"x"
    lost = [disk.fork().crash(random.Random(seed)).read(1)[:1] for seed in range(20)]
    assert b"\0" in lost
    disk.sync(1)
    assert disk.crash(random.Random(1)).read(1)[:1] == b"x"


def test_a_failed_sync_leaves_its_writes_in_the_cache_and_never_on_the_disk():
    disk = SimDisk()
    disk.create(1, SIZE)
    disk.write(1, 0, b"x")
    disk.fail_sync()
    with pytest.raises(LogWriteFailed):
        disk.sync(1)
    disk = disk.kill()
    assert disk.read(1)[:1] == b"x"
    disk.sync(1)
    assert disk.crash(random.Random(1)).read(1)[:1] == b"\0"


def test_a_dead_node_cannot_go_on_writing():
    disk = SimDisk()
    disk.create(1, SIZE)
    after = disk.crash(random.Random(1))
    with pytest.raises(LogWriteFailed, match="crashed"):
        disk.write(1, 0, b"x")
    after.write(1, 0, b"x")


def test_the_simulated_disk_counts():
    disk = SimDisk()
    disk.create(1, SIZE)
    disk.write(1, 0, b"xyz")
    disk.sync(1)
    disk.delete(1)
    counts = (
        disk.create_count,
        disk.write_count,
        disk.written_bytes,
        disk.sync_count,
        disk.delete_count,
    )
    assert counts == (1, 1, 3, 1, 1)


# -- small files -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["directory", "simulated"])
def small_files(request: pytest.FixtureRequest, tmp_path: Path) -> DirectoryFiles | SimDisk:
    return DirectoryFiles(tmp_path / "node") if request.param == "directory" else SimDisk()


def test_a_small_file_is_absent_then_there_then_replaced(small_files):
    assert small_files.read_file("node.toml") is None
    small_files.write_file("node.toml", b"a" * 10000)
    assert small_files.read_file("node.toml") == b"a" * 10000
    small_files.write_file("node.toml", b"b")
    assert small_files.read_file("node.toml") == b"b"


def test_a_small_file_survives_a_crash():
    disk = SimDisk()
    disk.write_file("node.toml", b"id = 1")
    assert disk.crash(random.Random(1)).read_file("node.toml") == b"id = 1"
