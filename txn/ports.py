"""What the transaction layer needs from the world, as protocols owned by this package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from txn.messages import Reply, Request


class Rows(Protocol):
    """Stored rows as they stand after all that was applied. Corruption raises, it never looks like absence."""

    def get(self, key: bytes, /) -> bytes | None: ...

    def scan(
        self, start: bytes, end: bytes | None, *, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        """Rows of [start, end) in order (reversed: from the end downwards)."""


class Output(Protocol):
    """What an evaluator asks to be done. Calls only append to lists; the store carries them out once a turn."""

    def reply(self, origin: Any, reply: Reply, confirm: bool) -> None:
        """Answer. `confirm`: the answer rests on absence, so leadership must be confirmed after this call first."""

    def call(self, key: bytes, request: Request, call_id: int) -> None:
        """Ask the leader of the range that holds `key`; the answer comes back through Evaluator.on_reply(call_id)."""
