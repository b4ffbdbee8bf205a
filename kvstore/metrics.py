"""What a node tells Prometheus: instruments that the node drives, and gauges read from `Node.status()` when scraped.

Names have the prefix `kvorum_` and base units; no label holds a key, a range or an address, so their number is bounded.
A status without some figure leaves that gauge out rather than say 0.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
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
_ROLES: Final = ("leader", "follower", "candidate", "pre-candidate", "refused")
_OPERATION: Final = re.compile(r"[a-z_]{1,32}")


class NodeMetrics:
    """A node's registry and instruments. Cheap enough to call once per batch or request, not once per row.

    An instrument is registered when it is first used: what nobody measures yet is absent, not 0.
    Args: status: `Node.status`, called at every scrape on the scraping thread. version: of the product.
    """

    def __init__(
        self,
        status: Callable[[], Status],
        version: str,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self.registry = registry if registry is not None else CollectorRegistry()
        self.registry.register(StatusCollector(status, version))

    @cached_property
    def request_seconds(self) -> Histogram:
        return self._histogram(
            "request_seconds", "Time to answer a request.", _REQUEST_S, "operation", "outcome"
        )

    @cached_property
    def commit_seconds(self) -> Histogram:
        """By kind: single_range, cross_range."""
        text = "Time from prepare to known outcome."
        return self._histogram("commit_seconds", text, _REQUEST_S, "kind")

    @cached_property
    def aborts(self) -> Counter:
        return self._counter("transaction_aborts_total", "Transactions aborted.", "reason")

    @cached_property
    def retries(self) -> Counter:
        return self._counter("transaction_retries_total", "Transactions run again.")

    @cached_property
    def lock_wait_seconds(self) -> Histogram:
        return self._histogram("lock_wait_seconds", "Time waited for a lock.", _REQUEST_S)

    @cached_property
    def raft_commit_seconds(self) -> Histogram:
        return self._histogram("raft_commit_seconds", "From proposal to commit.", _FAST_S)

    @cached_property
    def raft_append_seconds(self) -> Histogram:
        text = "From an append to the follower's answer."
        return self._histogram("raft_append_seconds", text, _FAST_S)

    @cached_property
    def raft_elections(self) -> Counter:
        return self._counter("raft_elections_total", "Elections begun here.")

    @cached_property
    def wal_write_seconds(self) -> Histogram:
        return self._histogram("wal_write_seconds", "Time to write a batch of the log.", _FAST_S)

    @cached_property
    def wal_sync_seconds(self) -> Histogram:
        return self._histogram("wal_sync_seconds", "Time to sync a batch of the log.", _FAST_S)

    @cached_property
    def turn_seconds(self) -> Histogram:
        return self._histogram("turn_seconds", "Duration of one turn of the node.", _FAST_S)

    @cached_property
    def turn_entries(self) -> Histogram:
        return self._histogram("turn_entries", "Log entries in one turn.", _BATCH)

    @cached_property
    def loop_lag_seconds(self) -> Histogram:
        text = "How late the event loop runs a timer."
        return self._histogram("event_loop_lag_seconds", text, _FAST_S)

    @cached_property
    def oracle_seconds(self) -> Histogram:
        return self._histogram("oracle_seconds", "Time to get timestamps.", _FAST_S)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"kvorum_{name}", text, labels, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"kvorum_{name}", text, labels, registry=self.registry)

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


_GROUPS: Final[
    Mapping[str, str]
] = {  # a group of figures in the status -> what its help texts begin with
    "wal": "Of the log",
    "engine": "Of the storage engine",
    "host": "Of the replication host",
    "raft": "Of the replicas here",
    "peers": "Of the connections to other nodes",
    "requests": "Of the requests of clients",
    "transactions": "Of the transactions in progress",
    "outcomes": "Of what ranges led here decided",
    "oracle": "Of the timestamp oracle",
    "watches": "Of the watches of ranges led here",
    "channel": "Of the replicated message channel",
    "connections": "Of the connections of clients",
}
_COUNTERS: Final[Mapping[str, frozenset[str]]] = {  # figures that only grow; others are counters by their `_total`
    "host": frozenset(
        {
            "turns", "messages_in", "stalls", "messages_dropped_inbox_full", "messages_dropped_unknown",
            "messages_dropped_malformed", "messages_dropped_no_route", "synced_bytes", "segments_created",
            "segments_deleted", "syncs", "sync_mode_switches", "snapshots_sent", "snapshots_failed",
            "snapshots_installed", "snapshots_refused", "snapshots_lost", "snapshot_frames_bad", "entries_applied",
        }
    ),
    "peers": frozenset({"messages_sent", "frames_sent", "frames_dropped"}),
    "requests": frozenset(
        {
            "requests", "requests_throttled", "commands", "entries", "rows_written", "read_index_rounds",
            "oracle_rounds",
        }
    ),
}  # fmt: skip


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
    """kvorum_{group}_{name}, `_s` written out as seconds. Nested values are left out."""
    if not isinstance(figures, Mapping):
        return
    counters = _COUNTERS.get(group, frozenset())
    for name, value in figures.items():
        if not isinstance(value, numbers.Real):
            continue
        clean = re.sub(r"[^a-z0-9]+", "_", str(name).lower()).strip("_")
        is_counter = name in counters or clean.endswith("_total")
        clean = clean.removesuffix("_total").removeprefix(f"{group}_")
        if clean.endswith("_s"):
            clean = clean[:-2] + "_seconds"
        full = f"kvorum_{group}" if clean == group else f"kvorum_{group}_{clean}"
        help_text = f"{text}: {str(name).replace('_', ' ')}."
        if is_counter:
            yield CounterMetricFamily(full, help_text, value=float(value))
        else:
            yield GaugeMetricFamily(full, help_text, value=float(value))


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
