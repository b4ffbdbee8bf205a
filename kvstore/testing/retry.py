"""`inject_retry_errors`: a client whose transactions fail now and then, in the ways in which they really may.

What fails, and with what, is what the product itself can raise there (kvstore/errors.py):

    begin    Unavailable, Throttled           the cluster was not reached; nothing has happened
    read     Unavailable, TransactionTooOld   in get, get_many, scan
    commit   Conflict, Throttled, Unavailable, TransactionTooOld   nothing has happened, and never will
    unknown  CommitUnknown                    half of them after the commit has really happened, half without

All but the last are retryable: `run` and `transactional` begin again. CommitUnknown goes to the caller, who can ask
`outcome(tx.id)`, or run again with the same idempotency_key. Reads and writes outside of transactions are left alone.
A transaction that wrote nothing has no commit that could fail.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any, Final, Self, overload

from kvstore.client import Database
from kvstore.errors import (
    CommitUnknown,
    Conflict,
    KVError,
    Throttled,
    TransactionTooOld,
    Unavailable,
)
from kvstore.reads import Page, Pages
from kvstore.scans import RowScan
from kvstore.sync import Client
from kvstore.transactions import Transaction, TransactionOptions

POINTS: Final = ("begin", "read", "commit", "unknown")
IN_A_ROW: Final = 3
RETRY_AFTER_S: Final = 0.001
INJECTED: Final = "injected by a test"


class Faults:
    """Decides which of the places that are passed fails. `injected`: how often, by code of the error."""

    def __init__(
        self, rng: random.Random, rate: float, points: Collection[str], in_a_row: int
    ) -> None:
        self.injected: dict[str, int] = {}
        self.rng = rng
        self._rate = rate
        self._points = points
        self._in_a_row = in_a_row
        self._row = 0

    def here(self, point: str) -> bool:
        """Whether this place fails now."""
        return (
            point in self._points and self._row < self._in_a_row and self.rng.random() < self._rate
        )

    def error(self, point: str, key: bytes = b"") -> KVError:
        """What it fails with."""
        self._row += 1
        error = self._of(point, key)
        self.injected[error.code] = self.injected.get(error.code, 0) + 1
        return error

    def went_well(self) -> None:
        """A transaction has ended as it should."""
        self._row = 0

    def _of(self, point: str, key: bytes) -> KVError:
        unavailable = Unavailable(INJECTED)
        too_old = TransactionTooOld(INJECTED)
        throttled = Throttled(RETRY_AFTER_S, INJECTED)
        if point == "begin":
            return self.rng.choice((unavailable, throttled))
        if point == "read":
            return self.rng.choice((unavailable, too_old))
        if point == "commit":
            conflict = Conflict(key, message=f"conflict at key {key!r}, {INJECTED}")
            return self.rng.choice((conflict, conflict, throttled, unavailable, too_old))
        return CommitUnknown(INJECTED)


class _Transaction(Transaction):
    """One that may fail."""

    faults: Faults

    async def __aenter__(self) -> Self:
        if self.faults.here("begin"):
            raise self.faults.error("begin")
        return await super().__aenter__()

    async def commit(self) -> int | None:
        version = await super().commit()
        self.faults.went_well()
        return version

    async def _read(self, keys: list[bytes]) -> dict[bytes, bytes | None]:
        if self.faults.here("read"):
            raise self.faults.error("read")
        return await super()._read(keys)

    async def _read_below(self, key: bytes) -> bytes | None:
        if self.faults.here("read"):
            raise self.faults.error("read")
        return await super()._read_below(key)

    def scan(
        self,
        start: bytes = b"",
        end: bytes | None = None,
        *,
        prefix: bytes | None = None,
        limit: int | None = None,
        reverse: bool = False,
        keys_only: bool = False,
    ) -> RowScan:
        scan = super().scan(
            start, end, prefix=prefix, limit=limit, reverse=reverse, keys_only=keys_only
        )
        return RowScan(lambda: _Pages(scan._begin(), self.faults), limit)  # noqa: SLF001 - the same pages

    async def _commit(self) -> bytes:
        key = self._buffer.anchor_key
        if self.faults.here("commit"):
            raise self.faults.error("commit", key)
        unknown = self.faults.here("unknown")
        if unknown and self.faults.rng.random() < 0.5:
            if not self._txn_id:  # the id that the caller will ask about
                deadline = min(self._deadline, self._router.monotonic() + self._timeout_s)
                self._txn_id = self._committer.txn_id(await self._committer.begin_ts(deadline))
            raise self.faults.error("unknown")
        committed = await super()._commit()
        if unknown:
            self._txn_id, self._commit_version = committed, None
            raise self.faults.error("unknown")
        return committed


class _Pages:
    def __init__(self, pages: Pages, faults: Faults) -> None:
        self._pages = pages
        self._faults = faults

    async def next(self) -> Page:
        if self._faults.here("read"):
            raise self._faults.error("read")
        return await self._pages.next()


class InjectedDatabase(Database):
    """The same cluster through the same connections, with transactions that may fail. Closing it closes the original."""

    def __init__(self, original: Database, faults: Faults) -> None:
        original._started_router()  # noqa: SLF001 - a Database, as we are; raises if it is not open
        vars(self).update(vars(original))
        self._original, self._faults = original, faults

    @property
    def injected(self) -> dict[str, int]:
        """How many errors were raised so far, by code."""
        return dict(self._faults.injected)

    def begin(self, options: TransactionOptions, age: int = 0) -> Transaction:
        router = self._started_router()
        tx = _Transaction(
            router, self._committer, self._timeout_s, options, age=age, views=self._views
        )
        tx.faults = self._faults
        return tx

    async def start(self) -> None:
        await self._original.start()

    async def close(self) -> None:
        await self._original.close()


class InjectedClient(Client):
    """The same, blocking."""

    def __init__(self, original: Client, faults: Faults) -> None:
        thread, database = original._open()  # noqa: SLF001 - a Client, as we are
        vars(self).update(vars(original))
        self._original, self._database = original, InjectedDatabase(database, faults)
        self._opened = thread, self._database

    @property
    def injected(self) -> dict[str, int]:
        return self._database.injected

    def close(self) -> None:
        self._opened, self._closed = None, True
        self._original.close()


@overload
def inject_retry_errors(
    db: Database,
    rate: float = ...,
    *,
    seed: int = ...,
    rng: random.Random | None = ...,
    points: Collection[str] = ...,
    in_a_row: int = ...,
) -> InjectedDatabase: ...
@overload
def inject_retry_errors(
    db: Client,
    rate: float = ...,
    *,
    seed: int = ...,
    rng: random.Random | None = ...,
    points: Collection[str] = ...,
    in_a_row: int = ...,
) -> InjectedClient: ...
def inject_retry_errors(
    db: Database | Client,
    rate: float = 0.2,
    *,
    seed: int = 0,
    rng: random.Random | None = None,
    points: Collection[str] = POINTS,
    in_a_row: int = IN_A_ROW,
) -> Any:
    """A second client over `db` whose transactions fail at random; `db` itself goes on as before.

    Args:
        db: an open client, asynchronous or blocking.
        rate: the chance at each place that a transaction passes, 0 to 1. seed: of the draws; or rng, to draw from.
        points: the places: "begin", "read", "commit", "unknown" (see the module).
        in_a_row: so many errors come at most until a transaction has ended well: `run` thus ends at any rate.

    Its property `injected` counts what was raised. Raises: ClientClosed: it is not open; ValueError.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"a rate is from 0 to 1, not {rate}")
    if in_a_row < 1:
        raise ValueError("in_a_row is at least 1")
    for point in points:
        if point not in POINTS:
            raise ValueError(f"there is no point {point!r}: {', '.join(POINTS)}")
    faults = Faults(rng or random.Random(f"retry errors/{seed}"), rate, tuple(points), in_a_row)
    if isinstance(db, Client):
        return InjectedClient(db, faults)
    if isinstance(db, Database):
        return InjectedDatabase(db, faults)
    raise TypeError("inject_retry_errors wraps a Database or a Client")
