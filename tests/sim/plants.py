"""Bugs to plant into the product while a seed runs, each written as the mistake would be: the rule left out, no more.

`PLANTS` names them; `planted` switches one on. What finds each, and within how many seeds: test_durability_bites.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final, NamedTuple
from unittest.mock import patch

from msgspec import structs

import kvstore.node
import txn.apply
from kvstore.config import NodeConfig
from kvstore.sim.adapters import SimFiles
from kvstore.sim.cluster import small_logs
from kvstore.sim.scenario import Options
from kvstore.snapshots import RangeSink
from kvstore.store import Store
from replication.durability import Gate
from replication.leading import Leader
from replication.ports import LogFiles
from replication.types import HardState
from replication.wal import Wal
from txn import keycode
from txn.oracle import Oracle
from txn.state import encode_row

Patches = list[tuple[Any, str, Any]]


def _fsync_does_nothing() -> Patches:
    """The log is written, and never synced."""
    return [(SimFiles, "sync", lambda _self, _segment: None)]


def _messages_pass_the_gate() -> Patches:
    """Votes and acknowledgements leave before what they promise is on disk."""
    return [(Gate, "admit", lambda _self, _group, outgoing: outgoing.message)]


def _vote_is_forgotten() -> Patches:
    """A restarted replica knows its term, and not for whom it voted."""
    recover = Wal.recover.__func__  # type: ignore[attr-defined]

    def without(cls: Any, files: LogFiles, /, **options: Any) -> Any:
        wal, logs = recover(cls, files, **options)
        for log in logs.values():
            log.hard_state = HardState(log.hard_state.term, 0, log.hard_state.commit)
        return wal, logs

    return [(Wal, "recover", classmethod(without))]


def _term_is_forgotten() -> Patches:
    """A restarted replica begins again in the term of its last entry."""
    recover = Wal.recover.__func__  # type: ignore[attr-defined]

    def without(cls: Any, files: LogFiles, /, **options: Any) -> Any:
        wal, logs = recover(cls, files, **options)
        for log in logs.values():
            term = log.entries[-1].term if log.entries else log.start[1]
            log.hard_state = HardState(term, 0, log.hard_state.commit)
        return wal, logs

    return [(Wal, "recover", classmethod(without))]


def _log_cut_before_flush() -> Patches:
    """The log is cut at what is applied, whether the engine has flushed it or not."""

    async def flush(self: kvstore.node.Node) -> None:
        assert self.host is not None
        assert self.store is not None
        self._flushed_bytes = self.host.stats()["synced_bytes"]
        self._flushed_at = self.adapters.clock.monotonic()
        self.host.flushed({n: each.applied[0] for n, each in self.store.replicas.items()})

    return [(kvstore.node.Node, "flush", flush)]


def _applied_index_leads_its_rows() -> Patches:
    """The range's row is written in a batch of its own, before the rows that it speaks of."""

    def write(self: Store) -> None:
        overlay = self._overlay
        for replica in self._staged.values():
            row = replica.state.row
            key = keycode.node_row(keycode.RANGE, row.range_id)
            self.engine.write({key: encode_row(row)})
        self.engine.write(overlay.rows)
        self._overlay = txn.apply.Overlay(self.engine)

    return [(Store, "_write", write)]


def _snapshot_not_flushed() -> Patches:
    """A snapshot is acknowledged and its log reset before the engine has it on disk."""
    return [(RangeSink, "flush", lambda _self: None)]


def _reads_not_confirmed() -> Patches:
    """Whoever thinks that it leads answers, without lease and without read index."""

    def confirm(self: Store, replica: Any) -> None:
        answers, replica.output.confirm = replica.output.confirm, []
        for origin, reply in answers:
            self.answer(origin, reply)

    return [(Store, "_confirm", confirm)]


def _lease_too_long() -> Patches:
    """The lease outlives the election timeout."""
    valid = Leader.lease_valid
    return [(Leader, "lease_valid", lambda self, now: valid(self, now - 3.0))]


def _oracle_not_confirmed() -> Patches:
    """Timestamps are handed out by whoever thinks that it leads the meta range."""
    return [(Store, "lease_valid", lambda _self, _group: True), *_reads_not_confirmed()]


def _oracle_serves_at_once() -> Patches:
    """A new oracle goes on from the old bound, without one of its own."""
    start_term = Oracle.start_term

    def start(self: Oracle, now: float) -> None:
        start_term(self, now)
        self._serving, self.hi = True, self.hi + (1 << 40)

    return [
        (Oracle, "start_term", start),
        (Oracle, "bound_applied", lambda _self, _hi: None),
    ]


def _oracle_starts_low() -> Patches:
    """A new oracle begins below the bound of the one before it."""
    start_term = Oracle.start_term

    def start(self: Oracle, now: float) -> None:
        start_term(self, now)
        self.last = self._base = self.hi - self._window

    return [(Oracle, "start_term", start)]


def _outbox_lost() -> Patches:
    """The anchor's decision is not posted to the others."""
    return [(txn.apply, "_post", lambda _state, _overlay, _row: None)]


def _thread(sync_mode: str = "thread") -> NodeConfig:
    config = small_logs(NodeConfig())
    return structs.replace(config, log=structs.replace(config.log, sync_mode=sync_mode))


ELECTIONS: Final = Options(
    seconds=10.0, ops=40, kinds=("crash_leader", "pause_leader", "crash"), mean_s=0.5, hold_s=0.7
)
CRASHES: Final = Options(
    seconds=8.0, ops=40, kinds=("crash", "flush", "crash_at_io"), mean_s=0.4, hold_s=0.4
)
BLACKOUTS: Final = Options(
    seconds=8.0,
    ops=60,
    kinds=("blackout", "slow_disk", "crash"),
    mean_s=0.5,
    hold_s=0.5,
    config=_thread(),
)
SNAPSHOTS: Final = Options(
    seconds=12.0, ops=60, kinds=("crash", "flush", "partition"), mean_s=0.4, hold_s=1.0
)


class Plant(NamedTuple):
    """A bug, and the faults under which it shows within `seeds` seeds; 0: no seed shows it (see README.md)."""

    patches: Callable[[], Patches]
    options: Options
    seeds: int


PLANTS: Final[dict[str, Plant]] = {
    "fsync does nothing": Plant(_fsync_does_nothing, CRASHES, 2),
    "messages pass the gate": Plant(_messages_pass_the_gate, BLACKOUTS, 12),
    "log cut before flush": Plant(_log_cut_before_flush, CRASHES, 8),
    "applied index leads its rows": Plant(_applied_index_leads_its_rows, CRASHES, 5),
    "snapshot not flushed": Plant(_snapshot_not_flushed, SNAPSHOTS, 20),
    "oracle serves at once": Plant(_oracle_serves_at_once, ELECTIONS, 4),
    "oracle starts low": Plant(_oracle_starts_low, ELECTIONS, 4),
    "oracle not confirmed": Plant(_oracle_not_confirmed, ELECTIONS, 0),
    "lease too long": Plant(_lease_too_long, ELECTIONS, 0),
    "reads not confirmed": Plant(_reads_not_confirmed, ELECTIONS, 0),
    "outbox lost": Plant(_outbox_lost, CRASHES, 0),
    "term is forgotten": Plant(_term_is_forgotten, ELECTIONS, 0),
    "vote is forgotten": Plant(_vote_is_forgotten, ELECTIONS, 0),
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The bug is in the product until the block ends."""
    with ExitStack() as stack:
        for owner, attribute, value in PLANTS[name].patches():
            stack.enter_context(patch.object(owner, attribute, value))
        yield
