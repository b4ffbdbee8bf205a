"""D1: `RecentlyDecided.absent` is said only of transactions that have no row of a decided part, whatever is remembered."""

from __future__ import annotations

from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from txn import decided
from txn.decided import RecentlyDecided
from txn.types import make_txn_id

IDS = [make_txn_id(begin, bits) for begin in range(1, 12) for bits in range(3)]


@given(
    before=st.lists(st.sampled_from(IDS), max_size=4),
    written=st.lists(st.sampled_from(IDS), max_size=40),
    remembered_max=st.integers(1, 8),
)
def test_what_is_called_absent_has_no_row(
    before: list[bytes], written: list[bytes], remembered_max: int
) -> None:
    rows = set(before)
    with patch.object(decided, "REMEMBERED_MAX", remembered_max):
        recent = RecentlyDecided(
            max((int.from_bytes(each[:8], "big") for each in before), default=0)
        )
        for txn_id in written:
            recent.add(txn_id)
            rows.add(txn_id)
            assert not [each for each in IDS if recent.absent(each) and each in rows]


def test_a_transaction_of_now_is_not_looked_for() -> None:
    recent = RecentlyDecided(floor=100)
    for begin in range(101, 101 + 2 * decided.REMEMBERED_MAX):
        recent.add(make_txn_id(begin, 7))
    assert recent.absent(make_txn_id(101 + 2 * decided.REMEMBERED_MAX, 7))
    assert recent.absent(make_txn_id(100 + 2 * decided.REMEMBERED_MAX, 8))
    assert not recent.absent(make_txn_id(100 + 2 * decided.REMEMBERED_MAX, 7))
    assert not recent.absent(make_txn_id(101, 7))
    assert not recent.absent(make_txn_id(99, 7))
