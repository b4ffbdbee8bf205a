"""A node and a client for tests of what stands in front of them: a dict, one version per write, no network."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

from kvstore.errors import CompareFailed, InvalidArgument, KVError
from kvstore.metrics import NodeMetrics

FIRST_VERSION = 1 << 60  # versions exceed what JavaScript's numbers hold


class FakeEntry(NamedTuple):
    key: bytes
    value: bytes
    version: int


class FakeDatabase:
    """The part of a client's surface that the gateway and kvctl use. `fails` is raised by every call."""

    def __init__(self, rows: dict[bytes, bytes] | None = None) -> None:
        self.rows = {
            key: FakeEntry(key, value, FIRST_VERSION) for key, value in (rows or {}).items()
        }
        self.version = FIRST_VERSION
        self.fails: BaseException | None = None
        self.idempotency_keys: list[str | None] = []
        self.timeouts: list[float | None] = []
        self.bounds: list[float | None] = []  # of staleness
        self.locked: list[tuple[bytes, bool]] = []
        self.connected: list[tuple[str, float]] = []

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    def plain(self) -> dict[bytes, bytes]:
        return {key: entry.value for key, entry in sorted(self.rows.items())}

    def commit(self, writes: dict[bytes, bytes | None]) -> int:
        self.version += 1
        for key, value in writes.items():
            if value is None:
                self.rows.pop(key, None)
            else:
                self.rows[key] = FakeEntry(key, value, self.version)
        return self.version

    def check(self, timeout: float | None = None) -> None:
        self.timeouts.append(timeout)
        if self.fails is not None:
            raise self.fails

    async def get_entry(self, key, *, max_staleness=None, timeout=None):
        self.check(timeout)
        self.bounds.append(max_staleness)
        return self.rows.get(key)

    async def put(self, key, value, if_version=None, if_absent=False, *, timeout=None):
        self.check(timeout)
        present = self.rows[key].version if key in self.rows else 0
        if (if_absent and present) or (if_version is not None and if_version != present):
            raise CompareFailed(present)
        return self.commit({key: value})

    async def delete(self, key, *, timeout=None):
        self.check(timeout)
        return self.commit({key: None})

    async def increment(self, key, by=1, *, timeout=None):
        self.check(timeout)
        total = int(self.rows[key].value if key in self.rows else 0) + by
        self.commit({key: str(total).encode()})
        return total

    async def run(self, fn, *, timeout=None, idempotency_key=None):
        self.check(timeout)
        self.idempotency_keys.append(idempotency_key)
        tx = FakeTransaction(self)
        result = await fn(tx)
        tx.commit()
        return result

    def scan(
        self, start=b"", end=None, prefix=None, limit=None, reverse=False, keys_only=False, at=None
    ):
        return _scan(self.plain(), start, end, prefix, limit, reverse, keys_only)

    @contextlib.asynccontextmanager
    async def batch(self):
        tx = FakeTransaction(self)
        yield tx
        tx.commit()

    def snapshot(self, at=None, *, max_staleness=None, timeout=None):
        self.check(timeout)
        self.bounds.append(max_staleness)
        if at is not None and at > self.version:
            raise InvalidArgument("above the last issued version")
        return FakeSnapshot(self, at or self.version)


class FakeSnapshot:
    def __init__(self, database: FakeDatabase, version: int) -> None:
        self._version = version
        self._rows = database.plain()

    async def version(self):
        return self._version

    async def get_entry(self, key):
        return None if key not in self._rows else FakeEntry(key, self._rows[key], self._version)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    def scan(self, start=b"", end=None, prefix=None, limit=None, reverse=False, keys_only=False):
        return _scan(self._rows, start, end, prefix, limit, reverse, keys_only)


class FakeTransaction:
    def __init__(self, database: FakeDatabase) -> None:
        self._database = database
        self._writes: dict[bytes, bytes | None] = {}
        self.commit_version: int | None = None

    def commit(self) -> None:
        if self._writes:
            self.commit_version = self._database.commit(self._writes)

    async def get(self, key):
        return {**self._database.plain(), **self._writes}.get(key)

    async def _committed_version(self, key):
        return self._database.rows[key].version if key in self._database.rows else 0

    async def get_for_update(self, key, *, shared=False):
        self._database.locked.append((key, shared))
        return await self.get(key)

    def scan(self, start=b"", end=None, prefix=None, limit=None, reverse=False, keys_only=False):
        merged = {**self._database.plain(), **self._writes}
        rows = {key: value for key, value in sorted(merged.items()) if value is not None}
        return _scan(rows, start, end, prefix, limit, reverse, keys_only)

    def put(self, key, value):
        self._writes[key] = value

    def delete(self, key):
        self._writes[key] = None

    def delete_range(self, start, end):
        self._writes |= {key: None for key in self._database.rows if start <= key < end}

    def increment(self, key, by=1, *, format="ascii"):  # noqa: A002
        assert format == "ascii"
        present = {**self._database.plain(), **self._writes}.get(key)
        self._writes[key] = str(int(present or 0) + by).encode()


class FakeNode:
    """What `http_server` needs of a node."""

    def __init__(self, database: FakeDatabase | None = None) -> None:
        self.database: Any = database
        self.node_id = 1 if database is not None else 0
        self.cluster_id = "c" * 32 if database is not None else ""
        self.address = "127.0.0.1:7400"
        self.names = frozenset({"db1.example"})
        self.initialized: list[Any] = []
        self.refuses: KVError | None = None
        self.is_ready = database is not None
        self.state = "ready" if self.is_ready else "waiting"
        self.metrics = NodeMetrics(self.status, "0.1.0")
        self.registry = self.metrics.registry

    def locks(self) -> dict[str, Any]:
        return {"node": self.node_id, "more": False, "locks": []}

    def status(self) -> dict[str, Any]:
        """Some of what `node_status` tells (tests/integration/test_status.py holds the two together)."""
        status: dict[str, Any] = {
            "node": self.node_id,
            "cluster": self.cluster_id,
            "address": self.address,
            "version": "0.1.0",
            "uptime_s": 12.5,
            "state": self.state,
            "ranges": [],
        }
        if not self.is_ready:
            return status
        led = {
            "id": 2,
            "start": "",
            "end": "/wA=",
            "version": 1,
            "conf_ver": 1,
            "applied": 7,
            "leader_node": 1,
            "replicas": [{"node": 1, "replica": 1}],
            "role": "leader",
            "term": 3,
            "commit": 9,
        }
        return status | {
            "nodes": [{"node_id": 1, "address": self.address}],
            "ranges": [led],
            "engine": {"block_cache_bytes": 4096.0, "flushes_total": 3},
            "host": {"turns": 11, "synced_bytes": 20_480},
            "refused_ranges": {},
        }

    def live(self) -> bool:
        return True

    def ready(self) -> tuple[bool, str]:
        return self.is_ready, "" if self.is_ready else "waits for init"

    async def initialize(self, request: Any) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.initialized.append(request)
        self.cluster_id, self.node_id = request.cluster_id, request.your_node_id


async def _scan(rows, start, end, prefix, limit, reverse, keys_only):
    keys = [
        key
        for key in sorted(rows, reverse=reverse)
        if key >= start and (end is None or key < end) and key.startswith(prefix or b"")
    ]
    for key in keys[:limit]:
        yield key, b"" if keys_only else rows[key]
