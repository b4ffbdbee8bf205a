"""Bugs of what is kept for whom: what an open snapshot sees is collected; what was forgotten is taken for what never was; a
watch is told less than the log has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from msgspec import structs

from kvstore.holds import Holds
from tests.sim import directed_forgotten, directed_kept
from tests.sim.plants.base import WATCHES, Directed, Patches, Plant, Seeds
from tests.stateful import txn_plants
from txn.gc import Collector
from txn.messages import PartReply, Reply
from txn.types import TIMESTAMP_MAX, Participant, PartStatus
from txn.visibility import Visibility


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


def _forgotten_is_absent() -> Patches:
    learn = Visibility._learn

    def as_absent(self: Visibility, participant: Participant, reply: Reply) -> None:
        if isinstance(reply, PartReply) and reply.status == PartStatus.EXPIRED:
            reply = structs.replace(reply, status=PartStatus.ABSENT)
        learn(self, participant, reply)

    return [(Visibility, "_learn", as_absent)]


def _forgotten_not_confirmed() -> Patches:
    answer = Visibility._answer

    def at_once(self: Visibility, reply: Reply, *, confirm: bool = False) -> None:
        answer(self, reply)

    return [(Visibility, "_answer", at_once)]


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
    "forgotten is absent": Plant(
        "EXPIRED, of a part that was forgotten, is taken for ABSENT: a reader is told that it never was prepared",
        _forgotten_is_absent,
        ("I12",),
        directed=Directed(directed_forgotten.a_forgotten_part_is_not_absent),
        model=("reader_of_dropped_status",),
    ),
    "forgotten is not confirmed": Plant(
        "a former leader believes EXPIRED of a part: for it, the transaction is staged for ever",
        _forgotten_not_confirmed,
        ("I12",),
        directed=Directed(directed_forgotten.a_forgotten_part_is_no_promise_of_a_former_leader),
        model=("reader_of_dropped_status",),
    ),
    "recent forgets": Plant(
        "what a range no longer remembers of its latest versions is taken for never written",
        _core("recent_forgets"),
        ("W1",),
        Seeds(WATCHES, 8),
    ),
}
