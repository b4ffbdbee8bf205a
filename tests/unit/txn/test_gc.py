"""Claims of garbage collection (G1 to G4 of txn/gc.py): what a read may still see stays, the rest goes, and nobody is told
anything about what may be gone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.unit.txn.txn_driver import Range, put, settled, stored, txn_id
from txn import gc, keycode
from txn.commands import Collect, Command, Commit, FencePart, PreparePart
from txn.evaluate import Limits
from txn.latches import Pending
from txn.messages import (
    Ack,
    Failure,
    Finalize,
    PartReply,
    PrepareReply,
    QueryMode,
    QuerySettled,
    Resolve,
    Settled,
    TxnReply,
)
from txn.mvcc import read_at
from txn.types import (
    KEPT_PREFIX,
    FenceReason,
    Guard,
    PartStatus,
    TxnStatus,
    Write,
    WriteKind,
    point_end,
)

RETENTION = 50


def place_with(retention: int = RETENTION) -> Range:
    """Up to b"x"; what a part is anchored at, b"zz", is elsewhere."""
    return Range(end=b"x", limits=Limits(retention=retention, sweep_s=0.1))


def delete(place: Range, key: bytes) -> int:
    number = 9000 + place.clock
    asked = place.prepare(number, Write(WriteKind.DELETE, key), begin_ts=place.clock)
    version: int = settled(place, asked).reply.ts
    return version


def write(place: Range, key: bytes, value: bytes = b"v") -> int:
    number = 9000 + place.clock
    version: int = settled(
        place, place.prepare(number, put(key, value), begin_ts=place.clock)
    ).reply.ts
    return version


def sweep(place: Range, *, clock: int = 0) -> None:
    """Time passes, in timestamps and in seconds, until there is nothing left to collect."""
    if clock:
        place.clock = clock
        settled(place, place.read(b"anything"))
    for _ in range(60):
        place.pass_time(gc.STEP_S)
        place.settle()


def rows_of(place: Range, family: bytes) -> list[bytes]:
    return [key for key in sorted(place.rows.rows) if key.startswith(family)]


def value_at(place: Range, key: bytes, at: int) -> bytes | None:
    found = read_at(place.rows, key, at)
    return found.value if found is not None else None


# --- G1


def test_versions_below_the_threshold_go_but_for_the_newest():
    place = place_with()
    versions = [write(place, b"k", b"%d" % number) for number in range(5)]
    sweep(place, clock=versions[2] + RETENTION)
    assert place.state.row.gc_threshold == versions[2]
    assert [value_at(place, b"k", at) for at in versions[2:]] == [b"2", b"3", b"4"]
    assert (
        len(rows_of(place, keycode.HISTORY)) == 2
    )  # the newest at or below the threshold, and one above


def test_when_the_newest_version_is_old_its_history_goes_whole():
    place = place_with()
    for number in range(5):
        last = write(place, b"k", b"%d" % number)
    sweep(place, clock=last + RETENTION)
    assert rows_of(place, keycode.HISTORY) == []
    assert value_at(place, b"k", place.clock) == b"4"


def test_reads_below_the_threshold_are_refused_and_at_it_are_served():
    place = place_with()
    write(place, b"k", b"old")
    last = write(place, b"k", b"new")
    sweep(place, clock=last + RETENTION)
    assert settled(place, place.read(b"k", at=last - 1)).reply.code == "snapshot_too_old"
    assert settled(place, place.read(b"k", at=last)).reply.values == [b"new"]
    assert settled(place, place.scan(b"", b"w", last - 1)).reply.code == "snapshot_too_old"


def test_who_began_at_what_the_oldest_open_view_reads_may_still_commit():
    place = place_with()
    for number in range(3):
        at = write(place, b"k", b"%d" % number)
    place.evaluator.floor = at  # a transaction that has read there, and has told its id then
    sweep(place, clock=at + 10 * RETENTION)
    assert place.state.row.gc_threshold > 0
    asked = place.prepare(5, put(b"mine"), begin_ts=at, guards=[Guard(b"k", point_end(b"k"), at)])
    assert settled(place, asked).reply.status == PartStatus.COMMITTED


def test_without_a_retention_nothing_is_ever_collected():
    place = place_with(0)
    for _ in range(3):
        last = write(place, b"k")
    sweep(place, clock=last + 10_000)
    assert len(rows_of(place, keycode.HISTORY)) == 2
    assert place.evaluator.collector.due is None


def test_what_is_young_is_left_alone_and_costs_no_entry():
    place = place_with()
    for _ in range(3):
        last = write(place, b"k")
    entries = len(place.log)
    sweep(place, clock=last)
    assert len(place.log) == entries


# --- G2


@pytest.mark.parametrize("ask", ["prepare", "fence", "query_part", "outcome", "query"])
def test_what_began_at_or_below_the_horizon_is_expired(ask: str):
    place = place_with()
    first = write(place, b"k", b"1")
    last = write(place, b"k", b"2")
    sweep(place, clock=last + RETENTION)
    calls: dict[str, Callable[[], object]] = {
        "prepare": lambda: place.prepare(5, put(b"k"), begin_ts=first),
        "fence": lambda: place.fence(5, b"k", begin_ts=first),
        "query_part": lambda: place.query_part(5, b"k", first),
        "outcome": lambda: place.outcome(5, b"k"),
        "query": lambda: place.query(5, b"k", QueryMode.BLOCKED),
    }
    reply = settled(place, calls[ask]()).reply  # type: ignore[arg-type]
    assert isinstance(reply, (PartReply, PrepareReply, TxnReply))
    expired = TxnStatus.EXPIRED if isinstance(reply, TxnReply) else PartStatus.EXPIRED
    assert reply.status == expired


def test_an_entry_that_was_proposed_before_the_horizon_rose_is_expired_when_it_is_applied():
    place = place_with()
    write(place, b"k")
    values: list[bytes | None] = [b"v"]
    collect = Collect(place.clock, [])
    late: list[Command] = [
        Commit(txn_id(1, 5), b"n", place.clock + 9, [b"n"], values),
        Commit(txn_id(2, 5), b"n", place.clock + 9, [b"n", b"o"], [b"v", b"v"]),
        PreparePart(txn_id(3, 5), b"n", b"zz", place.clock + 9, 1, [b"n"], values, []),
        FencePart(txn_id(4, 5), b"n", b"zz", 1),
    ]
    answers = place.apply([collect, *late])
    assert [answer.status for answer in answers[1:]] == [PartStatus.EXPIRED] * 4
    assert value_at(place, b"n", place.clock + 10) is None
    assert not rows_of(place, keycode.DECIDED)
    assert not rows_of(place, keycode.PREPARED)


def test_what_is_still_known_is_told_even_below_the_horizon():
    place = place_with()
    version = stored(place, b"k")
    number = 9000 + version - 1
    sweep(place, clock=version + RETENTION)
    reply = settled(place, place.prepare(number, put(b"k", b"old"))).reply
    assert (reply.status, reply.ts) == (PartStatus.COMMITTED, version)


def test_an_anchor_says_nothing_about_what_began_below_its_horizon():
    place = place_with()
    write(place, b"k")
    last = write(place, b"k")
    sweep(place, clock=last + RETENTION)
    asked = settled(place, place.query(1, b"k", QueryMode.ORPHAN))
    assert asked.reply.status == TxnStatus.EXPIRED
    assert asked.confirm


def test_a_part_whose_anchor_says_expired_is_aborted():
    """There is no record, there will be none, and a committed one would not be forgotten while a part is undecided."""
    place = place_with()
    settled(place, place.part(1, put(b"k"), begin_ts=5))
    place.pass_time(2.1)
    ((_, query, _),) = place.calls
    assert query.mode == QueryMode.ORPHAN
    place.answer(TxnReply(0, TxnStatus.EXPIRED))
    place.settle()
    assert not place.state.parts
    assert value_at(place, b"k", place.clock) is None


def test_a_guard_from_below_the_threshold_is_a_conflict():
    """A tombstone that it should meet may be gone."""
    place = place_with()
    read_ts = write(place, b"k")
    last = delete(place, b"k")
    sweep(place, clock=last + RETENTION)
    assert not rows_of(place, keycode.LATEST)
    guards = [Guard(b"k", b"k\x00", read_ts)]
    asked = place.prepare(1, put(b"w"), guards=guards, begin_ts=place.clock)
    assert settled(place, asked).reply.status == PartStatus.FENCED


# --- G3


def test_an_old_tombstone_goes_with_all_that_is_older():
    place = place_with()
    for number in range(3):
        write(place, b"k", b"%d" % number)
    gone = delete(place, b"k")
    sweep(place, clock=gone + RETENTION)
    assert not rows_of(place, keycode.LATEST)
    assert not rows_of(place, keycode.HISTORY)
    assert settled(place, place.read(b"k", at=gone)).reply.versions == [0]


def test_a_tombstone_that_hides_older_versions_is_not_taken_before_them(monkeypatch):
    """A slice ends between the tombstone and what it hides; somebody reads before the next one."""
    monkeypatch.setattr(gc, "SLICE_ROWS", 1)
    place = place_with()
    write(place, b"k", b"old")
    gone = delete(place, b"k")
    write(place, b"k", b"new")
    place.clock = gone + RETENTION
    settled(place, place.read(b"k"))
    for _ in range(200):
        place.pass_time(gc.STEP_S)
        place.settle()
        assert value_at(place, b"k", gone) is None


def test_a_writer_waits_for_the_collection_of_its_keys_tombstone():
    """Else the leader would apply with the tombstone that it read, and the followers without."""
    place = place_with()
    write(place, b"k")
    gone = delete(place, b"k")
    place.clock = gone + RETENTION
    settled(place, place.read(b"k"))
    while not place.evaluator.latches.writes:
        place.pass_time(gc.STEP_S)
        held = place.take()
        if not place.evaluator.latches.writes:
            place.commit(held)
    asked = place.prepare(1, put(b"k"), begin_ts=place.clock)
    assert asked.open
    assert not place.evaluator.await_fresh
    place.commit(held)
    assert settled(place, asked).reply.status == PartStatus.COMMITTED
    assert not rows_of(place, keycode.HISTORY)


def test_a_key_with_an_intent_keeps_its_tombstone():
    place = place_with()
    write(place, b"k")
    gone = delete(place, b"k")
    settled(place, place.part(1, put(b"k"), begin_ts=place.clock))
    sweep(place, clock=gone + RETENTION)
    assert rows_of(place, keycode.LATEST) == [b"Lk"]
    place.resolve(1, b"k", 0)


# --- G5, G6


def hinted(place: Range) -> None:
    """A part anchored elsewhere, at b'zz', that a client said is committed; then time for its collection."""
    settled(place, place.part(1, put(b"k"), begin_ts=place.clock))
    ((txn_id_,),) = [list(place.state.parts)]
    commit_ts = place.state.parts[txn_id_][b"k"].row.min_ts
    request = Resolve(0, 0, 0, txn_id_, b"zz", b"k", b"k", b"k\x00", commit_ts)
    settled(place, place.ask(request))
    assert len(rows_of(place, keycode.DECIDED)) == 1
    place.clock += RETENTION
    settled(place, place.read(b"k"))


def sweep_until_asked(place: Range) -> QuerySettled:
    for _ in range(20):
        place.pass_time(gc.STEP_S)
        place.settle()
        if place.calls:
            ((_, request, _),) = place.calls
            assert isinstance(request, QuerySettled)
            return request
    raise AssertionError("nobody was asked")


def test_a_part_committed_by_a_clients_word_goes_only_when_its_record_is_terminal():
    place = place_with()
    hinted(place)
    assert sweep_until_asked(place).anchor_key == b"zz"
    place.pass_time(5.0)  # nothing goes on without an answer
    assert len(rows_of(place, keycode.DECIDED)) == 1
    place.answer(Settled(0, b"y", b"", place.clock - RETENTION))
    sweep(place)
    assert not rows_of(place, keycode.DECIDED)


@pytest.mark.parametrize("reply", [Settled(0, b"y", b"", 1), Failure(0, "unavailable")])
def test_it_stays_when_the_record_may_be_staged_and_when_nobody_answers(reply):
    place = place_with()
    hinted(place)
    sweep_until_asked(place)
    place.answer(reply)
    sweep(place)
    assert len(rows_of(place, keycode.DECIDED)) == 1
    place.clock += 1
    settled(place, place.read(b"k"))
    place.pass_time(1.0)
    assert sweep_until_asked(place).anchor_key == b"zz"  # the next sweep asks again


def test_refusals_and_parts_resolved_by_the_record_go_without_a_question():
    place = place_with()
    settled(place, place.fence(1, b"a", begin_ts=place.clock))
    number = place.clock
    settled(place, place.part(2, put(b"k"), begin_ts=number))
    part = place.state.parts[txn_id(2, number)][b"k"]
    request = Resolve(0, 0, 0, part.txn_id, b"zz", b"k", b"k", b"k\x00", part.row.min_ts, True)
    settled(place, place.ask(request))
    assert len(rows_of(place, keycode.DECIDED)) == 2
    sweep(place, clock=place.clock + RETENTION)
    assert not rows_of(place, keycode.DECIDED)
    assert not place.calls


def decided(place: Range) -> bytes:
    """A transaction anchored here with a part at b'y' in another range: committed, not acknowledged there yet."""
    begin_ts = place.clock
    settled(place, place.anchor(1, put(b"k"), others=(b"y",), begin_ts=begin_ts))
    commit_ts = place.clock + 1
    place.clock += 1
    request = Finalize(0, 0, 0, txn_id(1, begin_ts), b"k", commit_ts)
    settled(place, place.ask(request))
    return txn_id(1, begin_ts)


def test_a_record_goes_when_all_parts_have_acknowledged_their_resolve():
    place = place_with()
    decided(place)
    sweep(place, clock=place.clock + RETENTION)
    assert len(rows_of(place, keycode.TERMINAL)) == 1
    for _ in range(len(place.calls)):
        place.answer(Ack(0))
    place.settle()
    assert not place.state.outbox
    place.clock += 1
    settled(place, place.read(b"k"))
    sweep(place)
    assert not rows_of(place, keycode.TERMINAL)
    assert settled(place, place.outcome(1, b"k")).reply.status == TxnStatus.EXPIRED


def test_anchors_that_do_not_answer_hold_up_a_sweep_for_a_few_questions_only():
    """Each is waited for for seconds; meanwhile nothing else of the range is collected."""
    place = place_with()
    for number in range(20):
        key = b"k%02d" % number
        settled(place, place.prepare(
            number, put(key), begin_ts=place.clock, anchor_key=b"z" + key, one_range=False
        ))  # fmt: skip
        ((txn_id_,),) = [list(place.state.parts)]
        ts = place.clock
        settled(
            place, place.ask(Resolve(0, 0, 0, txn_id_, b"z" + key, key, key, key + b"\x00", ts))
        )
    sweep(place, clock=place.clock + RETENTION)
    asked = 0
    for _ in range(100):
        if not place.calls:
            break
        place.answer(Failure(0, "unavailable"))
        asked += 1
        for _ in range(4):
            place.pass_time(gc.STEP_S)
            place.settle()
    assert asked == gc.SILENT_MAX
    assert len(rows_of(place, keycode.DECIDED)) == 20
    sweep(place, clock=place.clock + RETENTION)  # the next sweep asks again
    assert len(place.calls) == 1
    place.answer(Settled(0, b"y", b"", place.clock))
    sweep(place)
    assert rows_of(place, keycode.DECIDED) == []


def test_what_is_settled_is_below_the_horizon_and_below_everything_staged():
    place = place_with()
    asked = place.ask(QuerySettled(0, 0, 0, b"k"))
    assert asked.reply == Settled(0, b"", b"x", 0)
    begin_ts = place.clock
    for _ in range(2):
        write(place, b"k")
    settled(place, place.anchor(1, put(b"s"), others=(b"y",), begin_ts=begin_ts))
    sweep(place, clock=place.clock + RETENTION)
    assert place.state.row.outcome_horizon > begin_ts
    assert place.ask(QuerySettled(0, 0, 0, b"k")).reply.upto == begin_ts - 1
    assert place.ask(QuerySettled(0, 0, 0, b"y")).reply.code == "epoch_mismatch"


# --- G4


def test_work_is_cut_into_steps_and_commands_of_bounded_size(monkeypatch):
    monkeypatch.setattr(gc, "SLICE_ROWS", 10)
    monkeypatch.setattr(gc, "COLLECT_ROWS_MAX", 5)
    place = place_with()
    for number in range(40):
        last = write(place, b"k%02d" % (number % 20), b"x")
    for number in range(10):
        last = delete(place, b"k%02d" % number)
    sweep(place, clock=last + RETENTION)
    commands = [command for command in place.log if isinstance(command, Collect)]
    sizes = [
        sum(len(each.versions) + bool(each.tombstone) for each in command.garbage)
        for command in commands
    ]
    assert max(sizes) <= 10
    assert not rows_of(place, keycode.HISTORY)
    assert len(rows_of(place, keycode.LATEST)) == 10


def test_one_command_at_a_time_and_a_refused_one_is_found_again():
    place = place_with()
    for _ in range(3):
        last = write(place, b"k")
    place.clock = last + RETENTION
    settled(place, place.read(b"k"))
    refused: list[Pending] = []
    while not refused:
        place.pass_time(gc.STEP_S)
        refused = place.take()
    assert len(refused) == 1
    assert place.evaluator.collector.due is None  # else its node would turn and turn
    place.pass_time(1.0)
    assert place.take() == []
    place.evaluator.dropped(refused, "throttled")
    sweep(place)
    assert not rows_of(place, keycode.HISTORY)


def test_a_step_looks_at_few_large_values(monkeypatch):
    monkeypatch.setattr(gc, "SLICE_BYTES", 1_000)
    place = place_with()
    for number in range(20):
        last = write(place, b"k%02d" % (number % 10), bytes(600))
    place.clock = last + RETENTION
    settled(place, place.read(b"k"))
    looked: list[int] = []
    scan = place.rows.scan

    def counted(start: bytes, end: bytes | None, *, reverse: bool = False):
        looked.append(0)
        for row in scan(start, end, reverse=reverse):
            looked[-1] += 1
            yield row

    monkeypatch.setattr(place.rows, "scan", counted)
    sweep(place)
    assert max(looked) <= 3  # two that fit, and one that does not any more
    assert not rows_of(place, keycode.HISTORY)


@pytest.mark.parametrize("of", ["version", "outcome"])
def test_what_is_newer_than_its_leader_knows_to_be_issued_is_collected_in_its_time(of: str):
    """Its commit timestamp, or its beginning, is one that another range was given."""
    place = place_with()
    write(place, b"k")
    if of == "version":
        settled(place, place.part(1, Write(WriteKind.DELETE, b"k")))
        settled(place, place.resolve(1, b"k", place.clock + 40, record=True))
    else:
        settled(place, place.fence(1, b"k", begin_ts=place.clock + 40))
    known = place.evaluator.issued
    sweep(place)
    for upto in (known + 10, known + 1_000):
        sweep(place, clock=upto + RETENTION)
    assert rows_of(place, keycode.LATEST) == ([] if of == "version" else [keycode.latest_row(b"k")])
    assert rows_of(place, keycode.DECIDED) == []


# --- G7


KEPT = 1_000
KEPT_KEY = KEPT_PREFIX + b"hash"


def place_of_kept() -> Range:
    return Range(start=b"x", limits=Limits(retention=RETENTION, sweep_s=0.1, kept=KEPT))


def test_a_row_of_an_idempotency_key_is_deleted_when_its_time_is_over_and_not_before():
    place = place_of_kept()
    version = write(place, KEPT_KEY)
    other = write(place, b"y")
    sweep(place, clock=version + KEPT - 1)
    assert place.calls == []
    sweep(place, clock=version + KEPT)
    ((key, request, _),) = place.calls
    assert key == KEPT_KEY
    assert request.writes == [Write(WriteKind.DELETE, KEPT_KEY)]
    done = settled(place, place.ask(request)).reply
    assert done.status == PartStatus.COMMITTED
    place.answer(done)
    assert value_at(place, KEPT_KEY, place.clock) is None
    assert (
        value_at(place, KEPT_KEY, done.ts - 1) == b"v"
    )  # an ordinary deletion: earlier snapshots see it
    assert value_at(place, b"y", place.clock) == b"v"
    sweep(place, clock=done.ts + 2 * RETENTION)
    assert rows_of(place, keycode.LATEST) == [keycode.latest_row(b"y")]
    assert other > version


def test_what_was_written_since_stays():
    place = place_of_kept()
    version = write(place, KEPT_KEY)
    sweep(place, clock=version + KEPT)
    ((_, request, _),) = place.calls
    write(place, KEPT_KEY, b"again")
    refused = settled(place, place.ask(request)).reply
    assert refused.reason == FenceReason.COMPARE_FAILED
    place.answer(refused)
    assert value_at(place, KEPT_KEY, place.clock) == b"again"
    sweep(place, clock=place.clock + RETENTION)
    assert place.calls == []


def test_a_collector_that_got_no_answer_asks_again_in_the_next_sweep():
    place = place_of_kept()
    version = write(place, KEPT_KEY)
    sweep(place, clock=version + KEPT)
    assert place.evaluator.collector.due is None
    place.answer(Failure(0, "unavailable"))
    sweep(place, clock=place.clock + RETENTION)
    assert len(place.calls) == 1


def test_rows_are_kept_for_ever_if_it_is_said_so():
    place = Range(start=b"x", limits=Limits(retention=RETENTION, sweep_s=0.1))
    version = write(place, KEPT_KEY)
    sweep(place, clock=version + 10**9)
    assert place.calls == []
