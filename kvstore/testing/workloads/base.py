"""What every workload is: operations on a database, with what they saw, and a check of it.

A workload needs a `Database` (or what looks like one), a `random.Random` and `asyncio.sleep`, and nothing else, so it
runs against simulated clusters and real ones alike. `prepare` lays out its rows; `step` does one operation of one client
and never raises for what the cluster does; `finish` reads what is left when the world is calm; `check` tells what is
wrong, in words. A problem begins with the name of the anomaly, as in "Lost-update: counter: ...".

W1. An operation is in the history before anything of it is sent, as unknown; a client that dies leaves it so.
W2. An operation ends as done, as failed only if the error says that nothing happened, and else as unknown.
W3. What an operation does is drawn from the generator that it is handed, so leaving others out does not change it.
    (Where the present state has a say, such as which elements are there, it has it through that state alone.)
W4. Keys of a workload begin with a place, its name and a slash; places lie in different ranges.
W5. An operation fails with nothing but what faults or others explain (`FORESEEN`, and what of it the workload itself brings
    about and handles): any other code is a problem, "Unforeseen: ...".
"""

from __future__ import annotations

import abc
import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Final, NamedTuple, TypeVar

from kvstore.client import Database
from kvstore.errors import CompareFailed, KVError
from kvstore.testing.history import History, MicroTxn, Outcome, RegisterOp, TxnOp

PROBLEMS_MAX: Final = 5  # of one kind that a check tells
ATONCE_MAX: Final = 32  # reads that `finish` has under way
PREPARE_TIMEOUT_S: Final = 30.0
PREPARE_TRIES_MAX: Final = 20
PREPARE_PAUSE_S: Final = 0.2
FINISH_TIMEOUT_S: Final = 20.0
UNIQUE_BITS: Final = 24

FORESEEN: Final[Mapping[str, str]] = {  # codes of failures, and why each is none of the product's
    "conflict": "another client wrote there",
    "deadlock": "others had locks, and waited for its own",
    "lock_timeout": "another client, or a dead one, had the lock for longer than one waits",
    "throttled": "a node had more to do than it takes on, or could not write",
    "no_quorum": "too few nodes of a range saw each other",
    "unavailable": "no node answered in time that could serve it",
    "deadline_exceeded": "the time of the call ran out, and nothing happened",
    "commit_unknown": "the time ran out after it was sent",
}
TOO_OLD: Final[Mapping[str, str]] = {  # and these, where versions and outcomes are kept for seconds
    "snapshot_too_old": "a read of the past, or one that stood still, came after its versions were collected",
    "transaction_too_old": "what it had read was collected before it went on",
    "outcome_expired": "the record was collected before somebody asked",
}

Operation = RegisterOp | TxnOp | MicroTxn
T = TypeVar("T")
R = TypeVar("R")
State = Mapping[bytes, bytes | None]  # key -> value; None: no such row


class Promise(NamedTuple):
    """What holds of some keys together, at every version from when all rows are laid out.

    `broken` says what is wrong with them, in words; empty if nothing is. It gets what all of them are at a version, and what
    those that it wrote were before.
    """

    keys: Sequence[bytes]
    broken: Callable[[State, State], str]


@dataclass
class Counts:
    """Operations that have ended, by outcome; one that never ended is counted nowhere."""

    ok: int = 0
    failed: int = 0
    unknown: int = 0


class Workload(abc.ABC):
    """Args:
    rng: draws how often each kind of operation comes.
    places: prefixes of keys, one in each range, in order (`places_of`).
    scale: how many times the keys of a short run; a check of a long history on few keys takes long.
    history: where operations go. Those of workloads that run side by side may share a clock.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = (
        True  # its history can be judged without it; else only the workload itself can
    )
    kinds_count: ClassVar[int] = 1  # of operations, between which `kind` chooses

    def __init__(
        self,
        rng: random.Random,
        places: Sequence[bytes],
        *,
        scale: int = 1,
        history: History | None = None,
    ) -> None:
        assert places, "a workload has at least one place"
        assert list(places) == sorted(places), "places are in the order of their ranges"
        self.places = tuple(places)
        self.scale = scale
        self.history = history or History()
        self.counts = Counts()
        self.on_end: Callable[[Operation, str], None] = lambda _op, _told: None
        self.problems: list[str] = []  # seen while it ran
        self.foreseen = set(FORESEEN)  # W5; TOO_OLD in addition where little is kept
        self._weights = [rng.random() + 0.05 for _ in range(self.kinds_count)]
        self._drawn: dict[int, None] = {}

    # -- what a workload does

    async def prepare(self, db: Database) -> None:
        """Lay out the rows. Raises the last KVError if that does not succeed in many tries."""
        await lay(db, self.rows())

    def rows(self) -> dict[bytes, bytes]:
        """What is there before the first operation."""
        return {}

    @abc.abstractmethod
    async def step(self, db: Database, client: str, rng: random.Random) -> None:
        """One operation of this client, which does one at a time."""

    @abc.abstractmethod
    async def finish(self, db: Database) -> None:
        """Read what is left, when nothing is under way any more. Raises KVError."""

    @abc.abstractmethod
    def inspect(self) -> Iterable[str]:
        """What is wrong with the history."""

    def check(self) -> list[str]:
        """What is wrong, in words; empty: nothing. After `finish`."""
        return first_of_each_kind([*self.problems, *self.inspect()])

    def promises(self) -> Sequence[Promise]:
        """For whoever knows every version, and not only those that clients have read at (kvstore/sim/observers/states.py)."""
        return ()

    def complete(self) -> None:
        """Put into a history of its own what its judges need besides the operations, for whoever writes it down. After
        `finish`.
        """
        self.history.initial = {**self.history.initial, **self.rows()}

    # -- for those who write one

    def prefix(self, place: int) -> bytes:
        """Of all the keys in that place (any number: places are taken in turn)."""
        return self.places[place % len(self.places)] + self.name.encode() + b"/"

    def key(self, number: int, group: int = 0) -> bytes:
        """The key of that number in a group of keys; neighbours lie in different ranges."""
        return self.prefix(number) + b"%03d/%04d" % (group, number)

    def unique(self, rng: random.Random) -> int:
        """A number that no other call returns, nor depends on other calls but when two draw the same."""
        number = rng.getrandbits(UNIQUE_BITS)
        while number in self._drawn:
            number += 1
        self._drawn[number] = None
        return number

    def kind(self, rng: random.Random, kinds: Sequence[T]) -> T:
        """One of the kinds of operations, as often as this run wants it."""
        assert len(kinds) == self.kinds_count
        return rng.choices(kinds, self._weights)[0]

    def settle(self, op: Operation, error: KVError | None, told: str) -> None:
        """An operation has ended (W2). `told`: what it was, for traces."""
        if error is None:
            op.outcome = Outcome.OK
            self.counts.ok += 1
        elif not error.maybe_committed:
            op.outcome = Outcome.FAILED
            self.counts.failed += 1
        else:
            self.counts.unknown += 1
        if op.outcome is not Outcome.UNKNOWN:
            op.end = self.history.tick()
        if error is not None:
            self.judge(error, told)
            told = f"{told} {error.code}"
            if not isinstance(op, RegisterOp):
                op.error = error.code
        self.on_end(op, f"{self.name} {told}")

    def judge(self, error: KVError, told: str) -> None:
        """W5, of an error that ends an operation, or after which it is tried again. `told`: what it was."""
        if error.code not in self.foreseen:
            self.problems.append(f"Unforeseen: {self.name}: {error.code}: {told}: {error!r}")


async def lay(db: Database, rows: Mapping[bytes, bytes]) -> None:
    """Write rows that are not there yet: however often a put arrives, it has one effect."""
    for key, value in rows.items():
        put = partial(db.put, key, value, if_absent=True, timeout=PREPARE_TIMEOUT_S)
        with suppress(CompareFailed):
            await patiently(put)


async def patiently(call: Callable[[], Awaitable[R]]) -> R:
    """The result of a call that may be made again: the cluster is perhaps not there yet. Raises the last KVError of many."""
    for _ in range(PREPARE_TRIES_MAX - 1):
        try:
            return await call()
        except CompareFailed:
            raise
        except KVError:
            await asyncio.sleep(PREPARE_PAUSE_S)
    return await call()


async def each(function: Callable[[T], Awaitable[R]], things: Sequence[T]) -> list[R]:
    """`function` of every thing, in order, with a bounded number under way."""
    results: list[R] = []
    for start in range(0, len(things), ATONCE_MAX):
        some = things[start : start + ATONCE_MAX]
        results += await asyncio.gather(*(function(thing) for thing in some))
    return results


def first_of_each_kind(problems: Iterable[str]) -> list[str]:
    """So that many of one kind do not hide the others."""
    counts: dict[str, int] = {}
    first = []
    for problem in problems:
        kind = problem.partition(":")[0]
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] <= PROBLEMS_MAX:
            first.append(problem)
    return first


def places_of(splits: Sequence[bytes]) -> tuple[bytes, ...]:
    """A prefix in each of the ranges that these split keys make."""
    places = (b"+/", *(split + b"/" for split in splits))
    assert list(places) == sorted(places), f"a split key lies below {places[0]!r}"
    return places
