"""The log's segments as files of one directory, and small files that are replaced as a whole.

Segments are DIR/00000001.log and so on, preallocated so that a sync writes data and no metadata. Nothing is retried:
after the first failing write, sync, create or delete every further call that changes anything is refused (pitfall 11:
a second fsync may succeed without having written what the first one lost). Blocking; used by one caller at a time.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from replication.errors import LogDiskFull, LogWriteFailed

_NAME: Final = re.compile(r"(\d{8,10})\.log")
_ZEROS: Final = bytes(1 << 20)
_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


class DirectoryLogFiles:
    """LogFiles (replication/ports.py) over a directory, which is made if it is absent."""

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._handles: dict[int, int] = {}
        self._failed: str | None = None
        self._closed = False
        if not self._directory.is_dir():
            self._directory.mkdir(parents=True)
            _sync_directory(self._directory.parent)

    def segments(self) -> list[int]:
        """Ids of the segments that exist, ascending. Files with other names are left alone."""
        matches = (_NAME.fullmatch(name) for name in os.listdir(self._directory))
        return sorted(int(match[1]) for match in matches if match)

    def read(self, segment: int) -> bytes:
        """The whole file. Raises: OSError if it cannot be read."""
        return self._path(segment).read_bytes()

    def create(self, segment: int, size_bytes: int) -> None:
        """A new segment full of zeros whose blocks are allocated; durable, its name too, when this returns.

        Raises: LogDiskFull, LogWriteFailed.
        """
        with self._changing(f"create segment {segment}"):
            handle = os.open(self._path(segment), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            self._handles[segment] = handle
            _allocate(handle, size_bytes)
            os.fsync(handle)
            _sync_directory(self._directory)

    def write(self, segment: int, offset: int, data: bytes) -> None:
        """Write all of `data` at an offset. Not durable before `sync`. Raises: LogDiskFull, LogWriteFailed."""
        with self._changing(f"write segment {segment}"):
            handle = self._handle(segment)
            written = os.pwrite(handle, data, offset)
            view = memoryview(data)
            while written < len(data):
                written += os.pwrite(handle, view[written:], offset + written)

    def sync(self, segment: int) -> None:
        """Make every write so far to this segment durable. Raises: LogDiskFull, LogWriteFailed."""
        with self._changing(f"sync segment {segment}"):
            _sync_data(self._handle(segment))

    def delete(self, segment: int) -> None:
        """Remove a segment; durable when this returns. Raises: LogWriteFailed."""
        with self._changing(f"delete segment {segment}"):
            handle = self._handles.pop(segment, None)
            if handle is not None:
                os.close(handle)
            self._path(segment).unlink()
            _sync_directory(self._directory)

    def close(self) -> None:
        """Close the files. Syncs nothing: what was not synced is not durable."""
        self._closed = True
        while self._handles:
            os.close(self._handles.popitem()[1])

    def _path(self, segment: int) -> Path:
        return self._directory / f"{segment:08d}.log"

    def _handle(self, segment: int) -> int:
        handle = self._handles.get(segment)
        if handle is None:
            handle = self._handles[segment] = os.open(self._path(segment), os.O_RDWR)
        return handle

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
        self._directory.mkdir(parents=True, exist_ok=True)
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


def _allocate(handle: int, size_bytes: int) -> None:
    """Zeros, written out: blocks that are only reserved would cost each sync a change of metadata."""
    done = 0
    while done < size_bytes:
        done += os.pwrite(handle, _ZEROS[: size_bytes - done], done)


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
