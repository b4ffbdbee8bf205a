"""A seeded random scheduler over the real transaction core: evaluators, state and apply of three ranges, no asyncio, no Raft.

Messages are delayed, reordered, doubled and lost; leaders change with a random prefix of what is in flight; deposed leaders
go on for a while; the oracle answers late; clients crash at any step. Time is virtual. One seed is one run.

    python -m tests.stateful.txn_harness --seeds 3000 --start 0            must print violations=0
    python -m tests.stateful.txn_harness --seeds 300 --plant volatile_fence   must find violations
    python -m tests.stateful.txn_harness --seed 17 --trace                 prints what happens
"""

from __future__ import annotations

import argparse
import heapq
import random
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, Final
from unittest.mock import patch

import msgspec

from replication.probes import choosing, counting
from tests.stateful.txn_checks import Checker
from tests.stateful.txn_clients import Client
from tests.stateful.txn_history import History
from tests.stateful.txn_lockers import LockChecks
from tests.stateful.txn_plants import PLANTS, planted
from tests.stateful.txn_ranges import Group, Origin, Replica, Violation
from tests.stateful.txn_watchers import Watcher
from txn import decided
from txn.evaluate import Evaluator, Limits
from txn.messages import Failure, Fence, Outcome, QueryMode, QueryTxn, Read, Reply, Request, Scan

QUIET_AT_S: Final = 4.0
END_AT_S: Final = 24.0
EVENTS_MAX: Final = 150_000
CALL_TIMEOUT_S: Final = 0.3
BOUNDS: Final = (b"", b"b", b"c", b"")
NAMED: Final = re.compile(r"[A-Z]+\d+: ")  # as the product's assertions name what they hold
RARE_WAYS: Final = ("guards_not_from_recent", "guards_walked_slowly")
KEYS: Final = {  # the last of each is a counter
    1: [b"a", b"a\x00", b"a1", b"a2", b"a2\xff", b"an"],
    2: [b"b", b"b\x00\x01", b"b\x00\xff", b"b1", b"b3", b"bn"],
    3: [b"c", b"c1", b"c1\x00", b"c10", b"c2", b"cn"],
}


class Profile(msgspec.Struct):
    """How hostile one seed's world is."""

    limits: Limits
    clients: int
    spread_s: float  # within which they begin
    p_drop: float
    p_double: float
    p_refused: float  # by Raft
    p_crash: float  # of a client, at each step
    p_local: float  # a range asks another one on the same node: never lost, never timed out
    leader_gap_s: float  # 0: leaders stay
    deposed_s: float
    raft_s: float
    oracle_s: float
    p_slow: float
    meddle_gap_s: float
    watchers: int
    recent_rows: int
    search_rows: int  # in one slice
    backlog_rows: int
    p_lock: float = 0.0  # of an attempt that takes locks

    @property
    def calm(self) -> bool:
        """Nothing delays a message between leaders, or takes one away."""
        return not (self.p_drop or self.p_slow or self.p_refused or self.leader_gap_s)


def draw_profile(rng: random.Random) -> Profile:
    patient, hasty = Limits(), Limits(0.02, 0.05, 0.1, 2.0, 0.005, 0.05)
    limits = msgspec.structs.replace(
        rng.choice([patient, patient, hasty]),
        retention=rng.choice(
            [0, 0, 5, 30, 100]
        ),  # timestamps of this world are numbers from 100 on
        sweep_s=0.05,
    )
    return Profile(
        limits=limits,
        clients=rng.randint(10, 40),
        spread_s=rng.choice([0.1, 0.5, 2.0]),
        p_drop=rng.choice([0.0, 0.03, 0.15]),
        p_double=rng.choice([0.0, 0.1, 0.3]),
        p_refused=rng.choice([0.0, 0.0, 0.1]),
        p_crash=rng.choice([0.0, 0.02, 0.1]),
        p_local=rng.choice([0.0, 0.5]),
        leader_gap_s=rng.choice([0.0, 0.5, 0.1, 0.03]),
        deposed_s=rng.choice([0.02, 0.3]),
        raft_s=rng.choice([0.002, 0.02]),
        oracle_s=rng.choice([0.002, 0.02]),
        p_slow=rng.choice([0.0, 0.02, 0.1]),
        meddle_gap_s=rng.choice([0.1, 0.01]),
        watchers=rng.choice([0, 2, 5]),
        recent_rows=rng.choice([2, 10, 4096]),
        search_rows=rng.choice([1, 3, 512]),
        backlog_rows=rng.choice([6, 6, 512]),  # above what one transaction writes into a range
    )


class World:
    def __init__(
        self, seed: int, switches: frozenset[str] = frozenset(), trace: bool = False
    ) -> None:
        self.rng = random.Random(seed)
        self.profile = draw_profile(self.rng)
        # Of locks alone: a seed without them is the same run as before there were any.
        self.lock_rng = random.Random(f"locks/{seed}")
        self.fast_rng = random.Random(
            f"fast/{seed}"
        )  # of its own, as that is: so other draws stay what they were
        self.profile.p_lock = self.lock_rng.choice([0.0, 0.3, 0.9])
        self.profile.limits = msgspec.structs.replace(
            self.profile.limits, lock_lease_s=self.lock_rng.choice([0.3, 1.0])
        )
        if (
            self.profile.p_lock and self.lock_rng.random() < 0.3
        ):  # deadlocks are timed where nothing is late
            self.profile.p_drop = self.profile.p_slow = self.profile.p_refused = 0.0
            self.profile.leader_gap_s = 0.0
        self.locks = LockChecks(self)
        self.switches = switches
        self.now = 0.0
        self.quiet = False
        self.oracle_last = 100
        self.probes: dict[str, int] = {}
        self.anchors: dict[bytes, bytes] = {}  # txn_id -> anchor key, of every attempt
        count = self.rng.choice([2, 4, 6])
        self.keys_of = {number: keys[-count:] for number, keys in KEYS.items()}
        self.checker = Checker(self)
        self.history = History()
        self.groups = [
            Group(self, number, BOUNDS[number - 1], BOUNDS[number]) for number in (1, 2, 3)
        ]
        self.clients = [Client(self, number) for number in range(self.profile.clients)]
        self.settled_at = END_AT_S  # every client had finished by then
        watch_rng = random.Random(f"{seed}/watchers")
        self.watchers = [
            Watcher(self, number, watch_rng) for number in range(1, self.profile.watchers + 1)
        ]
        self._trace = trace
        self._instant = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._event_number = 0
        self._stock: list[int] = []  # of a planted bug

    # -- scheduling

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        self._event_number += 1
        heapq.heappush(self._events, (self.now + delay_s, self._event_number, call))

    def delay(self, scale_s: float = 0.002) -> float:
        rng = self.rng
        if not self.quiet and rng.random() < self.profile.p_slow:
            return rng.uniform(scale_s, 0.8)
        return rng.uniform(0.1, 2.0) * scale_s

    def chance(self, probability: float) -> float:
        return 0.0 if self.quiet else probability

    def instant(self) -> int:
        """Instants are totally ordered; two never coincide."""
        self._instant += 1
        return self._instant

    def probe(self, name: str) -> None:
        self.probes[name] = self.probes.get(name, 0) + 1

    def trace(self, *what: Any) -> None:
        if self._trace:
            print(f"{self.now:8.4f}", *what)

    def run(self) -> None:
        """One whole run. Raises: Violation, or an AssertionError of the product."""
        for group in self.groups:
            group.change_leader()
        for client in self.clients:
            self.after(self.rng.uniform(0, self.profile.spread_s), client.start)
        for watcher in self.watchers:
            self.after(self.rng.uniform(0, self.profile.spread_s), watcher.begin)
        self.after(QUIET_AT_S, self._fall_quiet)
        self._change_leaders()
        self._meddle()
        self.locks.watch()
        count = 0
        while self._events:
            when, _, call = heapq.heappop(self._events)
            if when > END_AT_S:
                break
            self.now = max(self.now, when)
            call()
            if self.settled_at == END_AT_S and all(client.finished for client in self.clients):
                self.settled_at = self.now
            count += 1
            if count > EVENTS_MAX:
                raise Violation("the run does not come to an end")
        self._check()

    def _fall_quiet(self) -> None:
        self.quiet = True
        for group in self.groups:
            group.settle()

    def _change_leaders(self) -> None:
        gap_s = self.profile.leader_gap_s
        if not gap_s or self.quiet:
            return
        self.after(self.rng.expovariate(1 / gap_s), self._change_one)

    def _change_one(self) -> None:
        if not self.quiet and any(not client.finished for client in self.clients):
            group = self.rng.choice(self.groups)
            self.trace("leader change in range", group.number)
            group.change_leader()
        self._change_leaders()

    def _meddle(self) -> None:
        """Somebody else reads, or asks about a transaction: for its outcome, for a reader, for a blocked writer."""
        rng = self.rng
        if self.quiet or all(client.finished for client in self.clients):
            return
        for group in self.groups:
            if rng.random() < 0.3:
                rng.choice(
                    [each for each in group.replicas if each.evaluator] or group.replicas
                ).close()
        if rng.random() < 0.4:
            self._read_at_replicas()
        elif rng.random() < 0.6:
            group = rng.choice(self.groups)
            kept = self.profile.limits.retention
            at = self.oracle_last - rng.choice([0, 0, 1, 5, kept, rng.randint(0, kept)])
            keys = rng.sample(self.keys_of[group.number], 2)
            self.call(keys[0], Read(0, 0, 0, at, keys), lambda _: None)
        elif self.anchors:
            txn_id = rng.choice(list(self.anchors)[-8:])
            self.call(self.anchors[txn_id], self._question(txn_id), lambda _: None)
        self.after(rng.expovariate(1 / self.profile.meddle_gap_s), self._meddle)

    def _read_at_replicas(self) -> None:
        """At one timestamp, at any replica of each of some ranges."""
        rng = self.rng
        replicas = [rng.choice(group.replicas) for group in self.groups[: rng.randint(1, 3)]]
        at = min(replica.safe_ts for replica in replicas) - rng.choice([0, 0, 1, 5])
        if at <= 0:
            return
        for replica in replicas:
            keys = self.keys_of[replica.group.number]
            self.probe("a replica read alone")
            if rng.random() < 0.5:
                replica.read_alone(Read(0, 0, 0, at, keys))
            else:
                end = replica.group.end or b"\xff"
                replica.read_alone(Scan(0, 0, 0, at, keys[0], end, rng.randint(1, 9), 1 << 20))

    def _question(self, txn_id: bytes) -> Request:
        rng, anchor_key = self.rng, self.anchors[txn_id]
        kind = rng.random()
        if kind < 0.1:
            return Outcome(0, 0, 0, txn_id, anchor_key)
        if kind < 0.15:
            return Fence(0, 0, 0, txn_id, anchor_key, anchor_key)
        if kind < 0.7:
            at = self.oracle_last - rng.randint(0, 3)
            return QueryTxn(0, 0, 0, txn_id, anchor_key, QueryMode.READ, at)
        return QueryTxn(0, 0, 0, txn_id, anchor_key, QueryMode.BLOCKED)

    # -- messages

    def group_of(self, key: bytes) -> Group:
        for group in self.groups:
            if group.owns(key):
                return group
        raise AssertionError(key)

    def range_call(
        self, replica: Replica, evaluator: Evaluator, key: bytes, request: Request, call_id: int
    ) -> None:
        def then(reply: Reply) -> None:
            replica.on_reply(evaluator, call_id, reply)

        if self.rng.random() < self.profile.p_local:
            self._deliver(self.group_of(key), request, then)
        else:
            self.call(key, request, then)

    def call(self, key: bytes, request: Request, then: Callable[[Reply], None]) -> None:
        """Ask a range; answered once, by a reply or by a Failure when the time is up. The request may arrive twice."""
        group = self.group_of(key)
        answered = False

        def finish(reply: Reply) -> None:
            nonlocal answered
            if not answered:
                answered = True
                then(reply)

        def send_back(reply: Reply) -> None:
            if self.rng.random() >= self.chance(self.profile.p_drop):
                self.after(self.delay(), lambda: finish(reply))

        copies = 2 if self.rng.random() < self.chance(self.profile.p_double) else 1
        for copy in range(copies):
            if self.rng.random() >= self.chance(self.profile.p_drop):
                late_s = self.rng.uniform(0, 2.5) if copy and self.rng.random() < 0.3 else 0.0
                self.after(late_s + self.delay(), lambda: self._deliver(group, request, send_back))
        self.after(CALL_TIMEOUT_S, lambda: finish(Failure(0, "unavailable", "no answer came")))

    def _deliver(self, group: Group, request: Request, send: Callable[[Reply], None]) -> None:
        target = group.target()
        if target is None or target.evaluator is None:
            self.after(0.0, lambda: send(Failure(0, "not_leader")))
            return

        def answer(reply: Reply) -> None:
            self.trace(f"  range {group.number}.{target.number}", request, "->", reply)
            self.after(0.0, lambda: send(reply))

        target.step(request, Origin(request, answer))

    def ask_oracle(self, count: int, answered: Callable[[int, int], None]) -> None:
        """answered(first, last issued); first is -1 if the question or the answer got lost."""

        def at_the_oracle() -> None:
            first = self._issue(count)
            last = self.oracle_last
            if self.rng.random() < self.chance(self.profile.p_drop):
                self.after(CALL_TIMEOUT_S, lambda: answered(-1, 0))
            else:
                self.after(self.delay(self.profile.oracle_s), lambda: answered(first, last))

        self.after(self.delay(self.profile.oracle_s), at_the_oracle)

    def _issue(self, count: int) -> int:
        if count and "stale_min_ts" in self.switches:
            while len(self._stock) < count:
                self._stock += range(self.oracle_last + 1, self.oracle_last + 9)
                self.oracle_last += 8
            first, self._stock = self._stock[0], self._stock[count:]
            return first
        first = self.oracle_last + 1
        self.oracle_last += count
        return first if count else 0

    # -- the end

    def _check(self) -> None:
        stuck = [client.number for client in self.clients if not client.finished]
        if stuck:
            raise Violation(f"I22: clients {stuck} never came to an end")
        for group in self.groups:
            open_still = group.undecided()
            if open_still:
                raise Violation(f"I22: {open_still}")
            group.settle()
            group.check_replicas()
            self.checker.check_stored(group)
        for watcher in self.watchers:
            watcher.check()
        self.checker.check_outcomes()
        self.history.check(self)


def run_seed(seed: int, plant: str | None = None, trace: bool = False) -> World:
    """Run one seed, with a planted bug if one is named."""
    # A short memory of what was decided, so that seeds of some dozen transactions forget some.
    memory = patch.object(decided, "REMEMBERED_MAX", 1 + seed % 5)
    with planted(plant) as switches, memory, choosing(_rare_ways(seed)), counting() as reached:
        world = World(seed, switches, trace)
        world.run()
    for name in RARE_WAYS:
        world.probes[name] = reached.get(f"chance:{name}", 0)
    world.probes["guards_in_slices"] = reached.get("guards_in_slices", 0)
    return world


def find(plant: str, seeds_max: int) -> tuple[int, Exception] | None:
    """The first seed, from 0 on, at which a planted bug is noticed, and by what: a promise that is broken, or an assertion of
    the product that names one. Whatever else fails may be the plant's own mistake, and does not count.
    """
    for seed in range(seeds_max):
        try:
            run_seed(seed, plant)
        except Exception as error:  # noqa: BLE001 - what does not count is none of ours
            if isinstance(error, Violation) or NAMED.match(str(error)):
                return seed, error
    return None


def _rare_ways(seed: int) -> Callable[[str], bool]:
    """One seed in two takes them, nearly always."""
    rng = random.Random(f"{seed}/rare")
    share = rng.choice([0.0, 0.9])
    return lambda name: name in RARE_WAYS and rng.random() < share


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seed", type=int, help="run this one alone")
    parser.add_argument("--plant", choices=sorted(PLANTS))
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--first", action="store_true", help="stop at the first violation")
    options = parser.parse_args(arguments)
    seeds = range(options.start, options.start + options.seeds)
    if options.seed is not None:
        seeds = range(options.seed, options.seed + 1)
    violations, probes, first = 0, dict[str, int](), ""
    for seed in seeds:
        try:
            world = run_seed(seed, options.plant, options.trace)
        except Exception as error:  # noqa: BLE001 - every kind of failure is a finding
            violations += 1
            first = first or f"{seed}: {type(error).__name__} {error}"
            print(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            if options.seed is not None or options.first:
                traceback.print_exc()
                break
            continue
        for name, count in world.probes.items():
            probes[name] = probes.get(name, 0) + count
    for name in sorted(probes):
        print(f"{probes[name]:9d}  {name}")
    print(f"plant={options.plant} seeds={len(seeds)} violations={violations} first={first[:300]}")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
