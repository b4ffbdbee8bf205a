"""What kvctl does with a whole cluster: the verdict of status, the lists of nodes and ranges, and init, also when cut off.

No process is started: nodes are what they would answer.
"""

from __future__ import annotations

import base64
import io
import json
import sys

import pytest
from typer.testing import CliRunner

from kvstore import bootstrap
from kvstore.adapters import http_client
from kvstore.cli import admin, health, output, views
from kvstore.cli.init import initialize
from kvstore.errors import Refused, Unavailable, WrongCluster

# --- the verdict


def report(node, *, state="ready", ranges=(), nodes=3):
    return {
        "node": node,
        "cluster": "c1",
        "version": "0.1.0",
        "uptime_s": 3.0,
        "state": state,
        "nodes": [{"node_id": n, "address": f"h:{n}"} for n in range(1, nodes + 1)],
        "ranges": list(ranges),
    }


def replica(range_id, role, *, start="", end="", term=2, version=1, nodes=(1, 2, 3)):
    return {
        "id": range_id,
        "start": start,
        "end": end,
        "role": role,
        "term": term,
        "version": version,
        "replicas": [{"node": node, "replica": node} for node in nodes],
    }


def three(*roles, down=(), **fields):
    """Reports of three nodes with one range each, by role; `down` ones do not answer."""
    return {
        f"h:{number}": None
        if number in down
        else report(number, ranges=[replica(1, role, **fields)])
        for number, role in enumerate(roles, 1)
    }


def test_a_cluster_with_all_nodes_and_leaders_is_ok():
    found = health.assess(three("leader", "follower", "follower"))
    assert (found.verdict, found.fault_tolerance, found.problems) == ("ok", 1, [])
    assert found.ranges[0].leader == 1
    assert [node.leaders for node in found.nodes] == [1, 0, 0]


def test_a_node_that_is_down_degrades_it():
    found = health.assess(three("leader", "follower", "follower", down=[3]))
    assert (found.verdict, found.fault_tolerance) == ("degraded", 0)
    assert "no longer if one more node fails" in views._tolerance(found)
    assert found.ranges[0].problem == "under-replicated"
    assert found.problems == ["h:3 is unreachable", "1 range under-replicated: 1"]
    assert found.nodes[2].node_id == 3  # the others name it


@pytest.mark.parametrize(
    ("roles", "down", "problem"),
    [
        (("leader", "follower", "follower"), [2, 3], "no quorum"),
        (("follower", "follower", "follower"), [], "no leader"),
        (("leader", "follower", "follower"), [1], "no leader"),
    ],
)
def test_a_range_without_leader_or_quorum_is_unavailable(roles, down, problem):
    found = health.assess(three(*roles, down=down))
    assert (found.verdict, found.fault_tolerance) == ("unavailable", -1)
    assert found.ranges[0].problem == problem


def test_a_deposed_leader_does_not_count_against_the_newer_one():
    reports = three("leader", "follower", "follower")
    reports["h:2"]["ranges"] = [replica(1, "leader", term=3)]
    assert health.assess(reports).ranges[0].leader == 2


def test_a_part_of_the_keys_that_nobody_holds_is_unavailable():
    reports = three("leader", "follower", "follower", start="bQ==")
    found = health.assess(reports)
    assert found.verdict == "unavailable"
    assert (found.ranges[0].start, found.ranges[0].end) == (b"", b"m")


def test_a_replica_that_refuses_to_serve_does_not_count():
    found = health.assess(three("leader", "follower", "refused"))
    assert (found.verdict, found.ranges[0].problem) == ("degraded", "under-replicated")


def test_nodes_that_wait_for_init_are_unavailable_and_say_what_to_do():
    found = health.assess({"h:1": report(0, state="waiting", nodes=0)})
    assert found.verdict == "unavailable"
    assert found.problems == ["h:1 waits for `kvctl init`"]


def test_nodes_of_two_clusters_are_noticed():
    reports = three("leader", "follower", "follower")
    reports["h:2"]["cluster"] = "c2"
    assert any("different clusters" in problem for problem in health.assess(reports).problems)


@pytest.mark.parametrize("advertised_answers", [True, False])
def test_a_node_that_was_asked_at_two_addresses_is_one_node(advertised_answers):
    """An endpoint may be another name of the address that the node advertises, which may not be reachable from here."""
    reports = three("leader", "follower", "follower")
    reports = {"localhost:1": reports["h:1"], **reports}
    if not advertised_answers:
        reports["h:1"] = None
    found = health.assess(reports)
    assert (found.verdict, found.problems) == ("ok", [])
    shown = "h:1" if advertised_answers else "localhost:1"
    assert sorted((node.node_id, node.address) for node in found.nodes) == [
        (1, shown),
        (2, "h:2"),
        (3, "h:3"),
    ]


def test_nodes_of_different_clusters_are_not_taken_for_each_other():
    reports = {"a:1": report(1), "b:1": {**report(1), "cluster": "c2"}}
    assert len(health.assess(reports).nodes) == 2


@pytest.mark.parametrize("junk", [{}, {"ranges": 3, "nodes": "x"}, {"ranges": [1], "nodes": [2]}])
def test_a_report_of_another_shape_breaks_nothing(junk):
    assert health.assess({"h:1": junk}).verdict == "unavailable"


@pytest.fixture
def asked(monkeypatch):
    """Answer kvctl's HTTP from `reports`."""

    def answering(reports):
        def request_all(addresses, method, path, bodies=None, *, timeout_s=5.0):
            assert (method, path) == ("GET", "/v1/admin/status")
            return [reports.get(address) or Unavailable("no") for address in addresses]

        monkeypatch.setattr(http_client, "request_all", request_all)

    return answering


@pytest.mark.parametrize(
    ("down", "status", "verdict"),
    [((), 0, "ok"), ((3,), 10, "degraded"), ((2, 3), 11, "unavailable")],
)
def test_status_asks_every_node_that_one_knows_and_exits_with_the_verdict(
    asked, down, status, verdict
):
    asked(three("leader", "follower", "follower", down=down))
    done = CliRunner().invoke(admin.app, ["--endpoints", "h:1", "status"])
    assert done.exit_code == status
    assert done.stdout.startswith(verdict)
    assert "h:3" in done.stdout
    as_json = CliRunner().invoke(admin.app, ["--endpoints", "h:1", "-o", "json", "status"])
    assert as_json.exit_code == status
    assert json.loads(as_json.stdout)["verdict"] == verdict


def test_status_of_nobody_is_unavailable(asked):
    asked({})
    assert CliRunner().invoke(admin.app, ["status"]).exit_code == 11


@pytest.mark.parametrize("kind", ["nodes", "ranges"])
def test_nothing_is_listed_as_if_it_were_known_when_nobody_answers(asked, kind):
    asked({})
    done = CliRunner().invoke(admin.app, ["--endpoints", "h:1", kind, "ls"])
    assert done.exit_code == 1
    assert done.stdout == ""
    assert "error: unavailable: no node answers at h:1" in done.stderr


def test_nodes_and_ranges_are_listed(asked):
    asked(three("leader", "follower", "follower", down=(3,), start="", end=""))
    run = lambda *words: CliRunner().invoke(admin.app, ["--endpoints", "h:1", *words])  # noqa: E731
    assert [line.split()[:3] for line in run("nodes", "ls").stdout.splitlines()[1:]] == [
        ["1", "h:1", "ready"],
        ["2", "h:2", "ready"],
        ["3", "h:3", "unreachable"],
    ]
    assert "under-replicated" in run("ranges", "ls", "--problem").stdout
    assert json.loads(run("ranges", "ls", "--node", "9", "-o", "json").stdout) == []


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("utf-8", "k" * 39 + "…"), ("latin-1", "k" * 37 + "..."), ("ascii", "k" * 37 + "...")],
)
def test_a_long_key_is_cut_by_what_the_terminal_can_show(asked, encoding, shown):
    long = base64.b64encode(b"k" * 41).decode()
    asked(three("leader", "follower", "follower", start=long))
    done = CliRunner(charset=encoding).invoke(admin.app, ["--endpoints", "h:1", "ranges", "ls"])
    assert shown in done.stdout.split()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59, "59s"), (185, "3m 5s"), (7620, "2h 7m"), (273_600, "3d 4h")],
)
def test_durations_are_told_in_two_units(seconds, text):
    assert views.duration(seconds) == text


# --- init


class Nodes:
    """Nodes that answer identity and init, as `kvctl init` sees them."""

    def __init__(self, *identities):
        self.identities = [dict(each) for each in identities]
        self.sent = []
        self.fail_once = []

    def request_all(self, addresses, method, path, bodies=None, *, timeout_s=5.0):
        numbers = [int(address.rpartition(":")[2]) - 1 for address in addresses]
        if method == "GET":
            return [self.identities[number] or Unavailable("down") for number in numbers]
        return [self._init(number, body) for number, body in zip(numbers, bodies, strict=True)]

    def _init(self, number, body):
        if number in self.fail_once:
            self.fail_once.remove(number)
            return Unavailable("reset")
        self.sent.append(number + 1)
        identity = {"cluster_id": body.cluster_id, "node_id": body.your_node_id, "empty": False}
        self.identities[number].update(identity)
        return self.identities[number]


EMPTY = {"cluster_id": "", "node_id": 0, "state": "waiting", "empty": True}
ADDRESSES = ["h:1", "h:2", "h:3"]


@pytest.fixture
def initialized(monkeypatch):
    def run(nodes, splits=(), addresses=ADDRESSES, timeout_s=0.05):
        monkeypatch.setattr(http_client, "request_all", nodes.request_all)
        return initialize(addresses, list(splits), replicas=3, timeout_s=timeout_s)

    return run


def test_init_makes_empty_nodes_one_cluster(initialized):
    nodes = Nodes(EMPTY, EMPTY, EMPTY)
    done = initialized(nodes, [b"m"])
    assert not done.already
    assert done.ranges == 4
    assert [each["node_id"] for each in nodes.identities] == [1, 2, 3]
    assert {each["cluster_id"] for each in nodes.identities} == {done.cluster_id}


def test_init_again_changes_nothing(initialized):
    nodes = Nodes(EMPTY, EMPTY, EMPTY)
    first = initialized(nodes, [b"m"])
    sent = list(nodes.sent)
    second = initialized(nodes, [b"m"])
    assert second.already
    assert second.cluster_id == first.cluster_id
    assert nodes.sent == sent


def test_init_finishes_what_was_cut_off(initialized):
    cluster_id = bootstrap.mint_cluster_id(1, 2, ADDRESSES, [b"m"])
    begun = {"cluster_id": cluster_id, "node_id": 1, "state": "ready", "empty": False}
    nodes = Nodes(begun, EMPTY, EMPTY)
    done = initialized(nodes, [b"m"])
    assert done.cluster_id == cluster_id
    assert nodes.sent == [2, 3]


def test_a_member_whose_disk_is_gone_is_not_made_its_old_self_again(initialized):
    nodes = Nodes(EMPTY, EMPTY, EMPTY)
    initialized(nodes, [b"m"])
    sent = list(nodes.sent)
    nodes.identities[0]["heard"] = [2, 3]
    nodes.identities[2] = dict(EMPTY)
    with pytest.raises(Refused, match="h:3 is empty, but node 3 was a member"):
        initialized(nodes, [b"m"])
    assert nodes.sent == sent


def test_an_address_at_which_a_node_would_not_start_again_is_refused_before_anything_is_sent(
    initialized,
):
    nodes = Nodes(EMPTY, {**EMPTY, "address": "h:2"}, {**EMPTY, "address": "0.0.0.0:3"})
    with pytest.raises(Refused, match="h:3 takes 0.0.0.0:3 for its address.*--advertise h:3"):
        initialized(nodes, [b"m"])
    assert nodes.sent == []


def test_init_sends_again_to_a_node_that_did_not_answer(initialized):
    nodes = Nodes(EMPTY, EMPTY, EMPTY)
    nodes.fail_once = [1]
    initialized(nodes, timeout_s=5.0)
    assert nodes.sent == [1, 3, 2]


def test_init_with_other_split_keys_than_the_first_time_is_refused(initialized):
    nodes = Nodes(EMPTY, EMPTY, EMPTY)
    initialized(nodes, [b"m"])
    with pytest.raises(Refused):
        initialized(nodes, [b"n"])


def test_init_sends_nothing_unless_every_node_answers(initialized):
    nodes = Nodes(EMPTY, EMPTY, {})
    with pytest.raises(Unavailable, match="nothing was changed"):
        initialized(nodes)
    assert nodes.sent == []


@pytest.mark.parametrize(
    ("third", "error"),
    [
        ({**EMPTY, "empty": False, "state": "starting"}, Refused),
        ({**EMPTY, "cluster_id": "0" * 32, "node_id": 3, "empty": False}, Refused),
    ],
)
def test_init_refuses_nodes_that_are_not_empty(initialized, third, error):
    nodes = Nodes(EMPTY, EMPTY, third)
    with pytest.raises(error):
        initialized(nodes)
    assert nodes.sent == []


def test_init_refuses_nodes_of_different_clusters(initialized):
    members = [{**EMPTY, "cluster_id": digit * 32, "empty": False} for digit in "01"]
    with pytest.raises(WrongCluster):
        initialized(Nodes(*members, EMPTY))


def test_init_refuses_nodes_in_another_order(initialized):
    cluster_id = bootstrap.mint_cluster_id(1, 2, ADDRESSES, [])
    begun = {"cluster_id": cluster_id, "node_id": 2, "state": "ready", "empty": False}
    with pytest.raises(Refused, match="node 2, not node 1"):
        initialized(Nodes(begun, EMPTY, EMPTY))


def test_kvctl_init_prints_the_cluster(monkeypatch):
    nodes = Nodes(EMPTY, EMPTY, EMPTY)
    monkeypatch.setattr(http_client, "request_all", nodes.request_all)
    words = ["init", "--nodes", "h:1,h:2,h:3", "--split", r"a\xff", "--split", "m"]
    done = CliRunner().invoke(admin.app, words)
    assert done.exit_code == 0, done.stderr
    assert "is initialized: 3 nodes, 5 ranges" in done.stdout
    assert "already" in CliRunner().invoke(admin.app, words).stdout


@pytest.fixture
def on_a_terminal(monkeypatch):
    """Somebody sees what `kvctl init` prints, and can answer."""
    monkeypatch.setattr(output, "is_terminal", lambda _: True)

    def run(nodes, *words, typed=""):
        monkeypatch.setattr(http_client, "request_all", nodes.request_all)
        return CliRunner().invoke(admin.app, [*INIT, *words], input=typed)

    return run


INIT = ("init", "--nodes", "h:1,h:2,h:3", "--split", "m")
QUESTION = "These nodes become one cluster, for good. Go on? [y/N] "


@pytest.mark.parametrize("typed", ["y\n", "YES\n"])
def test_on_a_terminal_init_shows_its_plan_and_asks(on_a_terminal, typed):
    nodes = Nodes(EMPTY, EMPTY, EMPTY)
    done = on_a_terminal(nodes, typed=typed)
    assert done.exit_code == 0, done.stderr
    shown, question, rest = done.stdout.partition(QUESTION)
    assert question
    assert "3 nodes, 4 ranges, 3 copies of each" in shown
    assert [line.split("\t") for line in shown.splitlines() if line.startswith(("1", "4"))] == [
        ["1", "h:1", "joins"],
        ["1", r"\xff\x00", r"\xff\x01", "1,2,3"],
        ["4", r"\xff\x01", "(end)", "1,2,3"],
    ]
    assert rest.startswith(f"cluster {nodes.identities[0]['cluster_id']} is initialized")
    assert nodes.sent == [1, 2, 3]


@pytest.mark.parametrize("typed", ["n\n", "\n", "yellow\n", ""])
def test_without_a_yes_init_changes_nothing(on_a_terminal, typed):
    nodes = Nodes(EMPTY, EMPTY, EMPTY)
    done = on_a_terminal(nodes, typed=typed)
    assert done.exit_code == 1
    assert done.stderr == "error: not_confirmed: nothing was changed\n"
    assert nodes.sent == []


def test_init_with_y_shows_its_plan_and_does_not_ask(on_a_terminal):
    nodes = Nodes(EMPTY, EMPTY, EMPTY)
    done = on_a_terminal(nodes, "-y")
    assert done.exit_code == 0, done.stderr
    assert "h:3\tjoins" in done.stdout
    assert "[y/N]" not in done.stdout
    assert nodes.sent == [1, 2, 3]


def test_an_init_that_has_nothing_left_to_do_asks_nothing(on_a_terminal):
    nodes = Nodes(EMPTY, EMPTY, EMPTY)
    on_a_terminal(nodes, "-y")
    again = on_a_terminal(nodes)
    assert again.exit_code == 0, again.stderr
    assert again.stdout.endswith("is initialized already: 3 nodes, 4 ranges\n")
    assert again.stdout.count("\n") == 1


def test_an_init_that_was_cut_off_tells_who_is_a_member_already(on_a_terminal):
    cluster_id = bootstrap.mint_cluster_id(1, 2, ADDRESSES, [b"m"])
    begun = {"cluster_id": cluster_id, "node_id": 1, "state": "ready", "empty": False}
    shown = on_a_terminal(Nodes(begun, EMPTY, EMPTY), typed="y\n").stdout
    assert "h:1\tis a member" in shown
    assert "h:2\tjoins" in shown


def test_the_plan_of_many_ranges_is_cut_short(on_a_terminal):
    splits = [word for number in range(100, 200) for word in ("--split", str(number))]
    shown = on_a_terminal(Nodes(EMPTY, EMPTY, EMPTY), *splits, typed="y\n").stdout
    assert "and 84 more ranges" in shown
    assert len(shown.splitlines()) < 40


def test_with_json_the_plan_and_the_question_stay_out_of_standard_output(on_a_terminal):
    nodes = Nodes(EMPTY, EMPTY, EMPTY)
    done = on_a_terminal(nodes, "-o", "json", typed="y\n")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["nodes"] == ADDRESSES
    assert done.stderr.endswith(QUESTION)
    assert "h:3\tjoins" in done.stderr


def test_nodes_that_changed_while_the_question_waited_are_not_touched(monkeypatch):
    nodes = Nodes(EMPTY, EMPTY, EMPTY)
    monkeypatch.setattr(http_client, "request_all", nodes.request_all)

    def approve(plan):
        cluster_id = bootstrap.mint_cluster_id(1, 2, ADDRESSES, [])
        nodes.identities[0] = {"cluster_id": cluster_id, "node_id": 1, "empty": False}

    with pytest.raises(Refused, match="changed while the question waited"):
        initialize(ADDRESSES, [], replicas=3, timeout_s=1.0, approve=approve)
    assert nodes.sent == []


@pytest.mark.parametrize("piped", ["stdin", "stdout", "stderr"])
def test_scripts_and_pipes_are_not_asked(monkeypatch, piped):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.StringIO() if name == piped else Terminal())
    assert output.can_ask(stderr=False) == (piped == "stderr")
    assert not output.can_ask(stderr=True)


def test_without_a_terminal_init_prints_no_plan(monkeypatch):
    nodes = Nodes(EMPTY, EMPTY, EMPTY)
    monkeypatch.setattr(http_client, "request_all", nodes.request_all)
    done = CliRunner().invoke(admin.app, [*INIT, "-o", "json"])
    assert list(json.loads(done.stdout)) == ["cluster_id", "nodes", "ranges", "already"]
    assert done.stderr == ""


def test_a_dry_run_of_init_shows_the_plan_asks_nothing_and_sends_nothing(on_a_terminal):
    nodes = Nodes(EMPTY, EMPTY, EMPTY)
    done = on_a_terminal(nodes, "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert "3 nodes, 4 ranges, 3 copies of each" in done.stdout
    assert "[y/N]" not in done.stdout
    assert nodes.sent == []


def test_a_dry_run_of_init_without_a_terminal_shows_the_plan_as_well(monkeypatch):
    nodes = Nodes(EMPTY, EMPTY, EMPTY)
    monkeypatch.setattr(http_client, "request_all", nodes.request_all)
    assert "h:3\tjoins" in CliRunner().invoke(admin.app, [*INIT, "--dry-run"]).stdout
    done = CliRunner().invoke(admin.app, [*INIT, "--dry-run", "-o", "json"])
    assert json.loads(done.stdout) == {"missing": ADDRESSES, "ranges": 4}
    assert (done.exit_code, done.stderr, nodes.sent) == (0, "", [])


def test_a_dry_run_of_an_init_that_has_nothing_left_to_do_says_so(on_a_terminal):
    nodes = Nodes(EMPTY, EMPTY, EMPTY)
    on_a_terminal(nodes, "-y")
    again = on_a_terminal(nodes, "--dry-run")
    assert again.exit_code == 0, again.stderr
    assert again.stdout.endswith("is initialized already: 3 nodes, 4 ranges\n")
