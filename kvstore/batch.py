"""Writes collected to be committed together, without a transaction around them."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from kvstore.buffer import WriteBuffer
from kvstore.errors import TransactionClosed
from kvstore.writes import BufferedWrites


class Batch(BufferedWrites):
    """Atomic, over any number of ranges. Nothing is read."""

    def __init__(self) -> None:
        self.buffer = WriteBuffer()
        self.version: int | None = None  # of the commit, when the block has ended
        self._ended = False

    def __enter__(self) -> Self:
        """While the block runs, writes are collected."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended = True

    def _writable(self) -> WriteBuffer:
        if self._ended:  # it would never be sent
            raise TransactionClosed("the block of the batch has ended: begin another")
        return self.buffer

    def _committed_at(self) -> int | None:
        return self.version
