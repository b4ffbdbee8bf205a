"""What clients saw, and the final judgement: all of it replayed in commit order by a dumb dict.

The replay executes what each committed transaction asked for, not what the ranges computed, and compares reads, scans,
conditions, sums and every version that is stored. Complete: strict serializability here is a sort and one pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from tests.stateful.txn_ranges import Violation
from txn.types import Expect, ExpectKind, Write, WriteKind

if TYPE_CHECKING:
    from tests.stateful.txn_harness import World

Live = dict[bytes, tuple[int, bytes | None]]  # key -> version, value


class SpanRead(NamedTuple):
    """What [start, end) held, as it was told."""

    start: bytes
    end: bytes
    rows: Live


class Attempt(msgspec.Struct):
    """One attempt of a client's transaction: what it read, what it asked for, what it was told."""

    txn_id: bytes
    begun: int  # on the world's counter of instants
    read_ts: int
    reads: list[SpanRead]
    guarded: bool  # the reads are validated when it commits
    writes: list[Write]
    expects: list[Expect]
    lock_owner: bytes = b""
    locked: list[tuple[SpanRead, int]] = []  # what it read under locks, and at which timestamp
    results: list[bytes] | None = None  # of its increments, if it was told
    acked: int = -1  # commit_ts; 0: aborted; -1: not told
    acked_at: int = -1


class Snapshot(NamedTuple):
    """Reads at one timestamp that were all answered."""

    begun: int
    ended: int
    read_ts: int
    reads: list[SpanRead]


class Peek(NamedTuple):
    """A condition that failed: it showed the newest version of a key."""

    key: bytes
    version: int
    begun: int


class _Moment(NamedTuple):
    begun: int
    ended: int
    ts: int
    writes: bool


class History:
    def __init__(self) -> None:
        self.attempts: list[Attempt] = []
        self.snapshots: list[Snapshot] = []
        self.peeks: list[Peek] = []

    def check(self, world: World) -> None:
        committed = world.checker.committed()
        for attempt in self.attempts:
            ts = committed.get(attempt.txn_id, 0)
            if attempt.acked >= 0 and attempt.acked != ts:
                raise Violation(f"I6: {attempt} was acknowledged, but the logs say {ts}")
        known = {attempt.txn_id for attempt in self.attempts}
        if not known.issuperset(committed):
            raise Violation("something committed that nobody asked for")
        order = sorted(
            (committed[attempt.txn_id], number)
            for number, attempt in enumerate(self.attempts)
            if attempt.txn_id in committed
        )
        self._replay(world, [(ts, self.attempts[number]) for ts, number in order])
        self._check_snapshots(world)
        self._check_real_time(committed)
        self._check_peeks(world)

    # -- I23

    def _replay(self, world: World, order: list[tuple[int, Attempt]]) -> None:
        live: Live = {}
        chains: dict[bytes, list[tuple[int, bytes | None]]] = {}
        for ts, attempt in order:
            spans = [span for span, _ in attempt.locked]
            for span in (*spans, *(attempt.reads if attempt.guarded else ())):
                now = {k: v for k, v in live.items() if span.start <= k < span.end}
                if now != span.rows:
                    raise Violation(f"I23: {attempt} at {ts} read {span.rows}, there is {now}")
            for expect in attempt.expects:
                if not _holds(expect, live):
                    raise Violation(f"I23: {attempt} at {ts}: {expect} does not hold")
            final, results = _execute(attempt.writes, live, ts)
            if attempt.results is not None and attempt.results != results:
                raise Violation(f"I23: {attempt} at {ts}: the sums are {results}")
            for key, value in final.items():
                if value is None:
                    if live.pop(key, None) is None:
                        continue  # whether nothing is deleted by a row or by none, nobody can see
                else:
                    live[key] = (ts, value)
                chains.setdefault(key, []).append((ts, value))
        stored = {key: _visible(world, key) for key in sorted(world.checker.versions)}
        stored = {key: chain for key, chain in stored.items() if chain}
        if stored != chains:
            wrong = [k for k in sorted({*stored, *chains}) if stored.get(k) != chains.get(k)]
            raise Violation(f"I23: {[(k, stored.get(k), chains.get(k)) for k in wrong]}")

    def _check_snapshots(self, world: World) -> None:
        for snapshot in self.snapshots:
            for span in snapshot.reads:
                now = world.checker.rows_at(span.start, span.end, snapshot.read_ts)
                if now != span.rows:
                    raise Violation(f"I23: {snapshot} read {span.rows}, there is {now}")

    # -- strictness

    def _check_real_time(self, committed: dict[bytes, int]) -> None:
        never = 1 << 62
        moments = [_Moment(s.begun, s.ended, s.read_ts, False) for s in self.snapshots]
        for attempt in self.attempts:
            ts = committed.get(attempt.txn_id, 0)
            if ts:
                ended = attempt.acked_at if attempt.acked >= 0 else never
                moments.append(_Moment(attempt.begun, ended, ts, True))
        moments.sort()
        for earlier in moments:
            for later in moments:
                if earlier.ended < later.begun:
                    if later.ts < earlier.ts or (later.ts == earlier.ts and later.writes):
                        raise Violation(f"real time: {earlier} ended before {later} began")

    def _check_peeks(self, world: World) -> None:
        acknowledged = [(a.acked_at, a.acked) for a in self.attempts if a.acked > 0]
        acknowledged += [(s.ended, s.read_ts) for s in self.snapshots]
        for peek in self.peeks:
            least = max([peek.version, *(ts for ended, ts in acknowledged if ended < peek.begun)])
            chain = _visible(world, peek.key)
            if peek.version and peek.version not in [ts for ts, _ in chain]:
                raise Violation(f"{peek} shows a version that does not exist")
            following = [ts for ts, _ in chain if ts > peek.version]
            if not peek.version:  # the key was absent: behind some tombstone, or never there
                absent_from = [0] + [ts for ts, value in chain if value is None]
                if not any(_absent_between(chain, start, least) for start in absent_from):
                    raise Violation(f"{peek} saw nothing, but at {least} there is {chain}")
            elif following and following[0] <= least:
                raise Violation(f"{peek} is older than {least}, the next is {following[0]}")


def _absent_between(chain: list[tuple[int, bytes | None]], start: int, least: int) -> bool:
    """Whether the key, absent from `start` on, is still absent at or after `least`."""
    following = [ts for ts, value in chain if ts > start and value is not None]
    return not following or following[0] > least


def _visible(world: World, key: bytes) -> list[tuple[int, bytes | None]]:
    """The versions of a key, without tombstones that delete nothing."""
    chain: list[tuple[int, bytes | None]] = []
    for version in world.checker.versions.get(key, []):
        if version.value is not None or (chain and chain[-1][1] is not None):
            chain.append((version.ts, version.value))
    return chain


def _holds(expect: Expect, live: Live) -> bool:
    version, value = live.get(expect.key, (0, None))
    if expect.kind == ExpectKind.ABSENT:
        return value is None
    if expect.kind == ExpectKind.VERSION:
        return version == expect.version
    return value == expect.value


def _execute(
    writes: list[Write], live: Live, ts: int
) -> tuple[dict[bytes, bytes | None], list[bytes]]:
    """The final values of one transaction, and what its atomic operations tell, in order."""
    view: dict[bytes, bytes | None] = {key: value for key, (_, value) in live.items()}
    touched: dict[bytes, None] = {}
    stamped: dict[bytes, bytes] = {}
    told: list[bytes] = []
    for write in writes:
        key, value = write.key, write.value
        before = view.get(key)
        stamp = ts.to_bytes(8, "big") + value[:2]
        if write.kind == WriteKind.DELETE_RANGE:
            for inside in [k for k, v in view.items() if key <= k < value and v is not None]:
                view[inside] = None
                touched[inside] = None
            continue
        if write.kind == WriteKind.STAMPED_KEY:
            stamped[key + stamp] = value[2:]  # nothing of its own transaction can name it
            continue
        if write.kind == WriteKind.STAMPED_VALUE:
            view[key] = value[2:]  # until the end
            stamped[key] = value[2:] + stamp
        elif write.kind == WriteKind.PUT:
            view[key] = value
        elif write.kind == WriteKind.DELETE:
            view[key] = None
        else:
            view[key], answer = _operate(write, before)
            told.append(answer)
            if view[key] == before and key not in touched:
                continue
        touched[key] = None
    final = {key: view[key] for key in touched}
    return {**final, **stamped}, told


def _operate(write: Write, before: bytes | None) -> tuple[bytes | None, bytes]:
    """An atomic operation, by the words of its description."""
    kind, value = write.kind, write.value
    if kind == WriteKind.COMPARE_CLEAR:
        return (None, b"\x01") if before == value else (before, b"")
    if kind == WriteKind.APPEND:
        longer = (before or b"") + value[4:]
        fits = len(longer) <= int.from_bytes(value[:4], "big")
        return (longer, b"\x01") if fits else (before, b"")
    number = int(value)
    if kind == WriteKind.ADD_ASCII:
        number += int(before or b"0")
    elif before is not None:
        number = (min if kind == WriteKind.MIN_ASCII else max)(number, int(before))
    result = b"%d" % number
    return result, result


__all__ = ["Attempt", "History", "Peek", "Snapshot", "SpanRead"]
