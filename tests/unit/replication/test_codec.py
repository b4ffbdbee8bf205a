"""Claims of replication/codec.py: every message survives the wire, and what does not decode is a FrameError."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.codec import (
    decode_membership,
    decode_messages,
    encode_membership,
    encode_messages,
)
from replication.errors import FrameError
from replication.messages import (
    AppendRequest,
    AppendResponse,
    Heartbeat,
    HeartbeatResponse,
    InstallSnapshot,
    Message,
    SteppedDown,
    TimeoutNow,
    VoteRequest,
    VoteResponse,
)
from replication.types import Entry, SnapshotMeta
from tests.scripts.raft_cluster import plain

ONE_OF_EACH: list[Message] = [
    VoteRequest(7, 2, 1, 3, 9, 2, True, True),
    VoteResponse(7, 2, 1, 3, True, False),
    AppendRequest(7, 2, 1, 3, 9, 2, [Entry(10, 3, 0, b"\x00\xff")], 8, 4),
    AppendResponse(7, 2, 1, 3, False, 0, 4, 8, 2, 9),
    Heartbeat(7, 2, 1, 3, 8, 4),
    HeartbeatResponse(7, 2, 1, 3, 4, 9),
    TimeoutNow(7, 2, 1, 3),
    SteppedDown(7, 2, 1, 3),
    InstallSnapshot(7, 2, 1, 3, SnapshotMeta(9, 2, plain([1, 2], [3]))),
]


def test_every_message_survives_the_wire():
    assert decode_messages(encode_messages(ONE_OF_EACH)) == ONE_OF_EACH


def test_a_membership_survives_the_wire():
    assert decode_membership(encode_membership(plain([1, 2], [5]))) == plain([1, 2], [5])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        encode_messages(ONE_OF_EACH)[:-1],
        encode_messages(ONE_OF_EACH) + b"\x00",
        msgspec.msgpack.encode([[99, 1, 2]]),
        msgspec.msgpack.encode([[7, "group", 2, 1, 3]]),
        b"\x91" * 100_000,
    ],
)
def test_what_does_not_decode_is_a_frame_error(data):
    with pytest.raises(FrameError):
        decode_messages(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        encode_membership(plain([1, 2]))[:-1],
        encode_membership(plain([1, 2])) + b"\x00",
        msgspec.msgpack.encode([[1, "two"]]),
        b"\x91" * 100_000,
    ],
)
def test_what_is_no_membership_is_a_frame_error(data):
    with pytest.raises(FrameError):
        decode_membership(data)


@given(st.binary(max_size=60))
def test_random_bytes_decode_or_are_a_frame_error(data):
    for decode in (decode_messages, decode_membership):
        try:
            decode(data)
        except FrameError:
            pass


def test_a_field_that_a_later_version_appends_is_passed_over():
    longer = msgspec.msgpack.encode([[7, 7, 2, 1, 3, "new"]])
    assert decode_messages(longer) == [TimeoutNow(7, 2, 1, 3)]
