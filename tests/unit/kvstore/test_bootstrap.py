"""Minting a cluster: the plan covers the key space once, spreads its replicas, and can be made again from its id."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import bootstrap
from kvstore.errors import InvalidArgument, KeyTooLarge
from kvstore.identity import first_rows
from kvstore.limits import MESSAGE_BYTES_MAX
from txn.messages import Directory, RangeInfo

THREE = ["a:1", "b:2", "c:3"]
CREATED_MS = 1_700_000_000_123

split_keys = st.lists(
    st.binary(min_size=1, max_size=6).filter(lambda key: key < b"\xff"), max_size=8, unique=True
)


def planned(addresses=THREE, splits=(), replicas=3):
    cluster_id = bootstrap.mint_cluster_id(CREATED_MS, 7, addresses, splits, replicas)
    return bootstrap.plan(cluster_id, addresses, splits, replicas)


def test_without_splits_there_are_the_meta_range_the_users_and_the_rest_of_the_systems():
    ranges = planned()[0].ranges
    assert [(each.range_id, each.start, each.end) for each in ranges] == [
        (1, b"\xff\x00", b"\xff\x01"),
        (2, b"", b"\xff\x00"),
        (3, b"\xff\x01", b""),
    ]


def test_split_keys_cut_the_users_keys_in_order():
    ranges = planned(splits=[b"t", b"g"])[0].ranges
    spans = [(each.start, each.end) for each in ranges[1:]]
    assert spans == [(b"", b"g"), (b"g", b"t"), (b"t", b"\xff\x00"), (b"\xff\x01", b"")]


@given(split_keys, st.integers(1, 7), st.integers(1, 5))
@settings(max_examples=100, derandomize=True, deadline=None)
def test_every_plan_covers_all_keys_once_with_replicas_on_different_nodes(splits, nodes, replicas):
    addresses = [f"host{number}:7400" for number in range(nodes)]
    requests = planned(addresses, splits, replicas)
    assert [request.your_node_id for request in requests] == list(range(1, nodes + 1))
    ordered = sorted(requests[0].ranges, key=lambda each: each.start)
    assert ordered[0].start == b""
    assert ordered[-1].end == b""
    assert all(one.end == two.start for one, two in itertools.pairwise(ordered))
    for each in ordered:
        assert [replica for _, replica in each.replicas] == list(range(1, min(nodes, replicas) + 1))
        assert len({node for node, _ in each.replicas}) == len(each.replicas)
    for request in requests:
        bootstrap.check(request)


def test_the_first_replicas_are_spread_evenly_over_the_nodes():
    ranges = planned(splits=[b"b", b"c", b"d", b"e"])[0].ranges
    firsts = [each.replicas[0][0] for each in ranges]
    assert firsts == [1, 2, 3, 1, 2, 3, 1]


def test_fewer_nodes_than_replicas_give_one_replica_on_each():
    assert all(len(each.replicas) == 2 for each in planned(["a:1", "b:2"])[0].ranges)


def test_the_same_id_gives_the_same_plan_again():
    assert planned(splits=[b"m"]) == planned(splits=[b"m"])


def test_the_id_tells_when_it_was_minted_and_differs_by_its_random_bits():
    one, two = (bootstrap.mint_cluster_id(CREATED_MS, bits, THREE, []) for bits in (1, 2))
    assert one != two
    assert bootstrap.created_ms_of(one) == CREATED_MS
    assert planned()[0].created_ms == CREATED_MS


@pytest.mark.parametrize(
    ("addresses", "splits", "replicas"),
    [
        (["b:2", "a:1", "c:3"], [b"m"], 3),
        (THREE[:2], [b"m"], 3),
        (THREE, [], 3),
        (THREE, [b"n"], 3),
        (THREE, [b"m"], 1),
    ],
)
def test_other_arguments_than_the_first_time_are_noticed(addresses, splits, replicas):
    cluster_id = bootstrap.mint_cluster_id(CREATED_MS, 7, THREE, [b"m"], 3)
    assert bootstrap.belongs(cluster_id, THREE, [b"m"], 3)
    assert not bootstrap.belongs(cluster_id, addresses, splits, replicas)


def test_the_order_of_split_keys_does_not_matter():
    cluster_id = bootstrap.mint_cluster_id(CREATED_MS, 7, THREE, [b"m", b"c"])
    assert bootstrap.belongs(cluster_id, THREE, [b"c", b"m"])


def test_a_request_survives_json_with_bytes_that_are_no_text():
    request = planned(splits=[b"\x00\xfe"])[1]
    assert msgspec.json.decode(msgspec.json.encode(request), type=bootstrap.InitRequest) == request


@pytest.mark.parametrize("splits", [[b""], [b"\xff"], [b"\xff\x00"], [b"a", b"a"], [b"x" * 4097]])
def test_bad_split_keys_are_refused(splits):
    with pytest.raises(InvalidArgument):
        planned(splits=splits)


def test_a_split_key_that_is_too_long_says_so():
    with pytest.raises(KeyTooLarge):
        planned(splits=[b"x" * 4097])


def directory_of(request):
    ranges = [
        RangeInfo(each.range_id, each.start, each.end, 1 << 63, 1 << 63, list(each.replicas), 1_000)
        for each in request.ranges
    ]
    nodes = [(node.node_id, node.address) for node in request.nodes]
    return Directory(1 << 63, request.cluster_id, 1_000, ranges, nodes)


@pytest.mark.parametrize("key_bytes", [4, 4_000])
def test_the_directory_of_the_most_and_longest_split_keys_fits_a_message(key_bytes):
    """Nodes answer with it whole: were it larger, no client could learn the ranges, and the cluster be of no use."""
    most = 10_000 if key_bytes == 4 else 515
    splits = [b"%04d" % number + bytes(key_bytes - 4) for number in range(most)]
    answer = msgspec.msgpack.encode(directory_of(planned(splits=splits)[0]))
    assert len(answer) < bootstrap.DIRECTORY_BYTES_MAX <= MESSAGE_BYTES_MAX / 2


def test_split_keys_that_no_directory_could_name_are_refused():
    splits = [b"%04d" % number + bytes(4_000) for number in range(530)]
    with pytest.raises(InvalidArgument, match="fewer or shorter split keys"):
        planned(splits=splits)


def test_replicas_that_no_directory_could_name_are_refused():
    addresses = [f"h{number}:1" for number in range(300)]
    splits = [b"%04d" % number for number in range(1_000)]
    with pytest.raises(InvalidArgument, match="bytes to name"):
        bootstrap.plan(
            bootstrap.mint_cluster_id(1, 2, addresses, splits, 300), addresses, splits, 300
        )


@pytest.mark.parametrize(
    "addresses", [[], ["a:1", "a:1"], ["a"], ["a:"], [":1"], ["a:0"], ["a:70000"], ["::1:7400"]]
)
def test_bad_addresses_are_refused(addresses):
    with pytest.raises(InvalidArgument):
        planned(addresses)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("db.example:7400", ("db.example", 7400)), ("[::1]:7400", ("::1", 7400)), (" h:0 ", ("h", 0))],
)
def test_addresses_are_host_and_port(text, parsed):
    assert bootstrap.parse_address(text) == parsed


@pytest.mark.parametrize(
    "text", ["", "7400", "a:b", "http://a:1", "a:-1", "a:1 2", "a:¹", 'a":1', "a\\:1", "a\n:1"]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(InvalidArgument):
        bootstrap.parse_address(text)


def test_a_list_of_addresses_may_have_spaces_and_a_comma_at_its_end():
    assert bootstrap.parse_addresses("a:1, b:2,") == ["a:1", "b:2"]


def damaged(**changes):
    return msgspec.structs.replace(planned(splits=[b"m"])[0], **changes)


def ranges_with(index, **changes):
    ranges = list(planned(splits=[b"m"])[0].ranges)
    ranges[index] = msgspec.structs.replace(ranges[index], **changes)
    return tuple(ranges)


@pytest.mark.parametrize(
    "request_",
    [
        damaged(your_node_id=4),
        damaged(nodes=()),
        damaged(nodes=tuple(bootstrap.NodePlan(n, f'h{n}":1') for n in (1, 2, 3))),
        damaged(nodes=tuple(bootstrap.NodePlan(n, f"h{n}:1 ") for n in (1, 2, 3))),
        damaged(nodes=tuple(bootstrap.NodePlan(n, "h:1") for n in (1, 2, 3))),
        damaged(nodes=tuple(bootstrap.NodePlan(n, f"h{n}:0") for n in (1, 2, 3))),
        damaged(cluster_id="x"),
        damaged(cluster_id="../" + "0" * 29),
        damaged(ranges=()),
        damaged(ranges=planned()[0].ranges[:2]),
        damaged(ranges=ranges_with(1, end=b"n")),
        damaged(ranges=ranges_with(1, end=b"k")),
        damaged(ranges=ranges_with(1, end=b"")),
        damaged(ranges=ranges_with(1, range_id=1)),
        damaged(ranges=ranges_with(0, range_id=9)),
        damaged(ranges=ranges_with(1, replicas=())),
        damaged(ranges=ranges_with(1, replicas=((1, 1), (1, 2)))),
        damaged(ranges=ranges_with(1, replicas=((1, 1), (2, 1)))),
        damaged(ranges=ranges_with(1, replicas=((1, 0),))),
        damaged(ranges=ranges_with(1, replicas=((9, 1),))),
        damaged(created_ms=-1),
        damaged(created_ms=1 << 46),
        damaged(ranges=ranges_with(1, range_id=1 << 70)),
        damaged(ranges=ranges_with(1, range_id=1 << 53)),
        damaged(ranges=ranges_with(1, replicas=((1, 1 << 70),))),
        damaged(nodes=(bootstrap.NodePlan(1, "h1:1"), bootstrap.NodePlan(1 << 70, "h2:1"))),
        damaged(ranges=(*planned()[0].ranges, bootstrap.RangePlan(9, b"", b"", ((1, 1),)))),
    ],
)
def test_a_node_refuses_a_plan_that_is_not_whole(request_):
    with pytest.raises(InvalidArgument):
        bootstrap.check(request_)


def test_what_a_node_takes_its_first_rows_can_hold():
    most = bootstrap.ID_MAX
    meta, *others = (
        msgspec.structs.replace(each, replicas=((most, most),))
        for each in planned(splits=[b"m"])[0].ranges
    )
    others = [
        msgspec.structs.replace(each, range_id=most - place) for place, each in enumerate(others)
    ]
    request_ = damaged(
        created_ms=bootstrap.CREATED_MS_MAX,
        nodes=(bootstrap.NodePlan(most, "h1:1"),),
        ranges=(meta, *others),
        your_node_id=most,
    )
    bootstrap.check(request_)
    assert first_rows(request_)
