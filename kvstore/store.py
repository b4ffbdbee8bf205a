"""The store: all replicas of a node behind one turn. It implements what the replication host drives (Machine).

A turn's `drain`: requests that arrived are evaluated, range by range; the oracle is asked once for everything that needs a
timestamp; what was decided goes to Raft as one entry per range; answers that rest on absence are confirmed by the lease,
or by a read index. `apply` stages the rows of all ranges into one write batch, `finish` writes it and lets answers go.

N1 no answer to a write leaves before its entry is applied here, hence committed and durable here. N2 no answer that rests on
absence leaves before leadership was confirmed after the look. N3 requests that wait are bounded: beyond it, Throttled.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kvstore.addressing import key_of
from kvstore.closing import Closer, ReplicaReads
from kvstore.holds import Holds
from kvstore.measures import StoreMeasures
from kvstore.oracle_client import OracleClient
from kvstore.ports import Clock, Engine
from kvstore.replica import Replica, ReplicaConfig
from kvstore.snapshots import RangeSink, RangeSource
from kvstore.waiting import Heavy, Waiting
from replication.errors import EntryTooLarge, NotLeader, ProposalDropped
from replication.host import Host
from replication.probes import chance, reached
from replication.turns import Deadlines
from replication.types import Entry, SnapshotMeta
from txn.apply import Overlay
from txn.changes import POLLS_MAX, Polls
from txn.commands import encode_batch
from txn.evaluate import COUNTERS, Evaluator, Limits
from txn.latches import Waiter
from txn.messages import (
    Changes,
    Directory,
    Failure,
    GetDirectory,
    GetTimestamps,
    RangeInfo,
    Read,
    Reply,
    Request,
    Scan,
)
from txn.oracle import Oracle
from txn.reads import Turn, answer_bytes
from txn.recent import ROWS_MAX as RECENT_ROWS_MAX
from txn.state import RangeRow

META_RANGE_ID = 1
META_START = b"\xff\x00"
WRITE_BATCH_BYTES_MAX = 1 << 20
WRITE_BATCH_ROWS_MAX = 2_000
REQUESTS_PER_TURN = 256  # evaluated before what was decided goes out
BUSY = "the node is busy"


class Asker(Protocol):
    """Who gets an answer: a client's connection, or a range of this node."""

    def answer(self, reply: Reply) -> None: ...


class RemoteCalls(Protocol):
    """The way to ranges that other nodes lead."""

    def call(self, key: bytes, request: Request, then: Callable[[Reply], None]) -> None:
        """Routed, repeated within its time, answered once: with a reply, or a Failure."""


class LocalCall:
    """A range of this node asked; the answer goes back to its evaluator, in a later turn."""

    __slots__ = ("_call_id", "_evaluator", "_store")

    def __init__(self, store: Store, evaluator: Evaluator, call_id: int) -> None:
        self._store = store
        self._evaluator = evaluator
        self._call_id = call_id

    def answer(self, reply: Reply) -> None:
        self._store.local_answer(self._evaluator, self._call_id, reply)


class _Callback:
    __slots__ = ("answer",)

    def __init__(self, then: Callable[[Reply], None]) -> None:
        self.answer = then


class Store:
    """See the module. `attach` gives it its host and its way to other nodes, before the first turn."""

    def __init__(
        self,
        *,
        node: int,
        cluster: str,
        engine: Engine,
        clock: Clock,
        limits: Limits,
        requests_max: int,
        inbox_bytes_max: int,
        oracle_window_ms: int,
        closed_lag_s: float,
        snapshot_hold_s: float,
        watches_max: int = POLLS_MAX,
        watch_recent_rows: int = RECENT_ROWS_MAX,
    ) -> None:
        self.node, self.cluster = node, cluster
        self.engine = engine
        self.clock = clock
        self.limits = limits
        self.replicas: dict[int, Replica] = {}
        self.addresses: dict[int, str] = {}
        self.counters = {
            "requests": 0,
            "requests_throttled": 0,
            "commands": 0,
            "entries": 0,
            "rows_written": 0,
            "read_index_rounds": 0,
            "oracle_rounds": 0,
        }
        self.measures = StoreMeasures()
        self.leaderships_begun = 0
        self.transaction_counters = dict.fromkeys(COUNTERS, 0)
        self.on_deadline: Callable[[float], None] = lambda _when: None
        self.on_settled: Callable[[], None] = lambda: None
        self.send_closed: Callable[[int, bytes], None] = lambda _node, _payload: None
        self.oracle = Oracle(window_ms=oracle_window_ms)
        self.open_requests = 0
        self.polls = Polls(watches_max)  # of watches; they wait for long, and do not count as load
        self.turn = Turn()  # what this one has for reads, and who goes on in the next
        self._watch_recent_rows = watch_recent_rows
        self._requests_max = requests_max
        self._inbox_bytes_max = inbox_bytes_max
        self.inbox_bytes = 0  # of frames of requests that wait for a turn
        self.waiting = Waiting(inbox_bytes_max)
        self._host: Host
        self._remote: RemoteCalls
        self._overlay = Overlay(engine)
        self._inbox: deque[tuple[Asker, Request]] = deque()
        self._frames: deque[tuple[int, int]] = (
            deque()
        )  # of the inbox: number of its last request, bytes
        self._queued = self._handled = (
            0  # requests that were ever put into the inbox, and taken out
        )
        self._local: list[tuple[Evaluator, int, Reply]] = []
        self._touched: dict[int, Replica] = {}  # evaluators that something happened to, this turn
        self._staged: dict[int, Replica] = {}  # whose rows are in the overlay
        self._deadlines = Deadlines()
        self._held: dict[
            int, tuple[Replica, list[tuple[Any, Reply]], int]
        ] = {}  # read-index context -> answers, and their bytes
        self._context = 0
        self._by_start: list[Replica] = []
        self._starts: list[bytes] = []
        self._oracle_client = OracleClient(self, Holds(snapshot_hold_s, limits.retention))
        self.closer = Closer(self, closed_lag_s)
        self._closing_due = float("-inf")
        self.replica_reads = ReplicaReads(self, self.closer, self.turn)

    def attach(self, host: Host, remote: RemoteCalls) -> None:
        self._host, self._remote = host, remote

    def add(self, row: RangeRow, config: ReplicaConfig) -> Replica:
        """Serve a replica whose rows are in the engine."""
        replica = self.replicas[row.range_id] = Replica(row, config)
        replica.state.recent.rows_max = self._watch_recent_rows
        self._by_start = sorted(self.replicas.values(), key=lambda each: each.state.row.start)
        self._starts = [each.state.row.start for each in self._by_start]
        if not row.installing:
            replica.state.load(self.engine)
        if row.range_id == META_RANGE_ID:
            self.oracle.hi = self.oracle.last = replica.state.oracle_hi
        return replica

    # -- what arrives

    def accept(self, asker: Asker, requests: Sequence[Request], size_bytes: int = 0) -> None:
        """Requests of one frame of `size_bytes`. More than fit, in number or in bytes, are refused at once with Throttled."""
        room = self._requests_max + self.polls.open - self.open_requests
        share = self.waiting.share(size_bytes, len(requests))
        fits = self.inbox_bytes + self.turn.waiting_bytes + size_bytes <= self._inbox_bytes_max
        if chance("throttled") or not fits or (share and not self.waiting.has_room(size_bytes)):
            room = 0
        if len(requests) > room:
            for request in requests[max(0, room) :]:
                self.counters["requests_throttled"] += 1
                asker.answer(Failure(request.id, "throttled", BUSY, {"retry_after": 0.02}))
            requests = requests[: max(0, room)]
        self.open_requests += len(requests)
        self.counters["requests"] += len(requests)
        for request in requests:
            if isinstance(request, GetTimestamps):  # others' turns wait for it: it does not queue
                self._oracle_client.asked(asker, request)
            elif share and not isinstance(request, Changes):  # polls are bounded by their number
                self._inbox.append((Heavy(self.waiting, asker, share), request))
            else:
                self._inbox.append((asker, request))
        queued = self._handled + len(self._inbox)
        if queued > self._queued:
            self._queued = queued
            self._frames.append((queued, size_bytes))
            self.inbox_bytes += size_bytes
        self._host.wake()

    def local_answer(self, evaluator: Evaluator, call_id: int, reply: Reply) -> None:
        self._local.append((evaluator, call_id, reply))
        self._host.wake()

    def wake(self) -> None:
        self._host.wake()

    # -- the turn; Machine

    def drain(self, now: float) -> None:
        """One turn; the most frequent one is of replication alone, and finds nothing to do here."""
        deadlines = self._deadlines
        if (
            self._inbox
            or self.turn.waiting
            or self._local
            or self._touched
            or self._oracle_client.has_work
            or deadlines.may_be_due(now)
            or now >= self._closing_due
        ):
            self._work(now)

    def _work(self, now: float) -> None:
        self._go_on(now)
        for number in self._deadlines.due(now):
            replica = self.replicas.get(number)
            if replica is not None and replica.evaluator is not None:
                self._touched[number] = replica
                evaluator = replica.evaluator
                evaluator.issued = max(evaluator.issued, self._oracle_client.issued)
                evaluator.floor = self._oracle_client.floor
                evaluator.tick(now)
        inbox = self._inbox
        taken = min(len(inbox), REQUESTS_PER_TURN)
        for _ in range(taken):
            asker, request = inbox.popleft()
            self._dispatch(asker, request, now)
        if taken:
            self.measures.turn_requests.note(taken)
        self._handled += taken
        while self._frames and self._frames[0][0] <= self._handled:
            self.inbox_bytes -= self._frames.popleft()[1]
        if inbox:
            self._host.wake()  # the next turn goes on: this batch travels while that one is evaluated
        while self._local:
            local, self._local = self._local, []
            for evaluator, call_id, reply in local:
                replica = self.replicas.get(evaluator.state.row.range_id)
                if replica is not None and replica.evaluator is evaluator:
                    self._touched[replica.range_id] = replica
                    evaluator.recovery.on_reply(call_id, reply, now)
        for replica in list(self._touched.values()):
            if replica.evaluator is not None and replica.evaluator.runnable:
                replica.evaluator.run_again(now)
        self._closing_due = self.closer.turn(now)
        self._oracle_client.turn(now, self._touched)
        self._carry_out(now)

    def _go_on(self, now: float) -> None:
        """Readers for whom earlier turns had nothing left. Who waited for too long is refused: more come than can be served."""
        turn = self.turn
        turn.begin()
        for reader, waiter in turn.go_on():
            late = now > waiter.until_s(self.limits.read_wait_s)
            if late or (turn.full and reader is not None):
                self.counters["requests_throttled"] += 1
                details = {"retry_after": 0.1}
                self.answer(waiter.origin, Failure(waiter.request.id, "throttled", BUSY, details))
            elif reader is None:
                self._dispatch(waiter.origin, waiter.request, now)
            else:
                self.touch(reader.owner.state.row.range_id)
                reader.go_on(waiter, now)

    def _dispatch(self, asker: Asker, request: Request, now: float) -> None:
        if isinstance(request, GetDirectory):
            self.answer(asker, self._directory(request.id))
            return
        assert not isinstance(request, GetTimestamps)
        range_id = request.range_id
        replica = self.replicas.get(range_id) if range_id else self.find(key_of(request))
        if replica is None:
            self.answer(asker, Failure(request.id, "epoch_mismatch", "not a range of this node"))
            return
        kind = request.__class__
        if (kind is Read or kind is Scan) and request.stale is not None:  # type: ignore[union-attr]
            if self.turn.left <= 0:
                self.turn.put_off(None, Waiter(request, asker, now))
                return
            done = self.replica_reads.read(replica, request, now)  # type: ignore[arg-type]
            if not isinstance(done, Read | Scan):
                self.answer(asker, done)
                return
            request = done
        evaluator = replica.evaluator
        if evaluator is None:
            self.answer(asker, self.not_leader(request.id, replica))
            return
        self._touched[replica.range_id] = replica
        evaluator.step(request, asker, now)

    def find(self, key: bytes) -> Replica | None:
        """The replica here whose range holds a key."""
        place = bisect_right(self._starts, key) - 1
        if place < 0:
            return None
        replica = self._by_start[place]
        return replica if replica.state.owns(key) else None

    def _carry_out(self, now: float) -> None:
        """Everything the touched evaluators want: calls, proposals, answers, their deadlines."""
        rounds = 0
        while self._touched:
            touched, self._touched = self._touched, {}
            for replica in touched.values():
                evaluator = replica.evaluator
                output = replica.output
                if evaluator is not None:
                    if output.calls:
                        self._call(replica, evaluator, now)
                    if evaluator.proposals:
                        self._propose(replica, evaluator)
                    if output.confirm:
                        self._confirm(replica)
                    if evaluator.await_fresh or evaluator.await_read:
                        if self._oracle_client.want(replica):
                            self._host.wake()
                    self._note_deadline(replica, evaluator, now)
                if output.replies:
                    replies, output.replies = output.replies, []
                    for origin, reply in replies:
                        self.answer(origin, reply)
            rounds += 1
            assert rounds < 1_000, "ranges of one node call each other for ever"
        if self.turn.waiting:
            self._host.wake()

    def _note_deadline(self, replica: Replica, evaluator: Evaluator, now: float) -> None:
        if evaluator.runnable:
            self._host.wake()
            self._deadlines.set(replica.range_id, now)
        else:
            self._deadlines.set(replica.range_id, evaluator.deadline())

    def _call(self, replica: Replica, evaluator: Evaluator, now: float) -> None:
        calls, replica.output.calls = replica.output.calls, []
        for key, request, call_id in calls:
            asker = LocalCall(self, evaluator, call_id)
            target = self.find(key)
            if target is not None and target.evaluator is not None:
                self.open_requests += 1
                self._touched[target.range_id] = target
                target.evaluator.step(request, asker, now)
            else:
                self._remote.call(key, request, asker.answer)

    def _propose(self, replica: Replica, evaluator: Evaluator) -> None:
        for batch, pendings in replica.take_batches():
            try:
                index = self._host.propose(replica.range_id, evaluator.term, encode_batch(batch))
            except NotLeader:
                reached("deposed_before_it_proposed")
                evaluator.dropped(pendings, "not_leader")
            except ProposalDropped:
                reached("proposal_dropped")
                evaluator.dropped(pendings, "throttled")
            except EntryTooLarge as error:  # one command, in an entry of its own (`take_batches`)
                evaluator.dropped(pendings, "transaction_too_large", str(error))
            else:
                replica.inflight[index] = (batch, pendings)
                replica.proposed = True
                self.counters["entries"] += 1
                self.counters["commands"] += len(pendings)

    def _confirm(self, replica: Replica) -> None:
        """N2: by the lease, looked at now, after the rows were; else by a read index."""
        answers, replica.output.confirm = replica.output.confirm, []
        if self._host.lease_valid(replica.range_id) and not chance("lease_not_used"):
            for origin, reply in answers:
                self.answer(origin, reply)
            return
        reached("read_index")
        self._context += 1
        self.counters["read_index_rounds"] += 1
        try:
            self._host.read_index(replica.range_id, self._context)
        except (NotLeader, ProposalDropped):
            for origin, reply in answers:
                self.answer(origin, self.not_leader(reply.id, replica))
            return
        size = sum(answer_bytes(reply) for _, reply in answers)
        self.turn.unconfirmed_bytes += size
        self._held[self._context] = (replica, answers, size)

    def answer(self, asker: Asker, reply: Reply) -> None:
        self.open_requests -= 1
        asker.answer(reply)

    def confirm(self, replica: Replica, answers: list[tuple[Any, Reply]]) -> None:
        """Let these answers go once leadership is confirmed, from now."""
        replica.output.confirm += answers
        self._touched[replica.range_id] = replica

    def touch(self, range_id: int) -> None:
        """Look at this range at the end of the turn."""
        self._touched[range_id] = self.replicas[range_id]

    def look_at_oracle(self, *, advance: bool) -> None:
        self._oracle_client.look(advance=advance)

    def is_refused(self, range_id: int) -> bool:
        """Its log is damaged: it serves nothing."""
        return range_id in self._host.refused

    def ask_oracle(self, request: GetTimestamps, then: Callable[[Reply], None]) -> None:
        """Wherever it is led; through the same queue as everybody's if that is here."""
        meta = self.replicas.get(META_RANGE_ID)
        if meta is not None and meta.evaluator is not None:
            self.open_requests += 1
            self._oracle_client.asked(_Callback(then), request)
        else:
            self._remote.call(META_START, request, then)

    # -- applying; Machine

    def apply(self, group: int, entries: Sequence[Entry]) -> int:
        replica = self.replicas[group]
        overlay, staged_bytes = self._overlay, 0
        for entry in entries:
            staged_bytes -= overlay.bytes
            replica.apply(entry, overlay)
            staged_bytes += overlay.bytes
            self._staged[group] = replica
            full = overlay.bytes > WRITE_BATCH_BYTES_MAX or len(overlay.rows) > WRITE_BATCH_ROWS_MAX
            if full or chance("write_batch_cut"):
                self._write()
                overlay = self._overlay
        return staged_bytes

    def _write(self) -> None:
        overlay = self._overlay
        for replica in self._staged.values():
            replica.stage_row(overlay)
        self.engine.write(overlay.rows)
        self.counters["rows_written"] += len(overlay.rows)
        self._overlay = Overlay(self.engine)

    def finish(self) -> None:
        self._write()
        staged, self._staged = self._staged, {}
        now, counters = self.clock.monotonic(), self.transaction_counters
        for replica in staged.values():
            applied, replica.applied_now = replica.applied_now, []
            evaluator = replica.evaluator
            if replica.range_id == META_RANGE_ID and replica.state.oracle_hi > self.oracle.hi:
                self.oracle.bound_applied(replica.state.oracle_hi)
                self._host.wake()
            if evaluator is None:
                continue
            self._touched[replica.range_id] = replica
            for own in applied:
                commits = counters["commits_one_range_total"]
                parts = counters["parts_prepared_total"]
                evaluator.applied(own.pendings, own.answers, now)
                self.measures.applied(
                    own.pendings,
                    counters["commits_one_range_total"] - commits,
                    counters["parts_prepared_total"] - parts,
                    now,
                )
            if replica.term_started and not evaluator.ready:
                evaluator.start(now)
                if replica.range_id == META_RANGE_ID:
                    self._oracle_client.start_term(evaluator, now)
        self._carry_out(now)

    def settled(self) -> None:
        self.on_settled()
        due = self._deadlines.next()
        self.on_deadline(self._closing_due if due is None else min(due, self._closing_due))

    # -- leadership and reads; Machine

    def leadership(self, group: int, term: int, is_leader: bool) -> None:
        replica = self.replicas[group]
        old = replica.evaluator
        if old is not None:
            old.stop()
            replica.evaluator = None
            replica.inflight.clear()
            self._deadlines.set(group, None)
            output = replica.output
            for origin, reply in output.confirm:
                self.answer(origin, self.not_leader(reply.id, replica))
            for origin, reply in output.replies:
                self.answer(origin, reply)
            output.calls, output.confirm, output.replies = [], [], []
            if group == META_RANGE_ID:
                self._oracle_client.stop_term()
        if is_leader:
            self.leaderships_begun += 1
            replica.term_started = False
            replica.evaluator = Evaluator(
                replica.state, self.engine, replica.output, self.limits, term
            )
            replica.evaluator.counters = self.transaction_counters
            replica.evaluator.turn = self.turn
            replica.evaluator.floor = 0  # until the oracle has said what is held
            replica.told_closed = 0
            replica.evaluator.feed.node = self.polls

    def read_confirmed(self, group: int, contexts: Sequence[int], ok: bool) -> None:  # noqa: ARG002  # the port
        for context in contexts:
            held = self._held.pop(context, None)
            if held is None:
                continue
            replica, answers, size = held
            self.turn.unconfirmed_bytes -= size
            if not ok:
                reached("read_index_failed")
            for origin, reply in answers:
                self.answer(origin, reply if ok else self.not_leader(reply.id, replica))

    def applied(self, group: int) -> tuple[int, int]:
        return self.replicas[group].applied

    def lease_valid(self, group: int) -> bool:
        return self._host.lease_valid(group)

    def installed(self, replica: Replica) -> None:
        """A snapshot is in: what is kept outside the replica follows it."""
        if replica.range_id == META_RANGE_ID:
            self.oracle.hi = max(self.oracle.hi, replica.state.oracle_hi)

    # -- snapshots; Machine

    def snapshot_open(self, group: int) -> RangeSource:
        replica = self.replicas[group]
        assert not self._overlay.rows, "a snapshot is opened between write batches"
        return RangeSource(self.engine, replica.state.row, replica.membership)

    def snapshot_sink(self, group: int, meta: SnapshotMeta) -> RangeSink:
        replica = self.replicas[group]
        if replica.evaluator is not None:
            self.leadership(group, replica.evaluator.term, False)
        return RangeSink(self, replica, meta)

    # -- what others want to know

    def not_leader(self, request_id: int, replica: Replica) -> Failure:
        leader = self.leader_node(replica)
        return Failure(request_id, "not_leader", "", {"leader_node": leader})

    def leader_node(self, replica: Replica) -> int:
        """Where the leader of a range is, as far as this node knows; 0: unknown, or a caretaker (replication, B5)."""
        try:
            raft = self._host.raft(replica.range_id)
        except KeyError:
            return 0
        if raft.is_caretaker:
            return 0
        leader = raft.leader
        for replica_id, node in replica.membership.nodes:
            if replica_id == leader:
                return node
        return 0

    def _directory(self, request_id: int) -> Directory:
        ranges = []
        for replica in self.replicas.values():
            row = replica.state.row
            replicas = [(node, replica_id) for replica_id, node in replica.membership.nodes]
            ranges.append(
                RangeInfo(
                    row.range_id,
                    row.start,
                    row.end,
                    row.version,
                    row.conf_ver,
                    replicas,
                    self.leader_node(replica),
                )
            )
        return Directory(request_id, self.cluster, self.node, ranges, list(self.addresses.items()))
