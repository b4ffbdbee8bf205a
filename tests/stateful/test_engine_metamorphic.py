"""Claim: one random history gives the same answers from both engines and from a plain dict.

The history writes, wipes, flushes, closes and reopens, and keeps views and half-read cursors open meanwhile.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from kvstore.adapters.memory_engine import MemoryDirectory, MemoryEngine
from kvstore.adapters.rocks_engine import RocksConfig, RocksEngine
from kvstore.ports import Engine, EngineCursor, EngineView

pytestmark = pytest.mark.slow

Rows = dict[bytes, bytes]

# few different bytes, so that keys meet and are prefixes of each other
keys = st.lists(st.sampled_from([0x00, 0x61, 0x62, 0xFF]), max_size=4).map(bytes)
values = st.one_of(st.just(b""), st.binary(max_size=8), st.just(b"v" * 5000))
batches = st.dictionaries(keys, st.none() | values, max_size=12)
spans = st.tuples(keys, st.none() | keys, st.booleans())
Span = tuple[bytes, bytes | None, bool]


def span_of(rows: Rows, span: Span) -> list[tuple[bytes, bytes]]:
    """What a scan must give, by sorting."""
    start, end, reverse = span
    found = [(k, v) for k, v in rows.items() if k >= start and (end is None or k < end)]
    return sorted(found, reverse=reverse)


class OpenView:
    def __init__(self, engines: list[Engine], rows: Rows) -> None:
        self.views: list[EngineView] = [engine.snapshot() for engine in engines]
        self.rows = dict(rows)
        self.closed = False


class OpenCursor:
    def __init__(self, cursors: list[EngineCursor], left: list[tuple[bytes, bytes]]) -> None:
        self.cursors = cursors
        self.left = left
        self.view: OpenView | None = None
        self.closed = False

    def usable(self) -> bool:
        return not self.closed and not (self.view is not None and self.view.closed)


class TwoEnginesAndADict(RuleBasedStateMachine):
    views = Bundle("views")
    cursors = Bundle("cursors")

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp(prefix="kvorum-engine-"))
        self.directory = MemoryDirectory()
        self.rows: Rows = {}
        self.engines: list[Engine] = []
        self.held: list[OpenView | OpenCursor] = []

    @initialize()
    def open(self) -> None:
        rocks = RocksEngine(self.path / "rocks", RocksConfig(write_buffer_bytes=64 * 1024))
        self.engines = [rocks, MemoryEngine(self.directory)]

    @rule(batch=batches)
    def write(self, batch: dict[bytes, bytes | None]) -> None:
        for engine in self.engines:
            engine.write(batch)
        for key, value in batch.items():
            if value is None:
                self.rows.pop(key, None)
            else:
                self.rows[key] = value

    @rule(start=keys, end=keys)
    def delete_range(self, start: bytes, end: bytes) -> None:
        for engine in self.engines:
            engine.delete_range(start, end)
        self.rows = {k: v for k, v in self.rows.items() if not start <= k < end}

    @rule()
    def flush(self) -> None:
        for engine in self.engines:
            engine.flush()

    @rule(wanted=st.lists(keys, max_size=6))
    def get(self, wanted: list[bytes]) -> None:
        expected = [self.rows.get(key) for key in wanted]
        for engine in self.engines:
            assert engine.get_many(wanted) == expected
            assert [engine.get(key) for key in wanted] == expected

    @rule(span=spans)
    def scan(self, span: Span) -> None:
        for engine in self.engines:
            assert list(engine.scan(span[0], span[1], reverse=span[2])) == span_of(self.rows, span)

    @rule(target=views)
    def open_view(self) -> OpenView:
        view = OpenView(self.engines, self.rows)
        self.held.append(view)
        return view

    @rule(view=views, wanted=st.lists(keys, max_size=6), span=spans)
    def read_view(self, view: OpenView, wanted: list[bytes], span: Span) -> None:
        if view.closed:
            return
        for one in view.views:
            assert one.get_many(wanted) == [view.rows.get(key) for key in wanted]
            assert list(one.scan(span[0], span[1], reverse=span[2])) == span_of(view.rows, span)

    @rule(view=views)
    def close_view(self, view: OpenView) -> None:
        view.closed = True
        for one in view.views:
            one.close()

    @rule(target=cursors, span=spans)
    def open_cursor(self, span: Span) -> OpenCursor:
        start, end, reverse = span
        opened = [engine.scan(start, end, reverse=reverse) for engine in self.engines]
        cursor = OpenCursor(opened, span_of(self.rows, span))
        self.held.append(cursor)
        return cursor

    @rule(target=cursors, view=views, span=spans)
    def open_cursor_of_view(self, view: OpenView, span: Span) -> object:
        if view.closed:
            return multiple()
        start, end, reverse = span
        opened = [one.scan(start, end, reverse=reverse) for one in view.views]
        cursor = OpenCursor(opened, span_of(view.rows, span))
        cursor.view = view
        self.held.append(cursor)
        return cursor

    @rule(cursor=cursors, steps=st.integers(1, 4))
    def step_cursor(self, cursor: OpenCursor, steps: int) -> None:
        if not cursor.usable():
            return
        for _ in range(steps):
            expected = cursor.left.pop(0) if cursor.left else None
            assert [next(one, None) for one in cursor.cursors] == [expected, expected]

    @rule(cursor=cursors, rows_max=st.integers(1, 5))
    def take_from_cursor(self, cursor: OpenCursor, rows_max: int) -> None:
        if not cursor.usable():
            return
        for one in cursor.cursors:
            page: list[tuple[bytes, bytes]] = []
            while len(page) < rows_max and (part := one.take(rows_max - len(page))):
                page += part
            assert page == cursor.left[:rows_max]
        del cursor.left[:rows_max]

    @rule()
    @precondition(lambda self: self.engines)
    def close_and_reopen(self) -> None:
        for engine in self.engines:
            engine.close()
        for held in self.held:
            held.closed = True  # and still referenced
        self.open()

    @invariant()
    def all_rows_are_equal(self) -> None:
        expected = sorted(self.rows.items())
        for engine in self.engines:
            assert engine.scan(b"", None).take(10_000) == expected

    def teardown(self) -> None:
        for engine in self.engines:
            engine.close()
        shutil.rmtree(self.path)


TestTwoEnginesAndADict = TwoEnginesAndADict.TestCase
TestTwoEnginesAndADict.settings = settings(stateful_step_count=30)
