"""What clients saw, written to files that `tools.check_history` judges: one file for each workload.

Of several workloads FILE gets the workload's name before its suffix. Some get no file: nothing but themselves can judge
what they recorded. A suffix `.edn` gives what Jepsen's checkers read (kvstore/testing/HISTORIES.md), any other one JSON lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from kvstore.testing.edn import write_edn
from kvstore.testing.history import History, Operation
from kvstore.testing.jsonl import write_history
from kvstore.testing.workloads import Workload

EDN: Final = ".edn"


def write_histories(
    workloads: Sequence[Workload], path: Path, *, finished: bool = True
) -> list[Path]:
    """Write them. finished: the workloads have read what is left, which is then written, too.

    Returns: the files. Raises: OSError.
    """
    written = []
    for workload in workloads:
        if not workload.exact:
            continue
        if finished:
            workload.complete()
        else:
            Workload.complete(workload)
        name = path.with_suffix(f".{workload.name}{path.suffix}") if len(workloads) > 1 else path
        with name.open("wb") as stream:
            if path.suffix == EDN:
                write_edn(_operations(workload.history), stream)
            else:
                write_history(workload.history, stream)
        written.append(name)
    return written


def _operations(history: History) -> Sequence[Operation]:
    """A workload records operations of one kind."""
    every = (history.registers, history.transactions, history.micro)
    (kind,) = [operations for operations in every if operations] or [[]]
    return kind
