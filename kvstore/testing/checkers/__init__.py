"""Judges of histories: registers, transactions with commit versions, and lists of small steps as Elle checks them."""

from __future__ import annotations

from kvstore.testing.checkers.anomaly import Anomaly, BadHistory, Edge, describe
from kvstore.testing.checkers.cycles import check_list_append, check_rw_register
from kvstore.testing.checkers.registers import (
    CheckTooLong,
    check_registers,
    check_versions,
    check_write_order,
    linearizable,
)
from kvstore.testing.checkers.transactions import check_totals, check_transactions

__all__ = [
    "Anomaly",
    "BadHistory",
    "CheckTooLong",
    "Edge",
    "check_list_append",
    "check_registers",
    "check_rw_register",
    "check_totals",
    "check_transactions",
    "check_versions",
    "check_write_order",
    "describe",
    "linearizable",
]
