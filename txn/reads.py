"""Reads and scans at a leader (DESIGN.md sections 4.2 and 7).

A read gets its timestamp first, waits for the writers that were latched when it came, and looks; about an undecided intent
at or below its timestamp its anchor is asked. Every answer rests on what was *not* seen, so leadership is confirmed after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from replication.probes import chance, reached
from txn.latches import Waiter
from txn.messages import Failure, Read, ReadReply, Reply, Scan, ScanReply, too_wide
from txn.mvcc import decode_latest, latest_ts, older_at, scan_at
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

    def again(self, waiter: Waiter, now: float) -> None:
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
        return read_keys(self.owner.rows, request, at)

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
        reply = read_span(self.owner.rows, request, start, end, at)
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


def read_keys(rows: Rows, request: Read, at: int) -> ReadReply:
    """What the keys hold at `at`, whatever is undecided."""
    versions: list[int] = []
    values: list[bytes | None] = []
    get = rows.get
    size = 0
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
        if version is None or version.value is None:
            versions.append(0)
            values.append(None)
        else:
            versions.append(version.commit_ts)
            values.append(version.value)
            size += len(version.value)
    return ReadReply(request.id, at, versions, values)


def read_span(rows: Rows, request: Scan, start: bytes, end: bytes, at: int) -> ScanReply:
    """What [start, end) holds at `at`, whatever is undecided; at most one page, which may be empty and not the last."""
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
