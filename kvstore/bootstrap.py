"""Minting a cluster: which nodes, which ranges, which replicas. Pure; `kvctl init` sends it out.

The plan is a function of (cluster id, addresses, split keys, replicas per range) and nothing else,
and the cluster id carries a digest of the other three. So an init that was cut off half way is
finished by running it again: the id is learned from a node that has it, `plan` gives the same
ranges, and other arguments than the first time are noticed (`belongs`) before anything is sent.

Invariants, checked by `check`:
B1 The ranges cover the whole key space once.
B2 Range ids are unique, and range 1 is the meta range, [FF 00, FF 01).
B3 Every range has its replicas on different nodes, with different ids from 1.
B4 (of `plan`) the first replica, the preferred leader, moves over the nodes from range to range.
B5 The directory of the ranges and nodes fits a message, however long the split keys are.
B6 Ids and the time are numbers that rows and JSON can hold.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Final, NewType

import msgspec

from kvstore import limits
from kvstore.errors import InvalidArgument, KeyTooLarge

ClusterId = NewType("ClusterId", str)

META_RANGE_ID: Final = 1
META_START: Final = b"\xff\x00"
META_END: Final = b"\xff\x01"
SYSTEM_START: Final = b"\xff"
REPLICAS_DEFAULT: Final = 3
NODES_MAX: Final = 1_000
SPLITS_MAX: Final = 10_000
ID_MAX: Final = (1 << 53) - 1  # of nodes, ranges and replicas: a number in JSON is no larger
CREATED_MS_MAX: Final = (1 << 46) - 1  # a timestamp has so many bits for the time
DIRECTORY_BYTES_MAX: Final = 4 << 20  # every client learns all ranges and nodes in one message
_RANGE_BYTES, _REPLICA_BYTES, _NODE_BYTES = (
    48,
    20,
    16,
)  # about what each takes there, beside its texts

_TIME_DIGITS, _RANDOM_DIGITS, _DIGEST_DIGITS = 12, 12, 8


class NodePlan(msgspec.Struct, frozen=True):
    """A node's id and the address where clients and other nodes reach it."""

    node_id: int
    address: str


class RangePlan(msgspec.Struct, frozen=True):
    """One range [start, end) and where its replicas are; an empty `end` is the end of all keys.

    `replicas` pairs node ids with replica ids; the first one is the preferred leader.
    """

    range_id: int
    start: bytes
    end: bytes
    replicas: tuple[tuple[int, int], ...]


class InitRequest(msgspec.Struct, frozen=True):
    """What `kvctl init` sends to each node: one plan, and who the receiver is. Bytes are base64."""

    cluster_id: str
    created_ms: int
    nodes: tuple[NodePlan, ...]
    ranges: tuple[RangePlan, ...]
    your_node_id: int


def mint_cluster_id(
    created_ms: int,
    random_bits: int,
    addresses: Sequence[str],
    splits: Sequence[bytes],
    replicas: int = REPLICAS_DEFAULT,
) -> ClusterId:
    """32 hex digits: the time (12), 48 random bits (12), a digest of nodes, splits, replicas (8)."""
    assert 0 <= created_ms < 1 << 48, f"time out of range: {created_ms}"
    digest = _digest(addresses, splits, replicas)
    return ClusterId(f"{created_ms:012x}{random_bits & (1 << 48) - 1:012x}{digest}")


def belongs(
    cluster_id: str,
    addresses: Sequence[str],
    splits: Sequence[bytes],
    replicas: int = REPLICAS_DEFAULT,
) -> bool:
    """Whether a cluster of this id was made from these nodes (in this order), splits, replicas."""
    return _is_cluster_id(cluster_id) and cluster_id.endswith(_digest(addresses, splits, replicas))


def created_ms_of(cluster_id: str) -> int:
    """When the cluster was made, in ms since 1970. Raises InvalidArgument: not a cluster id."""
    if not _is_cluster_id(cluster_id):
        raise InvalidArgument(f"not a cluster id: {cluster_id!r}")
    return int(cluster_id[:_TIME_DIGITS], 16)


def plan(
    cluster_id: str,
    addresses: Sequence[str],
    splits: Sequence[bytes] = (),
    replicas: int = REPLICAS_DEFAULT,
) -> list[InitRequest]:
    """The requests for the nodes, in the order of `addresses`, which numbers them 1, 2, ...

    Every range has `replicas` replicas, or one on each node if there are fewer nodes.
    Raises: InvalidArgument for no, too many or repeated addresses, bad or repeated split keys.
    """
    _check_addresses(addresses)
    _check_splits(splits)
    if replicas < 1:
        raise InvalidArgument(f"a range needs at least 1 replica, not {replicas}")
    nodes = tuple(NodePlan(number, address) for number, address in enumerate(addresses, 1))
    ranges = _ranges(sorted(splits), len(nodes), min(replicas, len(nodes)))
    created_ms = created_ms_of(cluster_id)
    requests = [InitRequest(cluster_id, created_ms, nodes, ranges, node.node_id) for node in nodes]
    check(requests[0])
    return requests


def check(request: InitRequest) -> None:
    """For nodes that receive one: B1 to B3, B5 and B6 hold, we are in it and all can be reached, or raises InvalidArgument."""
    _check_addresses([node.address for node in request.nodes])
    _check_directory(request)
    node_ids = [node.node_id for node in request.nodes]
    if not node_ids or not _are_ids(node_ids):
        raise InvalidArgument(f"node ids must be different numbers from 1 to {ID_MAX}")
    if request.your_node_id not in node_ids:
        raise InvalidArgument(f"node {request.your_node_id} is not among the nodes of the request")
    if not _is_cluster_id(request.cluster_id):
        raise InvalidArgument(f"not a cluster id: {request.cluster_id!r}")
    if not 0 <= request.created_ms <= CREATED_MS_MAX:
        raise InvalidArgument(f"created_ms is in ms since 1970, and at most {CREATED_MS_MAX}")
    expected = b""
    for number, each in enumerate(sorted(request.ranges, key=lambda span: span.start)):
        if each.start != expected or (number and not expected):
            raise InvalidArgument(f"range {each.range_id} does not start at {expected!r}")
        if each.end and each.end <= each.start:
            raise InvalidArgument(f"range {each.range_id} is empty")
        expected = each.end
        _check_replicas(each, node_ids)
    if expected or not request.ranges:
        raise InvalidArgument("the ranges do not reach the end of the key space")
    by_id = {each.range_id: each for each in request.ranges}
    if not _are_ids([each.range_id for each in request.ranges]):
        raise InvalidArgument(f"range ids must be different numbers from 1 to {ID_MAX}")
    meta = by_id.get(META_RANGE_ID)
    if meta is None or (meta.start, meta.end) != (META_START, META_END):
        raise InvalidArgument("range 1 must be the meta range")


def parse_address(text: str) -> tuple[str, int]:
    """(host, port) of "HOST:PORT" or "[v6]:PORT"; port 0 is allowed. Raises: InvalidArgument."""
    host, colon, port = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise InvalidArgument(f"write an IPv6 address in brackets, as in [::1]:7400: {text!r}")
    number = int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else -1
    strange = any(each in '/"\\ ' or not each.isprintable() for each in host)
    if not colon or not host or not 0 <= number <= 65535 or strange:
        raise InvalidArgument(f"not an address of the form HOST:PORT: {text!r}")
    return host, number


def parse_addresses(text: str) -> list[str]:
    """The addresses of a comma-separated list. Raises InvalidArgument: bad, absent or repeated."""
    addresses = [part.strip() for part in text.split(",") if part.strip()]
    _check_addresses(addresses)
    return addresses


def _ranges(splits: Sequence[bytes], nodes: int, replicas: int) -> tuple[RangePlan, ...]:
    cuts = [b"", *splits, META_START]
    spans = [(META_START, META_END), *itertools.pairwise(cuts), (META_END, b"")]
    ranges = []
    for number, (start, end) in enumerate(spans):
        places = tuple(((number + step) % nodes + 1, step + 1) for step in range(replicas))
        ranges.append(RangePlan(META_RANGE_ID + number, start, end, places))
    return tuple(ranges)


def _check_replicas(each: RangePlan, node_ids: Sequence[int]) -> None:
    nodes = [node for node, _ in each.replicas]
    ids = [replica for _, replica in each.replicas]
    known = all(node in node_ids for node in nodes)
    if not nodes or not known or len(dict.fromkeys(nodes)) != len(nodes):
        raise InvalidArgument(f"range {each.range_id}: its nodes must be known and different")
    if not _are_ids(ids):
        raise InvalidArgument(
            f"range {each.range_id}: replica ids are different numbers from 1 to {ID_MAX}"
        )


def _are_ids(numbers: Sequence[int]) -> bool:
    different = len(dict.fromkeys(numbers)) == len(numbers)
    return different and all(1 <= number <= ID_MAX for number in numbers)


def _check_addresses(addresses: Sequence[str]) -> None:
    if not addresses:
        raise InvalidArgument("name at least one node as HOST:PORT")
    if len(addresses) > NODES_MAX:
        raise InvalidArgument(f"{len(addresses)} nodes are more than {NODES_MAX}")
    for address in addresses:
        if address != address.strip():
            raise InvalidArgument(f"no spaces around an address: {address!r}")
        if parse_address(address)[1] == 0:
            raise InvalidArgument(f"port 0 is not an address that others can reach: {address!r}")
    if len(dict.fromkeys(addresses)) != len(addresses):
        raise InvalidArgument("a node is named twice")


def _check_splits(splits: Sequence[bytes]) -> None:
    if len(splits) > SPLITS_MAX:
        raise InvalidArgument(f"{len(splits)} split keys are more than {SPLITS_MAX}")
    for key in splits:
        if not key or key >= SYSTEM_START:
            raise InvalidArgument(f"a split key is not empty and below \\xff: {key!r}")
        if len(key) > limits.KEY_BYTES_MAX:
            raise KeyTooLarge(f"a split key has at most {limits.KEY_BYTES_MAX} bytes: {len(key)}")
    if len(dict.fromkeys(splits)) != len(splits):
        raise InvalidArgument("a split key is given twice")


def _check_directory(request: InitRequest) -> None:
    size = sum(len(node.address) + _NODE_BYTES for node in request.nodes)
    for each in request.ranges:
        bounds = len(each.start) + len(each.end)
        size += bounds + _RANGE_BYTES + _REPLICA_BYTES * len(each.replicas)
    if size > DIRECTORY_BYTES_MAX:
        raise InvalidArgument(
            f"the ranges and nodes take {size} bytes to name; at most {DIRECTORY_BYTES_MAX}: fewer or shorter split keys"
        )


def _digest(addresses: Sequence[str], splits: Sequence[bytes], replicas: int) -> str:
    content = msgspec.msgpack.encode((list(addresses), sorted(splits), replicas))
    return hashlib.blake2b(content, digest_size=_DIGEST_DIGITS // 2).hexdigest()


def _is_cluster_id(text: str) -> bool:
    digits = _TIME_DIGITS + _RANDOM_DIGITS + _DIGEST_DIGITS
    return len(text) == digits and all(digit in "0123456789abcdef" for digit in text)
