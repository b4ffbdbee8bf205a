"""What a cycle checker finds: an anomaly with its name, the transactions, and each edge with its reason.

T1 is the first transaction of the history that was given, T2 the second, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from kvstore.keytext import escape
from kvstore.testing.history import FOREVER, MicroTxn, Outcome

MISTAKES_MAX: Final = 20  # more of them help nobody
SHOWN_ELEMENTS: Final = 10  # of a list


class BadHistory(ValueError):
    """The history breaks the rules of its kind, and cannot be judged. `line`: of its file, from 1; 0: not of a file."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(f"line {line}: {message}" if line else message)
        self.line = line


class Edge(NamedTuple):
    """`source` comes before `target` in every order that explains the history; numbers count from 0."""

    source: int
    target: int
    kind: str  # ww, wr, rw, process, realtime
    key: bytes | None  # None: of time
    reason: str


@dataclass(frozen=True)
class Anomaly:
    """Something that no strictly serializable store shows. `edges` is the cycle, in order; empty: it needs none."""

    name: str
    explanation: str
    numbers: tuple[int, ...]  # the place of each transaction in the history, from 0
    transactions: tuple[MicroTxn, ...]
    edges: tuple[Edge, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}: {self.explanation}"


class Findings:
    """Anomalies that were found while a history was read: the first of each name and key."""

    def __init__(self, txns: Sequence[MicroTxn]) -> None:
        self.txns = txns
        self.anomalies: dict[tuple[str, bytes], Anomaly] = {}

    def report(self, name: str, key: bytes, explanation: str, *numbers: int) -> None:
        """Note an anomaly of these transactions, unless the key has one of that name."""
        whose = tuple(dict.fromkeys(numbers))
        txns = tuple(self.txns[number] for number in whose)
        self.anomalies.setdefault((name, key), Anomaly(name, explanation, whose, txns))


def describe(anomaly: Anomaly) -> str:
    """The anomaly over several lines: name, transactions, and the reason of each edge."""
    lines = [str(anomaly)]
    for number, txn in zip(anomaly.numbers, anomaly.transactions, strict=True):
        lines.append(f"  {label(number)} {describe_txn(txn)}")
    lines += [
        f"  {label(edge.source)} -{edge.kind}-> {label(edge.target)}: {edge.reason}"
        for edge in anomaly.edges
    ]
    return "\n".join(lines)


def describe_txn(txn: MicroTxn) -> str:
    """One transaction in one line."""
    end = txn.end if txn.outcome is not Outcome.UNKNOWN and txn.end < FOREVER else ""
    steps = ", ".join(f"{what} {quoted(key)} {shown(value)}" for what, key, value in txn.steps)
    return f"by {txn.client} at {txn.begin}..{end} ({txn.outcome.value}): {steps or 'nothing'}"


def label(number: int) -> str:
    """How people call the transaction at this place of the history."""
    return f"T{number + 1}"


def quoted(key: bytes) -> str:
    """A key for people, in quotes."""
    return f"'{escape(key)}'"


def shown(value: object) -> str:
    """A value for people; of a long list its end, where lists differ."""
    if not isinstance(value, list | tuple):
        return str(value)
    hidden = len(value) - SHOWN_ELEMENTS
    tail = ", ".join(map(str, value[-SHOWN_ELEMENTS:]))
    return f"[({hidden} more), {tail}]" if hidden > 0 else f"[{tail}]"
