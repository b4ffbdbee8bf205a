"""Ranges of the simulated cluster: real state, apply and evaluators over an abstract Raft, without asyncio.

A range is a log and three replicas. A leader's proposals are in flight, later they are committed in order; at a leader
change a random prefix of them survives, the rest is lost for ever. A deposed leader may go on for a while without
knowing it: its proposals lead nowhere, its answers that need a confirmation are not given. Besides the replicas each
range has a ghost, which applies every command at the instant it is committed, and which the checker looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sortedcontainers import SortedDict

from txn import closed
from txn.apply import Overlay, apply_batch
from txn.commands import Batch, decode_batch, encode_batch
from txn.evaluate import Evaluator
from txn.latches import Pending
from txn.messages import Failure, Read, Reply, Request, Scan
from txn.state import RangeRow, RangeState

if TYPE_CHECKING:
    from tests.stateful.txn_harness import World

REPLICAS: Final = 3
VERSION: Final = 1  # of every range's epoch


class Violation(AssertionError):
    """A promise of the protocol is broken."""


class MemoryRows:
    """A sorted dict as stored rows."""

    def __init__(self) -> None:
        self.rows: SortedDict = SortedDict()

    def get(self, key: bytes, /) -> bytes | None:
        found: bytes | None = self.rows.get(key)
        return found

    def scan(
        self, start: bytes, end: bytes | None, *, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        keys = list(self.rows.irange(start, end, inclusive=(True, False), reverse=reverse))
        return iter([(key, self.rows[key]) for key in keys])

    def write(self, rows: dict[bytes, bytes | None]) -> None:
        for key, data in rows.items():
            if data is None:
                self.rows.pop(key, None)
            else:
                self.rows[key] = data


class Origin:
    """Who asked one evaluator for one thing."""

    __slots__ = ("answered", "request", "send")

    def __init__(self, request: Request, send: Callable[[Reply], None]) -> None:
        self.request = request
        self.send = send
        self.answered = False


class Output:
    """What an evaluator asks for, until the replica's turn takes it."""

    def __init__(self) -> None:
        self.replies: list[tuple[Origin, Reply, bool]] = []
        self.calls: list[tuple[bytes, Request, int]] = []

    def reply(self, origin: Any, reply: Reply, confirm: bool) -> None:
        if origin.answered:
            raise Violation(f"answered twice: {origin.request} by {reply}")
        origin.answered = True
        self.replies.append((origin, reply, confirm))

    def call(self, key: bytes, request: Request, call_id: int) -> None:
        self.calls.append((key, request, call_id))


class InFlight(NamedTuple):
    data: bytes
    batch: Batch
    pendings: list[Pending]


def mirror_of(state: RangeState) -> dict[str, Any]:
    """The in-memory copy of what is undecided, as plain data."""
    return {
        "parts": {
            (txn_id, locus): part.row
            for txn_id, loci in state.parts.items()
            for locus, part in loci.items()
        },
        "intents": {key: (part.txn_id, part.locus) for key, part in state.intents.items()},
        "point_guards": {key: sorted(holders) for key, holders in state.point_guards.items()},
        "span_guards": {
            (part.txn_id, part.locus): sorted(each.spans)
            for part, each in state.span_guards.items()
        },
        "staged": dict(state.staged),
        "outbox": dict(state.outbox),
        "oracle_hi": state.oracle_hi,
        "closed_ts": state.row.closed_ts,
    }


class Replica:
    def __init__(self, group: Group, number: int) -> None:
        self.group = group
        self.world = group.world
        self.number = number
        self.rows = MemoryRows()
        row = RangeRow(group.number, group.start, group.end, VERSION, 1, 0, 0, newest=0)
        self.state = RangeState(row)
        self.state.recent.rows_max = self.world.profile.recent_rows
        self.applied = 0  # entries of the group's log
        self.output = Output()
        self.evaluator: Evaluator | None = None
        self.heard = closed.Heard()
        self.open: dict[Origin, None] = {}  # asked of the evaluator, not answered
        self.held: dict[Origin, None] = {}  # answered, waiting for a confirmation of leadership
        self._asking = False
        self._tick_at: float | None = None
        self._run_at: float | None = None

    @property
    def leads(self) -> bool:
        return self.group.leader is self

    # -- the log

    def apply_to(self, index: int) -> None:
        """As a follower: the entries up to `index`, in one write batch."""
        overlay = Overlay(self.rows)
        for data in self.group.log[self.applied : index]:
            if data is not None:
                apply_batch(self.state, overlay, decode_batch(data))
        self.rows.write(overlay.rows)
        self._stands_at(max(self.applied, index))

    def _stands_at(self, index: int) -> None:
        self.applied = self.state.row.applied_index = index

    def apply_own(self, entries: list[InFlight]) -> None:
        """As the leader: entries that are committed now, in one write batch; then the evaluator learns it."""
        evaluator = self.evaluator
        assert evaluator is not None
        assert self.applied == len(self.group.log) - len(entries)
        overlay = Overlay(self.rows)
        answers = []
        for entry in entries:
            for pending in entry.pendings:
                overlay.seen.update(pending.seen)
            answers.append(apply_batch(self.state, overlay, entry.batch))
        self.rows.write(overlay.rows)
        self._stands_at(len(self.group.log))
        for entry, told in zip(entries, answers, strict=True):
            evaluator.applied(entry.pendings, told, self.world.now)
            self.world.locks.applied(evaluator, entry.pendings)
        self.turn()

    def restart(self) -> None:
        """What is undecided is read anew from the rows."""
        assert self.evaluator is None
        self.state = RangeState(self.state.row)
        self.state.recent.rows_max = self.world.profile.recent_rows
        self.state.load(self.rows)

    # -- closed timestamps

    @property
    def safe_ts(self) -> int:
        return closed.safe_ts(self.state, self.heard.closed(self.state.row))

    def close(self) -> None:
        """As the leader, or who takes itself for it: something lately issued is closed; the followers hear of it, or do not."""
        world, evaluator = self.world, self.evaluator
        if evaluator is None or not evaluator.ready:
            return
        closed_ts = evaluator.closing.close(world.oracle_last - world.rng.randint(0, 4))
        if not self.leads and "deposed_leader_closes" not in world.switches:
            world.probe("a deposed leader's closed timestamp was not confirmed")
            return
        index = self.applied
        for replica in self.group.replicas:
            if world.rng.random() >= world.chance(world.profile.p_drop):
                world.after(world.delay(), self._hearing(replica, index, closed_ts))

    def _hearing(self, replica: Replica, index: int, closed_ts: int) -> Callable[[], None]:
        def hear() -> None:
            replica.heard.hear(index, closed_ts, replica.state.row)

        self.world.checker.closes(self.group, closed_ts)
        return hear

    def read_alone(self, request: Read | Scan) -> Reply:
        """As a replica like any other."""
        reply = closed.read_here(self.state, self.rows, request, self.safe_ts)
        self.world.checker.safe(self.group, self)
        self.world.checker.told(self.group, request, reply)
        return reply

    # -- leadership

    def lead(self, term: int) -> None:
        assert self.evaluator is None
        world = self.world
        self.output = Output()
        self._asking, self._tick_at, self._run_at = False, None, None
        self.evaluator = Evaluator(self.state, self.rows, self.output, world.profile.limits, term)
        feed = self.evaluator.feed
        feed.slice_rows, feed.backlog_rows_max = (
            world.profile.search_rows,
            world.profile.backlog_rows,
        )

    def step_down(self) -> None:
        evaluator = self.evaluator
        if evaluator is None:
            return
        evaluator.stop()
        self.evaluator = None
        replies, self.output.replies = self.output.replies, []
        for origin, reply, confirm in replies:
            self.open.pop(origin, None)
            self._send(origin, Failure(0, "not_leader") if confirm else reply)
        held, self.held = self.held, {}
        for origin in held:
            self._send(origin, Failure(0, "not_leader"))
        if self.open:
            requests = [origin.request for origin in self.open]
            raise Violation(f"never answered, though the leader stopped: {requests}")

    # -- the evaluator's turn

    def step(self, request: Request, origin: Origin) -> None:
        assert self.evaluator is not None
        self.open[origin] = None
        self.world.locks.asked(self.evaluator, request)
        self.evaluator.step(request, origin, self.world.now)
        self.turn()

    def on_reply(self, evaluator: Evaluator, call_id: int, reply: Reply) -> None:
        if self.evaluator is evaluator:
            evaluator.recovery.on_reply(call_id, reply, self.world.now)
            self.turn()

    def turn(self) -> None:
        """Carry out what the evaluator wants: calls, proposals, answers, timestamps, its timers."""
        while self.evaluator is not None:
            evaluator, output, world = self.evaluator, self.output, self.world
            if evaluator.runnable and (world.rng.random() < 0.5 or world.quiet):
                self._look_again(evaluator)
            calls, output.calls = output.calls, []
            for key, request, call_id in calls:
                world.range_call(self, evaluator, key, request, call_id)
            self._propose(evaluator)
            replies, output.replies = output.replies, []
            for origin, reply, confirm in replies:
                self.open.pop(origin)
                world.locks.answered(evaluator, origin.request, reply)
                if confirm:
                    self._confirm(origin, reply)
                else:
                    self._send(origin, reply)
            if (evaluator.await_fresh or evaluator.await_read) and not self._asking:
                self._ask_oracle(evaluator)
            if not (output.calls or output.replies or evaluator.proposals):
                break
        if self.evaluator is not None:
            self.evaluator.locking.table.check()
        self._set_timers()

    def _set_timers(self) -> None:
        evaluator, world = self.evaluator, self.world
        if evaluator is None:
            return
        if evaluator.runnable and self._run_at is None:
            self._run_at = world.now
            world.after(world.rng.uniform(0, 0.002), lambda: self._run_again(evaluator))
        due = evaluator.deadline()
        if due is not None and (self._tick_at is None or due < self._tick_at):
            self._tick_at = due
            late = world.rng.uniform(0, 0.001)
            world.after(max(0.0, due - world.now) + late, lambda: self._tick(evaluator))

    def _run_again(self, evaluator: Evaluator) -> None:
        if self.evaluator is evaluator:
            self._run_at = None
            self._look_again(evaluator)
            self.turn()

    def _look_again(self, evaluator: Evaluator) -> None:
        evaluator.run_again(self.world.now)
        if evaluator.runnable:
            requests = [waiter.request for waiter in evaluator.runnable[:3]]
            raise Violation(f"evaluated again without end: {requests}")

    def _tick(self, evaluator: Evaluator) -> None:
        if self.evaluator is evaluator:
            self._tick_at = None
            evaluator.tick(self.world.now)
            self.turn()

    def _propose(self, evaluator: Evaluator) -> None:
        proposals, evaluator.proposals = evaluator.proposals, []
        while proposals:
            count = self.world.rng.randint(1, len(proposals))
            pendings, proposals = proposals[:count], proposals[count:]
            self.group.propose(self, evaluator, pendings)

    def _confirm(self, origin: Origin, reply: Reply) -> None:
        """By the lease at once, or by a quorum's answer later."""
        world = self.world
        unconfirmed = "unconfirmed_answers" in world.switches
        if unconfirmed or (self.leads and world.rng.random() < 0.6):
            self._send(origin, reply)
            return
        self.held[origin] = None

        def confirmed() -> None:
            if origin in self.held:
                del self.held[origin]
                if not self.leads:
                    world.probe("a deposed leader's answer was not confirmed")
                self._send(origin, reply if self.leads else Failure(0, "not_leader"))

        world.after(world.delay(), confirmed)

    def _send(self, origin: Origin, reply: Reply) -> None:
        self.world.checker.told(self.group, origin.request, reply)
        origin.send(reply)

    def _ask_oracle(self, evaluator: Evaluator) -> None:
        """One question at a time; what is wanted meanwhile goes with the next."""
        pendings, evaluator.await_fresh = evaluator.await_fresh, []
        readers, evaluator.await_read = evaluator.await_read, []
        self._asking = True
        late = 2 if "joins_a_sent_batch" in self.world.switches else 0

        def answered(first: int, read_ts: int) -> None:
            if self.evaluator is evaluator:
                self._asking = False
                if first < 0:
                    evaluator.silence.ask_again(pendings, readers)
                else:
                    if late:  # latched after the timestamps were issued
                        pendings.extend(evaluator.await_fresh[:late])
                        del evaluator.await_fresh[:late]
                    evaluator.give_timestamps(pendings, first, readers, read_ts, self.world.now)
                self.turn()

        self.world.ask_oracle(len(pendings) + late, answered)


class Group:
    """One range: its log, its replicas, its ghost."""

    def __init__(self, world: World, number: int, start: bytes, end: bytes) -> None:
        self.world = world
        self.number = number
        self.start, self.end = start, end
        self.log: list[bytes | None] = []  # None: a new leader's own entry
        self.term = 0
        self.leader: Replica | None = None
        self.inflight: list[InFlight] = []
        self.replicas = [Replica(self, slot) for slot in range(REPLICAS)]
        self.ghost = Replica(self, REPLICAS)
        self.raft_s = world.profile.raft_s * world.rng.choice([0.3, 1.0, 5.0])
        self._committing = False

    def owns(self, key: bytes) -> bool:
        return self.start <= key and (not self.end or key < self.end)

    def target(self) -> Replica | None:
        """Whom a caller takes for the leader."""
        deposed = [r for r in self.replicas if r.evaluator is not None and not r.leads]
        if deposed and self.world.rng.random() < 0.4:
            return self.world.rng.choice(deposed)
        return self.leader

    # -- proposals

    def propose(self, replica: Replica, evaluator: Evaluator, pendings: list[Pending]) -> None:
        world = self.world
        if world.rng.random() < world.chance(world.profile.p_refused):
            world.probe("Raft refused a proposal")
            evaluator.dropped(pendings, "throttled")
            return
        if not replica.leads:
            if world.rng.random() < 0.3:
                evaluator.dropped(pendings, "not_leader")
            return
        commands = []
        for pending in pendings:
            assert pending.command is not None
            commands.append(pending.command)
        batch = Batch(evaluator.closing.promised, VERSION, commands)
        self.inflight.append(InFlight(encode_batch(batch), batch, pendings))
        if not self._committing:
            self._committing = True
            world.after(world.delay(self.raft_s), self._commit_some)

    def _commit_some(self) -> None:
        self._committing = False
        count = self.world.rng.randint(1, len(self.inflight)) if self.inflight else 0
        entries, self.inflight = self.inflight[:count], self.inflight[count:]
        if self.inflight:
            self._committing = True
            self.world.after(self.world.delay(self.raft_s), self._commit_some)
        if entries:
            assert self.leader is not None
            for entry in entries:
                self._append(entry.data)
            self.leader.apply_own(entries)

    def _append(self, data: bytes | None) -> None:
        self.log.append(data)
        if data is not None:
            batch = decode_batch(data)
            self.world.checker.closes(self, batch.closed_ts)
            for command in batch.commands:
                self._apply_to_ghost(Batch(batch.closed_ts, batch.version, [command]))
        self.ghost.applied = len(self.log)
        for replica in self.replicas:
            if replica.evaluator is None:
                self.world.after(self.world.delay(), self._follow(replica))

    def _apply_to_ghost(self, batch: Batch) -> None:
        ghost = self.ghost
        overlay = Overlay(ghost.rows)
        before = set(ghost.state.outbox)
        apply_batch(ghost.state, overlay, batch)
        gone = before - set(ghost.state.outbox)
        self.world.checker.applied(self, batch.commands[0], overlay.rows, sorted(gone))
        ghost.rows.write(overlay.rows)

    def _follow(self, replica: Replica) -> Callable[[], None]:
        def follow() -> None:
            if replica.evaluator is None and replica.applied < len(self.log):
                replica.apply_to(self.world.rng.randint(replica.applied + 1, len(self.log)))

        return follow

    # -- leader changes

    def change_leader(self) -> None:
        world, rng = self.world, self.world.rng
        survive = rng.randint(0, len(self.inflight))
        entries, lost, self.inflight = self.inflight[:survive], self.inflight[survive:], []
        for entry in entries:
            self._append(entry.data)
        self.term += 1
        old, new = self.leader, rng.choice(self.replicas)
        self.leader = None
        new.step_down()
        if rng.random() < 0.3:
            world.probe("a leader loads its state from its rows")
            new.restart()
        if old is not None and old is not new:
            if rng.random() < 0.5:
                old.step_down()
            else:
                world.probe("a deposed leader goes on")
                world.after(rng.uniform(0, world.profile.deposed_s), self._learn(old))
        self.leader = new
        new.lead(self.term)
        again = lost if "proposed_again" in world.switches else []
        world.after(world.delay(), self._serve(new, self.term, again))

    def _learn(self, old: Replica) -> Callable[[], None]:
        evaluator = old.evaluator

        def learn() -> None:
            if old.evaluator is evaluator and not old.leads:
                old.step_down()

        return learn

    def _serve(self, replica: Replica, term: int, again: list[InFlight]) -> Callable[[], None]:
        def serve() -> None:
            if self.term != term or replica.evaluator is None:
                return
            self._append(None)
            replica.apply_to(len(self.log))
            replica.evaluator.start(self.world.now)
            replica.turn()
            for entry in again:  # only with a planted bug
                self.world.after(self.world.delay(), self._append_again(replica, entry.data))

        return serve

    def _append_again(self, replica: Replica, data: bytes) -> Callable[[], None]:
        def append() -> None:
            if replica.leads and replica.evaluator is not None and replica.evaluator.ready:
                self._append(data)
                replica.apply_to(len(self.log))

        return append

    # -- at the end

    def settle(self) -> None:
        """Deposed leaders learn it, followers catch up."""
        for replica in self.replicas:
            if not replica.leads:
                replica.step_down()
                replica.apply_to(len(self.log))

    def undecided(self) -> str:
        """What of this range is still open; empty when all is settled."""
        state = self.ghost.state
        found = [
            f"{name}: {value}"
            for name, value in (
                ("parts", state.parts),
                ("staged", state.staged),
                ("outbox", state.outbox),
                ("in flight", self.inflight),
            )
            if value
        ]
        leader = self.leader
        assert leader is not None
        assert leader.evaluator is not None
        evaluator = leader.evaluator
        if leader.open or leader.held:
            found.append(
                f"unanswered: {[origin.request for origin in (*leader.open, *leader.held)]}"
            )
        if evaluator.latches.held():
            found.append(f"latched: {sorted(evaluator.latches.txns)}")
        if evaluator.locking.table.owners:
            found.append(f"locks: {sorted(evaluator.locking.table.owners)}")
        if evaluator.blocked or evaluator.await_fresh or evaluator.await_read or evaluator.runnable:
            found.append("somebody waits")
        return f"range {self.number}: " + "; ".join(found) if found else ""

    def check_replicas(self) -> None:
        """I17: equal rows and mirrors; S1: a mirror is what its rows say."""
        expected = mirror_of(self.ghost.state)
        for replica in self.replicas:
            if replica.rows.rows != self.ghost.rows.rows:
                raise Violation(f"I17: rows of range {self.number} differ at {replica.number}")
            if mirror_of(replica.state) != expected:
                raise Violation(f"I17: mirrors of range {self.number} differ at {replica.number}")
        loaded = RangeState(self.ghost.state.row)
        loaded.load(self.ghost.rows)
        if mirror_of(loaded) != expected:
            raise Violation(f"S1: range {self.number} loads to another mirror than it has")
