"""Claims of the engine in memory that only the simulator uses: crashes, damaged rows, a full disk."""

from __future__ import annotations

import random

import pytest

from kvstore.adapters import memory_engine
from kvstore.adapters.memory_engine import MemoryDirectory, MemoryEngine
from kvstore.errors import CorruptionError, DiskFull, EngineClosed, StorageError

Rows = list[tuple[bytes, bytes]]


def history(engine: MemoryEngine, seed: int, batches: int) -> list[Rows]:
    """Write random batches; the rows before the first and after each."""
    rng = random.Random(seed)
    states = [list(engine.scan(b"", None))]
    for n in range(batches):
        if n % 7 == 6:
            engine.delete_range(b"%02d" % rng.randrange(20), b"%02d" % rng.randrange(20))
        else:
            engine.write(
                {b"%02d" % rng.randrange(20): rng.choice([None, b"", b"%d" % n]) for _ in range(4)}
            )
        states.append(list(engine.scan(b"", None)))
    return states


@pytest.mark.parametrize("seed", range(50))
def test_a_crash_leaves_a_prefix_of_the_batches_with_at_least_those_flushed(seed: int):
    directory = MemoryDirectory()
    engine = MemoryEngine(directory)
    history(engine, seed, 10)
    engine.flush()
    states = history(engine, seed + 1000, 12)
    lost = engine.crash(random.Random(seed))
    again = MemoryEngine(directory)
    found = list(again.scan(b"", None))
    assert found in states
    if lost == 0:
        assert found == states[-1]


def test_crashes_lose_nothing_everything_and_something_between():
    left = []
    for seed in range(200):
        directory = MemoryDirectory()
        engine = MemoryEngine(directory)
        engine.write({b"flushed": b""})
        engine.flush()
        for n in range(5):
            engine.write({b"%d" % n: b""})
        lost = engine.crash(random.Random(seed))
        rows = len(directory.rows)
        assert rows == 6 - lost
        left.append(rows)
    assert sorted(set(left)) == [1, 2, 3, 4, 5, 6]


def test_the_same_seed_loses_the_same():
    def crashed(seed: int) -> Rows:
        engine = MemoryEngine()
        history(engine, 1, 30)
        engine.crash(random.Random(seed))
        return list(engine.directory.rows.items())

    assert [crashed(seed) for seed in range(9)] == [crashed(seed) for seed in range(9)]


def test_after_a_crash_the_old_engine_and_its_cursors_refuse():
    engine = MemoryEngine()
    engine.write({b"a": b"1"})
    cursor, view = engine.scan(b"", None), engine.snapshot()
    engine.crash(random.Random(1))
    for call in (lambda: engine.get(b"a"), lambda: next(cursor), lambda: view.get(b"a")):
        with pytest.raises(EngineClosed):
            call()
    with pytest.raises(EngineClosed):
        engine.crash(random.Random(1))
    MemoryEngine(engine.directory).close()


def test_what_survived_one_crash_survives_the_next():
    directory = MemoryDirectory()
    engine = MemoryEngine(directory)
    history(engine, 3, 20)
    engine.crash(random.Random(3))
    survived = dict(directory.rows)
    for seed in range(10):
        MemoryEngine(directory).crash(random.Random(seed))
        assert dict(directory.rows) == survived


def test_a_full_disk_refuses_writes_and_serves_reads():
    engine = MemoryEngine()
    engine.write({b"a": b"1"})
    engine.directory.write_error = DiskFull()
    for call in (
        lambda: engine.write({b"a": b"2"}),
        lambda: engine.delete_range(b"a", b"b"),
        engine.flush,
    ):
        with pytest.raises(DiskFull):
            call()
    assert list(engine.scan(b"", None)) == [(b"a", b"1")]
    engine.directory.write_error = None
    engine.write({b"a": b"2"})
    assert engine.get(b"a") == b"2"


def test_flushes_alone_fail_while_they_are_told_to():
    directory = MemoryDirectory()
    engine = MemoryEngine(directory)
    directory.flush_error = StorageError("IO error")
    engine.write({b"k": b"v"})
    for flush in (engine.flush, engine.close):
        with pytest.raises(StorageError, match="IO error"):
            flush()
    assert directory.undo
    directory.flush_error = None
    MemoryEngine(directory).flush()
    assert not directory.undo


def test_a_full_write_buffer_is_flushed_without_being_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory_engine, "WRITE_BUFFER_BYTES", 1000)
    engine = MemoryEngine()
    for n in range(20):
        engine.write({b"%02d" % n: b"v" * 98})
    assert engine.stats()["unflushed_batches"] < 11
    engine.crash(random.Random(1))
    assert len(engine.directory.rows) >= 10


def test_rot_damages_neighbours_that_are_flushed_and_no_others():
    directory = MemoryDirectory()
    engine = MemoryEngine(directory)
    engine.write({b"%02d" % n: b"x" for n in range(0, 60, 2)})
    engine.flush()
    engine.write({b"%02d" % n: b"y" for n in range(1, 60, 4)})
    for seed in range(20):
        keys = directory.rot(random.Random(seed))
        assert keys == sorted(keys)
        assert all(int(key) % 2 == 0 for key in keys)
        for key in keys:
            with pytest.raises(CorruptionError):
                engine.get(key)
    assert engine.get(b"01") == b"y"
    with pytest.raises(CorruptionError):
        list(engine.scan(b"", None))


def test_an_empty_engine_has_nothing_to_rot():
    assert MemoryDirectory().rot(random.Random(1)) == []


def test_reads_fail_while_they_are_told_to():
    directory = MemoryDirectory()
    engine = MemoryEngine(directory)
    engine.write({b"k": b"v"})
    view = engine.snapshot()
    directory.read_error = StorageError("IO error")
    for read in (engine.get, view.get):
        with pytest.raises(StorageError, match="IO error"):
            read(b"k")
    with pytest.raises(StorageError, match="IO error"):
        list(engine.scan(b"", None))
    directory.read_error = None
    assert engine.get(b"k") == view.get(b"k") == b"v"
