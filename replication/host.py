"""The host: every group of a node, one turn at a time. The asyncio shell of replication.

A turn (DESIGN.md section 7): the machine evaluates what the world asked; the inbox is stepped; due timers tick.
Then `ready()` of each touched group is carried out, until nothing is left: what may leave at once goes out, one send
per node; the rest is staged into ONE batch of the log. Three phases follow, each ending in the same way:

    turn -> sends ─(sockets flush)─> write + sync -> acknowledgements ─(sockets flush)─> apply -> answers

A phase with nothing to do is left out, and one that sent nothing does not wait for sockets (uvloop writes them at the
end of a loop iteration: some `call_soon`s). While a sync runs in a thread, turns and applies go on and fill the next
batch. Only touched groups are visited; there is one heap of deadlines and one loop timer.

- H1 nothing that must be on disk first leaves before it is: `replication/durability.py` holds it and asserts.
- H2 an entry reaches the machine once, in order, and only when it is durable here (the core hands out no other).
- H3 after any failure of a write, or of the machine, the host stops at once and says nothing more (pitfall 11).
- H4 a node whose disk is stuck leads nothing and does not campaign until it moves again (pitfall 15).
- H5 every queue is bounded: the inbox drops (Raft sends again); applies and snapshots go in slices, one an iteration.
- H6 a group whose log is damaged is refused: it neither votes nor serves (`refused` says why). Damaged entries that
  the engine has are of no consequence: the log begins behind what is applied.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar

from replication.errors import FrameError, NotLeader
from replication.installer import Installer
from replication.loglane import Job, LogLane, Written
from replication.measures import Measures
from replication.messages import InstallSnapshot, Message
from replication.ports import Clock, LogFiles, Machine, Peers, RunInThread
from replication.raft import RaftNode
from replication.ready import RaftConfig, Ready
from replication.replica import Applier, Replica, open_replica
from replication.transfer import Transfers
from replication.turns import Deadlines, HostLimits, Inbox, Outbox, SyncMode, SyncPolicy, begin_of
from replication.types import Membership, SnapshotMeta
from replication.wal import GroupLog, Wal

# Keys of the host's own deadlines; groups have positive ids.
IDLE, TRANSFERS, STATELESS, STALL = -1, -2, -3, -4
INTERNAL: Final = InstallSnapshot  # made here of a verified stream, never taken from the network

T = TypeVar("T")
Then = Callable[[], None]
Phase = Callable[[float], None]


class Host:
    """See the module. All methods are for the loop's thread; none blocks, but for a sync that is done inline.

    Without `run` there is no loop: phases follow one another within `turn()`, and the caller owns the time (tests).
    """

    def __init__(
        self,
        *,
        node: int,
        wal: Wal,
        files: LogFiles,
        machine: Machine,
        peers: Peers,
        clock: Clock,
        rng: random.Random,
        raft_config: RaftConfig,
        on_fatal: Callable[[BaseException], None],
        sync_mode: SyncMode = "auto",
        run_in_thread: RunInThread | None = None,
        limits: HostLimits | None = None,
    ) -> None:
        """run_in_thread: without it everything is done inline. on_fatal: called once, after the host has stopped."""
        self.node = node
        self.refused: dict[int, str] = {}  # group -> why it is not served
        self.failure: BaseException | None = None
        self.limits = limits or HostLimits()
        self._machine, self._peers, self._clock, self._rng = machine, peers, clock, rng
        self._raft_config, self._on_fatal = raft_config, on_fatal
        self._run_in_thread = run_in_thread
        self._replicas: dict[int, Replica] = {}
        self.sync_policy = SyncPolicy(sync_mode if run_in_thread is not None else "inline")
        self.measures = Measures()
        self._lane = LogLane(wal, files, clock, self.sync_policy, self.measures)
        self._deadlines = Deadlines()
        if wal.needs_mark:  # recovered, and perhaps nothing is written for long
            self._deadlines.set(IDLE, clock.monotonic() + self.limits.idle_mark_s)
        self._outbox = Outbox()
        self._installer = Installer(self, self._replicas, machine, clock.monotonic)
        self._transfers = Transfers(
            self._installer,
            machine=machine,
            peers=peers,
            clock=clock,
            first_id=rng.getrandbits(40),
            limits=self.limits.snapshot,
        )
        self._inbox = Inbox(self.limits.inbox_messages_max, self.limits.inbox_bytes_max)
        self._dirty: dict[int, None] = {}  # groups to visit, in the order of touching
        self._visited: dict[int, Replica] = {}  # their deadlines count when all phases are over
        self._applier = Applier(self._replicas, machine, self.limits)
        self._phases: deque[Phase] = deque()
        self._busy = False  # a phase runs: what it asks for is seen to at its end
        self._stopped = self._stalled = False
        self._turn_asked = self._sync_asked = self._apply_asked = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Future[None] | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}  # blocking calls under way
        self._timer: asyncio.TimerHandle | None = None
        self._tasks_begun, self._timer_at = 0, 0.0
        dropped = ("inbox_full", "unknown", "malformed", "no_route")
        names = ("turns", "messages_in", "stalls", *(f"messages_dropped_{why}" for why in dropped))
        self.counters = dict.fromkeys((*names, "snapshots_outrun"), 0)

    # ------------------------------------------------------------ groups

    def add_group(
        self,
        group: int,
        replica: int,
        recovered: GroupLog | None,
        membership: Membership,
        applied: tuple[int, int],
        *,
        installed: tuple[int, int] = (0, 0),
        installing: bool = False,
        born: bool = False,
    ) -> None:
        """Serve a replica. recovered: what the log has of it. born: it never ran before, so it promised nothing.

        applied: (index, term) as the engine has it; membership as of there. installed: the `applied` that the last
        snapshot, or the group's creation, set: where the engine may stand though the log does not know yet.
        installing: the engine found the marker of an unfinished installation: the replica has no state, votes with its
        log, and asks for a snapshot. Damage of the log above `applied` makes the group `refused`. Raises: LogMismatch.
        """
        assert 0 < group not in self._replicas
        self.refused.pop(group, None)
        start = begin_of(recovered, replica, applied, installed=installed, installing=installing)
        if isinstance(start, str):
            self.refused[group] = start
            return
        added = open_replica(
            group,
            replica,
            start,
            membership,
            config=self._raft_config,
            rng=random.Random(self._rng.getrandbits(64)),
            quiet=not born,
            now=self._clock.monotonic(),
            measures=self.measures,
        )
        self._replicas[group] = added
        last = added.raft.last_index, start.last_term
        self._lane.begin_group(group, start.state, last, reset=start.reset)
        if installing:
            added.lose_state()
            self.ask_for_state_soon()
        self.touch(group)

    def remove_group(self, group: int, then: Then) -> None:
        """Stop serving a replica for good. `then` is called when its tombstone is durable: now its rows may go."""
        gone = self._replicas.pop(group)
        self._transfers.drop_group(group)
        self._deadlines.set(group, None)
        self._applier.groups.pop(group, None)
        self._lane.remove_group(group, gone.id)
        self.when_durable(then)

    def groups(self) -> list[int]:
        """The groups that are served, in the order in which they were added."""
        return list(self._replicas)

    def raft(self, group: int) -> RaftNode:
        """The core of a group: to look at, not to drive. Raises: KeyError if it is not served here."""
        return self._replicas[group].raft

    def when_durable(self, then: Then) -> None:
        """Call `then` when everything that is staged by now is durable."""
        self._lane.when_durable(then)
        self._soon()

    # ------------------------------------------------------------ asked by the layer above

    def propose(self, group: int, term: int, data: bytes) -> int:
        """Propose a command; returns its index. Raises: NotLeader (of exactly `term`), ProposalDropped, EntryTooLarge."""
        replica, now = self._served(group), self._clock.monotonic()
        index = replica.raft.propose(term, data, now)
        replica.proposed.append((index, now))
        self.touch(group)
        return index

    def propose_membership(self, group: int, term: int, membership: Membership) -> int:
        """As `propose`, for a change of members. Raises also: InvalidMembership."""
        raft = self._served(group).raft
        index = raft.propose_membership(term, membership, self._clock.monotonic())
        self.touch(group)
        return index

    def transfer_leadership(self, group: int, to: int) -> None:
        """Hand leadership to replica `to`. Raises: NotLeader, ProposalDropped."""
        self._served(group).raft.transfer_leadership(to, self._clock.monotonic())
        self.touch(group)

    def campaign(self, group: int) -> None:
        """Do not wait for the election timer."""
        self._served(group).raft.campaign(self._clock.monotonic())
        self.touch(group)

    def read_index(self, group: int, context: int) -> None:
        """Confirm leadership for a read; answered by `Machine.read_confirmed`. Raises: NotLeader if the group is not
        served here, ProposalDropped if too many wait.
        """
        self._served(group).raft.read_index(context, self._clock.monotonic())
        self.touch(group)

    def lease_valid(self, group: int) -> bool:
        """Whether this node leads the group by a lease that holds now."""
        replica = self._replicas.get(group)
        return replica is not None and replica.raft.lease_valid(self._clock.monotonic())

    def flushed(self, indices: Mapping[int, int]) -> list[tuple[int, int]]:
        """The engine has flushed these applied indices: logs may be cut there (`Replica.cut`).
        Returns: (group, replica) of followers whose snapshot is outrun.
        """
        outrun: list[tuple[int, int]] = []
        for group, index in indices.items():
            replica = self._replicas.get(group)
            if replica is not None and not replica.held:
                index = min(index, replica.raft.applied_index)
                self._lane.compact(group, index)
                outrun += ((group, other) for other in replica.cut(index, self.limits))
        self.counters["snapshots_outrun"] += len(outrun)
        return outrun

    def _served(self, group: int) -> Replica:
        replica = self._replicas.get(group)
        if replica is None or self._stopped:
            raise NotLeader
        return replica

    # ------------------------------------------------------------ from the network

    def receive(self, sender_node: int, messages: Sequence[Message], size_bytes: int = 0) -> None:
        """Messages of one frame. Dropped and counted when the inbox is full. size_bytes: measured here if 0."""
        if not self._inbox.add(sender_node, messages, size_bytes):
            self.counters["messages_dropped_inbox_full"] += len(messages)
        self.wake()

    def receive_snapshot_chunk(self, sender_node: int, payload: bytes) -> None:
        """A frame of the snapshot connection, of either direction."""
        self._transfers.receive(sender_node, payload)
        self.wake()

    def snapshot_link_lost(self, node: int) -> None:
        """The connection by which frames of snapshots leave for a node has ended."""
        self._transfers.link_lost(node)
        self.wake()

    # ------------------------------------------------------------ life

    async def run(self) -> None:
        """Turn until `stop` or a failure; returns when no blocking call is under way any more."""
        loop = self._loop = asyncio.get_running_loop()
        if self._stopped:
            return
        self._ended = loop.create_future()
        self._turn_asked = False
        self.wake()
        try:
            await self._ended
        finally:
            self.stop()
            while self._tasks:
                await self._tasks.pop(next(iter(self._tasks)))

    def stop(self) -> None:
        """At once: no further message, write or apply. What was not durable is as after a crash."""
        if self._stopped:
            return
        self._stopped = True
        self._phases.clear()
        self._outbox.take()
        if self._timer is not None:
            self._timer.cancel()
        self._transfers.close()
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def wake(self) -> None:
        """Ask for a turn soon; asking twice is asking once."""
        if self._turn_asked or self._stopped:
            return
        self._turn_asked = True
        if self._loop is not None:
            self._loop.call_soon(self.turn)

    @property
    def turn_wanted(self) -> bool:
        """Something waits for a turn (for those who drive without a loop)."""
        return self._turn_asked

    def turn(self) -> None:
        """One turn. Called by the loop; tests call it themselves."""
        self._turn_asked = False
        self._run(self._turn)

    def deadline(self) -> float | None:
        """When a turn is due even if nothing arrives."""
        return self._deadlines.next()

    def stats(self) -> dict[str, float]:
        """Figures for metrics, by name. `sync_age_s`: of the sync under way, 0.0 if there is none."""
        return {
            **self.counters,
            **self._lane.stats(self._clock.monotonic()),
            **self._transfers.counters,
            "entries_applied": self._applier.entries_applied,
            "groups": len(self._replicas),
            "groups_refused": len(self.refused),
        }

    # ------------------------------------------------------------ phases

    def _run(self, phase: Phase) -> None:
        """Run a phase and all that it leads to at once. A phase asked for within a phase comes after it."""
        if self._stopped:
            return
        self._phases.append(phase)
        if self._busy:
            return
        self._busy = True
        began = now = self._clock.monotonic()
        try:
            while self._phases:
                self._phases.popleft()(now)
                if not self._stopped:
                    self._settle()
                now = self._clock.monotonic()
            if not self._stopped:
                self._arm_timer(now)
                self._machine.settled()
            self.measures.turn_seconds.note(now - began)
        except Exception as error:  # noqa: BLE001  # whatever it was, what this node knows is in doubt
            self._fail(error)
        finally:
            self._busy = False

    def _fail(self, error: BaseException) -> None:
        if self._stopped:
            return
        self.failure = error
        self.stop()
        self._on_fatal(error)

    def _turn(self, now: float) -> None:
        self.counters["turns"] += 1
        self._machine.drain(now)
        if self._inbox.frames:
            self._step_inbox(now)
        else:
            self._inbox.taken = 0
        for key in self._deadlines.due(now):
            self._due(key, now)
        if self._transfers.busy:
            if self._transfers.work(now):
                self.wake()
            self._deadlines.set(TRANSFERS, self._transfers.deadline())

    def _step_inbox(self, now: float) -> None:
        replicas, dirty = self._replicas, self._dirty
        for node, messages in self._inbox.take():
            self.counters["messages_in"] += len(messages)
            for message in messages:
                group = message.group
                replica = replicas.get(group)
                if replica is None or message.to != replica.id or type(message) is INTERNAL:
                    self.counters["messages_dropped_unknown"] += 1
                    continue
                try:
                    replica.step(node, message, now, self.limits.held_log_bytes_max)
                except FrameError:  # nothing changed
                    self.counters["messages_dropped_malformed"] += 1
                dirty[group] = None

    def _due(self, key: int, now: float) -> None:
        replica = self._replicas.get(key)
        if replica is not None:
            replica.raft.tick(now)
            self._dirty[key] = None
        elif key == IDLE:
            self._lane.mark()
        elif key == STATELESS:
            if self._installer.ask_for_state(self._transfers):
                self._deadlines.set(STATELESS, now + self.limits.ask_again_s)
        elif key == STALL and self._lane.syncing:
            self._stall(now)

    def _settle(self) -> None:
        """The end of every phase: carry out what the touched groups ask for, send, and go on to the next phase."""
        if self._dirty:
            self.visit()
            if self._stopped:  # by the machine
                return
        if self._lane.staged and not self._sync_asked and not self._lane.syncing:
            self._sync_asked = True
            self._run(self._begin_sync)
            if self._inbox.taken >= self.limits.loaded_messages:
                return  # one frame for what is to be sent now and what the sync releases
        if self._outbox.nodes:
            for node, messages in self._outbox.take():
                self._peers.send(node, messages)
        if self._applier.groups and not self._apply_asked and not self._sync_asked:
            self._apply_asked = True
            self._run(self._apply)

    def visit(self) -> None:
        """Carry out what touched cores ask for, but for the sends."""
        while self._dirty:
            dirty, self._dirty = self._dirty, {}
            for group in dirty:
                replica = self._replicas.get(group)
                if replica is None:
                    continue
                raft = replica.raft
                if raft.has_ready():
                    self._carry_out(replica, raft.ready())
                self._visited[group] = replica

    def _carry_out(self, replica: Replica, ready: Ready) -> None:
        """What a core asks for. The order does not matter to safety: the gate holds what must wait."""
        group = replica.group
        if ready.leadership is not None:
            replica.tell_leadership(self._machine, ready.leadership)
        if ready.token is not None:
            self._lane.save(group, ready.hard_state, ready.entries, ready.token)
        else:
            assert ready.hard_state is None
            assert not ready.entries
        for outgoing in ready.outgoing:
            message = self._lane.gate.admit(group, outgoing)
            if message is not None:
                self._post(replica, message)
        if ready.committed:
            replica.time_commits(ready.committed, self._clock.monotonic(), self.measures)
            if replica.take_committed(ready.committed):
                self._applier.groups[group] = None
        if ready.read_states or ready.reads_failed:
            replica.answer_reads(self._machine, ready.read_states, ready.reads_failed)
        for other in ready.snapshot_to:
            node = replica.node_of(other)
            if node is None:
                self._installer.sent(group, other, False)
            else:
                self._transfers.send(group, other, node)
                self.wake()
        if ready.install is not None:
            replica.install = ready.install

    def _post(self, replica: Replica, message: Message) -> None:
        node = replica.node_of(message.to)
        if node is None or node == self.node:
            self.counters["messages_dropped_no_route"] += 1
        else:
            self._outbox.add(node, message)

    def _apply(self, _now: float) -> None:
        self._apply_asked = False
        for replica in self._applier.apply():
            self._dirty[replica.group] = None
        if self._applier.groups and self._loop is not None:  # H5: first sockets and other turns
            self._apply_asked = True
            self._loop.call_soon(self._run, self._apply)

    # ------------------------------------------------------------ the log

    def _begin_sync(self, now: float) -> None:
        self._sync_asked = False
        job = self._lane.take(now)
        if job is None:
            return
        if self._loop is None or not self.sync_policy.in_thread(job.batch.create_bytes > 0):
            self._end_sync(job, self._lane.write(job), threaded=False)
        else:
            self._deadlines.set(STALL, now + 2 * self._raft_config.election_timeout_s)
            self._start(
                lambda: self._lane.write(job),
                lambda written: self._end_sync(job, written, threaded=True),
            )

    def _end_sync(self, job: Job, written: Written, *, threaded: bool) -> None:
        """A batch is durable: cores hear of it, what waited for it leaves."""
        now = self._clock.monotonic()
        tokens, messages = self._lane.done(job, written, threaded=threaded)
        for group, token in tokens:
            self._replicas[group].raft.persisted(token)
            self._dirty[group] = None
        for group, message in messages:
            self._post(self._replicas[group], message)
        for then in job.waiting:
            then()
        self._deadlines.set(IDLE, now + self.limits.idle_mark_s)
        if self._stalled:
            self._stalled = False
            for replica in self._replicas.values():
                replica.storage_moves()
                self._dirty[replica.group] = None
        if job.batch.create_bytes:
            self._tidy_segments()

    def _stall(self, now: float) -> None:
        """The disk is stuck: lead nothing, so that others may, and do not campaign until it moves."""
        self._stalled = True
        self.counters["stalls"] += 1
        for replica in self._replicas.values():
            replica.storage_is_stuck(now)
            self._dirty[replica.group] = None

    def _tidy_segments(self) -> None:
        """A segment was begun: groups that keep old ones are carried forward, and what nobody needs goes."""
        lane, room = self._lane, self.limits.carried_bytes_max
        for group in lane.pinned():  # those without room wait for the next segment
            replica = self._replicas.get(group)
            if replica is not None and room > 0:  # a refused group keeps its segments
                room -= lane.carry(group, replica.live_log())
        if lane.obsolete():
            self.run_blocking(lane.delete, lane.deleted)

    # ------------------------------------------------------------ for the installer

    def touch(self, group: int) -> None:
        """The group's core has something to say: it is visited at the end of this phase, or of the next turn."""
        self._dirty[group] = None
        self._soon()

    def apply_soon(self, group: int) -> None:
        if len(self._replicas[group].queue):
            self._applier.groups[group] = None
            self._soon()

    def ask_for_state_soon(self) -> None:
        self._deadlines.set(STATELESS, self._clock.monotonic())
        self._soon()

    def begin_log(self, replica: Replica, meta: SnapshotMeta, then: Then) -> None:
        self._lane.reset(replica.group, (meta.index, meta.term))
        self.when_durable(then)

    def run_blocking(self, work: Then, then: Then) -> None:
        """Do `work` in a thread where there is one, then `then` as a phase. A failure of either is fatal."""
        if self._loop is None or self._run_in_thread is None:
            work()
            self._run(lambda _now: then())
        else:
            self._start(work, lambda _nothing: then())

    # ------------------------------------------------------------ loop, threads, timer

    def _soon(self) -> None:
        if not self._busy:
            self.wake()

    def _start(self, work: Callable[[], T], then: Callable[[T], None]) -> None:
        assert self._loop is not None
        self._tasks_begun += 1
        number = self._tasks_begun
        self._tasks[number] = self._loop.create_task(self._in_thread(number, work, then))

    async def _in_thread(
        self, number: int, work: Callable[[], T], then: Callable[[T], None]
    ) -> None:
        assert self._run_in_thread is not None
        try:
            result = await self._run_in_thread(work)
        except Exception as error:  # noqa: BLE001  # its outcome is unknown, whatever it was
            self._fail(error)
        else:
            self._run(lambda _now: then(result))
        finally:
            self._tasks.pop(number, None)

    def _arm_timer(self, now: float) -> None:
        """One timer, for the first deadline. It may be early; the turn then finds nothing due."""
        for group, replica in self._visited.items():
            if self._replicas.get(group) is replica:
                self._deadlines.set(group, replica.raft.deadline())
        self._visited.clear()
        at = self._deadlines.next()
        if at is None or self._loop is None or (self._timer is not None and self._timer_at <= at):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._loop.call_later(max(at - now, self.limits.timer_s_min), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.turn()
