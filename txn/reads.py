"""Reads and scans at a leader (DESIGN.md sections 4.2 and 7).

A read gets its timestamp first, waits for the writers that were latched when it came, and looks; about an undecided intent
at or below its timestamp its anchor is asked. Every answer rests on what was *not* seen, so leadership is confirmed after it.

All reads of a node share what one turn has for them (`Turn`), since they may look at a thousand rows each, or at megabytes:
T1 what is looked at in one turn takes tens of milliseconds, and its answers have megabytes, whoever asks for how much.
T2 who is put off goes on in later turns, before newcomers and in the order in which they were put off, whatever their range.
   They keep their timestamp and their place among the latches (`Waiter.sequence`), so they see what they would have seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from replication.probes import chance, reached
from txn.latches import Waiter
from txn.messages import Changed, Failure, Read, ReadReply, Reply, Scan, ScanReply, too_wide
from txn.mvcc import ROW_BYTES, SEEK_BYTES, Budget, decode_latest, latest_ts, older_at, scan_at
from txn.types import point_end

if TYPE_CHECKING:
    from txn.evaluate import Evaluator
    from txn.ports import Rows
    from txn.state import Part

READ_BYTES_MAX = 4 << 20  # of values that are read for one answer; at least one key's
SCAN_ROWS_MAX = 1_000
SCAN_BYTES_MAX = 256 << 10
SCAN_HIDDEN_MAX = 2_000  # keys without a value at its timestamp, that one page looks at
SCAN_READ_BYTES_MAX = 1 << 20  # of rows that one page reads, told or not; one row at least
TURN_BYTES = 4 << 20  # that reads cost in one turn of a node (`Budget`); the last may go beyond it
ASK_BYTES = 4 << 10  # what a request costs beside its rows
ASK_OVERHEAD_BYTES = 200  # what it takes in memory beside its keys
UNCONFIRMED_BYTES_MAX = 64 << 20  # of answers that wait for a read index; then nobody looks


class Turn(Budget):
    """What one turn of a node has for reads, and who was put off. One for all ranges; the store begins it.

    Until one is begun there is no limit. The owner of the turn wakes itself as long as `waiting` is not empty.
    """

    __slots__ = ("full", "unconfirmed_bytes", "waiting", "waiting_bytes")

    def __init__(self) -> None:
        super().__init__()
        self.waiting: deque[tuple[Reader | None, Waiter]] = deque()  # the first one first
        self.waiting_bytes = 0  # of their requests
        self.unconfirmed_bytes = 0  # of answers that nobody may have before leadership is confirmed
        self.full = False  # of these: no leader looks in this turn

    def begin(self) -> None:
        self.left = 1 if chance("turn_small") else TURN_BYTES
        self.full = self.unconfirmed_bytes >= UNCONFIRMED_BYTES_MAX

    def put_off(self, reader: Reader | None, waiter: Waiter) -> None:
        """To a later turn. reader: whose; None: nobody's, a replica alone is asked."""
        reached("read_put_off")
        self.waiting.append((reader, waiter))
        self.waiting_bytes += request_bytes(waiter.request)

    def go_on(self) -> Iterator[tuple[Reader | None, Waiter]]:
        """Who was put off by earlier turns, as long as this one has something left: before anybody else looks."""
        for _ in range(len(self.waiting)):
            if self.left <= 0:
                return
            reader, waiter = self.waiting.popleft()
            self.waiting_bytes -= request_bytes(waiter.request)
            if not waiter.done:
                waiter.done = True
                yield reader, waiter

    def of(self, reader: Reader) -> list[Waiter]:
        """Whom this reader has put off."""
        return [waiter for owner, waiter in self.waiting if owner is reader]


class Reader:
    """The reading part of an evaluator; its state is the evaluator's."""

    def __init__(self, owner: Evaluator) -> None:
        self.owner = owner

    def read(self, request: Any, origin: Any, now: float) -> None:
        refusal = too_wide(request)
        if refusal is not None:
            self.owner.out.reply(origin, refusal, False)
            return
        waiter = Waiter(request, origin, now, self.owner.latches.sequence)
        if request.at:
            self.again(waiter, now)
        else:
            self.ask_read_ts(waiter)

    def ask_read_ts(self, waiter: Waiter) -> None:
        owner = self.owner
        owner.untimed[waiter] = None
        owner.await_read.append(waiter)
        if not owner.silence.armed:
            owner.silence.arm(owner.now)

    def go_on(self, waiter: Waiter, now: float) -> None:
        """In a later turn than the one that put it off."""
        self.owner.now = now
        self.again(waiter, now)

    def again(self, waiter: Waiter, now: float) -> None:
        """Look, from the start, unless the turn has nothing left for it."""
        turn = self.owner.turn
        if turn.left <= 0 or turn.full:
            turn.put_off(self, waiter.copy())
            return
        request = waiter.request
        row = self.owner.state.row
        if now > waiter.until_s(self.owner.limits.read_wait_s):
            reached("read_given_up")
            self.owner.out.reply(
                waiter.origin,
                Failure(request.id, "unavailable", "an undecided write could not be decided"),
                False,
            )
            return
        if request.version and request.version != row.version:
            self.owner.out.reply(waiter.origin, Failure(request.id, "epoch_mismatch"), False)
            return
        if request.at < row.gc_threshold:
            self.owner.out.reply(waiter.origin, Failure(request.id, "snapshot_too_old"), False)
            return
        reply = (
            self._look_up(waiter, request)
            if type(request) is Read
            else self._look_through(waiter, request)
        )
        if reply is not None:
            self.owner.out.reply(waiter.origin, reply, True)

    def _look_up(self, waiter: Waiter, request: Read) -> Reply | None:
        """The answer; or None, and the waiter stands where it will be woken."""
        state, at = self.owner.state, request.at
        latches = self.owner.latches
        for key in request.keys:
            if not state.owns(key):
                return Failure(request.id, "epoch_mismatch")
            if latches.txns:
                blocker = latches.blocker_of_read(key, waiter.sequence)
                if blocker is not None:
                    blocker.waiters.append(waiter.copy())
                    return None
        if state.intents:
            for key in request.keys:
                part = state.intents.get(key)
                if part is not None and self.undecided(part, at, waiter):
                    return None
        if state.stamped:
            for key in request.keys:
                for part in state.stamped_in(key, point_end(key)):
                    if self.undecided(part, at, waiter):
                        return None
        return read_keys(self.owner.rows, request, at, self.owner.turn)

    def undecided(self, part: Part, at: int, waiter: Waiter) -> bool:
        """Whether the reader has to wait for news of an intent's transaction; then it is arranged that it is woken."""
        if part.row.min_ts > at or at <= part.invisible_to:
            return False
        copy = waiter.copy()
        if (
            at > self.owner.issued
        ):  # a promise about a timestamp that was never issued would mislead later readers
            self.ask_read_ts(copy)
        elif part.resolving is not None:
            part.resolving.waiters.append(copy)
        else:
            self.owner.recovery.ask_visibility(part, at, copy)
        return True

    def _look_through(self, waiter: Waiter, request: Scan) -> Reply | None:
        state, at = self.owner.state, request.at
        row = state.row
        start, end = request.start, request.end or row.end
        if not state.has_span(start, end):
            return Failure(request.id, "epoch_mismatch")
        blocker = self.owner.latches.blocker_of_scan(start, end, waiter.sequence)
        if blocker is not None:
            blocker.waiters.append(waiter.copy())
            return None
        reply = read_span(self.owner.rows, request, start, end, at, self.owner.turn)
        low, high = start, end
        if not reply.done:
            low, high = (reply.covered_to, end) if request.reverse else (start, reply.covered_to)
        for _, part in state.intents_in(low, high):
            if self.undecided(part, at, waiter):
                return None
        for part in state.stamped_in(low, high):
            if self.undecided(part, at, waiter):
                return None
        return reply


def read_keys(rows: Rows, request: Read, at: int, budget: Budget) -> ReadReply:
    """What the keys hold at `at`, whatever is undecided. It is taken from the budget, and never refused for that."""
    versions: list[int] = []
    values: list[bytes | None] = []
    get = rows.get
    size, cost = 0, ASK_BYTES
    for key in request.keys:
        if size > READ_BYTES_MAX:
            break  # the reader asks for the rest at the same timestamp
        row = get(b"L" + key)
        if row is None:
            version = None
        elif latest_ts(row) <= at:
            version = decode_latest(row)
        else:
            version = older_at(rows, key, at)
            size += len(row)
            cost += SEEK_BYTES
        if version is None or version.value is None:
            versions.append(0)
            values.append(None)
        else:
            versions.append(version.commit_ts)
            values.append(version.value)
            size += len(version.value)
    budget.left -= cost + size + ROW_BYTES * len(versions)
    return ReadReply(request.id, at, versions, values)


def read_span(
    rows: Rows, request: Scan, start: bytes, end: bytes, at: int, budget: Budget
) -> ScanReply:
    """What [start, end) holds at `at`, whatever is undecided; at most one page, which may be empty and not the last.

    It is taken from the budget, and no smaller for that.
    """
    budget.left -= ASK_BYTES
    keys: list[bytes] = []
    values: list[bytes] = []
    versions: list[int] = []
    size, done = 0, True
    seen = b""  # the last key of a page that is not the last
    rows_max = max(1, min(request.rows_max, 2 if chance("page_small") else SCAN_ROWS_MAX))
    bytes_max = max(1, min(request.bytes_max, SCAN_BYTES_MAX))
    found = scan_at(
        rows, start, end, at,
        reverse=request.reverse, hidden_max=SCAN_HIDDEN_MAX, bytes_max=SCAN_READ_BYTES_MAX,
        budget=budget,
    )  # fmt: skip
    for key, version in found:
        if len(keys) >= rows_max or (keys and size >= bytes_max):
            done, seen = False, keys[-1]
            break
        if version is None:  # the node has others to serve: deleted rows may be millions
            done, seen = False, key
            break
        assert version.value is not None
        keys.append(key)
        versions.append(version.commit_ts)
        size += len(key) + 16
        if not request.keys_only:
            values.append(version.value)
            size += len(version.value)
    if done:
        covered_to = start if request.reverse else end
    else:
        covered_to = seen if request.reverse else point_end(seen)
    return ScanReply(request.id, at, keys, values, versions, done, covered_to)


def request_bytes(request: Any) -> int:
    """About what a read or a scan takes in memory while it waits."""
    if type(request) is Read:
        return ASK_OVERHEAD_BYTES + sum(map(len, request.keys))
    return ASK_OVERHEAD_BYTES + len(request.start) + len(request.end)


def answer_bytes(reply: Reply) -> int:
    """Of what may be large in an answer."""
    if not isinstance(reply, (ReadReply, ScanReply, Changed)):
        return 0
    size = sum(len(value) for value in reply.values if value is not None)
    return size if isinstance(reply, ReadReply) else size + sum(map(len, reply.keys))
