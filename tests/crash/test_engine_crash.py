"""Claims of the engine on RocksDB about SIGKILL: what was flushed is there, the rest is a prefix of the batches.

A child process (this file, run as a program) writes batches that follow from their number alone, so that the number
found in the store tells what all other rows must be. close() flushes, so only killing shows what a crash leaves.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from kvstore.adapters.memory_engine import MemoryDirectory, MemoryEngine
from kvstore.adapters.rocks_engine import RocksConfig, RocksEngine
from kvstore.ports import Engine

ROOT: Final = Path(__file__).resolve().parents[2]
MODULE: Final = "tests.crash.test_engine_crash"
COUNT: Final = b"count"  # the number of batches written, itself a row of each batch
WIPE_EVERY: Final = 17  # each so-many-th batch is a delete_range
SMALL: Final = RocksConfig(
    write_buffer_bytes=64 * 1024
)  # flushes by itself every few hundred batches


def write_batch(engine: Engine, number: int) -> None:
    """Batch `number` (from 1), which is the same in every process."""
    rng = random.Random(number)
    if number % WIPE_EVERY == 0:
        start = rng.randrange(1000)
        engine.delete_range(b"k%03d" % start, b"k%03d" % (start + 50))
        return
    rows: dict[bytes, bytes | None] = {COUNT: b"%d" % number}
    for _ in range(10):
        rows[b"k%03d" % rng.randrange(1000)] = rng.choice([None, b"", rng.randbytes(20)])
    engine.write(rows)


def rows_after(count: int) -> list[tuple[bytes, bytes]]:
    engine = MemoryEngine(MemoryDirectory())
    for number in range(1, count + 1):
        write_batch(engine, number)
    return list(engine.scan(b"", None))


def count_in(engine: Engine) -> int:
    return int(engine.get(COUNT) or b"0")


def child(directory: str, small: str, flush_every: str) -> None:
    """Go on where the store stands; say so after each flush that returned and after each batch."""
    engine = RocksEngine(directory, SMALL if small == "small" else RocksConfig())
    number = count_in(engine)
    if (number + 1) % WIPE_EVERY == 0:
        write_batch(engine, number + 1)  # a wipe has no count of its own: it may be there or not
        number += 1
    print("open", number, flush=True)
    while True:
        number += 1
        write_batch(engine, number)
        if number % int(flush_every) == 0:
            engine.flush()
            print("flushed", number, flush=True)
        elif number % 10 == 0:
            print("written", number, flush=True)


def kill_child_at(directory: Path, small: str, flush_every: int, word: str, after: int) -> int:
    """Run the child until it has said `word` with a number above `after`; kill it; the last flush it told of."""
    # as a module, so that the child imports the product from this checkout
    command = [sys.executable, "-m", MODULE, str(directory), small, str(flush_every)]
    flushed = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                said, number = line.split()
                if said == "flushed":
                    flushed = int(number)
                if said == word and int(number) > after:
                    break
            else:
                raise AssertionError("the child ended by itself")
        finally:
            process.kill()
            # what it said after `word` was still before the kill
            for line in process.stdout:
                if line.endswith("\n") and line.startswith("flushed"):
                    flushed = int(line.split()[1])
    return flushed


def check(directory: Path, flushed: int) -> int:
    """The store holds a prefix of the batches, with at least those flushed. Returns how many."""
    engine = RocksEngine(directory)
    count = count_in(engine)
    found = list(engine.scan(b"", None))
    engine.close()
    possible = [count]
    if (count + 1) % WIPE_EVERY == 0:
        possible.append(count + 1)
    whole = [number for number in possible if rows_after(number) == found]
    assert whole, f"the rows are those of no prefix near batch {count}"
    assert whole[-1] >= flushed
    return count


@pytest.mark.slow
def test_what_was_flushed_survives_a_kill_right_after_the_flush(tmp_path: Path):
    flushed = 0
    for _ in range(4):
        flushed = kill_child_at(tmp_path / "db", "large", 50, "flushed", flushed)
        assert check(tmp_path / "db", flushed) >= flushed - 1  # the last one may be a wipe


@pytest.mark.slow
def test_a_kill_between_flushes_leaves_a_prefix_of_the_batches(tmp_path: Path):
    count = 0
    for round_ in range(4):
        flushed = kill_child_at(tmp_path / "db", "large", 500, "written", count + 520 + 40 * round_)
        count = check(tmp_path / "db", flushed)


@pytest.mark.slow
def test_a_kill_while_the_store_flushes_by_itself_leaves_a_prefix_of_the_batches(tmp_path: Path):
    counts = [0]
    for round_ in range(4):
        target = counts[-1] + 1500 + 130 * round_
        flushed = kill_child_at(tmp_path / "db", "small", 10**9, "written", target)
        assert flushed == 0
        counts.append(check(tmp_path / "db", flushed))
    assert counts == sorted(counts)
    assert counts[-1] > 1000  # flushes did happen by themselves


@pytest.mark.slow
def test_without_a_flush_nothing_survives_because_the_log_of_the_store_is_off(tmp_path: Path):
    kill_child_at(tmp_path / "db", "large", 10**9, "written", 100)
    assert check(tmp_path / "db", 0) == 0


if __name__ == "__main__":
    child(*sys.argv[1:])
