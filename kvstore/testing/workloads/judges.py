"""The judges of histories (kvstore/testing/checkers) as workloads use them: problems in words. An anomaly is told with
its transactions and its cycle, over several lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvstore.testing.checkers import (
    CheckTooLong,
    check_list_append,
    check_registers,
    check_rw_register,
    check_transactions,
    describe,
)
from kvstore.testing.history import MicroTxn, RegisterOp, TxnOp


def judge_registers(ops: Sequence[RegisterOp]) -> list[str]:
    """Linearizability of every key."""
    try:
        return check_registers(ops)
    except CheckTooLong as error:
        return [f"Undecided: {error}"]


def judge_transactions(
    initial: Mapping[bytes, bytes | None],
    ops: Sequence[TxnOp],
    final: Mapping[bytes, bytes | None] | None,
    markers: Mapping[bytes, int],
) -> list[str]:
    """The replay in the order of versions."""
    return check_transactions(initial, ops, final, markers)


def judge_list_append(txns: Sequence[MicroTxn]) -> list[str]:
    return [describe(anomaly) for anomaly in check_list_append(txns)]


def judge_rw_register(txns: Sequence[MicroTxn]) -> list[str]:
    return [describe(anomaly) for anomaly in check_rw_register(txns, by_version=True)]
