"""Judges of transactions whose commit versions are known: replay them in that order.

Every read must be what the replay has, and the order must respect real time: strict serializability, complete for what
the versions claim, in O(n log n). Markers (a row that each transaction writes for itself) decide unknown outcomes.
Without markers an unknown transaction may have happened or not: a read of what it wrote is believed. So is one of what a
transaction wrote that was acknowledged, and whose version is not known (0).
Each check returns what is wrong, in words; an empty list means that nothing was found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from kvstore.testing.checkers.anomaly import MISTAKES_MAX
from kvstore.testing.history import Outcome, TxnOp


def check_transactions(
    initial: Mapping[bytes, bytes | None],
    ops: Sequence[TxnOp],
    final: Mapping[bytes, bytes | None] | None = None,
    markers: Mapping[bytes, int] | None = None,
) -> list[str]:
    """Replay by version.

    Without markers, a read of a value is believed that a transaction wrote whose version or outcome is unknown.

    Args: markers: name -> version of every transaction whose own row was found at the end (None: none was looked for);
    it decides unknown outcomes, and must agree with the known ones. final: the values found at the end.
    """
    wrong: list[str] = []
    committed: list[TxnOp] = []
    for op in ops:
        version = _version_of(op, markers, wrong)
        if version:  # a copy, where it differs: what was recorded stays as it is
            committed.append(op if op.version == version else replace(op, version=version))
    committed.sort(key=lambda op: (op.version, 0 if op.writes else 1))
    state = dict(initial)
    maybe = _undecided(ops) if markers is None else {}
    writer: dict[int, TxnOp] = {}
    for op in committed:
        if op.writes:
            other = writer.setdefault(op.version, op)
            if other is not op:
                wrong.append(f"{op.name!r} and {other.name!r} have one version {op.version}")
        for key, value in op.reads.items():
            if value in maybe.get(key, ()):
                state[key] = value
            elif state.get(key) != value:
                wrong.append(
                    f"{op.name!r} of {op.client} at version {op.version} read {key!r} = {value!r}, "
                    f"but by the order of versions it was {state.get(key)!r}"
                )
        state.update(op.writes)
    if final is not None:
        for key, value in final.items():
            if state.get(key) != value and value not in maybe.get(key, ()):
                wrong.append(
                    f"at the end {key!r} = {value!r}, but the replay has {state.get(key)!r}"
                )
    wrong += _in_real_time(committed)
    return wrong[:MISTAKES_MAX]


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
