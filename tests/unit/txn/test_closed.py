"""Claims of closed timestamps: what is closed stays below what is in flight and is compared with what comes later (F1, I13); a
replica is safe below everything undecided, where it stands (F3, F4, I14); what it reads alone is what the leader would say."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.txn.txn_driver import Range, put, settled, stored
from txn.closed import Closing, Heard, read_here, safe_ts
from txn.messages import Failure, Read, ReadReply, Scan, ScanReply
from txn.state import Part
from txn.types import PartStatus

LIMITS = (100, 1 << 20)


def safe(place: Range) -> int:
    return safe_ts(place.state, place.state.row.closed_ts)


# --- F1: closing


def test_what_has_its_timestamp_and_is_not_applied_holds_back_what_is_closed():
    place = Range()
    place.prepare(1, put(b"a"))
    place.part(2, put(b"b"))
    place.stamp()  # 101 and 102, in flight
    assert place.evaluator.closing.close(200) == 100
    place.settle()
    assert place.evaluator.closing.close(200) == 200


def test_what_is_closed_never_goes_back():
    place = Range()
    assert place.evaluator.closing.close(50) == 50
    assert place.evaluator.closing.close(40) == 50


def test_a_timestamp_that_was_closed_in_a_message_is_asked_for_again():
    """No entry has told it; the applied row knows nothing of it."""
    place = Range()
    asked = place.prepare(1, put(b"a"))
    assert place.evaluator.closing.close(101) == 101
    assert place.state.row.closed_ts == 0
    place.settle()
    assert asked.reply.ts == 102


def test_an_entry_carries_what_is_closed_and_the_next_leader_begins_with_it():
    place = Range()
    place.evaluator.closing.close(90)
    stored(place, b"k")
    assert place.state.row.closed_ts == 90
    place.evaluator.stop()
    place.lead()
    assert place.evaluator.closing.promised == 90


def test_a_leader_that_does_not_serve_yet_closes_nothing():
    place = Range()
    place.evaluator.ready = False
    assert Closing(place.evaluator).close(50) == 0


# --- F3: safe timestamps


class Walked(dict[bytes, dict[bytes, Part]]):
    """A range's parts: how often all were looked at."""

    walks = 0

    def values(self) -> Any:
        self.walks += 1
        return super().values()


def test_the_oldest_undecided_part_is_looked_for_once_until_one_comes_or_goes():
    place = Range()
    parts = place.state.parts = Walked()
    first, second, third = (
        settled(place, place.part(n, put(b"%d" % n))).reply.ts for n in (1, 2, 3)
    )
    parts.walks = 0
    assert {safe_ts(place.state, closed) for closed in (900, first, 901)} == {first - 1}
    assert safe_ts(place.state, first - 2) == first - 2
    assert parts.walks == 1
    settled(place, place.resolve(2, b"2", second))
    assert safe_ts(place.state, 900) == first - 1
    settled(place, place.resolve(1, b"1", first))
    assert [safe_ts(place.state, 900) for _ in range(9)] == [third - 1] * 9
    assert parts.walks == 3
    place.lead()
    assert safe_ts(place.state, 900) == third - 1, "the state is loaded anew"
    settled(place, place.resolve(3, b"3", third))
    assert safe_ts(place.state, 900) == 900


def test_a_replica_is_safe_below_the_oldest_undecided_part_and_above_it_when_that_is_decided():
    place = Range()
    first, second = place.part(1, put(b"a")), place.part(2, put(b"b"))
    place.settle()
    place.evaluator.closing.close(500)
    stored(place, b"z")
    assert first.reply.status == PartStatus.PREPARED
    assert safe(place) == first.reply.ts - 1
    settled(place, place.resolve(1, b"a", first.reply.ts))
    assert safe(place) == second.reply.ts - 1
    settled(place, place.resolve(2, b"b", 0))
    assert safe(place) == 500


def test_what_is_resolved_later_lies_above_what_was_safe():
    place = Range()
    part = place.part(1, put(b"a"))
    place.settle()
    place.evaluator.closing.close(500)
    stored(place, b"z")
    before = safe(place)
    settled(place, place.resolve(1, b"a", part.reply.ts + 20))
    reply = read_here(place.state, place.rows, Read(0, 0, 0, before, [b"a"]), before)
    assert isinstance(reply, ReadReply)
    assert reply.values == [None]


# --- F4: messages


def test_a_message_counts_once_its_index_is_applied():
    row = Range().state.row
    row.applied_index = 5
    heard = Heard()
    heard.hear(7, 300, row)
    assert heard.closed(row) == 0
    row.applied_index = 7
    assert heard.closed(row) == 300


def test_an_early_message_does_not_displace_one_that_counts():
    row = Range().state.row
    row.applied_index = 5
    heard = Heard()
    heard.hear(5, 300, row)
    heard.hear(9, 400, row)
    assert heard.closed(row) == 300
    heard.hear(5, 200, row)  # late
    assert heard.closed(row) == 300
    row.applied_index = 9
    assert heard.closed(row) == 400


def test_a_replica_that_begins_anew_below_the_message_does_not_count_it():
    row = Range().state.row
    row.applied_index = 5
    heard = Heard()
    heard.hear(5, 300, row)
    assert heard.closed(row) == 300
    row.applied_index = 4  # an older snapshot was installed
    assert heard.closed(row) == 0


def test_entries_that_closed_more_count_more():
    row = Range().state.row
    heard = Heard()
    heard.hear(0, 300, row)
    row.closed_ts = 350
    assert heard.closed(row) == 350


# --- reading alone


def history(place: Range) -> list[int]:
    return [stored(place, b"k", b"%d" % number) for number in range(3)]


def test_a_replica_reads_what_a_leader_would_say_at_every_safe_timestamp():
    place = Range()
    versions = history(place)
    for at in range(versions[0] - 1, versions[-1] + 1):
        told = settled(place, place.read(b"k", b"m", at=at)).reply
        assert read_here(place.state, place.rows, Read(0, 0, 0, at, [b"k", b"m"]), 900) == told
        scanned = settled(place, place.scan(b"", b"x", at)).reply
        request = Scan(0, 0, 0, at, b"", b"x", *LIMITS)
        found = read_here(place.state, place.rows, request, 900)
        assert isinstance(found, ScanReply)
        assert (found.keys, found.values) == (scanned.keys, scanned.values)


def test_without_a_timestamp_it_reads_at_what_is_safe():
    place = Range()
    versions = history(place)
    reply = read_here(place.state, place.rows, Read(0, 0, 0, 0, [b"k"]), versions[1])
    assert isinstance(reply, ReadReply)
    assert (reply.at, reply.values) == (versions[1], [b"1"])


@pytest.mark.parametrize(
    ("at", "safe_upto", "threshold", "code"),
    [
        (101, 100, 0, "replica_behind"),
        (0, 0, 0, "replica_behind"),
        (90, 100, 95, "snapshot_too_old"),
    ],
)
def test_what_it_cannot_know_it_refuses(at: int, safe_upto: int, threshold: int, code: str):
    place = Range()
    place.state.row.gc_threshold = threshold
    reply = read_here(place.state, place.rows, Read(0, 0, 0, at, [b"k"]), safe_upto)
    assert isinstance(reply, Failure)
    assert reply.code == code


@pytest.mark.parametrize(
    "request_",
    [
        Read(0, 0, 9, 50, [b"k"]),
        Read(0, 0, 0, 50, [b"zz"]),
        Scan(0, 0, 0, 50, b"a", b"zz", *LIMITS),
    ],
)
def test_keys_of_another_range_or_epoch_are_refused(request_: Read | Scan):
    place = Range(end=b"x")
    reply = read_here(place.state, place.rows, request_, 100)
    assert isinstance(reply, Failure)
    assert reply.code == "epoch_mismatch"
