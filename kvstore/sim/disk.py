"""A node's disk in memory, with the faults of real ones: the log's segments and the node's small files.

What was written and not synced is lost at a crash, sector by sector and in any subset. Bits flip, batches land where
they should not, writes, syncs and reads fail, and space runs out on demand. `crash` and `kill` return the disk that the
restarted node finds; the old one then refuses everything, so that a node that should be dead cannot go on writing.

`rot` and `misdirect` damage only what the log itself can prove to have been durable: batches before the largest
`synced_upto` of an intact header on the disk. Of what lies behind that, nobody can tell damage from a torn write.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from replication.errors import LogDiskFull, LogUnreadable, LogWriteFailed
from replication.wal_format import BLOCK_BYTES, BatchHeader, aligned, decode_batch_header

SECTOR_BYTES: Final = 512  # most disks write it whole or not at all
GRAIN_BYTES: Final = 64  # some crashes tear finer than that: the log counts on no atomic sector
INJECTED: Final = "injected failure"  # is in the text of every error that was asked for


@dataclass
class _Segment:
    durable: bytearray
    current: bytearray
    unsynced: list[tuple[int, bytes]] = field(
        default_factory=list
    )  # writes since the last sync, in order

    @classmethod
    def of(cls, content: bytes | bytearray) -> _Segment:
        return cls(bytearray(content), bytearray(content))

    def copy(self) -> _Segment:
        return _Segment(bytearray(self.durable), bytearray(self.current), list(self.unsynced))


def _nothing() -> None:
    pass


class SimDisk:
    """LogFiles (replication/ports.py) in memory, and small files that are replaced as a whole.

    Deterministic: what survives a crash is drawn from the random source that `crash` is given.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int | None = None,
        _content: tuple[dict[int, _Segment], dict[str, bytes]] | None = None,
    ) -> None:
        """capacity_bytes: what the segments may take together; None: no limit."""
        self._segments, self._files = _content or ({}, {})
        self.capacity_bytes = capacity_bytes
        self._failed: str | None = None
        self._fail_syncs_after: int | None = None
        self._fail_writes_after: int | None = None
        self._fail_reads_after: int | None = None
        self._on_failing: dict[str, Callable[[], None]] = {}  # by countdown
        self.write_count = 0
        self.sync_count = 0
        self.written_bytes = 0
        self.create_count = 0
        self.delete_count = 0

    # -- LogFiles --------------------------------------------------------------------------------------------------

    def segments(self) -> list[int]:
        """Ids of the segments that exist, ascending."""
        return sorted(self._segments)

    def read(self, segment: int) -> bytes:
        """The whole file, unsynced writes included. Raises: LogUnreadable, OSError."""
        if segment not in self._segments:
            raise FileNotFoundError(f"segment {segment}")
        if self._countdown("_fail_reads_after"):
            raise self._unreadable(segment)
        return bytes(self._segments[segment].current)

    def _unreadable(self, segment: int) -> OSError:
        """EIO, for the first block of the last batch: nobody can tell that from a torn write. Where the batch begins a segment,
        and in older ones, for the whole file: one block would be damage to what the log can prove, and that is `rot`.
        """
        data = bytes(self._segments[segment].current)
        blocks = range(0, len(data), BLOCK_BYTES)
        last = max((at for at in blocks if decode_batch_header(data, segment, at)), default=0)
        if not last or segment != max(self._segments):
            return OSError(errno.EIO, f"read segment {segment}: {INJECTED}")
        given = data[:last] + b"\xff" * BLOCK_BYTES + data[last + BLOCK_BYTES :]
        error = LogUnreadable(segment, given, [last])
        error.strerror = f"{error.strerror}, {INJECTED}"
        return error

    def create(self, segment: int, size_bytes: int) -> None:
        """A new segment full of zeros; durable. Raises: LogDiskFull, LogWriteFailed."""
        self._check(f"create segment {segment}")
        if segment in self._segments:
            self._fail(f"create segment {segment}: it exists")
        if self.capacity_bytes is not None and self.used_bytes + size_bytes > self.capacity_bytes:
            self._fail(f"create segment {segment}: no space left, {INJECTED}", full=True)
        self._segments[segment] = _Segment.of(bytes(size_bytes))
        self.create_count += 1

    def write(self, segment: int, offset: int, data: bytes) -> None:
        """Write at an offset; not durable before `sync`. Raises: LogDiskFull, LogWriteFailed."""
        self._check(f"write segment {segment}")
        file = self._file(segment, "write")
        failing = self._countdown("_fail_writes_after")
        if failing:  # some of it may have reached the disk
            data = data[: len(data) // 2 // SECTOR_BYTES * SECTOR_BYTES]
        if len(file.current) < offset + len(data):
            file.current.extend(bytes(offset + len(data) - len(file.current)))
        file.current[offset : offset + len(data)] = data
        file.unsynced.append((offset, bytes(data)))
        if failing:
            self._fail(f"write segment {segment}: {INJECTED}")
        self.write_count += 1
        self.written_bytes += len(data)

    def sync(self, segment: int) -> None:
        """Make every write so far to this segment durable. Raises: LogWriteFailed."""
        self._check(f"sync segment {segment}")
        file = self._file(segment, "sync")
        if self._countdown("_fail_syncs_after"):
            file.unsynced.clear()  # the cache says clean, and the disk has nothing of it
            self._fail(f"sync segment {segment}: {INJECTED}")
        for offset, data in file.unsynced:
            _put(file.durable, offset, data)
        file.unsynced.clear()
        self.sync_count += 1

    def delete(self, segment: int) -> None:
        """Remove a segment; durable. Raises: LogWriteFailed."""
        self._check(f"delete segment {segment}")
        self._file(segment, "delete")
        del self._segments[segment]
        self.delete_count += 1

    def close(self) -> None:
        """Nothing is synced by it."""
        self._failed = self._failed or "closed"

    # -- small files -----------------------------------------------------------------------------------------------

    def read_file(self, name: str) -> bytes | None:
        """The content, or None if there is no such file."""
        return self._files.get(name)

    def write_file(self, name: str, data: bytes) -> None:
        """Replace a file as a whole, durably. Raises: LogWriteFailed after a fault."""
        self._check(f"write file {name}")
        self._files[name] = bytes(data)

    def unsynced(self, segment: int) -> int:
        """How many writes to a segment would be lost with the power; 0 if there is no such segment."""
        file = self._segments.get(segment)
        return len(file.unsynced) if file is not None else 0

    # -- faults ----------------------------------------------------------------------------------------------------

    def fail_sync(self, after: int = 0, then: Callable[[], None] = _nothing) -> None:
        """The sync after `after` more good ones fails. then: called when it does; the next two likewise."""
        self._fail_syncs_after, self._on_failing["_fail_syncs_after"] = after, then

    def fail_write(self, after: int = 0, then: Callable[[], None] = _nothing) -> None:
        """The write after `after` more good ones fails, with some of it done."""
        self._fail_writes_after, self._on_failing["_fail_writes_after"] = after, then

    def fail_read(self, after: int = 0, then: Callable[[], None] = _nothing) -> None:
        """The read of a segment after `after` more good ones fails; those after it do not."""
        self._fail_reads_after, self._on_failing["_fail_reads_after"] = after, then

    def fill(self) -> None:
        """No space is left: no segment can be made. What is allocated already can be written."""
        self.capacity_bytes = self.used_bytes

    def mend(self) -> None:
        """Nothing is made to fail any more, and there is space; what has failed already stays so."""
        self._fail_syncs_after = self._fail_writes_after = self._fail_reads_after = None
        self.capacity_bytes = None

    @property
    def used_bytes(self) -> int:
        """What the segments take together."""
        return sum(len(file.current) for file in self._segments.values())

    def provable(self) -> list[BatchHeader]:
        """The log's batches that it can prove to have been durable, in their order."""
        headers = []
        for segment, file in sorted(self._segments.items()):
            data = bytes(file.durable)
            for offset in range(0, len(data), BLOCK_BYTES):
                header = decode_batch_header(data, segment, offset)
                if header is not None:
                    headers.append(header)
        synced = max((header.synced_upto for header in headers), default=0)
        return [header for header in headers if header.end <= synced]

    def rot(self, rng: random.Random) -> str:
        """A bit, or a sector, of some provable batch is not what was written. Returns where; empty if there is none."""
        headers = self.provable()
        if not headers:
            return ""
        header = rng.choice(headers)
        at = header.offset + rng.randrange(header.length)
        if rng.random() < 0.7:
            self.flip(header.segment, at, rng.randrange(8))
            return f"segment {header.segment} byte {at}"
        sector = at // SECTOR_BYTES * SECTOR_BYTES
        self._overwrite(header.segment, sector, rng.randbytes(SECTOR_BYTES))
        return f"segment {header.segment} sector {sector}"

    def misdirect(self, rng: random.Random) -> str:
        """Some provable batch landed elsewhere when it was written: over another such batch, or behind the log's end.

        Where it should be are the zeros that were there before. Seen from now, that is what such a write has left
        once later ones followed it. Returns from where to where; empty if there is none.
        """
        headers = self.provable()
        if len(headers) < 2:
            return ""
        header, other = rng.sample(headers, 2)
        data = bytes(self._segments[header.segment].durable[header.offset :][: header.length])
        self._overwrite(header.segment, header.offset, bytes(aligned(header.length)))
        target, offset, room = other.segment, other.offset, aligned(other.length)
        last = max(self._segments)
        free = aligned(len(self._segments[last].current.rstrip(b"\0")))
        if rng.random() < 0.3 and free + len(data) <= len(self._segments[last].current):
            target, offset, room = last, free, len(data)
        self._overwrite(target, offset, data[:room])
        return f"segment {header.segment} offset {header.offset} to {target} {offset}"

    def _overwrite(self, segment: int, offset: int, data: bytes) -> None:
        file = self._segments[segment]
        for content in (file.current, file.durable):
            _put(content, offset, data)

    def flip(self, segment: int, offset: int, bit: int = 0) -> None:
        """Rot: one bit is not what was written any more, on the disk and in the cache."""
        file = self._segments[segment]
        for content in (file.current, file.durable):
            if offset < len(content):
                content[offset] ^= 1 << bit

    def lose(self, segment: int) -> None:
        """A whole segment is gone."""
        del self._segments[segment]

    def crash(self, rng: random.Random) -> SimDisk:
        """The power fails: of each unsynced write any subset of sectors (or smaller pieces) survives, drawn from `rng`.

        Returns: the disk as it is found afterwards. This one is dead.
        """
        segments: dict[int, _Segment] = {}
        grain = rng.choice((GRAIN_BYTES, SECTOR_BYTES))
        for segment, file in sorted(self._segments.items()):
            content = bytearray(file.durable)
            share = rng.choice((0.0, 0.5, 0.5, 0.9, 1.0))
            for offset, data in file.unsynced:
                for at in range(0, len(data), grain):
                    if rng.random() < share:
                        _put(content, offset + at, data[at : at + grain])
            segments[segment] = _Segment.of(content)
        return self._successor(segments)

    def kill(self) -> SimDisk:
        """The process dies and the machine lives: what was written is in the cache still, and is not durable yet.

        Returns: the disk that the restarted process opens. This one is dead.
        """
        return self._successor(self._segments)

    def fork(self) -> SimDisk:
        """An equal disk of its own, to try something on. This one lives on."""
        return SimDisk(
            capacity_bytes=self.capacity_bytes,
            _content=(
                {segment: file.copy() for segment, file in self._segments.items()},
                dict(self._files),
            ),
        )

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _successor(self, segments: dict[int, _Segment]) -> SimDisk:
        after = SimDisk(capacity_bytes=self.capacity_bytes, _content=(segments, self._files))
        after._fail_reads_after, after._on_failing = self._fail_reads_after, self._on_failing
        self._segments, self._files = {}, {}
        self._failed = self._failed or "the machine crashed"
        return after

    def _check(self, what: str) -> None:
        if self._failed is not None:
            raise LogWriteFailed(f"{what}: refused, for earlier this failed: {self._failed}")

    def _fail(self, why: str, *, full: bool = False) -> None:
        self._failed = why
        raise LogDiskFull(why) if full else LogWriteFailed(why)

    def _file(self, segment: int, what: str) -> _Segment:
        if segment not in self._segments:
            self._fail(f"{what} segment {segment}: no such file")
        return self._segments[segment]

    def _countdown(self, name: str) -> bool:
        left: int | None = getattr(self, name)
        if left is None:
            return False
        setattr(self, name, left - 1 if left else None)
        if not left:
            self._on_failing[name]()
        return not left


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset + len(data):
        content.extend(bytes(offset + len(data) - len(content)))
    content[offset : offset + len(data)] = data
