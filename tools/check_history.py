"""Judge a recorded history: a file of JSON lines, as kvstore/testing/HISTORIES.md describes it.

    python -m tools.check_history FILE [--kind registers|transactions|list-append|rw-register] [--by-version]
                                       [--edn FILE [--key KEY]] [-o json]

Without --kind everything in the file is judged, each kind by itself. Prints each anomaly, with its cycle, and what could not
be judged, since the file does not tell enough of it. Exit status: 0
nothing was found; 1 something was; 2 nothing was, but the file cannot be read as a history, or a kind could not be judged
to the end (it breaks its rules, or the search took too long). --edn writes the operations of one kind for Jepsen's checkers
instead of judging them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from kvstore.errors import InvalidArgument
from kvstore.keytext import escape, unescape
from kvstore.testing.checkers import (
    Anomaly,
    BadHistory,
    CheckTooLong,
    check_list_append,
    check_registers,
    check_rw_register,
    check_transactions,
    describe,
)
from kvstore.testing.checkers.anomaly import describe_txn, label
from kvstore.testing.edn import write_edn
from kvstore.testing.history import History, MicroTxn, Operation, Outcome
from kvstore.testing.jsonl import read_history

KINDS: Final = ("registers", "transactions", "list-append", "rw-register")
Finding = Anomaly | str


@dataclass
class Judged:
    """What came of the operations of one kind. `undecided`: why nothing was found and something may be there all the same.
    `left_out`: what the judges had nothing to go by for."""

    operations: int
    left_out: Sequence[str]
    findings: Sequence[Finding] = field(default_factory=list)
    undecided: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        with given.file.open("rb") as stream:
            history = read_history(stream)
        kinds = [given.kind] if given.kind else kinds_of(history)
        if given.edn is not None:
            return _convert(history, kinds, given)
    except (BadHistory, InvalidArgument, OSError) as error:
        print(f"{given.file}: {error}", file=sys.stderr)
        return 2
    judged = {kind: _judged(history, kind, by_version=given.by_version) for kind in kinds}
    for kind, each in judged.items():
        if each.undecided:
            print(f"{given.file}: {kind}: {each.undecided}", file=sys.stderr)
    if given.output == "json":
        print(json.dumps(_report(judged), indent=2))
    else:
        _print(judged)
    if any(each.findings for each in judged.values()):
        return 1
    return 2 if any(each.undecided for each in judged.values()) else 0


def kinds_of(history: History) -> list[str]:
    """What there is to judge."""
    return [kind for kind in KINDS if _operations(history, kind)]


def micro_of(history: History, kind: str) -> Sequence[MicroTxn]:
    """The micro transactions of this kind. Those whose steps do not tell (their reads gave nothing) go with the others; if
    there are both kinds, with those that write or read the same keys."""
    told = [_micro_kind(txn) for txn in history.micro]
    kinds = {each for each in told if each} or {"rw-register"}
    if len(kinds) < 2:
        return history.micro if kind in kinds else []
    of_registers = {
        key
        for txn, each in zip(history.micro, told, strict=True)
        if each == "rw-register"
        for _, key, _ in txn.steps
    }

    def kind_of(txn: MicroTxn) -> str:
        registers = any(key in of_registers for _, key, _ in txn.steps)
        return "rw-register" if registers else "list-append"

    return [
        txn for txn, each in zip(history.micro, told, strict=True) if (each or kind_of(txn)) == kind
    ]


def _micro_kind(txn: MicroTxn) -> str:
    """What its steps are of; empty: of either. A list among them decides, and its checker refuses what does not fit."""
    if any(what == "append" or isinstance(value, list) for what, _, value in txn.steps):
        return "list-append"
    return "rw-register" if any(value is not None for _, _, value in txn.steps) else ""


def judge(history: History, kind: str, *, by_version: bool = False) -> list[Finding]:
    """What is wrong with the operations of this kind. Raises: BadHistory, CheckTooLong."""
    checks: dict[str, Callable[[], Sequence[Finding]]] = {
        "registers": lambda: check_registers(history.registers),
        "transactions": lambda: check_transactions(
            history.initial, history.transactions, history.final, history.markers
        ),
        "list-append": lambda: check_list_append(micro_of(history, kind)),
        "rw-register": lambda: check_rw_register(micro_of(history, kind), by_version=by_version),
    }
    return list(checks[kind]())


def _judged(history: History, kind: str, *, by_version: bool) -> Judged:
    left_out = _left_out(history) if kind == "transactions" else []
    judged = Judged(len(_operations(history, kind)), left_out)
    try:
        judged.findings = judge(history, kind, by_version=by_version)
    except (BadHistory, CheckTooLong) as error:
        judged.undecided = str(error)
    return judged


def _left_out(history: History) -> list[str]:
    """What passes for want of anything to compare, of the transactions."""
    told = []
    done = [txn for txn in history.transactions if txn.outcome is Outcome.OK]
    empty = sum(not txn.reads and not txn.writes for txn in done)
    if empty:
        who = "1 operation tells" if empty == 1 else f"{empty} operations tell"
        it = "it" if empty == 1 else "they"
        told.append(f"{who} neither reads nor writes: what {it} did was not judged")
    if history.final is not None:
        written = {
            key
            for txn in history.transactions
            if txn.outcome is not Outcome.FAILED
            for key in txn.writes
        }
        unseen = len(written - history.final.keys())
        if unseen:
            keys = (
                "1 key that was written was"
                if unseen == 1
                else f"{unseen} keys that were written were"
            )
            told.append(f"{keys} not looked at in the end")
    return told


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.check_history",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="JSON lines")
    parser.add_argument("--kind", choices=KINDS, help="judge these only")
    parser.add_argument(
        "--by-version", action="store_true", help="rw-register: versions tell the order of writes"
    )
    parser.add_argument("--edn", type=Path, metavar="FILE", help="write this instead of judging")
    parser.add_argument("--key", help="with --edn, of registers: this key only")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    return parser


def _operations(history: History, kind: str) -> Sequence[Operation]:
    if kind == "registers":
        return history.registers
    return history.transactions if kind == "transactions" else micro_of(history, kind)


def _convert(history: History, kinds: Sequence[str], given: argparse.Namespace) -> int:
    if len(kinds) != 1:
        raise InvalidArgument(f"the file holds {', '.join(kinds) or 'nothing'}: choose by --kind")
    key = None if given.key is None else unescape(given.key)
    with given.edn.open("wb") as stream:
        lines = write_edn(_operations(history, kinds[0]), stream, key=key)
    print(f"{lines} lines")
    return 0


def _print(judged: Mapping[str, Judged]) -> None:
    for kind, each in judged.items():
        for finding in each.findings:
            print(describe(finding) if isinstance(finding, Anomaly) else finding)
        found = "undecided" if each.undecided else f"{len(each.findings) or 'nothing'} found"
        print(f"{kind}: {each.operations} operations, {found}")
        for left_out in each.left_out:
            print(f"{kind}: {left_out}")
    if not judged:
        print("no operations")


def _report(judged: Mapping[str, Judged]) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for kind, each in judged.items():
        anomalies = [_as_json(finding) for finding in each.findings]
        report[kind] = {"operations": each.operations, "anomalies": anomalies}
        if each.undecided:
            report[kind]["undecided"] = each.undecided
        if each.left_out:
            report[kind]["not judged"] = each.left_out
    return report


def _as_json(finding: Finding) -> dict[str, Any]:
    if isinstance(finding, str):
        return {"explanation": finding}
    return {
        "name": finding.name,
        "explanation": finding.explanation,
        "transactions": [
            _txn_as_json(number, txn)
            for number, txn in zip(finding.numbers, finding.transactions, strict=True)
        ],
        "edges": [
            {
                "from": label(edge.source),
                "to": label(edge.target),
                "kind": edge.kind,
                "key": None if edge.key is None else escape(edge.key),
                "reason": edge.reason,
            }
            for edge in finding.edges
        ],
    }


def _txn_as_json(number: int, txn: MicroTxn) -> dict[str, str]:
    return {"name": label(number), "text": describe_txn(txn)}


if __name__ == "__main__":
    sys.exit(main())
