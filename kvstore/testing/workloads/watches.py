"""Watches against what was written: streams of events, of one key, of a place or of everything, which go on where they ended.

Clients write single keys and batches over places; in between they follow a stream for a while, leave it anywhere (by a
time-out, in the middle of a commit, by dying), and go on from its version. Each stream must then be the history of its span:
every commit whole, in the order of versions, once, with its values; and none that failed. What an unknown write came to is
learned from the streams, which must agree about it.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Final

from kvstore.client import Database
from kvstore.errors import Compacted, KVError
from kvstore.testing.history import Outcome, TxnOp
from kvstore.testing.workloads.base import FINISH_TIMEOUT_S, Workload
from kvstore.watches import Event, Watch

KEYS: Final = 6
STREAMS_MAX: Final = 3  # of one client
FOLLOW_S: Final = (0.02, 0.2, 1.5)  # at most, about
COME_TO_THE_END_S: Final = 40.0


class Stream:
    """What was told of one span, in (began, position]. `events` may hold a part of the next commit, behind that."""

    def __init__(self, key: bytes | None, prefix: bytes | None) -> None:
        self.key, self.prefix = key, prefix
        self.began = self.position = -1  # -1: not begun
        self.events: list[Event] = []
        self.over = False  # it was away for so long that what followed is not kept any more

    def covers(self, key: bytes) -> bool:
        return key == self.key if self.prefix is None else key.startswith(self.prefix)

    def watch(self, db: Database) -> Watch:
        since = self.position if self.position >= 0 else None
        self.events = [event for event in self.events if event.version <= self.position]
        return db.watch(key=self.key, prefix=self.prefix, since=since)

    def begun(self, watch: Watch) -> None:
        if self.began < 0:
            self.began = self.position = watch.version

    def told(self, events: Iterable[Event], watch: Watch) -> None:
        self.events += events
        self.position = watch.version

    def __repr__(self) -> str:
        return f"stream of {self.key if self.prefix is None else self.prefix!r} in ({self.began}, {self.position}]"


class Watching(Workload):
    """See the module."""

    name: ClassVar[str] = "watches"
    kinds_count: ClassVar[int] = 4

    def __init__(self, rng: random.Random, places: Sequence[bytes], **options: Any) -> None:
        super().__init__(rng, places, **options)
        self.keys = [self.key(number) for number in range(KEYS * self.scale)]
        self._own = dict.fromkeys(self.keys)
        self.ops: list[TxnOp] = []
        self.streams: list[Stream] = []
        self._of_client: dict[str, list[Stream]] = {}

    def rows(self) -> dict[bytes, bytes]:
        return dict.fromkeys(self.keys, b"start")

    async def step(self, db: Database, client: str, rng: random.Random) -> None:
        await self.kind(rng, (self._put, self._delete, self._batch, self._follow))(db, client, rng)

    # -- writing

    def _begin(self, client: str, kind: str, rng: random.Random) -> TxnOp:
        name = f"{kind}/{client}/{self.unique(rng):x}".encode()
        return TxnOp(client, name, self.history.tick())

    async def _write(self, db: Database, op: TxnOp) -> None:
        self.ops.append(op)
        self.history.transactions.append(op)
        error: KVError | None = None
        try:
            if len(op.writes) == 1:
                ((key, value),) = op.writes.items()
                op.version = await (db.delete(key) if value is None else db.put(key, value))
            else:
                async with db.batch() as batch:
                    for key, value in op.writes.items():
                        if value is None:
                            batch.delete(key)
                        else:
                            batch.put(key, value)
                op.version = batch.version or 0
        except KVError as raised:
            error = raised
        self.settle(op, error, f"{op.name!r} {op.writes!r} at {op.version}")

    async def _put(self, db: Database, client: str, rng: random.Random) -> None:
        op = self._begin(client, "put", rng)
        op.writes[rng.choice(self.keys)] = op.name
        await self._write(db, op)

    async def _delete(self, db: Database, client: str, rng: random.Random) -> None:
        op = self._begin(client, "delete", rng)
        op.writes[rng.choice(self.keys)] = None
        await self._write(db, op)

    async def _batch(self, db: Database, client: str, rng: random.Random) -> None:
        op = self._begin(client, "batch", rng)
        for key in rng.sample(self.keys, rng.randint(2, 4)):
            op.writes[key] = op.name if rng.random() < 0.8 else None
        await self._write(db, op)

    # -- following

    async def _follow(self, db: Database, client: str, rng: random.Random) -> None:
        streams = self._of_client.setdefault(client, [])
        fresh = self._new_stream(rng)
        number = rng.randrange(STREAMS_MAX)
        stay_s = rng.uniform(0, rng.choice(FOLLOW_S))
        single = rng.choice(
            (0, 0, 1, 3, 10)
        )  # read one by one, and leave after so many: in a commit, maybe
        open_ones = [stream for stream in streams if not stream.over]
        if number < len(open_ones):
            stream = open_ones[number]
        else:
            stream = fresh
            streams.append(stream)
            self.streams.append(stream)
        op = self._begin(client, "follow", rng)
        error: KVError | None = None
        try:
            await self._read(stream, stream.watch(db), stay_s, single)
        except Compacted as raised:
            stream.over = True
            if raised.oldest <= stream.position:
                self.problems.append(f"Wrongly-compacted: watches: {stream}: {raised.oldest}")
        except KVError as raised:
            error = raised
        self.settle(op, error, f"{op.name!r} {len(stream.events)} events to {stream.position}")

    def _new_stream(self, rng: random.Random) -> Stream:
        kind, number = rng.randrange(3), rng.randrange(len(self.keys))
        if kind == 0:
            return Stream(self.keys[number], None)
        return Stream(None, self.prefix(number) if kind == 1 else b"")

    async def _read(
        self, stream: Stream, watch: Watch, stay_s: float, single: int = 0, upto: int = 1 << 64
    ) -> None:
        """Until the time is over, or the stream has come to a version, or (0: never) there were `single` events."""
        try:
            async with asyncio.timeout(stay_s), watch:
                stream.begun(watch)
                for _ in range(single):
                    stream.told([await anext(watch)], watch)
                while stream.position < upto and not single:
                    stream.told(await watch.pull(), watch)
        except TimeoutError as error:
            if isinstance(error, KVError):
                raise
        finally:
            await watch.close()

    # -- the end

    async def finish(self, db: Database) -> None:
        """A last write of every key, to which every stream comes."""
        for key in self.keys:
            op = TxnOp("end", b"end/" + key, self.history.tick(), writes={key: b"end/" + key})
            self.ops.append(op)
            op.version = await db.put(key, b"end/" + key, timeout=FINISH_TIMEOUT_S)
            self.settle(op, None, f"{op.name!r} at {op.version}")
        ends = {op.version: key for op in self.ops[-len(self.keys) :] for key in op.writes}
        for stream in self.streams:
            if stream.over or stream.began < 0:
                continue
            upto = max((version for version, key in ends.items() if stream.covers(key)), default=0)
            if stream.position >= upto:
                continue
            try:
                await self._read(stream, stream.watch(db), COME_TO_THE_END_S, upto=upto)
            except Compacted:
                stream.over = True
                continue
            if stream.position < upto:
                self.problems.append(f"Lost-event: watches: {stream} never comes to {upto}")

    def inspect(self) -> Iterable[str]:
        by_version = {op.version: op for op in self.ops if op.outcome is Outcome.OK}
        versions = self._fates()
        for stream in self.streams:
            yield from self._check(stream, by_version, versions)
        for op in self.ops:
            version = versions.get(op.name) if op.outcome is Outcome.UNKNOWN else op.version
            if version is None or op.outcome is Outcome.FAILED:
                continue
            for stream in self.streams:
                if stream.began < version <= stream.position:
                    yield from self._check_whole(stream, op, version)

    def _fates(self) -> dict[bytes, int]:
        """The versions of unknown writes, by their names, which are their values."""
        unknown = {op.name: op for op in self.ops if op.outcome is Outcome.UNKNOWN}
        versions: dict[bytes, int] = {}
        for stream in self.streams:
            for event in self._told(stream):
                if event.value in unknown:
                    versions.setdefault(event.value, event.version)
        return versions

    def _told(self, stream: Stream) -> list[Event]:
        return [
            each
            for each in stream.events
            if each.key in self._own and each.version <= stream.position
        ]

    def _check(
        self, stream: Stream, by_version: dict[int, TxnOp], versions: dict[bytes, int]
    ) -> Iterable[str]:
        """Order, and where each event comes from."""
        told = self._told(stream)
        places = [(event.version, event.key) for event in told]
        for before, after in itertools.pairwise(places):
            if before >= after:
                kind = "Doubled-event" if before == after else "Event-order"
                yield f"{kind}: watches: {stream}: {after} comes after {before}"
        for event in told:
            op = by_version.get(event.version) or self._author(event, versions)
            what = f"{event.key!r} = {event.value!r} at {event.version}"
            if op is None:
                yield f"Phantom: watches: {stream}: nobody wrote {what}"
            elif event.key not in op.writes or op.writes[event.key] != event.value:
                yield f"Wrong-value: watches: {stream}: {what} is not what {op.name!r} wrote"
            elif not stream.covers(event.key) or event.version <= stream.began:
                yield f"Strange-event: watches: {stream}: {what}"

    def _author(self, event: Event, versions: dict[bytes, int]) -> TxnOp | None:
        """An unknown write that this may be of. One that only deletes here has no name: it may be any."""
        for op in self.ops:
            if op.outcome is Outcome.UNKNOWN and op.writes.get(event.key, b"") == event.value:
                version = versions.get(op.name)
                if version == event.version or (version is None and event.value is None):
                    return op
        return None

    def _check_whole(self, stream: Stream, op: TxnOp, version: int) -> Iterable[str]:
        found = {event.key: event.value for event in stream.events if event.version == version}
        for key, value in op.writes.items():
            if stream.covers(key) and found.get(key, b"") != value:
                yield f"Lost-event: watches: {stream}: {key!r} of {op.name!r} at {version} is missing"
