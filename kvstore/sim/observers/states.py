"""The states that the whole database has had: I24.

At every version all keys together are what the workloads promise of them (`Workload.promises`): a bank has its total, a ring is
one ring, a list only grows. The versions that the logs have are gone through in their order once the run is over, whether
anybody has read there or not: all that were ever written, so what is collected meanwhile is judged as well.

A state counts where nothing can be missing in it: up to what every range has taken for safe, or to where each of the keys was
read, as `finish` does (`Transactions.known_upto`); and after all rows are laid out. Of what lies beyond, nothing is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from kvstore.sim.observers.report import Report
from kvstore.sim.observers.transactions import Transactions
from kvstore.testing.workloads import Workload
from kvstore.testing.workloads.base import Promise
from txn.mvcc import decode_latest


def compare_states(ghost: Transactions, workloads: Sequence[Workload], report: Report) -> int:
    """Tell the first state that breaks each promise. Linear in the versions of the keys, but for sorting them.

    Returns: how many states were judged.
    """
    judged = 0
    for workload in workloads:
        laid = workload.rows()
        for promise in workload.promises():
            missing = [key for key in promise.keys if key in laid]
            judged += _walk(ghost, workload.name, promise, missing, report)
    return judged


def _walk(
    ghost: Transactions, name: str, promise: Promise, missing: list[bytes], report: Report
) -> int:
    """missing: what `prepare` lays out; it is written row by row, so only what follows is judged."""
    upto = ghost.known_upto(promise.keys)
    written = sorted(
        (ts, key, row)
        for key in promise.keys
        for ts, row in ghost.versions.get(key, ())
        if ts <= upto
    )
    state: dict[bytes, bytes | None] = dict.fromkeys(promise.keys)
    judged, txn_id = 0, b""
    for ts, rows in groupby(written, key=lambda one: one[0]):
        before: dict[bytes, bytes | None] = {}
        for _, key, row in rows:
            version = decode_latest(row)
            before[key], state[key], txn_id = state[key], version.value, version.txn_id
        if missing:
            missing = [key for key in missing if key not in before]
            continue
        judged += 1
        wrong = promise.broken(state, before)
        if wrong:
            what = f"{name}: at version {ts}, which wrote {[*before]}: {wrong}"
            report.broken("I24", what, txn_id=txn_id)
            break
    return judged
