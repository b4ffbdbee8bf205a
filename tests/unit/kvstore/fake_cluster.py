"""A dumb cluster in one process: it answers the client's messages rightly, and wrongly on request.

One dict of versions, one oracle counter, several ranges, several "nodes" that all look at the same state; every frame
travels through the product's own streams over pipes that are queues. It replicates nothing and forgets nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

import msgspec

from kvstore.adapters.system import SystemClock
from kvstore.client import Database
from kvstore.link import Hello
from kvstore.ports import Clock
from kvstore.ranges import META_END, META_KEY
from kvstore.sim import loop as sim
from kvstore.streams import Stream, accept
from kvstore.sync import Client
from tests.unit.kvstore.fake_pipes import OnPipe, Pipe, QueueNetwork
from txn import atomics, stamps
from txn.messages import (
    Ack,
    Directory,
    Failure,
    Finalize,
    GetDirectory,
    GetTimestamps,
    LockRead,
    Outcome,
    Prepare,
    PrepareReply,
    RangeInfo,
    Read,
    ReadReply,
    Reply,
    Request,
    Resolve,
    Scan,
    ScanReply,
    Timestamps,
    TxnReply,
    Unlock,
)
from txn.types import (
    ExpectKind,
    FenceReason,
    Participant,
    PartStatus,
    TxnStatus,
    Write,
    WriteKind,
    begin_ts_of,
    point_end,
)

T = TypeVar("T")

CLUSTER = "c1"
FIRST_TS = 1_000 << 18
ORPHAN_S = 1.0

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Request])


class Version(NamedTuple):
    ts: int
    txn_id: bytes
    value: bytes | None


class PreparedPart(NamedTuple):
    request: Prepare
    min_ts: int
    end: tuple[bytes, bytes]
    since: float


class Fault(NamedTuple):
    """What to do with requests of one kind instead of answering them."""

    kind: type[Any]
    act: Callable[[int, Any], Reply | None]  # (node, request); None: no answer at all
    after: bool  # carry it out first, and only then act
    where: Callable[[Any], bool]


class LoopClock:
    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    def wall_ms(self) -> int:
        return 0


class FakeCluster:
    """Args: splits: keys at which ranges begin. nodes: their number; range n is led by node n % nodes + 1."""

    def __init__(self, *splits: bytes, nodes: int = 3) -> None:
        self.nodes = list(range(1, nodes + 1))
        self.network = QueueNetwork()
        self.ts = FIRST_TS
        self.data: dict[bytes, list[Version]] = {}
        self.parts: dict[tuple[bytes, bytes], PreparedPart] = {}  # undecided
        self.part_done: dict[tuple[bytes, bytes], tuple[int, int]] = {}  # (PartStatus, ts)
        self.records: dict[bytes, tuple[int, int]] = {}  # txn_id -> (TxnStatus, ts)
        self.staged: dict[bytes, Prepare] = {}
        self.ranges: list[RangeInfo] = []
        self.requests: list[tuple[int, Request]] = []
        self.messages: list[tuple[int, list[Request]]] = []  # one for each message that arrived
        self.faults: list[list[Any]] = []  # [Fault, times left]
        self.also: list[Reply] = []  # sent with the next answers
        self.page_rows_max = 1_000
        self.read_values_max = 1_000
        self.set_ranges(*splits)

    # --- the tests' side --------------------------------------------------------------------------

    def set_ranges(self, *splits: bytes, version: int = 1) -> None:
        """User ranges that begin at b"" and at each split, and the meta range."""
        bounds = [b"", *splits, META_KEY, META_END, b""]
        self.ranges = [
            RangeInfo(
                version * 100 + number,
                start,
                end,
                version,
                1,
                [(node, 10 * number + node) for node in self.nodes],
                self.nodes[number % len(self.nodes)],
            )
            for number, (start, end) in enumerate(itertools.pairwise(bounds))
        ]

    def fault(
        self,
        kind: type[Any],
        act: Callable[[int, Any], Reply | None],
        *,
        times: int = 1,
        after: bool = False,
        where: Callable[[Any], bool] = lambda request: True,
    ) -> None:
        """The next `times` requests of a kind are met with `act` (see Fault)."""
        self.faults.append([Fault(kind, act, after, where), times])

    def drop_replies(self, kind: type[Any], times: int = 1, **how: Any) -> None:
        self.fault(kind, lambda node, request: None, times=times, after=True, **how)

    def ignore(self, kind: type[Any], times: int = 1, **how: Any) -> None:
        """They are lost before anything is done."""
        self.fault(kind, lambda node, request: None, times=times, **how)

    def fail(
        self,
        kind: type[Any],
        code: str,
        details: dict[str, Any] | None = None,
        times: int = 1,
        **how: Any,
    ) -> None:
        def act(node: int, request: Any) -> Reply:
            return Failure(request.id, code, f"told to say {code}", details or {})

        self.fault(kind, act, times=times, **how)

    def refuse(
        self, reason: FenceReason, *, times: int = 1, version: int = 0, other: bytes = b""
    ) -> None:
        """Prepare is answered FENCED, durably."""

        def act(node: int, request: Prepare) -> Reply:
            key = request.locus
            self.part_done[request.txn_id, key] = (PartStatus.FENCED, 0)
            return PrepareReply(request.id, PartStatus.FENCED, 0, reason, key, other, version)

        self.fault(Prepare, act, times=times)

    def of(self, kind: type[T]) -> list[T]:
        """The requests of a kind that have arrived."""
        return [request for _node, request in self.requests if isinstance(request, kind)]

    def value(self, key: bytes) -> bytes | None:
        versions = self.data.get(key)
        return versions[-1].value if versions else None

    def seed(self, **rows: bytes) -> int:
        self.ts += 1
        for key, value in rows.items():
            self.data.setdefault(key.encode(), []).append(Version(self.ts, b"seed", value))
        return self.ts

    def database(
        self, timeout_s: float = 5.0, *, clock: Clock | None = None, **options: Any
    ) -> Database:
        addresses = [f"n{node}:1" for node in self.nodes]
        clock = clock or LoopClock()
        return Database(self.network, addresses, clock, random.Random(7), timeout_s, **options)

    async def start(self) -> None:
        for node in self.nodes:
            await self.network.serve(f"n{node}:1", self._attend(node))

    async def settled(self) -> None:
        """Everything that has been sent has arrived."""
        await asyncio.sleep(0.001)

    def stop_node(self, node: int) -> None:
        self.network.listeners.pop(f"n{node}:1", None)
        self.network.cut()

    # --- the wire ---------------------------------------------------------------------------------

    def _attend(self, node: int) -> OnPipe:
        async def on_pipe(path: str, pipe: Pipe) -> None:
            assert path == "/v1/stream"
            hello = Hello(cluster=CLUSTER, node=node, kind="peer")
            stream = await accept(pipe, hello, monotonic=asyncio.get_running_loop().time)
            stream.on_message = lambda payload: self._on_message(node, stream, payload)

        return on_pipe

    def _on_message(self, node: int, stream: Stream, payload: bytes) -> None:
        assert payload[0] == 2
        requests = _decode.decode(payload[1:])
        self.messages.append((node, requests))
        replies: list[Reply] = []
        for request in requests:
            self.requests.append((node, request))
            reply = self._answer(node, request)
            if reply is not None:
                replies.append(reply)
        replies += self.also
        self.also = []
        if replies:
            assert stream.send(b"\x03" + _encode(replies))

    def _answer(self, node: int, request: Request) -> Reply | None:
        for entry in self.faults:
            fault: Fault = entry[0]
            if entry[1] > 0 and isinstance(request, fault.kind) and fault.where(request):
                entry[1] -= 1
                if fault.after:
                    self.handle(node, request)
                return fault.act(node, request)
        return self.handle(node, request)

    # --- what a range does ------------------------------------------------------------------------

    def handle(self, node: int, request: Request) -> Reply:
        if isinstance(request, GetDirectory):
            addresses = [(other, f"n{other}:1") for other in self.nodes]
            known = [each for each in self.ranges if any(at == node for at, _ in each.replicas)]
            return Directory(request.id, CLUSTER, node, known, addresses)
        if isinstance(request, GetTimestamps):
            first = self.ts + 1
            self.ts += request.fresh
            return Timestamps(request.id, self.ts, first, request.fresh)
        refusal = self._check_range(node, request)
        if refusal is not None:
            return refusal
        if isinstance(request, Read):
            return self._read(request)
        if isinstance(request, Scan):
            return self._scan(request)
        if isinstance(request, LockRead):  # nobody else locks here
            return self._read(Read(request.id, 0, 0, 0, [request.key]))
        if isinstance(request, Unlock):
            return Ack(request.id)
        if isinstance(request, Prepare):
            return self._prepare(request)
        if isinstance(request, Finalize):
            status = TxnStatus.COMMITTED if request.commit_ts else TxnStatus.ABORTED
            self._finish(request.txn_id, request.anchor_key, status, request.commit_ts)
            return TxnReply(request.id, *self.records[request.txn_id])
        if isinstance(request, Resolve):
            self._resolve(request.txn_id, request.locus, request.commit_ts)
            return Ack(request.id)
        assert isinstance(request, Outcome), request
        return self._outcome(request)

    def _check_range(self, node: int, request: Any) -> Failure | None:
        low, high = _span(request)
        for info in self.ranges:
            if info.range_id == request.range_id:
                if info.version != request.version or low < info.start:
                    break
                if info.end and high > info.end:
                    break
                if info.leader_node != node:
                    return Failure(request.id, "not_leader", "", {"leader_node": info.leader_node})
                return None
        return Failure(request.id, "epoch_mismatch", "", {"ranges": self.ranges})

    def _at(self, at: int) -> int:
        return at or self.ts

    def visible(self, key: bytes, at: int) -> Version | None:
        for version in reversed(self.data.get(key, [])):
            if version.ts <= at:
                return version
        return None

    def _settle(self, low: bytes, high: bytes) -> None:
        """Decide what can be decided of the undecided parts in a span, as a reader would."""
        for (txn_id, _locus), part in list(self.parts.items()):
            if part.end[0] < high and low < part.end[1] and txn_id in self.staged:
                self._recover(txn_id, self.staged[txn_id], fence=False)

    def _read(self, request: Read) -> Reply:
        at = self._at(request.at)
        self._settle(min(request.keys), point_end(max(request.keys)))
        found = [self.visible(key, at) for key in request.keys][: self.read_values_max]
        return ReadReply(
            request.id,
            at,
            [version.ts if version else 0 for version in found],
            [version.value if version else None for version in found],
        )

    def _scan(self, request: Scan) -> Reply:
        at = self._at(request.at)
        self._settle(request.start, request.end)
        keys = sorted(key for key in self.data if request.start <= key < request.end)
        if request.reverse:
            keys.reverse()
        rows = [(key, version) for key in keys if (version := self.visible(key, at))]
        rows = [(key, version) for key, version in rows if version.value is not None]
        most = min(request.rows_max, self.page_rows_max)
        done = len(rows) <= most
        rows = rows[:most]
        covered = request.start if request.reverse else request.end
        if not done:
            covered = rows[-1][0] if request.reverse else point_end(rows[-1][0])
        values = [] if request.keys_only else [version.value or b"" for _, version in rows]
        return ScanReply(
            request.id,
            at,
            [key for key, _ in rows],
            values,
            [version.ts for _, version in rows],
            done,
            covered,
        )

    def _prepare(self, request: Prepare) -> Reply:
        place = (request.txn_id, request.locus)
        known = self.part_done.get(place)
        if known is None and request.one_range:
            versions = self.data.get(request.locus, [])
            mine = [version.ts for version in versions if version.txn_id == request.txn_id]
            known = (PartStatus.COMMITTED, mine[0]) if mine else None
        if place in self.parts:
            known = (PartStatus.PREPARED, self.parts[place].min_ts)
        if known is None and self.records.get(request.txn_id, (0, 0))[0] == TxnStatus.ABORTED:
            known = (PartStatus.FENCED, 0)
        if known is not None:
            return PrepareReply(request.id, *known)
        assert self.ts >= begin_ts_of(request.txn_id) > 0, "begin_ts was never issued"
        refusal = self._refusal(request)
        if refusal is not None:
            self.part_done[place] = (PartStatus.FENCED, 0)
            return refusal
        self.ts += 1
        if request.one_range:
            try:
                results = self._apply(request.writes, request.txn_id, self.ts)
            except ValueError:
                self.part_done[place] = (PartStatus.FENCED, 0)
                return PrepareReply(
                    request.id, PartStatus.FENCED, 0, FenceReason.BAD_VALUE, request.locus
                )
            self.part_done[place] = (PartStatus.COMMITTED, self.ts)
            return PrepareReply(request.id, PartStatus.COMMITTED, self.ts, results=results or None)
        since = asyncio.get_running_loop().time()
        self.parts[place] = PreparedPart(request, self.ts, _span(request), since)
        if request.participants:
            assert request.locus == request.anchor_key
            self.staged[request.txn_id] = request
            self.records[request.txn_id] = (TxnStatus.STAGED, 0)
        return PrepareReply(request.id, PartStatus.PREPARED, self.ts)

    def _refusal(self, request: Prepare) -> PrepareReply | None:
        def fenced(reason: FenceReason, key: bytes, other: bytes, version: int) -> PrepareReply:
            return PrepareReply(request.id, PartStatus.FENCED, 0, reason, key, other, version)

        low, high = _span(request)
        self._settle(low, high)
        for (other, _locus), part in self.parts.items():
            if other != request.txn_id and part.end[0] < high and low < part.end[1]:
                return fenced(FenceReason.CONFLICT, part.end[0], other, 0)
        for expect in request.expects:
            newest = self.visible(expect.key, self.ts)
            version = newest.ts if newest and newest.value is not None else 0
            holds = {
                ExpectKind.ABSENT: version == 0,
                ExpectKind.VERSION: version == expect.version,
                ExpectKind.VALUE: bool(version)
                and newest is not None
                and newest.value == expect.value,
            }[ExpectKind(expect.kind)]
            if not holds:
                return fenced(FenceReason.COMPARE_FAILED, expect.key, b"", version)
        for guard in itertools.chain(request.guards, *request.elsewhere):
            for key, versions in self.data.items():
                if guard.start <= key < guard.end and versions[-1].ts > guard.read_ts:
                    newest = versions[-1]
                    return fenced(FenceReason.CONFLICT, key, newest.txn_id, newest.ts)
        return None

    def _apply(self, writes: list[Write], txn_id: bytes, ts: int) -> list[bytes]:
        results: list[bytes] = []
        for write in writes:
            value: bytes | None = write.value
            if write.kind == WriteKind.DELETE_RANGE:
                for key in [key for key in self.data if write.key <= key < write.value]:
                    if self.value(key) is not None:
                        self.data[key].append(Version(ts, txn_id, None))
                continue
            if write.kind == WriteKind.DELETE:
                value = None
            elif write.kind in (WriteKind.STAMPED_KEY, WriteKind.STAMPED_VALUE):
                rows = stamps.filled([], [], [stamps.of_write(write)], ts)
                ((key, value),) = rows.items()
                write = Write(WriteKind.PUT, key)
            elif write.kind in atomics.ATOMIC_KINDS:
                before = self.value(write.key)
                value, told = atomics.after(write.kind, write.value, before)
                results.append(told)
                if value == before:
                    continue
            versions = self.data.setdefault(write.key, [])
            if versions and versions[-1].ts == ts:
                versions.pop()
            versions.append(Version(ts, txn_id, value))
        return results

    def _resolve(self, txn_id: bytes, locus: bytes, commit_ts: int) -> None:
        part = self.parts.pop((txn_id, locus), None)
        if part is not None and commit_ts:
            self._apply(part.request.writes, txn_id, commit_ts)
        status = PartStatus.COMMITTED if commit_ts else PartStatus.FENCED
        self.part_done.setdefault((txn_id, locus), (status, commit_ts))

    def _finish(self, txn_id: bytes, anchor_key: bytes, status: TxnStatus, ts: int) -> None:
        known = self.records.get(txn_id)
        if known is not None and known[0] != TxnStatus.STAGED:
            assert known == (status, ts), "a finished record never changes"
            return
        self.records[txn_id] = (status, ts)
        staged = self.staged.pop(txn_id, None)
        everybody = staged.participants if staged else [Participant(anchor_key, b"", b"")]
        for participant in everybody:
            self._resolve(txn_id, participant.locus, ts)

    def _recover(self, txn_id: bytes, anchor: Prepare, *, fence: bool) -> None:
        for each in anchor.participants:
            status, ts = self.part_done.get((txn_id, each.locus), (0, 0))
            if status == PartStatus.COMMITTED:  # a hint has been there first
                self._finish(txn_id, anchor.anchor_key, TxnStatus.COMMITTED, ts)
                return
        parts = [self.parts.get((txn_id, each.locus)) for each in anchor.participants]
        prepared = [part.min_ts for part in parts if part is not None]
        if len(prepared) == len(parts):
            self._finish(txn_id, anchor.anchor_key, TxnStatus.COMMITTED, max(prepared))
        elif fence:
            self._finish(txn_id, anchor.anchor_key, TxnStatus.ABORTED, 0)

    def _outcome(self, request: Outcome) -> Reply:
        txn_id, key = request.txn_id, request.anchor_key
        if txn_id in self.staged:
            self._recover(txn_id, self.staged[txn_id], fence=True)
        if txn_id not in self.records:
            status, ts = self.part_done.get((txn_id, key), (PartStatus.ABSENT, 0))
            if status == PartStatus.COMMITTED:
                return TxnReply(request.id, TxnStatus.COMMITTED, ts)
            self._finish(txn_id, key, TxnStatus.ABORTED, 0)
        return TxnReply(request.id, *self.records[txn_id])


def _span(request: Any) -> tuple[bytes, bytes]:
    if isinstance(request, Read):
        return min(request.keys), point_end(max(request.keys))
    if isinstance(request, Scan | Resolve):
        return request.start, request.end
    if isinstance(request, Prepare):
        lows = [write.key for write in request.writes] + [guard.start for guard in request.guards]
        lows += [request.locus] + [expect.key for expect in request.expects]
        highs = [guard.end for guard in request.guards] + [point_end(key) for key in lows]
        for each in request.writes:
            if each.kind == WriteKind.DELETE_RANGE:
                highs.append(each.value)
            elif each.kind == WriteKind.STAMPED_KEY:
                highs.append(stamps.span(each.key)[1])
        return min(lows), max(highs)
    key = request.key if isinstance(request, LockRead | Unlock) else request.anchor_key
    return key, point_end(key)


def simulate(
    test: Callable[[FakeCluster, Database], Coroutine[Any, Any, T]],
    cluster: FakeCluster | None = None,
    **options: Any,
) -> T:
    """Run a test in virtual time against a fake cluster and a started client of it; nothing may be left over."""
    cluster = cluster or FakeCluster()

    async def main(loop: sim.SimLoop) -> T:
        await cluster.start()
        async with cluster.database(**options) as database:
            result = await test(cluster, database)
        assert database.router.calls == 0
        return result

    return sim.run(main, 1, time_limit_s=600.0)


def blocking(cluster: FakeCluster) -> Client:
    """Its blocking client, in real time."""

    async def make() -> Database:
        await cluster.start()
        database = cluster.database(clock=SystemClock())
        await database.start()
        return database

    return Client.over(make)
