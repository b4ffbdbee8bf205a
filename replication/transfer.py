"""Snapshots on their way: the streams of one node, sending and receiving, a slice at a time.

Driven by the host's turn (`work`), never by a task of its own. At most one stream goes to a node at a time; nodes take
turns by chunk; a slice is a few chunks or one millisecond. What a stream says is in `replication/snapshot.py`.

- T1 a replica's state is touched only after the stream's offer was found acceptable: newer than what is committed
  here, from a leader of this term or a later one; or anything recent enough, if the state is lost already.
- T2 from then on the group applies nothing; if the stream fails, its state is lost (`Owner.lost`), the
  replica goes on voting with its log and asks for another snapshot.
- T3 the sender hears of success only when the state is flushed and the log says so durably.
- T4 what is given to a connection that ends may be lost, and nobody says so: a stream begins anew, credit is given again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from replication.errors import FrameError
from replication.ports import Clock, Machine, Peers, SnapshotSink, SnapshotSource
from replication.probes import chance, reached
from replication.snapshot import (
    Chunk,
    End,
    Frame,
    Offer,
    SnapshotBroken,
    SnapshotLimits,
    SnapshotReceiver,
    SnapshotSender,
    Throttle,
    Wanted,
    decode,
    encode,
)
from replication.trials import Trials

SLICE_S: Final = 0.001
SLICE_CHUNKS: Final = 2  # also where the clock stands still within a turn
RETRY_S: Final = 0.01  # after a node's queue was full
UNSAID_MAX: Final = (
    256  # answers to a node whose queue was full; the oldest go, and their streams time out
)


class Owner(Protocol):
    """What the streams ask of the host."""

    def term(self, group: int) -> int:
        """The term in which this node leads the group, with a state to give away; 0 if it does not."""

    def route(self, group: int, replica: int) -> tuple[int, int] | None:
        """(this node's replica id, the other replica's node); None if unknown."""

    def refusal(self, group: int, offer: Offer) -> str:
        """Why the core would not take this snapshot; empty if it would."""

    def begins(self, group: int) -> None:
        """The group's state is about to be replaced: apply nothing."""

    def lost(self, group: int) -> None:
        """The stream failed after it began: the group has no state any more."""

    def arrived(self, group: int, offer: Offer, done: Callable[[], None]) -> None:
        """The state is durable in the engine. Do the log's part, then call `done`."""

    def sends(self, group: int, replica: int, index: int) -> None:
        """A stream to that replica begins; the state in it stands at `index`."""

    def sent(self, group: int, replica: int, ok: bool) -> None:
        """It ended, or could not begin."""

    def unreadable(self, group: int) -> None:
        """The group's state here could not be read: another replica has to lead, and send its own."""

    def readable(self, group: int) -> None:
        """It has been read from its first row to its last since."""

    def run_blocking(self, work: Callable[[], None], then: Callable[[], None]) -> None:
        """Do `work` away from the loop where there is one, and `then` on it. Failure is fatal."""


class _Sending:
    __slots__ = ("retry_at", "sender", "source", "unsent")

    def __init__(self, sender: SnapshotSender, source: SnapshotSource) -> None:
        self.sender, self.source = sender, source
        self.unsent: bytes | None = None
        self.retry_at: float | None = None


class _Receiving:
    __slots__ = ("finishing", "receiver", "sink")

    def __init__(self, receiver: SnapshotReceiver, sink: SnapshotSink) -> None:
        self.receiver, self.sink = receiver, sink
        self.finishing = False


class Transfers:
    """All snapshot streams of a node. See the module for the rules."""

    def __init__(
        self,
        owner: Owner,
        *,
        machine: Machine,
        peers: Peers,
        clock: Clock,
        first_id: int,
        limits: SnapshotLimits,
    ) -> None:
        self._owner, self._machine, self._peers, self._clock = owner, machine, peers, clock
        self._limits = limits
        self._next_id = first_id
        self._waiting: dict[tuple[int, int], int] = {}  # (group, replica) -> node, in order
        self._sending: dict[int, _Sending] = {}  # by node
        self._receiving: dict[int, _Receiving] = {}  # by group
        self._throttle = Throttle(limits.rate_bytes_s, limits.burst_bytes)
        self._inbox: deque[tuple[int, bytes]] = deque()
        self._unsaid: dict[int, deque[tuple[float, bytes]]] = {}  # by node: until when, what
        self._say_at = 0.0
        self.trials = Trials(machine, owner.readable)
        self.counters = {
            "snapshots_sent": 0,
            "snapshots_failed": 0,
            "snapshots_installed": 0,
            "snapshots_refused": 0,
            "snapshots_lost": 0,
            "snapshot_frames_bad": 0,
            "snapshot_answers_dropped": 0,
            "snapshot_bytes_sent": 0,  # of rows, as are those received
            "snapshot_bytes_received": 0,
        }

    # ------------------------------------------------------------ asked by the host

    @property
    def busy(self) -> bool:
        """Whether `work` has, or will have, anything to do."""
        return bool(
            self._inbox
            or self._sending
            or self._receiving
            or self._waiting
            or self._unsaid
            or self.trials
        )

    def send(self, group: int, replica: int, node: int) -> None:
        """Send the group's state to a replica, when it is that node's turn. Asking again changes nothing."""
        key = (group, replica)
        current = self._sending.get(node)
        if current is None or (current.sender.group, current.sender.offer.to) != key:
            self._waiting.setdefault(key, node)

    def receive(self, node: int, payload: bytes) -> None:
        """A frame arrived. Beyond the bound it is dropped, and its stream fails for want of it."""
        if len(self._inbox) < self._limits.inbox_frames_max:
            self._inbox.append((node, payload))
        else:
            self.counters["snapshot_frames_bad"] += 1

    def link_lost(self, node: int) -> None:
        """The connection to a node has ended, and what was given to it last may not have arrived: a stream to there begins
        anew, and what its own streams were told is said again.
        """
        sending = self._sending.get(node)
        if sending is not None and not (sending.sender.offered and sending.unsent is not None):
            reached("snapshot_link_lost")
            sending.sender.fail("the connection ended")
        for receiving in self._receiving.values():
            if receiving.receiver.node == node:
                self._say(node, receiving.receiver.credited())

    def ask(self, group: int, own: int, leader: int, node: int) -> None:
        """This node's replica has lost its state: ask the leader for a snapshot."""
        self._peers.send_snapshot_chunk(node, encode(Wanted(group, leader, own)))

    def receiving(self, group: int) -> bool:
        return group in self._receiving

    def drop_group(self, group: int) -> None:
        """The group goes away from this node: its streams end."""
        self.trials.drop(group)
        for key in [key for key in self._waiting if key[0] == group]:
            del self._waiting[key]
        for sending in [s for s in self._sending.values() if s.sender.group == group]:
            self._end_sending(sending, tell=False)
        receiving = self._receiving.pop(group, None)
        if receiving is not None and not receiving.finishing:
            receiving.sink.abort()

    def close(self) -> None:
        """Give up everything that is open. What was not finished leaves its marker behind."""
        for sending in self._sending.values():
            sending.source.close()
        for receiving in self._receiving.values():
            if not receiving.finishing:
                receiving.sink.abort()
        self._sending, self._receiving, self._waiting = {}, {}, {}
        self._inbox.clear()
        self._unsaid.clear()
        self.trials.close()

    def deadline(self) -> float | None:
        """When `work` should be called even if nothing arrives."""
        times: list[float] = [self._say_at] if self._unsaid else []
        for sending in self._sending.values():
            times.extend(t for t in (sending.retry_at, sending.sender.deadline()) if t is not None)
        for receiving in self._receiving.values():
            at = receiving.receiver.deadline()
            if at is not None:
                times.append(at)
        trial_at = self.trials.deadline()
        if trial_at is not None:
            times.append(trial_at)
        return min(times, default=None)

    def work(self, now: float) -> bool:
        """One slice. Returns whether there is more to do at once."""
        for _ in range(SLICE_CHUNKS):
            if self._inbox:
                node, payload = self._inbox.popleft()
                self._take(node, payload, now)
        self._expire(now)
        if self._unsaid:
            self._say_again(now)
        for receiving in self._receiving.values():
            credit = receiving.receiver.credit(now)
            if credit is not None:
                self._say(receiving.receiver.node, credit)
        self._begin_sends(now)
        more = self._pump(now)
        if self.trials:
            self.trials.work(now)
        return more or bool(self._inbox)

    # ------------------------------------------------------------ sending

    def _begin_sends(self, now: float) -> None:
        for (group, replica), node in list(self._waiting.items()):
            if node in self._sending:
                continue
            del self._waiting[group, replica]
            term = self._owner.term(group)
            route = self._owner.route(group, replica)
            if not term or route is None:  # no leader any more: the next one decides for itself
                self._owner.sent(group, replica, False)
                continue
            source = self._machine.snapshot_open(group)
            offer = Offer(replica, route[0], term, source.meta)
            sender = SnapshotSender(
                group=group,
                snapshot=self._next_id,
                node=node,
                offer=offer,
                limits=self._limits,
                now=now,
            )
            self._next_id += 1
            self._sending[node] = _Sending(sender, source)
            self._owner.sends(group, replica, source.meta.index)

    def _pump(self, now: float) -> bool:
        """Send some chunks, round robin over the nodes. Returns whether there is more to send at once."""
        chunks = 0
        while chunks < SLICE_CHUNKS:
            sent_before = chunks
            for node, sending in list(self._sending.items()):
                if chunks < SLICE_CHUNKS and self._send_one(node, sending, now):
                    chunks += 1
                    if self._sending.get(node) is sending:  # to the end of the line
                        self._sending[node] = self._sending.pop(node)
            if chunks == sent_before:
                return False
            if self._clock.monotonic() - now > SLICE_S:
                break
        return any(
            sending.unsent is None and sending.sender.may_send()
            for sending in self._sending.values()
        )

    def _send_one(self, node: int, sending: _Sending, now: float) -> bool:
        """Send one frame of a stream; False if it may not, or the node's queue is full."""
        sender = sending.sender
        if sending.unsent is None:
            if not sender.may_send():
                return False
            data: bytes | None = None
            if not sender.offering:
                try:
                    data = sending.source.chunk()
                except Exception as error:  # noqa: BLE001  # unreadable rows end this stream, not the node
                    sender.fail(f"cannot read: {error}")
                    self._end_sending(sending)
                    self.trials.failed(sender.group, now)
                    self._owner.unreadable(sender.group)
                    return False
            sending.unsent = sender.next_frame(data, now)
            self.counters["snapshot_bytes_sent"] += len(data or b"")
        elif sending.retry_at is not None and now < sending.retry_at:
            return False
        if chance("snapshot_queue_full") or not self._peers.send_snapshot_chunk(
            node, sending.unsent
        ):
            sending.retry_at = now + RETRY_S
            return False
        sending.unsent = sending.retry_at = None
        return True

    def _end_sending(self, sending: _Sending, *, tell: bool = True) -> None:
        sender = sending.sender
        del self._sending[sender.node]
        sending.source.close()
        self.counters["snapshots_sent" if sender.outcome else "snapshots_failed"] += 1
        if tell:
            self._owner.sent(sender.group, sender.offer.to, bool(sender.outcome))

    # ------------------------------------------------------------ receiving

    def _take(self, node: int, payload: bytes, now: float) -> None:
        try:
            frame = decode(payload)
        except FrameError:
            self.counters["snapshot_frames_bad"] += 1
            return
        if isinstance(frame, Chunk):
            self._take_chunk(node, frame, now)
        elif isinstance(frame, Wanted):
            route = self._owner.route(frame.group, frame.sender)
            if route == (frame.to, node) and self._owner.term(frame.group):
                self.send(frame.group, frame.sender, node)
        else:
            sending = self._sending.get(node)
            if sending is not None:
                sending.sender.receive(frame, now)
                if sending.sender.outcome is not None:
                    self._end_sending(sending)

    def _take_chunk(self, node: int, chunk: Chunk, now: float) -> None:
        if chunk.sequence == 0:
            self._take_offer(node, chunk, now)
            return
        receiving = self._receiving.get(chunk.group)
        if (
            receiving is None
            or receiving.receiver.node != node
            or receiving.receiver.snapshot != chunk.snapshot
        ):
            self._say(node, End(chunk.group, chunk.snapshot, False, "no such stream"))
            return
        if receiving.finishing:  # all rows are in, and the machine is told so
            self.counters["snapshot_frames_bad"] += 1
            return
        receiver = receiving.receiver
        try:
            data = receiver.receive(chunk, now)
        except SnapshotBroken as error:
            reached("snapshot_broken")
            self._lose(receiving, str(error))
            return
        self.counters["snapshot_bytes_received"] += len(data)
        if data:
            receiving.sink.chunk(data)
        receiver.taken(self._throttle.take(len(data), now))
        if receiver.complete:
            self._finish(receiving)

    def _take_offer(self, node: int, chunk: Chunk, now: float) -> None:
        group = chunk.group
        try:
            receiver = SnapshotReceiver(chunk, node, self._limits, now)
        except SnapshotBroken:
            self.counters["snapshot_frames_bad"] += 1
            return
        refusal = self._owner.refusal(group, receiver.offer)
        current = self._receiving.get(group)
        if not refusal and current is not None:
            newer = receiver.offer.term > current.receiver.offer.term
            restarted = current.receiver.node == node
            if current.finishing or not (newer or restarted):
                refusal = "another snapshot is arriving"
        elif not refusal and len(self._receiving) >= self._limits.receiving_max:
            refusal = "busy"
        if refusal:
            reached("snapshot_refused")
            self.counters["snapshots_refused"] += 1
            self._say(node, End(group, chunk.snapshot, False, refusal))
            return
        if current is not None:
            reached("snapshot_replaced")
            self._lose(current, "replaced by a newer stream")
        self._owner.begins(group)
        sink = self._machine.snapshot_sink(group, receiver.offer.meta)
        self._receiving[group] = _Receiving(receiver, sink)

    def _finish(self, receiving: _Receiving) -> None:
        receiver, sink = receiving.receiver, receiving.sink
        receiving.finishing = True
        sink.finish()

        def log_is_durable() -> None:
            if self._receiving.get(receiver.group) is receiving:
                del self._receiving[receiver.group]
            self.trials.drop(receiver.group)  # other rows now
            reached("snapshot_installed")
            self.counters["snapshots_installed"] += 1
            self._say(receiver.node, End(receiver.group, receiver.snapshot, True))

        def state_is_durable() -> None:
            self._owner.arrived(receiver.group, receiver.offer, log_is_durable)

        self._owner.run_blocking(sink.flush, state_is_durable)

    def _lose(self, receiving: _Receiving, reason: str) -> None:
        receiver = receiving.receiver
        del self._receiving[receiver.group]
        receiving.sink.abort()
        self.counters["snapshots_lost"] += 1
        self._say(receiver.node, End(receiver.group, receiver.snapshot, False, reason))
        self._owner.lost(receiver.group)

    def _expire(self, now: float) -> None:
        for sending in list(self._sending.values()):
            sending.sender.tick(now)
            if sending.sender.outcome is not None:
                self._end_sending(sending)
        for receiving in list(self._receiving.values()):
            if receiving.receiver.expired(now):
                self._lose(receiving, "no progress")

    def _say(self, node: int, frame: Frame) -> None:
        """An answer: kept and said again if the node's queue is full, while the other side may still wait for it."""
        payload, waiting = encode(frame), self._unsaid.get(node)
        if waiting is None:
            if self._peers.send_snapshot_chunk(node, payload):
                return
            waiting = self._unsaid[node] = deque()
        if len(waiting) == UNSAID_MAX:
            self.counters["snapshot_answers_dropped"] += 1
            waiting.popleft()
        waiting.append((self._clock.monotonic() + self._limits.timeout_s, payload))

    def _say_again(self, now: float) -> None:
        """To each node what it has room for now; what nobody waits for any more is dropped."""
        if now < self._say_at:
            return
        for node, waiting in list(self._unsaid.items()):
            while waiting:
                until, payload = waiting[0]
                if now >= until:
                    self.counters["snapshot_answers_dropped"] += 1
                elif not self._peers.send_snapshot_chunk(node, payload):
                    break
                waiting.popleft()
            else:
                del self._unsaid[node]
        self._say_at = now + RETRY_S
