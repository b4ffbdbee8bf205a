"""Garbage collection: versions that no read can see any more, found by a range's leader and removed by entries of its log.

Story. The threshold is the newest timestamp that the leader knows to be issued, less the retention. The leader walks its range
in slices: first HISTORY, where everything at or below the threshold is garbage but for the newest such version of a key that
has no newer one at or below it; then LATEST, for tombstones at or below the threshold. What it finds becomes a Collect
command, which raises the range's gc_threshold and outcome_horizon before anything is gone, and names each row that goes: all
replicas remove the same, whatever they are doing.

G1 (I15) no version that a read at or above gc_threshold can see is removed; reads below it are refused.
G2 nobody is evaluated or applied whose begin_ts is at or below outcome_horizon: the versions of a one-range commit are its
   record, and they may be gone. So the horizon is never below gc_threshold.
G3 a tombstone goes only in one command with all that is older of its key, or when that is gone: it hides what is older. One
   in LATEST goes under the key's latch, since a leader applies with what it read under its latches.
G4 bounded: SLICE_ROWS rows are looked at in one step, COLLECT_ROWS_MAX rows go in one command, one command is in flight.

Statuses of parts, records and fences are not collected yet: only versions are.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Final

from txn import keycode
from txn.commands import Collect, Garbage
from txn.latches import Pending
from txn.mvcc import is_tombstone, latest_ts

if TYPE_CHECKING:
    from txn.evaluate import Evaluator

SLICE_ROWS: Final = 256
COLLECT_ROWS_MAX: Final = 512
STEP_S: Final = 0.02  # between two slices of a sweep
SWEEPS_PER_RETENTION: Final = 4
_LATCH: Final = b"\xff" * 8  # no transaction's id begins so


class Collector:
    """One leader's term of it. `tick` does a slice when it is due."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._ev = evaluator
        self.due: float | None = (
            None  # when the next slice is; None: nothing is known to be old enough
        )
        self._threshold = 0  # of the sweep under way
        self._swept = 0  # the threshold of the last whole sweep
        self._family = keycode.HISTORY
        self._position = b""  # where the next slice begins
        self._key: bytes | None = None  # whose HISTORY rows are being looked at
        self._covered = False  # that key has a newer version at or below the threshold
        self._hiding = (
            0  # a HISTORY tombstone that nothing covers: it goes if all that is older goes with it
        )
        self._latches = 0
        self._in_flight = False
        self._refused = (
            False  # a command of this sweep was not taken: the next one finds it all again
        )

    def start(self, now: float) -> None:
        """A term begins."""
        if self._ev.limits.retention:
            self.due = now + STEP_S

    def tick(self, now: float) -> None:
        if self.due is None or now < self.due or self._in_flight:
            return
        self.due = now + STEP_S
        if not self._threshold and not self._begin():
            self.due = now + self._ev.limits.sweep_s
            return
        found: dict[bytes, list[int]] = {}
        tombstones: dict[bytes, int] = {}
        more = (
            self._slice_of_history(found)
            if self._family == keycode.HISTORY
            else self._slice_of_latest(found, tombstones)
        )
        if found or tombstones:
            self._propose(found, tombstones)
        if not more:
            self._next_family(now)

    # -- the sweep

    def _begin(self) -> bool:
        """Whether there is a reason for a sweep: time has passed since the last one."""
        limits, row = self._ev.limits, self._ev.state.row
        threshold = self._ev.issued - limits.retention
        if threshold <= max(self._swept, row.gc_threshold):
            return False
        self._threshold = threshold
        self._family = keycode.HISTORY
        self._position, _ = keycode.family_span(keycode.HISTORY, row.start, row.end)
        self._key = None
        return True

    def _next_family(self, now: float) -> None:
        row = self._ev.state.row
        if self._family == keycode.HISTORY:
            self._family = keycode.LATEST
            self._position, _ = keycode.family_span(keycode.LATEST, row.start, row.end)
        else:
            self._swept = 0 if self._refused else self._threshold
            self._threshold, self._refused = 0, False
            self.due = now + self._ev.limits.sweep_s

    def _rows(self) -> Iterator[tuple[bytes, bytes]]:
        row = self._ev.state.row
        _, end = keycode.family_span(self._family, row.start, row.end)
        return islice(self._ev.rows.scan(self._position, end), SLICE_ROWS)

    def _slice_of_history(self, found: dict[bytes, list[int]]) -> bool:
        """Garbage versions, by key. Whether anything is left behind this slice."""
        looked, get, threshold = 0, self._ev.rows.get, self._threshold
        for row_key, data in self._rows():
            looked += 1
            self._position = row_key + b"\x00"
            key, _ = keycode.unescape(row_key, 1)
            if key != self._key:
                self._take_hiding(found)
                latest = get(keycode.latest_row(key))
                self._key = key
                self._covered = latest is not None and latest_ts(latest) <= threshold
            version_ts = keycode.history_ts(row_key)
            if version_ts > threshold:
                continue
            if self._covered:
                found.setdefault(key, []).append(version_ts)
            elif data[16]:
                self._hiding = version_ts
            self._covered = True
        if looked == SLICE_ROWS:  # there may be more of this key
            self._hiding = 0
            return True
        self._take_hiding(found)
        return False

    def _take_hiding(self, found: dict[bytes, list[int]]) -> None:
        """All HISTORY rows of the last key have been seen, since its tombstone was, in this slice."""
        if self._hiding:
            assert self._key is not None
            found.setdefault(self._key, []).append(self._hiding)
            self._hiding = 0

    def _slice_of_latest(self, found: dict[bytes, list[int]], tombstones: dict[bytes, int]) -> bool:
        looked, rows = 0, 0
        for row_key, data in self._rows():
            looked += 1
            self._position = row_key + b"\x00"
            if not is_tombstone(data) or latest_ts(data) > self._threshold:
                continue
            key = row_key[1:]
            if key in self._ev.latches.writes or key in self._ev.state.intents:
                continue  # somebody writes it: it will be no tombstone, or a newer one
            older = self._older(key)
            rows += len(older) + 1
            if len(older) > COLLECT_ROWS_MAX:  # they go first; the next sweep takes the tombstone
                found[key] = older[:COLLECT_ROWS_MAX]
                return True
            tombstones[key] = latest_ts(data)
            if older:
                found[key] = older
            if rows >= COLLECT_ROWS_MAX:
                return True
        return looked == SLICE_ROWS

    def _older(self, key: bytes) -> list[int]:
        prefix = keycode.history_prefix(key)
        found = self._ev.rows.scan(prefix, prefix + b"\xff" * 9)
        return [keycode.history_ts(row) for row, _ in islice(found, COLLECT_ROWS_MAX + 1)]

    # -- the command

    def _propose(self, found: dict[bytes, list[int]], tombstones: dict[bytes, int]) -> None:
        self._latches += 1
        pending = Pending(_LATCH + self._latches.to_bytes(8, "big"), None, None)
        pending.keys = list(tombstones)  # G3
        garbage = [
            Garbage(key, found.get(key, []), tombstones.get(key, 0))
            for key in dict.fromkeys((*found, *tombstones))
        ]
        pending.command = Collect(self._threshold, garbage)
        self._in_flight = True
        rows = sum(len(each.versions) + bool(each.tombstone) for each in garbage)
        pending.then = lambda _answer: self._applied(rows)
        pending.lost = self._lost
        self._ev.propose(pending)

    def _applied(self, rows: int) -> None:
        self._in_flight = False
        self._ev.counters["versions_collected_total"] += rows

    def _lost(self) -> None:
        self._in_flight, self._refused = False, True


__all__ = ["Collector"]
