"""Claims (txn/validation.py), in a whole cluster under virtual time: of two transactions that each read what the other writes
one commits, and `run` gets both through; whichever leader dies or falls silent between the question and the entry, the
transaction has one outcome, its keys are free again, and the next attempt commits.

Leaders: n2 of the range of A, n1 of the range of Z.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvstore import Transaction
from kvstore.sim.cluster import Client
from tests.sim.directed import Stage, play
from tests.sim.directed_txn import A, K, Z, begin, what_was_read_stays
from txn.messages import Prepare, Validate

MOST_TRIES = 2  # of one question: the router repeats it where it got no answer
NEVER_S = 15.0  # well within the client's time


async def read_and_write(client: Client, read: bytes, written: bytes) -> None:
    async def fn(tx: Transaction) -> None:
        tx.put(written, b"after " + (await tx.get(read) or b"nothing"))

    await client.database.run(fn)


def latched(stage: Stage) -> int:
    """In all ranges, at their leaders."""
    count = 0
    for server in stage.cluster.running():
        node: Any = server.node
        for replica in node.store.replicas.values():
            if replica.evaluator is not None:
                count += replica.evaluator.latches.held()
    return count


async def committed_once(stage: Stage, client: Client) -> None:
    stage.claim(await stage.get(client, A) == b"after old", "the write is not there")
    await stage.until(lambda: not latched(stage), "nothing is latched any more")
    for key in (A, Z):
        await stage.put(client, key, b"next")
    stage.claim(await stage.get(client, A) == b"next", "the key is not free")


def test_of_two_that_each_read_what_the_other_writes_one_commits():
    assert what_was_read_stays(logged=False) == []


def test_run_gets_both_of_them_through():
    async def scenario(stage: Stage) -> None:
        clients = await begin(stage, "one", "two", "three", "four")
        pairs = [(K, A), (A, K), (Z, A), (A, Z)]
        works = [
            client.process.spawn(read_and_write(client, *pair))
            for client, pair in zip(clients, pairs, strict=True)
        ]
        await asyncio.wait_for(asyncio.gather(*works), NEVER_S)
        await stage.until(lambda: not latched(stage), "nothing is latched any more")

    assert play(scenario) == []


class _Fault:
    """At the first request of a kind that comes to a node: that one dies, or another; or such requests get lost there."""

    def __init__(self, at: str, kind: type, kills: str = "") -> None:
        self.at, self.kind, self.kills = at, kind, kills
        self.happened = False

    def plan(self, stage: Stage) -> None:
        stage.requests[self.at] = lambda request: self._look(stage, request)

    def _look(self, stage: Stage, request: Any) -> bool:
        if not isinstance(request, self.kind):
            return True
        if self.kills and not self.happened:
            stage.crash_soon(self.kills)
        self.happened = True
        return bool(self.kills)


@pytest.mark.parametrize(
    ("at", "kind", "kills"),
    [
        pytest.param("n1", Validate, "", id="the question is lost"),
        pytest.param("n1", Validate, "n1", id="who is asked dies"),
        pytest.param("n1", Validate, "n2", id="who asks dies, and the answer finds nobody"),
        pytest.param("n2", Prepare, "n2", id="who asks dies before it has asked"),
    ],
)
def test_whoever_is_lost_between_the_question_and_the_entry(at, kind, kills):
    fault = _Fault(at, kind, kills)

    async def scenario(stage: Stage) -> None:
        (client,) = await begin(stage, "client")
        fault.plan(stage)
        await asyncio.wait_for(client.process.spawn(read_and_write(client, Z, A)), NEVER_S)
        stage.requests.clear()
        await committed_once(stage, client)

    assert play(scenario) == []
    assert fault.happened


def test_a_transaction_whose_id_was_told_guards_in_the_log_since_it_may_not_take_another():
    async def scenario(stage: Stage) -> None:
        (client,) = await begin(stage, "client")
        stage.requests["n1"] = lambda request: not isinstance(request, Validate)

        async def work() -> None:
            async with client.database.transaction() as tx:
                await tx.get(Z)
                tx.put(A, b"after old")
                assert tx.id

        await asyncio.wait_for(client.process.spawn(work()), NEVER_S)
        await committed_once(stage, client)

    assert play(scenario) == []


def test_after_a_question_in_vain_the_client_does_not_ask_for_a_while():
    questions: list[Validate] = []

    def deaf(request: Any) -> bool:
        if isinstance(request, Validate):
            questions.append(request)
        return not isinstance(request, Validate)

    async def scenario(stage: Stage) -> None:
        (client,) = await begin(stage, "client")
        stage.requests["n1"] = deaf
        for _ in range(3):
            await asyncio.wait_for(client.process.spawn(read_and_write(client, Z, A)), NEVER_S)

    assert play(scenario) == []
    assert 0 < len(questions) <= MOST_TRIES
