"""The log's segments as files of one directory, and small files that are replaced as a whole.

Segments are DIR/00000001.log and so on, preallocated. Nothing is retried: after the first failing write, sync, create
or delete every further call that changes anything is refused (pitfall 11: a second fsync may succeed without having
written what the first one lost). Blocking; used by one caller at a time.

A sync is quickest (0.07 ms against 0.11 measured) in blocks that were written before, not only reserved. Writing the
zeros of 64 MiB takes 50 ms, so while the second half of a segment fills, a thread writes them to a spare file that the
next `create` takes over; if it is not ready, `create` reserves blocks, which is quick.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from replication.errors import LogDiskFull, LogUnreadable, LogWriteFailed

_NAME: Final = re.compile(r"(\d{8,10})\.log")
_SPARE: Final = "spare"
_ZEROS: Final = bytes(1 << 20)
_BLOCK_BYTES: Final = 4096
_HOLES_MAX: Final = 256  # in a segment; each may take a disk seconds, and one with more is gone
_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


class DirectoryLogFiles:
    """LogFiles (replication/ports.py) over a directory, which is made if it is absent."""

    def __init__(self, directory: str | Path, *, spare: bool = True) -> None:
        """spare: write the next segment's zeros ahead of time, in a thread."""
        self._directory = Path(directory)
        self._handles: dict[int, int] = {}
        self._sizes: dict[int, int] = {}  # of the segments with handles
        self._wants_spare = spare
        self._spare: _Spare | None = None
        self._failed: str | None = None
        self._closed = False
        make_directory(self._directory)
        (self._directory / _SPARE).unlink(missing_ok=True)

    def segments(self) -> list[int]:
        """Ids of the segments that exist, ascending. Files with other names are left alone."""
        matches = (_NAME.fullmatch(name) for name in os.listdir(self._directory))
        return sorted(int(match[1]) for match in matches if match)

    def read(self, segment: int) -> bytes:
        """The whole file. Raises: LogUnreadable, with what can be read, if the disk fails for a part of it; OSError."""
        try:
            return self._path(segment).read_bytes()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        data, holes = _read_blocks(self._path(segment))
        if holes:
            raise LogUnreadable(segment, data, holes)
        return data

    def create(self, segment: int, size_bytes: int) -> None:
        """A new segment full of zeros whose blocks are allocated; durable, its name too, when this returns.

        Raises: LogDiskFull, LogWriteFailed.
        """
        with self._changing(f"create segment {segment}"):
            path = self._path(segment)
            if path.exists():
                raise FileExistsError(errno.EEXIST, "the segment exists", str(path))
            if not self._take_spare(path, size_bytes):
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                try:
                    _reserve(handle, size_bytes)
                    os.fsync(handle)
                finally:
                    os.close(handle)
            _sync_directory(self._directory)

    def write(self, segment: int, offset: int, data: bytes) -> None:
        """Write all of `data` at an offset. Not durable before `sync`. Raises: LogDiskFull, LogWriteFailed."""
        with self._changing(f"write segment {segment}"):
            handle = self._handle(segment)
            written = os.pwrite(handle, data, offset)
            view = memoryview(data)
            while written < len(data):
                written += os.pwrite(handle, view[written:], offset + written)
        if self._wants_spare and self._spare is None and offset * 2 >= self._sizes[segment]:
            self._spare = _Spare(self._directory / _SPARE, self._sizes[segment])

    def sync(self, segment: int) -> None:
        """Make every write so far to this segment durable. Raises: LogDiskFull, LogWriteFailed."""
        with self._changing(f"sync segment {segment}"):
            _sync_data(self._handle(segment))

    def delete(self, segment: int) -> None:
        """Remove a segment; durable when this returns. Raises: LogWriteFailed."""
        with self._changing(f"delete segment {segment}"):
            handle = self._handles.pop(segment, None)
            self._sizes.pop(segment, None)
            if handle is not None:
                os.close(handle)
            self._path(segment).unlink()
            _sync_directory(self._directory)

    def close(self) -> None:
        """Close the files. Syncs nothing: what was not synced is not durable."""
        self._closed = True
        if self._spare is not None:
            self._spare.stop()
        while self._handles:
            os.close(self._handles.popitem()[1])

    def _path(self, segment: int) -> Path:
        return self._directory / f"{segment:08d}.log"

    def _handle(self, segment: int) -> int:
        handle = self._handles.get(segment)
        if handle is None:
            handle = self._handles[segment] = os.open(self._path(segment), os.O_RDWR)
            self._sizes[segment] = os.fstat(handle).st_size
        return handle

    def _take_spare(self, path: Path, size_bytes: int) -> bool:
        """Give the spare file the segment's name, if it is ready and fits."""
        spare = self._spare
        if spare is None or spare.running():
            return False
        self._spare = None
        if not spare.ready or spare.size_bytes != size_bytes:
            spare.path.unlink(missing_ok=True)  # its blocks may be what this segment lacks
            return False
        os.rename(spare.path, path)
        return True

    @contextmanager
    def _changing(self, what: str) -> Iterator[None]:
        """Maps every OSError, and refuses everything after the first one."""
        assert not self._closed, "the log's files are closed"
        if self._failed is not None:
            raise LogWriteFailed(f"{what}: refused, for earlier this failed: {self._failed}")
        try:
            yield
        except OSError as error:
            self._failed = f"{what}: {error}"
            kind = LogDiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else LogWriteFailed
            raise kind(self._failed) from error


class DirectoryFiles:
    """Small files by name in one directory (node.toml), each replaced as a whole and durably."""

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)

    def read_file(self, name: str) -> bytes | None:
        """The content, or None if there is no such file. Raises: OSError."""
        try:
            return (self._directory / name).read_bytes()
        except FileNotFoundError:
            return None

    def write_file(self, name: str, data: bytes) -> None:
        """Replace the file: after a crash it holds the old content or the new, and the new once this returned.

        Raises: OSError; the old content is then still there, or the new one.
        """
        make_directory(self._directory)
        fresh = self._directory / f"{name}.new"
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(handle, view) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(fresh, self._directory / name)
        _sync_directory(self._directory)


class _Spare:
    """A file of zeros, written out and synced piece by piece (one great sync would hold up the log's) in a thread."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self.ready = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="log-spare", daemon=True)
        self._thread.start()

    def running(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self.path.unlink(missing_ok=True)

    def _fill(self) -> None:
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                for done in range(0, self.size_bytes, len(_ZEROS)):
                    if self._stop.is_set():
                        return
                    _fill_zeros(handle, done, min(done + len(_ZEROS), self.size_bytes))
                    os.fsync(handle)
            finally:
                os.close(handle)
        except OSError:  # nothing depends on it: `create` meets the same disk, and says so
            with suppress(OSError):
                self.path.unlink()  # on a full disk, others need the space now
            return
        self.ready = True


def _read_blocks(path: Path) -> tuple[bytes, list[int]]:
    """A file block by block, and the offsets of those that the disk does not give: they are ones. Raises: OSError."""
    holes: list[int] = []
    pieces: list[bytes] = []
    handle = os.open(path, os.O_RDONLY)
    try:
        size_bytes = os.fstat(handle).st_size
        for offset in range(0, size_bytes, _BLOCK_BYTES):
            length = min(_BLOCK_BYTES, size_bytes - offset)
            try:
                pieces.append(os.pread(handle, length, offset))
            except OSError as error:
                if error.errno != errno.EIO or len(holes) == _HOLES_MAX:
                    raise
                holes.append(offset)
                pieces.append(b"\xff" * length)
    finally:
        os.close(handle)
    return b"".join(pieces), holes


def _reserve(handle: int, size_bytes: int) -> None:
    """Blocks that read as zeros."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size_bytes)
    else:
        _fill_zeros(handle, 0, size_bytes)


def _fill_zeros(handle: int, start: int, end: int) -> None:
    while start < end:
        start += os.pwrite(handle, _ZEROS[: end - start], start)


def make_directory(directory: Path) -> None:
    """Make it and what is missing above it, each name durable: what is acknowledged stands below them. Raises: OSError."""
    missing = []
    while not directory.is_dir():
        missing.append(directory)
        directory = directory.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
