"""Requests and answers as the payloads of messages, none of them larger than a stream takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from kvstore.limits import MESSAGE_BYTES_MAX

_encode: Final = msgspec.msgpack.Encoder().encode


def payloads(kind: bytes, messages: list[Any]) -> Iterator[bytes]:
    """Nearly always one; several, should it come out too large: whoever gathers `messages` knows their sizes only about.

    One message alone is never cut; limits keep it small enough.
    """
    payload = kind + _encode(messages)
    if len(payload) <= MESSAGE_BYTES_MAX or len(messages) == 1:
        yield payload
        return
    half = len(messages) // 2
    yield from payloads(kind, messages[:half])
    yield from payloads(kind, messages[half:])
