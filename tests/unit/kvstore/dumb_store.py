"""A store in memory that looks like a Database, is strictly serializable because it is dumb, and can be told to err.

Every version of every key is kept, commits are checked and applied at one instant, and calls yield now and then, so that
clients interleave. `FAULTS` names the mistakes; each happens with some chance, as real ones do. With `unsure`, commits
end in CommitUnknown at times, whether they happened or not.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple, Self

from kvstore.errors import CommitUnknown, CompareFailed, Conflict
from kvstore.reads import Entry
from kvstore.transactions import Aborted, Committed
from kvstore.watches import Event, EventType
from txn.stamps import stamp

FAULTS: Final = (
    "lost update",  # a commit does not look at what was read
    "write skew",  # it looks at those keys only that it writes
    "phantom",  # it looks at the rows that were read, and not at gaps
    "stale read",  # of an earlier version
    "torn snapshot",  # half of the keys are of an earlier version
    "torn answer",  # the same, of a get_many that tells no version
    "torn transaction",  # half of the writes are applied
    "lost write",  # nothing is applied, and it is acknowledged
    "doubled write",  # increments are applied twice
    "dropped row",  # a scan misses one
    "risen row",  # deletions are acknowledged, and not applied
    "applied abort",  # it is refused, and applied
    "forgotten key",  # idempotency keys are
    "lying outcome",  # what was committed was aborted, it says
    "falling version",  # a commit's version may be below that of one before
    "unordered scan",
    "missed event",
    "doubled event",
    "unordered events",
)
CHANCE: Final = 0.25
VERSION_STEP: Final = 10
PAST: Final = 6 * VERSION_STEP


class Wish(NamedTuple):
    """One buffered write. `kind`: put (None deletes), add, clear (up to `end`), stamp (the number is `by`)."""

    kind: str
    key: bytes
    value: bytes | None = None
    by: int = 0
    end: bytes = b""


class DumbStore:
    """Args: fault: one of FAULTS, or none."""

    def __init__(self, rng: random.Random, fault: str = "", *, unsure: float = 0.0) -> None:
        assert not fault or fault in FAULTS
        self.rng = rng
        self.fault = fault
        self.unsure = unsure
        self.version = 1_000
        self.rows: dict[bytes, list[tuple[int, bytes | None]]] = {}
        self.outcomes: dict[str, int] = {}
        self.kept: dict[bytes, Any] = {}
        self.bounds: list[float | None] = []  # of staleness, as they were asked for
        self.calm = True  # nothing goes wrong yet, or any more

    def errs(self, fault: str, chance: float = CHANCE) -> bool:
        return self.fault == fault and not self.calm and self.rng.random() < chance

    async def wait(self) -> None:
        for _ in range(self.rng.randint(0, 4)):
            await asyncio.sleep(0)

    def at(self, key: bytes, version: int) -> tuple[bytes | None, int]:
        for when, value in reversed(self.rows.get(key, ())):
            if when <= version:
                return value, when
        return None, 0

    def span(self, start: bytes, end: bytes, version: int) -> list[tuple[bytes, bytes]]:
        found = []
        for key in sorted(self.rows):
            value, _ = self.at(key, version)
            if start <= key < end and value is not None:
                found.append((key, value))
        return found

    def apply(self, wishes: Iterable[Wish]) -> int:
        self.version += VERSION_STEP
        version = self.version
        mine = list(wishes)
        if self.errs("lost write"):
            return version
        if len(mine) > 1 and self.errs("torn transaction"):
            mine = mine[: len(mine) // 2]
        writes: dict[bytes, bytes | None] = {}
        for wish in mine:
            if wish.kind == "clear":
                writes |= dict.fromkeys(key for key, _ in self.span(wish.key, wish.end, version))
                continue
            value = wish.value
            if wish.kind == "stamp":
                writes[wish.key + stamp(self.version, wish.by)] = value
                continue
            if wish.kind == "add":
                before = writes[wish.key] if wish.key in writes else self.at(wish.key, version)[0]
                times = 2 if self.errs("doubled write") else 1
                value = b"%d" % (int(before or b"0") + times * wish.by)
            writes[wish.key] = value
        for key, value in writes.items():
            if value is not None or not self.errs("risen row"):
                self.rows.setdefault(key, []).append((version, value))
        if self.errs("falling version"):
            version -= PAST
        return version


class DumbScan:
    def __init__(self, rows: Callable[[], Awaitable[list[tuple[bytes, bytes]]]]) -> None:
        self._rows = rows

    async def to_list(self) -> list[tuple[bytes, bytes]]:
        return await self._rows()


class DumbSnapshot:
    def __init__(self, store: DumbStore, at: int | None) -> None:
        self.store, self.begun_at = store, at or 0

    def _version(self) -> int:
        if not self.begun_at:
            self.begun_at = self.store.version
            if self.store.errs("stale read"):
                self.begun_at -= PAST
        return self.begun_at

    async def version(self) -> int:
        return self._version()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, _kind: type[BaseException] | None, *_: object) -> None:
        pass

    async def get_entry(self, key: bytes) -> Entry | None:
        await self.store.wait()
        value, version = self.store.at(key, self._version())
        return None if value is None else Entry(key, value, version)

    async def get_many(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        return await self.many(keys, "torn snapshot")

    async def many(self, keys: Iterable[bytes], *faults: str) -> dict[bytes, bytes]:
        await self.store.wait()
        version, found = self._version(), {}
        wanted = list(keys)
        errs = any(self.store.errs(fault) for fault in faults)
        torn = wanted[: len(wanted) // 2] if errs else []
        for key in wanted:
            value, _ = self.store.at(key, version - (PAST if key in torn else 0))
            if value is not None:
                found[key] = value
        return found

    def scan(
        self,
        start: bytes = b"",
        end: bytes | None = None,
        *,
        prefix: bytes | None = None,
        limit: int | None = None,
        reverse: bool = False,
        keys_only: bool = False,
    ) -> DumbScan:
        low, high = (start, end or b"\xff") if prefix is None else (prefix, prefix + b"\xff")
        store = self.store

        async def rows() -> list[tuple[bytes, bytes]]:
            await store.wait()
            version = self._version() - (PAST if store.errs("torn snapshot") else 0)
            found = self.overlaid(store.span(low, high, version), low, high)
            if found and store.errs("dropped row"):
                found.pop(store.rng.randrange(len(found)))
            found.sort(reverse=reverse)
            if store.errs("unordered scan"):
                found.reverse()
            self.scanned(low, high, found[:limit], limit)
            return [(key, b"" if keys_only else value) for key, value in found[:limit]]

        return DumbScan(rows)

    def overlaid(
        self, rows: list[tuple[bytes, bytes]], _low: bytes, _high: bytes
    ) -> list[tuple[bytes, bytes]]:
        return rows

    def scanned(
        self, low: bytes, high: bytes, rows: list[tuple[bytes, bytes]], limit: int | None
    ) -> None:
        """Nothing guards a snapshot."""


class DumbTransaction(DumbSnapshot):
    def __init__(self, store: DumbStore) -> None:
        super().__init__(store, None)
        self.wishes: list[Wish] = []
        self.commit_version: int | None = None
        self._points: dict[bytes, None] = {}
        self._locked: dict[bytes, int] = {}  # -> the version that was read under the lock
        self._spans: list[tuple[bytes, bytes]] = []
        self._ended = False
        self._token = f"{store.rng.getrandbits(64):x}"

    @property
    def read_version(self) -> int | None:
        return self.begun_at or None

    @property
    def id(self) -> str:
        assert self.wishes
        return self._token

    async def get(self, key: bytes, default: bytes | None = None) -> bytes | None:
        await self.store.wait()
        self._points[key] = None
        value = self.overlay(key, self.store.at(key, self._version())[0])
        return default if value is None else value

    async def get_many(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        return {key: value for key in keys if (value := await self.get(key)) is not None}

    async def get_for_update(
        self,
        key: bytes,
        *,
        shared: bool = False,
        timeout: float | None = None,
    ) -> bytes | None:
        """The newest value; what comes in between is a conflict, as if the lock had been lost."""
        await self.store.wait()
        value, version = self.store.at(key, self.store.version)
        if self._locked.setdefault(key, version) != version:
            raise Conflict
        return self.overlay(key, value)

    async def get_many_for_update(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        found = {key: await self.get_for_update(key) for key in keys}
        return {key: value for key, value in found.items() if value is not None}

    def overlay(self, key: bytes, value: bytes | None) -> bytes | None:
        for wish in self.wishes:
            if wish.kind == "clear" and wish.key <= key < wish.end:
                value = None
            elif wish.key == key and wish.kind == "put":
                value = wish.value
            elif wish.key == key and wish.kind == "add":
                value = b"%d" % (int(value or b"0") + wish.by)
        return value

    def scanned(
        self, low: bytes, high: bytes, rows: list[tuple[bytes, bytes]], limit: int | None
    ) -> None:
        if limit is None or len(rows) < limit:
            self._spans.append((low, high))
        else:
            self._spans.append((min(rows)[0], max(rows)[0] + b"\0"))

    def put(self, key: bytes, value: bytes) -> None:
        self.wishes.append(Wish("put", key, value))

    def delete(self, key: bytes) -> None:
        self.wishes.append(Wish("put", key, None))

    def delete_range(self, start: bytes, end: bytes) -> None:
        self.wishes.append(Wish("clear", start, end=end))

    def increment(self, key: bytes, by: int = 1) -> None:
        self.wishes.append(Wish("add", key, by=by))

    def put_versionstamped_key(self, prefix: bytes, value: bytes) -> int:
        number = sum(wish.kind == "stamp" for wish in self.wishes)
        self.wishes.append(Wish("stamp", prefix, value, by=number))
        return number

    def versionstamp(self, number: int) -> bytes:
        assert self.commit_version
        return stamp(self.commit_version, number)

    async def commit(self) -> int | None:
        self._ended = True
        if not self.wishes:
            return None
        store = self.store
        await store.wait()
        unsure = not store.calm and store.rng.random() < store.unsure
        if unsure and store.rng.random() < 0.5:
            raise CommitUnknown
        if self._changed():
            raise Conflict
        refused = store.errs("applied abort", 0.1)
        version = store.apply(self.wishes)
        store.outcomes[self._token] = version
        if refused:
            raise Conflict
        if unsure:
            raise CommitUnknown
        self.commit_version = version
        return version

    def _changed(self) -> bool:
        store, seen = self.store, self.begun_at
        if store.fault == "lost update" and not store.calm:
            return False
        written = dict.fromkeys(wish.key for wish in self.wishes)
        points = dict(self._points)
        spans = self._spans
        if store.fault == "phantom" and not store.calm:
            for low, high in spans:
                points |= dict.fromkeys(key for key, _ in store.span(low, high, seen))
            spans = []
        for key, versions in store.rows.items():
            if store.fault == "write skew" and not store.calm and key not in written:
                continue
            if versions[-1][0] != self._locked.get(key, versions[-1][0]):
                return True
            guarded = key in points or any(low <= key < high for low, high in spans)
            if guarded and versions[-1][0] > seen:
                return True
        return False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and not self._ended:
            await self.commit()


class DumbWatch:
    """Of one key, or of a prefix."""

    def __init__(
        self, store: DumbStore, key: bytes | None, prefix: bytes | None, since: int | None
    ) -> None:
        self.store, self.key, self.prefix = store, key, prefix
        self.version = store.version if since is None else since
        self._ready: list[Event] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await asyncio.sleep(0)

    def _found(self) -> list[Event]:
        return sorted(
            (
                Event(EventType.PUT if value is not None else EventType.DELETE, key, value, version)
                for key, versions in self.store.rows.items()
                if (key == self.key if self.prefix is None else key.startswith(self.prefix))
                for version, value in versions
                if version > self.version
            ),
            key=lambda event: (event.version, event.key),
        )

    async def pull(self, _rows_max: int = 0) -> list[Event]:
        await self.store.wait()
        while not (events := self._found()):  # noqa: ASYNC110 - time is virtual
            await asyncio.sleep(0.01)
        self.version = events[-1].version
        if self.store.errs("missed event"):
            events.pop(self.store.rng.randrange(len(events)))
        elif self.store.errs("doubled event"):
            events.append(events[-1])
        elif self.store.errs("unordered events"):
            events.reverse()
        return events

    async def __anext__(self) -> Event:
        while not self._ready:
            before = self.version
            self._ready = await self.pull()
            self.version = before
        event = self._ready.pop(0)
        if not self._ready or self._ready[0].version != event.version:
            self.version = max(self.version, event.version)
        return event


class DumbDatabase:
    """One client's door to a DumbStore."""

    def __init__(self, store: DumbStore) -> None:
        self.store = store

    def watch(
        self, *, key: bytes | None = None, prefix: bytes | None = None, since: int | None = None
    ) -> DumbWatch:
        return DumbWatch(self.store, key, prefix, since)

    def snapshot(
        self, at: int | None = None, *, max_staleness: float | None = None
    ) -> DumbSnapshot:
        self.store.bounds.append(max_staleness)
        return DumbSnapshot(self.store, at)

    def transaction(self, *, read_only: bool = False) -> DumbTransaction:
        return DumbTransaction(self.store)

    async def get(self, key: bytes) -> bytes | None:
        entry = await self.get_entry(key)
        return None if entry is None else entry.value

    async def get_entry(
        self, key: bytes, *, max_staleness: float | None = None, timeout: float | None = None
    ) -> Entry | None:
        self.store.bounds.append(max_staleness)
        return await DumbSnapshot(self.store, None).get_entry(key)

    async def get_many(
        self, keys: Iterable[bytes], *, timeout: float | None = None
    ) -> dict[bytes, bytes]:
        return await DumbSnapshot(self.store, None).many(keys, "torn snapshot", "torn answer")

    async def put(
        self,
        key: bytes,
        value: bytes,
        *,
        if_version: int | None = None,
        if_absent: bool = False,
        timeout: float | None = None,
    ) -> int:
        now, version = self.store.at(key, self.store.version)
        if if_absent and now is not None:
            raise CompareFailed(version)
        if if_version is not None and if_version != version:
            raise CompareFailed(version)
        return await self._alone(Wish("put", key, value))

    async def delete(self, key: bytes) -> int:
        return await self._alone(Wish("put", key, None))

    async def delete_range(self, start: bytes, end: bytes) -> int:
        return await self._alone(Wish("clear", start, end=end))

    async def increment(self, key: bytes, by: int) -> int:
        version = await self._alone(Wish("add", key, by=by))
        value, _ = self.store.at(key, version)
        return int(value or b"0")

    async def put_versionstamped_key(self, prefix: bytes, value: bytes) -> bytes:
        return prefix + stamp(await self._alone(Wish("stamp", prefix, value)), 0)

    async def cas(self, key: bytes, expected: bytes | None, new: bytes | None) -> bool:
        lost = self.store.errs("lost update")
        if self.store.at(key, self.store.version)[0] != expected and not lost:
            return False
        await self._alone(Wish("put", key, new))
        return True

    async def _alone(self, *wishes: Wish) -> int:
        """At this instant, so that conditions hold; what it takes comes after."""
        tx = DumbTransaction(self.store)
        tx.wishes += wishes
        refused = self.store.errs("applied abort", 0.1)
        unsure = not self.store.calm and self.store.rng.random() < self.store.unsure
        if unsure and self.store.rng.random() < 0.5:
            raise CommitUnknown
        version = self.store.apply(wishes)
        await self.store.wait()
        if refused:
            raise Conflict
        if unsure:
            raise CommitUnknown
        return version

    @asynccontextmanager
    async def batch(self) -> AsyncIterator[Any]:
        tx = DumbTransaction(self.store)
        yield _Batch(tx)
        tx.commit_version = await self._alone(*tx.wishes)

    async def run(
        self, fn: Callable[[Any], Awaitable[Any]], *, idempotency_key: bytes, timeout: float
    ) -> Any:
        row = b"\xff" + idempotency_key
        while True:
            tx = DumbTransaction(self.store)
            try:
                async with tx:
                    kept = await tx.get(row)
                    if kept is not None and self.store.fault != "forgotten key":
                        return int(kept)
                    result = await fn(tx)
                    tx.put(row, b"%d" % result)
                    await tx.commit()
                    return result
            except Conflict:
                continue

    async def outcome(self, token: str, *, timeout: float | None = None) -> Committed | Aborted:
        await self.store.wait()
        version = self.store.outcomes.get(token, 0)
        if not version or self.store.fault == "lying outcome":
            return Aborted()
        return Committed(version)


class _Batch:
    def __init__(self, tx: DumbTransaction) -> None:
        self.put, self.delete = tx.put, tx.delete
        self._tx = tx

    @property
    def version(self) -> int | None:
        return self._tx.commit_version
