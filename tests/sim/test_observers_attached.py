"""Claims: the observers are attached where things happen. A mistake in the product is seen as the invariant that it breaks.

Each mistake is the rule left out, in a run of a few seconds. Some break more than the one invariant that is looked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final
from unittest.mock import patch

import msgspec
import pytest

import kvstore.replica
import replication.leading
import txn.apply
from kvstore.replica import ReplicaOutput
from kvstore.sim import loop as simulated
from kvstore.sim.cluster import SimCluster
from kvstore.sim.observers import Observers
from kvstore.sim.scenario import Options, run
from replication.durability import Gate
from replication.types import Entry, EntryKind
from tests.sim.directed_leaders import a_stopped_leader_reads_nothing_old
from tests.sim.plants import planted
from txn import keycode
from txn.apply import Overlay
from txn.commands import Batch, Decide, OutboxDone, encode_batch
from txn.evaluate import Evaluator
from txn.latches import Pending
from txn.messages import ReadReply, TxnReply
from txn.oracle import Oracle
from txn.reads import Reader
from txn.recovery import Recovery
from txn.state import RangeState
from txn.types import TxnStatus

CALM: Final = Options(seconds=1.0, clients=3, ops=8, faults=False)
NOTHING: Final = encode_batch(Batch(0, 1, []))
CRASHES: Final = Options(
    seconds=1.5, clients=2, ops=6, kinds=("crash", "flush"), mean_s=0.3, hold_s=0.2
)

Patch = tuple[Any, str, Any]


def _told(problems: list[str]) -> list[str]:
    """Names of the invariants that were reported, each once."""
    found = [text.partition(": ")[2].partition(" is broken") for text in problems]
    return list(dict.fromkeys(name for name, broken, _ in found if broken))


def _acknowledged_too_early() -> Patch:
    """Votes and acknowledgements do not wait for the disk."""
    return Gate, "admit", lambda _self, _group, outgoing: outgoing.message


def _committed_by_one() -> Patch:
    """The leader's own disk is enough."""
    return replication.leading, "agreed_value", lambda incoming, _outgoing: max(incoming)


def _timestamp_invented() -> Patch:
    command = Evaluator._command
    return Evaluator, "_command", lambda self, pending, ts: command(self, pending, ts + (1 << 40))


def _bound_not_kept() -> Patch:
    issue = Oracle.issue

    def beyond(self: Oracle, count: int, wall_ms: int, now: float) -> int:
        hi, self.hi = self.hi, self.hi + (1 << 60)
        if self._serving:
            self.last = max(self.last, hi)
        first = issue(self, count, wall_ms, now)
        self.hi = hi
        return first

    return Oracle, "issue", beyond


def _nothing_posted() -> Patch:
    return txn.apply, "_post", lambda _state, _overlay, _row: None


def _outbox_dropped() -> Patch:
    """The row goes at once, not when the Resolve is acknowledged."""

    def post(self: Recovery, txn_id: bytes, participants: Any) -> None:
        for participant in participants:
            row = self.ev.state.outbox.get((txn_id, participant.locus))
            if row is not None:
                pending = Pending(b"", None, None)
                pending.command = OutboxDone([(txn_id, row.anchor_key, participant.locus)])
                self.ev.propose(pending)

    return Recovery, "_post", post


def _outbox_kept() -> Patch:
    return Recovery, "_send_outbox", lambda _self, _key, _row: None


def _record_at_another_timestamp() -> Patch:
    """The record says another timestamp than the largest min_ts."""
    decide = txn.apply._APPLY[Decide]

    def less(state: RangeState, overlay: Any, command: Any) -> Any:
        if command.commit_ts:
            command = msgspec.structs.replace(command, commit_ts=command.commit_ts + 1)
        return decide(state, overlay, command)

    return txn.apply, "_APPLY", {**txn.apply._APPLY, Decide: less}


def _forgetful_memory() -> Patch:
    remove = RangeState.remove_part

    def forget(self: RangeState, part: Any) -> None:
        remove(self, part)
        self.parts.setdefault(part.txn_id, {})[part.locus] = part

    return RangeState, "remove_part", forget


def _apply_depends_on_the_node() -> Patch:
    """Each replica writes a number of its own."""
    apply_batch = txn.apply.apply_batch
    numbers: list[RangeState] = []

    def uneven(state: RangeState, overlay: Any, batch: Any) -> Any:
        answers = apply_batch(state, overlay, batch)
        if state not in numbers:
            numbers.append(state)
        key = keycode.history_row(state.row.start + b"~", 1)
        overlay.put(key, b"%d" % numbers.index(state))
        return answers

    return kvstore.replica, "apply_batch", uneven


def _read_too_old() -> Patch:
    look_up = Reader._look_up

    def older(self: Reader, waiter: Any, request: Any) -> Any:
        reply = look_up(self, waiter, request)
        if type(reply) is ReadReply and reply.versions and reply.versions[0]:
            versions, values = [0, *reply.versions[1:]], [None, *reply.values[1:]]
            return ReadReply(reply.id, reply.at, versions, values)
        return reply

    return Reader, "_look_up", older


def _outcome_invented() -> Patch:
    reply = ReplicaOutput.reply

    def other(self: ReplicaOutput, origin: Any, answer: Any, confirm: bool) -> None:
        if type(answer) is TxnReply and answer.status == TxnStatus.COMMITTED:
            answer = TxnReply(answer.id, answer.status, answer.ts + 1)
        reply(self, origin, answer, confirm)

    return ReplicaOutput, "reply", other


QUICK: Final[list[tuple[str, Callable[[], Patch]]]] = [
    ("durable log", _acknowledged_too_early),
    ("quorum", _committed_by_one),
    ("I4", _record_at_another_timestamp),
    ("I9", _bound_not_kept),
    ("I17", _apply_depends_on_the_node),
    ("I19", _nothing_posted),
]
SLOW: Final[list[tuple[str, Callable[[], Patch]]]] = [
    ("I6", _outcome_invented),
    ("I7", _timestamp_invented),
    ("I8", _timestamp_invented),
    ("I11", _read_too_old),
    ("I17", _forgetful_memory),
    ("I19", _outbox_dropped),
    ("I22", _outbox_kept),
]


def _seen(invariant: str, seeds: int) -> list[str]:
    found: list[str] = []
    for seed in range(1, seeds + 1):
        found += _told(run(seed, CALM).problems)
        if invariant in found:
            break
    return found


@pytest.mark.parametrize(("invariant", "mistake"), QUICK)
def test_a_mistake_is_seen(invariant: str, mistake: Callable[[], Patch]) -> None:
    with patch.object(*mistake()):
        assert invariant in _seen(invariant, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("invariant", "mistake"), SLOW)
def test_a_rarer_mistake_is_seen(invariant: str, mistake: Callable[[], Patch]) -> None:
    with patch.object(*mistake()):
        assert invariant in _seen(invariant, 5)


def test_without_a_mistake_nothing_is_told() -> None:
    assert run(1, CALM).problems == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("invariant", "plant"),
    [
        ("durable vote", "vote is forgotten"),
        ("durable log", "fsync does nothing"),
        ("I17", "applied index leads its rows"),
        ("I9", "oracle serves at once"),
    ],
)
def test_a_planted_bug_is_told_by_its_name(invariant: str, plant: str) -> None:
    with planted(plant):
        assert any(invariant in _told(run(seed, CRASHES).problems) for seed in range(1, 31))


@pytest.mark.parametrize(
    ("plant", "told"), [("oracle not confirmed", ["I9"]), ("lease too long", ["lease", "I9"])]
)
def test_i9_a_deposed_oracle_that_answers_is_seen(plant: str, told: list[str]) -> None:
    with planted(plant):
        problems = a_stopped_leader_reads_nothing_old(1)
    assert _told([each for each in problems if "is broken" in each]) == told


def test_everything_that_has_to_be_watched_is() -> None:
    """Were a hook lost, nothing would be told; so look at what the observers got to know."""

    async def main(_loop: simulated.SimLoop) -> None:
        cluster = SimCluster("1")
        observers = Observers(cluster)
        with observers.watching_outcomes():
            await cluster.start()
            client = await cluster.client("c", 20.0)

            async def use() -> None:
                database = client.database
                await database.put(b"a", b"1")
                async with database.transaction() as tx:
                    tx.put(b"b", b"2")
                    tx.put(b"z", await tx.get(b"a", b""))
                await database.scan(prefix=b"").to_list()

            await client.process.call(use())
            observers.look()
        assert cluster.problems == []
        ghost, consensus, contents = observers.transactions, observers.consensus, observers.contents
        assert list(ghost.keys) == [b"a", b"b", b"z"]
        assert len(ghost.record) == 1
        assert len(ghost.min_ts) == 2
        assert len(ghost.implied) == 1
        assert len(ghost._begun) == 2
        assert len(ghost._asked) == 3
        assert ghost.served._keys == {b"a": ghost.served._keys[b"a"]}
        assert ghost.served._spans
        assert set(observers.answers.outcomes) == set(ghost.commit_ts)
        assert observers.oracle._issued
        assert observers.oracle.handed_out
        assert set(contents._ranges) == {1, 2, 3, 4, 5}
        assert len(contents._tiled) == 15
        replicas = consensus._replicas
        assert len(replicas) == 15
        assert all(seen.told_term for seen in replicas.values())
        assert all(seen.durable.terms == seen.written.terms for seen in replicas.values())
        assert all(group.leaders and group.votes for group in consensus._groups.values())

    simulated.run(main, 1, time_limit_s=100.0)


def test_a_node_that_has_failed_is_not_compared_with_its_rows() -> None:
    """Its engine refused a write, and its process stands still before it can end: found by a seed with full disks."""

    async def main(_loop: simulated.SimLoop) -> list[list[str]]:
        cluster = SimCluster("1")
        observers = Observers(cluster)
        with observers.watching_outcomes():
            await cluster.start()
            node = cluster.servers["n2"].node
            assert node is not None
            assert node.host is not None
            assert node.store is not None
            node.store.replicas[1].state.oracle_hi += 1
            node.host.failure = RuntimeError("the engine refused a write")
            observers.look()
            silent = list(cluster.problems)
            node.host.failure = None
            observers.look()
        return [silent, cluster.problems]

    silent, told = simulated.run(main, 1, time_limit_s=100.0)
    assert silent == []
    assert _told(told) == ["I17"]


def test_entries_before_one_that_fails_count_as_applied() -> None:
    """Seed 4825: a write batch was cut behind them, so they were in the engine, and a later look took their rows for wrong."""

    async def main(_loop: simulated.SimLoop) -> None:
        cluster = SimCluster("1")
        observers = Observers(cluster)
        with observers.watching_outcomes():
            await cluster.start()
            node = cluster.servers["n1"].node
            assert node is not None
            assert node.store is not None
            replica = node.store.replicas[2]
            row, apply = replica.state.row, replica.apply
            first = row.applied_index + 1

            def failing(entry: Entry, overlay: Overlay) -> None:
                if entry.index > first:
                    raise OSError("the disk does not answer")
                apply(entry, overlay)

            term, kind = row.applied_term, EntryKind.COMMAND
            entries = [Entry(first + each, term, kind, NOTHING) for each in range(2)]
            with patch.object(replica, "apply", failing), pytest.raises(OSError, match="disk"):
                node.store.apply(2, entries)
            assert observers.contents._ranges[2].index == row.applied_index == first

    simulated.run(main, 1, time_limit_s=100.0)
