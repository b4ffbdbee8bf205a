"""Forged entries and answers for the observers of transactions: what a product with a mistake would write and tell."""

from __future__ import annotations

from kvstore.sim.observers.answers import Answers
from kvstore.sim.observers.oracle import Timestamps
from kvstore.sim.observers.report import Report
from kvstore.sim.observers.transactions import Kept, Place, Transactions
from txn import keycode
from txn.messages import Prepare, Reply, Request
from txn.mvcc import encode_latest
from txn.state import DecidedRow, OutboxRow, PreparedRow, TerminalRow, encode_row
from txn.types import Guard, Participant, PartStatus, Write, make_txn_id, point_end

BEGIN, LAST = 100, 199  # issued: all of these
ONE, TWO = make_txn_id(BEGIN, 1), make_txn_id(BEGIN, 2)
ANCHOR, OTHER = b"a", b"n"  # loci of a transaction over two ranges
PREPARED, FENCED, COMMITTED, ABORTED = (
    PartStatus.PREPARED,
    PartStatus.FENCED,
    PartStatus.COMMITTED,
    PartStatus.ABORTED,
)

Rows = dict[bytes, bytes | None]


class Ghost:
    """Entries and answers are told, one after the other; `told` names what was reported."""

    def __init__(self) -> None:
        self.told: list[str] = []
        report = Report(lambda text: self.told.append(text.partition(" is broken")[0]))
        self.oracle = Timestamps(report)
        self.oracle.found(BEGIN)
        self.oracle.bound_applied(1000)
        self.oracle.issued("n1", BEGIN + 1, LAST - BEGIN)
        self.oracle.handed_out = LAST
        self.transactions = Transactions(report, self.oracle)
        self.answers = Answers(report, self.transactions, lambda: self.oracle.handed_out)
        self.index = 0
        self.now = 0.0

    def apply(self, *rows: Rows, closed_ts: int = 0, collected: int = 0) -> None:
        """One entry that writes these rows. collected: the threshold and the horizon that it leaves."""
        self.index += 1
        merged: Rows = {}
        for each in rows:
            merged |= each
        kept = Kept(b"", b"", collected, collected) if collected else None
        self.transactions.applied(Place(2, self.index, "n1"), merged, closed_ts, self.now, kept)

    def answer(self, request: Request, reply: Reply) -> None:
        self.answers.told("n1", 2, b"", request, reply)

    def commit_over_two_ranges(self, ts: int = 120) -> None:
        self.apply(staged(ONE, min_ts=ts - 5))
        self.apply(prepared(ONE, OTHER, ts))
        self.apply(
            gone(ONE, ANCHOR),
            decided(ONE, ANCHOR, COMMITTED, ts),
            version(ANCHOR, ts, ONE),
            ended(ONE, ts),
            outbox(ONE, OTHER, ts),
        )
        self.apply(gone(ONE, OTHER), decided(ONE, OTHER, COMMITTED, ts), version(OTHER, ts, ONE))
        self.apply({keycode.outbox_row(ANCHOR, ONE, OTHER): None})


def version(key: bytes, ts: int, txn_id: bytes, value: bytes | None = b"v") -> Rows:
    return {keycode.latest_row(key): encode_latest(ts, txn_id, value)}


def prepared(
    txn_id: bytes,
    locus: bytes,
    min_ts: int,
    *keys: bytes,
    guards: tuple[Guard, ...] = (),
    participants: tuple[Participant, ...] = (),
) -> Rows:
    written = list(keys or (locus,))
    row = PreparedRow(
        ANCHOR, min_ts, BEGIN, written, [b"v"] * len(written), list(guards), list(participants)
    )
    return {keycode.part_row(keycode.PREPARED, locus, txn_id): encode_row(row)}


def gone(txn_id: bytes, locus: bytes) -> Rows:
    return {keycode.part_row(keycode.PREPARED, locus, txn_id): None}


def decided(txn_id: bytes, locus: bytes, status: int, ts: int = 0) -> Rows:
    row = DecidedRow(status, ts, ANCHOR)
    return {keycode.part_row(keycode.DECIDED, locus, txn_id): encode_row(row)}


def staged(txn_id: bytes, *loci: bytes, min_ts: int = 110) -> Rows:
    """The anchor's part, which is the record."""
    participants = tuple(
        Participant(each, each, point_end(each)) for each in loci or (ANCHOR, OTHER)
    )
    return prepared(txn_id, ANCHOR, min_ts, participants=participants)


def ended(txn_id: bytes, ts: int) -> Rows:
    return {
        keycode.part_row(keycode.TERMINAL, ANCHOR, txn_id): encode_row(TerminalRow(ts)),
    }


def outbox(txn_id: bytes, locus: bytes, ts: int) -> Rows:
    row = OutboxRow(Participant(locus, locus, point_end(locus)), ts)
    return {keycode.outbox_row(ANCHOR, txn_id, locus): encode_row(row)}


def prepare(txn_id: bytes, locus: bytes = ANCHOR, value: bytes = b"v") -> Prepare:
    return Prepare(1, 2, 1, txn_id, locus, ANCHOR, [Write(0, locus, value)])
