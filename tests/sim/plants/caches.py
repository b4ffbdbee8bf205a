"""Bugs of the read cache: rows in it that the engine does not hold any more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from kvstore.read_cache import CachedEngine, ReadCache
from kvstore.snapshots import RangeSink
from kvstore.store import Store
from replication.types import SnapshotMeta
from tests.sim.plants.base import CALM, SNAPSHOTS, Patches, Plant, Seeds


def _written_rows_are_not_followed() -> Patches:
    def update(_self: ReadCache, _written: Mapping[bytes, bytes | None]) -> None:
        return

    return [(ReadCache, "update", update)]


def _installed_behind_the_cache() -> Patches:
    snapshot_sink = Store.snapshot_sink

    def sink(self: Store, group: int, meta: SnapshotMeta) -> RangeSink:
        engine = self.engine
        if not isinstance(engine, CachedEngine):  # a seed without a cache
            return snapshot_sink(self, group, meta)
        self.engine = engine._engine
        try:
            made = snapshot_sink(self, group, meta)
        finally:
            self.engine = engine
        made._store = _Home(self, engine)
        return made

    return [(Store, "snapshot_sink", sink)]


class _Home:
    """Where a snapshot goes: straight to the engine."""

    def __init__(self, store: Store, engine: CachedEngine) -> None:
        self.engine = engine._engine
        self.installed = store.installed


def _row_comes_in_later() -> Patches:
    get = CachedEngine.get

    def late(self: CachedEngine, key: bytes) -> bytes | None:
        waiting: list[tuple[bytes, bytes]] = self.__dict__.setdefault("waiting", [])
        fill = self.cache.fill
        self.cache.fill = lambda key, row: waiting.append((key, row))  # type: ignore[method-assign]
        try:
            found = get(self, key)
        finally:
            self.cache.fill = fill  # type: ignore[method-assign]
        if len(waiting) > 4:
            at, row = waiting.pop(0)
            if at not in self.cache.rows:
                fill(at, row)
        return found

    return [(CachedEngine, "get", late)]


CACHES: Final[dict[str, Plant]] = {
    "written rows are not followed": Plant(
        "a write leaves the cached rows of its keys as they were",
        _written_rows_are_not_followed,
        ("I11", "I17", "RC1"),
        Seeds(CALM, 4),
    ),
    "snapshot passes the cache": Plant(
        "a snapshot is installed in the engine, and the cache is not told",
        _installed_behind_the_cache,
        ("RC1",),
        Seeds(SNAPSHOTS, 60),
    ),
    "row comes in later": Plant(
        "a row that was read is cached in a later call: a write may have come between",
        _row_comes_in_later,
        ("I11", "I17", "RC1"),
        Seeds(CALM, 4),
    ),
}
