"""What clients saw: operations with their order of beginning and end, in simulations and on real clusters alike."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Final

FOREVER: Final = 1 << 62


class Outcome(enum.Enum):
    OK = "ok"  # it happened, between begin and end
    FAILED = "failed"  # it did not happen, and never will
    UNKNOWN = "unknown"  # it may have happened, or happen at any time after its begin


@dataclass
class RegisterOp:
    """One operation on one key. `kind`: put, get, cas (expected -> value), delete (a put of None)."""

    client: str
    kind: str
    key: bytes
    begin: int
    value: bytes | None = None  # written; or read, once it ended
    expected: bytes | None = None  # of a cas
    swapped: bool = True  # a cas found what it expected
    version: int = 0  # of the commit, or of what was read; 0: not known
    end: int = FOREVER
    outcome: Outcome = Outcome.UNKNOWN


@dataclass
class TxnOp:
    """One transaction over any keys: what it read before its writes, and what it wrote. Values None: no such key."""

    client: str
    name: bytes
    begin: int
    reads: dict[bytes, bytes | None] = field(default_factory=dict)
    writes: dict[bytes, bytes | None] = field(default_factory=dict)
    version: int = 0  # of the commit; of the snapshot, for one that only reads; 0: not known
    end: int = FOREVER
    outcome: Outcome = Outcome.UNKNOWN
    error: str = ""


@dataclass
class MicroTxn:
    """One transaction as a list of small steps, in their order: what Elle's workloads are made of.

    Steps are (what, key, value): ("append", key, an integer), ("w", key, an integer) or ("r", key, what was read): a list
    of integers for list-append, an integer or None for rw-register; None for a read that has no answer yet. After a
    retry they are the steps of the last attempt, the one that may have committed.
    """

    client: str
    begin: int
    steps: list[tuple[str, bytes, Any]] = field(default_factory=list)
    version: int = 0  # of the commit; of the snapshot, for one that only reads; 0: not known
    end: int = FOREVER
    outcome: Outcome = Outcome.UNKNOWN
    error: str = ""


Operation = RegisterOp | TxnOp | MicroTxn


class History:
    """Numbers instants in the order in which they happen, and keeps every operation.

    Args: clock: a history whose instants these are, too; None: it counts its own.

    Of the transactions it may also keep what was there before them (`initial`), what was found at the end (`final`; a key
    that is left out was not looked at), and which of them had left their marker by then (`markers`: name -> version); None:
    nobody looked.
    """

    def __init__(self, clock: History | None = None) -> None:
        self.registers: list[RegisterOp] = []
        self.transactions: list[TxnOp] = []
        self.micro: list[MicroTxn] = []
        self.initial: dict[bytes, bytes | None] = {}
        self.final: dict[bytes, bytes | None] | None = None
        self.markers: dict[bytes, int] | None = None
        self._clock = clock
        self._now = 0

    def tick(self) -> int:
        """The next instant, from 1."""
        if self._clock is not None:
            return self._clock.tick()
        self._now += 1
        return self._now
