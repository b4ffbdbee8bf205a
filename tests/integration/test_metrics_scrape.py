"""Every family that the metrics promise has samples on real nodes after some traffic, and none is driven by nobody; alert
rules ask for what there is."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import kvstore
from kvstore.adapters import http_client
from kvstore.errors import KVError
from kvstore.testing.cluster import LocalCluster

pytestmark = pytest.mark.slow

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
ALERTS = DOCUMENT.with_name("alerts.yml")
FAST = {"KVORUM_RAFT__ELECTION_TIMEOUT": "500ms", "KVORUM_RAFT__HEARTBEAT": "100ms"}
NOTED = (
    'kvorum_commit_seconds_count{kind="single_range"}',
    'kvorum_commit_seconds_count{kind="cross_range"}',
    'kvorum_transaction_aborts_total{reason="conflict"}',
    "kvorum_raft_commit_seconds_count",
    "kvorum_raft_append_seconds_count",
    "kvorum_raft_elections_begun_total",
    "kvorum_wal_write_seconds_count",
    "kvorum_wal_sync_seconds_count",
    "kvorum_turn_seconds_count",
    "kvorum_turn_entries_count",
    "kvorum_turn_requests_count",
    "kvorum_oracle_seconds_count",
    "kvorum_event_loop_lag_seconds_count",
    "kvorum_client_commit_attempts_total",
    "kvorum_requests_entries_total",
    "kvorum_host_entries_applied_total",
    "kvorum_host_synced_bytes_total",
    "kvorum_peers_messages_sent_total",
    "kvorum_uptime_seconds",
    'kvorum_replicas{role="leader"}',
)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_the_alert_rules_are_rules_of_prometheus():
    done = subprocess.run(
        ["promtool", "check", "rules", ALERTS], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def documented():
    """The families of docs/metrics.md."""
    return re.findall(r"`(kvorum_[a-z_]+[a-z])`", DOCUMENT.read_text())


def alerted():
    """What the rules of docs/alerts.yml look at."""
    rules = re.findall(r"^ *expr: (.*)$", ALERTS.read_text(), re.MULTILINE)
    return sorted(set(re.findall(r"kvorum_[a-z_]+[a-z]", " ".join(rules))))


def scrape(cluster):
    """What each sample is over all nodes, by name and labels as Prometheus writes them."""
    found: dict[str, float] = {}
    for address in cluster.addresses:
        text = http_client.request(address, "GET", "/metrics").body.decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
                name = f"{sample.name}{{{labels}}}" if labels else sample.name
                found[name] = found.get(name, 0.0) + sample.value
    return found


def traffic(db, cluster):
    for number in range(20):
        for first in (b"a", b"h", b"p"):
            db.put(b"%s%d" % (first, number), b"value")

    def put_both(tx):
        tx.put(b"a", b"1")
        tx.put(b"p", b"1")

    for _ in range(5):
        db.run(put_both)
    with contextlib.suppress(KVError), db.transaction() as tx:  # refused: it read what is old now
        tx.get(b"a1")
        db.put(b"a1", b"newer")
        tx.put(b"a1", b"lost")
    puts = [{"op": "put", "key": key, "value": "MQ=="} for key in ("YQ==", "cA==")]  # a, p
    for address in cluster.addresses:
        http_client.request(address, "PUT", "/v1/kv/h", b"value")
        http_client.request_json(address, "POST", "/v1/txn", {"operations": puts})


def test_every_promised_family_has_samples_after_traffic():
    with LocalCluster(3, splits=[b"g", b"n"], settings=FAST) as cluster:
        with kvstore.Client(cluster.endpoints) as db:
            traffic(db, cluster)
        until = time.monotonic() + 20
        while missing := [name for name in NOTED if not (found := scrape(cluster)).get(name)]:
            assert time.monotonic() < until, f"no samples of {missing}"
            time.sleep(0.2)
        families = {re.sub(r"\{.*|_count\b.*", "", name) for name in found}
        assert [name for name in documented() if name not in families] == []
        samples = {name.partition("{")[0] for name in found}
        assert len(alerted()) >= 9
        assert [name for name in alerted() if name not in samples] == []
        assert found['kvorum_commit_seconds_count{kind="single_range"}'] >= 60
        assert found['kvorum_commit_seconds_count{kind="cross_range"}'] >= 10
        assert found["kvorum_raft_commit_seconds_sum"] > 0.0
