"""What a node tells Prometheus: figures as they are, counters as counters, and no label of unbounded values."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from aiohttp import test_utils, web

from kvstore.adapters import http_server
from kvstore.measures import NodeMeasures, StoreMeasures
from kvstore.metrics import NodeMetrics
from replication.measures import Measures
from tests.unit.kvstore.fake_node import FakeDatabase, FakeNode


@pytest.fixture
def database():
    return FakeDatabase({b"a": b"1", b"b": b"2", b"b2": b"22", b"c": b"3"})


@pytest.fixture
def node(database):
    return FakeNode(database)


@pytest.fixture
async def http(node):
    """A client of the gateway in front of `node`."""
    async with serving(node) as client:
        yield client


def serving(node):
    app = web.Application()
    http_server.add_routes(app, node, node.metrics.observe_request)
    return test_utils.TestClient(test_utils.TestServer(app))


async def metrics_text(http, **headers):
    await http.get("/v1/kv/a")
    response = await http.get("/metrics", headers=headers)
    assert response.status == 200
    return await response.text()


async def test_metrics_show_the_status(http):
    lines = (await metrics_text(http)).splitlines()
    assert "kvorum_uptime_seconds 12.5" in lines
    assert 'kvorum_node_state{state="ready"} 1.0' in lines
    assert 'kvorum_replicas{role="leader"} 1.0' in lines
    assert "kvorum_apply_backlog_entries 2.0" in lines
    assert "kvorum_engine_block_cache_bytes 4096.0" in lines
    assert "kvorum_engine_flushes_total 3.0" in lines
    assert "kvorum_host_synced_bytes_total 20480.0" in lines
    assert 'kvorum_build_info{version="0.1.0"} 1.0' in lines


def test_figures_that_only_grow_are_counters_and_the_others_gauges():
    figures = {"turns": 7, "sync_p99_s": 0.002, "groups": 3, "note": "x", "on": {}}
    status = {"host": figures, "requests": {"requests": 9, "requests_throttled": 1, "open": 2}}
    read = NodeMetrics(lambda: status, "0.1.0").registry.get_sample_value
    assert read("kvorum_host_turns_total") == 7
    assert read("kvorum_host_sync_p99_seconds") == 0.002
    assert read("kvorum_host_groups") == 3
    assert read("kvorum_requests_total") == 9
    assert read("kvorum_requests_throttled_total") == 1
    assert read("kvorum_requests_open") == 2


def test_a_node_that_is_no_member_yet_has_no_histograms_of_its_own():
    registry = NodeMetrics(dict, "0.1.0", lambda: None).registry
    assert registry.get_sample_value("kvorum_turn_seconds_count") is None


def test_what_the_node_noted_becomes_histograms():
    noted = NodeMeasures(Measures(), StoreMeasures())
    noted.host.turn_seconds.note(0.0003)
    noted.host.turn_seconds.note(99.0)
    noted.host.turn_entries.note(5)
    noted.store.cross_range_seconds.note(0.02, times=3)
    read = NodeMetrics(dict, "0.1.0", lambda: noted).registry.get_sample_value
    assert read("kvorum_turn_seconds_count") == 2.0
    assert read("kvorum_turn_seconds_sum") == pytest.approx(99.0003)
    assert read("kvorum_turn_seconds_bucket", {"le": "0.0005"}) == 1.0
    assert read("kvorum_turn_seconds_bucket", {"le": "10.0"}) == 1.0
    assert read("kvorum_turn_seconds_bucket", {"le": "+Inf"}) == 2.0
    assert read("kvorum_turn_entries_bucket", {"le": "8.0"}) == 1.0
    assert read("kvorum_commit_seconds_count", {"kind": "cross_range"}) == 3.0
    assert read("kvorum_commit_seconds_count", {"kind": "single_range"}) == 0.0


def test_aborts_are_told_by_reason_and_not_twice():
    status = {"outcomes": {"fences_by_conflict_total": 4, "commits_one_range_total": 2}}
    read = NodeMetrics(lambda: status, "0.1.0").registry.get_sample_value
    assert read("kvorum_transaction_aborts_total", {"reason": "conflict"}) == 4.0
    assert read("kvorum_outcomes_fences_by_conflict_total") is None
    assert read("kvorum_outcomes_commits_one_range_total") == 2.0


def test_the_lag_of_the_loop_is_measured_in_the_real_world():
    read = (metrics := NodeMetrics(dict, "0.1.0")).registry.get_sample_value
    metrics.observe_loop_lag(0.004)
    assert read("kvorum_event_loop_lag_seconds_bucket", {"le": "0.005"}) == 1.0
    assert read("kvorum_event_loop_lag_seconds_bucket", {"le": "0.0025"}) == 0.0


def test_odd_names_do_not_become_labels():
    metrics = NodeMetrics(dict, "0.1.0")
    metrics.observe_request("../evil", "X" * 99, 0.002)
    labels = {"operation": "other", "outcome": "other"}
    assert metrics.registry.get_sample_value("kvorum_request_seconds_count", labels) == 1.0


async def test_metrics_have_no_label_of_unbounded_values(http):
    text = await metrics_text(http)
    labels = set(re.findall(r"([a-z_]+)=\"", text))
    assert labels <= {"operation", "outcome", "state", "role", "reason", "version", "le", "kind"}


async def test_metrics_speak_openmetrics_when_asked(http):
    text = await metrics_text(http, Accept="application/openmetrics-text; version=1.0.0")
    assert text.endswith("# EOF\n")


@pytest.mark.parametrize(
    "status", [{}, {"ranges": None, "host": 3, "outcomes": []}, {"uptime_s": "x"}]
)
def test_a_status_of_another_shape_breaks_no_scrape(status):
    metrics = NodeMetrics(lambda: status, "0.1.0")
    names = [family.name for family in metrics.registry.collect()]
    assert "kvorum_build_info" in names


DOCS = Path(__file__).parents[3] / "docs"
RULE = re.compile(
    r"      - alert: (?P<alert>Kvorum[A-Za-z]+)\n"
    r"        expr: (?P<expr>\w.*)\n"
    r"(        for: \d+[sm]\n)?"
    r"        labels: {severity: (warning|critical)}\n"
    r"        annotations:\n"
    r'          summary: "[^"\\]+"\n'
    r'          action: "[^"\\]+"\n'
)


def rules():
    """Each rule of docs/alerts.yml, as it stands there."""
    _, head, text = (DOCS / "alerts.yml").read_text().partition("\n    rules:\n")
    assert head
    return text.split("\n\n")


def test_each_alert_is_a_rule_with_a_severity_a_summary_and_what_to_do():
    """As far as that can be seen without promtool (integration/test_metrics_scrape.py)."""
    found = [RULE.fullmatch(each.rstrip("\n") + "\n") for each in rules()]
    assert None not in found
    names = [each["alert"] for each in found if each]
    assert len(set(names)) == len(names) >= 10
    for expression in (each["expr"] for each in found if each):
        assert ": " not in expression, "it would be no plain scalar of YAML"
        assert " #" not in expression
        assert expression.count("(") == expression.count(")")


def test_each_alert_asks_for_metrics_that_are_told_of():
    """On docs/metrics.md; that those are there, test_metrics_scrape.py sees on real nodes."""
    told = re.findall(r"`(kvorum_\w+)`", (DOCS / "metrics.md").read_text())
    asked = re.findall(r"kvorum_\w+", "".join(re.findall(r"expr: (.*\n)", "".join(rules()))))
    assert len(asked) >= 9
    assert [name for name in asked if name.removesuffix("_bucket") not in told] == []
