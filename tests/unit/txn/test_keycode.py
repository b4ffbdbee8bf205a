"""Claims: escaping keeps the order of keys and never lets two keys' rows interleave; a family's span is exactly its keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from txn import keycode
from txn.types import TIMESTAMP_MAX

# few different bytes, so that keys meet the escape's own bytes and are prefixes of each other
keys = st.lists(st.sampled_from([0x00, 0x01, 0x61, 0xFE, 0xFF]), max_size=5).map(bytes)
suffixes = st.binary(max_size=3)
timestamps = st.integers(1, TIMESTAMP_MAX)
ids = st.binary(min_size=16, max_size=16)


@given(keys, keys, suffixes, suffixes)
def test_escaped_order_is_key_order_whatever_follows(first, second, after_first, after_second):
    if first < second:
        assert keycode.escape(first) + after_first < keycode.escape(second) + after_second


@given(keys, suffixes)
def test_unescape_gives_the_key_back_and_where_it_ends(key, suffix):
    row = b"Q" + keycode.escape(key) + suffix
    assert keycode.unescape(row, 1) == (key, len(row) - len(suffix))


@pytest.mark.parametrize("row", [b"", b"abc", b"a\x00\xff", b"a\x00"])
def test_a_row_without_a_terminator_is_refused(row):
    with pytest.raises(ValueError, match="not found"):
        keycode.unescape(row)


@given(keys, timestamps, timestamps)
def test_newer_history_rows_come_first(key, one, other):
    newer, older = (
        keycode.history_row(key, max(one, other)),
        keycode.history_row(key, min(one, other)),
    )
    assert newer <= older
    assert keycode.history_ts(newer) == max(one, other)
    assert newer.startswith(keycode.history_prefix(key))


@given(keys, keys, keys, ids)
def test_a_familys_span_holds_the_rows_of_its_keys_and_no_others(start, end, key, txn_id):
    inside = start <= key and (not end or key < end)
    for family in keycode.ESCAPED_FAMILIES:
        low, high = keycode.family_span(family, start, end)
        for row in (
            keycode.part_row(family, key, txn_id),
            family + keycode.escape(key) + b"\xff" * 24,
        ):
            assert (low <= row < high) == inside
    low, high = keycode.family_span(keycode.LATEST, start, end)
    assert (low <= keycode.latest_row(key) < high) == inside


@given(keys, ids, keys)
def test_an_outbox_row_tells_its_anchor_its_transaction_and_its_locus(anchor_key, txn_id, locus):
    row = keycode.outbox_row(anchor_key, txn_id, locus)
    found, at = keycode.unescape(row, 1)
    assert (found, row[at : at + 16], row[at + 16 :]) == (anchor_key, txn_id, locus)


def test_node_local_rows_lie_outside_every_familys_span():
    spans = [
        keycode.family_span(family, b"", b"")
        for family in (*keycode.RAW_FAMILIES, *keycode.ESCAPED_FAMILIES)
    ]
    families = (keycode.RANGE, keycode.CONFIG, keycode.ORACLE)
    for row in (*(keycode.node_row(family, 1) for family in families), keycode.CLUSTER_ROW):
        assert not any(low <= row < high for low, high in spans)
