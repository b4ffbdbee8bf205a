"""Claims of a client's connection: its answers of one turn leave in messages that the stream takes, in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from kvstore.connections import REPLIES, ClientConnection, Connections
from kvstore.limits import KEY_BYTES_MAX, MESSAGE_BYTES_MAX, MIB
from txn.messages import (
    FAST_BYTES_MAX,
    Changed,
    Failure,
    PrepareReply,
    ReadReply,
    Reply,
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

    def __init__(self) -> None:
        self.messages: list[bytes] = []

    def send(self, payload: bytes) -> bool:
        self.messages.append(payload)
        return True


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
    untyped: Any = stream
    store: Any = None
    connection = ClientConnection(Connections(), store, untyped)
    for number in range(1, count + 1):
        connection.answer(reply(number))
    connection.flush()
    assert max(map(len, stream.messages)) <= MESSAGE_BYTES_MAX
    answers = [each for message in stream.messages for each in decode(message[len(REPLIES) :])]
    assert [each.id for each in answers] == list(range(1, count + 1))


def test_an_answer_too_large_for_any_message_is_an_error_of_its_request_alone():
    """The stream would refuse it, and that would end the node."""
    stream = LastingStream()
    untyped: Any = stream
    store: Any = None
    connection = ClientConnection(Connections(), store, untyped)
    connection.answer(PrepareReply(1, PartStatus.COMMITTED, 9))
    connection.answer(ReadReply(2, 1, [VERSION], [bytes(MESSAGE_BYTES_MAX)]))
    connection.answer(PrepareReply(3, PartStatus.COMMITTED, 9))
    connection.flush()
    answers = [each for message in stream.messages for each in decode(message[len(REPLIES) :])]
    found = {each.id: each for each in answers}
    assert isinstance(found[2], Failure)
    assert found[2].code == "internal_error"
    assert {number for number, each in found.items() if isinstance(each, PrepareReply)} == {1, 3}
