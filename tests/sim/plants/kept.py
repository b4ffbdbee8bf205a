"""Bugs of what is kept for whom: what an open snapshot sees is collected; a watch is told less than the log has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kvstore.holds import Holds
from tests.sim import directed_kept
from tests.sim.plants.base import WATCHES, Directed, Patches, Plant, Seeds
from tests.stateful import txn_plants
from txn.gc import Collector
from txn.types import TIMESTAMP_MAX


def _core(name: str) -> Callable[[], Patches]:
    return txn_plants.PLANTS[name][0]


def _holds_not_heeded() -> Patches:
    return [(Holds, "hold", lambda _self, _session, _oldest, _now: None)]


def _floor_not_heeded() -> Patches:
    begin = Collector._begin

    def greedy(self: Collector) -> bool:
        floor, self._ev.floor = self._ev.floor, TIMESTAMP_MAX
        try:
            return begin(self)
        finally:
            self._ev.floor = floor

    return [(Collector, "_begin", greedy)]


KEPT: Final[dict[str, Plant]] = {
    "holds not heeded": Plant(
        "the oracle does not note what clients have open",
        _holds_not_heeded,
        ("I15",),
        directed=Directed(directed_kept.what_is_open_is_kept),
    ),
    "floor not heeded": Plant(
        "a range collects all that is older than the retention, whatever the oracle says of what is open",
        _floor_not_heeded,
        ("I15",),
        directed=Directed(directed_kept.what_is_open_is_kept),
    ),
    "newest kept version collected": Plant(
        "the newest version at or below the threshold goes like those before it",
        _core("newest_kept_version_collected"),
        ("I15",),
        directed=Directed(directed_kept.what_is_open_is_kept),
    ),
    "recent forgets": Plant(
        "what a range no longer remembers of its latest versions is taken for never written",
        _core("recent_forgets"),
        ("W1",),
        Seeds(WATCHES, 8),
    ),
}
