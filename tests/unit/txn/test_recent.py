"""Claims: `Recent` holds every version above `low` that was noted, in whatever order, and stays within its limits; its
questions are answered as a plain list would."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from txn.recent import BYTES_MAX, Recent, touches_sorted

KEYS = [b"a", b"a\x00", b"b", b"c", b"d"]
commits = st.lists(
    st.tuples(st.integers(1, 60), st.lists(st.sampled_from(KEYS), min_size=1, unique=True)),
    max_size=40,
    unique_by=lambda commit: commit[0],
)
bounds = st.sampled_from([b"", b"a", b"a\x00", b"b", b"c", b"d", b"e"])


@given(commits, st.integers(2, 12), st.integers(0, 60), st.integers(0, 61), bounds, bounds)
def test_what_is_above_low_is_there_in_order(noted, rows_max, since, upto, start, end):
    recent = Recent(rows_max)
    recent.begin(5)
    for version, keys in noted:
        recent.note(version, keys)
    assert len(recent) <= rows_max
    since = max(since, recent.low)

    def inside(key):
        return start <= key and (not end or key < end)

    expected = sorted(
        (version, sorted(filter(inside, keys)))
        for version, keys in noted
        if since < version <= upto and any(map(inside, keys))
    )
    told = [(version, list(keys)) for version, keys in recent.between(since, upto, start, end)]
    assert told == expected
    later = [version for version, keys in noted if version > since and any(map(inside, keys))]
    assert recent.last(since, start, end) == max(later, default=0)
    assert recent.first(since, start, end) == min(later, default=0)


def test_low_is_the_newest_that_went_and_parts_of_one_commit_go_together():
    recent = Recent(4)
    recent.begin(0)
    for version, keys in [(1, [b"a"]), (2, [b"b", b"c"]), (2, [b"x"]), (3, [b"d"])]:
        recent.note(version, keys)
    assert recent.low == 2
    assert [version for version, _ in recent.between(0, 9, b"", b"")] == [3]


def test_a_commit_above_all_limits_leaves_nothing_but_a_higher_low():
    recent = Recent(4)
    recent.begin(0)
    recent.note(1, [b"a"])
    recent.note(7, [b"k%d" % number for number in range(9)])
    assert (len(recent), recent.low) == (0, 7)
    recent.note(8, [bytes(BYTES_MAX + 1)])
    assert (len(recent), recent.low) == (0, 8)


def test_what_is_fresh_is_collected_only_when_somebody_asks_for_it():
    recent = Recent()
    recent.begin(3)
    recent.note(4, [b"a"])
    assert recent.fresh is None
    recent.fresh = []
    recent.note(2, [b"b"])  # below low: not kept, but told
    recent.note(5, [b"c"])
    assert recent.fresh == [(2, [b"b"]), (5, [b"c"])]
    assert recent.first(3, b"", b"") == 4


@given(st.lists(st.sampled_from(KEYS), unique=True), bounds, bounds)
def test_sorted_keys_are_searched_rightly(keys, start, end):
    expected = any(start <= key and (not end or key < end) for key in keys)
    assert touches_sorted(sorted(keys), start, end) == expected
