"""Embedded use: one node in this process, the same code as a cluster of one, without ports.

The directory belongs to one process at a time, and opens again at once after `close`. It is a cluster of one node: it can
be started by `kvstore start --dir` later only under the address that it was given here, so it stays an embedded one.

A store that fails (its disk, say) ends by itself, not the process: from then on every call raises what it failed of, and a
write that was under way is CommitUnknown. Close it, and open it again once the reason is gone.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from typing import TYPE_CHECKING, Final

import msgspec

from kvstore.adapters.local_network import LocalNetwork
from kvstore.adapters.production import ProductionAdapters
from kvstore.bootstrap import mint_cluster_id, plan
from kvstore.client import Database
from kvstore.config import NodeConfig, RaftSection
from kvstore.errors import (
    CorruptionError,
    DataDirectoryError,
    DiskFull,
    KVError,
    StorageError,
    VersionMismatch,
)
from kvstore.node import Node
from replication.errors import LogDiskFull, LogFormatError, LogMismatch, LogWriteFailed

if TYPE_CHECKING:
    from kvstore.node import OnPipe

ADDRESS: Final = "embedded:1"


class EmbeddedAdapters(ProductionAdapters):
    """The real disk, clock and threads; a network of this process alone, and no HTTP."""

    def __init__(self, config: NodeConfig) -> None:
        super().__init__(config, LocalNetwork())

    async def serve(self, address: str, on_pipe: OnPipe, node: Node) -> str:  # noqa: ARG002 - the port
        return await self.network.serve(address, on_pipe)


async def open_database(path: str | os.PathLike[str], *, timeout_s: float) -> Database:
    """Open or create the data at `path`.

    Raises: DataDirectoryError, CorruptionError, VersionMismatch, DiskFull, StorageError; OSError: the disk does not give it.
    """
    config = msgspec.structs.replace(
        NodeConfig(), raft=RaftSection(election_timeout_s=0.2, heartbeat_s=0.05)
    )
    adapters = EmbeddedAdapters(config)
    node = Node(os.fspath(path), ADDRESS, "", config, adapters)
    node.fatal.add_done_callback(lambda failed: node.refuse_clients(_reason(failed.exception())))
    try:
        await node.start()
        if node.state == "waiting":
            created_ms = adapters.clock.wall_ms()
            cluster = mint_cluster_id(created_ms, secrets.randbits(48), [ADDRESS], [])
            await node.initialize(plan(cluster, [ADDRESS])[0])
        if node.store is None or list(node.store.addresses.values()) != [ADDRESS]:
            raise DataDirectoryError(
                f"{path} belongs to a node of a cluster: use kvstore start --dir"
            )
        database = Database(
            adapters.network,
            [ADDRESS],
            adapters.clock,
            adapters.random.stream("client"),
            timeout_s,
            on_close=lambda: _stop(node),
        )
        await database.start()
    except BaseException as error:
        await _stop(node)
        if isinstance(error, LogFormatError):
            raise VersionMismatch(
                f"{path}: {error}: open it with the version of Kvorum that wrote it"
            ) from error
        if isinstance(error, LogMismatch):
            raise CorruptionError(f"{path}: {error}") from error
        raise
    return database


def _reason(error: BaseException | None) -> KVError:
    """Why the store failed, as an error after which no client tries again."""
    if isinstance(error, KVError) and not error.retryable:
        return error
    text = f"the store failed, close it: {error}"
    if isinstance(error, LogDiskFull):
        return DiskFull(text)
    if isinstance(error, LogWriteFailed):
        return StorageError(text)
    return KVError(text, code="internal_error")


async def _stop(node: Node) -> None:
    """To its end, also when whoever waits is cancelled: half a stop would keep the directory for ever."""
    stopping = asyncio.get_running_loop().create_task(node.stop(drain=False))
    try:
        await asyncio.shield(stopping)
    except asyncio.CancelledError:
        await asyncio.gather(asyncio.shield(stopping), return_exceptions=True)  # it is short
        raise
