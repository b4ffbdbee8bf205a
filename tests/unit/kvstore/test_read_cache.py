"""Claims of kvstore/read_cache.py that one case shows: what is cached and what is not, what a failure leaves (RC1), that a
scan passes through, that memory and work are bounded (RC2). Random histories: tests/stateful/test_read_cache_machine.py.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from kvstore.adapters.memory_engine import MemoryDirectory, MemoryEngine
from kvstore.errors import CorruptionError, EngineClosed, StorageError
from kvstore.read_cache import (
    ROW_BYTES_MAX,
    ROW_OVERHEAD_BYTES,
    SAMPLE_HITS,
    STEPS_MAX,
    USED_MAX,
    USES_MAX,
    CachedEngine,
    cached,
)
from tools.cache_bench import HOT, hit_ratios, lru

MIB = 1 << 20


class Counting(MemoryEngine):
    """An engine that counts what it is asked."""

    def __init__(self, directory: MemoryDirectory | None = None) -> None:
        super().__init__(directory)
        self.asked: list[bytes] = []
        self.killed = False

    def get(self, key: bytes) -> bytes | None:
        self.asked.append(key)
        return super().get(key)

    def write(self, rows: Mapping[bytes, bytes | None]) -> None:
        super().write(rows)
        if self.killed:
            raise KeyboardInterrupt


def engines(bytes_max: int = MIB, **rows: bytes) -> tuple[Counting, CachedEngine]:
    """With rows of LATEST that are stored and not cached."""
    below = Counting()
    below.write({b"L" + key.encode(): row for key, row in rows.items()})
    return below, CachedEngine(below, bytes_max)


def test_a_row_that_was_read_is_served_without_the_engine() -> None:
    below, engine = engines(a=b"1")
    assert [engine.get(b"La") for _ in range(3)] == [b"1"] * 3
    assert below.asked == [b"La"]
    assert (engine.hits, engine.misses) == (2, 1)
    stats = engine.stats()
    assert stats["read_cache_hits_total"] == 2.0
    assert stats["read_cache_rows"] == 1.0
    assert 0.0 < stats["read_cache_bytes"] <= MIB
    assert stats["estimate_num_keys"] == 1.0  # of the engine below


def test_a_write_is_followed() -> None:
    below, engine = engines(a=b"1", b=b"2")
    assert (engine.get(b"La"), engine.get(b"Lb")) == (b"1", b"2")
    engine.write({b"La": b"3", b"Lb": None, b"Lc": b"4"})
    assert (engine.get(b"La"), engine.get(b"Lb"), engine.get(b"Lc")) == (b"3", None, b"4")
    assert below.asked == [
        b"La",
        b"Lb",
        b"Lb",
        b"Lc",
    ]  # what was deleted, or never read, is asked for
    engine.write({b"Lb": b"5"})
    assert engine.get(b"Lb") == b"5"


def test_only_newest_versions_that_exist_are_cached() -> None:
    _, engine = engines()
    engine.write({b"Ha": b"1", b"R": b"2", b"": b"3"})
    for key in (b"Ha", b"R", b"", b"Lnone"):
        engine.get(key)
    assert engine.cache.rows == {}
    assert engine.misses == 1


def test_scans_and_views_leave_the_cache_as_it_is() -> None:
    _, engine = engines(a=b"1", b=b"2")
    view = engine.snapshot()
    assert view.get(b"La") == b"1"
    assert engine.get_many([b"Lb", b"La"]) == [b"2", b"1"]
    assert list(engine.scan(b"L", b"M")) == [(b"La", b"1"), (b"Lb", b"2")]
    assert engine.cache.rows == {}


def test_a_row_that_grows_too_long_is_dropped_and_comes_back() -> None:
    below, engine = engines(bytes_max=64 * MIB, a=b"1")
    for row in (b"1", b"x" * (ROW_BYTES_MAX + 1), b"y"):
        engine.write({b"La": row})
        assert engine.get(b"La") == row
        assert engine.get(b"La") == row
    assert below.asked == [b"La"] * 4  # "1" once, the long one twice, "y" once
    assert len(engine.cache.short) == 1


@pytest.mark.parametrize(
    ("start", "end", "left"),
    [
        (b"L", b"M", []),
        (b"La", b"Lb", [b"Lb", b"Lc"]),
        (b"", b"Lb", [b"Lb", b"Lc"]),
        (b"Lb", b"\xff", [b"La"]),
        (b"H", b"L", [b"La", b"Lb", b"Lc"]),
        (b"M", b"P", [b"La", b"Lb", b"Lc"]),
        (b"Lb", b"Lb", [b"La", b"Lb", b"Lc"]),
    ],
)
def test_a_span_is_wiped(start: bytes, end: bytes, left: list[bytes]) -> None:
    _, engine = engines(a=b"1", b=b"2", c=b"3")
    keys = [b"La", b"Lb", b"Lc"]
    for key in keys:
        engine.get(key)
    engine.delete_range(start, end)
    assert [key for key in keys if engine.get(key) is not None] == left


@pytest.mark.parametrize(
    "write",
    [
        lambda engine: engine.write({b"La": b"9"}),
        lambda engine: engine.delete_range(b"La", b"Lb"),
    ],
)
def test_after_a_failed_write_nothing_is_cached_for_good(
    write: Callable[[CachedEngine], None],
) -> None:
    below, engine = engines(a=b"1", b=b"2")
    engine.get(b"La")
    below.directory.write_error = StorageError("the disk is gone")
    with pytest.raises(StorageError):
        write(engine)
    assert engine.cache.rows == {}
    below.directory.write_error = None
    below.directory.rows[b"La"] = b"8"  # what failed may have happened, or happen later
    for row in (b"8", b"7"):
        below.directory.rows[b"La"] = row
        assert engine.get(b"La") == row


def test_a_write_that_was_broken_off_leaves_nothing_cached() -> None:
    below, engine = engines(a=b"1")
    engine.get(b"La")
    below.killed = True
    with pytest.raises(KeyboardInterrupt):
        engine.write({b"La": b"2"})
    assert engine.get(b"La") == b"2"


def test_a_closed_engine_refuses_what_was_cached() -> None:
    _, engine = engines(a=b"1")
    engine.get(b"La")
    engine.close()
    with pytest.raises(EngineClosed):
        engine.get(b"La")


def test_rot_of_a_cached_row_is_noticed_when_it_is_read_again_from_the_disk() -> None:
    below, engine = engines(a=b"1")
    engine.get(b"La")
    below.directory.damage(b"La")
    assert engine.get(b"La") == b"1"
    with pytest.raises(CorruptionError):
        CachedEngine(below, MIB).get(b"La")
    engine.write({b"La": b"2"})  # mends it, as it does without a cache
    assert engine.get(b"La") == b"2"


def test_no_bytes_no_cache() -> None:
    below = MemoryEngine()
    assert cached(below, 0) is below
    assert isinstance(cached(below, 1), CachedEngine)


# ---------------------------------------------------------------- who stays


class AnyRow:
    """The engine below: every key has a row."""

    def get(self, _key: bytes) -> bytes:
        return b"row of 16 bytes."


def engine_of(rows: int) -> CachedEngine:
    """With room for so many rows of `AnyRow`."""
    below: Any = AnyRow()
    row_bytes = ROW_OVERHEAD_BYTES + len(b"L%08d" % 0) + len(below.get(b""))
    return CachedEngine(below, row_bytes * rows * 16 // 15)  # what was dropped takes a sixteenth


def use(engine: CachedEngine, number: int) -> bool:
    """Read one row. Whether it was cached."""
    misses = engine.misses
    engine.get(b"L%08d" % number)
    return engine.misses == misses


def test_a_scan_of_ten_times_its_size_does_not_evict_what_is_hot() -> None:
    engine, old = engine_of(1_000), lru(1_000)
    for _ in range(10):
        for number in range(800):
            use(engine, number)
            old(number)
    for number in range(1_000, 11_000):
        assert not use(engine, number)
        old(number)
    assert sum(use(engine, number) for number in range(800)) >= 780  # uses are sampled
    assert not any(old(number) for number in range(800))  # it is a scan that matters


def test_what_comes_back_soon_after_it_was_dropped_stays() -> None:
    engine = engine_of(100)
    for _ in range(30):
        for number in range(100):
            use(engine, number)
    for number in range(1_000, 1_060):
        use(engine, number)
    cache = engine.cache
    dropped = [number for number in range(1_000, 1_060) if b"L%08d" % number not in cache.rows]
    assert dropped
    for number in dropped[-10:]:
        use(engine, number)
        assert cache.long[-1] == b"L%08d" % number


def test_its_hit_ratio_is_above_that_of_lru() -> None:
    """The workloads of tools.cache_bench, smaller."""
    for row in hit_ratios(keys=5_000, reads=25_000):
        assert row.own > row.lru, row
        if row.name == HOT:
            assert row.own > row.lru + 0.08, row


# ---------------------------------------------------------------- bounds


def test_a_row_that_comes_in_costs_a_bounded_number_of_looks_at_others() -> None:
    engine = engine_of(1_000)
    for number in range(1_000):
        use(engine, number)
    cache = engine.cache
    for key in cache.rows:
        cache.uses[key] = USES_MAX
    cache.long.extend(cache.short)
    cache.short.clear()
    before = sum(cache.uses.values())
    use(engine, 5_000)
    assert cache.evictions == 1
    assert before - sum(cache.uses.values()) <= STEPS_MAX + USES_MAX


def test_hits_that_are_not_counted_yet_are_bounded() -> None:
    engine = engine_of(10)
    for _ in range(USED_MAX * 2):
        use(engine, 1)
    assert len(engine.cache.used) == USED_MAX
    for _ in range(SAMPLE_HITS):
        use(engine, 1)
    assert engine.cache.uses == {b"L%08d" % 1: USES_MAX}


@pytest.mark.parametrize("row_bytes", [30, 150, 2_000])
def test_the_memory_that_it_takes_is_what_it_counts(row_bytes: int) -> None:
    bytes_max = MIB

    class Fresh:
        def get(self, _key: bytes) -> bytes:
            return bytes(bytearray(row_bytes))

    below: Any = Fresh()
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        engine = CachedEngine(below, bytes_max)
        for number in range(3 * bytes_max // (row_bytes + 300)):
            for _ in range(1 + number % 4):
                engine.get(b"L%016d" % number)
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert bytes_max * 0.95 < engine.cache.bytes <= bytes_max
    assert used < 1.1 * bytes_max
