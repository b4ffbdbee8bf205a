"""Requests and answers as the payloads of messages, none of them larger than a stream takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec

from kvstore.limits import MESSAGE_BYTES_MAX

_encode: Final = msgspec.msgpack.Encoder().encode


def payloads(kind: bytes, messages: list[Any], refuse: Callable[[Any], None]) -> Iterator[bytes]:
    """Nearly always one; several, should it come out too large: whoever gathers `messages` knows their sizes only about.

    Limits keep one message alone small enough. One that is too large nevertheless is handed to `refuse`, and not sent: the
    stream would not take it, and whatever waits behind it would never leave.
    """
    payload = kind + _encode(messages)
    if len(payload) <= MESSAGE_BYTES_MAX:
        yield payload
    elif len(messages) == 1:
        refuse(messages[0])
    else:
        half = len(messages) // 2
        yield from payloads(kind, messages[:half], refuse)
        yield from payloads(kind, messages[half:], refuse)
