"""Claims: a node's identity survives being written and read; what is damaged or newer is refused with what to do about it;
and the first rows of a cluster are the same on every node that holds a replica of the same range."""

from __future__ import annotations

import pytest

from kvstore import identity
from kvstore.bootstrap import META_RANGE_ID, mint_cluster_id, plan
from kvstore.errors import DataDirectoryError, VersionMismatch
from txn import keycode, mvcc
from txn.state import decode_range_row

ADDRESSES = ["h1:1", "h2:2", "h3:3"]


def requests():
    cluster = mint_cluster_id(1_700_000_000_000, 7, ADDRESSES, [b"m"])
    return plan(cluster, ADDRESSES, [b"m"])


def test_an_identity_is_read_back_as_it_was_written():
    found = identity.identity_of(requests()[1])
    assert identity.decode_identity(identity.encode_identity(found)) == found
    assert found.node_id == 2


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"format = ",
        b"format = 2\ncluster_id = 5\n",
        b'format = 2\nnode_id = "x"\n',
    ],
)
def test_a_damaged_identity_is_refused(text):
    with pytest.raises(DataDirectoryError, match="damaged"):
        identity.decode_identity(text)


def test_another_format_is_refused_and_says_so():
    data = identity.encode_identity(identity.identity_of(requests()[0]))
    for other in (1, 3):
        changed = data.replace(b"format = 2", b"format = %d" % other)
        with pytest.raises(
            VersionMismatch, match=f"format {other}, this version of Kvorum reads 2"
        ):
            identity.decode_identity(changed)


def test_replicas_of_a_range_begin_with_equal_rows():
    first, second, third = (identity.first_rows(request) for request in requests())
    for family in (keycode.RANGE, keycode.LATEST, keycode.ORACLE):
        rows = [
            {key: data for key, data in each.items() if key.startswith(family)}
            for each in (first, second, third)
        ]
        assert rows[0] == rows[1] == rows[2]
        assert rows[0]


def test_every_range_begins_at_the_creation_index_and_the_meta_range_knows_all():
    rows = identity.first_rows(requests()[0])
    ranges = [
        decode_range_row(data)
        for key, data in rows.items()
        if key.startswith(keycode.RANGE) and data is not None
    ]
    assert {(each.applied_index, each.applied_term) for each in ranges} == {identity.CREATION}
    assert META_RANGE_ID in {each.range_id for each in ranges}
    registry = [key for key in rows if key.startswith(keycode.LATEST + identity.NODE_KEY)]
    directory = [key for key in rows if key.startswith(keycode.LATEST + identity.RANGE_KEY)]
    assert len(registry) == len(ADDRESSES)
    assert len(directory) == len(ranges)
    data = rows[registry[0]]
    assert data is not None
    assert mvcc.decode_latest(data).commit_ts == identity.CREATION_TS
