"""The recovery table with real processes and SIGKILL: the claims of tests/recovery/test_simulated.py; and `run` with an
idempotency key is exactly once when its client is killed between the commit and the answer.

The client is a process of its own that stops at a phase and says so (tests/recovery/client_child.py); then it is killed, or the
nodes are.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import pytest

import kvstore
from kvstore.testing.cluster import LocalCluster
from kvstore.transactions import Aborted, Committed
from tests.recovery.phases import (
    COMMITTED_FOR_SURE,
    NEW,
    OLD,
    TABLE,
    Crash,
    Phase,
    must_be_aborted,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

ROOT: Final = Path(__file__).resolve().parents[2]
META, LOW, HIGH = 1, 2, 3
FAST: Final = {"KVORUM_RAFT__ELECTION_TIMEOUT": "500ms", "KVORUM_RAFT__HEARTBEAT": "100ms"}
WAIT_S: Final = 30.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(3, splits=[b"m"], settings=FAST) as started:
        yield started


class ClientProcess:
    def __init__(self, cluster: LocalCluster, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.recovery.client_child", cluster.endpoints, *words],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def line(self) -> list[str]:
        return self._pipe(self.process.stdout).readline().split()

    def go_on(self) -> None:
        pipe = self._pipe(self.process.stdin)
        pipe.write("\n")
        pipe.flush()

    def kill(self) -> None:
        self.process.kill()

    def end(self) -> int:
        for pipe in (self.process.stdin, self.process.stdout):
            self._pipe(pipe).close()
        return self.process.wait(WAIT_S)

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def victims(cluster: LocalCluster, crash: Crash) -> list[int]:
    leaders = cluster.leaders()
    return {
        Crash.ANCHOR: [leaders[LOW]],
        Crash.PARTICIPANT: [leaders[HIGH]],
        Crash.ORACLE: [leaders[META]],
        Crash.CLUSTER: [0, 1, 2],
    }[crash]


def undecided(cluster: LocalCluster) -> int:
    return sum(
        sum(cluster.status(number)["transactions"].values()) for number in range(len(cluster.nodes))
    )


def wait_decided(cluster: LocalCluster) -> None:
    deadline = time.monotonic() + WAIT_S
    while left := undecided(cluster):
        assert time.monotonic() < deadline, f"{left} rows stay undecided"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("crash", "phase"), TABLE, ids=[f"{crash.name}-{phase.name}".lower() for crash, phase in TABLE]
)
def test_recovery(cluster: LocalCluster, crash: Crash, phase: Phase) -> None:
    name = f"{crash.name}-{phase.name}"
    anchor, participant = f"a/{name}".encode(), f"z/{name}".encode()
    cluster.wait_leaders()
    with kvstore.Client(cluster.endpoints, timeout=WAIT_S) as db:
        db.put(anchor, OLD)
        db.put(participant, OLD)
        client = ClientProcess(cluster, "hold", phase.name, anchor.decode(), participant.decode())
        reached, token = client.line()
        assert reached == "reached"
        told: list[str] = []
        if crash is Crash.CLIENT:
            client.kill()
        else:
            down = victims(cluster, crash)
            for number in down:
                cluster.kill(number)
            for number in down:
                cluster.restart(number, ready=False)
            client.go_on()
            told = client.line()
        client.end()
        cluster.wait_ready()
        wait_decided(cluster)
        outcome = db.outcome(token)
        assert db.outcome(token) == outcome
        value = NEW if isinstance(outcome, Committed) else OLD
        assert db.get_many([anchor, participant]) == {anchor: value, participant: value}
        if phase in COMMITTED_FOR_SURE:
            assert isinstance(outcome, Committed)
        if must_be_aborted(crash, phase):
            assert outcome == Aborted()
        if told and told[0] == "committed":
            assert outcome == Committed(int(told[1]))
        elif told and told[2] == "False":
            assert outcome == Aborted()


def test_a_run_is_exactly_once_when_its_client_is_killed_before_the_answer(
    cluster: LocalCluster,
) -> None:
    cluster.wait_leaders()
    for number in range(1, 4):
        key, words = f"order-{number}", ("tally",)
        killed = ClientProcess(cluster, "run", "before-reply", key, *words)
        assert killed.line() == []
        assert killed.end() < 0
        for _ in range(2):  # a client that was started again, and again
            again = ClientProcess(cluster, "run", "none", key, *words)
            assert again.line() == ["ticket", str(number)]
            assert again.end() == 0
    with kvstore.Client(cluster.endpoints) as db:
        assert db.get(b"tally") == b"3"
    wait_decided(cluster)


def test_the_status_tells_what_is_undecided(cluster: LocalCluster) -> None:
    found = cluster.status(0)["transactions"]
    names = {"prepared", "staged", "outbox", "locks_held", "lock_waiters"}
    assert set(found) == names, json.dumps(found)
