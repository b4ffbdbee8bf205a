"""A node's clock of closed timestamps, and the reads that its replicas answer alone (txn/closed.py has the rules).

Once an interval the node looks at what the oracle has issued, closes what was issued `lag_s` ago in the ranges that it leads,
and tells their followers: in the entries of ranges that have any, else in one message for each node, of the ranges that have
news. A node where nothing happens looks four times less often, and tells what has not changed every REPEAT_S, since a message
may have been lost: so an idle cluster does next to nothing.

What the oracle said is remembered with the time at which it was asked. So the node knows how stale an answer is without
anybody's wall clock: everything that was acknowledged before the question has a timestamp at or below the answer.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import msgspec

from kvstore.oracle_client import META_RANGE_ID
from replication.errors import FrameError
from replication.probes import reached
from txn.closed import REPLICA_BEHIND, behind, read_here
from txn.messages import Ack, Failure, Read, Reply, Scan, too_wide

if TYPE_CHECKING:
    from kvstore.replica import Replica
    from kvstore.store import Store
    from txn.mvcc import Budget

INTERVAL_S: Final = 0.25
IDLE_FACTOR: Final = 4  # of the interval, when nothing has happened for IDLE_AFTER_S
IDLE_AFTER_S: Final = 5.0
ADVANCE_S: Final = 2.5  # two rounds at least: the oracle's bound first, then its time
REPEAT_S: Final = 5.0  # what a follower was told already is told again, once in so long
SAMPLES_MAX: Final = 512  # more than enough for a week
AGE_SHARE: Final = 32

_replace = msgspec.structs.replace


class Closed(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A leader of `term`, when it had applied `index`, had closed `closed_ts`."""

    range_id: int
    term: int
    index: int
    closed_ts: int


_encode = msgspec.msgpack.Encoder().encode
decode_closed = msgspec.msgpack.Decoder(list[Closed]).decode


class Samples:
    """What the oracle had issued, and when it was asked for that: both rise."""

    def __init__(self) -> None:
        self._asked_at: list[float] = []
        self._issued: list[int] = []

    def add(self, asked_at: float, issued: int, apart_s: float) -> None:
        """One answer; kept if it is at least `apart_s` younger than the last one that was."""
        times = self._asked_at
        if times and (asked_at < times[-1] + apart_s or issued < self._issued[-1]):
            return
        times.append(asked_at)
        self._issued.append(issued)
        if len(times) > SAMPLES_MAX:
            self._thin_out()

    def _thin_out(self) -> None:
        """The older, the fewer: a bound or a lag of hours needs no more than about one in AGE_SHARE of it."""
        every = list(zip(self._asked_at, self._issued, strict=True))
        newest, kept = every[-1][0], every[:1]
        for sample, (following, _) in pairwise(every[1:]):
            if following - kept[-1][0] > (newest - sample[0]) / AGE_SHARE:
                kept.append(sample)
        kept = [*kept, every[-1]][-(SAMPLES_MAX * 7 // 8) :]
        self._asked_at, self._issued = [at for at, _ in kept], [issued for _, issued in kept]

    def __len__(self) -> int:
        return len(self._asked_at)

    @property
    def last_asked_at(self) -> float:
        return self._asked_at[-1] if self._asked_at else float("-inf")

    def before(self, when: float) -> int:
        """The newest timestamp that is known to have been issued by `when`; 0: none."""
        place = bisect_right(self._asked_at, when)
        return self._issued[place - 1] if place else 0

    def since(self, when: float) -> int:
        """At or above everything that was acknowledged before `when`, and no newer than need be; 0: nothing is known."""
        place = bisect_left(self._asked_at, when)
        return self._issued[place] if place < len(self._issued) else 0


class _Unconfirmed:
    """What is to be told of a range once its leadership is confirmed; an answer like any other to whom that holds up."""

    __slots__ = ("_closer", "_message", "_replica")

    def __init__(self, closer: Closer, replica: Replica, message: Closed) -> None:
        self._closer, self._replica, self._message = closer, replica, message

    def answer(self, reply: Reply) -> None:
        if not isinstance(reply, Failure):  # else it leads no more, and a successor tells
            told: dict[int, list[Closed]] = {}
            self._closer.confirmed(self._replica, self._message, told)
            self._closer.send(told)


class Closer:
    """See the module. `turn` is called once a turn of the node, `hear` for each message of a peer."""

    def __init__(self, store: Store, lag_s: float) -> None:
        self.samples = Samples()
        self.counters = {"messages": 0, "ranges_told": 0}
        self._store, self._lag_s = store, lag_s
        self._due = float("-inf")
        self._busy_until = float("-inf")
        self._advanced_at = float("-inf")

    def busy(self, now: float) -> None:
        """Somebody reads at replicas here, or writes: closed timestamps should be young."""
        self._busy_until = now + IDLE_AFTER_S

    def sample(self, asked_at: float, issued: int) -> None:
        self.samples.add(asked_at, issued, INTERVAL_S / 2)

    def turn(self, now: float) -> float:
        """Do what is due. Returns when the next turn is needed."""
        if now >= self._due:
            self._round(now)
            self._due = now + INTERVAL_S * (1 if now < self._busy_until else IDLE_FACTOR)
        return self._due

    def _round(self, now: float) -> None:
        store = self._store
        upto = self.samples.before(now - self._lag_s)
        told: dict[int, list[Closed]] = {}
        starved = False
        for replica in store.replicas.values():
            evaluator = replica.evaluator
            if evaluator is None or not evaluator.ready:
                continue
            if (
                replica.range_id != META_RANGE_ID
            ):  # it logs the oracle's bound alone, which is no garbage
                starved = starved or evaluator.collector.starved
            closed_ts = evaluator.closing.close(upto)
            if replica.proposed:  # the next entry tells it; if there is none, the next round does
                replica.proposed = False
                self.busy(now)
            elif closed_ts > replica.told_closed or now >= replica.told_at + REPEAT_S:
                self._tell(replica, closed_ts, now, told)
        self.send(told)
        self._look(now, starved)

    def _tell(
        self, replica: Replica, closed_ts: int, now: float, told: dict[int, list[Closed]]
    ) -> None:
        evaluator = replica.evaluator
        assert evaluator is not None
        replica.told_closed, replica.told_at = closed_ts, now
        message = Closed(replica.range_id, evaluator.term, replica.applied[0], closed_ts)
        if self._confirmed(replica.range_id):  # F2: asked after the timestamp was chosen
            self.confirmed(replica, message, told)
            return
        reached("closed_without_a_lease")  # perhaps for the rest of the term, after a hand-over
        self._store.open_requests += 1
        self._store.confirm(replica, [(_Unconfirmed(self, replica, message), Ack(0))])

    def confirmed(self, replica: Replica, message: Closed, told: dict[int, list[Closed]]) -> None:
        """Leadership was confirmed since the timestamp was chosen: put the message into `told`, by node."""
        for _, node in replica.membership.nodes:
            if node != self._store.node:
                told.setdefault(node, []).append(message)
        replica.heard.hear(message.index, message.closed_ts, replica.state.row)

    def send(self, told: dict[int, list[Closed]]) -> None:
        for node, ranges in told.items():
            self.counters["messages"] += 1
            self.counters["ranges_told"] += len(ranges)
            self._store.send_closed(node, _encode(ranges))

    def _confirmed(self, range_id: int) -> bool:
        return self._store.lease_valid(range_id)

    def _look(self, now: float, starved: bool) -> None:
        """Ask what is issued, unless that is known. An oracle that nobody writes through stands still: it is moved on, now and
        then, for a range that waits for its garbage to grow old."""
        store = self._store
        if starved and now >= self._advanced_at + store.limits.sweep_s:
            self._advanced_at = now
        advance = starved and now < self._advanced_at + ADVANCE_S
        if advance or now >= self.samples.last_asked_at + INTERVAL_S:
            store.look_at_oracle(advance=advance)

    def hear(self, payload: bytes) -> None:
        """From a peer. Raises FrameError if it is no such message."""
        try:
            ranges = decode_closed(payload)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise FrameError(f"closed timestamps do not decode: {error}") from error
        for each in ranges:
            replica = self._store.replicas.get(each.range_id)
            if replica is not None:
                self.heard(replica, each)

    def heard(self, replica: Replica, told: Closed) -> None:
        if told.term < replica.applied[1]:
            reached("closed_by_an_earlier_leader")  # true all the same (F2), and old
            return
        replica.heard.hear(told.index, told.closed_ts, replica.state.row)


class ReplicaReads:
    """Reads with `stale` set, at any replica of this node. budget: what they look at is taken from it."""

    def __init__(self, store: Store, closer: Closer, budget: Budget | None = None) -> None:
        self.counters = {"served": 0, "refused": 0}
        self._store, self._closer, self._budget = store, closer, budget

    def read(self, replica: Replica, request: Read | Scan, now: float) -> Reply | Read | Scan:
        """The answer; or the request for this node's leader of the range, which can answer within the bound."""
        stale = request.stale
        assert stale is not None
        refusal = too_wide(request)
        if refusal is not None:
            return refusal
        self._closer.busy(now)
        row = replica.state.row
        if row.installing or replica.receiving or self._store.is_refused(replica.range_id):
            if stale.last:  # its client takes this node for the leader, and has to hear better
                return self._store.not_leader(request.id, replica)
            return Failure(request.id, REPLICA_BEHIND, "the replica has no state to read from")
        (safe, kept), floor = self._safe(replica, stale.ranges), request.at
        if not floor:
            asked_for = self._closer.samples.since(now - stale.ms / 1000)
            floor = max(stale.at_least, asked_for, kept)
            known = self._closer.samples.last_asked_at >= now - stale.ms / 1000
            if not known or safe < floor:
                return self._elsewhere(replica, request, safe, floor if known else 0)
        reply = read_here(replica.state, self._store.engine, request, safe, self._budget)
        if isinstance(reply, Failure) and reply.code == REPLICA_BEHIND:
            return self._elsewhere(replica, request, safe, floor)
        self.counters["served"] += 1
        return reply

    def _safe(self, replica: Replica, others: list[int]) -> tuple[int, int]:
        """What they are all safe up to; and from where on they have all that was there."""
        safe, kept = replica.safe_ts, replica.state.row.gc_threshold
        for number in others:
            other = self._store.replicas.get(number)
            if other is not None and not other.state.row.installing:
                safe = min(safe, other.safe_ts)
                kept = max(kept, other.state.row.gc_threshold)
        return safe, kept

    def _elsewhere(
        self, replica: Replica, request: Read | Scan, safe: int, floor: int
    ) -> Reply | Read | Scan:
        """The leader reads at the oldest timestamp within the bound, so that the next answer may come from a replica again."""
        if replica.evaluator is not None:
            reached("stale_read_at_the_leader")
            return _replace(request, at=floor)
        self.counters["refused"] += 1
        assert request.stale is not None
        if request.stale.last:
            return self._store.not_leader(request.id, replica)
        return behind(request.id, safe, floor)


__all__ = ["Closed", "Closer", "ReplicaReads", "Samples", "decode_closed"]
