"""Judges of transactions whose commit versions are known: replay them in that order.

Every read must be what the replay has, and the order must respect real time: strict serializability, complete for what
the versions claim, in O(n log n). A reader that does not tell its version needs some place in that order at which all of its
reads hold, and which respects real time. Markers (a row that each transaction writes for itself) decide unknown outcomes.
Without markers an unknown transaction may have happened or not: a read of what it wrote is believed. So is one of what a
transaction wrote that was acknowledged, and whose version is not known (0).
Each check returns what is wrong, in words; an empty list means that nothing was found.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from kvstore.testing.checkers.anomaly import MISTAKES_MAX
from kvstore.testing.history import FOREVER, Outcome, TxnOp


@dataclass
class _Rows:
    """What the replay has in each key, at every version. `maybe`: what is believed besides, of writes of unknown time."""

    initial: Mapping[bytes, bytes | None]
    maybe: Mapping[bytes, Sequence[bytes | None]]
    changes: dict[bytes, list[tuple[int, bytes | None]]] = field(default_factory=dict)

    def put(self, version: int, key: bytes, value: bytes | None) -> None:
        """Versions do not fall."""
        self.changes.setdefault(key, []).append((version, value))

    def now(self, key: bytes) -> bytes | None:
        changes = self.changes.get(key)
        return changes[-1][1] if changes else self.initial.get(key)

    def held(self, reads: Mapping[bytes, bytes | None], version: int) -> bool:
        """Whether all of these may be read there."""
        for key, value in reads.items():
            changes = self.changes.get(key, [])
            count = bisect.bisect_right(changes, version, key=lambda change: change[0])
            there = changes[count - 1][1] if count else self.initial.get(key)
            if value != there and value not in self.maybe.get(key, ()):
                return False
        return True


def check_transactions(
    initial: Mapping[bytes, bytes | None],
    ops: Sequence[TxnOp],
    final: Mapping[bytes, bytes | None] | None = None,
    markers: Mapping[bytes, int] | None = None,
) -> list[str]:
    """Replay by version.

    Without markers, a read of a value is believed that a transaction wrote whose version or outcome is unknown.

    Args: markers: name -> version of every transaction whose own row was found at the end (None: none was looked for);
    it decides unknown outcomes, and must agree with the known ones. final: the values found at the end, None for a key that
    is gone; a key that is left out was not looked at.
    """
    wrong: list[str] = []
    committed: list[TxnOp] = []
    for op in ops:
        version = _version_of(op, markers, wrong)
        if version:  # a copy, where it differs: what was recorded stays as it is
            committed.append(op if op.version == version else replace(op, version=version))
    committed.sort(key=lambda op: (op.version, 0 if op.writes else 1))
    rows = _Rows(initial, _undecided(ops) if markers is None else {})
    writer: dict[int, TxnOp] = {}
    for op in committed:
        if op.writes:
            other = writer.setdefault(op.version, op)
            if other is not op:
                wrong.append(f"{op.name!r} and {other.name!r} have one version {op.version}")
        wrong += _replayed(rows, op)
    for key, value in (final or {}).items():
        if rows.now(key) != value and value not in rows.maybe.get(key, ()):
            wrong.append(f"at the end {key!r} = {value!r}, but the replay has {rows.now(key)!r}")
    wrong += _in_real_time(committed)
    wrong += _without_version(ops, committed, rows)
    return wrong[:MISTAKES_MAX]


def _replayed(rows: _Rows, op: TxnOp) -> Iterable[str]:
    """The next one of the order: its reads are compared, and its writes done."""
    for key, value in op.reads.items():
        if rows.now(key) == value:
            continue
        if value in rows.maybe.get(key, ()):
            rows.put(op.version, key, value)
        else:
            yield (
                f"{op.name!r} of {op.client} at version {op.version} read {key!r} = {value!r}, "
                f"but by the order of versions it was {rows.now(key)!r}"
            )
    for key, value in op.writes.items():
        rows.put(op.version, key, value)


def _version_of(op: TxnOp, markers: Mapping[bytes, int] | None, wrong: list[str]) -> int:
    """Its place in the order; 0: it did not happen, or nothing depends on it."""
    if not op.writes:
        return op.version if op.outcome is Outcome.OK else 0
    if markers is None:
        return op.version if op.outcome is Outcome.OK else 0
    found = markers.get(op.name, 0)
    if op.outcome is Outcome.OK and not found:
        wrong.append(f"{op.name!r} was acknowledged at {op.version} and is lost")
    elif op.outcome is Outcome.OK and op.version and found != op.version:
        wrong.append(f"{op.name!r} was acknowledged at {op.version} and stands at {found}")
    elif op.outcome is Outcome.FAILED and found:
        wrong.append(f"{op.name!r} failed ({op.error}) and stands at {found}")
    return found


def _undecided(ops: Iterable[TxnOp]) -> dict[bytes, list[bytes | None]]:
    """By key, what transactions have or may have written of which nobody knows when."""
    maybe: dict[bytes, list[bytes | None]] = {}
    for op in ops:
        if op.outcome is Outcome.UNKNOWN or (op.outcome is Outcome.OK and not op.version):
            for key, value in op.writes.items():
                maybe.setdefault(key, []).append(value)
    return maybe


def _in_real_time(ops: Sequence[TxnOp]) -> list[str]:
    """One that began after another ended has no lower version (a snapshot may have the same)."""
    wrong: list[str] = []
    events = [(op.begin, 0, number) for number, op in enumerate(ops)]
    events += [(op.end, 1, number) for number, op in enumerate(ops) if op.outcome is Outcome.OK]
    floor, floors = 0, [0] * len(ops)
    for _, ended, number in sorted(events):
        if not ended:
            floors[number] = floor
        else:
            floor = max(floor, ops[number].version)
    for number, op in enumerate(ops):
        if op.version < floors[number]:
            wrong.append(
                f"{op.name!r} of {op.client} began after version {floors[number]} was acknowledged, and has {op.version}"
            )
    return wrong


def _without_version(
    ops: Sequence[TxnOp], committed: Sequence[TxnOp], rows: _Rows
) -> Iterable[str]:
    """Readers that were acknowledged without a version: each has a place in the order at which all of its reads hold.

    It is not below what was acknowledged before the reader began, nor above what began after it had ended. The lowest place
    is taken, which leaves the most to those that follow: they may not be below it either.
    """
    readers = [
        op
        for op in ops
        if op.outcome is Outcome.OK and op.reads and not op.writes and not op.version
    ]
    events = [(op.begin, 0, number) for number, op in enumerate(readers)]
    events += [(op.end, 1, number) for number, op in enumerate(readers)]
    ended = sorted((op.end, op.version) for op in committed if op.outcome is Outcome.OK)
    later = _least_from(committed)
    floor, done, floors = 0, 0, [0] * len(readers)
    for at, is_end, number in sorted(events):
        while done < len(ended) and ended[done][0] < at:
            floor = max(floor, ended[done][1])
            done += 1
        if not is_end:
            floors[number] = floor
            continue
        reader, least = readers[number], floors[number]
        following = bisect.bisect_right(later, at, key=lambda each: each[0])
        most = later[following][1] if following < len(later) else FOREVER
        place = _place(rows, reader, least, most)
        if place is None:
            yield (
                f"{reader.name!r} of {reader.client}, which told no version, read {reader.reads!r}: "
                f"from version {least} on they were never there together before it ended"
            )
        else:
            floor = max(floor, place)


def _place(rows: _Rows, reader: TxnOp, least: int, most: int) -> int | None:
    """The lowest version of these at which all of its reads hold."""
    places = {least}
    for key in reader.reads:
        places.update(at for at, _ in rows.changes.get(key, ()) if least < at <= most)
    return next((at for at in sorted(places) if at <= most and rows.held(reader.reads, at)), None)


def _least_from(ops: Iterable[TxnOp]) -> list[tuple[int, int]]:
    """By begin: below what a reader stays that ended before any of those that begin then or later."""
    least = FOREVER
    tops: list[tuple[int, int]] = []
    for op in sorted(ops, key=lambda op: op.begin, reverse=True):
        least = min(least, op.version - 1 if op.writes else op.version)
        tops.append((op.begin, least))
    return tops[::-1]


def check_totals(ops: Iterable[TxnOp], accounts: Sequence[bytes], total: int) -> list[str]:
    """Every snapshot of all accounts adds up."""
    wrong = []
    for op in ops:
        if op.writes or op.outcome is not Outcome.OK:
            continue
        found = sum(int(op.reads.get(key) or 0) for key in accounts)
        if found != total:
            wrong.append(
                f"{op.name!r} of {op.client} at version {op.version} saw a total of {found}"
            )
    return wrong[:MISTAKES_MAX]
