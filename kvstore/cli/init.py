"""`kvctl init`: make waiting nodes a cluster, once. Run again, it finishes what was cut off, or says that all is done.

Nodes are only asked who they are until all of them have answered; a plan that was begun with other arguments is refused.
Who is to approve the plan may take any time: the nodes are asked again afterwards, and must be as they were.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from kvstore import bootstrap
from kvstore.adapters import http_client
from kvstore.errors import KVError, Refused, Unavailable, WrongCluster

RETRY_PAUSE_S: Final = 0.1


class Initialized(NamedTuple):
    cluster_id: str
    nodes: list[str]
    ranges: int
    already: bool  # every node was a member before


class Plan(NamedTuple):
    """What would be sent: `requests`, one for each address in order, to those that are `missing` in the cluster."""

    cluster_id: str
    requests: list[bootstrap.InitRequest]
    missing: list[tuple[str, bootstrap.InitRequest]]


def initialize(
    addresses: Sequence[str],
    splits: Sequence[bytes],
    *,
    replicas: int,
    timeout_s: float,
    approve: Callable[[Plan], None] | None = None,
) -> Initialized:
    """Ask every node who it is, and send the plan to those that are empty. Nothing is sent unless all of them answer.

    Args: timeout_s: for all, without the time that `approve` takes. approve: is shown the plan if there is anything to
    send, and raises what it likes to stop it.
    Raises: InvalidArgument for bad addresses or split keys. Unavailable when a node does not answer in time. Refused
    when one holds data, was a member and lost it, takes another address for its own, their cluster was begun with other
    arguments, or they changed while `approve` took its time. WrongCluster when they are of several.
    """
    deadline = time.monotonic() + timeout_s
    created_ms, bits = time.time_ns() // 1_000_000, secrets.randbits(64)
    minted = bootstrap.mint_cluster_id(created_ms, bits, addresses, splits, replicas)
    bootstrap.plan(
        minted, addresses, splits, replicas
    )  # refuses bad arguments before anybody is asked
    found = _planned(addresses, splits, replicas, minted, deadline)
    if found.missing and approve is not None:
        approve(found)
        deadline = time.monotonic() + timeout_s
        if _planned(addresses, splits, replicas, minted, deadline) != found:
            raise Refused(
                "the nodes changed while the question waited; nothing was changed: run the command again"
            )
    _send(found.missing, deadline)
    ranges = len(found.requests[0].ranges)
    return Initialized(found.cluster_id, list(addresses), ranges, already=not found.missing)


def _planned(
    addresses: Sequence[str], splits: Sequence[bytes], replicas: int, minted: str, deadline: float
) -> Plan:
    """What these nodes lack of the cluster that some of them belong to, or else of the minted one."""
    identities = _identities(list(addresses), deadline)
    cluster_id = _cluster_id_of(addresses, identities) or minted
    if not bootstrap.belongs(cluster_id, addresses, splits, replicas):
        raise Refused(
            f"a cluster exists on these nodes already ({cluster_id}), made from other --nodes, --split or --replicas"
        )
    requests = bootstrap.plan(cluster_id, addresses, splits, replicas)
    missing = []
    for request, address, identity in zip(requests, addresses, identities, strict=True):
        if not identity.get("cluster_id"):
            _refuse_if_elsewhere(address, identity)
            _refuse_if_heard(address, request.your_node_id, identities)
            missing.append((address, request))
        elif int(identity.get("node_id", 0)) != request.your_node_id:
            raise Refused(
                f"{address} is node {identity.get('node_id')}, not node {request.your_node_id}"
            )
    return Plan(cluster_id, requests, missing)


def _identities(addresses: list[str], deadline: float) -> list[dict[str, Any]]:
    """What each node says of itself; asked again until all answer or time is up."""
    while True:
        answers = http_client.request_all(
            addresses, "GET", "/v1/admin/identity", timeout_s=_left(deadline)
        )
        failed = [answer for answer in answers if isinstance(answer, KVError)]
        if not failed:
            return [answer for answer in answers if isinstance(answer, dict)]
        if time.monotonic() + RETRY_PAUSE_S > deadline:
            raise Unavailable(
                f"nothing was changed, because a node does not answer: {failed[0].message}"
            )
        time.sleep(RETRY_PAUSE_S)


def _cluster_id_of(addresses: Sequence[str], identities: Sequence[dict[str, Any]]) -> str:
    """The cluster that some of the nodes belong to, "" if none does."""
    found: dict[str, str] = {}
    for address, identity in zip(addresses, identities, strict=True):
        cluster_id = str(identity.get("cluster_id", ""))
        if cluster_id:
            found.setdefault(cluster_id, address)
        elif not identity.get("empty"):
            raise Refused(
                f"{address} is not empty (state {identity.get('state')!r}); nothing was changed"
            )
    if len(found) > 1:
        raise WrongCluster(
            "the nodes are of different clusters: "
            + ", ".join(f"{a}: {c}" for c, a in found.items())
        )
    return next(iter(found), "")


def _refuse_if_elsewhere(address: str, identity: dict[str, Any]) -> None:
    """It would refuse the plan; but others would have taken theirs, and those cannot be changed any more."""
    found = str(identity.get("address", "")) or address
    if found != address:
        raise Refused(
            f"{address} takes {found} for its address; nothing was changed. Start it with --advertise {address}, or name "
            f"{found} in --nodes"
        )


def _refuse_if_heard(address: str, node_id: int, identities: Sequence[dict[str, Any]]) -> None:
    """An empty node that was a member has lost its votes with its disk: as its old self it could lose writes."""
    if any(node_id in identity.get("heard", ()) for identity in identities):
        raise Refused(
            f"{address} is empty, but node {node_id} was a member of this cluster already: without its disk it must not come "
            "back as the same node. Stop it and put its data directory back (the others go on without it; replacing a "
            "node is not possible yet)"
        )


def _send(missing: Sequence[tuple[str, bootstrap.InitRequest]], deadline: float) -> None:
    """To all that lack it, again until each accepts; a refusal that is not for now ends it."""
    todo = list(missing)
    while todo:
        addresses, bodies = [address for address, _ in todo], [request for _, request in todo]
        answers = http_client.request_all(
            addresses, "POST", "/v1/admin/init", list(bodies), timeout_s=_left(deadline)
        )
        final = [
            answer for answer in answers if isinstance(answer, KVError) and not answer.retryable
        ]
        if final:
            raise final[0]
        todo = [
            item for item, answer in zip(todo, answers, strict=True) if isinstance(answer, KVError)
        ]
        if todo and time.monotonic() + RETRY_PAUSE_S > deadline:
            raise Unavailable(
                f"{todo[0][0]} did not take the plan in time; run the same command again to finish"
            )
        if todo:
            time.sleep(RETRY_PAUSE_S)


def _left(deadline: float) -> float:
    return max(0.1, min(10.0, deadline - time.monotonic()))
