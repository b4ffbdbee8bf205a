"""Who a node is: the file `node.toml`, written once, checked at every start. And the first rows of a cluster's ranges."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable

import msgspec

from kvstore.bootstrap import META_RANGE_ID, InitRequest, NodePlan, RangePlan
from kvstore.errors import DataDirectoryError, VersionMismatch
from kvstore.replica import new_config
from replication.types import Membership
from txn import keycode, mvcc
from txn.state import RangeRow, decode_range_row, encode_row
from txn.types import TIMESTAMP_SHIFT, TXN_ID_BYTES

FILE_NAME = "node.toml"
FORMAT_VERSION = 2
CREATION = (1, 1)  # (index, term) at which every range begins
CREATION_TS = 1
NODE_KEY = b"\xff\x00n"
RANGE_KEY = b"\xff\x00r"


class Identity(msgspec.Struct, frozen=True):
    format: int
    cluster_id: str
    node_id: int
    created_ms: int
    nodes: tuple[NodePlan, ...]


def encode_identity(identity: Identity) -> bytes:
    lines = [
        "# Written once by this node. Do not edit, and do not copy to another directory.",
        f"format = {identity.format}",
        f'cluster_id = "{identity.cluster_id}"',
        f"node_id = {identity.node_id}",
        f"created_ms = {identity.created_ms}",
    ]
    for node in identity.nodes:
        lines += ["", "[[nodes]]", f"node_id = {node.node_id}", f'address = "{node.address}"']
    return ("\n".join(lines) + "\n").encode()


def decode_identity(data: bytes) -> Identity:
    """Raises: DataDirectoryError: not such a file; VersionMismatch: of another format."""
    try:
        tables = tomllib.loads(data.decode())
        _check_format(tables.get("format"))  # first: of another format, all else may be different
        found = msgspec.convert(tables, Identity)
        _check_nodes(found)
    except (ValueError, msgspec.ValidationError) as error:
        raise DataDirectoryError(
            f"{FILE_NAME} is damaged ({error}): put back a good copy, or name another --dir"
        ) from error
    return found


def _check_nodes(found: Identity) -> None:
    """A file that is cut between two nodes is still TOML. Who else is missing, the ranges tell (kvstore/starting.py)."""
    ids = [node.node_id for node in found.nodes]
    if len(dict.fromkeys(ids)) != len(ids):
        raise ValueError("two nodes have one id")
    if found.node_id not in ids:
        raise ValueError(f"node {found.node_id} itself is not among the nodes")


def _check_format(found: object) -> None:
    """Of what is no number, `convert` says so."""
    if not isinstance(found, int) or isinstance(found, bool) or found == FORMAT_VERSION:
        return
    if found < 1:
        raise ValueError(f"there is no format {found}")
    age = "a newer" if found > FORMAT_VERSION else "an older"
    raise VersionMismatch(
        f"{FILE_NAME} has format {found}, of {age} version of Kvorum; this one reads {FORMAT_VERSION}: "
        "start it with that version"
    )


def identity_of(request: InitRequest) -> Identity:
    return Identity(
        FORMAT_VERSION, request.cluster_id, request.your_node_id, request.created_ms, request.nodes
    )


def first_rows(request: InitRequest) -> dict[bytes, bytes | None]:
    """What a node's engine holds before its first start: its cluster, every range it has a replica of, the registry in the
    meta range.
    """
    rows: dict[bytes, bytes | None] = {keycode.CLUSTER_ROW: request.cluster_id.encode()}
    for plan in request.ranges:
        mine = [replica for node, replica in plan.replicas if node == request.your_node_id]
        if mine:
            rows |= _range_rows(plan, mine[0])
            if plan.range_id == META_RANGE_ID:
                rows |= _meta_rows(request)
    return rows


def left_by_init(rows: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether an engine's rows are of the beginning, of whatever plan: no range has applied anything, no key was written."""
    try:
        return all(_is_first(key, data) for key, data in rows)
    except (ValueError, IndexError, msgspec.MsgspecError):  # rows of somebody else's
        return False


def _is_first(key: bytes, data: bytes) -> bool:
    family = key[:1]
    if family == keycode.RANGE:
        row = decode_range_row(data)
        return (row.applied_index, row.applied_term) == CREATION and not row.installing
    if family == keycode.LATEST:
        return mvcc.latest_ts(data) == CREATION_TS
    return family in (keycode.CONFIG, keycode.ORACLE) or key == keycode.CLUSTER_ROW


def _range_rows(plan: RangePlan, replica_id: int) -> dict[bytes, bytes]:
    pairs = tuple(sorted((replica, node) for node, replica in plan.replicas))
    members = Membership(voters=tuple(replica for replica, _ in pairs), nodes=pairs)
    row = RangeRow(plan.range_id, plan.start, plan.end, 1, 1, *CREATION, newest=0)
    config = new_config(members, replica_id, *CREATION, plan.replicas[0][0])
    return {
        keycode.node_row(keycode.RANGE, plan.range_id): encode_row(row),
        keycode.node_row(keycode.CONFIG, plan.range_id): encode_row(config),
    }


def _meta_rows(request: InitRequest) -> dict[bytes, bytes]:
    """The oracle's first bound, the node registry and the range directory, as versions of the beginning."""
    rows = {
        keycode.node_row(keycode.ORACLE, META_RANGE_ID): (
            request.created_ms << TIMESTAMP_SHIFT
        ).to_bytes(8, "big")
    }
    nobody = bytes(TXN_ID_BYTES)
    for node in request.nodes:
        key = NODE_KEY + node.node_id.to_bytes(8, "big")
        rows[keycode.latest_row(key)] = mvcc.encode_latest(CREATION_TS, nobody, encode_row(node))
    for plan in request.ranges:
        key = RANGE_KEY + plan.start
        rows[keycode.latest_row(key)] = mvcc.encode_latest(CREATION_TS, nobody, encode_row(plan))
    return rows
