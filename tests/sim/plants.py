"""Bugs to plant into the product while a seed runs, each written as the mistake would be: the rule left out, no more.

`PLANTS` names them; `planted` switches one on. What finds each, and within how many seeds: test_durability_bites.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Final
from unittest.mock import patch

import kvstore.node
import kvstore.store
import txn.apply
from kvstore.oracle_client import OracleClient
from kvstore.sim.adapters import SimFiles
from kvstore.snapshots import RangeSink
from kvstore.store import Store
from replication.durability import Gate
from replication.ports import LogFiles
from replication.ready import RaftConfig
from replication.types import HardState
from replication.wal import Wal
from txn import keycode
from txn.messages import Timestamps
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


def _applied_index_lags_its_rows() -> Patches:
    """The range's row is written in a batch of its own, after the rows that it speaks of."""

    def write(self: Store) -> None:
        overlay = self._overlay
        self.engine.write(overlay.rows)
        for replica in self._staged.values():
            row = replica.state.row
            key = keycode.node_row(keycode.RANGE, row.range_id)
            self.engine.write({key: encode_row(row)})
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

    def config(**values: Any) -> RaftConfig:
        return replace(RaftConfig(**values), lease_drift=-3.0)

    return [(kvstore.node, "RaftConfig", config)]


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


def _entries_applied_twice() -> Patches:
    """A restarted replica begins two entries too early."""
    load = Store.add

    def add(self: Store, row: Any, config: Any) -> Any:
        if row.applied_index > config.installed_index + 2:
            row.applied_index -= 1
        return load(self, row, config)

    return [(Store, "add", add)]


PLANTS: Final[dict[str, Callable[[], Patches]]] = {
    "fsync does nothing": _fsync_does_nothing,
    "messages pass the gate": _messages_pass_the_gate,
    "vote is forgotten": _vote_is_forgotten,
    "term is forgotten": _term_is_forgotten,
    "log cut before flush": _log_cut_before_flush,
    "applied index lags its rows": _applied_index_lags_its_rows,
    "snapshot not flushed": _snapshot_not_flushed,
    "reads not confirmed": _reads_not_confirmed,
    "lease too long": _lease_too_long,
    "oracle not confirmed": _oracle_not_confirmed,
    "oracle serves at once": _oracle_serves_at_once,
    "oracle starts low": _oracle_starts_low,
    "outbox lost": _outbox_lost,
    "entries applied twice": _entries_applied_twice,
}
UNUSED: Final = (OracleClient, Timestamps, kvstore.store)


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The bug is in the product until the block ends."""
    with ExitStack() as stack:
        for owner, attribute, value in PLANTS[name]():
            stack.enter_context(patch.object(owner, attribute, value))
        yield
