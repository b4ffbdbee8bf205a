"""Judges of histories: registers, and transactions with commit versions."""

from __future__ import annotations

from kvstore.testing.checkers.registers import (
    CheckTooLong,
    check_registers,
    check_versions,
    check_write_order,
    linearizable,
)
from kvstore.testing.checkers.transactions import check_totals, check_transactions

__all__ = [
    "CheckTooLong",
    "check_registers",
    "check_totals",
    "check_transactions",
    "check_versions",
    "check_write_order",
    "linearizable",
]
