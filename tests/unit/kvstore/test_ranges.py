"""Claims of the range cache: it answers by the newest report for each key, never from two versions at once, and a hole
means "unknown". A dict of keys judges it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore.ranges import RangeCache, Route
from txn.messages import RangeInfo


def info(
    number: int, start: bytes, end: bytes, version: int = 1, leader: int = 1, conf_ver: int = 1
) -> RangeInfo:
    return RangeInfo(number, start, end, version, conf_ver, [(1, 11), (2, 12), (3, 13)], leader)


def found(cache: RangeCache, key: bytes) -> int:
    route = cache.find(key)
    return route.range_id if route else 0


def test_a_key_belongs_to_the_range_that_begins_at_or_before_it():
    cache = RangeCache()
    cache.update([info(1, b"", b"g"), info(2, b"g", b"p"), info(3, b"p", b"")])
    assert [found(cache, key) for key in (b"a", b"f\xff", b"g", b"o", b"p", b"\xff\xff")] == [
        1, 1, 2, 2, 3, 3,
    ]  # fmt: skip


def test_what_nobody_reported_is_a_hole():
    cache = RangeCache()
    cache.update([info(2, b"g", b"p")])
    assert cache.find(b"a") is None
    assert cache.find(b"p") is None
    assert cache.split(b"a", b"h") is None
    assert cache.before(b"a") is None
    assert cache.before(b"z") is None


def test_a_cache_without_a_hole_is_whole():
    cache = RangeCache()
    assert not cache.whole()
    for each, whole in [
        (info(1, b"", b"g"), False),
        (info(3, b"p", b""), False),
        (info(2, b"g", b"p"), True),
    ]:
        cache.update([each])
        assert cache.whole() is whole


def test_a_split_is_learned_from_either_child():
    cache = RangeCache()
    cache.update([info(1, b"", b"")])
    cache.update([info(2, b"m", b"", version=2)])
    assert found(cache, b"z") == 2
    assert cache.find(b"a") is None  # the old range is gone; the left child is not known yet
    cache.update([info(1, b"", b"m", version=2)])
    assert found(cache, b"a") == 1


def test_a_stale_report_is_dropped_whole():
    cache = RangeCache()
    cache.update([info(1, b"", b"m", version=2), info(2, b"m", b"", version=2)])
    cache.update([info(1, b"", b"", version=1)])
    assert (found(cache, b"a"), found(cache, b"z")) == (1, 2)


def test_a_merge_replaces_both_sides():
    cache = RangeCache()
    cache.update([info(1, b"", b"m", version=2), info(2, b"m", b"", version=2)])
    cache.update([info(1, b"", b"", version=3)])
    assert (found(cache, b"a"), found(cache, b"z"), len(cache)) == (1, 1, 1)


def test_the_same_version_may_bring_a_new_leader_and_new_replicas():
    cache = RangeCache()
    cache.update([info(1, b"", b"")])
    route = cache.find(b"a")
    assert route is not None
    cache.update([RangeInfo(1, b"", b"", 1, 2, [(4, 41)], 4)])
    assert (route.leader, route.nodes) == (4, (4,))
    cache.update([RangeInfo(1, b"", b"", 1, 1, [(1, 11)], 0)])  # an older configuration
    assert (route.leader, route.nodes) == (4, (4,))


def test_spans_are_cut_at_range_boundaries():
    cache = RangeCache()
    cache.update([info(1, b"", b"g"), info(2, b"g", b"p"), info(3, b"p", b"")])
    pieces = cache.split(b"c", b"q")
    assert pieces is not None
    assert [(piece.start, piece.end, piece.route.range_id) for piece in pieces] == [
        (b"c", b"g", 1),
        (b"g", b"p", 2),
        (b"p", b"q", 3),
    ]
    assert cache.split(b"q", b"q") == []


def test_the_range_before_a_bound_holds_the_keys_just_below_it():
    cache = RangeCache()
    cache.update([info(1, b"", b"g"), info(2, b"g", b"")])
    assert [getattr(cache.before(bound), "range_id", 0) for bound in (b"g", b"g\x00", b"\xff")] == [
        1, 2, 2,
    ]  # fmt: skip


def test_the_next_replica_is_tried_in_turn():
    route = Route(info(1, b"", b""))
    assert [route.after(node) for node in (1, 2, 3, 9)] == [2, 3, 1, 1]
    assert Route(RangeInfo(1, b"", b"", 1, 1, [], 0)).after(1) == 0


KEYS = [bytes([letter]) for letter in b"abcdefgh"]


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 8), st.integers(1, 4)), max_size=12))
def test_reports_in_any_order_leave_the_newest(reports: list[tuple[int, int, int]]):
    """Against a dict of keys: a report is taken if nothing it overlaps is newer; then it replaces all of that."""
    cache = RangeCache()
    model: dict[bytes, tuple[int, int]] = {}  # key -> (range id, version)
    for number, (low, size, version) in enumerate(reports, 1):
        keys = KEYS[low : low + size]
        end = KEYS[low + size] if low + size < len(KEYS) else b""
        cache.update([info(number, KEYS[low], end, version)])
        overlapped = {model[key][0] for key in keys if key in model}
        if any(known[1] > version for known in model.values() if known[0] in overlapped):
            continue
        model = {key: known for key, known in model.items() if known[0] not in overlapped}
        model.update(dict.fromkeys(keys, (number, version)))
    for key in KEYS:
        assert found(cache, key) == model.get(key, (0, 0))[0]
