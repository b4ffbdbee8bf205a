"""Judges of registers: single keys that are put, read, swapped and deleted.

`linearizable` decides whether the operations on one register can be put into one order that respects real time (Wing
and Gong 1993, with Lowe's memo of configurations, as Porcupine does). It needs no versions, and may take long.
`check_versions` and `check_write_order` use the commit versions that the store tells: quick, and exact as far as they go.
Each check returns what is wrong, in words; an empty list means that nothing was found.
Unknown operations may have happened at any time after their begin, or never; failed ones never.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from kvstore.testing.checkers.anomaly import MISTAKES_MAX
from kvstore.testing.history import FOREVER, Outcome, RegisterOp

CONFIGURATIONS_MAX: Final = 2_000_000


class CheckTooLong(RuntimeError):
    """The search was given up: whether an order explains the operations is not known."""


def check_registers(ops: Iterable[RegisterOp]) -> list[str]:
    """All checks, for every key. A key whose search was given up is told after what was found ("Undecided: ...").

    Raises: CheckTooLong: nothing was found, and some keys are undecided.
    """
    by_key: dict[bytes, list[RegisterOp]] = {}
    every = list(ops)
    for op in every:
        by_key.setdefault(op.key, []).append(op)
    wrong = check_write_order(every)
    undecided: list[str] = []
    for key, mine in sorted(by_key.items()):
        wrong += check_versions(mine)
        try:
            if not linearizable(mine):
                wrong.append(f"{key!r}: no order of its {len(mine)} operations explains them")
        except CheckTooLong as error:
            undecided.append(f"{key!r}: {error}")
    if undecided and not wrong:
        raise CheckTooLong("; ".join(undecided[:MISTAKES_MAX]))
    told = [f"Undecided: {each}" for each in undecided[:MISTAKES_MAX]]
    return [*wrong[:MISTAKES_MAX], *told]


class _Place(NamedTuple):
    """How far a search has come. All sure operations before `first` are done: so a place is as small as what overlaps is
    wide, however long the history.
    """

    first: int
    done: int  # bits: sure operations from `first` on
    taken: int  # bits: unknown operations that have happened
    value: bytes | None


def linearizable(ops: Sequence[RegisterOp], initial: bytes | None = None) -> bool:
    """Whether one register explains these operations (all of one key). Raises: CheckTooLong."""
    useful = sorted((op for op in ops if _counts(op)), key=lambda op: op.begin)
    sure = [op for op in useful if op.outcome is Outcome.OK]
    unsure = [op for op in useful if op.outcome is not Outcome.OK]
    seen: set[_Place] = set()
    stack = [_Place(0, 0, 0, initial)]
    while stack:
        place = stack.pop()
        if place.first == len(sure):
            return True
        if place in seen:
            continue
        seen.add(place)
        if len(seen) > CONFIGURATIONS_MAX:
            raise CheckTooLong(f"more than {CONFIGURATIONS_MAX} configurations")
        stack.extend(_steps(sure, unsure, place))
    return False


def _counts(op: RegisterOp) -> bool:
    if op.outcome is Outcome.FAILED:
        return False
    return op.kind != "get" or op.outcome is Outcome.OK


def _steps(
    sure: Sequence[RegisterOp], unsure: Sequence[RegisterOp], place: _Place
) -> Iterator[_Place]:
    """Every operation that may come next: begun before any sure one that is not done has ended. The first to end is last."""
    first, done, taken, value = place
    first_end = FOREVER + 1
    waiting: list[int] = []
    for number in range(first, len(sure)):
        op = sure[number]
        if op.begin > first_end:
            break
        if not done >> number - first & 1:
            waiting.append(number)
            first_end = min(first_end, op.end)
    for number, op in enumerate(unsure):
        if op.begin > first_end:
            break
        if not taken >> number & 1:
            after = _apply(op, value)
            if after is not None:
                yield _Place(first, done, taken | 1 << number, after[0])
    waiting.sort(key=lambda number: sure[number].end, reverse=True)
    for number in waiting:
        op = sure[number]
        after = _apply(op, value) if op.begin <= first_end else None
        if after is not None:
            yield _Place(*_with(first, done, number), taken, after[0])


def _with(first: int, done: int, number: int) -> tuple[int, int]:
    """(first, done) once this sure operation is done, too."""
    done |= 1 << number - first
    settled = (done ^ done + 1).bit_length() - 1  # ones at its end
    return first + settled, done >> settled


def _apply(op: RegisterOp, value: bytes | None) -> tuple[bytes | None] | None:
    """The value afterwards; None if the operation cannot happen here."""
    if op.kind == "get":
        return (value,) if op.value == value else None
    if op.kind == "cas":
        if op.outcome is Outcome.UNKNOWN:
            return (op.value,) if value == op.expected else None
        if op.swapped != (value == op.expected):
            return None
        return (op.value,) if op.swapped else (value,)
    return (op.value,)


def check_versions(ops: Sequence[RegisterOp]) -> list[str]:
    """Of one key: versions rise in real time, and belong to one value each; what is read was written, at that version.

    Sharpest where each value is written once: of several writes of one value, any may be the one that was read.
    """
    wrong: list[str] = []
    writers: dict[bytes, list[RegisterOp]] = {}
    for op in ops:
        refused = op.kind == "cas" and op.outcome is Outcome.OK and not op.swapped
        if op.kind != "get" and op.value is not None and not refused:
            writers.setdefault(op.value, []).append(op)
    value_at: dict[int, bytes | None] = {}
    known = [op for op in ops if op.outcome is Outcome.OK and op.version]
    for op in known:
        if op.kind == "cas" and not op.swapped:
            continue
        before = value_at.setdefault(op.version, op.value)
        if before != op.value:
            wrong.append(f"{op.key!r}: version {op.version} is {before!r} and {op.value!r}")
    for op in ops:
        if op.kind == "get" and op.outcome is Outcome.OK and op.value is not None:
            why = _unexplained(op, writers.get(op.value, []))
            if why:
                wrong.append(f"{op.key!r}: {why}")
    wrong += _real_time(known)
    return wrong


def _unexplained(read: RegisterOp, writers: Sequence[RegisterOp]) -> str:
    """Why none of the writes of its value may be the one that was read; empty: one may."""
    if not writers:
        return f"read {read.value!r}, which nobody wrote"
    writers = [writer for writer in writers if writer.outcome is not Outcome.FAILED]
    if not writers:
        return f"read {read.value!r}, whose write has failed"
    writers = [writer for writer in writers if writer.begin <= read.end]
    if not writers:
        return f"read {read.value!r} before it was written"
    versions = [writer.version for writer in writers]
    if read.version and all(versions) and read.version not in versions:
        return f"{read.value!r} has versions {', '.join(map(str, [*versions, read.version]))}"
    return ""


def _real_time(ops: Sequence[RegisterOp]) -> list[str]:
    """What ended with version v is followed by reads at v or above, and by writes above v."""
    wrong: list[str] = []
    events = [(op.begin, 0, number) for number, op in enumerate(ops)]
    events += [(op.end, 1, number) for number, op in enumerate(ops)]
    floor, floors = 0, [0] * len(ops)
    for _, ended, number in sorted(events):
        op = ops[number]
        if not ended:
            floors[number] = floor
            continue
        written = op.kind != "get" and op.swapped
        if op.version < floors[number] or (written and op.version == floors[number]):
            wrong.append(
                f"{op.key!r}: {op.kind} of {op.client} at {op.begin}..{op.end} has version {op.version}, "
                f"but {floors[number]} was seen before it began"
            )
        floor = max(floor, op.version)
    return wrong


def check_write_order(ops: Iterable[RegisterOp]) -> list[str]:
    """Over all keys: a write's version is above that of every write acknowledged before it began."""
    writes = [
        op
        for op in ops
        if op.kind != "get" and op.swapped and op.outcome is Outcome.OK and op.version
    ]
    wrong = _real_time(writes)
    by_version: dict[int, RegisterOp] = {}
    for op in writes:
        other = by_version.setdefault(op.version, op)
        if other is not op:
            wrong.append(f"{op.key!r} and {other.key!r} were committed at one version {op.version}")
    return wrong
