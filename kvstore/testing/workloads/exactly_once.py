"""Exactly once: the same logical operation tried again, by whoever, after outcomes that were not known.

Two ways that the client offers: `run` with an idempotency key, which may be repeated blindly, at the same time even; and
asking for the outcome of a transaction by its token before trying again. Each logical operation draws the next ticket of
a tally and writes it into a row of its own, with the number of times that it has had an effect.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from kvstore.client import Database, Transaction
from kvstore.errors import KVError, OutcomeExpired
from kvstore.testing.history import TxnOp
from kvstore.testing.workloads.base import Workload, each
from kvstore.transactions import Aborted

TALLIES: Final = 3
TRIES_MAX: Final = 3  # by one client, one after the other
UNFINISHED_MAX: Final = 16


@dataclass
class Task:
    """A logical operation. `tickets`: what its tries were told, each of which must be the same."""

    name: bytes
    row: bytes
    tally: bytes
    token: str = ""  # of the try whose outcome is to be asked for
    tickets: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    maybe: bool = False  # a try has ended with an unknown outcome, or not at all


class ExactlyOnce(Workload):
    """New logical operations, and unfinished ones of others."""

    name: ClassVar[str] = "exactly-once"
    exact: ClassVar[bool] = False  # several tries are one effect, by whichever of them
    kinds_count: ClassVar[int] = 2

    def __init__(self, rng: random.Random, places: Sequence[bytes], **options: Any) -> None:
        super().__init__(rng, places, **options)
        self.tallies = [self.key(number) for number in range(TALLIES * self.scale)]
        self.tasks: list[Task] = []
        self.rows_found: dict[bytes, tuple[bytes, int]] = {}
        self.tallies_found: dict[bytes, int] = {}
        self._keyed: list[Task] = []  # of late, by key: anybody may try them again
        self._left: list[Task] = []  # by token: given up by who tried them

    async def step(self, db: Database, client: str, rng: random.Random) -> None:
        keyed = self.kind(rng, (True, False))
        again = rng.random() < 0.3
        others = self._keyed[-UNFINISHED_MAX:] if keyed else self._left
        if again and others:
            task = rng.choice(others)
        else:
            task = self._new(rng)
        op = TxnOp(client, b"%s/%x" % (task.name, self.unique(rng)), self.history.tick())
        op.writes[task.row] = b"1"
        self.history.transactions.append(op)
        error: KVError | None = None
        try:
            await (self._by_key(db, task) if keyed else self._by_token(db, task))
        except KVError as raised:
            error = raised
        if task.tickets and error is None:
            op.reads[task.tally] = b"%d" % task.tickets[-1]
        self.settle(op, error, f"{op.name!r} {op.reads!r}")

    def _new(self, rng: random.Random) -> Task:
        number = self.unique(rng)
        row = self.prefix(number) + b"done/%x" % number
        task = Task(b"%x" % number, row, rng.choice(self.tallies))
        self.tasks.append(task)
        return task

    async def _effect(self, tx: Transaction, task: Task) -> int:
        """What it does: the next ticket. Returns it."""
        found = await tx.get_many((task.tally, task.row))
        ticket = int(found.get(task.tally, b"0")) + 1
        times = int(found.get(task.row, b"0 0").split()[0]) + 1
        tx.put(task.tally, b"%d" % ticket)
        tx.put(task.row, b"%d %d" % (times, ticket))
        return ticket

    async def _by_key(self, db: Database, task: Task) -> None:
        if task not in self._keyed[-UNFINISHED_MAX:]:
            self._keyed.append(task)
        task.maybe = True  # until it has an answer, and with the tries of others anyway
        for left in reversed(range(TRIES_MAX)):
            try:
                ticket = await db.run(
                    lambda tx: self._effect(tx, task), idempotency_key=task.name, timeout=4.0
                )
            except KVError as error:
                if not left:
                    raise
                self.judge(error, f"{task.name!r}")
            else:
                task.tickets.append(ticket)
                return

    async def _by_token(self, db: Database, task: Task) -> None:
        if task in self._left:
            self._left.remove(task)  # it is ours now
        for left in reversed(range(TRIES_MAX)):
            try:
                if not task.token or await self._did_not_happen(db, task):
                    await self._try(db, task)
                return
            except KVError as error:
                if left:
                    self.judge(error, f"{task.name!r}")
                    continue
                if len(self._left) < UNFINISHED_MAX:
                    self._left.append(task)
                raise

    async def _did_not_happen(self, db: Database, task: Task) -> bool:
        outcome = await db.outcome(task.token)
        if isinstance(outcome, Aborted):
            task.token, task.maybe = "", False
            return True
        task.versions.append(outcome.version)
        return False

    async def _try(self, db: Database, task: Task) -> None:
        try:
            async with db.transaction() as tx:
                ticket = await self._effect(tx, task)
                task.token, task.maybe = tx.id, True
        except KVError as error:
            if not error.maybe_committed:
                task.token, task.maybe = "", False
            raise
        task.tickets.append(ticket)
        task.versions.append(tx.commit_version or 0)

    async def finish(self, db: Database) -> None:
        async def settle(task: Task) -> None:
            if task.token and not task.versions:
                try:
                    if await self._did_not_happen(db, task):
                        return
                except OutcomeExpired:
                    pass  # then its row alone tells

        async def read(task: Task) -> None:
            entry = await view.get_entry(task.row)
            if entry is not None:
                self.rows_found[task.row] = entry.value, entry.version

        await each(settle, self.tasks)
        view = db.snapshot()  # what is still under way is in all of it, or in nothing
        await each(read, self.tasks)
        found = await view.get_many(self.tallies)
        self.tallies_found = {key: int(found.get(key, b"0")) for key in self.tallies}

    def inspect(self) -> Iterable[str]:
        effects = dict.fromkeys(self.tallies, 0)
        drawn: dict[tuple[bytes, int], bytes] = {}
        for task in self.tasks:
            value, version = self.rows_found.get(task.row, (b"0 0", 0))
            times, ticket = map(int, value.split())
            effects[task.tally] += times
            yield from self._check_task(task, times, ticket, version)
            other = drawn.setdefault((task.tally, ticket), task.name)
            if ticket and other is not task.name:
                yield f"Lost-update: exactly-once: {other!r} and {task.name!r} have the same ticket {ticket}"
        for key, found in self.tallies_found.items():
            if found != effects[key]:
                yield (
                    f"Torn-transaction: exactly-once: {key!r} counts {found}, "
                    f"but its operations had {effects[key]} effects"
                )

    def _check_task(self, task: Task, times: int, ticket: int, version: int) -> Iterable[str]:
        what = f"exactly-once: {task.name!r}"
        if times > 1:
            yield f"Doubled-effect: {what} has had {times} effects"
        acknowledged = bool(task.tickets or task.versions)
        if acknowledged and not times:
            yield f"Lost-effect: {what} was acknowledged, and has had no effect"
        if times and not acknowledged and not task.maybe:
            yield f"Wrong-outcome: {what} never happened, it was said, and has had an effect"
        if times == 1 and any(told != ticket for told in task.tickets):
            yield f"Wrong-result: {what} was told the tickets {task.tickets}, and has {ticket}"
        if times == 1 and any(told != version for told in task.versions):
            yield f"Wrong-outcome: {what} was told the versions {task.versions}, and has {version}"
