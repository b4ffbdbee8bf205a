"""What a node tells Prometheus: instruments that the node drives, and gauges read from `Node.status()` when scraped.

Names have the prefix `kvorum_` and base units; no label holds a key, a range or an address, so their number is bounded.
A status without some figure leaves that gauge out rather than say 0.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

Status = Mapping[str, Any]
_Family = GaugeMetricFamily | CounterMetricFamily

_FAST_S: Final = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
)
_REQUEST_S: Final = (*_FAST_S, 2.5, 5.0, 10.0, 30.0)
_BATCH: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_STATES: Final = ("waiting", "starting", "ready", "draining")
_ROLES: Final = ("leader", "follower", "candidate", "pre_candidate", "learner")
_OPERATION: Final = re.compile(r"[a-z_]{1,32}")


class NodeMetrics:
    """A node's registry and instruments. Cheap enough to call once per batch or request, not once per row.

    Args: status: `Node.status`, called at every scrape on the scraping thread. version: of the product.
    """

    def __init__(
        self, status: Callable[[], Status], version: str, registry: CollectorRegistry | None = None
    ) -> None:
        self.registry = registry if registry is not None else CollectorRegistry(auto_describe=True)
        self._instruments()
        self.registry.register(StatusCollector(status, version))

    def _instruments(self) -> None:
        registry = self.registry

        def histogram(
            name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()
        ) -> Histogram:
            return Histogram(f"kvorum_{name}", text, labels, buckets=buckets, registry=registry)

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"kvorum_{name}", text, labels, registry=registry)

        self.request_seconds = histogram(
            "request_seconds", "Time to answer a request.", _REQUEST_S, ["operation", "outcome"]
        )
        self.commit_seconds = histogram(
            "commit_seconds", "Time from prepare to known outcome.", _REQUEST_S, ["kind"]
        )
        self.aborts = counter("transaction_aborts_total", "Transactions aborted.", ["reason"])
        self.conflicts = counter("transaction_conflicts_total", "Conflicts met, whoever gave way.")
        self.retries = counter("transaction_retries_total", "Transactions run again.")
        self.lock_wait_seconds = histogram(
            "lock_wait_seconds", "Time waited for a lock.", _REQUEST_S
        )
        self.raft_proposals = counter("raft_proposals_total", "Entries proposed.")
        self.raft_commit_seconds = histogram(
            "raft_commit_seconds", "From proposal to commit.", _FAST_S
        )
        self.raft_append_seconds = histogram(
            "raft_append_seconds", "From append to a follower's answer.", _FAST_S
        )
        self.raft_elections = counter("raft_elections_total", "Elections begun here.")
        self.snapshot_bytes = counter(
            "raft_snapshot_bytes_total", "Snapshot bytes moved.", ["direction"]
        )
        self.wal_write_seconds = histogram(
            "wal_write_seconds", "Time to write one batch of the log.", _FAST_S
        )
        self.wal_sync_seconds = histogram(
            "wal_sync_seconds", "Time to sync one batch of the log.", _FAST_S
        )
        self.wal_bytes = counter("wal_written_bytes_total", "Bytes written to the log.")
        self.turn_seconds = histogram("turn_seconds", "Duration of one turn of the node.", _FAST_S)
        self.turn_entries = histogram("turn_entries", "Log entries in one turn.", _BATCH)
        self.loop_lag_seconds = histogram(
            "event_loop_lag_seconds", "How late the event loop runs a timer.", _FAST_S
        )
        self.oracle_seconds = histogram(
            "oracle_seconds", "Time to get timestamps from the oracle.", _FAST_S
        )
        self.channel_redeliveries = counter(
            "channel_redeliveries_total", "Channel messages sent again."
        )

    def observe_request(self, operation: str, outcome: str, seconds: float) -> None:
        """One request; `outcome` is "ok" or the code of its error. Odd names count as "other"."""
        names = [name if _OPERATION.fullmatch(name) else "other" for name in (operation, outcome)]
        self.request_seconds.labels(*names).observe(seconds)


class StatusCollector(Collector):
    """Turns one status, taken at the scrape, into gauges. Never raises for a status of another shape."""

    def __init__(self, status: Callable[[], Status], version: str) -> None:
        self._status = status
        self._version = version

    def describe(self) -> Iterable[_Family]:
        return ()  # the node may not have a status yet when we are registered

    def collect(self) -> Iterable[_Family]:
        status = self._status()
        yield _gauge("build_info", "1; the label tells the version.", {"version": self._version}, 1)
        yield from _plain(status, "uptime_s", "uptime_seconds", "Since the node started.")
        yield _one_of(
            "node_state", "The state of the node.", "state", _STATES, str(status.get("state", ""))
        )
        yield from _range_families(status.get("ranges"))
        for group, text in _GROUPS.items():
            yield from _group_families(group, text, status.get(group))
        yield from _refusals(status.get("refused"))


_GROUPS: Final[Mapping[str, str]] = {
    "wal": "Of the log",
    "engine": "Of the storage engine",
    "host": "Of the replication host",
    "peers": "Of the connections to other nodes",
    "requests": "Of the requests of clients",
    "transactions": "Of the transactions in progress",
    "oracle": "Of the timestamp oracle",
    "channel": "Of the replicated message channel",
    "connections": "Of the connections of clients",
}


def _range_families(ranges: Any) -> Iterable[_Family]:
    if not isinstance(ranges, Sequence):
        return
    rows = [each for each in ranges if isinstance(each, Mapping)]
    roles = GaugeMetricFamily("kvorum_replicas", "Replicas on this node, by role.", labels=["role"])
    for role in _ROLES:
        roles.add_metric(
            [role], sum(1 for each in rows if str(each.get("role", "")).lower() == role)
        )
    yield roles
    leaderless = sum(1 for each in rows if not each.get("leader_node"))
    yield _gauge(
        "ranges_leaderless", "Ranges of this node of which it knows no leader.", {}, leaderless
    )
    behind = [int(each.get("commit", 0)) - int(each.get("applied", 0)) for each in rows]
    yield _gauge(
        "apply_backlog_entries",
        "Committed entries not applied yet, over all ranges.",
        {},
        sum(behind),
    )


def _group_families(group: str, text: str, figures: Any) -> Iterable[_Family]:
    """kvorum_{group}_{name}; a name that ends in `_total` is a counter, in `_s` seconds. Nested values are left out."""
    if not isinstance(figures, Mapping):
        return
    for name, value in figures.items():
        if not isinstance(value, numbers.Real):
            continue
        clean = re.sub(r"[^a-z0-9]+", "_", str(name).lower()).strip("_")
        if clean.endswith("_s"):
            clean = clean[:-2] + "_seconds"
        full = f"kvorum_{group}_{clean}"
        if clean.endswith("_total"):
            yield CounterMetricFamily(full, f"{text}: {name}.", value=float(value))
        else:
            yield GaugeMetricFamily(full, f"{text}: {name}.", value=float(value))


def _refusals(refused: Any) -> Iterable[_Family]:
    if not isinstance(refused, Mapping):
        return
    family = CounterMetricFamily(
        "kvorum_refused", "Refused before anything was done.", labels=["reason"]
    )
    for reason, count in refused.items():
        if isinstance(count, numbers.Real):
            family.add_metric([str(reason)], float(count))
    yield family


def _plain(status: Status, field: str, name: str, text: str) -> Iterable[_Family]:
    value = status.get(field)
    if isinstance(value, numbers.Real):
        yield _gauge(name, text, {}, float(value))


def _one_of(name: str, text: str, label: str, values: Sequence[str], current: str) -> _Family:
    family = GaugeMetricFamily(f"kvorum_{name}", text, labels=[label])
    for value in values:
        family.add_metric([value], 1.0 if value == current else 0.0)
    return family


def _gauge(name: str, text: str, labels: Mapping[str, str], value: float) -> _Family:
    family = GaugeMetricFamily(f"kvorum_{name}", text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family
