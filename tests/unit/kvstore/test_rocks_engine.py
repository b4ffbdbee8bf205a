"""Claims of the engine on RocksDB that the engine in memory cannot share: files, texts of errors, options."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rocksdict

from kvstore.adapters import rocks_engine
from kvstore.adapters.rocks_engine import RocksConfig, RocksEngine
from kvstore.errors import (
    CorruptionError,
    DataDirectoryError,
    DiskFull,
    EngineClosed,
    KVError,
    StorageError,
)


def log_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.log"))


def test_the_log_of_rocksdb_is_off(tmp_path: Path):
    engine = RocksEngine(tmp_path)
    for n in range(100):
        engine.write({b"%d" % n: b"v" * 1000})
        engine.delete_range(b"x", b"y")
    assert log_bytes(tmp_path) == 0
    engine.flush()
    assert log_bytes(tmp_path) == 0
    engine.close()


def test_with_its_log_on_the_same_writes_would_show(tmp_path: Path):
    db = rocksdict.Rdict(str(tmp_path), rocksdict.Options(raw_mode=True))
    db.put(b"k", b"v" * 1000)
    assert log_bytes(tmp_path) > 1000  # so the test above would see it
    db.close()


def test_a_flush_makes_files_of_what_was_written(tmp_path: Path):
    engine = RocksEngine(tmp_path)
    engine.write({b"k": b"v"})
    assert not list(tmp_path.glob("*.sst"))
    engine.flush()
    assert len(list(tmp_path.glob("*.sst"))) == 1
    engine.flush()  # nothing to do
    assert len(list(tmp_path.glob("*.sst"))) == 1
    engine.close()


def test_closing_flushes_and_size_counts_files(tmp_path: Path):
    engine = RocksEngine(tmp_path, RocksConfig(compress=False))
    engine.write({b"k": b"v" * 100_000})
    engine.close()
    again = RocksEngine(tmp_path)
    assert again.size_bytes() > 100_000
    assert again.stats()["background_errors"] == 0
    again.close()


def test_a_full_write_buffer_is_flushed_without_being_asked(tmp_path: Path):
    engine = RocksEngine(tmp_path, RocksConfig(write_buffer_bytes=64 * 1024))
    for n in range(300):
        engine.write({b"%04d" % n: b"v" * 1000})
    assert len(list(engine.scan(b"", None))) == 300
    engine.close()
    assert list(tmp_path.glob("*.sst"))


def test_a_damaged_table_of_contents_is_corruption_at_once(tmp_path: Path):
    engine = RocksEngine(tmp_path / "db")
    engine.write({b"k": b"v"})
    engine.close()
    manifest = next((tmp_path / "db").glob("MANIFEST-*"))
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:30] + bytes(10) + whole[40:])
    with pytest.raises(CorruptionError) as caught:
        RocksEngine(tmp_path / "db")
    manifest.write_bytes(whole)
    again = RocksEngine(tmp_path / "db")  # although the error is still held
    assert again.get(b"k") == b"v"
    again.close()
    assert caught.value.code == "corruption_error"


def test_a_missing_table_is_corruption_at_once(tmp_path: Path):
    engine = RocksEngine(tmp_path)
    engine.write({b"k": b"v"})
    engine.close()
    next(tmp_path.glob("*.sst")).unlink()
    with pytest.raises(CorruptionError):
        RocksEngine(tmp_path)


def test_a_path_that_is_no_directory_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataDirectoryError):
        RocksEngine(tmp_path / "file")
    with pytest.raises(DataDirectoryError):
        RocksEngine(tmp_path / "file" / "below")


def test_a_directory_in_use_by_another_process_is_refused(tmp_path: Path):
    program = (
        "import sys; from kvstore.adapters.rocks_engine import RocksEngine;"
        "engine = RocksEngine(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    root = Path(__file__).resolve().parents[3]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        with pytest.raises(DataDirectoryError):
            RocksEngine(tmp_path)
        process.kill()
    RocksEngine(tmp_path).close()


def test_directories_above_are_made(tmp_path: Path):
    RocksEngine(tmp_path / "a" / "b").close()
    assert (tmp_path / "a" / "b" / "CURRENT").exists()
    shutil.rmtree(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Corruption: block checksum mismatch: stored = 1, computed = 2 in x.sst", CorruptionError),
        ("Corruption: IO error: No such file or directory: x.sst", CorruptionError),
        ("IO error: No space left on device: While appending to file: x.sst", DiskFull),
        (
            "IO error: lock hold by current process, acquire time 1 acquiring thread 2: /d/LOCK: No locks available",
            DataDirectoryError,
        ),
        (
            "IO error: While lock file: /d/LOCK: Resource temporarily unavailable",
            DataDirectoryError,
        ),
        ("File exists (os error 17)", DataDirectoryError),
        (
            "IO error: While pread offset 0 len 9: /Corruption/LOCKED.sst: Input/output error",
            StorageError,
        ),
        ("Invalid argument: anything else", StorageError),
    ],
)
def test_texts_of_rocksdb_become_typed_errors(text: str, expected: type[KVError]):
    error = rocks_engine._typed(Exception(text))
    assert type(error) is expected
    assert text in str(error)


def test_a_closed_database_is_a_closed_engine():
    error = rocks_engine._typed(rocksdict.DbClosedError("DB instance already closed"))
    assert type(error) is EngineClosed
