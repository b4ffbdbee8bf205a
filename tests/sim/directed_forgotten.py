"""Scenarios of what is forgotten: EXPIRED of a part says nothing of what became of it, and who asks too late is told so.

In both, a transaction writes at n2 (its anchor), n3 and n1, and its client is told that it has committed. n3 never hears of
it, so a reader there asks n2, which asks n1; that question arrives when n1 has forgotten its part.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from msgspec import structs

from kvstore.config import NodeConfig, RaftSection, TxnSection
from kvstore.errors import OutcomeExpired
from kvstore.holds import LEASE_S
from kvstore.sim.cluster import Client
from kvstore.transactions import decode_token
from replication.probes import counting
from tests.sim.directed import HIGH, LOW, NotReached, Stage, play
from tests.sim.directed_leaders import from_others
from tests.sim.directed_txn import A, K, Z, begin, patient
from txn.messages import Finalize, QueryPart, Resolve
from txn.state import ABSENT
from txn.types import begin_ts_of

RETENTION_S: Final = 0.5
ELECTION_S: Final = 3.0  # for so long a leader that hears nothing believes in itself
BETWEEN_S: Final = 0.1
LATE_S: Final = 3.0  # until the record is forgotten, too


def forgetful(*, election_timeout_s: float = 1.0) -> NodeConfig:
    """What is older than half a second goes; the anchor's timer is quick, and no participant ever asks by itself."""
    config = patient()
    txn: TxnSection = structs.replace(config.txn, retention_s=RETENTION_S)
    raft: RaftSection = structs.replace(config.raft, election_timeout_s=election_timeout_s)
    return structs.replace(config, txn=txn, raft=raft)


class Asked(NamedTuple):
    """n2 has the transaction staged, and its question to n1 is held back until `let_go`."""

    token: str
    read: asyncio.Task[bytes | None]  # at n3, of what the transaction has written there
    let_go: Callable[[], None]

    @property
    def txn_id(self) -> bytes:
        return decode_token(self.token)[0]


def replica_of(stage: Stage, name: str, group: int) -> Any:
    store: Any = stage.server(name).node.store  # type: ignore[union-attr]
    return store.replicas[group]


def held_back(stage: Stage, name: str, kind: type, held: list[Any]) -> Callable[[], None]:
    """Requests of this kind arrive at that node only when what is returned is called; `held` gets them."""
    store: Any = stage.server(name).node.store  # type: ignore[union-attr]
    accept = store.accept

    def asked(asker: Any, requests: Sequence[Any], size_bytes: int = 0) -> None:
        held.extend((asker, each) for each in requests if isinstance(each, kind))
        arrived = [each for each in requests if not isinstance(each, kind)]
        if arrived:
            accept(asker, arrived, size_bytes)

    def let_go() -> None:
        store.accept = accept
        for asker, request in held:
            stage.within(name, partial(accept, asker, [request]))

    store.accept = asked
    return let_go


async def written(stage: Stage, client: Client, *keys: bytes) -> None:
    """Something is always written there, so that time passes and there is something to collect."""
    while True:
        for key in keys:
            await stage.put(client, key + b"/often", b"")
        await asyncio.sleep(BETWEEN_S)


async def asked_about(stage: Stage, *often: bytes) -> Asked:
    client, reader, writer = await begin(stage, "client", "reader", "writer")
    writing = writer.process.spawn(written(stage, writer, *often))
    await asyncio.sleep(LEASE_S + 1.0)  # now the oracle knows what is held
    if writing.done():
        raise NotReached("something is always written")
    stage.requests["n1"] = lambda request: not isinstance(request, Resolve) or request.record
    stage.requests["n2"] = lambda request: not isinstance(request, Finalize)
    stage.requests["n3"] = lambda request: not isinstance(request, Resolve)
    held: list[Any] = []
    let_go = held_back(stage, "n1", QueryPart, held)

    async def commits() -> str:
        async with client.database.transaction() as tx:
            for key in (A, K, Z):
                tx.put(key, b"new")
        return tx.id

    token = await client.process.call(commits())
    read = reader.process.spawn(reader.database.get(K))
    await stage.until(lambda: bool(held), "the anchor asks about the part at n1", 0.2)
    return Asked(token, read, let_go)


async def until_forgotten(stage: Stage, asked: Asked) -> None:
    """n1 had the part, was told that it is committed, and has forgotten it."""
    replica, txn_id = replica_of(stage, "n1", HIGH), asked.txn_id

    def is_forgotten() -> bool:
        if begin_ts_of(txn_id) > replica.state.row.outcome_horizon:
            return False
        return replica.state.answer_of(replica.evaluator.rows, txn_id, Z) is ABSENT

    await stage.until(is_forgotten, "the part is forgotten")


def a_forgotten_part_is_not_absent() -> list[str]:
    """The transaction has been decided meanwhile. Later its record is forgotten, and somebody asks what became of it."""

    async def scenario(stage: Stage) -> None:
        with counting() as counts:
            asked = await asked_about(stage, A, Z)
            await until_forgotten(stage, asked)
            asked.let_go()
            found = await stage.outcome(asked.read, "a reader of what is undecided")
            stage.claim(found == b"new", f"a commit was acknowledged, and reads {found!r}")
            if "participant_forgot" not in counts:
                raise NotReached("a part was forgotten, and its record is known")
            stage.requests.clear()
            late = await stage.client("late")
            await stage.put(late, A, b"newer")  # else it stands there who wrote it
            await asyncio.sleep(LATE_S)
            asks = late.process.call(late.database.outcome(asked.token))
            told = await stage.outcome(asks, "what became of it")
            stage.claim(isinstance(told, OutcomeExpired), f"nobody knows, and {told!r} is told")
            if "outcome_expired" not in counts:
                raise NotReached("the record was forgotten")

    return play(scenario, config=forgetful())


def a_forgotten_part_is_no_promise_of_a_former_leader() -> list[str]:
    """n2 hands the anchor's range to n1, and hears nothing of it any more: for n2 the transaction is staged, though n1 has
    decided it.
    """

    async def scenario(stage: Stage) -> None:
        with counting() as counts:
            asked = await asked_about(stage, Z)
            host, one = stage.host("n2"), stage.raft("n1", LOW)
            await stage.level(LOW)
            stage.looks["n2"] = from_others(LOW)
            stage.within("n2", lambda: host.transfer_leadership(LOW, one.replica))
            await stage.until(lambda: one.applied_index >= one.term_start_index > 0, "n1 leads")
            await until_forgotten(stage, asked)
            two = replica_of(stage, "n2", LOW)
            if not stage.raft("n2", LOW).is_leader or asked.txn_id not in two.state.staged:
                raise NotReached("n2 believes that it leads, and that nothing is decided")
            asked.let_go()
            found = await stage.outcome(asked.read, "a reader of what is undecided")
            stage.claim(found == b"new", f"a commit was acknowledged, and reads {found!r}")
            unconfirmed = "n2 had an answer, and could not confirm that it leads"
            await stage.until(lambda: "read_index_failed" in counts, unconfirmed, ELECTION_S)

    return play(scenario, config=forgetful(election_timeout_s=ELECTION_S))
