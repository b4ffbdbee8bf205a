"""Claims: a node's identity survives being written and read; what is damaged, older or newer is refused with what to do;
and the first rows of a cluster are the same on every node that holds a replica of the same range."""

from __future__ import annotations

import msgspec
import pytest

from kvstore import identity, starting
from kvstore.adapters.memory_engine import MemoryDirectory, MemoryEngine
from kvstore.bootstrap import META_RANGE_ID, mint_cluster_id, plan
from kvstore.errors import DataDirectoryError, VersionMismatch
from txn import keycode, mvcc
from txn.state import decode_range_row, encode_row

ADDRESSES = ["h1:1", "h2:2", "h3:3"]


def requests():
    cluster = mint_cluster_id(1_700_000_000_000, 7, ADDRESSES, [b"m"])
    return plan(cluster, ADDRESSES, [b"m"])


FILE = identity.encode_identity(identity.identity_of(requests()[0]))


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
        FILE.replace(b"format = 2", b"format = 0"),
        FILE.replace(b"format = 2", b"format = -1"),
        FILE.replace(b"format = 2", b"format = true"),
        FILE.replace(b"format = 2", b'format = "2"'),
        FILE.replace(b"format = 2\n", b""),
        FILE.replace(b"\nnode_id = 1\n", b"\nnode_id = 4\n", 1),
        FILE.replace(b"\nnode_id = 2\n", b"\nnode_id = 3\n"),
    ],
)
def test_a_damaged_identity_is_refused(text):
    with pytest.raises(DataDirectoryError, match="damaged"):
        identity.decode_identity(text)


@pytest.mark.parametrize(("other", "age"), [(1, "an older"), (3, "a newer")])
def test_another_format_is_refused_and_says_whose_it_is(other, age):
    told = (
        f"format {other}, of {age} version of Kvorum; this one reads 2: start it with that version"
    )
    with pytest.raises(VersionMismatch, match=told):
        identity.decode_identity(FILE.replace(b"format = 2", b"format = %d" % other))
    with pytest.raises(VersionMismatch, match=told):  # whatever else is in it
        identity.decode_identity(b"format = %d\n" % other)


@pytest.mark.parametrize("number", [0, 2])
def test_every_cut_of_the_file_is_refused(number):
    """Behind a table it is a file like any other: the ranges know who is missing."""
    request = requests()[number]
    data = identity.encode_identity(identity.identity_of(request))
    engine = MemoryEngine(MemoryDirectory())
    engine.write(identity.first_rows(request))
    assert len(starting.ranges_of(engine, identity.decode_identity(data))) == 4
    for end in range(len(data) - 1):  # the last byte ends the line
        with pytest.raises(DataDirectoryError):
            starting.ranges_of(engine, identity.decode_identity(data[:end]))


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


def changed(row, **fields):
    return encode_row(msgspec.structs.replace(decode_range_row(row), **fields))


def test_rows_of_a_beginning_are_told_from_those_of_a_member():
    rows = {k: data for k, data in identity.first_rows(requests()[0]).items() if data is not None}
    assert identity.left_by_init(rows.items())
    assert identity.left_by_init([])
    key = next(each for each in rows if each.startswith(keycode.RANGE))
    user = keycode.latest_row(b"k")
    for more in (
        {key: changed(rows[key], applied_index=2)},
        {key: changed(rows[key], installing=True)},
        {user: mvcc.encode_latest(5, bytes(16), b"v")},
        {keycode.history_row(b"k", 4): bytes(17)},
        {b"precious": b"1"},
        {keycode.RANGE + bytes(8): b"\xff\xff"},
    ):
        assert not identity.left_by_init({**rows, **more}.items())
