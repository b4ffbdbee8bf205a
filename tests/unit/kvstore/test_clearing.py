"""Claims of `clear_range` (kvstore/clearing.py) that its tests beside the other spans have no room for."""

from __future__ import annotations

from kvstore.clearing import PAGE_ROWS
from kvstore.client import Database
from tests.unit.kvstore.fake_cluster import FakeCluster, simulate
from txn.messages import Prepare


def test_clear_range_deletes_a_thousand_rows_in_each_transaction():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(**{f"k{number:04}": b"v" for number in range(2 * PAGE_ROWS)})
        assert await db.clear_range(prefix=b"k") == 2 * PAGE_ROWS
        assert len(cluster.of(Prepare)) == 2

    simulate(test)
