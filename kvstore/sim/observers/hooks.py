"""How the observers are attached: each process of a node is watched from the moment its parts are there.

Methods of its own objects are replaced, one by one, by ones that look and go on. The virtual time, the draws and the
order of events stay as they are without observers, but for one timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import kvstore.replica
from kvstore.closing import decode_closed
from kvstore.read_cache import CachedEngine
from kvstore.settings import txn_limits
from kvstore.sim.cluster import Server, SimCluster
from kvstore.sim.observers.answers import Answers
from kvstore.sim.observers.consensus import Consensus, NodeDisk
from kvstore.sim.observers.contents import Contents, EntryRows
from kvstore.sim.observers.locks import Locks
from kvstore.sim.observers.oracle import Timestamps, Views
from kvstore.sim.observers.report import Report
from kvstore.sim.observers.states import compare_states
from kvstore.sim.observers.transactions import Kept, Place, Transactions
from kvstore.sim.process import outside
from kvstore.store import META_RANGE_ID
from kvstore.testing.workloads import Workload
from replication.types import Entry
from txn.commands import Batch
from txn.messages import Prepare, Read, Scan, Validate
from txn.messages import Timestamps as TimestampsReply
from txn.state import Answer, RangeState
from txn.types import TIMESTAMP_SHIFT

LOOK_S: Final = 1.0
CACHE_LOOK_TURNS: Final = 16  # a node's read cache is compared after so many turns that applied, and when a snapshot is in
DECIDED_WITHIN_S: Final = 10.0  # beyond the timers: elections, restarts, what was queued


class Observers:
    """All invariants of one cluster. Make it before the cluster starts; run `watch` as a task of the world, within
    `watching_outcomes`."""

    def __init__(self, cluster: SimCluster) -> None:
        self.cluster = cluster
        self.entries = 0  # applied, on all replicas
        self.report = Report(lambda text: outside(cluster.problem, text))
        self.consensus = Consensus(self.report)
        self.contents = Contents(self.report)
        self.oracle = Timestamps(self.report)
        self.oracle.retention = txn_limits(cluster.config.txn).retention
        self.transactions = Transactions(self.report, self.oracle)
        self.answers = Answers(self.report, self.transactions, lambda: self.oracle.handed_out)
        self.locks = Locks(self.report)
        self.states = 0  # that were judged as a whole (I24)
        self.calm_since: float | None = None
        self.undecided_s = 0.0  # the longest that was seen since
        self._effects: dict[tuple[int, int], tuple[EntryRows, int, Kept]] = {}
        self._time = asyncio.get_running_loop().time
        cluster.on_open.append(self._attach)

    def _attach(self, server: Server) -> None:
        _Node(self, server).attach()

    # -- an entry is applied

    def entry(self, node: str, state: RangeState, entry: Entry) -> None:
        """One entry was applied by a replica; what it wrote was collected by `apply_batch`."""
        index, row = entry.index, state.row
        own, closed_ts, kept = self._effects.pop((row.range_id, index), (None, row.closed_ts, None))
        rows = own.rows if own is not None else {}
        strange = own.strange if own is not None else []
        if self.contents.applied(node, row, index, rows, strange) and own is not None:
            place = Place(row.range_id, index, node)
            self.transactions.applied(place, rows, closed_ts, self._time(), kept)

    @contextmanager
    def watching_outcomes(self) -> Iterator[None]:
        """What an entry writes is seen only from within: apply goes through a batch of its own for each."""
        module: Any = kvstore.replica
        apply_batch = module.apply_batch

        def checked(state: RangeState, overlay: Any, batch: Batch) -> list[Answer]:
            row = state.row
            own = EntryRows(overlay, self.contents.spans(row))
            answers: list[Answer] = apply_batch(state, own, batch)
            own.close()
            kept = Kept(row.start, row.end, row.gc_threshold, row.outcome_horizon)
            self._effects[row.range_id, row.applied_index + 1] = (own, row.closed_ts, kept)
            return answers

        module.apply_batch = checked
        try:
            yield
        finally:
            module.apply_batch = apply_batch

    # -- what is looked at now and then

    def calm(self) -> None:
        """From now on nothing goes wrong any more: everything has to come to its end (I22)."""
        self.calm_since = self._time()

    async def watch(self) -> None:
        """Look at every running node again and again."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        """Memory against rows (I17), ranges against each other (I16), locks (I21), what is undecided against the time (I22)."""
        rows = []
        tables = []
        for server in self.cluster.running():
            node = server.node
            if node is None or node.store is None:
                continue
            if node.host is not None and node.host.failure is not None:
                continue  # it says nothing more, and ends as soon as it runs again (H3)
            for replica in node.store.replicas.values():
                state = replica.state
                rows.append(state.row)
                if replica.evaluator is not None:
                    tables.append(
                        (server.name, state.row.range_id, replica.evaluator.locking.table)
                    )
                if not state.row.installing:
                    self.contents.compare_memory(server.name, state, server.machine.directory.rows)
            self.compare_cache(server)
        self.contents.compare_ranges(rows, self.cluster.range_ids)
        self.locks.look(tables, self._time(), self.calm_since is not None)
        if self.calm_since is not None:
            timers = self.cluster.config.txn
            bound_s = timers.orphan_timer_s + timers.anchor_timer_s + DECIDED_WITHIN_S
            now, ghost = self._time(), self.transactions
            self.undecided_s = max(self.undecided_s, ghost.oldest_undecided(now, self.calm_since))
            ghost.undecided_too_long(now, self.calm_since, bound_s)

    def compare_states(self, workloads: Sequence[Workload]) -> None:
        """What the database has been, version by version (I24). Once the run is over."""
        self.states = compare_states(self.transactions, workloads, self.report)

    def compare_cache(self, server: Server) -> None:
        engine = server.node.engine if server.node is not None else None
        if isinstance(engine, CachedEngine):
            rows = server.machine.directory.rows
            self.contents.compare_cache(server.name, engine.cache.rows, rows)


class _Node:
    """One process of a node."""

    def __init__(self, observers: Observers, server: Server) -> None:
        self._all = observers
        self._server, self._name = server, server.name
        node: Any = server.node
        self._host, self._store = node.host, node.store
        self._disk = NodeDisk()
        self._asked: dict[tuple[Any, int], tuple[Any, int]] = {}  # by asker and id: request, range
        self._asked_at: dict[tuple[Any, int], int] = {}  # of the oracle: handed out by then

    def attach(self) -> None:
        rows = self._server.machine.directory.rows
        boots = self._server.machine.boots
        for group in self._host.groups():
            self._all.consensus.opened(self._name, boots, self._host.raft(group))
        for replica in self._store.replicas.values():
            if not replica.state.row.installing:
                self._all.contents.begins(self._name, replica.state, rows)
                if replica.range_id == META_RANGE_ID:
                    self._all.oracle.found(replica.state.oracle_hi)
        self._watch_host()
        self._watch_log()
        self._watch_store()
        self._watch_answers()
        self._watch_oracle()
        self._watch_closed()

    def _watch_host(self) -> None:
        host, disk, name, consensus = self._host, self._disk, self._name, self._all.consensus
        carry_out, send = host._carry_out, host._peers.send  # noqa: SLF001 - observers look inside

        def checked_carry_out(replica: Any, ready: Any) -> None:
            consensus.ready(name, disk, replica.raft, ready)
            carry_out(replica, ready)

        def checked_send(node: int, messages: Any) -> None:
            consensus.told(name, messages)
            send(node, messages)

        lease_valid, read_index = host.lease_valid, host.read_index

        def checked_lease_valid(group: int) -> bool:
            holds: bool = lease_valid(group)
            if holds:
                consensus.lease_holds(name, host.raft(group))
            return holds

        def checked_read_index(group: int, context: int) -> None:
            consensus.read_asked(host.raft(group), context)
            read_index(group, context)

        host.lease_valid, host.read_index = checked_lease_valid, checked_read_index
        host._carry_out = checked_carry_out  # noqa: SLF001
        host._peers.send = checked_send  # noqa: SLF001

    def _watch_log(self) -> None:
        host, disk, name, consensus = self._host, self._disk, self._name, self._all.consensus
        lane = host._lane  # noqa: SLF001
        take, done, reset = lane.take, lane.done, lane.reset
        machine = self._server.machine

        def checked_take(now: float) -> Any:
            job = take(now)
            if job is not None:
                consensus.sealed(disk)
            return job

        def checked_done(job: Any, seconds: float, *, threaded: bool) -> Any:
            consensus.synced(name, disk, job.batch.number, machine.disk.unsynced(job.batch.segment))
            return done(job, seconds, threaded=threaded)

        def checked_reset(group: int, last: tuple[int, int]) -> None:
            consensus.reset(disk, host.raft(group), last)
            reset(group, last)

        lane.take, lane.done, lane.reset = checked_take, checked_done, checked_reset

    def _watch_store(self) -> None:
        store, host, name, observers = self._store, self._host, self._name, self._all
        trace = observers.cluster.trace
        apply, leadership, installed = store.apply, store.leadership, store.installed
        finish, server, turns = store.finish, self._server, 0
        rows = server.machine.directory.rows

        def checked_apply(group: int, entries: Sequence[Entry]) -> int:
            observers.entries += len(entries)
            observers.consensus.apply(name, host.raft(group), entries)
            state = store.replicas[group].state
            try:
                staged_bytes: int = apply(group, entries)
            finally:  # a write batch may have been cut before the entry at which it failed: those are in the engine
                for entry in entries:
                    if entry.index <= state.row.applied_index:
                        observers.entry(name, state, entry)
            observers.transactions.replica_stands(name, store.replicas[group])
            return staged_bytes

        def checked_leadership(group: int, term: int, is_leader: bool) -> None:
            trace.note("leads" if is_leader else "follows", name, group, term)
            leadership(group, term, is_leader)
            evaluator = store.replicas[group].evaluator
            if evaluator is not None and is_leader:
                self._watch_evaluator(group, evaluator)

        def checked_installed(replica: Any) -> None:
            installed(replica)
            observers.contents.begins(name, replica.state, rows)
            observers.compare_cache(server)

        def checked_finish() -> None:
            nonlocal turns
            finish()
            turns += 1
            if turns % CACHE_LOOK_TURNS == 0:
                observers.compare_cache(server)

        store.apply, store.leadership = checked_apply, checked_leadership
        store.installed, store.finish = checked_installed, checked_finish

    def _watch_evaluator(self, group: int, evaluator: Any) -> None:
        step, asked, transactions = evaluator.step, self._asked, self._all.transactions
        name = self._name

        def checked_step(request: Any, origin: Any, now: float) -> None:
            if (
                request.id or type(request) is Validate
            ):  # else a hint: its answer reaches nobody, and several have this id
                asked[origin, request.id] = (request, group)
            if type(request) is Prepare:
                transactions.asked(name, request)
            step(request, origin, now)

        evaluator.step = checked_step

    def _watch_answers(self) -> None:
        store, asked, name = self._store, self._asked, self._name
        answer, answers, oracle = store.answer, self._all.answers, self._all.oracle

        def checked_answer(asker: Any, reply: Any) -> None:
            question = asked.pop((asker, reply.id), None)
            if question is not None:
                request, group = question
                answers.told(name, group, store.replicas[group].state.row.end, request, reply)
            elif type(reply) is TimestampsReply:
                oracle.handed(name, reply, self._asked_at.pop((asker, reply.id), 0))
            answer(asker, reply)

        store.answer = checked_answer

    def _watch_oracle(self) -> None:
        store, name, oracle = self._store, self._name, self._all.oracle
        client = store._oracle_client  # noqa: SLF001
        issue, asked = store.oracle.issue, client.asked
        ask, give = client._ask, client._give  # noqa: SLF001
        asked_at = 0

        def checked_issue(count: int, wall_ms: int, now: float) -> int:
            first: int = issue(count, wall_ms, now)
            if first:
                oracle.issued(name, first, count)
            return first

        def checked_asked(asker: Any, request: Any) -> None:
            # A request that is repeated is one question, from when it was first asked: any copy's answer answers it.
            self._asked_at.setdefault((asker, request.id), oracle.handed_out)
            asked(asker, request)

        def checked_ask(now: float) -> None:
            nonlocal asked_at
            asked_at = oracle.handed_out
            ask(now)

        def checked_give(wants: Any, reply: Any, now: float) -> None:
            oracle.handed(name, reply, asked_at)
            give(wants, reply, now)

        store.oracle.issue, client.asked = checked_issue, checked_asked
        client._ask, client._give = checked_ask, checked_give  # noqa: SLF001
        self._watch_holds(client.holds)

    def _watch_holds(self, holds: Any) -> None:
        hold, floor = holds.hold, holds.floor
        kept_s = self._all.cluster.config.txn.snapshot_hold_s
        views = Views(self._all.report, self._name, int(kept_s * 1000) << TIMESTAMP_SHIFT)

        def checked_hold(session: int, oldest: int, now: float) -> None:
            views.held(session, oldest, now)
            hold(session, oldest, now)

        def checked_floor(issued: int, now: float) -> int:
            found: int = floor(issued, now)
            views.floored(found, issued, now)
            return found

        holds.hold, holds.floor = checked_hold, checked_floor

    def _watch_closed(self) -> None:
        """Promises as they leave and as they are heard; reads that replicas may answer alone."""
        store, name, transactions = self._store, self._name, self._all.transactions
        send, heard, dispatch = store.send_closed, store.closer.heard, store._dispatch  # noqa: SLF001
        asked = self._asked

        def checked_send(node: int, payload: bytes) -> None:
            for told in decode_closed(payload):
                transactions.promised(told.range_id, told.closed_ts)
                transactions.replica_stands(name, store.replicas[told.range_id])
            send(node, payload)

        def checked_heard(replica: Any, told: Any) -> None:
            heard(replica, told)
            if not replica.state.row.installing:
                transactions.replica_stands(name, replica)

        def checked_dispatch(asker: Any, request: Any, now: float) -> None:
            if isinstance(request, Read | Scan) and request.stale is not None:
                replica = store.replicas.get(request.range_id)
                if replica is not None:
                    asked[asker, request.id] = (request, replica.range_id)
            dispatch(asker, request, now)

        store.send_closed, store.closer.heard, store._dispatch = (  # noqa: SLF001
            checked_send,
            checked_heard,
            checked_dispatch,
        )
