"""Deleting a span of any size: pages, each a transaction of its own, so that nothing grows with the span.

A page is looked at first, by its keys alone, and then deleted as a span: one entry for each range that it touches, whatever it
holds by then. A page reads fewer bytes (txn/reads.py) than one transaction may delete (txn/values.py).
Nothing is remembered between pages but the place, so it may end, and be begun again, anywhere.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final

from kvstore.errors import TransactionTooLarge

if TYPE_CHECKING:
    from kvstore.client import Database

PAGE_ROWS: Final = 1_000  # deleted by one transaction, at most


async def clearing(db: Database, low: bytes, high: bytes) -> AsyncIterator[tuple[bytes, int]]:
    """After each page: the key up to which [low, high) has been emptied, and how many rows there were so far."""
    rows = 0
    while low < high:
        pages = db.snapshot().view.pages(
            low, high, reverse=False, keys_only=True, rows_max=PAGE_ROWS
        )
        pages.at_once(PAGE_ROWS)
        page = await pages.next()
        if page.rows:
            try:
                await db.delete_range(low, page.end)
            except TransactionTooLarge:  # others have written into it: in smaller pieces
                for key, _value in page.rows:
                    await db.delete(key)
        rows += len(page.rows)
        low = page.end
        yield low, rows
