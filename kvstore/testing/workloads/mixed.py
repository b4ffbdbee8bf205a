"""Random transactions: any reads and scans, then any writes, deletions and deletions of spans, judged by replay alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any, ClassVar, Final

from kvstore.client import Database, Transaction
from kvstore.testing.history import TxnOp
from kvstore.testing.workloads.traced import Traced

CELLS: Final = 3  # in each place
READS_MAX: Final = 9
DAWDLE_S: Final = 0.5


class Mixed(Traced):
    """Cells in every range, each with a unique value or none."""

    name: ClassVar[str] = "mixed"
    kinds_count: ClassVar[int] = 2

    def __init__(self, rng: random.Random, places: Sequence[bytes], **options: Any) -> None:
        super().__init__(rng, places, **options)
        self.cells = sorted(
            self.key(number) for number in range(CELLS * len(self.places) * self.scale)
        )
        self.watched = dict.fromkeys(self.cells)

    async def step(self, db: Database, client: str, rng: random.Random) -> None:
        await self.kind(rng, (self._change, self._read))(db, client, rng)

    async def _read(self, db: Database, client: str, rng: random.Random) -> None:
        await self.look(db, client, rng, self._some(rng, READS_MAX))

    def _some(self, rng: random.Random, most: int) -> list[bytes]:
        return sorted(rng.sample(self.cells, rng.randint(1, most)))

    def _span(self, rng: random.Random, *, wide: float = 0.0) -> tuple[bytes, bytes]:
        """Between two cells of one place; `wide`: how often of any two places, with what others have between."""
        cells = self.cells
        if rng.random() >= wide:
            place = self.prefix(rng.randrange(len(self.places)))
            cells = [cell for cell in cells if cell.startswith(place)]
        start, end = sorted(rng.sample(cells, 2))
        return start, end

    async def _change(self, db: Database, client: str, rng: random.Random) -> None:
        reads = self._some(rng, 3) if rng.random() < 0.8 else []
        scanned = self._span(rng, wide=0.1) if rng.random() < 0.3 else None
        backward = rng.random() < 0.5
        dawdle_s = rng.expovariate(1 / DAWDLE_S) if rng.random() < 0.1 else 0.0
        cleared = self._span(rng) if rng.random() < 0.1 else None
        writes = {
            key: None if rng.random() < 0.2 else b"%x" % self.unique(rng)
            for key in self._some(rng, 3)
        }

        async def changed(tx: Transaction, op: TxnOp) -> None:
            for key in reads:
                op.reads[key] = await tx.get(key)
            if scanned is not None:
                start, end = scanned
                rows = dict(await tx.scan(start, end, reverse=backward).to_list())
                op.reads |= {key: rows.get(key) for key in self.cells if start <= key < end}
            if dawdle_s:
                await asyncio.sleep(dawdle_s)
            if cleared is not None:
                start, end = cleared
                tx.delete_range(start, end)
                op.writes |= {key: None for key in self.cells if start <= key < end}
            op.writes |= writes

        await self.transact(db, client, rng, "mixed", changed)
