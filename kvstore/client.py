"""The Python client: `Database`, the door to a cluster (or to the node in this process).

Everything here runs on one event loop. `Database` does what users ask by the parts below it: `router` (nodes, repetition),
`commits` (write sets), `reads` (snapshots), `transactions`. The simulator and the embedded mode give it another Network.

A plain put is the hot path: one message, one future, and no task and no timer of its own (`_write_one`).
"""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Final, Self, TypeVar

from kvstore import limits
from kvstore.atomics import AtomicCalls
from kvstore.attempts import Attempts, KeptResult
from kvstore.batch import Batch
from kvstore.buffer import WriteBuffer
from kvstore.clearing import clearing
from kvstore.client_reads import DatabaseReads, checked_version
from kvstore.commits import Committer, Done
from kvstore.cutting import WriteSet
from kvstore.errors import (
    ClientClosed,
    CompareFailed,
    InvalidArgument,
    KVError,
    OutcomeExpired,
)
from kvstore.link import Hello, LinkLimits
from kvstore.links import Answer, Call, Channel
from kvstore.ports import Clock, Network
from kvstore.reads import Entry, Found, View
from kvstore.router import TRY_TIMEOUT_S, Router
from kvstore.scans import RowScan, scan_bounds
from kvstore.streams import connect as connect_stream
from kvstore.transactions import (
    Aborted,
    Committed,
    Snapshot,
    Transaction,
    TransactionOptions,
    decode_token,
)
from kvstore.watches import Watch, Watches
from txn.messages import Prepare, PrepareReply
from txn.types import Expect, ExpectKind, PartStatus, TxnStatus, Write, WriteKind

__all__ = [
    "ANY", "Aborted", "AnyVersion", "Batch", "Committed", "Database", "Entry", "RowScan", "Snapshot", "Transaction",
]  # fmt: skip

CLIENT_PATH: Final = "/v1/stream"
TIMEOUT_S: Final = 5.0
CLOSE_TIMEOUT_S: Final = 1.0
SEEN_AGE_S_MAX: Final = 1.0

R = TypeVar("R")
_COMMITTED: Final = int(PartStatus.COMMITTED)
_PUT: Final = int(WriteKind.PUT)
_TXN_ID: Final = struct.Struct(">QQ").pack  # make_txn_id, quickly


class AnyVersion:
    """The type of ANY: no condition on the version."""

    def __repr__(self) -> str:
        return "ANY"


ANY: Final = AnyVersion()


class Database(DatabaseReads, AtomicCalls):
    """A cluster. Use it with `async with`, or `start` and `close`. Bound to the loop on which it was started.

    Args:
        network, clock, rng: the world. rng makes transaction ids: seed it with the system's randomness.
        addresses: nodes to ask first. timeout_s: of each call without one of its own, retries included.
        cluster: refuse any other cluster (id); empty: take the one that answers.
        on_close: awaited at the end of `close`, to end what belongs to this client alone.

    Every method raises InvalidArgument (and KeyTooLarge, ValueTooLarge, TransactionTooLarge) before anything is sent;
    DeadlineExceeded, Unavailable, Throttled when nothing happened in time; CommitUnknown when a write may have.
    """

    def __init__(
        self,
        network: Network,
        addresses: Sequence[str],
        clock: Clock,
        rng: random.Random,
        timeout_s: float = TIMEOUT_S,
        *,
        cluster: str = "",
        try_timeout_s: float = TRY_TIMEOUT_S,
        link_limits: LinkLimits | None = None,
        on_close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        timeout_s = limits.validate_timeout(timeout_s)
        self._network = network
        self._clock = clock
        self._rng = rng
        self._bits = rng.getrandbits
        self._try_timeout_s = try_timeout_s
        self._link_limits = link_limits or LinkLimits()
        self._cluster = cluster
        self._on_close = on_close
        self._closing = asyncio.Lock()
        router = Router(self._dial, addresses, clock, rng, try_timeout_s=try_timeout_s)
        super().__init__(router, clock, timeout_s, rng.getrandbits(63) | 1)
        self._committer = Committer(self._router, rng)
        self._watches = Watches(self._started_router, rng, timeout_s)

    async def _dial(self, address: str, node: int) -> Channel:
        hello = Hello(cluster=self._cluster or self._router.cluster, kind="client", to=node)
        return await connect_stream(
            self._network,
            address,
            CLIENT_PATH,
            hello,
            limits=self._link_limits,
            timeout_s=min(self._timeout_s, self._link_limits.handshake_timeout_s),
            monotonic=self._monotonic,
        )

    # --- life -------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Reach the cluster and learn its ranges. Raises: Unavailable, WrongCluster, VersionMismatch."""
        if self._closed:
            raise ClientClosed
        if self._started:
            return
        await self._router.start(self._timeout_s)
        self._started = True

    async def close(self) -> None:
        """End it, within a bounded time: commits that were cancelled come to their end first. May be called again: that waits
        for the first one. One that is cancelled does not wait for commits, and ends everything else."""
        self._closed = True
        async with self._closing:
            try:
                self._views.close()
                await self._watches.close()
                self._committer.keeper.close()
                await self._committer.drain(CLOSE_TIMEOUT_S)
            finally:
                try:
                    await self._router.close(CLOSE_TIMEOUT_S)
                finally:
                    if self._on_close is not None:
                        await self._on_close()
                        self._on_close = None

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def router(self) -> Router:
        """Where requests go; for tools that look inside."""
        return self._router

    def stats(self) -> dict[str, float]:
        """Counters of this client."""
        return {
            "calls_in_flight": self._router.calls,
            "calls_retried": self._router.calls_retried,
            "messages_sent": self._router.messages_sent,
            "commit_attempts": self._committer.attempts,
            "commit_retries": self._committer.retries,
            "conflicts": self._committer.conflicts,
            "replicas_behind": self._replicas.refused,
            "watches": len(self._watches),
        }

    def watch(
        self,
        *,
        key: bytes | None = None,
        prefix: bytes | None = None,
        since: int | None = None,
        timeout: float | None = None,
    ) -> Watch:
        """Every version written to a key, or to the keys with a prefix, in the order of commit: none missed, none doubled.

        `async for event in db.watch(prefix=b"user/")`. It goes on across leader changes and lost connections.
        Args: since: a version; the events are those above it (another watch's `version`, a commit's, a snapshot's). Without it
        the watch begins at now. timeout: seconds without word from a range before it raises; else it tries for ever.
        Raises, when it is iterated: Compacted when changes above `since` are no longer kept; Throttled when a node has too
        many watches; InvalidArgument.
        """
        return self._watches.open(key, prefix, since, self._optional(timeout))

    # --- writes -----------------------------------------------------------------------------------

    async def put(
        self,
        key: bytes,
        value: bytes,
        *,
        if_version: int | AnyVersion = ANY,
        if_absent: bool = False,
        timeout: float | None = None,
    ) -> int:
        """Write one key in a transaction of its own; return once a quorum has it on disk.

        Args: if_version: only if that is the key's newest version (0: there is no such key). if_absent: the same as 0.
        timeout: seconds, retries included.
        Returns: the commit version, above that of every write acknowledged before this call.
        Raises: CompareFailed (nothing was written); CommitUnknown if the time ran out after it was sent.
        """
        limits.validate_key(key)
        limits.validate_value(value)
        expects = _expects(key, if_version, if_absent) if if_absent or if_version is not ANY else []
        write = Write(_PUT, key, value)
        now = self._monotonic()
        if timeout is not None or now - self._router.seen_at > SEEN_AGE_S_MAX:
            return (await self._write_one(write, expects, timeout)).version
        call = self._send_one(write, expects, now, self._timeout_s)  # the path that has to be quick
        try:
            reply = await call.future  # type: ignore[misc]
        except BaseException:
            self._router.forget(call)
            raise
        if reply.__class__ is PrepareReply and reply.status == _COMMITTED:
            return reply.ts
        return (await self._go_on(call, reply, write, expects, now + self._timeout_s)).version

    async def delete(
        self, key: bytes, *, if_version: int | AnyVersion = ANY, timeout: float | None = None
    ) -> int:
        """Delete one key, present or not; returns the commit version. As `put`."""
        limits.validate_key(key)
        expects = _expects(key, if_version, False)
        return (await self._write_one(Write(WriteKind.DELETE, key), expects, timeout)).version

    async def cas(
        self,
        key: bytes,
        expected: bytes | None,
        new: bytes | None,
        *,
        timeout: float | None = None,
    ) -> bool:
        """Set `new` (None: delete) if the value is `expected` (None: absent). False: it was not; nothing was written."""
        limits.validate_key(key)
        for value in (expected, new):
            if value is not None:
                limits.validate_value(value)
        expect = (
            Expect(ExpectKind.ABSENT, key)
            if expected is None
            else Expect(ExpectKind.VALUE, key, 0, expected)
        )
        write = Write(WriteKind.DELETE, key) if new is None else Write(_PUT, key, new)
        try:
            await self._write_one(write, [expect], timeout)
        except CompareFailed:
            return False
        return True

    async def delete_range(
        self, start: bytes, end: bytes, *, timeout: float | None = None
    ) -> int | None:
        """Delete [start, end) in one transaction; returns the version (None if the span is empty).

        Raises: TransactionTooLarge if a range holds more rows of it, or more bytes of values, than a transaction may delete
        there; nothing is done then, and clear_range does it in pages.
        """
        buffer = WriteBuffer()
        buffer.clear(*limits.validate_range(start, end))
        return await self._commit_buffer(buffer, timeout)

    async def clear_range(
        self,
        start: bytes = b"",
        end: bytes | None = None,
        *,
        prefix: bytes | None = None,
        on_progress: Callable[[int, bytes], None] | None = None,
    ) -> int:
        """Delete any number of rows, page by page: not atomic. Returns how many there were.

        What is written into the span meanwhile may or may not be deleted. Each page is a transaction of its own, and has the
        client's timeout. If it is cancelled or fails, what was deleted stays deleted: call it again, or go on from the key
        that was told last.
        Args: on_progress: is told after each page how many rows are gone, and the key up to which the span is empty.
        """
        low, high = scan_bounds(start, end, prefix, None)
        rows = 0
        async for cleared, rows in clearing(self, low, high):
            if on_progress is not None:
                on_progress(rows, cleared)
        return rows

    @asynccontextmanager
    async def batch(self, *, timeout: float | None = None) -> AsyncIterator[Batch]:
        """Collect writes, and commit them together when the block ends well: atomic, over any number of ranges."""
        with Batch() as batch:
            yield batch
        await self.commit_batch(batch, timeout=timeout)

    async def commit_batch(self, batch: Batch, *, timeout: float | None = None) -> int | None:
        """What `batch` does at the end of its block; returns the version (None if nothing was written)."""
        batch.version = await self._commit_buffer(batch.buffer, timeout)
        return batch.version

    async def _commit_buffer(self, buffer: WriteBuffer, timeout: float | None) -> int | None:
        if not buffer:
            return None
        self._started_router()
        deadline = self._monotonic() + self._timeout(timeout)
        write_set = WriteSet(buffer.anchor_key, buffer.writes())
        return (await self._committer.commit(write_set, deadline, patient=True)).version

    def _send_one(self, write: Write, expects: list[Expect], now: float, timeout_s: float) -> Call:
        """One write as a transaction of its own: one message and one future."""
        router = self._router
        seen_ts = router.seen_ts
        txn_id = _TXN_ID(seen_ts, self._bits(64))
        key = write.key
        reserve_s = 1.0 if timeout_s > 4.0 else timeout_s * 0.25  # for asking for the outcome
        call = router.open(key, b"", now, now + timeout_s - reserve_s)
        request = Prepare(
            call.id, call.range_id, call.version, txn_id, key, key, [write], expects, [], [], True, seen_ts
        )  # fmt: skip
        size = len(key) + len(write.value)
        if expects:
            size += sum(len(expect.value) for expect in expects)
        router.submit(call, request, size)
        return call

    async def _write_one(self, write: Write, expects: list[Expect], timeout: float | None) -> Done:
        """The same with everything that may be in the way."""
        router = self._started_router()
        now = self._monotonic()
        timeout_s = self._timeout_s if timeout is None else self._timeout(timeout)
        if now - router.seen_at > SEEN_AGE_S_MAX:
            await self._committer.begin_ts(now + timeout_s)
        call = self._send_one(write, expects, now, timeout_s)
        try:
            reply = await call.future  # type: ignore[misc]
        except BaseException:
            router.forget(call)
            raise
        return await self._go_on(call, reply, write, expects, now + timeout_s)

    async def _go_on(
        self, call: Call, reply: Answer, write: Write, expects: list[Expect], deadline: float
    ) -> Done:
        assert isinstance(call.request, Prepare)
        txn_id = call.request.txn_id
        if isinstance(reply, PrepareReply) and reply.status == _COMMITTED:
            return Done(reply.ts, reply.results, txn_id)
        return await self._committer.commit(
            WriteSet(write.key, [write], expects),
            deadline,
            patient=True,
            txn_id=txn_id,
            first=(call, reply),
        )

    # --- transactions -----------------------------------------------------------------------------

    def transaction(
        self, *, read_only: bool = False, timeout: float | None = None, priority: int = 0
    ) -> Transaction:
        """One attempt: `async with db.transaction() as tx`. Commits on a clean exit, rolls back on an exception.

        Args: timeout: seconds for the whole transaction; without it each call has the client's. priority: -1,000 to 1,000;
        it meets others as one that began so many seconds earlier, and of two that meet the older one waits and goes on.
        """
        return self.begin(TransactionOptions(read_only, self._optional(timeout), priority))

    def begin(self, options: TransactionOptions, age: int = 0) -> Transaction:
        router = self._started_router()
        if type(options.priority) is not int or abs(options.priority) > limits.PRIORITY_MAX:
            most = limits.PRIORITY_MAX
            raise InvalidArgument(f"priority must be an int from -{most} to {most}")
        return Transaction(
            router, self._committer, self._timeout_s, options, age=age, views=self._views
        )

    async def run(
        self,
        fn: Callable[[Transaction], Awaitable[R]],
        *,
        read_only: bool = False,
        timeout: float | None = None,
        priority: int = 0,
        idempotency_key: bytes | str | None = None,
    ) -> R:
        """`await fn(tx)` and commit; again, with a new transaction, while errors say that this may help.

        `fn` may thus run several times: let it have no effects of its own. Its own exceptions end it at once. After a
        Conflict the next attempt first locks the key, for a second at most; its reads are of one snapshot as ever.
        Args: timeout: seconds for all attempts together. priority: as of `transaction`. idempotency_key: `fn` takes effect
        at most once for a key, and a second run returns the first one's result, which must be what msgpack holds, within
        1 KiB. The key is remembered for 24 h.
        """
        attempts = self.attempts(read_only, timeout, priority)
        kept = None if idempotency_key is None else KeptResult(idempotency_key)
        while True:
            tx = attempts.begin()
            try:
                async with tx:
                    if kept is None:
                        return await fn(tx)
                    before = await kept.recall(tx)
                    if before is not None:
                        return kept.decode(before)  # type: ignore[no-any-return]
                    result = await fn(tx)
                    kept.remember(tx, result)
                    return result
            except KVError as error:
                await asyncio.sleep(attempts.pause(tx, error))

    def attempts(self, read_only: bool, timeout: float | None, priority: int) -> Attempts:
        """For `run`, here and in the blocking client."""
        hard = self._optional(timeout)
        return Attempts(self.begin, self._monotonic, self._rng.random, read_only, hard, priority)

    async def outcome(self, token: str, *, timeout: float | None = None) -> Committed | Aborted:
        """What became of the transaction with this id (`Transaction.id`). One that is undecided is aborted by asking.

        Raises: OutcomeExpired when its record is no longer kept.
        """
        txn_id, anchor_key = decode_token(token)
        self._started_router()
        deadline = self._monotonic() + self._timeout(timeout)
        reply = await self._committer.outcome(txn_id, anchor_key, deadline)
        if reply.status == TxnStatus.COMMITTED:
            return Committed(reply.ts)
        if reply.status == TxnStatus.ABORTED:
            return Aborted()
        raise OutcomeExpired

    # --- inside -----------------------------------------------------------------------------------

    def _until(self, timeout: float | None) -> float:
        return self._monotonic() + self._timeout(timeout)

    async def _found_at(self, key: bytes, at: int, until: float) -> Found:
        view = View(self._router, self._timeout_s, at=at, deadline=until)
        return await view.get(key)

    def _optional(self, timeout: float | None) -> float | None:
        return None if timeout is None else self._timeout(timeout)


def _expects(key: bytes, if_version: int | AnyVersion, if_absent: bool) -> list[Expect]:
    if if_version is ANY:
        return [Expect(ExpectKind.ABSENT, key)] if if_absent else []
    if if_absent:
        raise InvalidArgument("give if_version or if_absent, not both")
    return [Expect(ExpectKind.VERSION, key, checked_version(if_version))]


async def over_websockets(
    addresses: Sequence[str], timeout_s: float, cluster: str = ""
) -> Database:
    """A started client of the cluster at these addresses, with a network of its own that ends with it."""
    from kvstore.adapters.system import SystemClock, SystemRandom
    from kvstore.adapters.ws_transport import WsNetwork

    network = WsNetwork()
    rng = SystemRandom().stream("client")
    database = Database(
        network, addresses, SystemClock(), rng, timeout_s, cluster=cluster, on_close=network.close
    )
    try:
        await database.start()
    except BaseException:
        await database.close()
        raise
    return database
