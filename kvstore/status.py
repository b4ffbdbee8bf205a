"""What a node says of itself: one JSON-able picture, for `kvctl`, the status page and the metrics."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstore.node import Node
    from kvstore.replica import Replica
    from txn.locks import Lock

VERSION = "0.1.0"
LOCKS_SHOWN_MAX = 1_000  # keys in one answer


def node_status(node: Node) -> dict[str, Any]:
    """Cheap enough to be taken once a second."""
    store, host, engine = node.store, node.host, node.engine
    status: dict[str, Any] = {
        "node": node.node_id,
        "cluster": node.cluster_id,
        "address": node.address,
        "version": VERSION,
        "uptime_s": round(node.adapters.clock.monotonic() - node.started_at, 3),
        "state": node.state,
        "ranges": [],
    }
    if store is None or host is None or engine is None:
        return status
    figures = host.stats()
    status |= {
        "nodes": [{"node_id": number, "address": each} for number, each in store.addresses.items()],
        "ranges": [_range(node, replica) for replica in store.replicas.values()],
        "engine": {**engine.stats(), "flushes_total": node.flushes},
        "host": figures,
        "log": _log(node),
        "raft": {
            "leaderships_begun_total": store.leaderships_begun,
            "elections_begun_total": host.measures.elections_begun,
        },
        "requests": {
            **store.counters,
            "open": store.open_requests,
            "inbox_bytes": store.inbox_bytes + store.turn.waiting_bytes,
        },
        "replica_reads": {f"{name}_total": n for name, n in store.replica_reads.counters.items()},
        "closed": {f"{name}_total": n for name, n in store.closer.counters.items()},
        "connections": {
            "open": len(node.connections.open),
            "cut_off_total": node.connections.cut_off,
            "malformed_total": node.connections.malformed,
            "throttled_total": node.connections.throttled,
            "queue_bytes": sum(each.queue_bytes for each in node.connections.open.values()),
        },
        "oracle": {"last": str(store.oracle.last), "serving": int(store.oracle.serving)},
        "transactions": _transactions(node),
        "channel": {"oldest_s": _channel_age(node)},
        "outcomes": dict(store.transaction_counters),
        "heard": list(node.roster.heard) if node.roster is not None else [],
        "watches": {"waiting": store.polls.open, **store.polls.counters},
        "refused_ranges": {str(number): reason for number, reason in host.refused.items()},
    }
    if node.database is not None:
        status["client"] = node.database.stats()
    if node.peers is not None:
        status["peer_links"] = node.peers.status()
        status["peers"] = {**node.peers.counters, **node.peers.gauges()}
    return status


def _log(node: Node) -> dict[str, int]:
    """What the last start found of the log: places that are damaged, and what a crash had torn."""
    found = node.wal.recovery if node.wal is not None else None
    if found is None:  # just begun
        return {"damaged_places": 0, "unreadable_blocks": 0, "torn_bytes": 0}
    return {
        "damaged_places": len(found.damage) + len(found.bodies),
        "unreadable_blocks": len(found.unreadable),
        "torn_bytes": found.torn_bytes,
    }


def _transactions(node: Node) -> dict[str, int]:
    assert node.store is not None
    states = [replica.state for replica in node.store.replicas.values()]
    tables = [
        replica.evaluator.locking.table
        for replica in node.store.replicas.values()
        if replica.evaluator is not None
    ]
    return {
        "prepared": sum(len(state.parts) for state in states),
        "staged": sum(len(state.staged) for state in states),
        "outbox": sum(len(state.outbox) for state in states),
        "locks_held": sum(table.held for table in tables),
        "lock_waiters": sum(len(table.waiting) for table in tables),
    }


def _channel_age(node: Node) -> float:
    """Of the oldest outcome that a range led here has not got through to its participant."""
    assert node.store is not None
    now = node.adapters.clock.monotonic()
    evaluators = [replica.evaluator for replica in node.store.replicas.values()]
    return max(
        (each.recovery.outbox_age(now) for each in evaluators if each is not None), default=0.0
    )


def node_locks(node: Node) -> dict[str, Any]:
    """The locks of the ranges that are led here: of each key who holds it, and who waits, in order.

    `more`: there are more keys than LOCKS_SHOWN_MAX. Seconds are those of waiting, and until a lease ends.
    """
    shown: dict[str, Any] = {"node": node.node_id, "more": False, "locks": []}
    if node.store is None:
        return shown
    now = node.adapters.clock.monotonic()
    for replica in node.store.replicas.values():
        if replica.evaluator is None:
            continue
        for lock in replica.evaluator.locking.table.locks.values():
            if len(shown["locks"]) >= LOCKS_SHOWN_MAX:
                return {**shown, "more": True}
            shown["locks"].append({"range": replica.range_id, **_lock(lock, now)})
    return shown


def _lock(lock: Lock, now: float) -> dict[str, Any]:
    return {
        "key": base64.b64encode(lock.key).decode(),
        "holders": [
            {
                "transaction": owner.id.hex(),
                "exclusive": exclusive,
                "lease_s": round(max(0.0, owner.expires - now), 3),
            }
            for owner, exclusive in lock.holders.items()
        ],
        "waiters": [
            {
                "transaction": wait.owner.id.hex(),
                "exclusive": wait.exclusive,
                "committing": wait.committing,
                "waits_s": round(max(0.0, now - wait.since), 3),
            }
            for wait in lock.queue
        ],
    }


def _range(node: Node, replica: Replica) -> dict[str, Any]:
    assert node.store is not None
    assert node.host is not None
    row = replica.state.row
    shown: dict[str, Any] = {
        "id": row.range_id,
        "start": base64.b64encode(row.start).decode(),
        "end": base64.b64encode(row.end).decode(),
        "version": row.version,
        "conf_ver": row.conf_ver,
        "applied": row.applied_index,
        "leader_node": node.store.leader_node(replica),
        "replicas": [
            {"node": number, "replica": replica_id}
            for replica_id, number in replica.membership.nodes
        ],
    }
    if row.range_id in node.host.refused:
        return {**shown, "role": "refused", "term": 0, "commit": 0}
    raft = node.host.raft(row.range_id)
    return {**shown, "role": raft.role_name, "term": raft.term, "commit": raft.commit_index}
