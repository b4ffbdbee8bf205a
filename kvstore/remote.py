"""A node's way to ranges that others lead, and its own client: one router over the same streams that clients use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from kvstore.client import Database
from kvstore.errors import KVError, to_wire
from kvstore.link import LinkLimits
from txn.messages import Failure, Reply, Request

if TYPE_CHECKING:
    from kvstore.node import Node

CALL_TIMEOUT_S: Final = 2.0
START_RETRY_S: Final = 0.2


class RemoteRanges:
    """See kvstore.store.RemoteCalls. Until a node was reached, every call fails at once with `unavailable`."""

    def __init__(self, node: Node, limits: LinkLimits) -> None:
        adapters = node.adapters
        assert node.store is not None
        self._node = node
        self._monotonic = adapters.clock.monotonic
        self._database = Database(
            adapters.network,
            list(node.store.addresses.values()),
            adapters.clock,
            adapters.random.stream("database"),
            node.config.client.timeout_s,
            cluster=node.cluster_id,
            link_limits=limits,
        )
        self._started = False
        self._starting: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Learn the ranges, in the background; then the node has its `database`."""
        self._starting = asyncio.get_running_loop().create_task(self._start())

    async def _start(self) -> None:
        while True:
            try:
                await self._database.start()
            except KVError:
                await asyncio.sleep(START_RETRY_S)
                continue
            self._started = True
            self._node.database = self._database
            return

    def call(self, key: bytes, request: Request, then: Callable[[Reply], None]) -> None:
        """Routed, repeated within CALL_TIMEOUT_S, answered once."""

        def tell(answer: Reply | KVError) -> None:
            if isinstance(answer, KVError):
                code, message, _ = to_wire(answer)
                then(Failure(0, code, message))
            else:
                then(answer)

        if not self._started:
            then(Failure(0, "unavailable", "no other node was reached yet"))
            return
        try:
            deadline = self._monotonic() + CALL_TIMEOUT_S
            self._database.router.send(request, key, b"", deadline, on_reply=tell)
        except KVError as error:
            tell(error)

    async def close(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await self._database.close()
