"""A commit over two ranges that stops at a phase, as seen by its client: what the scenarios of the recovery table begin with.

The client's own messages are held back, or the answers to them, and nothing else is touched: so the same code plays in the
simulator and in a real process.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from typing import Any, Final

from kvstore.client import Database
from kvstore.links import Call
from kvstore.transactions import Transaction
from txn.messages import Prepare


class Phase(enum.Enum):
    BEFORE_STAGED = "before STAGED"  # the participant is PREPARED, the anchor has not heard of it
    AFTER_STAGED = "after STAGED"  # the anchor is, the participant has not
    ALL_PREPARED = "after all PREPARED"  # it is committed, and nobody knows yet
    ACK_LOST = "after the acknowledgement was lost"  # the ranges know, the client does not


class Crash(enum.Enum):
    CLIENT = "client"
    ANCHOR = "anchor leader"
    PARTICIPANT = "participant leader"
    ORACLE = "oracle leader"
    CLUSTER = "whole cluster"


TABLE: Final = [(crash, phase) for crash in Crash for phase in Phase]
COMMITTED_FOR_SURE: Final = (Phase.ALL_PREPARED, Phase.ACK_LOST)
OLD, NEW = b"old", b"new"


def must_be_aborted(crash: Crash, phase: Phase) -> bool:
    """Nobody is left who could send what is missing."""
    return crash is Crash.CLIENT and phase not in COMMITTED_FOR_SURE


class Held:
    """One transaction of `database` that writes NEW to `anchor` and to `participant`, in two ranges; held at `phase`."""

    def __init__(self, database: Database, phase: Phase, anchor: bytes, participant: bytes) -> None:
        self.reached = asyncio.Event()
        self.tx: Transaction = database.transaction()
        self._database, self._phase = database, phase
        self._keys = anchor, participant
        self._answers = 0
        self._held: list[Callable[[], None]] = []
        self._open = False
        self._send = database.router.send
        self._looking: asyncio.Task[None] | None = None

    async def commit(self) -> int | None:
        """Returns the version, after `release`. Raises as any commit."""
        router: Any = self._database.router
        async with self.tx as tx:
            for key in self._keys:
                tx.put(key, NEW)
            self.token = tx.id
            router.send = self._sent
        return self.tx.commit_version

    def release(self) -> None:
        """The client goes on."""
        self._open = True
        held, self._held = self._held, []
        for each in held:
            each()

    def _sent(self, request: Any, key: bytes, end: bytes, deadline: float, **options: Any) -> Call:
        if self._open or type(request) is not Prepare or request.one_range:
            return self._send(request, key, end, deadline, **options)
        late = {
            Phase.BEFORE_STAGED: request.locus == request.anchor_key,
            Phase.AFTER_STAGED: request.locus != request.anchor_key,
        }
        if late.get(self._phase, False):
            self._held.append(lambda: self._submit(request, key, end, deadline, options))
            return Call(0, key, end, deadline, deadline)
        on_reply = options.pop("on_reply")

        def hold(answer: Any) -> None:
            if self._open:
                on_reply(answer)
                return
            self._held.append(lambda: on_reply(answer))
            self._answers += 1
            if self._answers == (2 if self._phase in COMMITTED_FOR_SURE else 1):
                self._arrived()

        return self._send(request, key, end, deadline, on_reply=hold, **options)

    def _submit(
        self, request: Any, key: bytes, end: bytes, deadline: float, options: dict[str, Any]
    ) -> None:
        self._send(request, key, end, deadline, **options)

    def _arrived(self) -> None:
        if self._phase is Phase.ACK_LOST:
            self._looking = asyncio.ensure_future(self._decided())
        else:
            self.reached.set()

    async def _decided(self) -> None:
        """Somebody asks, so that the ranges decide."""
        await self._database.outcome(self.token)
        self.reached.set()
