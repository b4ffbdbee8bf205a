"""Bugs of what is on disk: the log, the engine, snapshots, and what is read back from them at a start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import kvstore.node
import txn.apply
from kvstore.sim.adapters import SimFiles
from kvstore.snapshots import RangeSink, spans_of
from kvstore.store import Store
from replication.durability import Gate
from replication.installer import Installer
from replication.log import RaftLog
from replication.messages import InstallSnapshot
from replication.ports import LogFiles
from replication.raft import RaftNode
from replication.ready import Role, Token
from replication.types import HardState
from replication.wal import Wal
from replication.wal_groups import GroupState
from tests.sim import directed_log
from tests.sim.plants.base import CRASHES, SNAPSHOTS, Directed, Patches, Plant, Seeds
from txn import keycode
from txn.commands import OracleBound
from txn.state import ABSENT, Answer, RangeState, encode_row


def _fsync_does_nothing() -> Patches:
    return [(SimFiles, "sync", lambda _self, _segment: None)]


def _messages_pass_the_gate() -> Patches:
    return [(Gate, "admit", lambda _self, _group, outgoing: outgoing.message)]


def _recovered_with(change: Callable[[Any], HardState]) -> Patches:
    """A restarted replica's hard state is what `change` makes of its log."""
    recover = Wal.recover.__func__  # type: ignore[attr-defined]

    def without(cls: Any, files: LogFiles, /, **options: Any) -> Any:
        wal, logs = recover(cls, files, **options)
        for log in logs.values():
            log.hard_state = change(log)
        return wal, logs

    return [(Wal, "recover", classmethod(without))]


def _vote_is_forgotten() -> Patches:
    return _recovered_with(lambda log: HardState(log.hard_state.term, 0, log.hard_state.commit))


def _term_is_forgotten() -> Patches:
    def begin(log: Any) -> HardState:
        term = log.entries[-1].term if log.entries else log.start[1]
        return HardState(term, 0, log.hard_state.commit)

    return _recovered_with(begin)


def _idle_heads_left_out() -> Patches:
    """A new segment begins with the hard states of the groups whose entries it still needs, and of no others."""
    stage = Wal._stage_head_of

    def busy_only(self: Wal, group: int, state: GroupState) -> None:
        if state.oldest_segment() is not None:
            stage(self, group, state)

    return [(Wal, "_stage_head_of", busy_only)]


def _idle_votes_left_out() -> Patches:
    """The hard state that a new segment begins with has the term of an idle group, and not its vote."""
    stage = Wal._stage_head_of

    def voteless(self: Wal, group: int, state: GroupState) -> None:
        kept = state.hard_state
        if state.oldest_segment() is None:
            state.hard_state = HardState(kept.term, 0, kept.commit)
        stage(self, group, state)
        state.hard_state = kept

    return [(Wal, "_stage_head_of", voteless)]


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
    return [(RangeSink, "flush", lambda _self: None)]


def _no_marker() -> Patches:
    def begin(self: Any, store: Any, replica: Any, meta: Any) -> None:
        self._store, self._replica, self._meta, self._row = store, replica, meta, None
        row = replica.state.row
        row.installing = replica.receiving = True
        for start, end in spans_of(row):
            store.engine.delete_range(start, end)

    return [(RangeSink, "__init__", begin)]


def _snapshot_over_newer_state() -> Patches:
    """Neither the host nor the core compares a snapshot with what is committed here."""

    def refusal(self: Installer, group: int, offer: Any) -> str:
        replica = self._replicas.get(group)
        if replica is None or offer.to != replica.id:
            return "no such replica"
        return "another snapshot is being installed" if replica.install is not None else ""

    def on_install(self: RaftNode, message: InstallSnapshot) -> None:
        self._hear(message.sender)
        if self._installing is None:
            self._installing = message.meta
            self._install_due = True

    following = {**RaftNode._following, InstallSnapshot: on_install}
    handlers = {
        role: {**table, InstallSnapshot: table[InstallSnapshot]}
        if role is Role.LEADER
        else {**table, InstallSnapshot: following[InstallSnapshot]}
        for role, table in RaftNode.HANDLERS.items()
    }
    return [(Installer, "refusal", refusal), (RaftNode, "HANDLERS", handlers)]


def _late_durability_counts() -> Patches:
    """A write that is durable raises the durable index, whatever has become of its entries meanwhile."""

    def durable(self: RaftLog, index: int, term: int) -> bool:
        index = min(index, self.last_index)
        if index <= self.durable_index:
            return False
        self.durable_index = index
        return True

    def persisted(self: RaftNode, token: Token) -> None:
        if token == self._token:
            self._token = None
        self._durable_term, self._durable_vote = token.term, token.vote
        news = self.log.durable(token.last_index, token.last_term)
        if self._leading is not None:
            if news:
                self._leading.log_durable()
                self._end_if_over()
        elif self.role is Role.CANDIDATE and token.vote == self.replica:
            self._count_ballot(self.replica, granted=True)

    return [(RaftLog, "durable", durable), (RaftNode, "persisted", persisted)]


def _bound_not_persisted() -> Patches:
    def bound(state: RangeState, _overlay: txn.apply.Overlay, command: OracleBound) -> Answer:
        state.oracle_hi = max(state.oracle_hi, command.hi)
        return ABSENT

    table: dict[type, Callable[..., Answer]] = {**txn.apply._APPLY, OracleBound: bound}
    return [(txn.apply, "_APPLY", table)]


DISKS: Final[dict[str, Plant]] = {
    "fsync does nothing": Plant(
        "the log is written and never synced",
        _fsync_does_nothing,
        ("durable log",),
        Seeds(CRASHES, 2),
    ),
    "messages pass the gate": Plant(
        "votes and acknowledgements leave before what they promise is on disk",
        _messages_pass_the_gate,
        ("durable log",),
        directed=Directed(directed_log.an_acknowledged_entry_is_on_two_disks),
    ),
    "late durability counts": Plant(
        "a write that became durable counts for the entries that replaced its own",
        _late_durability_counts,
        ("state machine safety",),
        directed=Directed(directed_log.durable_is_what_stands_there_now),
    ),
    "vote is forgotten": Plant(
        "a restarted replica knows its term, and not for whom it voted",
        _vote_is_forgotten,
        ("durable vote",),
        directed=Directed(directed_log.one_vote_in_a_term),
    ),
    "term is forgotten": Plant(
        "a restarted replica begins again in the term of its last entry",
        _term_is_forgotten,
        ("durable vote",),
        directed=Directed(directed_log.one_vote_in_a_term),
    ),
    "idle heads left out": Plant(
        "a segment begins with the hard states of busy ranges only",
        _idle_heads_left_out,
        ("# does not start LogMismatch",),
        directed=Directed(directed_log.idle_ranges_survive_their_segments),
    ),
    "idle votes left out": Plant(
        "a segment begins with the votes of busy ranges only",
        _idle_votes_left_out,
        ("durable vote",),
        directed=Directed(directed_log.idle_ranges_survive_their_segments),
    ),
    "log cut before flush": Plant(
        "the log is cut at what is applied, flushed or not",
        _log_cut_before_flush,
        ("# does not start LogMismatch",),
        Seeds(CRASHES, 8),
    ),
    "applied index leads its rows": Plant(
        "the applied index is written in a batch of its own, before the rows it speaks of",
        _applied_index_leads_its_rows,
        ("I17",),
        Seeds(CRASHES, 5),
    ),
    "snapshot not flushed": Plant(
        "a snapshot is acknowledged before the engine has it on disk",
        _snapshot_not_flushed,
        ("# does not start LogMismatch",),
        Seeds(SNAPSHOTS, 60),
        directed=Directed(directed_log.an_installed_snapshot_is_on_disk),
    ),
    "no marker": Plant(
        "nothing on disk says that an installation is unfinished",
        _no_marker,
        ("I17",),
        directed=Directed(directed_log.half_a_snapshot_is_no_state),
    ),
    "snapshot over newer state": Plant(
        "a snapshot is installed over what was committed meanwhile",
        _snapshot_over_newer_state,
        ("state machine safety",),
        directed=Directed(directed_log.an_old_snapshot_is_refused),
    ),
    "oracle bound not persisted": Plant(
        "the oracle's bound is applied in memory only",
        _bound_not_persisted,
        ("I9",),
        directed=Directed(directed_log.the_oracle_remembers_its_bound),
    ),
}
