"""What a leader knows of one follower, and how much it may send.

    PROBE       the place where the logs agree is a guess: one append, then wait for the answer
    REPLICATE   it is known: appends are pipelined ahead of the answers, within a window
    SNAPSHOT    what the follower needs is compacted away: no appends until it has a snapshot

P1. match < next; everything up to match is durable at the follower and equal to the leader's log.
P2. The window is derived from the appends in flight, not counted up and down, so that it cannot leak (pitfall 18):
    bytes in flight are the distance between two marks, and with nothing in flight an append may always be sent.
P3. match never falls, and neither does acked_probe.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import NamedTuple

NEVER = float("-inf")
FOREVER = float("inf")


class State(enum.Enum):
    PROBE = "probe"
    REPLICATE = "replicate"
    SNAPSHOT = "snapshot"


class _Flight(NamedTuple):
    """One append in flight: its last index, and the byte marks before and after it."""

    last_index: int
    begin_bytes: int
    end_bytes: int


class Progress:
    """One follower, in one term of one leader."""

    __slots__ = (
        "_flights",
        "acked_probe",
        "acked_sent_at",
        "append_since_beat",
        "beat_due",
        "check_due",
        "check_now",
        "heard_at",
        "heard_since_beat",
        "match",
        "next",
        "notice_due",
        "paused",
        "sent_commit",
        "snapshot_deadline",
        "snapshot_due",
        "state",
        "timed_at",
        "timed_index",
    )

    def __init__(self, next_index: int) -> None:
        self.state = State.PROBE
        self.match = 0
        self.next = next_index
        self.paused = False  # PROBE: an append is under way and its answer is awaited
        self.acked_probe = 0
        self.acked_sent_at = NEVER  # when the newest acknowledged probe was sent
        self.heard_at = NEVER  # when its last answer of this term came, whatever it answered
        self.sent_commit = (
            0  # the newest commit index that was told, as far as the follower can use it
        )
        self.beat_due = False  # a heartbeat leaves with the next ready
        self.notice_due = False  # the same, only to tell a commit index: no answer is wanted
        self.check_due = False  # if the follower answers a heartbeat, check its log by an append
        self.check_now = True  # send an append even if empty: where does the follower stand?
        self.append_since_beat = False
        self.heard_since_beat = False
        self.snapshot_due = False  # the host has not been asked for the snapshot yet
        self.snapshot_deadline: float | None = None  # sent; if no word comes until then, begin anew
        self.timed_index = 0  # the last index of the one append that is being timed; 0: none
        self.timed_at = 0.0
        self._flights: deque[_Flight] = deque()

    @property
    def entries_in_flight(self) -> int:
        return self.next - 1 - self.match if self._flights else 0

    @property
    def bytes_in_flight(self) -> int:
        flights = self._flights
        return flights[-1].end_bytes - flights[0].begin_bytes if flights else 0

    def may_append(self, entries_max: int, bytes_max: int) -> bool:
        """Whether an append may leave now, by state and window."""
        if self.state is State.REPLICATE:
            flights = self._flights
            return not flights or (
                self.next - 1 - self.match < entries_max
                and flights[-1].end_bytes - flights[0].begin_bytes < bytes_max
            )
        return self.state is State.PROBE and not self.paused

    def sent(self, last_index: int, size_bytes: int) -> None:
        """An append that ends at `last_index` left (or carried nothing: last_index == next - 1)."""
        self.append_since_beat = True
        if self.state is State.PROBE:
            self.paused = True
            return
        if last_index < self.next:
            return
        begin = self._flights[-1].end_bytes if self._flights else 0
        self._flights.append(_Flight(last_index, begin, begin + size_bytes))
        self.next = last_index + 1

    def accepted(self, match: int) -> bool:
        """The follower has everything up to `match` on disk. True if that is news. In any state."""
        flights = self._flights
        while flights and flights[0].last_index <= match:
            flights.popleft()
        news = match > self.match
        if news:
            self.match = match
        if self.next <= match:
            self.next = match + 1
        return news

    def refused(self, rejected_index: int, resume_after: int) -> bool:
        """The follower's log did not match at `rejected_index`; it may match at `resume_after`.

        False if the refusal is stale: it speaks of an append that later answers have overtaken.
        """
        if self.state is State.SNAPSHOT or rejected_index <= self.match:
            return False
        if self.state is State.PROBE and rejected_index != self.next - 1:
            return False
        self.become_probe(min(rejected_index, resume_after + 1))
        return True

    def become_probe(self, next_index: int) -> None:
        self.state = State.PROBE
        self.next = max(self.match + 1, next_index)
        self.paused = False
        self.snapshot_due = False
        self.snapshot_deadline = None
        self.timed_index = 0
        self._flights.clear()

    def become_replicate(self) -> None:
        self.state = State.REPLICATE
        self.next = self.match + 1
        self.paused = False
        self.snapshot_due = False
        self.snapshot_deadline = None
        self._flights.clear()

    def become_snapshot(self) -> None:
        self.state = State.SNAPSHOT
        self.paused = False
        self.snapshot_due = True
        self.snapshot_deadline = None
        self.timed_index = 0
        self._flights.clear()

    def status(self) -> dict[str, object]:
        """For metrics and debugging."""
        return {
            "state": self.state.value,
            "match": self.match,
            "next": self.next,
            "paused": self.paused,
            "entries_in_flight": self.entries_in_flight,
            "bytes_in_flight": self.bytes_in_flight,
            "acked_probe": self.acked_probe,
            "acked_sent_at": self.acked_sent_at,
        }
