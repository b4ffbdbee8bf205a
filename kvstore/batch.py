"""Writes collected to be committed together, without a transaction around them."""

from __future__ import annotations

from kvstore.buffer import WriteBuffer
from kvstore.writes import BufferedWrites


class Batch(BufferedWrites):
    """Atomic, over any number of ranges. Nothing is read."""

    def __init__(self) -> None:
        self.buffer = WriteBuffer()
        self.version: int | None = None  # of the commit, when the block has ended

    def _writable(self) -> WriteBuffer:
        return self.buffer

    def _committed_at(self) -> int | None:
        return self.version
