"""Counters: what is acknowledged counts once, what failed does not, and what is unknown once or not at all.

Every number that is read, and every one that an increment returns, lies between what must have happened before it and
what may have. Twins are two counters in different ranges that are only changed together: they are always equal.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Final, NamedTuple

from kvstore.client import Database, Transaction
from kvstore.errors import KVError
from kvstore.testing.history import FOREVER, Outcome, TxnOp
from kvstore.testing.workloads.base import Promise, State
from kvstore.testing.workloads.traced import Traced

COUNTERS: Final = 4
TWINS: Final = 2  # pairs of them


class Counter(Traced):
    """Increments alone and in transactions, and by reading and writing; negative ones too, but not of even counters."""

    name: ClassVar[str] = "counter"
    kinds_count: ClassVar[int] = 4
    exact: ClassVar[bool] = False  # an increment alone tells no version

    def __init__(self, rng: random.Random, places: Sequence[bytes], **options: Any) -> None:
        super().__init__(rng, places, **options)
        self.singles = [self.key(number) for number in range(COUNTERS * self.scale)]
        self.twins = [
            (self.key(2 * pair, 1), self.key(2 * pair + 1, 1)) for pair in range(TWINS * self.scale)
        ]
        self.watched = dict.fromkeys([*self.singles, *itertools.chain(*self.twins)])

    async def step(self, db: Database, client: str, rng: random.Random) -> None:
        await self.kind(rng, (self._alone, self._both, self._rewrite, self._read))(db, client, rng)

    def _amount(self, rng: random.Random, number: int) -> int:
        return rng.randint(1, 9) * (-1 if number % 2 and rng.random() < 0.4 else 1)

    async def _alone(self, db: Database, client: str, rng: random.Random) -> None:
        number = rng.randrange(len(self.singles))
        key, by = self.singles[number], self._amount(rng, number)
        op = self.begin(client, "alone", rng)
        op.writes[key] = b"%+d" % by
        error: KVError | None = None
        try:
            op.reads[key] = b"%d" % await db.increment(key, by)
        except KVError as raised:
            error = raised
        self.end(op, error)

    async def _both(self, db: Database, client: str, rng: random.Random) -> None:
        pair, by = rng.choice(self.twins), self._amount(rng, 1)

        async def added(tx: Transaction, _op: TxnOp) -> None:
            for key in pair:
                tx.increment(key, by)

        await self._add(db, client, rng, dict.fromkeys(pair, by), added)

    async def _rewrite(self, db: Database, client: str, rng: random.Random) -> None:
        number = rng.randrange(len(self.singles))
        key, by = self.singles[number], self._amount(rng, number)

        async def added(tx: Transaction, op: TxnOp) -> None:
            before = int(await tx.get(key, b"0"))
            tx.put(key, b"%d" % (before + by))
            op.reads[key] = b"%d" % (before + by)  # as `_alone`: with its own

        await self._add(db, client, rng, {key: by}, added)

    async def _add(
        self, db: Database, client: str, rng: random.Random, amounts: dict[bytes, int], body: Any
    ) -> None:
        op = self.begin(client, "both" if len(amounts) > 1 else "rewrite", rng)
        op.writes |= {key: b"%+d" % by for key, by in amounts.items()}
        error: KVError | None = None
        try:
            async with db.transaction() as tx:
                await body(tx, op)
                self.leave_trail(op, tx, rng)
            op.version = tx.commit_version or 0
        except KVError as raised:
            error = raised
            op.reads.clear()
        self.end(op, error)

    async def _read(self, db: Database, client: str, rng: random.Random) -> None:
        keys = [rng.choice(self.singles), *rng.choice(self.twins)]
        await self.look(db, client, rng, sorted(keys), past=False)

    def promises(self) -> Sequence[Promise]:
        return [Promise(twins, unequal) for twins in self.twins]

    def inspect(self) -> Iterable[str]:
        wrong_fate = self._take_fates()
        yield from wrong_fate
        ops = [op for op in self.ops if op.outcome is not Outcome.FAILED]
        for key in self.watched:
            yield from self._check_key(key, ops)
        for op in self.ops:
            if op.outcome is Outcome.OK and not op.writes:
                yield from self._check_twins(f"{op.name!r} at {op.version}", op.reads)
        yield from self._check_twins("at the end", self.final)

    def _take_fates(self) -> list[str]:
        """T1: what an unknown transaction came to is known now."""
        wrong = []
        for trail in self.trails:
            op, version = trail.op, trail.version
            assert isinstance(op, TxnOp)
            if version is None:
                continue
            if op.outcome is Outcome.UNKNOWN:
                op.outcome = Outcome.OK if version else Outcome.FAILED
            elif (op.outcome is Outcome.OK) != bool(version):
                wrong.append(
                    f"Wrong-outcome: counter: {op.name!r} is {op.outcome.value}, but stands at {version}"
                )
        return wrong

    def _check_key(self, key: bytes, ops: Sequence[TxnOp]) -> Iterable[str]:
        bounds = Bounds(
            [
                Added(
                    op.begin,
                    op.end if op.outcome is Outcome.OK else FOREVER,
                    int(op.writes[key] or 0),
                )
                for op in ops
                if key in op.writes
            ]
        )
        returned: dict[int, bytes] = {}
        only_up = key in self.singles and self.singles.index(key) % 2 == 0
        for op in ops:
            value = op.reads.get(key, b"0") if key in op.reads else None
            if key not in op.reads or op.outcome is not Outcome.OK:
                continue
            number = int(value or 0)
            own = int(op.writes.get(key) or 0)
            low, high = bounds.at(op.begin, op.end, own)
            if not low <= number <= high:
                kind = "Lost-update" if number < low else "Doubled-update"
                yield f"{kind}: counter: {op.name!r} has {key!r} = {number}, which must be {low} to {high}"
            if own and only_up:
                other = returned.setdefault(number, op.name)
                if other is not op.name:
                    yield f"Lost-update: counter: {other!r} and {op.name!r} both brought {key!r} to {number}"
        number = int(self.final.get(key) or 0)
        low, high = bounds.at(FOREVER - 1, FOREVER, 0)
        if not low <= number <= high:
            kind = "Lost-update" if number < low else "Doubled-update"
            yield f"{kind}: counter: at the end {key!r} = {number}, which must be {low} to {high}"

    def _check_twins(self, what: str, found: Any) -> Iterable[str]:
        for one, two in self.twins:
            if one in found and two in found and int(found[one] or 0) != int(found[two] or 0):
                yield f"Torn-transaction: counter: {what} {one!r} = {found[one]!r}, but {two!r} = {found[two]!r}"


def unequal(twins: State, _before: State) -> str:
    one, two = (int(value or 0) for value in twins.values())
    return f"twins are {one} and {two}" if one != two else ""


class Added(NamedTuple):
    """An increment. `end` FOREVER: it may have happened."""

    begin: int
    end: int
    by: int


class Bounds:
    """What a counter may be, from its increments."""

    def __init__(self, added: Sequence[Added]) -> None:
        up = [one for one in added if one.by > 0]
        down = [one for one in added if one.by < 0]
        self._up_sure, self._up_maybe = _sums(up, "end"), _sums(up, "begin")
        self._down_sure, self._down_maybe = _sums(down, "end"), _sums(down, "begin")

    def at(self, begin: int, end: int, own: int) -> tuple[int, int]:
        """For a read within [begin, end] that follows the increment `own` of the same operation."""
        low = _below(self._up_sure, begin) + _below(self._down_maybe, end)
        high = _below(self._up_maybe, end) + _below(self._down_sure, begin)
        return low + max(own, 0), high + min(own, 0)


def _sums(added: Sequence[Added], instant: str) -> tuple[list[int], list[int]]:
    ordered = sorted((getattr(one, instant), one.by) for one in added)
    return [at for at, _ in ordered], list(
        itertools.accumulate((by for _, by in ordered), initial=0)
    )


def _below(sums: tuple[list[int], list[int]], instant: int) -> int:
    """The sum of all that is before the instant."""
    instants, totals = sums
    return totals[bisect.bisect_left(instants, instant)]
