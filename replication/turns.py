"""The pure parts of a turn: who is due, where messages go, what is applied next, and how the log is synced.

Everything here decides and nothing here acts; `replication/host.py` does what was decided. No clock: `now` is passed
in, monotonic seconds. Nothing iterates over a set; dictionaries keep the order in which things were asked for.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, NamedTuple

from replication.errors import LogMismatch
from replication.messages import AppendRequest, Message
from replication.probes import chance, reached
from replication.snapshot import SnapshotLimits
from replication.types import Entry, HardState, Membership
from replication.wal_groups import GroupLog

SyncMode = Literal["inline", "thread", "auto"]

MIB: Final = 1024 * 1024
MESSAGE_OVERHEAD_BYTES: Final = 64
ENTRY_OVERHEAD_BYTES: Final = 32


@dataclass(frozen=True)
class HostLimits:
    """Bounds of one node's host."""

    inbox_messages_max: int = 50_000
    inbox_bytes_max: int = 64 * MIB
    apply_bytes_max: int = MIB  # of commands, or of the rows that they stage, in one phase; looked at after 16 entries at most
    apply_entries_max: int = 2_000
    log_tail_bytes_max: int = 16 * MIB  # of a group's log in memory, kept for followers that lag
    catch_up_bytes_max: int = 256 * MIB  # for one that gets a snapshot, until it caught up
    held_log_bytes_max: int = 64 * MIB  # of a group's log while its state is being replaced
    carried_bytes_max: int = 1 << 30  # written again in one batch, so that old segments may go
    idle_mark_s: float = 1.0  # after the last write: record how far the log is durable
    ask_again_s: float = 1.0  # for a snapshot, by a replica without state
    timer_s_min: float = 0.0005
    loaded_messages: int = (
        4  # in one turn: under load, a frame saved is worth more than an early one
    )
    snapshot: SnapshotLimits = field(default_factory=SnapshotLimits)


class Deadlines:
    """One heap of deadlines with lazy deletion: an idle key costs nothing, a deadline that moves away costs no push."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._wanted: dict[int, float] = {}  # the deadline that holds
        self._queued: dict[int, float] = {}  # the earliest heap item of the key

    def set(self, key: int, deadline: float | None) -> None:
        """The deadline of `key` is now this; None: it has none."""
        if deadline is None:
            self._wanted.pop(key, None)
            return
        self._wanted[key] = deadline
        queued = self._queued.get(key)
        if queued is None or deadline < queued:
            self._queued[key] = deadline
            heapq.heappush(self._heap, (deadline, key))

    def may_be_due(self, now: float) -> bool:
        """Whether `due` has anything to look at."""
        return bool(self._heap) and self._heap[0][0] <= now

    def due(self, now: float) -> list[int]:
        """Keys whose deadline has come, in order of their deadlines; they have no deadline until it is set again."""
        heap, keys = self._heap, []
        while heap and heap[0][0] <= now:
            queued, key = heapq.heappop(heap)
            if self._queued.get(key) != queued:
                continue  # an earlier item of the same key was used in its place
            del self._queued[key]
            wanted = self._wanted.get(key)
            if wanted is None:
                continue
            if wanted <= now:
                del self._wanted[key]
                keys.append(key)
            else:
                self._queued[key] = wanted
                heapq.heappush(heap, (wanted, key))
        return keys

    def next(self) -> float | None:
        """When to look again: never later than the first deadline, sometimes earlier."""
        return self._heap[0][0] if self._heap else None


class Inbox:
    """Frames of messages that wait for a turn, bounded in messages and in bytes."""

    def __init__(self, messages_max: int, bytes_max: int) -> None:
        self._messages_max, self._bytes_max = messages_max, bytes_max
        self.taken = 0  # messages, by the last turn
        self.frames: list[tuple[int, Sequence[Message]]] = []  # that wait
        self._messages = self._bytes = 0

    def add(self, node: int, messages: Sequence[Message], size_bytes: int = 0) -> bool:
        """One frame from a node; False if there is no room. size_bytes: estimated here if 0."""
        size_bytes = size_bytes or sum(map(message_bytes, messages))
        if (
            self._messages + len(messages) > self._messages_max
            or self._bytes + size_bytes > self._bytes_max
            or chance("inbox_full")
        ):
            reached("inbox_full")
            return False
        self._messages += len(messages)
        self._bytes += size_bytes
        self.frames.append((node, messages))
        return True

    def take(self) -> list[tuple[int, Sequence[Message]]]:
        """Everything that waits."""
        frames, self.frames = self.frames, []
        self.taken = self._messages
        self._messages = self._bytes = 0
        return frames


class Outbox:
    """The messages of a turn, one list for each destination node, in the order in which they were produced."""

    def __init__(self) -> None:
        self.nodes: dict[int, list[Message]] = {}  # that get any

    def add(self, node: int, message: Message) -> None:
        messages = self.nodes.get(node)
        if messages is None:
            self.nodes[node] = [message]
        else:
            messages.append(message)

    def take(self) -> list[tuple[int, list[Message]]]:
        """(node, its messages) for each node that gets any; the outbox is empty afterwards."""
        nodes, self.nodes = self.nodes, {}
        return list(nodes.items())


class Routes:
    """Where the replicas of one group live: by its membership, else by where they were last heard from.

    A blank replica answers a leader before it has any membership, hence the second source; it is bounded.
    """

    HEARD_MAX: Final = 64
    __slots__ = ("_heard", "_membership", "_nodes")

    def __init__(self) -> None:
        self._membership: Membership | None = None
        self._nodes: dict[int, int] = {}
        self._heard: dict[int, int] = {}

    def heard(self, replica: int, node: int) -> None:
        if replica in self._nodes or self._heard.get(replica) == node:
            return
        if len(self._heard) >= self.HEARD_MAX:
            del self._heard[next(iter(self._heard))]
        self._heard[replica] = node

    def node(self, replica: int, membership: Membership) -> int | None:
        """The node of a replica; None if nobody told."""
        if membership is not self._membership:
            self._membership = membership
            self._nodes = dict(membership.nodes)
        node = self._nodes.get(replica)
        return self._heard.get(replica) if node is None else node


class Slice(NamedTuple):
    """What one apply of one group takes, and how many bytes of commands it holds."""

    entries: list[Entry]
    size_bytes: int


class ApplyQueue:
    """Committed entries of one group that wait to be applied, in index order without gaps."""

    __slots__ = ("_entries", "last_index")

    def __init__(self, applied_index: int) -> None:
        self._entries: deque[Entry] = deque()
        self.last_index = applied_index  # of the last entry that is queued or was taken

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entries: Sequence[Entry]) -> None:
        """Entries that the core handed out. What a snapshot already brought is skipped."""
        skip = max(0, self.last_index + 1 - entries[0].index) if entries else 0
        fresh = entries[skip:] if skip else entries
        if fresh:
            assert fresh[0].index == self.last_index + 1, (
                f"a gap before entry {fresh[0].index}; the last is {self.last_index}"
            )
            self._entries.extend(fresh)
            self.last_index = fresh[-1].index

    def take(self, bytes_max: int, entries_max: int) -> Slice:
        """The next entries within the limits, one at least."""
        taken: list[Entry] = []
        size_bytes = 0
        while self._entries and len(taken) < entries_max:
            size = len(self._entries[0].data)
            if taken and size_bytes + size > bytes_max:
                break
            size_bytes += size
            taken.append(self._entries.popleft())
        return Slice(taken, size_bytes)

    def installed(self, index: int) -> None:
        """The state stands at `index` now: drop what it contains."""
        while self._entries and self._entries[0].index <= index:
            self._entries.popleft()
        if not self._entries:
            self.last_index = max(index, self.last_index)


class SyncPolicy:
    """Inline or in a thread, by measurement of what counts: how long the loop waits for a batch to become durable.

    An inline sync stops the loop for as long as the disk takes; a thread's completion waits for the interpreter's lock
    behind a busy loop, often longer than the disk took. `auto` stays inline while the median inline sync is under
    QUICK_S. On a slower disk it tries the thread for PROBE syncs, keeps the way whose median is the shorter, and tries
    the other one again every AGAIN syncs. A disk that took longer than STALL_S for STALLS of the last WINDOW inline syncs
    gets the thread in any case: the loop must not stand still for long, again and again. Once is a hiccup, and not worth
    AGAIN syncs in the thread.
    """

    WINDOW: Final = 64
    PROBE: Final = 32
    AGAIN: Final = 4_000
    QUICK_S: Final = 0.001
    STALL_S: Final = 0.050
    STALLS: Final = 2

    def __init__(self, mode: SyncMode) -> None:
        self.mode = mode
        self.threaded = mode == "thread"
        self.count = 0
        self.switches = 0
        self.durations_s: deque[float] = deque(maxlen=200)  # in the disk's calls, either way
        self._waits: tuple[deque[float], deque[float]] = (
            deque(maxlen=self.WINDOW),
            deque(maxlen=self.WINDOW),
        )  # until the loop went on: inline, in the thread
        self._left = self.PROBE  # syncs until the next decision

    def in_thread(self, creates_segment: bool) -> bool:
        """Whether the next sync goes to the thread; making a segment is slow on any disk."""
        rarely = creates_segment or chance("sync_in_the_thread")
        return self.threaded or (rarely and self.mode == "auto")

    def note(self, duration_s: float, waited_s: float, *, threaded: bool) -> None:
        """One sync: what the disk took (creation of a segment not included), and when the loop could go on."""
        self.durations_s.append(duration_s)
        self.count += 1
        if self.mode != "auto" or threaded != self.threaded:
            return
        inline, _ = self._waits
        self._waits[threaded].append(waited_s)
        self._left -= 1
        if waited_s > self.STALL_S and sum(each > self.STALL_S for each in inline) >= self.STALLS:
            self._go(threaded=True)
            inline.clear()
            self._left = self.AGAIN
        elif self._left <= 0:
            self._decide()

    def _decide(self) -> None:
        own, other = self._waits[self.threaded], self._waits[not self.threaded]
        self._left = self.PROBE
        if not self.threaded and _share(own, 0.5) <= self.QUICK_S:
            other.clear()
        elif len(other) < self.PROBE:
            self._go(threaded=not self.threaded)
        else:
            inline, thread = self._waits
            self._go(threaded=_share(thread, 0.5) < _share(inline, 0.5))
            self._waits[not self.threaded].clear()  # to be measured anew
            self._left = self.AGAIN

    def _go(self, *, threaded: bool) -> None:
        if threaded != self.threaded:
            self.threaded = threaded
            self.switches += 1

    def p99_s(self) -> float:
        """Of the last syncs, 0.0 before the first one."""
        return _share(self.durations_s, 0.99)


def _share(values: Collection[float], share: float) -> float:
    """The value that `share` of them do not exceed; 0.0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def message_bytes(message: Message) -> int:
    """About what a message takes in memory; exact for the commands it carries."""
    if type(message) is not AppendRequest:
        return MESSAGE_OVERHEAD_BYTES
    entries = message.entries
    size_bytes = MESSAGE_OVERHEAD_BYTES + ENTRY_OVERHEAD_BYTES * len(entries)
    for entry in entries:
        size_bytes += len(entry.data)
    return size_bytes


class Start(NamedTuple):
    """With what a core begins. `reset`: the log must be told to begin anew at `log_start`."""

    state: HardState
    log_start: tuple[int, int]
    entries: list[Entry]
    applied: int
    reset: bool

    @property
    def last_term(self) -> int:
        """The term of the last entry, or of the start."""
        return self.entries[-1].term if self.entries else self.log_start[1]


def start_of(
    log: GroupLog | None,
    applied: tuple[int, int],
    *,
    installed: tuple[int, int] = (0, 0),
    installing: bool = False,
) -> Start:
    """Hold what the log says against what the engine says (pitfalls 1 and 19).

    applied: (index, term) that the engine last applied; of no meaning while `installing`. installed: what the last
    snapshot here, or the group's creation, set it to: there the engine may be though the log does not reach it, since
    a crash came between the engine's part and the log's. Commit is within the log and at least applied.
    Raises: LogMismatch.
    """
    found = log if log is not None else GroupLog(HardState(), (0, 0), [])
    state, entries = found.hard_state, found.entries
    first, first_term = found.start
    last, last_term = (entries[-1].index, entries[-1].term) if entries else found.start
    index, term = (first, first_term) if installing else applied
    if first <= index <= last:
        here = first_term if index == first else entries[index - first - 1].term
        if here == term:
            commit = max(index, min(state.commit, last))
            return Start(_at_least(state, last_term, commit), found.start, entries, index, False)
    if applied != installed or index < first:  # the log is cut only below what was flushed
        raise LogMismatch(
            f"the engine has applied up to {index} (term {term}), but the log begins after {first} (term {first_term}) "
            f"and ends at {last} (term {last_term})"
        )
    if log is not None:
        reached("crash_before_the_logs_reset")
    return Start(_at_least(state, term, index), applied, [], index, True)


def _at_least(state: HardState, term: int, commit: int) -> HardState:
    """The state with this commit, and no older than the log's last term."""
    if state.term < term:
        return HardState(term, 0, commit)
    return HardState(state.term, state.vote, commit)


def begin_of(
    log: GroupLog | None,
    replica: int,
    applied: tuple[int, int],
    *,
    installed: tuple[int, int] = (0, 0),
    installing: bool = False,
) -> Start | str:
    """With what a replica begins (see `start_of`), or why it is refused. Raises: LogMismatch."""
    if log is not None:
        if log.faulty:
            reached("entry_rotten")
        if not installing:
            log = _behind_faults(log, applied)
        refusal = refusal_of(log, replica)
        if refusal:
            return refusal
    return start_of(log, applied, installed=installed, installing=installing)


def _behind_faults(log: GroupLog, applied: tuple[int, int]) -> GroupLog:
    """If all damaged entries are in the engine: the log as if it were compacted to there, which it might have been.

    Nothing is asked of those entries again: they are committed, so a leader's are skipped, and a follower that lacks
    them gets a snapshot. The term at the new start must be known, for what follows is checked against it.
    """
    (index, term), (first, start_term) = applied, log.start
    if not log.faulty or not log.faulty[-1].last_index <= index <= first + len(log.entries):
        return log
    if (log.entries[index - first - 1].term if index > first else start_term) != term:
        return log
    reached("rot_below_applied")
    return replace(log, start=applied, entries=log.entries[index - first :], faulty=[])


def refusal_of(log: GroupLog, replica: int) -> str:
    """Why a recovered log cannot serve as it is; empty if it can. Peers repair it, or it is replaced."""
    if log.tombstone >= replica:
        return f"replica {replica} was removed from this node (tombstone {log.tombstone})"
    if log.suspect:
        reached("vote_in_doubt")
        return "records of this group may be lost, its vote included"
    if log.faulty:
        fault = log.faulty[0]
        return (
            f"{log.damaged} damaged entries; the first is {fault.index}, segment {fault.segment} "
            f"offset {fault.offset}"
        )
    return ""
