"""Claims S1 to S3: the copy in memory is what the rows say, at most one intent per key, look-ups answer like plain lists."""

from __future__ import annotations

import random

import pytest

from tests.stateful.txn_ranges import mirror_of
from tests.unit.txn.txn_driver import Range, txn_id
from txn.commands import Commit, Decide, FencePart, PreparePart, ResolvePart
from txn.state import Part, PreparedRow, RangeRow, RangeState
from txn.types import Guard, Participant, point_end

KEYS = [b"a", b"a\x00", b"b", b"c", b"d"]


def part(number: int, keys: list[bytes], guards: list[Guard]) -> Part:
    row = PreparedRow(b"z", 10 + number, 1, keys, [b"v"] * len(keys), guards)
    return Part(keys[0] if keys else b"", txn_id(number), row)


def empty(start: bytes = b"", end: bytes = b"") -> RangeState:
    return RangeState(RangeRow(1, start, end, 1, 1, 0, 0))


def test_a_key_has_one_intent_at_most():
    state = empty()
    state.add_part(part(1, [b"a"], []))
    with pytest.raises(AssertionError, match="I10"):
        state.add_part(part(2, [b"a"], []))


@pytest.mark.parametrize(
    ("start", "end", "key", "owned"),
    [
        (b"b", b"d", b"b", True),
        (b"b", b"d", b"d", False),
        (b"b", b"d", b"a\xff", False),
        (b"b", b"", b"\xff", True),
    ],
)
def test_a_range_owns_the_keys_from_its_start_up_to_its_end(start, end, key, owned):
    assert empty(start, end).owns(key) == owned


@pytest.mark.parametrize(
    ("span", "owned"),
    [
        ((b"b", b"d"), True),
        ((b"c", b"cc"), True),
        ((b"b", b"d\x00"), False),
        ((b"a", b"c"), False),
        ((b"c", b""), False),
    ],
)
def test_a_range_owns_the_spans_that_lie_inside_it(span, owned):
    assert empty(b"b", b"d").owns_span(*span) == owned


def test_the_last_range_owns_spans_without_an_end():
    assert empty(b"b").owns_span(b"c", b"")


@pytest.mark.parametrize("seed", range(20))
def test_guards_and_intents_are_found_as_in_plain_lists_and_leave_nothing_behind(seed):
    rng = random.Random(seed)
    state, parts = empty(), list[Part]()
    for number in range(1, 60):
        start, end = sorted(rng.sample(KEYS, 2))
        own = txn_id(rng.randint(1, 60))
        foreign = [p for p in parts if p.txn_id != own]
        key = rng.choice(KEYS)
        wanted = any(g.start <= key < g.end for p in foreign for g in p.row.guards)
        assert (state.foreign_guard(key, own) is not None) == wanted
        wanted = any(g.start < end and start < g.end for p in foreign for g in p.row.guards)
        assert (state.foreign_guard_in(start, end, own) is not None) == wanted
        inside = sorted((k, p.txn_id) for p in parts for k in p.row.keys if start <= k < end)
        assert sorted((k, p.txn_id) for k, p in state.intents_in(start, end)) == inside
        if parts and rng.random() < 0.4:
            state.remove_part(parts.pop(rng.randrange(len(parts))))
            continue
        keys = [k for k in rng.sample(KEYS, 2) if k not in state.intents]
        guards = [Guard(start, rng.choice([end, point_end(start)]), 5)] * rng.randint(0, 2)
        new = part(number, keys, guards)
        state.add_part(new)
        parts.append(new)
    for left in parts:
        state.remove_part(left)
    assert mirror_of(state) == mirror_of(empty())


@pytest.mark.parametrize("seed", range(20))
def test_what_is_loaded_is_what_was_kept(seed):
    rng = random.Random(seed)
    place = Range()
    for number in range(1, 30):
        key = rng.choice(KEYS)
        if key in place.state.intents:
            held = place.state.intents[key]
            if held.txn_id in place.state.staged:
                place.apply([Decide(held.txn_id, held.locus, rng.choice([0, number * 10]))])
            else:
                commit_ts = rng.choice([0, number * 10])
                place.apply([ResolvePart(held.txn_id, b"zz", held.locus, commit_ts, False)])
        elif rng.random() < 0.2:
            place.apply([FencePart(txn_id(number), key, b"zz", 1)])
        elif rng.random() < 0.2:
            place.apply([Commit(txn_id(number), key, number * 10, [key], [b"v"])])
        else:
            everybody = [Participant(k, k, point_end(k)) for k in (key, b"y")]
            staged = rng.random() < 0.5
            guards = [Guard(b"m", b"n", 3), Guard(b"m", point_end(b"m"), 3)]
            place.apply(
                [
                    PreparePart(
                        txn_id(number),
                        key,
                        key if staged else b"zz",
                        number * 10 - 5,
                        1,
                        [key],
                        [b"v"],
                        guards[: rng.randint(0, 2)],
                        everybody if staged else [],
                    )
                ]
            )
    loaded = RangeState(place.state.row)
    loaded.load(place.rows)
    assert mirror_of(loaded) == mirror_of(place.state)


def test_a_part_forgets_what_an_earlier_leader_was_promised():
    held = part(1, [b"a"], [])
    held.invisible_to, held.resolving = 99, object()
    held.forget_volatile()
    assert (held.invisible_to, held.resolving) == (0, None)
