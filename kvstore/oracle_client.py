"""A node's way to the timestamp oracle, and the oracle itself where the meta range's leader is.

At most one request is under way; everything that asks meanwhile goes with the next one. A request joins only a batch that
has not been sent: its timestamps are issued after it was made. Where the oracle is led here, there is no round trip: the
batch is answered in the same turn, if the lease holds after the values were made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from kvstore.holds import Holds
from replication.probes import chance, reached
from txn.evaluate import Evaluator
from txn.latches import Pending, Waiter
from txn.messages import Failure, GetTimestamps, Reply, Timestamps

if TYPE_CHECKING:
    from kvstore.replica import Replica
    from kvstore.store import Asker, Store

META_KEY = b"\xff\x00"
META_RANGE_ID = 1
FRESH_MAX = 1 << 16  # timestamps in one request
ASK_AGAIN_S = 0.02

_replace = msgspec.structs.replace


class _Want:
    """What one evaluator needs from one batch."""

    __slots__ = ("evaluator", "pendings", "readers", "replica")

    def __init__(
        self, replica: Replica, evaluator: Evaluator, pendings: list[Pending], readers: list[Waiter]
    ) -> None:
        self.replica = replica
        self.evaluator = evaluator
        self.pendings = pendings
        self.readers = readers


class OracleClient:
    def __init__(self, store: Store, holds: Holds) -> None:
        self.issued = 0  # the largest timestamp that any range of this node was given
        self.floor = 0  # of the same answer: open snapshots see what is there from here on
        self.holds = holds  # of clients, where the oracle is led
        self._store = store
        self._waiting: list[
            tuple[Asker, GetTimestamps]
        ] = []  # of other nodes and clients, for the oracle here
        self._wanting: dict[int, Replica] = {}  # ranges here that want timestamps
        self._in_flight: list[_Want] | None = None
        self._asked_at = 0.0  # what is in flight
        self._look = self._advance = (
            False  # the next round is asked for in any case; with a fresh timestamp
        )
        self._arrived: Timestamps | None = None
        self._not_before = 0.0  # after a failure: not asked again earlier
        self._evaluator: Evaluator | None = None  # of the meta range, while it leads

    # -- the oracle's side

    def start_term(self, evaluator: Evaluator, now: float) -> None:
        self._evaluator = evaluator
        self._store.oracle.hi = max(self._store.oracle.hi, evaluator.state.oracle_hi)
        self._store.oracle.start_term(now)
        self.holds.start_term(now)
        self._raise_bound(now)

    def stop_term(self) -> None:
        self._evaluator = None
        self._store.oracle.stop()
        waiting, self._waiting = self._waiting, []
        for asker, request in waiting:
            self._store.answer(asker, Failure(request.id, "not_leader"))

    def asked(self, asker: Asker, request: GetTimestamps) -> None:
        if self._evaluator is None or not 0 <= request.fresh <= FRESH_MAX:
            replica = self._store.replicas.get(META_RANGE_ID)
            leader = self._store.leader_node(replica) if replica is not None else 0
            details: dict[str, Any] = {"leader_node": leader}
            self._store.answer(asker, Failure(request.id, "not_leader", "", details))
        else:
            if request.session:
                now = self._store.clock.monotonic()
                self.holds.hold(request.session, request.oldest, now)
            self._waiting.append((asker, request))

    def _serve(self, now: float) -> None:
        store, oracle = self._store, self._store.oracle
        assert self._evaluator is not None
        fresh = any(request.fresh for _, request in self._waiting)
        wall_ms = self._raise_bound(now, fresh=fresh)
        answers: list[tuple[Any, Timestamps]] = []
        left: list[tuple[Asker, GetTimestamps]] = []
        for asker, request in self._waiting:
            first = oracle.issue(request.fresh, wall_ms, now) if request.fresh else 0
            if not oracle.serving or (request.fresh and not first):
                left.append((asker, request))
                continue
            answers.append((asker, Timestamps(request.id, oracle.last, first, request.fresh)))
        self._waiting = left
        if answers:
            floor = self.holds.floor(oracle.last, now)
            store.confirm(
                store.replicas[META_RANGE_ID],
                [(asker, _replace(reply, floor=floor)) for asker, reply in answers],
            )

    def _raise_bound(self, now: float, *, fresh: bool = False) -> int:
        """Propose a higher bound when little is left. Returns the wall clock's milliseconds.

        fresh: timestamps are wanted. Who only asks what was issued costs no entry: an idle cluster does not write.
        """
        store = self._store
        wall_ms = store.clock.wall_ms()
        wanted = fresh or not store.oracle.serving
        bound = store.oracle.next_bound(wall_ms, now) if wanted else 0
        if bound:
            assert self._evaluator is not None
            self._evaluator.propose_bound(bound, store.oracle.bound_lost)
            store.touch(META_RANGE_ID)
        return wall_ms

    # -- the node's own wants

    def want(self, replica: Replica) -> bool:
        """The next turn asks for this range. False: that comes by itself, when what is under way is answered."""
        self._wanting[replica.range_id] = replica
        return self._in_flight is None

    @property
    def has_work(self) -> bool:
        """Whether `turn` would do anything if no range were touched."""
        return bool(self._arrived is not None or self._wanting or self._waiting or self._look)

    def look(self, *, advance: bool) -> None:
        """Ask in the next turn, even if nobody here wants a timestamp. advance: take a fresh one, so that time goes on."""
        self._look, self._advance = True, self._advance or advance

    def turn(self, now: float, touched: dict[int, Replica]) -> None:
        """Once a turn: hand out what has arrived, ask for what is wanted, serve if the oracle is here."""
        if self._arrived is not None:
            reply, self._arrived = self._arrived, None
            wants, self._in_flight = self._in_flight or [], None
            self._give(wants, reply, now)
        for number, replica in touched.items():
            evaluator = replica.evaluator
            if evaluator is not None and (evaluator.await_fresh or evaluator.await_read):
                self._wanting[number] = replica
        if (self._wanting or self._look) and self._in_flight is None:
            if now >= self._not_before:
                self._ask(now)
            else:
                self._store.on_deadline(self._not_before)
        if self._waiting and self._evaluator is not None:
            self._serve(now)

    def _ask(self, now: float) -> None:
        store, oracle = self._store, self._store.oracle
        wants: list[_Want] = []
        fresh = 0
        for number in list(self._wanting):
            replica = self._wanting.pop(number)
            evaluator = replica.evaluator
            if evaluator is None or not (evaluator.await_fresh or evaluator.await_read):
                continue
            room = FRESH_MAX - 1 - fresh  # one for `look`
            pendings, evaluator.await_fresh = (
                evaluator.await_fresh[:room],
                evaluator.await_fresh[room:],
            )
            readers, evaluator.await_read = evaluator.await_read, []
            wants.append(_Want(replica, evaluator, pendings, readers))
            fresh += len(pendings)
            if evaluator.await_fresh:  # the rest goes with the next one
                self._wanting[number] = replica
                store.wake()
        if not wants and not self._look:
            return
        fresh += self._advance
        self._look = self._advance = False
        self._asked_at = now
        store.counters["oracle_rounds"] += 1
        if self._evaluator is not None and oracle.serving:
            wall_ms = self._raise_bound(now, fresh=fresh > 0)
            first = oracle.issue(fresh, wall_ms, now) if fresh else 0
            leased = store.lease_valid(META_RANGE_ID) and not chance("oracle_asked_remotely")
            if (first or not fresh) and leased:
                floor = self.holds.floor(oracle.last, now)
                self._give(wants, Timestamps(0, oracle.last, first, fresh, floor), now)
                return
        self._in_flight, self._asked_at = wants, now
        store.ask_oracle(GetTimestamps(0, fresh), self._on_reply)

    def _on_reply(self, reply: Reply) -> None:
        """From the oracle, or a Failure: then the same is asked for again, by whoever still leads."""
        if isinstance(reply, Timestamps):
            self._arrived = reply
            took_s = self._store.clock.monotonic() - self._asked_at
            self._store.measures.oracle_seconds.note(took_s)
        else:
            wants, self._in_flight = self._in_flight or [], None
            for want in wants:
                if want.replica.evaluator is want.evaluator:
                    want.evaluator.silence.ask_again(want.pendings, want.readers)
                    self._wanting[want.replica.range_id] = want.replica
            reached("oracle_silent")
            self._not_before = self._store.clock.monotonic() + ASK_AGAIN_S
        self._store.wake()

    def _give(self, wants: list[_Want], reply: Timestamps, now: float) -> None:
        first = reply.first
        self.floor = reply.floor
        self._store.closer.sample(self._asked_at, reply.read_ts)
        self.issued = max(self.issued, reply.read_ts, first + reply.count - 1)
        for want in wants:
            if want.replica.evaluator is want.evaluator:
                self._store.touch(want.replica.range_id)
                want.evaluator.give_timestamps(
                    want.pendings, first, want.readers, reply.read_ts, now
                )
            first += len(want.pendings)
