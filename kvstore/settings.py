"""From a node's configuration to the limits of the cores: what is a duration or a size there, in their units."""

from __future__ import annotations

from kvstore.config import RaftSection, TxnSection
from kvstore.limits import ENTRY_BYTES_MAX
from replication.ready import RaftConfig
from txn.evaluate import Limits
from txn.gc import SWEEPS_PER_RETENTION
from txn.types import TIMESTAMP_SHIFT


def raft_config(raft: RaftSection) -> RaftConfig:
    return RaftConfig(
        election_timeout_s=raft.election_timeout_s,
        heartbeat_s=raft.heartbeat_s,
        lease_drift=raft.lease_drift,
        inflight_entries_max=raft.inflight_entries,
        inflight_bytes_max=raft.inflight_bytes,
        append_bytes_max=raft.append_bytes,
        entry_bytes_max=ENTRY_BYTES_MAX,
        uncommitted_bytes_max=raft.uncommitted_bytes,
    )


def txn_limits(txn: TxnSection) -> Limits:
    return Limits(
        conflict_wait_s=txn.conflict_wait_s,
        anchor_timer_s=txn.anchor_timer_s,
        orphan_timer_s=txn.orphan_timer_s,
        retention=int(txn.retention_s * 1000) << TIMESTAMP_SHIFT,
        sweep_s=txn.retention_s / SWEEPS_PER_RETENTION,
        kept=int(txn.idempotency_retention_s * 1000) << TIMESTAMP_SHIFT,
        lock_lease_s=txn.lock_lease_s,
        locks_max=txn.locks_per_range,
    )
