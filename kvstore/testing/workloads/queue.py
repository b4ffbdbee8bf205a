"""Queues by versionstamped keys: elements stand in the order in which they were committed, none is lost, none taken twice.

Who adds writes one element or several, into queues that lie in different ranges; who takes deletes the first of a queue and
leaves a row that says so. An element's value is unique, so it is known in the end which additions have happened.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from kvstore.client import Database, Transaction
from kvstore.errors import KVError
from kvstore.testing.history import Outcome, TxnOp
from kvstore.testing.workloads.base import Workload
from txn.stamps import STAMP_BYTES

QUEUES: Final = 2
ELEMENTS_MAX: Final = 3  # of one addition


@dataclass
class Added:
    """An addition. `keys`: by value, as they were told."""

    op: TxnOp
    queues: dict[bytes, bytes] = field(default_factory=dict)  # value -> queue
    keys: dict[bytes, bytes] = field(default_factory=dict)


@dataclass
class Taken:
    op: TxnOp
    queue: bytes
    key: bytes = b""


class Queue(Workload):
    """Additions, alone and in transactions, and takings."""

    name: ClassVar[str] = "queue"
    kinds_count: ClassVar[int] = 3

    def __init__(self, rng: random.Random, places: Sequence[bytes], **options: Any) -> None:
        super().__init__(rng, places, **options)
        self.queues = [self.prefix(n) + b"q%d/" % n for n in range(QUEUES * self.scale)]
        self.added: list[Added] = []
        self.taken: list[Taken] = []
        self.left: dict[bytes, bytes] = {}  # what is in the queues at the end: key -> value
        self.gone: dict[bytes, bytes] = {}  # what the rows say that was taken

    async def step(self, db: Database, client: str, rng: random.Random) -> None:
        await self.kind(rng, (self._add_one, self._add_some, self._take))(db, client, rng)

    def _begin(self, client: str, kind: str, rng: random.Random) -> TxnOp:
        name = f"{kind}/{client}/{self.unique(rng):x}".encode()
        op = TxnOp(client, name, self.history.tick())
        self.history.transactions.append(op)
        return op

    async def _add_one(self, db: Database, client: str, rng: random.Random) -> None:
        added = Added(self._begin(client, "add", rng))
        self.added.append(added)
        queue, value = rng.choice(self.queues), added.op.name
        added.queues[value] = queue
        error: KVError | None = None
        try:
            added.keys[value] = await db.put_versionstamped_key(queue, value)
        except KVError as raised:
            error = raised
        self.settle(added.op, error, f"{value!r} to {queue!r}")

    async def _add_some(self, db: Database, client: str, rng: random.Random) -> None:
        added = Added(self._begin(client, "add-some", rng))
        self.added.append(added)
        for number in range(rng.randint(1, ELEMENTS_MAX)):
            added.queues[b"%s/%d" % (added.op.name, number)] = rng.choice(self.queues)
        error: KVError | None = None
        numbers: dict[bytes, int] = {}
        try:
            async with db.transaction() as tx:
                for value, queue in added.queues.items():
                    numbers[value] = tx.put_versionstamped_key(queue, value)
            for value, number in numbers.items():
                added.keys[value] = added.queues[value] + tx.versionstamp(number)
            added.op.version = tx.commit_version or 0
        except KVError as raised:
            error = raised
        self.settle(added.op, error, f"{added.queues!r}")

    async def _take(self, db: Database, client: str, rng: random.Random) -> None:
        taken = Taken(self._begin(client, "take", rng), rng.choice(self.queues))
        self.taken.append(taken)
        error: KVError | None = None
        try:
            async with db.transaction() as tx:
                await self._take_first(tx, taken)
            taken.op.version = tx.commit_version or 0
        except KVError as raised:
            error = raised
        self.settle(taken.op, error, f"{taken.op.name!r} took {taken.key!r}")

    async def _take_first(self, tx: Transaction, taken: Taken) -> None:
        for key, value in await tx.scan(prefix=taken.queue, limit=1).to_list():
            taken.key = key
            tx.delete(key)
            tx.put(self._row_of(key), value)

    def _row_of(self, key: bytes) -> bytes:
        """In another place than the queue, so that taking is over two ranges."""
        number = next(n for n, queue in enumerate(self.queues) if key.startswith(queue))
        return self.prefix(number + 1) + b"taken/" + key

    async def finish(self, db: Database) -> None:
        snapshot = db.snapshot()

        async def rows(prefix: bytes) -> list[tuple[bytes, bytes]]:
            return await snapshot.scan(prefix=prefix).to_list()

        for queue in self.queues:
            self.left |= dict(await rows(queue))
        for place in range(len(self.places)):
            prefix = self.prefix(place) + b"taken/"
            self.gone |= {key[len(prefix) :]: value for key, value in await rows(prefix)}

    # -- what is wrong

    def inspect(self) -> Iterable[str]:
        where: dict[bytes, list[bytes]] = {}  # value -> keys
        for key, value in [*self.left.items(), *self.gone.items()]:
            where.setdefault(value, []).append(key)
        for added in self.added:
            yield from self._check_added(added, where)
        yield from self._check_order(where)
        yield from self._check_taken()

    def _check_added(self, added: Added, where: dict[bytes, list[bytes]]) -> Iterable[str]:
        op = added.op
        found = {value: where.get(value, []) for value in added.queues}
        for value, keys in found.items():
            if len(keys) > 1:
                yield f"Doubled-element: queue: {value!r} stands at {keys}"
            if keys and op.outcome is Outcome.FAILED:
                yield f"Aborted-read: queue: {value!r} was refused, and stands at {keys}"
            if not keys and op.outcome is Outcome.OK:
                yield f"Lost-element: queue: {value!r} was acknowledged, and is nowhere"
            if keys and value in added.keys and keys[0] != added.keys[value]:
                yield f"Wrong-stamp: queue: {value!r} was told {added.keys[value]!r}, and stands at {keys[0]!r}"
        if 0 < sum(map(bool, found.values())) < len(found):
            yield f"Torn-transaction: queue: of {op.name!r} there is only {found}"
        stamps = {keys[0][-STAMP_BYTES:][:8] for keys in found.values() if keys}
        if len(stamps) > 1:
            yield f"Wrong-stamp: queue: {op.name!r} has several versions: {found}"

    def _check_order(self, where: dict[bytes, list[bytes]]) -> Iterable[str]:
        """Acknowledged before begun means a smaller stamp."""
        moments = [
            (added.op.begin, added.op.end, keys[0][-STAMP_BYTES:], value)
            for added in self.added
            if added.op.outcome is Outcome.OK
            for value in added.queues
            if (keys := where.get(value))
        ]
        ended = sorted((end, stamp, value) for _, end, stamp, value in moments)
        highest, who, at = b"", b"", 0
        for begin, _, stamp, value in sorted(moments):
            while at < len(ended) and ended[at][0] < begin:
                if ended[at][1] > highest:
                    highest, who = ended[at][1:]
                at += 1
            if stamp < highest:
                yield f"Order: queue: {value!r} was added after {who!r}, and has a smaller stamp"

    def _check_taken(self) -> Iterable[str]:
        last: dict[bytes, tuple[int, bytes]] = {}
        done = [taken for taken in self.taken if taken.op.outcome is Outcome.OK and taken.key]
        takers: dict[bytes, bytes] = {}
        for taken in sorted(done, key=lambda taken: taken.op.version):
            key, name = taken.key, taken.op.name
            other = takers.setdefault(key, name)
            if other is not name:
                yield f"Doubled-taking: queue: {name!r} and {other!r} both took {key!r}"
            if key in self.left:
                yield f"Risen-element: queue: {name!r} took {key!r}, which is there"
            if key not in self.gone:
                yield f"Torn-transaction: queue: {name!r} took {key!r}, and no row says so"
            before = last.get(taken.queue, (0, b""))[1]
            if key < before:
                yield f"Order: queue: {name!r} took {key!r} after {before!r} was taken"
            last[taken.queue] = taken.op.version, key


__all__ = ["Queue"]
