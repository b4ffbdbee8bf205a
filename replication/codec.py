"""Messages and memberships as bytes (msgspec's MessagePack).

What does not decode raises FrameError and nothing else: unknown tags, wrong types, trailing or missing bytes, and
nesting so deep that the decoder gives up. Later versions append fields with defaults, so both directions go on reading.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from replication.errors import FrameError
from replication.messages import Message
from replication.types import Membership

_encoder = msgspec.msgpack.Encoder()
_messages = msgspec.msgpack.Decoder(list[Message])
_membership = msgspec.msgpack.Decoder(Membership)


def encode_messages(messages: Sequence[Message]) -> bytes:
    """One frame's worth of messages, in order."""
    return _encoder.encode(messages)


def decode_messages(data: bytes | bytearray | memoryview) -> list[Message]:
    """The messages of one frame. Raises FrameError."""
    try:
        return _messages.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise FrameError(f"messages do not decode: {error}") from error


def encode_membership(membership: Membership) -> bytes:
    """The body of a CONFIG entry."""
    return _encoder.encode(membership)


def decode_membership(data: bytes) -> Membership:
    """The membership in a CONFIG entry. Raises FrameError; the rules are checked by membership.validate."""
    try:
        return _membership.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise FrameError(f"a membership does not decode: {error}") from error
