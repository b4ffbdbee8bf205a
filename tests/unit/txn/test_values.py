"""Claims of sums and of what is counted."""

from __future__ import annotations

import pytest

from txn import atomics
from txn.commands import AbortUnstaged, Decide, FencePart
from txn.counters import COUNTERS, count
from txn.state import ABSENT, Answer
from txn.types import FenceReason, PartStatus, WriteKind


@pytest.mark.parametrize(
    ("kind", "current", "by", "result"),
    [
        (WriteKind.ADD_ASCII, None, b"1", b"1"),
        (WriteKind.ADD_ASCII, b"-5", b"5", b"0"),
        (WriteKind.ADD_ASCII, b"007", b"1", b"8"),
        (WriteKind.ADD_ASCII, b"", b"1", None),
        (WriteKind.ADD_ASCII, b"-", b"1", None),
        (WriteKind.ADD_ASCII, b"--5", b"1", None),
        (WriteKind.ADD_ASCII, b"1.5", b"1", None),
        (WriteKind.ADD_ASCII, b" 1", b"1", None),
        (WriteKind.ADD_ASCII, b"1_0", b"1", None),
        (WriteKind.ADD_ASCII, b"1", b"x", None),
        (WriteKind.ADD_ASCII, b"%d" % (2**63 - 1), b"1", None),
        (WriteKind.ADD_ASCII, b"%d" % -(2**63), b"-1", None),
        (WriteKind.ADD_ASCII, b"9" * 21, b"1", None),
        (WriteKind.ADD_INT64, None, b"-1", b"\xff" * 8),
        (WriteKind.ADD_INT64, b"\xff" * 8, b"2", b"\x00" * 7 + b"\x01"),
        (WriteKind.ADD_INT64, b"\x7f" + b"\xff" * 7, b"1", None),
        (WriteKind.ADD_INT64, b"\x80" + b"\x00" * 7, b"-1", None),
        (WriteKind.ADD_INT64, b"5", b"1", None),
        (WriteKind.ADD_INT64, b"", b"1", None),
    ],
)
def test_a_sum_is_of_the_rows_format_and_fits_or_is_refused(kind, current, by, result):
    if result is None:
        with pytest.raises(atomics.BadValue):
            atomics.after(kind, by, current)
    else:
        assert atomics.after(kind, by, current) == (result, result)


@pytest.mark.parametrize("reason", list(FenceReason))
def test_every_reason_of_a_fence_has_a_counter(reason):
    counters = dict.fromkeys(COUNTERS, 0)
    count(counters, FencePart(b"", b"", b"", reason), ABSENT)
    assert sum(counters.values()) == 1
    assert set(counters) == set(COUNTERS)


def test_decisions_are_counted_by_their_outcome_and_other_commands_not_at_all():
    counters = dict.fromkeys(COUNTERS, 0)
    count(counters, Decide(b"", b"", 5), Answer(PartStatus.COMMITTED, 5))
    count(counters, Decide(b"", b"", 0), Answer(PartStatus.ABORTED))
    count(counters, AbortUnstaged(b"", b""), Answer(PartStatus.ABORTED))
    assert counters["commits_cross_range_total"] == counters["aborts_cross_range_total"] == 1
    assert sum(counters.values()) == 2
