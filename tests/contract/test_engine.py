"""Claims of the Engine port, each made of both engines, on RocksDB and in memory, and of a cached one.

What only one of them can show is in tests/unit/kvstore/test_rocks_engine.py and test_memory_engine.py.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import pytest

from kvstore.adapters.memory_engine import MemoryDirectory, MemoryEngine
from kvstore.adapters.rocks_engine import RocksConfig, RocksEngine
from kvstore.errors import CorruptionError, DataDirectoryError, EngineClosed
from kvstore.ports import Engine, EngineCursor, EngineView
from kvstore.read_cache import CachedEngine

# 00 and FF at every place, prefixes of each other, and the empty key
KEYS = [
    b"", b"\x00", b"\x00\x00", b"\x00\xff", b"a", b"a\x00", b"a\x00b", b"ab", b"a\xff",
    b"a\xff\xff", b"b", b"b" * 5000, b"\xfe\xff", b"\xff", b"\xff\x00", b"\xff\xff", b"\xff\xff\xff",
]  # fmt: skip
BETWEEN = [b"\x00\x01", b"a\x00\x00", b"aa", b"c", b"\xff\xff\xff\xff"]


class Place(Protocol):
    """A data directory of one kind of engine."""

    def open(self) -> Engine: ...

    def damage(self, key: bytes, value: bytes) -> None:
        """Spoil the stored bytes of one flushed row of a closed engine; its value is unique."""


class RocksPlace:
    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self) -> Engine:
        return RocksEngine(self.path, RocksConfig(compress=False))

    def damage(self, key: bytes, value: bytes) -> None:
        files = [f for f in self.path.glob("*.sst") if value in f.read_bytes()]
        assert len(files) == 1
        data = bytearray(files[0].read_bytes())
        data[data.index(value)] ^= 0x40
        files[0].write_bytes(data)


class MemoryPlace:
    def __init__(self) -> None:
        self.directory = MemoryDirectory()

    def open(self) -> Engine:
        return MemoryEngine(self.directory)

    def damage(self, key: bytes, value: bytes) -> None:
        self.directory.damage(key)


class CachedPlace(MemoryPlace):
    """Keys of these tests are in no family: what is cached is claimed in tests/stateful/test_read_cache_machine.py."""

    def open(self) -> Engine:
        return CachedEngine(super().open(), 1 << 20)


@pytest.fixture(params=["rocks", "memory", "cached"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "rocks":
        return RocksPlace(tmp_path / "rocks")
    return MemoryPlace() if request.param == "memory" else CachedPlace()


@pytest.fixture
def engine(place: Place) -> Iterator[Engine]:
    engine = place.open()
    yield engine
    engine.close()


def rows_of(source: Engine | EngineView, *, reverse: bool = False) -> list[tuple[bytes, bytes]]:
    return list(source.scan(b"", None, reverse=reverse))


def numbered(count: int) -> dict[bytes, bytes]:
    return {b"k%05d" % n: b"v%05d" % n for n in range(count)}


# --- reads and writes ---------------------------------------------------------------------------------------------


def test_what_was_written_is_read_and_nothing_else(engine: Engine):
    engine.write({b"a": b"1", b"b": b"2"})
    assert engine.get(b"a") == b"1"
    assert engine.get(b"aa") is None
    assert engine.get_many([b"b", b"x", b"a", b"b"]) == [b"2", None, b"1", b"2"]
    assert engine.get_many([]) == []


def test_a_batch_puts_and_deletes_and_the_later_batch_wins(engine: Engine):
    engine.write({b"a": b"1", b"b": b"2", b"c": b"3"})
    engine.write({b"a": None, b"b": b"new", b"d": b"4", b"absent": None})
    assert rows_of(engine) == [(b"b", b"new"), (b"c", b"3"), (b"d", b"4")]
    engine.write({b"a": b"again"})
    assert engine.get(b"a") == b"again"
    engine.write({})
    assert len(rows_of(engine)) == 4


@pytest.mark.parametrize("flushed", [False, True])
def test_an_empty_value_is_a_value_and_large_ones_are_kept_whole(engine: Engine, flushed: bool):
    large = bytes(range(256)) * (4 * 4096)
    engine.write({b"empty": b"", b"large": large, b"": b"the empty key"})
    if flushed:
        engine.flush()
    assert engine.get(b"empty") == b""
    assert engine.get(b"large") == large
    assert rows_of(engine) == [(b"", b"the empty key"), (b"empty", b""), (b"large", large)]
    assert engine.size_bytes() > (len(large) if flushed else 0)


@pytest.mark.parametrize("wrong", [bytearray(b"a"), memoryview(b"a"), "a", 1])
def test_only_bytes_are_taken(engine: Engine, wrong: Any):
    with pytest.raises(TypeError):
        engine.get(wrong)
    with pytest.raises(TypeError):
        engine.write({b"key": wrong})
    assert engine.get(b"key") is None
    with pytest.raises(TypeError):
        engine.scan(wrong, None).take(1)


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_gives_its_span_in_byte_order(engine: Engine, reverse: bool, flushed: bool):
    engine.write({key: b"v" + key for key in reversed(KEYS)})
    if flushed:
        engine.flush()
    view = engine.snapshot()
    assert [key for key, _ in rows_of(engine)] == KEYS  # they are listed in order
    for start in KEYS + BETWEEN:
        for end in [None, *KEYS, *BETWEEN]:
            expected = [
                (key, b"v" + key) for key in KEYS if key >= start and (end is None or key < end)
            ]
            if reverse:
                expected.reverse()
            assert list(engine.scan(start, end, reverse=reverse)) == expected, (start, end)
            assert list(view.scan(start, end, reverse=reverse)) == expected, (start, end)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_long_scan_misses_and_repeats_nothing(engine: Engine, reverse: bool):
    rows = numbered(3000)
    engine.write(rows)
    engine.flush()
    engine.write(dict.fromkeys(list(rows)[::3]))  # deleted rows between living ones
    expected = [row for n, row in enumerate(rows.items()) if n % 3]
    assert rows_of(engine, reverse=reverse) == (expected[::-1] if reverse else expected)
    assert rows_of(engine.snapshot(), reverse=reverse) == (expected[::-1] if reverse else expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_take_gives_bounded_pages_and_goes_on_where_next_stopped(engine: Engine, reverse: bool):
    rows = list(numbered(300).items())
    engine.write(dict(rows))
    if reverse:
        rows.reverse()
    cursor = engine.scan(b"", None, reverse=reverse)
    got = cursor.take(7)
    assert got == rows[:7]
    got += cursor.take(1000, bytes_max=12 * 10)  # a row has 12 bytes
    assert len(got) == 17
    got += [next(cursor), next(cursor)]
    while page := cursor.take(50):
        assert len(page) <= 50
        got += page
    assert got == rows
    assert cursor.take(1) == []
    assert next(cursor, None) is None


# --- wiping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flushed", [False, True])
def test_delete_range_deletes_its_start_and_not_its_end(engine: Engine, flushed: bool):
    engine.write(dict.fromkeys(KEYS, b"v"))
    if flushed:
        engine.flush()
    engine.delete_range(b"a\x00", b"ab")
    left = [key for key in KEYS if not b"a\x00" <= key < b"ab"]
    assert len(left) == len(KEYS) - 2
    assert [key for key, _ in rows_of(engine)] == left
    assert [key for key, _ in rows_of(engine, reverse=True)] == left[::-1]
    assert engine.get(b"a\x00") is None
    assert engine.get(b"ab") == b"v"
    engine.write({b"a\x00": b"back"})
    assert engine.get(b"a\x00") == b"back"


@pytest.mark.parametrize(("start", "end"), [(b"b", b"b"), (b"b", b"a"), (b"a", b""), (b"", b"")])
def test_wiping_an_empty_span_does_nothing_and_writes_go_on(
    engine: Engine, start: bytes, end: bytes
):
    engine.write({b"a": b"1", b"b": b"2"})
    engine.delete_range(start, end)
    engine.write({b"c": b"3"})
    engine.flush()
    assert [key for key, _ in rows_of(engine)] == [b"a", b"b", b"c"]


# --- instants -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flushed", [False, True])
def test_a_view_does_not_see_later_writes(engine: Engine, flushed: bool):
    engine.write({b"a": b"1", b"b": b"2", b"c": b"3", b"d": b"4"})
    before = rows_of(engine)
    view = engine.snapshot()
    engine.write({b"a": b"changed", b"b": None, b"aa": b"new", b"z": b"new"})
    engine.delete_range(b"c", b"d")
    if flushed:
        engine.flush()
    assert rows_of(view) == before
    assert rows_of(view, reverse=True) == before[::-1]
    assert view.scan(b"b", b"d").take(10) == before[1:3]
    assert view.get(b"a") == b"1"
    assert view.get(b"z") is None
    assert view.get_many([b"b", b"aa", b"c"]) == [b"2", None, b"3"]
    assert [key for key, _ in rows_of(engine)] == [b"a", b"aa", b"d", b"z"]


def test_views_of_several_instants_live_side_by_side(engine: Engine):
    views = []
    for n in range(5):
        engine.write({b"n": b"%d" % n, b"only%d" % n: b""})
        views.append(engine.snapshot())
        engine.flush()
    engine.delete_range(b"", b"z")
    for n, view in enumerate(views):
        assert view.get(b"n") == b"%d" % n
        assert len(rows_of(view)) == n + 2


def test_cursors_of_one_view_do_not_disturb_each_other(engine: Engine):
    rows = list(numbered(600).items())
    engine.write(dict(rows))
    view = engine.snapshot()
    engine.delete_range(b"", b"z")
    up, down = view.scan(b"", None), view.scan(b"", None, reverse=True)
    ascending, descending = [], []
    for _ in range(300):
        ascending.append(next(up))
        descending += down.take(2)
    ascending += up
    assert ascending == rows
    assert descending == rows[::-1]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_cursor_stays_at_its_instant_while_rows_are_written(engine: Engine, reverse: bool):
    rows = list(numbered(1000).items())
    engine.write(dict(rows))
    if reverse:
        rows.reverse()
    seen: list[tuple[bytes, bytes]] = []
    for key, value in engine.scan(b"", None, reverse=reverse):
        engine.write({key: b"seen", key + b"+": b"new", rows[(len(seen) + 1) % 1000][0]: None})
        seen.append((key, value))
        if len(seen) == 500:
            engine.flush()
    assert seen == rows


def test_a_scan_begins_when_it_is_called(engine: Engine):
    engine.write({b"a": b"1"})
    cursor = engine.scan(b"", None)
    engine.write({b"b": b"2"})
    assert list(cursor) == [(b"a", b"1")]


# --- durability, opening and closing ------------------------------------------------------------------------------


def test_everything_is_there_after_closing_and_reopening(place: Place):
    for n in range(3):
        engine = place.open()
        assert engine.get_many([b"%d" % m for m in range(n)]) == [b"v"] * n
        engine.write({b"%d" % n: b"v"})
        engine.close()


def test_the_directory_reopens_at_once_although_cursors_and_views_are_still_held(place: Place):
    engine = place.open()
    engine.write(numbered(1000))
    view = engine.snapshot()
    held = [engine.scan(b"", None), view.scan(b"", None, reverse=True), view, engine]
    for cursor in held[:2]:
        assert isinstance(cursor, Iterator)
        next(cursor)
    engine.close()
    again = place.open()
    assert len(rows_of(again)) == 1000
    again.close()
    assert len(held) == 4


def test_a_directory_is_opened_by_one_at_a_time(place: Place):
    engine = place.open()
    with pytest.raises(DataDirectoryError):
        place.open()
    engine.write({b"a": b"1"})
    engine.close()
    again = place.open()
    assert again.get(b"a") == b"1"
    again.close()


CALLS: dict[str, Callable[[Engine], object]] = {
    "get": lambda e: e.get(b"a"),
    "get_many": lambda e: e.get_many([b"a"]),
    "get_many of none": lambda e: e.get_many([]),
    "write": lambda e: e.write({b"a": b"1"}),
    "write of nothing": lambda e: e.write({}),
    "delete_range": lambda e: e.delete_range(b"a", b"b"),
    "delete_range of nothing": lambda e: e.delete_range(b"a", b"a"),
    "scan": lambda e: e.scan(b"", None),
    "empty scan": lambda e: e.scan(b"b", b"a"),
    "snapshot": lambda e: e.snapshot(),
    "flush": lambda e: e.flush(),
    "size_bytes": lambda e: e.size_bytes(),
    "stats": lambda e: e.stats(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_closed_engine_refuses_every_call(engine: Engine, call: Callable[[Engine], object]):
    call(engine)
    engine.close()
    for _ in range(2):
        with pytest.raises(EngineClosed):
            call(engine)
    engine.close()  # once more does no harm


def test_cursors_and_views_of_a_closed_engine_refuse_and_do_not_just_end(engine: Engine):
    engine.write(numbered(100))
    fresh, begun, ended = (engine.scan(b"", None) for _ in range(3))
    next(begun)
    list(ended)
    view = engine.snapshot()
    of_view = view.scan(b"", None)
    next(of_view)
    engine.close()
    for cursor in (fresh, begun, ended, of_view):
        with pytest.raises(EngineClosed):
            next(cursor)
        with pytest.raises(EngineClosed):
            cursor.take(1)
    with pytest.raises(EngineClosed):
        view.get(b"a")
    with pytest.raises(EngineClosed):
        view.scan(b"", None)


def test_a_closed_cursor_refuses(engine: Engine):
    engine.write(numbered(100))
    cursor = engine.scan(b"", None)
    next(cursor)
    cursor.close()
    cursor.close()
    with pytest.raises(EngineClosed):
        next(cursor)


def test_a_closed_view_refuses_and_its_cursors_end_with_it_in_an_error(engine: Engine):
    engine.write(numbered(1000))
    view = engine.snapshot()
    cursor = view.scan(b"", None)
    next(cursor)
    view.close()
    view.close()
    with pytest.raises(EngineClosed):
        view.get(b"k00001")
    with pytest.raises(EngineClosed):
        view.get_many([b"k00001"])
    with pytest.raises(EngineClosed):
        list(cursor)  # what it has read ahead may still come
    assert len(rows_of(engine)) == 1000


def test_what_is_dropped_without_closing_is_given_up(engine: Engine):
    engine.write(numbered(10))
    for _ in range(100):
        next(engine.scan(b"", None))
        next(engine.snapshot().scan(b"", None))
    gc.collect()
    assert engine.stats()["cursors_and_views"] == 0


def test_stats_are_numbers_by_name(engine: Engine):
    engine.write(numbered(10))
    stats = engine.stats()
    assert all(isinstance(value, float) for value in stats.values())
    assert stats["estimate_num_keys"] == 10


def test_flush_may_be_called_from_another_thread_while_rows_are_written(place: Place):
    engine = place.open()

    def flush_often() -> None:
        for _ in range(5):
            engine.flush()

    with ThreadPoolExecutor(1) as pool:
        flushing = pool.submit(flush_often)
        for n in range(200):
            engine.write({b"%d" % n: b"v" * 100})
        flushing.result()
    engine.close()
    again = place.open()
    assert len(rows_of(again)) == 200
    again.close()


# --- damage -------------------------------------------------------------------------------------------------------


def damaged_engine(place: Place) -> tuple[Engine, list[tuple[bytes, bytes]]]:
    """An engine with 1000 rows, of which the row 700 is damaged on disk (and, in RocksDB, its block)."""
    rows = {b"k%05d" % n: b"the-unique-value-%05d" % n * 4 for n in range(1000)}
    engine = place.open()
    engine.write(rows)
    engine.close()
    place.damage(b"k00700", rows[b"k00700"])
    return place.open(), list(rows.items())


def test_reading_a_damaged_row_raises_and_others_are_still_read(place: Place):
    engine, rows = damaged_engine(place)
    for _ in range(2):
        with pytest.raises(CorruptionError):
            engine.get(b"k00700")
        with pytest.raises(CorruptionError):
            engine.get_many([b"k00001", b"k00700"])
    view = engine.snapshot()
    with pytest.raises(CorruptionError):
        view.get(b"k00700")
    assert engine.get(b"k00001") == view.get(b"k00001") == rows[1][1]
    engine.close()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("of_view", [False, True])
def test_a_scan_over_a_damaged_row_raises_and_never_ends_silently(
    place: Place, reverse: bool, of_view: bool
):
    engine, rows = damaged_engine(place)
    if reverse:
        rows.reverse()
    source: Engine | EngineView = engine.snapshot() if of_view else engine
    cursor: EngineCursor = source.scan(b"", None, reverse=reverse)
    seen: list[tuple[bytes, bytes]] = []
    with pytest.raises(CorruptionError):
        seen.extend(iter(lambda: next(cursor), None))
    assert len(seen) >= 200
    assert seen == rows[: len(seen)]
    for _ in range(2):
        with pytest.raises(CorruptionError):
            next(cursor)
        with pytest.raises(CorruptionError):
            cursor.take(10)
    pages = source.scan(b"", None, reverse=reverse)
    with pytest.raises(CorruptionError):
        list(iter(lambda: pages.take(300), []))
    with pytest.raises(CorruptionError):
        source.scan(b"k00700", b"k00701", reverse=reverse).take(1)
    assert source.scan(b"k00000", b"k00100", reverse=reverse).take(200)
    engine.close()


def test_the_directory_reopens_after_an_error_that_is_still_held(place: Place):
    engine, _ = damaged_engine(place)
    cursor, view = engine.scan(b"", None), engine.snapshot()
    of_view = view.scan(b"", None)
    held: list[object] = [cursor, view, of_view]
    for read in (lambda: list(cursor), lambda: list(of_view), lambda: view.get(b"k00700")):
        with pytest.raises(CorruptionError) as caught:
            read()
        held.append(caught.value)  # its traceback holds the frames it passed
    engine.close()
    again = place.open()
    assert again.get(b"k00000") is not None
    again.close()
    assert len(held) == 6


def test_a_damaged_row_that_is_written_again_is_whole(place: Place):
    engine, rows = damaged_engine(place)
    engine.write({b"k00700": b"mended"})
    assert engine.get(b"k00700") == b"mended"
    assert engine.get(b"k00000") == rows[0][1]
    engine.close()
