"""Claims: reads, scans and look-ups by transaction give what a plain list of versions gives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.stateful.txn_ranges import MemoryRows
from tests.unit.txn.txn_driver import txn_id
from txn.apply import Overlay, apply_batch
from txn.commands import Batch, Commit
from txn.mvcc import (
    decode_latest,
    encode_latest,
    find_txn,
    older_at,
    read_at,
    scan_at,
)
from txn.state import RangeRow, RangeState

KEYS = [b"a", b"a\x00", b"a\x00\xff", b"a\x01", b"b"]
writes = st.lists(
    st.tuples(st.sampled_from(KEYS), st.none() | st.binary(max_size=2)), min_size=1, max_size=20
)
instants = st.integers(0, 230)

Version = tuple[int, bytes, bytes | None]


def build(
    history: list[tuple[bytes, bytes | None]],
) -> tuple[MemoryRows, dict[bytes, list[Version]]]:
    """Each write commits alone, at 10, 20, 30 ..., through apply; and the same as lists."""
    rows, expected = MemoryRows(), dict[bytes, list[Version]]()
    state = RangeState(RangeRow(1, b"", b"", 1, 1, 0, 0))
    for number, (key, value) in enumerate(history, start=1):
        overlay = Overlay(rows)
        commit = Commit(txn_id(number), key, number * 10, [key], [value])
        apply_batch(state, overlay, Batch(0, 1, [commit]))
        rows.write(overlay.rows)
        expected.setdefault(key, []).append((number * 10, txn_id(number), value))
    return rows, expected


def newest(versions: list[Version], at: int) -> Version | None:
    return max((version for version in versions if version[0] <= at), default=None)


@given(writes, instants)
def test_a_read_gives_the_newest_version_at_or_below_its_timestamp(history, at):
    rows, expected = build(history)
    for key in KEYS:
        assert read_at(rows, key, at) == newest(expected.get(key, []), at)


@given(writes, instants)
def test_the_look_up_behind_the_newest_version_finds_only_older_ones(history, at):
    rows, expected = build(history)
    for key, versions in expected.items():
        assert older_at(rows, key, at) == newest(versions[:-1], at)


@given(
    writes, instants, st.sampled_from([b"", *KEYS]), st.sampled_from([b"", *KEYS]), st.booleans()
)
def test_a_scan_gives_the_live_rows_in_order(history, at, start, end, reverse):
    rows, expected = build(history)
    if end and end < start:
        start, end = end, start
    wanted = []
    for key in sorted(expected, reverse=reverse):
        version = newest(expected[key], at)
        if key >= start and (not end or key < end) and version and version[2] is not None:
            wanted.append((key, version))
    assert list(scan_at(rows, start, end, at, reverse=reverse)) == wanted


@given(writes, st.integers(1, 25), instants)
def test_a_transaction_is_found_by_its_version_unless_that_is_too_old(history, number, above):
    rows, expected = build(history)
    for key in KEYS:
        found = find_txn(rows, key, txn_id(number), rows.get(b"L" + key), above)
        there = [ts for ts, owner, _ in expected.get(key, []) if owner == txn_id(number)]
        if there and (there[0] > above or there[0] == expected[key][-1][0]):
            assert found == there[0]
        else:
            assert found == 0


@given(instants, st.binary(min_size=16, max_size=16), st.none() | st.binary(max_size=4))
def test_a_row_decodes_to_what_was_encoded(ts, owner, value):
    assert decode_latest(encode_latest(ts, owner, value)) == (ts, owner, value)


def test_an_empty_value_is_not_a_tombstone():
    rows, _ = build([(b"a", b"")])
    version = read_at(rows, b"a", 99)
    assert version is not None
    assert version.value == b""
