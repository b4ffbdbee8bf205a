"""Locking reads in the simulated cluster: what a client does, and what is checked of the leaders' tables.

A client locks some of what it writes, and a little else, in any order, so that deadlocks come; it may sit on its locks for
longer than their lease. Its reads under locks are guards with timestamps of their own, and the replay judges them.
Checked besides the history: the table after each turn (L1 to L3, I21), that nobody is told of a lock which another was told
of and has (told apart from the table), that nothing is undecided there when it is told (X1), that a lock goes with its owner's
Prepare (X3), and that a deadlock does not last.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.stateful.txn_history import Attempt, SpanRead
from tests.stateful.txn_ranges import Violation
from txn import stamps
from txn.deadlocks import CYCLE_S
from txn.evaluate import Evaluator
from txn.latches import Pending
from txn.messages import (
    Failure,
    KeepLocks,
    LockPending,
    LockRead,
    Prepare,
    ReadReply,
    Reply,
    Request,
    Unlock,
)
from txn.types import Write, WriteKind, make_txn_id, point_end

if TYPE_CHECKING:
    from tests.stateful.txn_clients import Client
    from tests.stateful.txn_harness import World
    from tests.stateful.txn_ranges import Group
    from txn.state import Part

PATIENCE_S = 1.5
LOOK_S = 0.05
SLACK_S = 0.1  # for messages that are under way


class Call(NamedTuple):
    key: bytes
    request: Request
    tries: int


class Wait(NamedTuple):
    """For all answers, or for the first that decides. Without calls: for a while, or for the oracle's last timestamp."""

    calls: list[Call]
    first_decides: bool = False
    pause_s: float = 0.0


def locking(client: Client, attempt: Attempt, age: int) -> Generator[Wait, Any, bool]:
    """Take locks. False: the attempt is given up, its locks are given back."""
    world, rng = client.world, client.world.lock_rng
    written = [
        _locked_for(world, write)
        for write in attempt.writes
        if write.kind != WriteKind.DELETE_RANGE
    ]
    others = [key for keys in world.keys_of.values() for key in keys]
    keys = list(dict.fromkeys([*written, *rng.sample(others, rng.randint(0, 2))]))
    rng.shuffle(keys)
    if not keys:
        return True
    attempt.lock_owner = make_txn_id(world.oracle_last, rng.getrandbits(64))
    for key in keys[: rng.randint(1, 3)]:
        shared = rng.random() < 0.3
        fresh = rng.random() < 0.2
        until = world.now + PATIENCE_S
        while True:
            wait_s = rng.choice([0.0, 0.05, 0.2, 0.2])
            request = LockRead(0, 0, 0, key, attempt.lock_owner, age, shared, wait_s, fresh)
            (reply,) = yield Wait([Call(key, request, 6)])
            if isinstance(reply, LockPending) and world.now < until:
                if not wait_s:
                    yield Wait([], pause_s=0.01)
                continue
            break
        if not isinstance(reply, ReadReply):
            if isinstance(reply, Failure):
                world.probe(f"a locker gave up: {reply.code}")
            yield from unlocking(client, attempt, [key])
            return False
        version = reply.versions[0]
        rows = {key: (version, reply.values[0])} if version else {}
        attempt.locked.append((SpanRead(key, point_end(key), rows), reply.at))
    if rng.random() < 0.1:
        yield Wait([], pause_s=rng.choice([0.01, 0.5]))
    if rng.random() < 0.1:
        yield Wait([Call(key, KeepLocks(0, 0, 0, key, [attempt.lock_owner]), 2)])
    return True


def _locked_for(world: World, write: Write) -> bytes:
    """A key to lock for a write. For a stamped one: a key that it, or another's that is under way, may become."""
    if write.kind != WriteKind.STAMPED_KEY:
        return write.key
    rng, parts = world.lock_rng, [part for group in world.groups for part in _stamping(group)]
    if parts and rng.random() < 0.7:
        part = rng.choice(parts)
        each = rng.choice([each for each in part.row.stamps if each.in_key])
        return each.key + stamps.stamp(part.row.min_ts + rng.choice([0, 0, 1]), each.number)
    number = int.from_bytes(write.value[: stamps.NUMBER_BYTES], "big")
    return write.key + stamps.stamp(world.oracle_last + rng.randint(0, 4), number)


def _stamping(group: Group) -> list[Part]:
    """Parts that will put a key with a version that is not known yet."""
    leader = group.leader
    if leader is None or leader.evaluator is None:
        return []
    return list(leader.evaluator.state.stamped)


def unlocking(
    client: Client, attempt: Attempt, more: Sequence[bytes] = ()
) -> Generator[Wait, Any, None]:
    """It has ended without a commit: most clients say so."""
    if client.world.lock_rng.random() < 0.8:
        keys = dict.fromkeys([*(span.start for span, _ in attempt.locked), *more])
        yield Wait([Call(key, Unlock(0, 0, 0, key, attempt.lock_owner), 2) for key in keys])


class LockChecks:
    def __init__(self, world: World) -> None:
        self.world = world
        self._told: dict[tuple[Evaluator, bytes], dict[bytes, tuple[bool, float]]] = {}
        self._since: dict[tuple[int, int, bytes], tuple[bytes, float]] = {}  # edges of waiting

    # -- who was told that it holds what

    def asked(self, evaluator: Evaluator, request: Request) -> None:
        if isinstance(request, Unlock) and not request.waits_only:
            self._ended(evaluator, request.owner)

    def applied(self, evaluator: Evaluator, pendings: Sequence[Pending]) -> None:
        for pending in pendings:
            request = pending.request
            if isinstance(request, Prepare) and request.lock_owner:
                self._ended(evaluator, request.lock_owner)
                if request.lock_owner in evaluator.locking.table.owners:
                    raise Violation(
                        "X3: a lock stays, though its owner has committed or is refused"
                    )

    def _ended(self, evaluator: Evaluator, owner: bytes) -> None:
        for (where, _), holders in self._told.items():
            if where is evaluator:
                holders.pop(owner, None)

    def answered(self, evaluator: Evaluator, request: Request, reply: Reply) -> None:
        if isinstance(request, Unlock) and not request.waits_only:
            self._ended(evaluator, request.owner)  # a read that was held back may have come between
        if not isinstance(request, LockRead) or not isinstance(reply, ReadReply) or request.fresh:
            return  # a fresh one is answered after it was granted: the lock may be over by then
        self._nothing_undecided(evaluator, request.key)
        now, lease_s = self.world.now, self.world.profile.limits.lock_lease_s
        holders = self._told.setdefault((evaluator, request.key), {})
        for owner, (exclusive, at) in holders.items():
            if owner != request.owner and now < at + lease_s:
                if exclusive or not request.shared:
                    raise Violation(f"I21: {request.key!r} is locked by two at a time")
        before = holders.get(request.owner, (False, 0.0))[0]
        holders[request.owner] = (before or not request.shared, now)

    def _nothing_undecided(self, evaluator: Evaluator, key: bytes) -> None:
        """X1, on the spot: a read that misses what commits later would show only if the stamp was guessed to the number."""
        state = evaluator.state
        if key in state.intents:
            raise Violation(f"X1: {key!r} is locked, and what was prepared there is undecided")
        if any(True for _ in state.stamped_in(key, point_end(key))):
            raise Violation(f"X1: {key!r} is locked, and an undecided stamped key may become it")

    # -- deadlocks

    def watch(self) -> None:
        if self.world.profile.calm and self.world.profile.p_lock and not self.world.quiet:
            self.world.after(LOOK_S, self._look)

    def _look(self) -> None:
        """I21: of the waits that are older than the bound (but for Prepares), none are in a cycle. By a search of its own."""
        seen: dict[tuple[int, int, bytes], tuple[bytes, float]] = {}  # edge -> waiter, since
        now = self.world.now
        for group in self.world.groups:
            leader = group.leader
            if leader is None or leader.evaluator is None:
                continue
            table = leader.evaluator.locking.table
            for number, wait in table.waiting.items():
                for blocker in table.blockers_of(wait):
                    if not wait.committing:
                        edge = (group.number, number, blocker.id)
                        since = self._since[edge][1] if edge in self._since else now
                        seen[edge] = (wait.owner.id, since)
        self._since = seen
        if _cyclic(seen):
            self.world.probe("a deadlock was there")
        bound_s = CYCLE_S + SLACK_S
        old = {edge: entry for edge, entry in seen.items() if now > entry[1] + bound_s}
        if stuck := _cyclic(old):
            raise Violation(f"I21: a deadlock has lasted for over {bound_s} s: {stuck}")
        self.watch()


def _cyclic(edges: dict[tuple[int, int, bytes], tuple[bytes, float]]) -> list[bytes]:
    """Who is left when those have gone who wait for nobody that waits: cycles, and what leads to them."""
    waits: dict[bytes, list[bytes]] = {}
    for (_, _, blocker), (waiter, _) in edges.items():
        waits.setdefault(waiter, []).append(blocker)
    while gone := [each for each, to in waits.items() if not any(one in waits for one in to)]:
        for each in gone:
            del waits[each]
    return sorted(waits)
