"""One range under test: a real evaluator over real state, driven by hand. No Raft: what is proposed is committed on demand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.stateful.txn_ranges import MemoryRows
from txn.apply import Overlay, apply_batch
from txn.commands import Batch, Command, decode_batch, encode_batch
from txn.evaluate import Evaluator, Limits
from txn.latches import Pending
from txn.messages import (
    Fence,
    Finalize,
    Outcome,
    Prepare,
    QueryPart,
    QueryTxn,
    Read,
    Reply,
    Request,
    Resolve,
    Scan,
)
from txn.state import Answer, RangeRow, RangeState
from txn.types import Participant, Write, WriteKind, make_txn_id, point_end


def txn_id(number: int, begin_ts: int = 1) -> bytes:
    return make_txn_id(begin_ts, number)


def put(key: bytes, value: bytes = b"v") -> Write:
    return Write(WriteKind.PUT, key, value)


class Asked:
    """One request and what was answered."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.replies: list[Reply] = []
        self.confirm = False

    @property
    def reply(self) -> Any:
        assert len(self.replies) == 1, self.replies
        return self.replies[0]

    @property
    def open(self) -> bool:
        return not self.replies


class Pulled:
    """Counts the bytes of rows that are read from a range's store from now on."""

    def __init__(self, rows: MemoryRows) -> None:
        self.bytes = 0
        self._get, self._scan = rows.get, rows.scan
        rows.get, rows.scan = self._counted_get, self._counted_scan  # type: ignore[method-assign]

    def taken(self) -> int:
        """Since the last call."""
        taken, self.bytes = self.bytes, 0
        return taken

    def _counted_get(self, key: bytes, /) -> bytes | None:
        data = self._get(key)
        self.bytes += len(data or b"")
        return data

    def _counted_scan(
        self, start: bytes, end: bytes | None, *, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        for key, data in self._scan(start, end, reverse=reverse):
            self.bytes += len(data)
            yield key, data


class Range:
    """[start, end), led in `term`; timestamps come from `clock` on."""

    def __init__(
        self,
        start: bytes = b"",
        end: bytes = b"",
        *,
        clock: int = 100,
        limits: Limits | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.rows = MemoryRows()
        self.state = RangeState(RangeRow(7, start, end, 1, 1, 0, 0, newest=0))
        self.clock = clock  # the last timestamp issued
        self.now = 0.0
        self.term = 0
        self.calls: list[tuple[bytes, Any, int]] = []
        self.log: list[Command] = []
        self.evaluator: Evaluator
        self.lead()

    # -- output of the evaluator

    def reply(self, origin: Any, reply: Reply, confirm: bool) -> None:
        origin.replies.append(reply)
        origin.confirm = confirm

    def call(self, key: bytes, request: Request, call_id: int) -> None:
        self.calls.append((key, request, call_id))

    # -- leadership

    def lead(self) -> None:
        """A new term, on rows read anew; what was not committed is lost."""
        if self.term:
            self.evaluator.stop()
        self.term += 1
        self.calls = []
        self.state = RangeState(self.state.row)
        self.state.load(self.rows)
        self.evaluator = Evaluator(self.state, self.rows, self, self.limits, self.term)
        self.evaluator.start(self.now)

    # -- requests

    def ask(self, request: Request) -> Asked:
        asked = Asked(request)
        self.evaluator.step(request, asked, self.now)
        return asked

    def prepare(self, number: int, *writes: Write, **fields: Any) -> Asked:
        """A one-range transaction; with fields also a part of a larger one. Its id begins at `begin_ts`."""
        identity = txn_id(number, fields.pop("begin_ts", 1))
        locus = fields.pop("locus", writes[0].key if writes else b"locus")
        anchor_key = fields.pop("anchor_key", locus)
        return self.ask(Prepare(0, 0, 0, identity, locus, anchor_key, list(writes), **fields))

    def part(self, number: int, *writes: Write, **fields: Any) -> Asked:
        """One part of a transaction that is anchored in another range, at b'zz'."""
        return self.prepare(number, *writes, anchor_key=b"zz", one_range=False, **fields)

    def anchor(
        self, number: int, *writes: Write, others: tuple[bytes, ...], **fields: Any
    ) -> Asked:
        """The anchor's part of a transaction with parts at `others`."""
        keys = (writes[0].key, *others)
        everybody = [Participant(key, key, point_end(key)) for key in keys]
        return self.prepare(number, *writes, participants=everybody, one_range=False, **fields)

    def read(self, *keys: bytes, at: int = 0) -> Asked:
        return self.ask(Read(0, 0, 0, at, list(keys)))

    def scan(self, start: bytes, end: bytes, at: int, **fields: Any) -> Asked:
        return self.ask(
            Scan(0, 0, 0, at, start, end, fields.pop("rows_max", 100), 1 << 20, **fields)
        )

    def fence(self, number: int, locus: bytes, **fields: Any) -> Asked:
        return self.ask(Fence(0, 0, 0, txn_id(number, **fields), locus, b"zz"))

    def resolve(self, number: int, locus: bytes, commit_ts: int, *, record: bool = False) -> Asked:
        self.know(commit_ts)
        end = point_end(locus)
        return self.ask(
            Resolve(0, 0, 0, txn_id(number), b"zz", locus, locus, end, commit_ts, record)
        )

    def finalize(self, number: int, anchor_key: bytes, commit_ts: int) -> Asked:
        self.know(commit_ts)
        return self.ask(Finalize(0, 0, 0, txn_id(number), anchor_key, commit_ts))

    def outcome(self, number: int, anchor_key: bytes) -> Asked:
        return self.ask(Outcome(0, 0, 0, txn_id(number), anchor_key))

    def query(self, number: int, anchor_key: bytes, mode: int, read_ts: int = 0) -> Asked:
        return self.ask(QueryTxn(0, 0, 0, txn_id(number), anchor_key, mode, read_ts))

    def query_part(self, number: int, locus: bytes, read_ts: int) -> Asked:
        return self.ask(QueryPart(0, 0, 0, txn_id(number), locus, read_ts))

    # -- the world's part

    def know(self, version: int) -> None:
        """It was issued, to whomever, and this leader has heard of it."""
        self.clock = max(self.clock, version)
        self.evaluator.issued = max(self.evaluator.issued, version)

    def stamp(self) -> None:
        """The oracle answers whatever is asked."""
        evaluator = self.evaluator
        pendings, evaluator.await_fresh = evaluator.await_fresh, []
        readers, evaluator.await_read = evaluator.await_read, []
        first = self.clock + 1
        self.clock += len(pendings)
        evaluator.give_timestamps(pendings, first, readers, self.clock, self.now)

    def take(self) -> list[Pending]:
        """What is proposed."""
        proposals, self.evaluator.proposals = self.evaluator.proposals, []
        return proposals

    def commit(self, proposals: list[Pending] | None = None) -> list[Command]:
        """Commit and apply what is proposed, as one entry, through its encoding."""
        pendings = self.take() if proposals is None else proposals
        commands = [pending.command for pending in pendings if pending.command is not None]
        answers = self.apply(commands)
        self.evaluator.applied(pendings, answers, self.now)
        self.run_again()
        return commands

    def apply(self, commands: list[Command]) -> list[Answer]:
        self.log += commands
        overlay = Overlay(self.rows)
        batch = decode_batch(encode_batch(Batch(self.evaluator.closing.promised, 1, commands)))
        answers = apply_batch(self.state, overlay, batch)
        self.rows.write(overlay.rows)
        return answers

    def settle(self) -> None:
        """Until nothing moves without an answer from elsewhere, or time."""
        evaluator = self.evaluator
        while (
            evaluator.proposals
            or evaluator.await_fresh
            or evaluator.await_read
            or evaluator.runnable
        ):
            self.stamp()
            self.commit()

    def run_again(self) -> None:
        """Whoever can go on does, and comes to rest."""
        self.evaluator.run_again(self.now)
        assert not self.evaluator.runnable, "somebody is evaluated again without end"

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.evaluator.tick(self.now)
        self.run_again()

    def answer(self, reply: Reply, number: int = 0) -> None:
        """Answer one of the calls to other ranges."""
        _, _, call_id = self.calls.pop(number)
        self.evaluator.recovery.on_reply(call_id, reply, self.now)
        self.run_again()


def settled(place: Range, asked: Asked) -> Asked:
    """Let everything happen that needs nobody else."""
    place.settle()
    return asked


def stored(place: Range, key: bytes, value: bytes = b"old") -> int:
    """Commit a value; returns its version."""
    version: int = settled(place, place.prepare(9000 + place.clock, put(key, value))).reply.ts
    return version
