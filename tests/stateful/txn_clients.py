"""Scripted clients of the simulated cluster: they read at one timestamp, prepare, decide, tell, and may crash at any step.

A client is a generator that yields what it waits for. Half of the commits are driven by the product's coordinator, half by
a script that was written from the protocol alone: a second opinion.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import msgspec

from tests.stateful.txn_history import Attempt, Peek, Snapshot, SpanRead
from tests.stateful.txn_lockers import Call, Wait, locking, unlocking
from tests.stateful.txn_ranges import VERSION, Group, Violation
from txn.coordinator import Coordinator, Part, State, with_fast_guards
from txn.messages import (
    Failure,
    Finalize,
    Outcome,
    PrepareReply,
    Read,
    ReadReply,
    Reply,
    Request,
    Resolve,
    Scan,
    ScanReply,
    TxnReply,
)
from txn.stamps import STAMP_BYTES
from txn.types import (
    Expect,
    ExpectKind,
    FenceReason,
    Guard,
    Participant,
    PartStatus,
    TxnStatus,
    Write,
    WriteKind,
    begin_ts_of,
    make_txn_id,
    point_end,
)

if TYPE_CHECKING:
    from tests.stateful.txn_harness import World

ATTEMPTS_MAX = 5
REFUSED = (PartStatus.FENCED, PartStatus.ABORTED)
FINAL = (TxnStatus.COMMITTED, TxnStatus.ABORTED)


Script = Generator[Wait, Any, None]


class Share:
    """One range's part of a transaction, while it is being cut."""

    def __init__(self) -> None:
        self.writes: list[Write] = []
        self.expects: list[Expect] = []
        self.guards: list[Guard] = []

    def locus(self) -> bytes:
        for write in self.writes:
            if write.kind != WriteKind.DELETE_RANGE:
                return write.key
        if self.writes:
            return self.writes[0].key
        return self.expects[0].key if self.expects else self.guards[0].start

    def participant(self, locus: bytes) -> Participant:
        low = [write.key for write in self.writes] + [guard.start for guard in self.guards]
        high = [_end_of(write) for write in self.writes] + [guard.end for guard in self.guards]
        low += [expect.key for expect in self.expects]
        high += [point_end(expect.key) for expect in self.expects]
        return Participant(locus, min(low), max(high))


class Client:
    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.rng = world.rng
        self.number = number
        self.finished = False
        self.dead = False
        self._wait_number = 0
        self._values = 0
        self._script = self._run()

    # -- the driver

    def start(self) -> None:
        self._advance(None)

    def _advance(self, answer: Any) -> None:
        self._wait_number += 1
        try:
            wait = next(self._script) if answer is None else self._script.send(answer)
        except StopIteration:
            self.finished = True
            return
        world = self.world
        calls = list(enumerate(wait.calls))
        if self.rng.random() < world.chance(world.profile.p_crash):
            world.probe("a client crashed")
            self.dead = self.finished = True
            calls = [call for call in calls if self.rng.random() < 0.5]
        if wait.pause_s:
            world.after(wait.pause_s, lambda: self._advance(0))
            return
        if not wait.calls:
            self._ask_oracle(self._wait_number)
            return
        answers: list[Reply | None] = [None] * len(wait.calls)
        for slot, call in calls:
            self._send(call, self._collect(self._wait_number, wait, answers, slot))

    def _ask_oracle(self, number: int) -> None:
        def answered(first: int, read_ts: int) -> None:
            if self.dead or number != self._wait_number:
                return
            if first < 0:
                self._ask_oracle(number)
            else:
                self._advance(read_ts)

        self.world.ask_oracle(0, answered)

    def _collect(
        self, number: int, wait: Wait, answers: list[Reply | None], slot: int
    ) -> Callable[[Reply], None]:
        def on_answer(reply: Reply) -> None:
            if self.dead or number != self._wait_number:
                return
            answers[slot] = reply
            decides = isinstance(reply, PrepareReply) and reply.status != PartStatus.PREPARED
            if None not in answers or (wait.first_decides and decides):
                self._advance(answers)

        return on_answer

    def _send(self, call: Call, then: Callable[[Reply], None]) -> None:
        tries = call.tries

        def on_reply(reply: Reply) -> None:
            nonlocal tries
            if not isinstance(reply, Failure):
                then(reply)
                return
            if reply.code in ("deadlock", "transaction_closed"):
                then(reply)
                return
            if reply.code == "invalid_argument":
                raise AssertionError(f"{call.request} was refused: {reply.message}")
            tries -= 1
            if tries <= 0:
                then(reply)
            elif not self.dead:
                again = self.world.rng.uniform(0.001, 0.02)
                self.world.after(again, lambda: self.world.call(call.key, call.request, on_reply))

        self.world.call(call.key, call.request, on_reply)

    # -- the script

    def _run(self) -> Script:
        rng, world = self.rng, self.world
        read_only = rng.random() < 0.25
        plain = not read_only and rng.random() < 0.2
        spans = [] if plain else self._plan_reads(read_only)
        writes = [] if read_only else self._plan_one() if plain else self._plan_writes()
        if world.fast_rng.random() < 0.4 and not any(
            write.kind == WriteKind.STAMPED_KEY for write in writes
        ):  # then what is read elsewhere can be guarded fast
            writes = [
                write
                for write in writes
                if world.group_of(write.key) is world.group_of(writes[0].key)
            ]
        guarded = rng.random() < 0.85
        age = 0
        for _ in range(1 if read_only else rng.randint(1, ATTEMPTS_MAX)):
            begun = world.instant()
            seen_ts = world.oracle_last
            reads: list[SpanRead] = []
            read_ts = 0
            if spans:
                read_ts = yield from self._read(spans, reads)
                if not read_ts:
                    return
                world.history.snapshots.append(Snapshot(begun, world.instant(), read_ts, reads))
            if not writes:
                return
            begin_ts = read_ts or max(1, seen_ts - rng.randint(0, 6))
            txn_id = make_txn_id(begin_ts, rng.getrandbits(64))
            age = age or begin_ts_of(txn_id)
            expects = [] if plain else self._plan_expects(reads)
            attempt = Attempt(txn_id, begun, read_ts, reads, guarded, writes, expects)
            if world.lock_rng.random() < world.profile.p_lock:
                locked = yield from locking(self, attempt, age)
                if not locked:
                    continue
            reason = yield from self._commit(attempt, age)
            if attempt.lock_owner and attempt.acked <= 0:
                yield from unlocking(self, attempt)
            if attempt.acked != 0 or reason not in (FenceReason.CONFLICT, FenceReason.RECOVERY):
                return
            world.probe("a client tried again under a new id")
            yield Wait([], pause_s=rng.choice([0.002, 0.1, 0.6]))

    def _plan_reads(self, read_only: bool) -> list[Read | Scan]:
        rng, world = self.rng, self.world
        if not read_only and rng.random() < 0.35:
            return []
        requests: list[Read | Scan] = []
        for _ in range(rng.randint(1, 3)):
            group = rng.choice(world.groups)
            keys = world.keys_of[group.number]
            if rng.random() < 0.3:
                start = rng.choice([group.start, rng.choice(keys)])
                end = rng.choice([group.end, group.end, point_end(max(keys))])
                if not end or start < end:
                    rows_max, reverse = rng.choice([1, 2, 9]), rng.random() < 0.4
                    keys_only = rng.random() < 0.2
                    requests.append(
                        Scan(0, 0, 0, 0, start, end, rows_max, 1 << 20, reverse, keys_only)
                    )
                    continue
            wanted = rng.sample(keys, rng.randint(1, 2))
            stamped = [key for key in sorted(world.checker.versions) if len(key) > STAMP_BYTES]
            stamped = [key for key in stamped if group.owns(key)]
            if stamped and rng.random() < 0.3:
                wanted.append(rng.choice(stamped))
            requests.append(Read(0, 0, 1, 0, wanted))
        return requests

    def _plan_one(self) -> list[Write]:
        """One key, blindly: what most writers want, and what has a path of its own."""
        key = self.rng.choice(self.world.keys_of[self.rng.choice(self.world.groups).number][:-1])
        self._values += 1
        value = b"v%d.%d" % (self.number, self._values)
        return [
            Write(WriteKind.PUT, key, value)
            if self.rng.random() < 0.8
            else Write(WriteKind.DELETE, key)
        ]

    def _plan_writes(self) -> list[Write]:
        rng, world = self.rng, self.world
        groups = rng.sample(world.groups, rng.choice([1, 1, 2, 2, 3]))
        writes: list[Write] = []
        for _ in range(rng.randint(len(groups), 4)):
            keys = world.keys_of[rng.choice(groups).number]
            counter = keys[-1]
            kind = rng.random()
            if kind < 0.2:
                writes.append(Write(WriteKind.ADD_ASCII, counter, b"%d" % rng.randint(-3, 9)))
            elif kind < 0.25:
                writes.append(Write(WriteKind.PUT, counter, rng.choice([b"100", b"7", b"none"])))
            elif kind < 0.35:
                start, end = sorted(rng.sample(keys, 2))
                writes.append(Write(WriteKind.DELETE_RANGE, start, end))
            elif kind < 0.45:
                writes.append(Write(WriteKind.DELETE, rng.choice(keys)))
            elif kind < 0.6:
                writes.append(self._plan_atomic(keys))
            elif kind < 0.75:
                writes.append(self._plan_stamped(keys, len(writes)))
            else:
                self._values += 1
                value = b"v%d.%d" % (self.number, self._values)
                writes.append(Write(WriteKind.PUT, rng.choice(keys[:-1]), value))
        return writes

    def _plan_atomic(self, keys: list[bytes]) -> Write:
        """One that often changes nothing."""
        rng = self.rng
        kind = rng.choice(
            [WriteKind.MIN_ASCII, WriteKind.MAX_ASCII, WriteKind.APPEND, WriteKind.COMPARE_CLEAR]
        )
        if kind in (WriteKind.MIN_ASCII, WriteKind.MAX_ASCII):
            return Write(kind, keys[-1], b"%d" % rng.randint(-3, 9))
        key = rng.choice(keys[:-1])
        chain = self.world.checker.versions.get(key)
        newest = chain[-1].value if chain else None
        if kind == WriteKind.APPEND:
            return Write(kind, key, rng.choice([4, 8, 99]).to_bytes(4, "big") + b"+")
        return Write(kind, key, newest if newest is not None and rng.random() < 0.8 else b"v0.0")

    def _plan_stamped(self, keys: list[bytes], number: int) -> Write:
        self._values += 1
        value = number.to_bytes(2, "big") + b"s%d.%d" % (self.number, self._values)
        if self.rng.random() < 0.3:
            return Write(WriteKind.STAMPED_VALUE, self.rng.choice(keys[:-1]), value)
        return Write(WriteKind.STAMPED_KEY, self.rng.choice([keys[0], keys[-2]]), value)

    def _plan_expects(self, reads: list[SpanRead]) -> list[Expect]:
        rng, world = self.rng, self.world
        if rng.random() < 0.5:
            return []
        seen = {key: entry for span in reads for key, entry in span.rows.items()}
        key = rng.choice(world.keys_of[rng.choice(world.groups).number][:-1])
        if seen and rng.random() < 0.7:
            key = rng.choice(sorted(seen))
        version, value = seen.get(key, (0, None))
        if not version:
            if rng.random() < 0.5:
                return [Expect(ExpectKind.ABSENT, key)]
            return [Expect(ExpectKind.VERSION, key, 0)]
        if value is not None and rng.random() < 0.3:
            return [Expect(ExpectKind.VALUE, key, 0, value)]
        return [Expect(ExpectKind.VERSION, key, version)]

    def _read(
        self, requests: list[Read | Scan], reads: list[SpanRead]
    ) -> Generator[Wait, Any, int]:
        """All reads at one timestamp; returns it, or 0 if they failed."""
        rng = self.rng
        read_ts = 0
        if rng.random() < 0.5:
            read_ts = yield Wait([])
        left = list(requests)
        while left:
            count = len(left) if read_ts and rng.random() < 0.5 else 1
            batch, left = left[:count], left[count:]
            asked = [self._at(request, read_ts) for request in batch]
            answers = yield Wait([Call(_key_of(request), request, 8) for request in asked])
            for request, reply in zip(asked, answers, strict=True):
                if isinstance(reply, Failure):
                    return 0
                read_ts = read_ts or reply.at
                if reply.at != read_ts:
                    raise Violation(f"asked for {read_ts}, answered for {reply.at}")
                reads += self._spans_read(request, reply)
        return read_ts

    def _at(self, request: Read | Scan, read_ts: int) -> Read | Scan:
        if isinstance(request, Read):
            return Read(0, 0, 1, read_ts, request.keys)
        return Scan(0, 0, 0, read_ts, *[getattr(request, f) for f in request.__struct_fields__[4:]])

    def _spans_read(self, request: Read | Scan, reply: ReadReply | ScanReply) -> list[SpanRead]:
        if isinstance(reply, ReadReply):
            assert isinstance(request, Read)
            return [
                SpanRead(key, point_end(key), {key: (version, value)} if version else {})
                for key, version, value in zip(
                    request.keys, reply.versions, reply.values, strict=True
                )
            ]
        assert isinstance(request, Scan)
        if request.keys_only:
            return []  # without values there is nothing to replay; the checker saw it
        end = request.end or b"\xff"
        low, high = (
            (request.start, end)
            if reply.done
            else (reply.covered_to, end)
            if request.reverse
            else (request.start, reply.covered_to)
        )
        rows = {
            key: (version, value)
            for key, version, value in zip(reply.keys, reply.versions, reply.values, strict=True)
        }
        return [SpanRead(low, high, dict(rows))]

    # -- commit

    def _cut(self, attempt: Attempt) -> dict[int, Share]:
        """By range; the anchor's first."""
        shares: dict[int, Share] = {}

        def share(key: bytes) -> Share:
            return shares.setdefault(self.world.group_of(key).number, Share())

        for write in attempt.writes:
            share(write.key).writes.append(write)
        for expect in attempt.expects:
            share(expect.key).expects.append(expect)
        for span, at in attempt.locked:
            share(span.start).guards.append(Guard(span.start, span.end, at))
        if attempt.guarded:
            for span in attempt.reads:
                group: Group = self.world.group_of(span.start)
                end = group.end if not group.owns(span.end) and group.end else span.end
                share(span.start).guards.append(Guard(span.start, end, attempt.read_ts))
        return shares

    def _commit(self, attempt: Attempt, age: int) -> Generator[Wait, Any, int]:
        """One attempt; returns the reason of a refusal."""
        shares = self._cut(attempt)
        parts = [
            Part(share.participant(share.locus()), share.writes, share.expects, share.guards)
            for share in shares.values()
        ]
        if not attempt.lock_owner and self.world.fast_rng.random() < 0.7:
            parts = with_fast_guards(parts)
        self.world.history.attempts.append(attempt)
        self.world.anchors[attempt.txn_id] = parts[0].participant.locus
        coordinator = Coordinator(attempt.txn_id, parts, age=age, lock_owner=attempt.lock_owner)
        calls = [
            Call(
                prepare.locus,
                msgspec.structs.replace(prepare, version=self.rng.choice([0, VERSION])),
                self.rng.randint(1, 5),
            )
            for prepare in coordinator.start()
        ]
        answers = yield Wait(calls, first_decides=True)
        self._note(attempt, answers)
        if self.rng.random() < 0.5:
            reason = yield from self._coordinate(attempt, coordinator, answers)
        else:
            reason = yield from self._script_commit(attempt, parts, answers)
        return reason

    def _note(self, attempt: Attempt, answers: list[Reply | None]) -> None:
        """What answers show besides the outcome."""
        for reply in answers:
            if not isinstance(reply, PrepareReply):
                continue
            if reply.status == PartStatus.COMMITTED and reply.results is not None:
                attempt.results = reply.results
            elif reply.reason == FenceReason.COMPARE_FAILED:
                peek = Peek(reply.key, reply.other_version, attempt.begun)
                self.world.history.peeks.append(peek)

    def _coordinate(
        self, attempt: Attempt, coordinator: Coordinator, answers: list[Reply | None]
    ) -> Generator[Wait, Any, int]:
        """By the product's coordinator."""
        effects: list[Request] = []
        for slot, reply in enumerate(answers):
            if isinstance(reply, PrepareReply):
                effects += coordinator.on_prepare(slot, reply)
            elif reply is not None:
                effects += coordinator.on_part_lost(slot)
        anchor_key = coordinator.anchor_key
        while coordinator.state is State.ASKING:
            outcome = Outcome(0, 0, 0, attempt.txn_id, anchor_key)
            (reply,) = yield Wait([Call(anchor_key, outcome, 12)])
            if isinstance(reply, TxnReply):
                effects += coordinator.on_outcome(reply)
            else:
                effects += coordinator.on_time_out()
        if coordinator.state is not State.UNKNOWN:
            self._acknowledge(attempt, coordinator.commit_ts)
        calls = [
            Call(effect.anchor_key if isinstance(effect, Finalize) else effect.locus, effect, 2)
            for effect in effects
            if isinstance(effect, (Finalize, Resolve))
        ]
        if calls and self.rng.random() < 0.8:
            yield Wait(calls)
        refusal = coordinator.refusal
        return refusal.reason if refusal is not None else FenceReason.NONE

    def _script_commit(
        self, attempt: Attempt, parts: list[Part], answers: list[Reply | None]
    ) -> Generator[Wait, Any, int]:
        txn_id, anchor_key = attempt.txn_id, parts[0].participant.locus
        reason = self._decide(attempt, answers)
        if attempt.acked < 0:
            (reply,) = yield Wait([Call(anchor_key, Outcome(0, 0, 0, txn_id, anchor_key), 12)])
            if isinstance(reply, TxnReply) and reply.status in FINAL:
                self.world.probe("a client learned its outcome by asking")
                self._acknowledge(attempt, reply.ts if reply.status == TxnStatus.COMMITTED else 0)
        if len(parts) > 1 and attempt.acked >= 0 and self.rng.random() < 0.8:
            commit_ts = attempt.acked
            told = [Call(anchor_key, Finalize(0, 0, 0, txn_id, anchor_key, commit_ts), 2)]
            for locus, low, high in [
                (part.participant.locus, part.participant.start, part.participant.end)
                for part in parts[1:]
            ]:
                hint = Resolve(0, 0, 0, txn_id, anchor_key, locus, low, high, commit_ts)
                told.append(Call(locus, hint, 2))
            yield Wait(told)
        return reason

    def _decide(self, attempt: Attempt, answers: list[Reply | None]) -> int:
        """Acknowledge if the parts' answers decide."""
        replies = [reply for reply in answers if isinstance(reply, PrepareReply)]
        for reply in replies:
            if reply.status == PartStatus.COMMITTED:
                self._acknowledge(attempt, reply.ts)
                return FenceReason.NONE
            if reply.status in REFUSED:
                self._acknowledge(attempt, 0)
                return reply.reason
        if all(
            isinstance(reply, PrepareReply) and reply.status == PartStatus.PREPARED
            for reply in answers
        ):
            self._acknowledge(attempt, max(reply.ts for reply in replies))
        return FenceReason.NONE

    def _acknowledge(self, attempt: Attempt, commit_ts: int) -> None:
        attempt.acked, attempt.acked_at = commit_ts, self.world.instant()
        self.world.checker.outcome(attempt.txn_id, commit_ts)
        self.world.probe("committed" if commit_ts else "aborted")


def _end_of(write: Write) -> bytes:
    if write.kind == WriteKind.STAMPED_KEY:
        return write.key + b"\xff" * STAMP_BYTES + b"\x00"
    return write.value if write.kind == WriteKind.DELETE_RANGE else point_end(write.key)


def _key_of(request: Read | Scan) -> bytes:
    return request.keys[0] if isinstance(request, Read) else request.start
