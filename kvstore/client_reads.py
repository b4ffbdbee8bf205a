"""The reading half of the client: keys, spans, snapshots; at the leaders or, where staleness is allowed, anywhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, overload

from kvstore import limits
from kvstore.errors import ClientClosed, InvalidArgument
from kvstore.follower_reads import Replicas, ReplicaView, checked_staleness
from kvstore.open_views import OpenViews
from kvstore.ports import Clock
from kvstore.reads import Entry, View
from kvstore.router import Router
from kvstore.scans import RowScan, scan_bounds
from kvstore.transactions import Snapshot, present, validate_keys
from txn.messages import Read, ReadReply


class DatabaseReads:
    """What `Database` (kvstore/client.py) reads with."""

    def __init__(self, router: Router, clock: Clock, timeout_s: float, session: int) -> None:
        self._router = router
        self._monotonic = clock.monotonic
        self._timeout_s = timeout_s
        self._replicas = Replicas(router)
        self._views = OpenViews(router, session)
        self._started = False
        self._closed = False

    @overload
    async def get(
        self,
        key: bytes,
        default: None = None,
        *,
        max_staleness: float | None = None,
        timeout: float | None = None,
    ) -> bytes | None: ...
    @overload
    async def get(
        self,
        key: bytes,
        default: bytes,
        *,
        max_staleness: float | None = None,
        timeout: float | None = None,
    ) -> bytes: ...
    async def get(
        self,
        key: bytes,
        default: bytes | None = None,
        *,
        max_staleness: float | None = None,
        timeout: float | None = None,
    ) -> bytes | None:
        """The newest value, or `default`: that of every write acknowledged before this call, or a later one.

        max_staleness: seconds; see `snapshot`.
        """
        limits.validate_key(key)
        if max_staleness is not None:
            found = (await self._view(timeout, max_staleness).get(key)).value
            return default if found is None else found
        router = self._started_router()
        now = self._monotonic()
        timeout_s = self._timeout_s if timeout is None else self._timeout(timeout)
        call = router.open(key, b"", now, now + timeout_s)
        router.submit(call, Read(call.id, call.range_id, call.version, 0, [key]), len(key))
        reply = await router.answer(call)
        assert isinstance(reply, ReadReply)
        value = reply.values[0]
        return default if value is None else value

    async def get_entry(
        self, key: bytes, *, max_staleness: float | None = None, timeout: float | None = None
    ) -> Entry | None:
        """The newest value with its version; None if there is none. max_staleness: see `snapshot`."""
        limits.validate_key(key)
        found = await self._view(timeout, max_staleness).get(key)
        return None if found.value is None else Entry(key, found.value, found.version)

    async def get_many(
        self,
        keys: Iterable[bytes],
        *,
        max_staleness: float | None = None,
        timeout: float | None = None,
    ) -> dict[bytes, bytes]:
        """The keys that have a value, with it; all of one instant. max_staleness: see `snapshot`."""
        wanted = validate_keys(keys)
        return present(wanted, await self._view(timeout, max_staleness).read(wanted))

    def scan(
        self,
        start: bytes = b"",
        end: bytes | None = None,
        *,
        prefix: bytes | None = None,
        limit: int | None = None,
        reverse: bool = False,
        keys_only: bool = False,
        at: int | None = None,
        max_staleness: float | None = None,
    ) -> RowScan:
        """The rows of [start, end), or with a prefix, in order, all at one version (`at`, or the newest).

        `async for key, value in db.scan(...)`, or `await db.scan(...).to_list()`. max_staleness: see `snapshot`.
        """
        low, high = scan_bounds(start, end, prefix, limit)
        wanted, staleness_s = _at(at), checked_staleness(max_staleness, at)

        def begin() -> Any:
            view = self._lasting_view(wanted, staleness_s)
            return view.pages(low, high, reverse=reverse, keys_only=keys_only, rows_max=limit or 0)

        return RowScan(begin, limit)

    def snapshot(
        self,
        at: int | None = None,
        *,
        max_staleness: float | None = None,
        timeout: float | None = None,
    ) -> Snapshot:
        """A read-only view at one version: `at`, or as of its first read. timeout: seconds for each of its reads.

        max_staleness: seconds. Any replica may answer then, from what it knows for certain: everything that was acknowledged
        so long before the first read is seen, and maybe newer things; this client's own last writes perhaps not. A later stale
        read of the same client shows nothing older. If no replica is that young, the leader answers. Replicas run about
        `txn.closed_lag` (1 s) and half a second behind, so a bound of 2 s or more takes the load off the leaders.
        """
        staleness_s = checked_staleness(max_staleness, at)
        return Snapshot(self._lasting_view(_at(at), staleness_s, timeout))

    def _lasting_view(
        self, at: int, staleness_s: float | None, timeout: float | None = None
    ) -> View:
        router, timeout_s = self._started_router(), self._timeout(timeout)
        view: View
        if at or staleness_s is not None:
            view = ReplicaView(self._replicas, router, timeout_s, at=at, staleness_s=staleness_s)
        else:
            view = View(router, timeout_s)
        view.views = self._views
        return view

    def _view(self, timeout: float | None, max_staleness: float | None = None) -> View:
        router, timeout_s = self._started_router(), self._timeout(timeout)
        if max_staleness is None:
            return View(router, timeout_s)
        staleness_s = checked_staleness(max_staleness)
        return ReplicaView(self._replicas, router, timeout_s, staleness_s=staleness_s)

    def _started_router(self) -> Router:
        if not self._started or self._closed:
            raise ClientClosed("the client is not open")
        return self._router

    def _timeout(self, timeout: float | None) -> float:
        return self._timeout_s if timeout is None else limits.validate_timeout(timeout)


def checked_version(version: object) -> int:
    if type(version) is not int or not 0 <= version < 1 << 64:
        raise InvalidArgument("a version is a number of at most 64 bits")
    return version


def _at(at: int | None) -> int:
    if at is None:
        return 0
    if at == 0:
        raise InvalidArgument("no version is 0")
    return checked_version(at)
