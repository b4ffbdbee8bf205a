"""Atomic operations of a client, each a transaction of its own.

The range that has the row computes what comes of it. If the answer was lost and the outcome was learned from the record,
what the operation has done is computed here, from the row as it was just before the commit.
"""

from __future__ import annotations

import abc

from kvstore import limits
from kvstore.batch import Batch
from kvstore.buffer import (
    NumberFormat,
    NumberKind,
    WriteBuffer,
    append_write,
    compare_clear_write,
    number_write,
)
from kvstore.commits import Done
from kvstore.errors import CommitUnknown, KVError
from kvstore.reads import Found
from txn import atomics
from txn.types import Expect, Write


class AtomicCalls(abc.ABC):
    """The part of `Database` that does them. An operation that met a conflict is tried again, until its time is over.

    Raises: InvalidArgument if the value is no such number, or the result does not fit 64 bits; CommitUnknown also if it has
    happened, and what came of it could not be read in time.
    """

    @abc.abstractmethod
    async def _write_one(
        self, write: Write, expects: list[Expect], timeout: float | None
    ) -> Done: ...

    @abc.abstractmethod
    async def _commit_buffer(self, buffer: WriteBuffer, timeout: float | None) -> int | None: ...

    @abc.abstractmethod
    async def _found_at(self, key: bytes, at: int, until: float) -> Found: ...

    @abc.abstractmethod
    def _until(self, timeout: float | None) -> float:
        """When a call that begins now has to be over."""

    async def increment(
        self,
        key: bytes,
        by: int = 1,
        *,
        format: NumberFormat = "ascii",  # noqa: A002 - the surface's word
        timeout: float | None = None,
    ) -> int:
        """Add to a number and return the new one; an absent key counts as 0.

        Args: format: "ascii" (decimal digits) or "int64" (8 bytes, big-endian, signed).
        """
        return await self._number(key, "add", by, format, timeout)

    async def min(
        self,
        key: bytes,
        value: int,
        *,
        format: NumberFormat = "ascii",  # noqa: A002
        timeout: float | None = None,
    ) -> int:
        """Set a number to `value` if that is less, or if there is none; return what it is now."""
        return await self._number(key, "min", value, format, timeout)

    async def max(
        self,
        key: bytes,
        value: int,
        *,
        format: NumberFormat = "ascii",  # noqa: A002
        timeout: float | None = None,
    ) -> int:
        """Set a number to `value` if that is greater, or if there is none; return what it is now."""
        return await self._number(key, "max", value, format, timeout)

    async def append_if_fits(
        self,
        key: bytes,
        value: bytes,
        limit: int = limits.VALUE_BYTES_MAX,
        *,
        timeout: float | None = None,
    ) -> bool:
        """Append to the value (an absent one is empty). False: it would have over `limit` bytes, and is as it was."""
        limits.validate_key(key)
        return await self._do(append_write(key, value, limit), timeout) == atomics.YES

    async def compare_and_clear(
        self, key: bytes, expected: bytes, *, timeout: float | None = None
    ) -> bool:
        """Delete the key if it has this value. False: it had not, and is as it was."""
        limits.validate_key(key)
        return await self._do(compare_clear_write(key, expected), timeout) == atomics.YES

    async def put_versionstamped_key(
        self, prefix: bytes, value: bytes, *, timeout: float | None = None
    ) -> bytes:
        """Put a key that is `prefix` and a versionstamp (10 bytes); returns the key. See `Transaction`."""
        batch = Batch()
        number = batch.put_versionstamped_key(prefix, value)
        batch.version = await self._commit_buffer(batch.buffer, timeout)
        return prefix + batch.versionstamp(number)

    async def put_versionstamped_value(
        self, key: bytes, head: bytes = b"", *, timeout: float | None = None
    ) -> bytes:
        """Put `head` and a versionstamp (10 bytes) as the value; returns the value."""
        batch = Batch()
        number = batch.put_versionstamped_value(key, head)
        batch.version = await self._commit_buffer(batch.buffer, timeout)
        return head + batch.versionstamp(number)

    async def _number(
        self,
        key: bytes,
        kind: NumberKind,
        by: int,
        number_format: NumberFormat,
        timeout: float | None,
    ) -> int:
        limits.validate_key(key)
        write = number_write(key, kind, by, number_format)
        return atomics.parse(write.kind, await self._do(write, timeout))

    async def _do(self, write: Write, timeout: float | None) -> bytes:
        """What it tells (txn/atomics.py)."""
        until = self._until(timeout)
        done = await self._write_one(write, [], timeout)
        if done.results:
            return done.results[0]
        try:
            before = await self._found_at(write.key, done.version - 1, until)
        except KVError as error:  # which says that nothing happened, of the read
            reason = f"it was done at version {done.version}, but what came of it is not known"
            raise CommitUnknown(f"{reason}: {error}") from error
        return atomics.after(write.kind, write.value, before.value).told
