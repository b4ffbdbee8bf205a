"""Histories for Jepsen's checkers (Elle, Knossos): EDN, one operation map a line. HISTORIES.md has the rest.

Every operation gives two lines: its invocation and its completion, in the order of time. An unknown one is completed by
:info, at its end if it has one, else after everything else.
Jepsen's processes do one thing at a time, and one whose operation came to nothing known does nothing more: so a client has
as many processes as it had operations at once, and a new one after every :info. No number is used again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, BinaryIO

from kvstore.keytext import escape
from kvstore.testing.history import FOREVER, MicroTxn, Operation, Outcome, RegisterOp, TxnOp

_TYPES = {Outcome.OK: "ok", Outcome.FAILED: "fail", Outcome.UNKNOWN: "info"}


def write_edn(
    operations: Iterable[Operation], stream: BinaryIO, *, key: bytes | None = None
) -> int:
    """Write the operations, in UTF-8; `:time` is the instant that was recorded. Returns: the number of lines.

    Args: operations: of one kind. key: only the register operations on this key, with their plain values; without it
    those have values [key value], as jepsen.independent has them.
    """
    ops = [op for op in operations if key is None or getattr(op, "key", key) == key]
    events = [(op.begin, 0, number) for number, op in enumerate(ops)]
    events += [(op.end, 1, number) for number, op in enumerate(ops)]
    idle: dict[str, list[int]] = {}  # by client
    process_of: dict[int, int] = {}  # of an operation under way
    processes = 0
    last = 0
    for index, (time, ended, number) in enumerate(sorted(events)):
        op = ops[number]
        kind = "invoke"
        if ended:
            process = process_of.pop(number)
            kind = _TYPES[op.outcome]
            if kind != "info":
                idle.setdefault(op.client, []).append(process)
        elif idle.get(op.client):
            process = process_of[number] = idle[op.client].pop(0)
        else:
            process = process_of[number] = processes
            processes += 1
        last = time if time < FOREVER else last
        stream.write(_line(op, kind, process, last, index, independent=key is None).encode())
    return len(events)


def _line(
    op: Operation, kind: str, process: int, time: int, index: int, *, independent: bool
) -> str:
    if isinstance(op, RegisterOp):
        function, value = _register(op, kind)
        if kind == "ok" and op.kind == "cas" and not op.swapped:
            kind = "fail"
        if independent:
            value = f"[{_edn(op.key)} {value}]"
    else:
        function = "txn"
        value = f"[{' '.join(_steps(op, answered=kind == 'ok'))}]"
    error = getattr(op, "error", "") if kind in {"fail", "info"} else ""
    error = f", :error {_edn(error.encode())}" if error else ""
    return (
        f"{{:type :{kind}, :process {process}, :f :{function}, :value {value}, "
        f":time {time}, :index {index}{error}}}\n"
    )


def _register(op: RegisterOp, kind: str) -> tuple[str, str]:
    if op.kind == "get":
        return "read", _edn(op.value) if kind == "ok" else "nil"
    if op.kind == "cas":
        return "cas", f"[{_edn(op.expected)} {_edn(op.value)}]"
    return "write", _edn(op.value)


def _steps(op: TxnOp | MicroTxn, *, answered: bool) -> list[str]:
    if isinstance(op, TxnOp):
        reads: list[tuple[str, bytes, Any]] = [("r", key, value) for key, value in op.reads.items()]
        steps = reads + [("w", key, value) for key, value in op.writes.items()]
    else:
        steps = op.steps
    return [
        f"[:{what} {_edn(key)} {_edn(value if answered or what != 'r' else None)}]"
        for what, key, value in steps
    ]


def _edn(value: object) -> str:
    """Nothing, an integer, a list of integers, or bytes as a string (escaped, so that it is printable)."""
    match value:
        case None:
            return "nil"
        case bytes():
            text = escape(value).replace("\\", "\\\\").replace('"', '\\"')
            return f'"{text}"'
        case list():
            return f"[{' '.join(map(_edn, value))}]"
        case _:
            return str(value)
