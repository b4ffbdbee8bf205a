"""Claims of a client's connection: its answers of one turn leave in messages that the stream takes, in order; of reads that
the stream has no room for, the largest are told Throttled, an answer to a write never is. And of what comes in: a message
holds no more requests than a client puts into one, and watches that wait are no requests in flight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from kvstore.connections import (
    REPLIES,
    REQUESTS,
    REQUESTS_PER_MESSAGE_MAX,
    ClientConnection,
    Connections,
)
from kvstore.limits import KEY_BYTES_MAX, MESSAGE_BYTES_MAX, MIB
from kvstore.links import REQUEST_OVERHEAD_BYTES
from kvstore.router import PAYLOAD_BYTES
from replication.errors import FrameError
from txn.changes import Polls
from txn.messages import (
    FAST_BYTES_MAX,
    Changed,
    Changes,
    Failure,
    GetDirectory,
    PrepareReply,
    ReadReply,
    Reply,
    Request,
    ScanReply,
    Validated,
)
from txn.types import PartStatus

KEYS = [b"%04d" % number + bytes(240) for number in range(1_000)]
VERSION = 1 << 62

decode = msgspec.msgpack.Decoder(list[Reply]).decode


class LastingStream:
    """Takes messages for ever."""

    is_open = True
    queue_bytes = 0
    room_bytes = 1 << 40

    def __init__(self) -> None:
        self.messages: list[bytes] = []

    def send(self, payload: bytes) -> bool:
        self.messages.append(payload)
        return True


class FillingStream:
    """Nothing is taken from its queue."""

    def __init__(self, room_bytes: int) -> None:
        self.is_open = True
        self.queue_bytes = 0
        self.room_bytes = room_bytes
        self.messages: list[bytes] = []

    def send(self, payload: bytes) -> bool:
        if not self.is_open or len(payload) > self.room_bytes:
            return False
        self.queue_bytes += len(payload)
        self.room_bytes -= len(payload)
        self.messages.append(payload)
        return True

    def abort(self) -> None:
        self.is_open = False


class AcceptingStore:
    """Notes what is given to it, and answers nothing."""

    def __init__(self) -> None:
        self.accepted: list[Request] = []
        self.polls = Polls()

    def accept(self, _asker: ClientConnection, requests: list[Request], _size_bytes: int) -> None:
        self.accepted += requests

    def wake(self) -> None:
        pass


def connected(
    stream: LastingStream | FillingStream, store: Any = None, requests_max: int = 100_000
) -> ClientConnection:
    untyped: Any = stream
    return ClientConnection(Connections(requests_max), store, untyped)


def message(requests: list[Request]) -> bytes:
    return bytes([REQUESTS]) + msgspec.msgpack.encode(requests)


def answers_on(stream: LastingStream | FillingStream) -> list[Reply]:
    return [each for message in stream.messages for each in decode(message[len(REPLIES) :])]


def value(number: int, size: int = MIB) -> ReadReply:
    return ReadReply(number, 1, [VERSION], [bytes(size)])


@pytest.mark.parametrize(
    ("count", "reply"),
    [
        (50, lambda number: ScanReply(number, 1, KEYS, [], [VERSION] * 1_000, True, b"")),
        (50, lambda number: ScanReply(number, 1, KEYS, [b"v"] * 1_000, [VERSION] * 1_000, True, b"")),
        (50, lambda number: Changed(number, 1, [VERSION] * 1_000, KEYS, [None] * 1_000)),
        (9, lambda number: ReadReply(number, 1, [VERSION] * 5, [bytes(MIB)] * (5 if number % 2 else 4))),
        (256, lambda number: ReadReply(number, 1, [VERSION] * 256, [bytes(200)] * 256)),
        (9_000, lambda number: PrepareReply(number, PartStatus.FENCED, 0, 1, bytes(KEY_BYTES_MAX))),
        (4_000, lambda number: Failure(number, "deadlock", "k" * KEY_BYTES_MAX)),
        (90, lambda number: PrepareReply(number, PartStatus.COMMITTED, 9, results=[bytes(MIB)])),
        (999, lambda number: Validated(number, False, bytes(FAST_BYTES_MAX))),
    ],
)  # fmt: skip
def test_the_answers_of_one_turn_are_cut_into_messages_that_the_stream_takes(
    count: int, reply: Callable[[int], Reply]
):
    stream = LastingStream()
    connection = connected(stream)
    for number in range(1, count + 1):
        connection.answer(reply(number))
    connection.flush()
    assert max(map(len, stream.messages)) <= MESSAGE_BYTES_MAX
    answers = answers_on(stream)
    assert [each.id for each in answers] == list(range(1, count + 1))


def test_an_answer_too_large_for_any_message_is_an_error_of_its_request_alone():
    """The stream would refuse it, and that would end the node."""
    stream = LastingStream()
    connection = connected(stream)
    connection.answer(PrepareReply(1, PartStatus.COMMITTED, 9))
    connection.answer(ReadReply(2, 1, [VERSION], [bytes(MESSAGE_BYTES_MAX)]))
    connection.answer(PrepareReply(3, PartStatus.COMMITTED, 9))
    connection.flush()
    answers = answers_on(stream)
    found = {each.id: each for each in answers}
    assert isinstance(found[2], Failure)
    assert found[2].code == "internal_error"
    assert {number for number, each in found.items() if isinstance(each, PrepareReply)} == {1, 3}


def test_reads_that_the_queue_has_no_room_for_are_throttled_and_all_else_is_answered():
    stream = FillingStream(32 * MIB)
    connection = connected(stream)
    for number in range(1, 41):
        connection.answer(value(number))
        connection.answer(PrepareReply(100 + number, PartStatus.COMMITTED, 9))
        connection.answer(value(200 + number, 100))
    connection.answer(ScanReply(300, 1, [b"k"], [bytes(MIB)], [VERSION], True, b""))
    connection.answer(Changed(301, 1, [VERSION], [b"k"], [bytes(MIB)]))
    connection.flush()
    assert stream.is_open
    found = {each.id: each for each in answers_on(stream)}
    assert sorted(found) == [*range(1, 41), *range(101, 141), *range(201, 241), 300, 301]
    failures = [each for each in found.values() if isinstance(each, Failure)]
    assert {each.code for each in failures} == {"throttled"}
    assert all(each.details["retry_after"] > 0 for each in failures)
    shed = {each.id for each in failures}
    assert shed >= {300, 301}
    assert shed <= {*range(20, 41), 300, 301}, (
        "most of the queue is used, and only large reads shed"
    )


def test_an_answer_to_a_write_has_room_after_any_number_of_turns_of_reads():
    stream = FillingStream(32 * MIB)
    connection = connected(stream)
    for turn in range(100):
        connection.answer(value(turn + 1, MIB - turn * 1_000))
        connection.answer(PrepareReply(1_000 + turn, PartStatus.COMMITTED, 9))
        connection.flush()
    assert stream.is_open
    found = {each.id: each for each in answers_on(stream)}
    assert all(isinstance(found[1_000 + turn], PrepareReply) for turn in range(100))


def test_from_an_empty_queue_an_answer_is_sent_however_little_room_there_is():
    stream = FillingStream(MIB + 1_000)
    connection = connected(stream)
    connection.answer(value(1))
    connection.flush()
    assert isinstance(answers_on(stream)[0], ReadReply)


def test_a_client_that_takes_nothing_at_all_is_cut_off():
    stream = FillingStream(4 * MIB)
    connection = connected(stream)
    for number in range(1, 10):
        connection.answer(PrepareReply(number, PartStatus.COMMITTED, 9, results=[bytes(MIB)]))
    connection.flush()
    assert not stream.is_open


# -- what comes in


def test_a_message_of_more_requests_than_any_client_sends_at_once_ends_its_stream_unread():
    store = AcceptingStore()
    connection = connected(LastingStream(), store)
    requests: list[Request] = [GetDirectory(1)] * REQUESTS_PER_MESSAGE_MAX
    connection.on_message(message(requests))
    assert len(store.accepted) == REQUESTS_PER_MESSAGE_MAX
    with pytest.raises(FrameError, match="length <= 16384"):
        connection.on_message(message([*requests, GetDirectory(1)]))
    assert len(store.accepted) == REQUESTS_PER_MESSAGE_MAX


def test_our_client_cuts_its_messages_before_they_hold_too_many_requests():
    assert PAYLOAD_BYTES // REQUEST_OVERHEAD_BYTES + 1 < REQUESTS_PER_MESSAGE_MAX


def test_polls_leave_a_connection_its_requests():
    """A thousand watches of ten ranges wait with ten thousand polls: all that a connection may have in flight."""
    store, stream = AcceptingStore(), LastingStream()
    connection = connected(stream, store, requests_max=10)
    polls: list[Request] = [Changes(number, 0, 0, 1, b"", b"", 1, 1) for number in range(1, 11)]
    connection.on_message(message(polls))
    for _ in polls:
        store.polls.began(connection)  # they wait at their ranges
    requests: list[Request] = [GetDirectory(number) for number in range(11, 22)]
    connection.on_message(message(requests))
    assert store.accepted == [*polls, *requests[:-1]]
    connection.flush()
    assert [each.id for each in answers_on(stream)] == [21]
    for number in range(1, 12):  # all polls are answered, and one of the requests
        if number <= 10:
            store.polls.ended(connection)
        connection.answer(Failure(number, "unavailable"))
    connection.on_message(message(requests[:2]))
    assert len(store.accepted) == 21
    assert store.polls.of(connection) == 0
