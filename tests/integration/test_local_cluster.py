"""A cluster of real processes: it serves, survives kill -9 and pauses, restarts on its data, and leaves no orphans."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kvstore
from kvstore.adapters import http_client
from kvstore.errors import KVError, Unavailable
from kvstore.testing.cluster import LocalCluster

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SPLITS = [b"g", b"n"]
FAST = {"KVORUM_RAFT__ELECTION_TIMEOUT": "500ms", "KVORUM_RAFT__HEARTBEAT": "100ms"}


def eventually(claim, timeout_s=20.0):
    """Wait until `claim()` is true; its last error or value is shown if it never is."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            last = claim()
        except (KVError, OSError) as error:
            last = error
        if last and not isinstance(last, Exception):
            return
        assert time.monotonic() < deadline, f"never came true: {last!r}"
        time.sleep(0.05)


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # a zombie of a process that is not our child is gone as well
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def command(module, *words, **options):
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def kvctl(cluster, *words):
    return command("kvstore.cli.admin", "--endpoints", cluster.endpoints, *words)


@pytest.fixture(scope="module")
def cluster():
    """Three nodes that the tests leave running."""
    with LocalCluster(3, splits=SPLITS, settings=FAST) as made:
        yield made


def test_every_range_has_a_leader_and_all_nodes_are_of_one_cluster(cluster):
    assert len(cluster.leaders()) == 5
    assert {cluster.status(number)["cluster"] for number in range(3)} == {cluster.cluster_id}


def test_leaders_come_to_be_spread_over_the_nodes(cluster):
    eventually(lambda: len(set(cluster.leaders().values())) == 3)


async def test_writes_over_several_ranges_are_atomic_and_read_back(cluster):
    async with kvstore.connect(cluster.endpoints, timeout=10.0) as database:
        async with database.batch() as batch:
            for key in (b"apple", b"kiwi", b"pear"):
                batch.put(key, key.upper())
        assert await database.get_many([b"apple", b"kiwi", b"pear"]) == {
            b"apple": b"APPLE",
            b"kiwi": b"KIWI",
            b"pear": b"PEAR",
        }


async def test_concurrent_transfers_across_ranges_keep_the_sum(cluster):
    async with kvstore.connect(cluster.endpoints, timeout=20.0) as database:
        accounts = [b"bank/a", b"j-bank/b", b"z-bank/c"]
        for account in accounts:
            await database.put(account, b"100")

        async def move(source, target):
            async def transfer(tx):
                has, gets = await tx.get(source), await tx.get(target)
                tx.put(source, str(int(has) - 1).encode())
                tx.put(target, str(int(gets) + 1).encode())

            for _ in range(5):
                await database.run(transfer)

        pairs = [(one, two) for one in accounts for two in accounts if one != two]
        await asyncio.gather(*(move(one, two) for one, two in pairs))
        found = await database.get_many(accounts)
        assert [int(found[account]) for account in accounts] == [100, 100, 100]


def test_any_node_answers_http_for_any_key(cluster):
    for number, address in enumerate(cluster.addresses):
        value = b"v%d" % number
        for key in ("apple", "kiwi%2F1", "pear%00"):
            path = f"/v1/kv/{key}"
            assert http_client.request(address, "PUT", path, value, timeout_s=10).status == 200
            other = cluster.addresses[(number + 1) % 3]
            assert http_client.request(other, "GET", path, timeout_s=10).body == value


def test_kvctl_sees_a_healthy_cluster_and_its_data(cluster):
    eventually(lambda: kvctl(cluster, "status").returncode == 0)
    status = json.loads(kvctl(cluster, "-o", "json", "status").stdout)
    assert status["fault_tolerance"] == 1
    assert len(status["nodes"]) == 3
    assert kvctl(cluster, "put", r"k\x00", "1").returncode == 0
    done = kvctl(cluster, "txn", r"incr k\x00 4; get k\x00; put zebra 1")
    assert done.returncode == 0, done.stderr
    assert kvctl(cluster, "get", r"k\x00").stdout == "5\n"
    missing = kvctl(cluster, "get", "nothing-here")
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)


def test_an_export_of_one_cluster_is_read_as_it_was_written(cluster, tmp_path):
    file = tmp_path / "rows.jsonl"
    assert kvctl(cluster, "put", r"export/\xff\x00", r"\xfe").returncode == 0
    done = kvctl(cluster, "export", str(file), "--prefix", "export/")
    assert done.returncode == 0, done.stderr
    assert kvctl(cluster, "delete", r"export/\xff\x00").returncode == 0
    assert kvctl(cluster, "import", str(file)).returncode == 0
    assert kvctl(cluster, "get", r"export/\xff\x00").stdout == "\\xfe\n"


def test_init_again_is_answered_with_the_cluster_that_there_is(cluster):
    before = cluster.cluster_id
    cluster.init()
    assert cluster.cluster_id == before


def test_metrics_and_health_are_served(cluster):
    address = cluster.addresses[0]
    assert http_client.request(address, "GET", "/health/live").status == 200
    text = http_client.request(address, "GET", "/metrics").body.decode()
    assert 'kvorum_node_state{state="ready"} 1.0' in text


def test_a_killed_leader_is_replaced_and_comes_back_with_its_data():
    with (
        LocalCluster(3, splits=SPLITS, settings=FAST) as cluster,
        kvstore.Client(cluster.endpoints, timeout=20.0) as database,
    ):
        for number in range(20):
            database.put(b"key%02d" % number, b"%d" % number)
        victim = cluster.busiest()
        cluster.kill(victim)
        assert not cluster.nodes[victim].running
        with pytest.raises(Unavailable):
            cluster.status(victim)
        for number in range(20, 40):
            database.put(b"key%02d" % number, b"%d" % number)
        assert kvctl(cluster, "status").returncode == 10
        address = cluster.addresses[victim]
        cluster.restart(victim)
        assert cluster.addresses[victim] == address
        assert cluster.status(victim)["node"] == victim + 1
        eventually(lambda: kvctl(cluster, "status").returncode == 0)
        cluster.kill((victim + 1) % 3)  # now the one that came back is needed
        rows = database.scan(prefix=b"key").to_list()
        assert rows == [(b"key%02d" % number, b"%d" % number) for number in range(40)]


def test_everything_acknowledged_survives_kill_9_of_all_nodes_at_once():
    with LocalCluster(3, splits=SPLITS, settings=FAST) as cluster:
        with kvstore.Client(cluster.endpoints, timeout=20.0) as database:
            for number in range(50):
                database.put(b"k%d" % number, b"%d" % number)
        for number in range(3):
            cluster.kill(number)
        for number in range(3):
            cluster.restart(number, ready=False)
        cluster.wait_ready()
        with kvstore.Client(cluster.endpoints, timeout=20.0) as database:
            found = database.get_many([b"k%d" % number for number in range(50)])
        assert len(found) == 50


def test_a_paused_leader_is_replaced_and_follows_when_it_goes_on():
    with (
        LocalCluster(3, settings=FAST) as cluster,
        kvstore.Client(cluster.endpoints, timeout=20.0) as database,
    ):
        database.put(b"a", b"1")
        victim = cluster.busiest()
        cluster.pause(victim)
        assert cluster.nodes[victim].running
        database.put(b"a", b"2")
        cluster.resume(victim)
        eventually(lambda: kvctl(cluster, "status").returncode == 0)
        assert database.get(b"a") == b"2"


def test_while_a_node_is_stopped_its_ranges_are_written_by_others_and_not_handed_back_to_it():
    """With the product's own timeouts: the stopped node's streams look alive for longer than a call may take."""
    with LocalCluster(3, splits=[b"g", b"n"]) as cluster, kvstore.Client(cluster.endpoints) as db:
        for key in (b"a", b"h", b"z"):
            db.put(key, b"1")
        cluster.pause(cluster.busiest())
        for number in range(20):
            for key in (b"a", b"h", b"z"):
                db.put(key, b"%d" % number)  # within the default timeout of a call


def test_sigterm_drains_and_exits_0():
    with LocalCluster(3, settings=FAST) as cluster:
        assert cluster.terminate(0) == 0
        with kvstore.Client(cluster.endpoints, timeout=20.0) as database:
            database.put(b"a", b"1")


def test_one_node_is_a_cluster_and_keeps_its_data(tmp_path):
    with LocalCluster(1, directory=tmp_path) as cluster:
        address = cluster.addresses[0]
        with kvstore.Client(cluster.endpoints, timeout=20.0) as database:
            database.put(b"a", b"1")
    with LocalCluster(1, directory=tmp_path) as cluster:
        assert cluster.addresses == [address]
        with kvstore.Client(cluster.endpoints, timeout=20.0) as database:
            assert database.get(b"a") == b"1"


PARENT = """
import sys, time
from kvstore.testing.cluster import LocalCluster
cluster = LocalCluster(2, directory=sys.argv[1])
cluster.start_processes()
print(*(node.pid for node in cluster.nodes), flush=True)
time.sleep(60)
"""


def test_no_node_outlives_its_parent_even_after_kill_9(tmp_path):
    parent: subprocess.Popen[str] = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    try:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert not any(gone(pid) for pid in pids)
        assert all(os.getsid(pid) == pid for pid in pids)  # a session of its own each
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
    eventually(lambda: all(gone(pid) for pid in pids))


# --- what `kvstore start` says when it cannot


def start(*words):
    return command("kvstore.cli.server", "start", *words)


def test_a_port_in_use_is_one_line_with_what_to_do(cluster, tmp_path):
    done = start("--dir", str(tmp_path / "d"), "--listen", cluster.addresses[0])
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: address_in_use: ")
    assert "--listen" in last


def test_a_data_directory_in_use_is_one_line_with_what_to_do(cluster):
    data = cluster.nodes[0].directory / "data"
    done = start("--dir", str(data), "--listen", "127.0.0.1:0")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: data_directory_error: ")


def test_a_data_directory_of_a_newer_format_is_refused_in_one_line(tmp_path):
    (tmp_path / "node.toml").write_text('format = 99\ncluster_id = "x"\nnode_id = 1\n')
    done = start("--dir", str(tmp_path), "--listen", "127.0.0.1:0")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "newer" in last


def test_an_unknown_key_in_the_environment_is_refused(tmp_path):
    environment = {**os.environ, "KVORUM_RAFT__ELECTION_TIMOUT": "1s"}
    words = ("start", "--dir", str(tmp_path), "--listen", "127.0.0.1:0")
    done = command("kvstore.cli.server", *words, env=environment)
    assert done.returncode == 2
    assert "raft.election_timeout" in done.stderr


def test_the_demonstration_holds():
    done = command("kvstore.cli.server", "demo", "--exit")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held" in done.stdout
    assert "with 6 ranges: 4 of the bank, one for each city, and 2 of the system" in done.stdout
    killed = re.search(
        r"killed node \d \(SIGKILL\), the leader of (\d) of 6 ranges: (.+)", done.stdout
    )
    assert killed is not None
    assert len(killed[2].split(", ")) == int(killed[1])


def test_nodes_that_wait_for_init_say_what_to_do():
    waiting = LocalCluster(1)
    try:
        waiting.start_processes()
        status = kvctl(waiting, "status")
        assert status.returncode == 11
        assert "kvctl init" in status.stdout
        done = kvctl(waiting, "--timeout", "2s", "get", "a")
        assert done.returncode == 1
        assert "kvctl init" in done.stderr
        answer = http_client.request(waiting.addresses[0], "GET", "/v1/kv/a")
        assert answer.status == 503
    finally:
        waiting.stop()


def test_a_wiped_disk_is_not_its_old_self_again():
    """The others remember that it was a member: `kvctl init` does not give it back its old replica ids (pitfall 9)."""
    with LocalCluster(3, splits=SPLITS, settings=FAST) as cluster:
        nodes = ",".join(cluster.addresses)
        words = ("init", "--nodes", nodes, "--split", "g", "--split", "n")
        assert kvctl(cluster, *words).returncode == 0  # all is done already
        cluster.kill(2)
        shutil.rmtree(cluster.nodes[2].directory)
        cluster.restart(2, ready=False)
        refused = kvctl(cluster, *words)
        assert refused.returncode != 0
        assert "node 3 was a member" in refused.stderr
        assert cluster.status(2)["state"] == "waiting"
        with kvstore.Client(",".join(cluster.addresses[:2]), timeout=20.0) as database:
            database.put(b"a", b"1")
