"""What a node tells Prometheus: gauges and counters of `Node.status()`, histograms of `Node.measures()`, read when scraped.

Names have the prefix `kvorum_` and base units; no label holds a key, a range or an address, so their number is bounded.
A status without some figure leaves that gauge out rather than say 0.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector

from kvstore.measures import NodeMeasures
from replication.measures import SECONDS, Distribution

Status = Mapping[str, Any]
_Family = GaugeMetricFamily | CounterMetricFamily

_STATES: Final = ("waiting", "starting", "ready", "draining")
_ROLES: Final = ("leader", "caretaker", "follower", "candidate", "pre-candidate", "refused")
_OPERATION: Final = re.compile(r"[a-z_]{1,32}")


class NodeMetrics:
    """A node's registry: what it says of itself at each scrape, and the two instruments that its surroundings drive.

    Args: status, measures: `Node.status` and `Node.measures`, called at every scrape on the scraping thread. version: of
    the product.
    """

    def __init__(
        self,
        status: Callable[[], Status],
        version: str,
        measures: Callable[[], NodeMeasures | None] = lambda: None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self.registry = registry if registry is not None else CollectorRegistry()
        self.registry.register(StatusCollector(status, version))
        self.registry.register(MeasureCollector(measures))
        self._request_seconds = self._histogram(
            "request_seconds", "Time to answer a request over HTTP.", "operation", "outcome"
        )
        self._loop_lag_seconds = self._histogram(
            "event_loop_lag_seconds",
            "How late the event loop ran a timer that is due ten times a second.",
        )

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"kvorum_{name}", text, labels, buckets=SECONDS, registry=self.registry)

    def observe_request(self, operation: str, outcome: str, seconds: float) -> None:
        """One request; `outcome` is "ok" or the code of its error. Odd names count as "other"."""
        names = [name if _OPERATION.fullmatch(name) else "other" for name in (operation, outcome)]
        self._request_seconds.labels(*names).observe(seconds)

    def observe_loop_lag(self, seconds: float) -> None:
        """One timer of the loop, and how late it ran."""
        self._loop_lag_seconds.observe(seconds)


class MeasureCollector(Collector):
    """Turns what a node noted into histograms; nothing while it is no member of a cluster."""

    def __init__(self, measures: Callable[[], NodeMeasures | None]) -> None:
        self._measures = measures

    def describe(self) -> Iterable[_Family]:
        return ()

    def collect(self) -> Iterable[HistogramMetricFamily]:
        noted = self._measures()
        if noted is None:
            return
        commits = {
            "single_range": noted.store.single_range_seconds,
            "cross_range": noted.store.cross_range_seconds,
        }
        yield _distribution(
            "commit_seconds",
            "At the leader, from a Prepare's evaluation to its answer: a commit in one range, or one range's part of a "
            "commit across ranges. The first of each kind in a log entry stands for all of that kind.",
            commits,
            "kind",
        )
        for name, (text, measure) in _NOTED.items():
            yield _distribution(name, text, {"": measure(noted)})


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
        yield from _aborts(status.get("outcomes"))


_NOTED: Final[Mapping[str, tuple[str, Callable[[NodeMeasures], Distribution]]]] = {
    "raft_commit_seconds": (
        "At the leader, from proposing an entry to its being committed, and on the own disk.",
        lambda noted: noted.host.commit_seconds,
    ),
    "raft_append_seconds": (
        "From an append to the follower's word that it is on its disk; one at a time for each follower.",
        lambda noted: noted.host.append_seconds,
    ),
    "wal_write_seconds": (
        "To write one batch of the log, of all ranges, without its sync.",
        lambda noted: noted.host.log_write_seconds,
    ),
    "wal_sync_seconds": (
        "To sync one batch of the log (fdatasync).",
        lambda noted: noted.host.log_sync_seconds,
    ),
    "turn_seconds": (
        "For how long one turn of the node held the event loop, syncs that are done inline included.",
        lambda noted: noted.host.turn_seconds,
    ),
    "turn_entries": (
        "Log entries of all ranges in one batch of the log.",
        lambda noted: noted.host.turn_entries,
    ),
    "turn_requests": (
        "Requests that were evaluated in one turn.",
        lambda noted: noted.store.turn_requests,
    ),
    "oracle_seconds": (
        "Of one question for timestamps, but for those that the oracle here answers in the same turn.",
        lambda noted: noted.store.oracle_seconds,
    ),
}
_FENCES: Final = "fences_by_"
_GROUPS: Final[
    Mapping[str, str]
] = {  # a group of figures in the status -> what its help texts begin with
    "engine": "Of the storage engine",
    "host": "Of the replication host",
    "log": "Of the log, as the node's start found it",
    "raft": "Of the replicas here",
    "peers": "Of the connections to other nodes",
    "requests": "Of the requests of clients",
    "replica_reads": "Of reads that any replica may answer",
    "closed": "Of closed timestamps told to followers",
    "transactions": "Of the transactions in progress",
    "outcomes": "Of what ranges led here decided",
    "oracle": "Of the timestamp oracle",
    "watches": "Of the watches of ranges led here",
    "channel": "Of the replicated message channel",
    "connections": "Of the connections of clients",
    "client": "Of the node's own client, which serves HTTP and calls between ranges",
}
_COUNTERS: Final[Mapping[str, frozenset[str]]] = {  # figures that only grow; others are counters by their `_total`
    "host": frozenset(
        {
            "turns", "messages_in", "stalls", "messages_dropped_inbox_full", "messages_dropped_unknown",
            "messages_dropped_malformed", "messages_dropped_no_route", "synced_bytes", "segments_created",
            "segments_deleted", "syncs", "sync_mode_switches", "snapshots_sent", "snapshots_failed",
            "snapshots_installed", "snapshots_refused", "snapshots_lost", "snapshots_outrun",
            "snapshot_frames_bad", "snapshot_answers_dropped", "entries_applied",
            "snapshot_bytes_sent", "snapshot_bytes_received",
        }
    ),
    "peers": frozenset({"messages_sent", "frames_sent", "frames_dropped"}),
    "client": frozenset(
        {"calls_retried", "messages_sent", "commit_attempts", "commit_retries", "conflicts", "replicas_behind"}
    ),
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
        if not isinstance(value, numbers.Real) or name.startswith(_FENCES):
            continue  # fences are told by reason
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


def _aborts(outcomes: Any) -> Iterable[_Family]:
    if not isinstance(outcomes, Mapping):
        return
    family = CounterMetricFamily(
        "kvorum_transaction_aborts",
        "Fences, each of which ends a transaction; one that two ranges refuse counts twice. By compare: a condition "
        "did not hold; conflict; recovery: abandoned; request: it cannot be done.",
        labels=["reason"],
    )
    for name, count in outcomes.items():
        if name.startswith(_FENCES):
            family.add_metric([name.removeprefix(_FENCES).removesuffix("_total")], float(count))
    yield family


def _distribution(
    name: str, text: str, noted: Mapping[str, Distribution], label: str = ""
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(f"kvorum_{name}", text, labels=[label] if label else [])
    for value, each in noted.items():
        buckets = [(str(bound), count) for bound, count in each.cumulative()]
        buckets[-1] = ("+Inf", buckets[-1][1])
        family.add_metric([value] if label else [], buckets, each.total)
    return family


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
