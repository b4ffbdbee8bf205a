"""Claims of replication/log.py: lookups, conflicts, durability and compaction of the log in memory."""

from __future__ import annotations

import pytest

from replication.errors import LogMismatch
from replication.log import ENTRY_OVERHEAD_BYTES, RaftLog
from replication.types import Entry


def entries(*terms: int, first: int = 1) -> list[Entry]:
    return [Entry(first + n, term, 0, b"x" * 10) for n, term in enumerate(terms)]


def log_of(*terms: int, start: tuple[int, int] = (0, 0)) -> RaftLog:
    return RaftLog(*start, entries(*terms, first=start[0] + 1))


def test_terms_are_known_from_the_start_to_the_end():
    log = log_of(2, 2, 5, start=(10, 1))
    assert [log.term(index) for index in range(9, 15)] == [None, 1, 2, 2, 5, None]
    assert (log.first_index, log.last_index, log.last_term) == (11, 13, 5)


@pytest.mark.parametrize("bad", [entries(1, 1, first=3), entries(1), entries(2, 1, first=2)])
def test_a_gap_or_a_falling_term_is_refused(bad):
    with pytest.raises(LogMismatch):
        RaftLog(1, 1, bad)


def test_each_change_is_handed_out_for_writing_once():
    log = log_of(1)
    log.append(Entry(2, 1, 0, b"a"))
    log.append(Entry(3, 1, 0, b"b"))
    assert [entry.index for entry in log.take_unwritten()] == [2, 3]
    assert log.take_unwritten() == []
    log.truncate_after(2)
    log.append(Entry(3, 2, 0, b"c"))
    assert [(entry.index, entry.term) for entry in log.take_unwritten()] == [(3, 2)]


def test_durability_counts_only_for_the_log_as_it_is():
    log = log_of()
    log.append(Entry(1, 1, 0, b"a"))
    assert not log.durable(1, 1)  # it was never handed out
    log.take_unwritten()
    log.truncate_after(0)
    log.append(Entry(1, 2, 0, b"b"))
    log.take_unwritten()
    assert not log.durable(1, 1)
    assert log.durable(1, 2)
    assert not log.durable(1, 2)  # no news


def test_truncation_takes_back_durability():
    log = log_of(1, 1, 1)
    assert log.durable_index == 3
    log.truncate_after(1)
    assert (log.durable_index, log.last_index, log.bytes) == (1, 1, 10)


def test_where_another_log_may_agree_whole_terms_are_skipped():
    log = log_of(1, 1, 4, 4, 4)
    assert log.last_index_within_term(5, 3) == (2, 1)
    assert log.last_index_within_term(9, 4) == (5, 4)
    assert log.last_index_within_term(4, 9) == (4, 4)
    assert log_of(4, 4, start=(10, 3)).last_index_within_term(12, 2) == (10, 3)


def test_compaction_and_reset_move_the_start():
    log = log_of(1, 1, 2)
    log.compact(2)
    log.compact(1)  # nothing to do
    assert (log.start_index, log.start_term, log.bytes, len(log)) == (2, 1, 10, 1)
    log.reset(9, 5)
    assert (log.first_index, log.last_index, log.durable_index, log.bytes) == (10, 9, 9, 0)


def test_what_lies_within_a_bound_of_bytes_is_counted_from_the_end():
    log = log_of(1, 1, 1, start=(10, 1))
    assert [log.lowest_within(bytes_max) for bytes_max in (0, 9, 10, 29, 30)] == [13, 13, 12, 11, 0]
    assert log_of(start=(10, 1)).lowest_within(0) == 0


def test_a_slice_keeps_its_limits_and_is_never_empty():
    log = log_of(1, 1, 1, 1)
    each = 10 + ENTRY_OVERHEAD_BYTES
    assert [e.index for e in log.slice_bounded(2, 9, 2 * each)[0]] == [2, 3]
    assert log.slice_bounded(1, 2, 1 << 20)[1] == 2 * each
    assert [e.index for e in log.slice_bounded(3, 0, 0)[0]] == [3]
