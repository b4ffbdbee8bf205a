"""Money moves between accounts; none may be lost or made, at any version."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import ClassVar, Final

from kvstore.client import Database, Transaction
from kvstore.testing.history import Outcome, TxnOp
from kvstore.testing.workloads.base import Promise, State
from kvstore.testing.workloads.traced import Traced

ACCOUNTS: Final = 6
OPENING: Final = 100


class Bank(Traced):
    """Transfers of two accounts; reads of all of them at one version, which must add up. Balances may be negative."""

    name: ClassVar[str] = "bank"
    kinds_count: ClassVar[int] = 2

    def accounts(self) -> list[bytes]:
        return [self.key(number) for number in range(ACCOUNTS * self.scale)]

    def rows(self) -> dict[bytes, bytes]:
        return dict.fromkeys(self.accounts(), b"%d" % OPENING)

    async def step(self, db: Database, client: str, rng: random.Random) -> None:
        await self.kind(rng, (self._transfer, self._audit))(db, client, rng)

    async def _transfer(self, db: Database, client: str, rng: random.Random) -> None:
        source, target = rng.sample(self.accounts(), 2)
        amount = rng.randint(1, 5)
        together = rng.random() < 0.5

        async def moved(tx: Transaction, op: TxnOp) -> None:
            if together:
                found: dict[bytes, bytes] = await tx.get_many((source, target))
            else:
                found = {key: await tx.get(key, b"0") for key in (source, target)}
            op.reads |= {key: found.get(key) for key in (source, target)}
            op.writes[source] = b"%d" % (int(found.get(source, b"0")) - amount)
            op.writes[target] = b"%d" % (int(found.get(target, b"0")) + amount)

        await self.transact(db, client, rng, "move", moved)

    async def _audit(self, db: Database, client: str, rng: random.Random) -> None:
        await self.look(db, client, rng, self.accounts())

    def promises(self) -> Sequence[Promise]:
        return [Promise(self.accounts(), lambda state, _before: self._off(state))]

    def _off(self, balances: State) -> str:
        """What all accounts come to, if they do not add up."""
        wanted = OPENING * len(balances)
        total = sum(int(value or 0) for value in balances.values())
        return f"a total of {total}, not {wanted}" if total != wanted else ""

    def inspect(self) -> Iterable[str]:
        accounts = self.accounts()
        for op in self.ops:
            if op.outcome is Outcome.OK and len(op.reads) == len(accounts) and not op.writes:
                if off := self._off(op.reads):
                    yield f"Torn-snapshot: bank: {op.name!r} at {op.version} saw {off}"
        if off := self._off({key: self.final.get(key) for key in accounts}):
            yield f"Lost-money: bank: at the end there is {off}"
