"""Claims: what no client of ours sends is refused before it comes into the log, and stops neither leader nor replica."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from tests.unit.txn.txn_driver import Asked, Range, put, settled, txn_id
from txn import atomics, stamps
from txn.commands import Decide
from txn.deadlocks import EDGES_MAX
from txn.locks import BLOCKERS_MAX
from txn.messages import (
    LOCK_POLL_S,
    NAMED_MAX,
    PARTICIPANTS_MAX,
    READ_KEYS_MAX,
    Fence,
    Finalize,
    KeepLocks,
    LockEdge,
    LockPending,
    LockRead,
    LockWaits,
    Outcome,
    Prepare,
    QueryMode,
    QueryPart,
    QueryTxn,
    Read,
    Request,
    Resolve,
    Stale,
    Validate,
    Victims,
    fast,
)
from txn.types import (
    TIMESTAMP_MAX,
    Expect,
    ExpectKind,
    Guard,
    Participant,
    PartStatus,
    TxnStatus,
    Write,
    WriteKind,
    point_end,
)
from txn.values import BOUND_BYTES_MAX, KEY_BYTES_MAX, RANGE_ROWS_MAX, VALUE_BYTES_MAX


def participants(*loci: bytes) -> list[Participant]:
    return [Participant(locus, locus, point_end(locus)) for locus in loci]


def test_a_participant_is_named_once():
    place = Range()
    asked = place.anchor(1, put(b"a"), others=(b"a",))
    assert settled(place, asked).reply.code == "invalid_argument"


def test_a_record_that_names_its_anchor_twice_is_decided_once():
    place = Range()
    place.anchor(1, put(b"a"), others=(b"x",))
    place.settle()
    place.state.staged[txn_id(1)].participants.extend(participants(b"a"))
    place.apply([Decide(txn_id(1), b"a", 101)])
    assert place.state.terminal_of(place.rows, txn_id(1), b"a") == (TxnStatus.COMMITTED, 101)
    assert place.state.answer_of(place.rows, txn_id(1), b"a").status == PartStatus.COMMITTED


# -- a decision at a version that was never issued


def undecided(kind: str) -> Range:
    """A part of transaction 1 at b'a', prepared at 101: the anchor's, or one anchored elsewhere."""
    place = Range()
    if kind == "part":
        place.part(1, put(b"a"))
    else:
        place.anchor(1, put(b"a"), others=(b"x",))
    place.settle()
    return place


def decide(place: Range, kind: str, commit_ts: int) -> Asked:
    if kind == "finalize":
        return place.ask(Finalize(0, 0, 0, txn_id(1), b"a", commit_ts))
    return place.ask(Resolve(0, 0, 0, txn_id(1), b"zz", b"a", b"a", b"b", commit_ts, True))


KINDS = ["part", "anchor", "finalize"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("commit_ts", [102, TIMESTAMP_MAX])
def test_a_decision_at_a_version_that_was_never_issued_is_refused(kind, commit_ts):
    place = undecided(kind)
    asked = settled(place, decide(place, kind, commit_ts))
    assert asked.reply.code == "invalid_argument"
    assert place.state.intents[b"a"].txn_id == txn_id(1), "it stays undecided"
    assert settled(place, decide(place, kind, 101)).reply
    assert settled(place, place.prepare(2, put(b"a"), begin_ts=101)).reply.ts == 102


@pytest.mark.parametrize("kind", KINDS)
def test_a_decision_at_a_version_of_another_range_waits_until_it_is_known_to_be_issued(kind):
    place = undecided(kind)
    place.clock = 200  # others were given timestamps
    asked = decide(place, kind, 150)
    assert asked.open
    assert not place.take()
    place.settle()
    assert place.state.answer_of(place.rows, txn_id(1), b"a").ts == 150
    assert asked.reply


@pytest.mark.parametrize("kind", KINDS)
def test_a_decision_at_a_version_that_is_known_to_be_issued_asks_nobody(kind):
    place = undecided(kind)
    decide(place, kind, 101)
    assert not place.evaluator.await_read
    assert len(place.take()) == 1


def test_a_decision_that_the_oracle_says_nothing_about_is_given_up():
    place = undecided("finalize")
    asked = decide(place, "finalize", 150)
    place.pass_time(place.limits.read_wait_s + 1.0)
    assert asked.reply.code == "unavailable"
    assert not place.evaluator.untimed


# -- two records of one transaction


def test_a_transaction_has_one_anchor():
    place = undecided("anchor")
    second = place.prepare(1, put(b"b"), participants=participants(b"b", b"a"), one_range=False)
    assert settled(place, second).reply.code == "invalid_argument"
    assert place.state.staged[txn_id(1)].anchor_key == b"a"
    assert settled(place, place.anchor(1, put(b"a"), others=(b"x",))).reply.ts == 101
    assert settled(place, place.finalize(1, b"a", 101)).reply.status == TxnStatus.COMMITTED
    assert not place.state.staged


def test_a_decision_names_the_anchor_under_which_the_transaction_is_staged():
    place = undecided("anchor")
    asked = settled(place, place.finalize(1, b"b", 101))
    assert asked.reply.code == "invalid_argument"
    assert place.state.terminal_of(place.rows, txn_id(1), b"a") == (TxnStatus.STAGED, 0)
    assert not place.state.outbox


# -- numbers that are none, and ids that are nobody's


@pytest.mark.parametrize("wait_s", [math.nan, -1.0, -math.inf])
def test_a_wait_for_a_lock_that_is_no_number_of_seconds_is_refused(wait_s):
    place = Range()
    place.ask(LockRead(0, 0, 0, b"k", txn_id(1), 1, wait_s=1.0))
    asked = settled(place, place.ask(LockRead(0, 0, 0, b"k", txn_id(2), 1, wait_s=wait_s)))
    assert asked.reply.code == "invalid_argument"


def test_an_endless_wait_for_a_lock_ends_with_the_poll():
    place = Range()
    place.ask(LockRead(0, 0, 0, b"k", txn_id(1), 1, wait_s=1.0))
    asked = place.ask(LockRead(0, 0, 0, b"k", txn_id(2), 1, wait_s=math.inf))
    place.pass_time(LOCK_POLL_S)
    assert isinstance(asked.reply, LockPending)


@pytest.mark.parametrize("identity", [b"", b"short", b"x" * 17, b"\xff" * 8 + bytes(8)])
@pytest.mark.parametrize(
    "make",
    [
        lambda identity: Prepare(0, 0, 0, identity, b"a", b"a", [put(b"a")]),
        lambda identity: Finalize(0, 0, 0, identity, b"a", 0),
        lambda identity: Resolve(0, 0, 0, identity, b"a", b"a", b"a", b"b", 0),
        lambda identity: Fence(0, 0, 0, identity, b"a", b"a"),
        lambda identity: QueryTxn(0, 0, 0, identity, b"a", QueryMode.ORPHAN),
        lambda identity: QueryPart(0, 0, 0, identity, b"a", 50),
        lambda identity: Outcome(0, 0, 0, identity, b"a"),
    ],
)
def test_an_id_that_no_transaction_has_is_refused(make, identity):
    place = Range()
    assert place.ask(make(identity)).reply.code == "invalid_argument"
    assert not place.evaluator.latches.held()


# -- more than a turn is for


def test_a_read_names_no_more_keys_than_a_client_does():
    place = Range()
    keys = [b"%04d" % number for number in range(READ_KEYS_MAX + 1)]
    assert place.read(*keys, at=50).reply.code == "invalid_argument"
    assert place.read(*keys[:-1], at=50).reply.at == 50


encode = msgspec.msgpack.encode
decode: Any = msgspec.msgpack.Decoder(list[Request]).decode
ID = txn_id(1)
GUARD = Guard(b"a", b"b", 1)
MANY: Any = {
    "keys": lambda count: Read(0, 0, 0, 0, [b""] * count),
    "ranges": lambda count: Read(0, 0, 0, 0, [], Stale(ranges=[1] * count)),
    "writes": lambda count: Prepare(0, 0, 0, ID, b"a", b"a", [put(b"a")] * count),
    "expects": lambda count: Prepare(0, 0, 0, ID, b"a", b"a", [], [Expect(0, b"a")] * count),
    "guards": lambda count: Prepare(0, 0, 0, ID, b"a", b"a", [], [], [GUARD] * count),
    "participants": lambda count: Prepare(
        0, 0, 0, ID, b"a", b"a", [], [], [], participants(b"a") * count
    ),
    "elsewhere": lambda count: Prepare(0, 0, 0, ID, b"a", b"a", [], elsewhere=[[]] * count),
    "guards elsewhere": lambda count: Prepare(
        0, 0, 0, ID, b"a", b"a", [], elsewhere=[[GUARD] * count]
    ),
    "validated": lambda count: Validate(0, 0, 0, 1, ID, 1, [GUARD] * count),
    "owners": lambda count: KeepLocks(0, 0, 0, b"a", [ID] * count),
    "edges": lambda count: LockWaits(
        0, 0, 0, b"a", 1, 1, 1, 0, [LockEdge(1, ID, 1, False, [])] * count
    ),
    "blockers": lambda count: LockWaits(
        0, 0, 0, b"a", 1, 1, 1, 0, [LockEdge(1, ID, 1, False, [ID] * count)]
    ),
}


@pytest.mark.parametrize("what", MANY)
def test_a_list_that_is_longer_than_any_client_makes_is_not_decoded(what):
    longest = MANY[what](NAMED_MAX)
    assert decode(encode([longest])) == [longest]
    with pytest.raises(msgspec.ValidationError, match=f"length <= {NAMED_MAX}"):
        decode(encode([MANY[what](NAMED_MAX + 1)]))


def test_a_part_has_no_more_conditions_than_rows():
    place = Range()
    expects = [Expect(ExpectKind.ABSENT, b"%04d" % number) for number in range(RANGE_ROWS_MAX)]
    assert place.prepare(1, put(b"a"), expects=expects).open
    more = place.prepare(2, put(b"b"), expects=[*expects, expects[0]])
    assert more.reply.code == "transaction_too_large"


def test_a_record_names_no_more_participants_than_a_transaction_has():
    place = Range()
    others = tuple(b"x%03d" % number for number in range(PARTICIPANTS_MAX))
    assert place.anchor(1, put(b"a"), others=others).reply.code == "invalid_argument"
    assert place.anchor(2, put(b"a"), others=others[:-1]).open


def test_spans_that_no_range_is_asked_about_are_not_walked():
    class Walked(list[Guard]):
        def __iter__(self) -> Any:
            raise AssertionError("walked")

    assert not fast([Walked([GUARD] * NAMED_MAX)])


@pytest.mark.parametrize(("edges", "blockers"), [(EDGES_MAX + 1, 0), (1, BLOCKERS_MAX + 1)])
def test_a_report_of_more_waits_than_a_leader_makes_is_refused(edges, blockers):
    place = Range()

    def report(number: int, edges: int, blockers: int) -> Any:
        each = LockEdge(1, ID, 1, False, [txn_id(2)] * blockers)
        return place.ask(LockWaits(0, 0, 0, b"a", 7, 1, number, 0, [each] * edges)).reply

    assert report(1, edges, blockers).code == "invalid_argument"
    assert isinstance(report(2, min(edges, EDGES_MAX), min(blockers, BLOCKERS_MAX)), Victims)


# -- sizes


def longest_key(kind: int, more: int) -> Write:
    if kind == WriteKind.STAMPED_KEY:
        return Write(
            kind, bytes(KEY_BYTES_MAX - stamps.STAMP_BYTES + more), stamps.stamped(0, b"v")
        )
    operand = atomics.appended(b"v", 10) if kind == WriteKind.APPEND else b"1"
    return Write(kind, bytes(KEY_BYTES_MAX + more), operand)


@pytest.mark.parametrize("kind", [kind for kind in WriteKind if kind != WriteKind.DELETE_RANGE])
def test_a_key_longer_than_any_client_sends_is_refused(kind):
    """It would be stored, and no client could name it any more: neither to read nor to delete it."""
    place = Range()
    assert place.prepare(1, longest_key(kind, 1)).reply.code == "key_too_large"
    assert place.prepare(2, longest_key(kind, 0)).open
    assert place.prepare(3, Write(kind, b""), locus=b"a").reply.code == "invalid_argument"


@pytest.mark.parametrize(
    "longest",
    [
        lambda more: put(b"a", bytes(VALUE_BYTES_MAX + more)),
        lambda more: Write(
            WriteKind.STAMPED_KEY, b"a", stamps.stamped(0, bytes(VALUE_BYTES_MAX + more))
        ),
        lambda more: Write(
            WriteKind.STAMPED_VALUE,
            b"a",
            stamps.stamped(0, bytes(VALUE_BYTES_MAX - stamps.STAMP_BYTES + more)),
        ),
        lambda more: Write(
            WriteKind.APPEND, b"a", atomics.appended(bytes(VALUE_BYTES_MAX + more), VALUE_BYTES_MAX)
        ),
        lambda more: Write(WriteKind.APPEND, b"a", atomics.appended(b"v", VALUE_BYTES_MAX + more)),
    ],
)
def test_a_value_longer_than_any_client_sends_is_refused(longest):
    place = Range()
    assert place.prepare(1, longest(1)).reply.code == "value_too_large"
    assert place.prepare(2, longest(0)).open


@pytest.mark.parametrize("which", ["start", "end"])
def test_a_bound_longer_than_any_client_sends_is_refused(which):
    def clear(size: int) -> Write:
        bound = b"b" * size
        bounds = (bound, b"c") if which == "start" else (b"a", bound)
        return Write(WriteKind.DELETE_RANGE, *bounds)

    place = Range()
    assert place.prepare(1, clear(BOUND_BYTES_MAX + 1)).reply.code == "key_too_large"
    assert place.prepare(2, clear(BOUND_BYTES_MAX)).open
