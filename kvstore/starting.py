"""What the start of a node finds in its directory, and whether it belongs together: the log, and the ranges in the rows.

`node.toml` says who the node is; rows and log of another member, put into its directory, would vote twice under that one's
replica ids. Limit: a log names nobody. That it is this node's is seen only where it contradicts the rows (LogMismatch).
"""

from __future__ import annotations

import errno
from collections.abc import Container, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from kvstore import logs
from kvstore.errors import DataDirectoryError, DiskFull, KVError, StorageError
from kvstore.identity import FILE_NAME, Identity
from kvstore.ports import Engine
from kvstore.replica import ReplicaConfig
from replication.codec import decode_membership
from replication.errors import LogDiskFull, LogMismatch, LogWriteFailed
from replication.ports import LogFiles
from replication.types import Membership
from replication.wal import GroupLog, Wal
from txn import keycode
from txn.state import RangeRow, decode_range_row

NOT_ALLOWED: Final = (errno.EACCES, errno.EPERM, errno.EROFS)
TOLD_MAX: Final = 16  # places in the log that one line names

log = logs.logger("kvstore.starting")
_decode_config: Final = msgspec.msgpack.Decoder(ReplicaConfig).decode


class FoundRange(NamedTuple):
    """A range that this node has a replica of, as the engine has it."""

    row: RangeRow
    config: ReplicaConfig
    membership: Membership


def begin_log(files: LogFiles, segment_bytes: int) -> Wal:
    """A new one; of a member without any, nobody could tell whether it had one.

    Raises: DiskFull, StorageError, DataDirectoryError (this user may not write it), OSError.
    """
    try:
        return Wal.begin(files, segment_bytes=segment_bytes)
    except LogWriteFailed as error:
        raise _typed("the log cannot be begun", error) from error


def recover_log(files: LogFiles, segment_bytes: int) -> tuple[Wal, dict[int, GroupLog]]:
    """A member's: it was begun before node.toml was there. Damage is named, also where nobody needs what it took.

    Raises: LogMismatch: it is gone. DiskFull, StorageError: a write failed. DataDirectoryError: this user may not read or
    write it. As Wal.recover.
    """
    try:
        wal, recovered = Wal.recover(files, segment_bytes=segment_bytes, begun=True)
    except LogWriteFailed as error:
        raise _typed("the log cannot be recovered", error) from error
    except OSError as error:
        if error.errno not in NOT_ALLOWED:
            raise
        raise not_allowed("the log cannot be recovered", error) from error
    found = wal.recovery
    assert found is not None
    if found.unreadable:
        log.warning("the disk does not give parts of the log", places=found.unreadable[:TOLD_MAX])
    if found.damage or found.bodies:
        log.warning(
            "the log is damaged: the disk gives other bytes than were written",
            lost=len(found.damage),
            bodies=len(found.bodies),
            places=sorted([each[:2] for each in found.damage] + found.bodies)[:TOLD_MAX],
        )
    return wal, recovered


def _typed(what: str, error: LogWriteFailed) -> KVError:
    if isinstance(error, LogDiskFull):
        return DiskFull(f"{what}: {error}")
    if isinstance(error.__cause__, OSError) and error.__cause__.errno in NOT_ALLOWED:
        return not_allowed(what, error)
    return StorageError(f"{what}: {error}: look after the disk, then start again")


def not_allowed(what: str, error: Exception) -> DataDirectoryError:
    """The error that says what to do about one whose errno is in NOT_ALLOWED."""
    return DataDirectoryError(
        f"{what}: {error}: let this user read and write there, or name another --dir"
    )


def ranges_of(engine: Engine, found: Identity) -> list[FoundRange]:
    """Every range that the engine has a row of.

    Raises: DataDirectoryError: rows of another member or cluster, or a node.toml that does not name all members.
    """
    cluster = engine.get(keycode.CLUSTER_ROW)  # older directories have none
    if cluster is not None and cluster != found.cluster_id.encode():
        raise DataDirectoryError(
            f"the rows are of cluster {cluster.decode(errors='replace')}, and {FILE_NAME} is of {found.cluster_id}: put back "
            "what belongs to this node, or name the right --dir"
        )
    nodes = frozenset(node.node_id for node in found.nodes)
    rows = engine.scan(keycode.RANGE, bytes([keycode.RANGE[0] + 1]))
    return [_range(engine, decode_range_row(data), found.node_id, nodes) for _, data in rows]


def check_log(ranges: Sequence[FoundRange], recovered: Mapping[int, GroupLog]) -> None:
    """Raises: LogMismatch: the log knows of other ranges, so rows were lost."""
    known = frozenset(found.row.range_id for found in ranges)
    lost = [group for group, kept in recovered.items() if group not in known and not kept.tombstone]
    if lost:
        raise LogMismatch(f"the log has ranges {lost} of which the engine has no rows")


def _range(engine: Engine, row: RangeRow, node_id: int, nodes: Container[int]) -> FoundRange:
    stored = engine.get(keycode.node_row(keycode.CONFIG, row.range_id))
    assert stored is not None, "a range has its configuration row"
    config = _decode_config(stored)
    membership = decode_membership(config.membership)
    owner = dict(membership.nodes).get(config.replica_id, node_id)
    if owner != node_id:
        raise DataDirectoryError(
            f"the rows are of node {owner} (range {row.range_id}), and {FILE_NAME} is of node {node_id}: put back this "
            "node's own rocks and wal, for another member's would vote twice, or name the right --dir"
        )
    unknown = [node for _, node in membership.nodes if node not in nodes]
    if unknown:
        raise DataDirectoryError(
            f"{FILE_NAME} does not name node {unknown[0]}, which has a replica of range {row.range_id}: put back a good copy, "
            "or name another --dir"
        )
    return FoundRange(row, config, membership)
