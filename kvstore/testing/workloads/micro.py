"""Elle's two workloads: transactions of small steps over lists that grow, and over registers with unique values.

Two judges. One looks for cycles among what was read and written and needs no versions (kvstore/testing/checkers); the
other replays the steps in the order of commit versions, which is exact. Every transaction leaves a trail (traced.py).
"""

from __future__ import annotations

import abc
import random
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Final

from kvstore.client import Database, Transaction
from kvstore.errors import KVError
from kvstore.testing.history import MicroTxn, Outcome
from kvstore.testing.workloads import judges
from kvstore.testing.workloads.base import Promise, State
from kvstore.testing.workloads.traced import Traced
from kvstore.transactions import Snapshot

KEYS: Final = 6
STEPS_MAX: Final = 4

Step = tuple[str, bytes, Any]


class Micro(Traced):
    """Base of both: one kind of writing step, and reads."""

    writing: ClassVar[str]

    def __init__(self, rng: random.Random, places: Sequence[bytes], **options: Any) -> None:
        super().__init__(rng, places, **options)
        self.keys = [self.key(number) for number in range(KEYS * self.scale)]
        self.txns: list[MicroTxn] = []
        self._reading = rng.uniform(0.2, 0.7)  # share of the steps that read

    @staticmethod
    @abc.abstractmethod
    def decode(value: bytes | None) -> Any:
        """What a read step says of a row."""

    @abc.abstractmethod
    async def write(self, tx: Transaction, key: bytes, number: int) -> None: ...

    @staticmethod
    @abc.abstractmethod
    def written(before: Any, number: int) -> Any:
        """What a replay has in a key after a writing step."""

    @abc.abstractmethod
    def cycles(self) -> list[str]:
        """What the cycle checker says of the transactions: each anomaly with its cycle, in lines."""

    async def step(self, db: Database, client: str, rng: random.Random) -> None:
        txn = MicroTxn(client, self.history.tick())
        txn.steps = [self._drawn_step(rng) for _ in range(rng.randint(1, STEPS_MAX))]
        name = b"%s/%x" % (client.encode(), self.unique(rng))
        self._keep(txn)
        tx: Transaction | None = None
        error: KVError | None = None
        try:
            async with db.transaction() as tx:
                await self._play(txn, tx)
                if any(what != "r" for what, _, _ in txn.steps):
                    self.leave_trail(txn, tx, rng, name)
            txn.version = tx.commit_version or tx.read_version or 0
        except KVError as raised:
            error = raised
            if tx is not None:
                self._keep_first_reads(txn, tx.read_version or 0)
        self.settle(txn, error, f"{txn.steps!r}")

    def _drawn_step(self, rng: random.Random) -> Step:
        key = rng.choice(self.keys)
        if rng.random() < self._reading:
            return "r", key, None
        return self.writing, key, self.unique(rng)

    def _keep(self, txn: MicroTxn) -> None:
        self.txns.append(txn)
        self.history.micro.append(txn)

    async def _play(self, txn: MicroTxn, tx: Transaction) -> None:
        for number, (what, key, value) in enumerate(txn.steps):
            if what == "r":
                txn.steps[number] = "r", key, self.decode(await tx.get(key))
            else:
                await self.write(tx, key, value)

    def _keep_first_reads(self, txn: MicroTxn, version: int) -> None:
        """T3, for the reads of keys that the transaction had not written by then."""
        written: dict[bytes, None] = {}
        reads: list[Step] = []
        for what, key, value in txn.steps:
            if what != "r":
                written[key] = None
            elif key not in written and value is not None:
                reads.append((what, key, value))
        if version and reads:
            now = self.history.tick()
            reader = MicroTxn(txn.client, txn.begin, reads, version, now, Outcome.OK)
            self._keep(reader)

    async def read_final(self, view: Snapshot) -> None:
        await super().read_final(view)
        txn = MicroTxn("end", self.history.tick())
        found = await view.get_many(self.keys)
        txn.version = await view.version()
        txn.steps = [("r", key, self.decode(found.get(key))) for key in self.keys]
        self._keep(txn)
        self.settle(txn, None, f"{txn.steps!r}")

    def inspect(self) -> Iterable[str]:
        for wrong in self.cycles():
            first, newline, cycle = wrong.partition("\n")
            yield f"{first} ({self.name}){newline}{cycle}"

    def replay(self) -> list[str]:
        """By versions, with what became of the unknown ones."""
        wrong: list[str] = []
        versions = {id(trail.op): trail.version or 0 for trail in self.trails}
        placed: list[tuple[int, MicroTxn]] = []
        for txn in self.txns:
            version = versions.get(id(txn))
            if version is None:  # it only reads
                version = txn.version if txn.outcome is Outcome.OK else 0
            elif txn.outcome is Outcome.OK and version != txn.version:
                wrong.append(
                    f"{told(txn)} was acknowledged at {txn.version} and stands at {version}"
                )
            elif txn.outcome is Outcome.FAILED and version:
                wrong.append(f"{told(txn)} failed and stands at {version}")
            if version:
                placed.append((version, txn))
        wrong += self._in_order(placed)
        wrong += real_time(placed)
        return wrong

    def _in_order(self, placed: list[tuple[int, MicroTxn]]) -> Iterable[str]:
        placed.sort(key=lambda one: (one[0], all(what == "r" for what, _, _ in one[1].steps)))
        state: dict[bytes, Any] = {key: self.decode(None) for key in self.keys}
        for version, txn in placed:
            for what, key, value in txn.steps:
                if what != "r":
                    state[key] = self.written(state[key], value)
                elif value != state[key]:
                    yield f"{told(txn)} at {version} read {key!r} = {value!r}, but by versions it was {state[key]!r}"


class ListAppend(Micro):
    """Appends of unique numbers to lists: a read of one tells the order of all appends before it."""

    name: ClassVar[str] = "list-append"
    writing: ClassVar[str] = "append"

    @staticmethod
    def decode(value: bytes | None) -> list[int]:
        return [int(each, 16) for each in value.split()] if value else []

    async def write(self, tx: Transaction, key: bytes, number: int) -> None:
        before = await tx.get(key, b"")
        tx.put(key, before + b" %x" % number)

    @staticmethod
    def written(before: list[int], number: int) -> list[int]:
        return [*before, number]

    def cycles(self) -> list[str]:
        return judges.judge_list_append(self.txns)

    def promises(self) -> Sequence[Promise]:
        return [Promise([key], cut_short) for key in self.keys]


class RwRegister(Micro):
    """Blind writes of unique numbers, and reads."""

    name: ClassVar[str] = "rw-register"
    writing: ClassVar[str] = "w"

    @staticmethod
    def decode(value: bytes | None) -> int | None:
        return int(value, 16) if value else None

    async def write(self, tx: Transaction, key: bytes, number: int) -> None:
        tx.put(key, b"%x" % number)

    @staticmethod
    def written(_before: int | None, number: int) -> int:
        return number

    def cycles(self) -> list[str]:
        return judges.judge_rw_register(self.txns)


def cut_short(state: State, before: State) -> str:
    """A list is what it was, with more behind it: so each is the beginning of what it is in the end."""
    for key, old in before.items():
        new = state[key] or b""
        if old and new != old and not new.startswith(old + b" "):
            return f"the list{new.decode()} does not begin with{old.decode()}"
    return ""


def real_time(placed: Sequence[tuple[int, MicroTxn]]) -> Iterable[str]:
    """Who began after another was acknowledged has no lower version, and one that writes has a higher one."""
    events = [(txn.begin, 0, number) for number, (_, txn) in enumerate(placed)]
    events += [
        (txn.end, 1, number) for number, (_, txn) in enumerate(placed) if txn.outcome is Outcome.OK
    ]
    floor = 0
    for _, ended, number in sorted(events):
        version, txn = placed[number]
        if ended:
            floor = max(floor, version)
        elif version < floor:
            yield f"{told(txn)} at {version} began after {floor} was acknowledged"


def told(txn: MicroTxn) -> str:
    return f"{txn.client} {txn.begin}: {txn.steps!r}"
