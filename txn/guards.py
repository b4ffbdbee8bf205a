"""Whether what a transaction has read is still the newest, asked when its part is prepared (DESIGN.md section 4.4c).

Story. A guard is a span and the timestamp at which it was read. A point is one look-up, and counts as one row. A wider span is
answered by what was committed lately (`Recent`): it knows every version above its `low` (V1), so what it does not show is not
there. Only who read before that needs the rows themselves. They may be millions, and the node has others to serve: SLICE of
them are looked at in one go. If there are more, the part takes its latches, and the rest is looked at in slices before it
asks for a timestamp.

C1 what was walked stays as it is: the part's guards are latched, and nobody writes there until it is applied or given up.
C2 meanwhile collection may take a tombstone that is newer than the read; then gc_threshold is above the read, and that is
   looked at last.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from replication.probes import chance, reached
from txn import keycode
from txn.mvcc import latest_ts
from txn.state import Answer
from txn.types import FenceReason, Guard, PartStatus, point_end

if TYPE_CHECKING:
    from txn.evaluate import Evaluator
    from txn.latches import Pending
    from txn.recent import Recent

SLICE: Final = 2_000  # rows in one go; one of more than a KiB counts for more
STEP_S: Final = 0.002  # between two slices of a walk

Newer = tuple[bytes, int, bytes]  # a key, the version that stands there, who wrote it


class GuardCheck:
    """The checking part of an evaluator; its state is the evaluator's."""

    def __init__(self, owner: Evaluator) -> None:
        self.owner = owner
        self._walks: deque[tuple[Pending, list[Guard]]] = deque()  # the first one walks
        self._step_at = 0.0

    def look(self, guards: Sequence[Guard]) -> tuple[Answer | None, list[Guard]]:
        """The refusal of a transaction of which a read is no longer the newest, and what was not looked at yet."""
        left = 1 if chance("guards_walked_slowly") else SLICE
        if not guards:
            return None, []
        lately = _Lately(self.owner.state.recent, guards)
        rest: list[Guard] = []
        for guard in guards:
            if rest:
                rest.append(guard)
                continue
            newer, low, left = self._newer_than(guard, left, lately)
            if newer is not None:
                return _refusal(*newer), []
            if low is not None:
                rest.append(Guard(low, guard.end, guard.read_ts))
        return (None, rest) if rest else (self.collected(guards), rest)

    def collected(self, guards: Sequence[Guard]) -> Answer | None:
        """The refusal of who read so long ago that a tombstone may be gone (C2)."""
        threshold = self.owner.state.row.gc_threshold
        for guard in guards:
            if guard.read_ts < threshold:
                return _refusal(guard.start, threshold, b"")
        return None

    def _newer_than(
        self, guard: Guard, left: int, lately: _Lately
    ) -> tuple[Newer | None, bytes | None, int]:
        """A version in the span that is above the read; or, when `left` rows are used up, from where on it is to be walked."""
        start, end, read_ts = guard.start, guard.end, guard.read_ts
        rows = self.owner.rows
        if end == point_end(start):
            if left <= 0:
                return None, start, 0
            row = rows.get(b"L" + start)
            if row is not None and latest_ts(row) > read_ts:
                return (start, latest_ts(row), row[8:24]), None, left
            return None, None, left - 1
        if read_ts >= self.owner.state.recent.low and not chance("guards_not_from_recent"):
            cost = lately.cost(read_ts)
            if cost and left <= 0:
                return None, start, 0
            return self._newest(lately.first(guard)), None, left - cost
        low, high = keycode.family_span(keycode.LATEST, start, end)
        for found, row in rows.scan(low, high):
            if left <= 0:
                return None, found[1:], 0
            if latest_ts(row) > read_ts:
                return (found[1:], latest_ts(row), row[8:24]), None, left
            left -= 1 + (len(row) >> 10)
        return None, None, left

    def _newest(self, found: tuple[bytes, int] | None) -> Newer | None:
        """What a walk would have found at this key."""
        if found is None:
            return None
        key, version = found
        row = self.owner.rows.get(b"L" + key)
        return (key, version, b"") if row is None else (key, latest_ts(row), row[8:24])

    # -- in slices

    def begin(self, pending: Pending, rest: list[Guard], now: float) -> None:
        """The part is latched; walk the rest, and then let it ask for its timestamp."""
        reached("guards_in_slices")
        if not self._walks:
            self._step_at = now + STEP_S
        self._walks.append((pending, rest))

    def deadline(self) -> float | None:
        return self._step_at if self._walks else None

    def tick(self, now: float) -> None:
        """One slice."""
        if not self._walks or now < self._step_at:
            return
        self._step_at = now + STEP_S
        pending, rest = self._walks.popleft()
        owner = self.owner
        refusal, rest = self.look(rest)
        if refusal is None and rest:
            self._walks.append((pending, rest))  # others in their turn
            return
        refusal = refusal or self.collected(pending.request.guards)
        if refusal is None:
            owner.ask_fresh(pending, now)
            return
        pending.command = owner.fence_of(pending.request, refusal)
        owner.proposals.append(pending)

    def stop(self) -> None:
        self._walks.clear()


class _Lately:
    """What was committed lately where these guards are: looked for once for each timestamp, since the spans may be many."""

    def __init__(self, recent: Recent, guards: Sequence[Guard]) -> None:
        self._recent, self._guards = recent, guards
        self._found: dict[int, tuple[list[bytes], dict[bytes, int]]] = {}  # keys; newest versions

    def cost(self, read_ts: int) -> int:
        """How many rows it counts for, to look for what was written since; 0: that has been done."""
        return 0 if read_ts in self._found else len(self._recent)

    def first(self, guard: Guard) -> tuple[bytes, int] | None:
        """The first key of the span that was written since it was read, and its newest version."""
        found = self._found.get(guard.read_ts)
        if found is None:
            start = min(each.start for each in self._guards)
            end = max(each.end for each in self._guards) if self._bounded() else b""
            newest: dict[bytes, int] = {}
            for version, keys in self._recent.between(guard.read_ts, 1 << 64, start, end):
                newest.update(dict.fromkeys(keys, version))
            found = self._found[guard.read_ts] = sorted(newest), newest
        keys, newest = found
        place = bisect_left(keys, guard.start)
        if place == len(keys) or (guard.end and keys[place] >= guard.end):
            return None
        return keys[place], newest[keys[place]]

    def _bounded(self) -> bool:
        return all(each.end for each in self._guards)


def _refusal(key: bytes, ts: int, other: bytes) -> Answer:
    return Answer(PartStatus.FENCED, 0, FenceReason.CONFLICT, key, other, ts)
