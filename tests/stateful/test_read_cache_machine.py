"""Claim: whatever is read, written, wiped, installed, evicted or fails in any order, a cached engine answers as a plain one,
and RC1, RC2 and RC3 of kvstore/read_cache.py hold after every step.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from kvstore.adapters.memory_engine import MemoryDirectory, MemoryEngine
from kvstore.errors import StorageError
from kvstore.read_cache import ROW_OVERHEAD_BYTES, UNKNOWN, CachedEngine

KEYS = [family + bytes([each]) for family in (b"H", b"L") for each in range(97, 117)] + [b"", b"L"]
keys = st.sampled_from(KEYS)
rows = st.binary(max_size=8) | st.just(b"v" * 300) | st.just(b"unknown") | st.just(b"long" * 500)
batches = st.dictionaries(keys, st.none() | rows, max_size=6)
spans = st.tuples(keys, keys | st.just(b"\xff"))


class Failing(MemoryEngine):
    """A write may fail and yet be done, as one does whose answer is lost."""

    fails_after = False

    def write(self, rows: Mapping[bytes, bytes | None]) -> None:
        super().write(rows)
        if self.fails_after:
            raise StorageError("lost")


class CachedAndPlain(RuleBasedStateMachine):
    @initialize(room=st.sampled_from([1, 500, 2_000, 6_000, 20_000, 1 << 20]))
    def begin(self, room: int) -> None:
        self.room = room
        self.directory = MemoryDirectory()
        self.open()

    def open(self) -> None:
        self.below = Failing(self.directory)
        self.engine = CachedEngine(self.below, self.room)
        self.failed = False

    @rule(wanted=st.lists(keys, min_size=1, max_size=8), times=st.integers(1, 4))
    def get(self, wanted: list[bytes], times: int) -> None:
        for _ in range(times):
            for key in wanted:
                assert self.engine.get(key) == self.directory.rows.get(key)

    @rule(batch=batches)
    def write(self, batch: dict[bytes, bytes | None]) -> None:
        self.engine.write(batch)

    @rule(span=spans)
    def wipe(self, span: tuple[bytes, bytes]) -> None:
        self.engine.delete_range(*span)

    @rule(span=spans, batch=st.dictionaries(keys, rows, max_size=6))
    def install(self, span: tuple[bytes, bytes], batch: dict[bytes, bytes | None]) -> None:
        """As a snapshot: the span is wiped, then its rows come in."""
        self.engine.delete_range(*span)
        self.engine.write({key: row for key, row in batch.items() if span[0] <= key < span[1]})

    @rule(batch=batches, done=st.booleans(), wiped=st.booleans())
    def fail(self, batch: dict[bytes, bytes | None], done: bool, wiped: bool) -> None:
        if done:
            self.below.fails_after = True
        else:
            self.directory.write_error = StorageError("refused")
        try:
            if wiped:
                self.engine.delete_range(b"L", b"M")
            else:
                self.engine.write(batch)
        except StorageError:
            self.failed = True
        self.below.fails_after, self.directory.write_error = False, None

    @rule(batch=batches)
    def changed_later(self, batch: dict[bytes, bytes | None]) -> None:
        """After a failure the engine may come to hold something else."""
        if self.failed:
            self.below.write(batch)

    @rule()
    def reopen(self) -> None:
        self.engine.close()
        self.open()

    @invariant()
    def rc1_cached_rows_are_stored_rows(self) -> None:
        for key, row in self.engine.cache.rows.items():
            assert row is UNKNOWN or row == self.directory.rows[key]
            assert key[:1] == b"L"

    @invariant()
    def rc2_bytes_are_bounded_and_counted(self) -> None:
        cache = self.engine.cache
        size = cache.bytes_empty
        for key, row in cache.rows.items():
            size += ROW_OVERHEAD_BYTES + len(key) + (0 if row is UNKNOWN else len(row))
        assert cache.bytes == size
        assert size <= self.room or not cache.rows
        assert set(cache.uses) <= set(cache.rows)

    @invariant()
    def rc3_each_key_stands_in_one_queue(self) -> None:
        cache = self.engine.cache
        assert sorted([*cache.short, *cache.long]) == sorted(cache.rows)


TestCachedAndPlain = CachedAndPlain.TestCase
TestCachedAndPlain.settings = settings(max_examples=60, stateful_step_count=40)


@pytest.mark.slow
def test_long_histories() -> None:
    run_state_machine_as_test(
        CachedAndPlain, settings=settings(max_examples=500, stateful_step_count=80)
    )
