"""Transactions and snapshots as users see them.

A transaction reads at one timestamp, buffers its writes, and sends them at commit, with guards over what it read. Only
locks (kvstore/locking.py) are held anywhere before that.
"""

from __future__ import annotations

import base64
import binascii
import enum
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, NamedTuple, Self, overload

import msgspec

from kvstore import limits
from kvstore.buffer import ReadSpans, WriteBuffer, value_over
from kvstore.commits import Committer
from kvstore.cutting import WriteSet
from kvstore.errors import (
    Conflict,
    Deadlock,
    InvalidArgument,
    KVError,
    LockTimeout,
    SnapshotTooOld,
    TransactionClosed,
    TransactionTooOld,
    Unavailable,
)
from kvstore.locking import GRACE_S, TransactionLocks, lock_until
from kvstore.open_views import OpenViews
from kvstore.reads import Entry, Found, Pages, View
from kvstore.router import Router
from kvstore.scans import OwnPages, RowScan, scan_bounds
from kvstore.writes import BufferedWrites
from replication.probes import reached
from txn.types import TXN_ID_BYTES, WriteKind, age_of, begin_ts_of, point_end

RESERVE_S: Final = 2.0  # to wait for what an earlier attempt lost; then it is tried without a lock
ID_AGE_S_MAX: Final = 60.0  # a transaction's id may rest on a timestamp seen so long ago


@dataclass(frozen=True, slots=True)
class Committed:
    """The transaction happened, at this version."""

    version: int


@dataclass(frozen=True, slots=True)
class Aborted:
    """The transaction did not happen, and never will."""


class Snapshot:
    """A read-only view at one version; what it reads is never in anybody's way."""

    def __init__(self, view: View) -> None:
        self._view = view

    @property
    def view(self) -> View:
        """What it reads by; for code that goes page by page."""
        return self._view

    async def version(self) -> int:
        """The version it reads at: the one given, or that of its first read, or the newest as of now."""
        return await self._view.version()

    @overload
    async def get(self, key: bytes, default: None = None) -> bytes | None: ...
    @overload
    async def get(self, key: bytes, default: bytes) -> bytes: ...
    async def get(self, key: bytes, default: bytes | None = None) -> bytes | None:
        """The value, or `default`. Raises: SnapshotTooOld when versions that old are no longer kept."""
        limits.validate_key(key)
        value = (await self._view.get(key)).value
        return default if value is None else value

    async def get_entry(self, key: bytes) -> Entry | None:
        limits.validate_key(key)
        found = await self._view.get(key)
        return None if found.value is None else Entry(key, found.value, found.version)

    async def get_many(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """The keys that have a value, with it."""
        wanted = validate_keys(keys)
        return present(wanted, await self._view.read(wanted))

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
        """The rows of [start, end), or with a prefix, in order."""
        low, high = scan_bounds(start, end, prefix, limit)
        view = self._view

        def begin() -> Pages:
            return view.pages(low, high, reverse=reverse, keys_only=keys_only, rows_max=limit or 0)

        return RowScan(begin, limit)

    async def __aenter__(self) -> Self:
        if self._view.views is not None:
            self._view.views.add(self._view, kept=True)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._view.views is not None:
            self._view.views.remove(self._view)


class Stage(enum.Enum):
    OPEN = "open"
    COMMITTING = "committing"
    COMMITTED = "committed"
    ENDED = "ended"  # rolled back, or failed


class Contested(NamedTuple):
    """A key over which an attempt met a conflict, and whether it wrote it."""

    key: bytes
    written: bool


class TransactionOptions(msgspec.Struct, frozen=True):
    read_only: bool = False
    timeout_s: float | None = None  # of the whole transaction; None: each call has the client's
    priority: int = 0
    contested: tuple[Contested, ...] = ()  # what earlier attempts lost to others


class Transaction(BufferedWrites):
    """One attempt of a transaction. `async with`: commits on a clean exit, rolls back on an exception.
    Reads see one snapshot and the transaction's own writes; several may be awaited together. Writes are not awaited.
    Raises from any method: TransactionClosed after the end; TransactionTooOld after limits.TXN_AGE_S_MAX.
    """

    def __init__(
        self,
        router: Router,
        committer: Committer,
        timeout_s: float,
        options: TransactionOptions,
        *,
        age: int = 0,
        views: OpenViews | None = None,
    ) -> None:
        self._router = router
        self._committer = committer
        self._timeout_s = timeout_s
        self._options = options
        self._age = age
        self._stage = Stage.OPEN
        now = router.monotonic()
        self._begun_at = now
        self._deadline = float("inf") if options.timeout_s is None else now + options.timeout_s
        self._view = View(router, timeout_s, deadline=self._deadline)
        self._view.views = views
        self._buffer = WriteBuffer()
        self._spans = ReadSpans()
        self._locks = TransactionLocks(committer.keeper, self._deadline)
        self._txn_id = b""
        self._id_told = False
        self._commit_version: int | None = None
        self._result_due = False  # `run` is going to write a result into it
        self._ended_by: KVError | None = None  # what ended it before anybody wished to

    # --- what it is -------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """A token for `Database.outcome`. Raises InvalidArgument before the first write."""
        if not self._buffer:
            raise InvalidArgument("a transaction has an id from its first write on")
        if not self._txn_id:
            if self._router.monotonic() - self._router.seen_at > 2 * ID_AGE_S_MAX:
                raise Unavailable("begin the transaction with `async with`, or read first")
            self._txn_id = self._committer.txn_id(self._router.seen_ts)
            self._view.rest_on(self._router.seen_ts)
        self._id_told = True
        return encode_token(self._txn_id, self._buffer.anchor_key)

    @property
    def read_version(self) -> int | None:
        """The version that it reads at; None before its first read."""
        return self._view.at or None

    @property
    def commit_version(self) -> int | None:
        """None before the commit, and for a transaction that wrote nothing."""
        return self._commit_version

    @property
    def age(self) -> int:
        """begin_ts and priority of the first attempt, for the next one to inherit (0: it got no id)."""
        if self._age or self._locks.age or not self._txn_id:
            return self._age or self._locks.age
        return age_of(begin_ts_of(self._txn_id), self._options.priority)

    # --- reads ------------------------------------------------------------------------------------

    @overload
    async def get(self, key: bytes, default: None = None) -> bytes | None: ...
    @overload
    async def get(self, key: bytes, default: bytes) -> bytes: ...
    async def get(self, key: bytes, default: bytes | None = None) -> bytes | None:
        """The value in this transaction's snapshot, or as this transaction has written it; or `default`."""
        self._require_open()
        limits.validate_key(key)
        if self._buffer or self._locks.found:
            value = (await self._read([key])).get(key)
        else:
            value = await self._read_below(key)
        return default if value is None else value

    async def get_many(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """The keys that have a value, with it."""
        self._require_open()
        wanted = validate_keys(keys)
        values = await self._read(wanted)
        return {key: value for key in wanted if (value := values.get(key)) is not None}

    async def get_for_update(
        self, key: bytes, *, shared: bool = False, timeout: float | None = None
    ) -> bytes | None:
        """Lock a key until this transaction ends, and read its newest value (not the snapshot's); None: it has none.

        Nobody else writes a locked key or locks it, except that shared locks go together. The commit validates what was
        read, even if nothing is written: a lock that got lost (a leader died, its lease ended) costs a Conflict. The locks of
        a transaction that nobody has any more, though it was not ended, end with their lease.
        Args: timeout: seconds to wait; 0: do not. Without it, the transaction's time, or the client's. An answer that does not
        come is waited for a second longer.
        Raises: LockTimeout, Deadlock: this transaction is over then, and `run` tries it again; who catches it and has written
        something meets it anew at the end of the block.
        """
        return (await self.get_many_for_update((key,), shared=shared, timeout=timeout)).get(key)

    async def get_many_for_update(
        self, keys: Iterable[bytes], *, shared: bool = False, timeout: float | None = None
    ) -> dict[bytes, bytes]:
        """The same for several keys: those that have a value, with it. `timeout` is for all of them together.

        They are locked one after the other in the order of the keys, so two such calls alone never make a deadlock.
        """
        self._writable()
        wanted = validate_keys(keys)
        until = lock_until(self._router.monotonic(), self._timeout_s, timeout, self._deadline)
        if not self._locks.owner:
            # as new as for a commit, though the oracle may have to be asked: who gives way to whom goes by its age
            self._begin_locks(await self._committer.begin_ts(min(self._until(), until + GRACE_S)))
        try:
            for key in sorted(wanted):
                locked = await self._locks.lock(key, bool(shared), until)
                self._view.rest_on(locked.at)
        except (Deadlock, LockTimeout) as error:
            if self._stage is Stage.OPEN:  # else a commit beside it decides
                self._end()
                self._ended_by = error
            raise
        return await self.get_many(wanted)

    async def _committed_version(self, key: bytes) -> int:
        """The version of what `get` found there, without this transaction's own writes; 0: there was no such key."""
        self._require_open()
        limits.validate_key(key)
        try:
            found = self._locks.found.get(key) or await self._view.get(key)
        except SnapshotTooOld as error:
            raise TransactionTooOld(error.message) from error
        return 0 if found.value is None else found.version

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
        """The rows of [start, end), or with a prefix, in order, with this transaction's own writes."""
        self._require_open()
        low, high = scan_bounds(start, end, prefix, limit)
        view, buffer = self._view, self._buffer
        guarded = None if self._options.read_only else self._spans

        def begin() -> Pages:
            bare = keys_only and not buffer.conditional
            below = view.pages(low, high, reverse=reverse, keys_only=bare)
            return OwnPages(
                below, buffer, guarded, self._require_open, limit, reverse, keys_only, bare
            )

        return RowScan(begin, limit)

    def add_read_conflict(self, start: bytes, end: bytes | None = None) -> None:
        """Guard the key `start`, or [start, end), as if it had been read: nobody may change it before the commit."""
        self._require_open()
        if end is None:
            limits.validate_key(start)
            end = point_end(start)
        else:
            start, end = limits.validate_range(start, end)
        self._spans.add(start, end)

    # --- writes: those of BufferedWrites ------------------------------------------------------------

    def _writable(self) -> WriteBuffer:
        self._require_open()
        if self._options.read_only:
            raise InvalidArgument("the transaction is read-only")
        return self._buffer

    def _committed_at(self) -> int | None:
        return self._commit_version

    # --- for `run`: a row of the system's keys, which users cannot name ---

    async def recall(self, row: bytes) -> bytes | None:
        """What an earlier run has left in this row; if nothing, the row becomes this transaction's anchor."""
        buffer = self._writable()
        value = (await self._read([row])).get(row)
        if value is None:
            buffer.put(row, b"")
            self._result_due = True
        return value

    def remember(self, row: bytes, value: bytes) -> None:
        self._writable().put(row, value)
        self._result_due = False

    # --- the end ----------------------------------------------------------------------------------

    async def commit(self) -> int | None:
        """Commit now; returns the version (None if nothing was written).

        Raises: Conflict and the like (nothing happened); CommitUnknown when the time ran out first.
        """
        try:
            self._require_open()
        except TransactionTooOld:
            self._end()
            raise
        if self._result_due:
            raise InvalidArgument("run commits by itself, with the result: its function must not")
        if not self._buffer and not self._locks.found:
            self._stage = Stage.COMMITTED  # it read one snapshot: that is its place in the order
            self._locks.end()
            return None
        self._stage = Stage.COMMITTING
        try:
            committed = await self._commit()
        except BaseException:
            self._end()
            raise
        self._stage = Stage.COMMITTED
        self._locks.end(committed=True, touched=self._touched)
        self._txn_id = committed
        return self._commit_version

    async def _commit(self) -> bytes:
        deadline = self._until()
        # a span may be guarded though nothing was read: then from now on
        guards = self._spans.guards(await self._view.version()) if len(self._spans) else []
        if not self._txn_id:
            begin_ts = await self._committer.begin_ts(deadline)
            if not self._txn_id:  # another task may have read `id` meanwhile
                self._txn_id = self._committer.txn_id(begin_ts)
        buffer, locks = self._buffer, self._locks
        guards += locks.guards()
        done = await self._committer.commit(
            WriteSet(buffer.anchor_key or locks.first, buffer.writes(), [], guards, locks.owner),
            deadline,
            patient=False,
            renames=lambda: not self._id_told,  # another task may read it during the commit
            txn_id=self._txn_id,
            age=self._age,
            priority=self._options.priority,
            on_rename=self._renamed,
        )
        self._commit_version = done.version if buffer else None
        return done.txn_id

    def _renamed(self, txn_id: bytes) -> None:
        self._txn_id = txn_id

    async def rollback(self) -> None:
        """Give it up. Nothing was written, so nothing need be undone; locks are given back. May be called again."""
        if self._stage is Stage.OPEN:
            self._end()

    async def __aenter__(self) -> Self:
        if self._view.views is not None:
            self._view.views.add(self._view, kept=True)
        try:
            begin_ts = await self._committer.begin_ts(self._until(), ID_AGE_S_MAX)
            if self._options.contested:
                await self._reserve(begin_ts)
        except BaseException:  # `async with` does not call __aexit__ then
            self._end()
            if self._view.views is not None:
                self._view.views.remove(self._view)
            raise
        return self

    async def _reserve(self, begin_ts: int) -> None:
        """Keep others from writing what earlier attempts lost, before the snapshot is chosen: so this one sees the newest,
        and nothing newer comes. The keys are read like any other; where there is no lock to be had, it goes on without.
        """
        self._begin_locks(begin_ts)
        until = lock_until(self._router.monotonic(), RESERVE_S, None, self._deadline)
        try:
            for key, written in sorted(self._options.contested):
                reply = await self._locks.reserve(key, shared=not written, until=until)
            self._view.begin_with(key, reply)
            reached("contested_key_locked")
        except KVError:  # what is wrong besides, the reads and the commit will tell
            reached("contested_key_not_locked")
            self._locks.end()
            self._locks = TransactionLocks(self._committer.keeper, self._deadline)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is not None:
                await self.rollback()
            elif self._stage is Stage.OPEN:
                await self.commit()
            elif self._ended_by is not None and self._buffer:  # a clean exit says: written
                raise self._ended_by
        finally:
            if self._view.views is not None:
                self._view.views.remove(self._view)

    # --- inside -----------------------------------------------------------------------------------

    def _touched(self, key: bytes) -> bool:
        return self._buffer.writes_key(key) or self._spans.covers(key)

    def contested_by(self, error: KVError) -> Contested | None:
        """For `run`: what the next attempt should lock first."""
        if not isinstance(error, Conflict) or not b"" < error.key < limits.USER_KEY_END:
            return None
        return Contested(error.key, self._buffer.writes_key(error.key))

    def _begin_locks(self, begin_ts: int) -> None:
        owner = self._txn_id or self._committer.txn_id(begin_ts)
        self._locks.begin(owner, self._age or age_of(begin_ts_of(owner), self._options.priority))

    def _until(self) -> float:
        return min(self._deadline, self._router.monotonic() + self._timeout_s)

    def _end(self) -> None:
        self._stage = Stage.ENDED
        self._locks.end()

    def _require_open(self) -> None:
        if self._stage is not Stage.OPEN:
            raise TransactionClosed(f"the transaction is {self._stage.value}")
        if self._router.monotonic() - self._begun_at > limits.TXN_AGE_S_MAX:
            # it stays open, so that the end of its block says so again; and nothing may be sent here: the blocking
            # client writes on its caller's thread
            raise TransactionTooOld(f"the transaction was open for over {limits.TXN_AGE_S_MAX:g} s")

    async def _read(self, keys: list[bytes]) -> dict[bytes, bytes | None]:
        """The keys with what they hold for this transaction; some of those that hold nothing may be missing."""
        values: dict[bytes, bytes | None] = {}
        asked: list[bytes] = []
        buffer = self._buffer
        if buffer:
            for key in keys:
                point = buffer.points.get(key)
                if point is None:
                    if not buffer.cleared(key):
                        asked.append(key)
                elif point.kind == WriteKind.PUT:
                    values[key] = point.value
                elif point.kind == WriteKind.STAMPED_VALUE:
                    value_over(point, None)  # raises
                elif point.kind != WriteKind.DELETE:
                    asked.append(key)
        else:
            asked = keys
        locked = self._locks.found
        left = [key for key in asked if key not in locked] if locked else asked
        try:
            found = await self._view.read(left) if left else {}
        except SnapshotTooOld as error:
            raise TransactionTooOld(error.message) from error
        self._require_open()  # still: else nothing guards what was read
        self._lay_over(asked, left, found, values)
        return values

    async def _read_below(self, key: bytes) -> bytes | None:
        """`_read` of one key by a transaction that has neither written nor locked anything so far."""
        try:
            found = await self._view.get(key)
        except SnapshotTooOld as error:
            raise TransactionTooOld(error.message) from error
        self._require_open()  # still: else nothing guards what was read
        if self._buffer or self._locks.found:  # by another task, meanwhile
            values: dict[bytes, bytes | None] = {}
            self._lay_over([key], [key], {key: found}, values)
            return values[key]
        if not self._options.read_only:
            self._spans.add_key(key)
        return found.value

    def _lay_over(
        self,
        asked: list[bytes],
        left: list[bytes],
        found: dict[bytes, Found],
        values: dict[bytes, bytes | None],
    ) -> None:
        """Into `values`, for the keys of `asked`: what is below, those of `left` as `found`, under what is written by now."""
        buffer, locked = self._buffer, self._locks.found
        if buffer.stamps:
            for key in asked:
                at = locked[key].at if key in locked else self._view.at
                buffer.require_readable(key, point_end(key), at)
        for key in left:
            if not self._options.read_only:
                self._spans.add_key(key)
        for key in asked:
            point = buffer.points.get(key)
            below = locked[key].value if key in locked else found[key].value
            if point is not None:
                values[key] = value_over(point, below)
            else:
                values[key] = None if buffer.cleared(key) else below


# --- small things shared with the client ----------------------------------------------------------


def validate_keys(keys: Iterable[bytes]) -> list[bytes]:
    """Each once, in order. Raises: InvalidArgument, KeyTooLarge."""
    if isinstance(keys, bytes | str):
        raise InvalidArgument("keys must be several")
    wanted: dict[bytes, None] = {}
    for key in keys:
        limits.validate_key(
            key
        )  # first: a bytearray cannot be looked up, a memoryview is taken for its bytes
        wanted[key] = None
    return list(wanted)


def present(keys: list[bytes], found: dict[bytes, Found]) -> dict[bytes, bytes]:
    return {key: value for key in keys if (value := found[key].value) is not None}


def encode_token(txn_id: bytes, anchor_key: bytes) -> str:
    return base64.urlsafe_b64encode(txn_id + anchor_key).decode().rstrip("=")


def decode_token(token: str) -> tuple[bytes, bytes]:
    """(txn_id, anchor key). Raises: InvalidArgument."""
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise InvalidArgument("that is not a transaction's id") from error
    # the start of a delete_range may be the anchor
    if not TXN_ID_BYTES < len(raw) <= TXN_ID_BYTES + limits.BOUND_BYTES_MAX:
        raise InvalidArgument("that is not a transaction's id")
    return raw[:TXN_ID_BYTES], raw[TXN_ID_BYTES:]
