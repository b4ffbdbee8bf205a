"""Claims A1 to A3 of apply: the first command about a part wins, a record ends once, one entry sees its own rows."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.stateful.txn_ranges import MemoryRows
from tests.unit.txn.txn_driver import Range, txn_id
from txn import keycode
from txn.apply import SCAN_BYTES, Overlay, apply_batch
from txn.commands import (
    AbortUnstaged,
    Batch,
    Command,
    Commit,
    Decide,
    FencePart,
    OracleBound,
    OutboxDone,
    PreparePart,
    ResolvePart,
    decode_batch,
    encode_batch,
)
from txn.mvcc import read_at
from txn.state import Answer
from txn.types import FenceReason, Guard, Participant, PartStatus, TxnStatus

T = txn_id(1)
OTHER = txn_id(2)


def prepare(min_ts: int = 50, *, staged: bool = False, locus: bytes = b"a") -> PreparePart:
    participants = [Participant(b"a", b"a", b"a\x00"), Participant(b"x", b"x", b"x\x00")]
    anchor_key = locus if staged else b"x"
    return PreparePart(
        T, locus, anchor_key, min_ts, 1, [locus], [b"v"], [], participants if staged else []
    )


def fence(reason: int = FenceReason.CONFLICT, locus: bytes = b"a") -> FencePart:
    return FencePart(T, locus, b"x", reason, b"k", OTHER, 9)


def resolve(commit_ts: int) -> ResolvePart:
    return ResolvePart(T, b"x", b"a", commit_ts, True)


def commit(
    commit_ts: int = 50, key: bytes = b"a", owner: bytes = T, value: bytes | None = b"v"
) -> Commit:
    return Commit(owner, key, commit_ts, [key], [value])


def one(place: Range, command: Command) -> Answer:
    (answer,) = place.apply([command])
    return answer


FENCED = Answer(PartStatus.FENCED, 0, FenceReason.CONFLICT, b"k", OTHER, 9)


@pytest.mark.parametrize(
    ("before", "command", "answer"),
    [
        ([], prepare(), Answer(PartStatus.PREPARED, 50)),
        ([], fence(), FENCED),
        ([], commit(), Answer(PartStatus.COMMITTED, 50)),
        ([], resolve(60), Answer(PartStatus.ABSENT)),
        ([prepare()], prepare(70), Answer(PartStatus.PREPARED, 50)),
        ([prepare()], fence(), Answer(PartStatus.PREPARED, 50)),
        ([prepare()], resolve(60), Answer(PartStatus.COMMITTED, 60)),
        ([prepare()], resolve(0), Answer(PartStatus.ABORTED)),
        ([fence()], prepare(), FENCED),
        ([fence()], commit(), FENCED),
        ([fence()], fence(FenceReason.RECOVERY), FENCED),
        ([fence()], resolve(0), FENCED),
        ([prepare(), resolve(60)], prepare(70), Answer(PartStatus.COMMITTED, 60)),
        ([prepare(), resolve(60)], fence(), Answer(PartStatus.COMMITTED, 60)),
        ([prepare(), resolve(60)], resolve(60), Answer(PartStatus.COMMITTED, 60)),
        ([prepare(), resolve(0)], prepare(70), Answer(PartStatus.ABORTED)),
        ([prepare(), resolve(0)], resolve(0), Answer(PartStatus.ABORTED)),
        ([commit()], commit(70), Answer(PartStatus.COMMITTED, 50)),
        ([commit()], fence(), Answer(PartStatus.COMMITTED, 50)),
        ([commit(), commit(60, owner=OTHER)], commit(70), Answer(PartStatus.COMMITTED, 50)),
        ([commit(), commit(60, owner=OTHER)], fence(), Answer(PartStatus.COMMITTED, 50)),
    ],
)
def test_the_first_command_about_a_part_wins_and_later_ones_are_told_what_stands(
    before, command, answer
):
    place = Range()
    place.apply(before)
    rows, parts = dict(place.rows.rows), dict(place.state.parts)
    assert one(place, command) == answer
    if before and not (isinstance(command, ResolvePart) and parts):
        assert dict(place.rows.rows) == rows, "what is decided does not change"


def test_an_abort_that_finds_nothing_fences_the_part():
    place = Range()
    assert one(place, resolve(0)).status == PartStatus.FENCED
    assert one(place, prepare()).status == PartStatus.FENCED


def test_two_commands_of_one_entry_see_each_others_rows():
    place = Range()
    place.apply([commit(10), commit(20, owner=OTHER, value=None), commit(30, owner=txn_id(3))])
    assert [read_at(place.rows, b"a", at) for at in (9, 10, 20, 30)] == [
        None,
        (10, T, b"v"),
        (20, OTHER, None),
        (30, txn_id(3), b"v"),
    ]


def test_versions_of_a_key_are_written_in_rising_order_or_not_at_all():
    place = Range()
    place.apply([commit(50)])
    with pytest.raises(AssertionError, match="M1"):
        place.apply([commit(50, owner=OTHER)])


def test_a_part_is_not_committed_below_its_min_ts():
    place = Range()
    place.apply([prepare(50)])
    with pytest.raises(AssertionError, match="I4"):
        place.apply([resolve(49)])


def test_a_commit_whose_locus_is_a_span_is_recorded_by_a_row():
    place = Range()
    command = Commit(T, b"a", 50, [b"ab"], [None], keep_status=True)
    assert one(place, command) == Answer(PartStatus.COMMITTED, 50)
    place.apply([commit(60, b"ab", OTHER)])
    assert one(place, command) == Answer(PartStatus.COMMITTED, 50)
    assert read_at(place.rows, b"ab", 99) == (60, OTHER, b"v")


# -- the anchor's record


def terminal(place: Range) -> tuple[int, int]:
    return place.state.terminal_of(place.rows, T, b"a")


@pytest.mark.parametrize(
    ("commit_ts", "status"), [(60, TxnStatus.COMMITTED), (0, TxnStatus.ABORTED)]
)
def test_a_decision_ends_the_record_resolves_the_own_part_and_posts_to_the_others(
    commit_ts, status
):
    place = Range()
    place.apply([prepare(staged=True)])
    assert terminal(place) == (TxnStatus.STAGED, 0)
    one(place, Decide(T, b"a", commit_ts))
    assert terminal(place) == (status, commit_ts)
    assert place.state.parts == {}
    assert [(row.participant.locus, row.commit_ts) for row in place.state.outbox.values()] == [
        (b"x", commit_ts)
    ]
    assert (read_at(place.rows, b"a", 99) is not None) == bool(commit_ts)


@pytest.mark.parametrize("later", [Decide(T, b"a", 70), Decide(T, b"a", 0), AbortUnstaged(T, b"a")])
def test_a_record_ends_once(later):
    place = Range()
    place.apply([prepare(staged=True), Decide(T, b"a", 60)])
    rows = dict(place.rows.rows)
    assert one(place, later) == Answer(PartStatus.COMMITTED, 60)
    assert dict(place.rows.rows) == rows


def test_nothing_known_the_anchor_fences_itself_and_aborts():
    place = Range()
    assert one(place, AbortUnstaged(T, b"a")) == Answer(PartStatus.ABORTED)
    assert terminal(place) == (TxnStatus.ABORTED, 0)
    assert one(place, prepare(staged=True)).status == PartStatus.FENCED
    assert one(place, commit()).status == PartStatus.FENCED
    assert place.state.staged == {}


def test_what_is_staged_is_not_aborted_for_being_unknown():
    place = Range()
    place.apply([prepare(staged=True)])
    assert one(place, AbortUnstaged(T, b"a")).status == PartStatus.PREPARED
    assert terminal(place) == (TxnStatus.STAGED, 0)


def test_what_one_entry_committed_is_not_aborted_for_being_unknown():
    place = Range()
    place.apply([commit(50)])
    assert one(place, AbortUnstaged(T, b"a")) == Answer(PartStatus.COMMITTED, 50)
    assert terminal(place) == (TxnStatus.ABSENT, 0)


def test_an_outbox_row_goes_once():
    place = Range()
    place.apply([prepare(staged=True), Decide(T, b"a", 60)])
    for _ in range(2):
        one(place, OutboxDone([(T, b"a", b"x")]))
        assert place.state.outbox == {}
    assert place.rows.get(keycode.outbox_row(b"a", T, b"x")) is None


def test_the_oracles_bound_only_rises():
    place = Range()
    place.apply([OracleBound(10), OracleBound(5)])
    assert place.state.oracle_hi == 10
    place.lead()
    assert place.state.oracle_hi == 10


# -- encoding, overlay


@pytest.mark.parametrize(
    "command",
    [
        commit(value=None),
        prepare(staged=True),
        PreparePart(T, b"a", b"x", 5, 1, [b"a"], [None], [Guard(b"a", b"b", 3)]),
        fence(),
        Decide(T, b"a", 60),
        resolve(60),
        AbortUnstaged(T, b"a"),
        OutboxDone([(T, b"a", b"x")]),
        OracleBound(1 << 62),
    ],
)
def test_a_command_decodes_to_itself(command):
    batch = Batch(3, 1, [command])
    assert decode_batch(encode_batch(batch)) == batch


def test_an_overlay_shows_its_rows_over_the_stored_ones():
    place = Range()
    place.rows.write({b"a": b"1", b"b": b"2", b"c": b"3"})
    overlay = Overlay(place.rows)
    overlay.put(b"b", b"new")
    overlay.put(b"bb", b"more")
    overlay.delete(b"c")
    overlay.put(b"d", b"outside")
    assert [overlay.get(key) for key in (b"a", b"b", b"c")] == [b"1", b"new", None]
    rows = [(b"a", b"1"), (b"b", b"new"), (b"bb", b"more")]
    assert list(overlay.scan(b"a", b"d")) == rows
    assert list(overlay.scan(b"a", b"d", reverse=True)) == rows[::-1]
    assert place.rows.get(b"b") == b"2"


class CountedRows(MemoryRows):
    """Counts the rows that a scan gives out."""

    def __init__(self) -> None:
        super().__init__()
        self.given = 0

    def scan(
        self, start: bytes, end: bytes | None, *, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        for row in super().scan(start, end, reverse=reverse):
            self.given += 1
            yield row


def test_a_commit_of_a_hot_key_reads_only_the_versions_since_it_began():
    place, rows = Range(), CountedRows()
    place.rows = rows
    for number in range(1, 1001):
        one(place, commit(number, owner=txn_id(number, begin_ts=number - 1)))
    rows.given = 0
    late = txn_id(5000, begin_ts=998)
    assert one(place, commit(1001, owner=late)) == Answer(PartStatus.COMMITTED, 1001)
    assert rows.given <= 2
    assert one(place, commit(1002, owner=late)) == Answer(PartStatus.COMMITTED, 1001)
    assert rows.given <= 2


def test_an_overlay_reads_no_further_than_its_reader():
    rows = CountedRows()
    rows.write({b"%03d" % number: b"v" for number in range(1000)})
    overlay = Overlay(rows)
    overlay.put(b"002x", b"mine")
    found = overlay.scan(b"", None)
    assert [next(found)[0] for _ in range(4)] == [b"000", b"001", b"002", b"002x"]
    assert rows.given <= 5


class WalkedRows(dict[bytes, bytes | None]):
    """Counts the keys that somebody walks over."""

    walked = 0

    def __iter__(self) -> Iterator[bytes]:
        for key in super().__iter__():
            self.walked += 1
            yield key

    def __reversed__(self) -> Iterator[bytes]:
        for key in super().__reversed__():
            self.walked += 1
            yield key


def test_refusals_of_one_entry_cost_linear_time():
    """Thousands who read a hot key before its last write are refused at once, and each is looked for in its history."""
    place = Range()
    one(place, commit(50, owner=OTHER))
    refusals: list[Command] = [
        FencePart(txn_id(number, begin_ts=20), b"a", b"a", FenceReason.CONFLICT, b"a", OTHER, 50)
        for number in range(2_000)
    ]
    overlay, rows = Overlay(place.rows), WalkedRows()
    overlay.rows = rows
    answers = apply_batch(place.state, overlay, Batch(0, 1, refusals))
    assert {answer.status for answer in answers} == {PartStatus.FENCED}
    assert len(rows) == 2_000
    assert rows.walked <= 2 * len(rows)


def test_a_look_through_a_history_counts_like_rows_for_who_applies_in_slices():
    """A refusal stages a hundred bytes, and takes as long as a row of a thousand: the bytes of both bound a slice."""
    place = Range()
    overlay = Overlay(place.rows)
    list(overlay.scan(b"a", b"b"))
    list(overlay.scan(b"b", None))
    assert overlay.bytes == 2 * SCAN_BYTES


def test_an_overlay_that_grows_between_scans_shows_every_row_of_a_span_in_order():
    rng = random.Random(1)
    below = MemoryRows()
    below.write({b"%02d" % number: b"below" for number in range(0, 100, 3)})
    overlay, expected = Overlay(below), dict(below.scan(b"", None))
    for _ in range(200):
        for _ in range(rng.choice((0, 1, 2, 60))):
            key = b"%02d" % rng.randrange(100)
            if rng.random() < 0.3:
                overlay.delete(key)
                expected.pop(key, None)
            else:
                overlay.put(key, b"%d" % rng.randrange(10))
                expected[key] = overlay.rows[key] or b""
        start, end = (b"%02d" % rng.randrange(100) for _ in range(2))
        inside = [(key, expected[key]) for key in sorted(expected) if start <= key < end]
        assert list(overlay.scan(start, end)) == inside
        assert list(overlay.scan(start, end, reverse=True)) == inside[::-1]
        assert list(overlay.scan(start, None)) == [
            (key, expected[key]) for key in sorted(expected) if start <= key
        ]
