"""The read cache: the newest versions that are asked for again and again, in front of the engine.

RC1 a cached row is the engine's row, between any two calls of `CachedEngine`. It holds because all that a process writes goes
through one CachedEngine, on one thread, which is also the one that gets: a row comes in by the call that read it, follows
each write in the call that made it, and no call is between. After a write that failed nobody knows what the engine holds:
the cache is empty from then on. So is it after `close`.
RC2 it is bounded: after each call it has no row or `bytes` <= `bytes_max`, and for each row that goes at most STEPS_MAX others
are looked at.
RC3 each key in `rows` stands in exactly one of the two queues, once.

Who stays is decided by S3-FIFO (Yang et al., SOSP 2023): what is new waits in a short queue, and is dropped at its end
unless it was used twice meanwhile; the long queue gives whoever was used another round. A key that comes back soon after it
was dropped goes to the long queue at once. So a scan, of any length, passes through the short queue. Two differences: hits are
noted, and counted when a row has to go, in samples as long as none has to; dropped keys are remembered by a checksum each,
in a table, instead of a queue. No order depends on `hash`, so that a seed of the simulator repeats. DESIGN.md has the figures,
and why it is not a library.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final
from zlib import crc32

from kvstore.ports import Engine, EngineCursor, EngineView
from txn import keycode

UNKNOWN: Final = bytes(bytearray(b"unknown"))  # told apart by identity: no row is this object
ROW_OVERHEAD_BYTES: Final = 260  # of a cached row: two objects, places in two dicts and a queue
ROW_BYTES_MAX: Final = 64 * 1024  # of longer rows the copy is what costs, in RocksDB too
USED_MAX: Final = 256  # hits that are noted; older ones are lost
SAMPLE_HITS: Final = 1_021  # where no row has to go, those noted are counted once in so many hits
DROPPED_SHARE: Final = 64  # one dropped key is remembered, in 4 bytes, for so many of bytes_max
SHORT_SHARE: Final = 10  # the short queue has a tenth of the rows
USES_MAX: Final = 3  # that are counted
USES_TO_STAY: Final = 2  # after the first: a transaction's read and its write are one more
STEPS_MAX: Final = (
    64  # rows spared in a row; then the next of the short queue goes whatever its uses
)

LATEST: Final = keycode.LATEST
LATEST_END: Final = bytes([LATEST[0] + 1])


class ReadCache:
    """Rows by key, at most `bytes_max` of them. Not for several threads. Whoever owns it keeps RC1; this keeps RC2 and RC3."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.row_bytes_max = min(ROW_BYTES_MAX, bytes_max // 16)
        self.evictions = 0
        self.rows: dict[bytes, bytes] = {}  # UNKNOWN: it stands in a queue, and has no row now
        self.uses: dict[
            bytes, int
        ] = {}  # of some of the same keys: since the last round, at most USES_MAX
        self.used: deque[bytes] = deque(
            maxlen=USED_MAX
        )  # hits that are not counted yet; the oldest may be lost
        self.short: deque[bytes] = deque()
        self.long: deque[bytes] = deque()
        # checksums of keys that the short queue dropped, each where its remainder says: a newer one takes its place
        self._dropped = array("I", bytes(4 * max(1, bytes_max // DROPPED_SHARE)))
        self.bytes = self.bytes_empty = 4 * len(self._dropped)

    def fill(self, key: bytes, row: bytes) -> None:
        """A row that was read because it was not here."""
        if len(row) > self.row_bytes_max:
            return
        rows = self.rows
        if key in rows:  # UNKNOWN
            self.bytes += len(row)
        else:
            self.bytes += ROW_OVERHEAD_BYTES + len(key) + len(row)
            dropped = self._dropped
            checksum = crc32(key)
            if dropped[checksum % len(dropped)] == checksum:
                self.long.append(key)
            else:
                self.short.append(key)
        rows[key] = row
        if self.bytes > self.bytes_max:
            self._evict()

    def update(self, written: Mapping[bytes, bytes | None]) -> None:
        """These rows have been written; None: deleted."""
        rows, get, row_bytes_max, grown = self.rows, self.rows.get, self.row_bytes_max, 0
        for key, row in written.items():
            if not LATEST <= key < LATEST_END:
                continue  # not looked up in vain: that is a cache miss of the CPU
            old = get(key, UNKNOWN)
            if old is not UNKNOWN:
                if row is None or len(row) > row_bytes_max:
                    rows[key] = UNKNOWN
                    grown -= len(old)
                else:
                    rows[key] = row
                    grown += len(row) - len(old)
        self.bytes += grown
        if self.bytes > self.bytes_max:
            self._evict()

    def forget(self, start: bytes, end: bytes) -> None:
        """All rows of [start, end). Looks at every row: for wiping spans, which takes longer anyway."""
        rows = self.rows
        for key, row in rows.items():
            if start <= key < end and row is not UNKNOWN:
                rows[key] = UNKNOWN
                self.bytes -= len(row)

    def clear(self) -> None:
        self.bytes = self.bytes_empty
        self.rows.clear()
        self.uses.clear()
        for queue in (self.used, self.short, self.long):
            queue.clear()

    def count_uses(self, each: int) -> None:
        rows, uses = self.rows, self.uses
        for key in self.used:
            if key in rows:
                uses[key] = min(uses.get(key, 0) + each, USES_MAX)
        self.used.clear()

    def _evict(self) -> None:
        if self.used:
            self.count_uses(1)
        rows, uses, short, long = self.rows, self.uses, self.short, self.long
        dropped = self._dropped
        steps = 0  # since a row went
        while self.bytes > self.bytes_max and rows:
            patient = steps < STEPS_MAX
            steps += 1
            if not short or (patient and long and len(short) * SHORT_SHARE < len(rows)):
                key = long.popleft()
                left = uses.pop(key, 0)
                if left and patient:
                    if left > 1:
                        uses[key] = left - 1
                    long.append(key)
                    continue
            else:
                key = short.popleft()
                if uses.pop(key, 0) >= USES_TO_STAY and patient:
                    long.append(key)
                    continue
                checksum = crc32(key)
                dropped[checksum % len(dropped)] = checksum
            row = rows.pop(key)
            self.bytes -= ROW_OVERHEAD_BYTES + len(key) + (0 if row is UNKNOWN else len(row))
            self.evictions += 1
            steps = 0


class CachedEngine:
    """An engine whose newest versions (rows of LATEST) are cached. See `kvstore.ports.Engine`, and RC1 above: it is the only
    writer of the engine below, and `get`, `write` and `delete_range` are called by one thread.

    Scans, views and `get_many` go to the engine and leave the cache as it is. A row that rots on the disk is not noticed as
    long as it is served from here.
    """

    def __init__(self, engine: Engine, bytes_max: int) -> None:
        self._engine = engine
        self.cache = ReadCache(bytes_max)
        self.hits = 0
        self.misses = 0  # of rows of LATEST, those that do not exist among them
        self._off = False  # nothing is kept any more
        self._cached = self.cache.rows.get
        self._use = self.cache.used.append
        self._get_below = engine.get

    def get(self, key: bytes) -> bytes | None:
        row = self._cached(key, UNKNOWN)
        if row is not UNKNOWN:
            self.hits = hits = self.hits + 1
            self._use(key)
            if not hits % SAMPLE_HITS:
                self.cache.count_uses(USES_TO_STAY)
            return row
        found = self._get_below(key)
        if LATEST <= key < LATEST_END:
            self.misses += 1
            if found is not None and not self._off:
                self.cache.fill(key, found)
        return found

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return self._engine.get_many(keys)

    def write(self, rows: Mapping[bytes, bytes | None]) -> None:
        try:
            self._engine.write(rows)
        except BaseException:
            self._forget_all()
            raise
        self.cache.update(rows)

    def delete_range(self, start: bytes, end: bytes) -> None:
        try:
            self._engine.delete_range(start, end)
        except BaseException:
            self._forget_all()
            raise
        if start < LATEST_END and end > LATEST:
            self.cache.forget(start, end)

    def scan(self, start: bytes, end: bytes | None, *, reverse: bool = False) -> EngineCursor:
        return self._engine.scan(start, end, reverse=reverse)

    def snapshot(self) -> EngineView:
        return self._engine.snapshot()

    def flush(self) -> None:
        self._engine.flush()

    def size_bytes(self) -> int:
        return self._engine.size_bytes()

    def stats(self) -> dict[str, float]:
        cache = self.cache
        return {
            **self._engine.stats(),
            "read_cache_hits_total": float(self.hits),
            "read_cache_misses_total": float(self.misses),
            "read_cache_evictions_total": float(cache.evictions),
            "read_cache_rows": float(len(cache.rows)),
            "read_cache_bytes": float(cache.bytes),
        }

    def close(self) -> None:
        self._forget_all()  # whoever asks from now on hears from the engine that it is closed
        self._engine.close()

    def _forget_all(self) -> None:
        """For good. After a write that failed, the engine holds all of it or nothing, and may not hold that for long."""
        self._off = True
        self.cache.clear()


def cached(engine: Engine, bytes_max: int) -> Engine:
    """The engine behind a cache of so many bytes; 0: itself."""
    return CachedEngine(engine, bytes_max) if bytes_max else engine
