"""Requests and answers as the payloads of messages, none of them larger than a stream takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec

from kvstore.errors import InvalidArgument, KVError, TransactionTooLarge
from kvstore.limits import MESSAGE_BYTES_MAX
from replication.errors import FrameError
from txn.messages import Reply

_REPLIES: Final = 3  # the first byte of a message of replies

_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(list[Reply]).decode


def payloads(
    kind: bytes, messages: list[Any], refuse: Callable[[Any, KVError], None]
) -> Iterator[bytes]:
    """Nearly always one; several, should it come out too large: whoever gathers `messages` knows their sizes only about.

    Limits and checks keep one message alone small and plain enough. One that is not nevertheless is handed to `refuse`, and
    not sent: the stream would not take it, and whatever waits behind it would never leave.
    """
    error: KVError = TransactionTooLarge("too large for one message")
    payload = None
    try:
        payload = kind + _encode(messages)
    except (TypeError, ValueError, OverflowError, RecursionError) as reason:
        error = InvalidArgument(f"it cannot be sent: {reason}")
    if payload is not None and len(payload) <= MESSAGE_BYTES_MAX:
        yield payload
    elif len(messages) == 1:
        refuse(messages[0], error)
    else:
        half = len(messages) // 2
        yield from payloads(kind, messages[:half], refuse)
        yield from payloads(kind, messages[half:], refuse)


def replies_in(payload: bytes) -> list[Reply]:
    """The answers of one message. Raises: FrameError."""
    try:
        if payload[0] != _REPLIES:
            raise msgspec.DecodeError(f"a message of kind {payload[0]}")
        return _decode(memoryview(payload)[1:])
    except (msgspec.DecodeError, IndexError, RecursionError, UnicodeDecodeError) as error:
        raise FrameError(f"answers do not decode: {error}") from error
