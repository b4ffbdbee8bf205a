"""Writes that are collected, to be sent together: what a transaction and a batch have in common.

None of them is awaited, and none reads. Atomic operations are computed where the row is, when the transaction commits, so
that two of them never conflict; a transaction that reads a key after its own operation on it guards the key as any other.
"""

from __future__ import annotations

import abc

from kvstore import limits
from kvstore.buffer import (
    NumberFormat,
    WriteBuffer,
    append_write,
    compare_clear_write,
    number_write,
)
from kvstore.errors import InvalidArgument
from txn import stamps


class BufferedWrites(abc.ABC):
    """Every method raises InvalidArgument, KeyTooLarge, ValueTooLarge, TransactionTooLarge before anything is sent."""

    @abc.abstractmethod
    def _writable(self) -> WriteBuffer:
        """Where they are collected. Raises if nothing may be written any more."""

    @abc.abstractmethod
    def _committed_at(self) -> int | None:
        """The version of the commit; None before it."""

    def put(self, key: bytes, value: bytes) -> None:
        buffer = self._writable()
        limits.validate_key(key)
        limits.validate_value(value)
        buffer.put(key, value)

    def delete(self, key: bytes) -> None:
        buffer = self._writable()
        limits.validate_key(key)
        buffer.delete(key)

    def delete_range(self, start: bytes, end: bytes) -> None:
        """Delete what is in [start, end) at the commit."""
        buffer = self._writable()
        buffer.clear(*limits.validate_range(start, end))

    def increment(self, key: bytes, by: int = 1, *, format: NumberFormat = "ascii") -> None:  # noqa: A002
        """Add to a number; an absent one counts as 0."""
        buffer = self._writable()
        limits.validate_key(key)
        buffer.atomic(number_write(key, "add", by, format))

    def min(self, key: bytes, value: int, *, format: NumberFormat = "ascii") -> None:  # noqa: A002
        """Set a number to `value` if that is less, or if there is none."""
        buffer = self._writable()
        limits.validate_key(key)
        buffer.atomic(number_write(key, "min", value, format))

    def max(self, key: bytes, value: int, *, format: NumberFormat = "ascii") -> None:  # noqa: A002
        """Set a number to `value` if that is greater, or if there is none."""
        buffer = self._writable()
        limits.validate_key(key)
        buffer.atomic(number_write(key, "max", value, format))

    def append_if_fits(self, key: bytes, value: bytes, limit: int = limits.VALUE_BYTES_MAX) -> None:
        """Append to the value (an absent one is empty) if it has at most `limit` bytes then; else leave it."""
        buffer = self._writable()
        limits.validate_key(key)
        buffer.atomic(append_write(key, value, limit))

    def compare_and_clear(self, key: bytes, expected: bytes) -> None:
        """Delete the key if it has this value; else leave it."""
        buffer = self._writable()
        limits.validate_key(key)
        buffer.atomic(compare_clear_write(key, expected))

    def put_versionstamped_key(self, prefix: bytes, value: bytes) -> int:
        """Put `prefix` and the transaction's versionstamp (10 bytes) as a key. Returns the number for `versionstamp`.

        Keys of one prefix are unique, and in the order of their commits. What can follow the prefix must lie in one range.
        """
        buffer = self._writable()
        limits.validate_key(prefix)
        limits.validate_key(prefix + bytes(stamps.STAMP_BYTES))
        limits.validate_value(value)
        return buffer.stamp_key(prefix, value)

    def put_versionstamped_value(self, key: bytes, head: bytes = b"") -> int:
        """Put `head` and the transaction's versionstamp (10 bytes) as the value. Returns the number for `versionstamp`."""
        buffer = self._writable()
        limits.validate_key(key)
        limits.validate_value(head)
        limits.validate_value(head + bytes(stamps.STAMP_BYTES))
        return buffer.stamp_value(key, head)

    def versionstamp(self, number: int = 0) -> bytes:
        """The stamp of a write: the commit version (8 bytes, big-endian), then the write's number (2 bytes).

        Raises: InvalidArgument before the commit, and if nothing was written.
        """
        version = self._committed_at()
        if version is None:
            raise InvalidArgument("a versionstamp is known only after the commit")
        return stamps.stamp(version, number)
