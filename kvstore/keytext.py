r"""Bytes as text for people: \xNN for what cannot be printed, \\ for a backslash; reading gives the bytes back. Pure."""

from __future__ import annotations

import re
from typing import Final

from kvstore.errors import InvalidArgument

_ESCAPE: Final = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|([\\nrt0]))|\\")
_SIMPLE: Final = {"\\": "\\", "n": "\n", "r": "\r", "t": "\t", "0": "\0"}


def unescape(text: str) -> bytes:
    r"""The bytes of `text`: \xNN is a byte, \\ \n \r \t \0 are as in Python, the rest is UTF-8 (or raw argument bytes).

    Raises: InvalidArgument for any other backslash.
    """
    out = bytearray()
    position = 0
    for found in _ESCAPE.finditer(text):
        out += text[position : found.start()].encode("utf-8", "surrogateescape")
        position = found.end()
        if found[1]:
            out.append(int(found[1], 16))
        elif found[2]:
            out += _SIMPLE[found[2]].encode()
        else:
            raise InvalidArgument(f"write \\xNN for a byte or \\\\ for a backslash: {text!r}")
    return bytes(out + text[position:].encode("utf-8", "surrogateescape"))


def escape(data: bytes, encoding: str = "utf-8") -> str:
    """Text that `unescape` reads back to `data`; printable characters are left as they are, if `encoding` has them."""
    text = data.decode("utf-8", "surrogateescape")
    return "".join(_escaped(character, encoding) for character in text)


def _escaped(character: str, encoding: str) -> str:
    if character == "\\":
        return "\\\\"
    if character.isprintable() and (character.isascii() or _has(encoding, character)):
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))


def _has(encoding: str, character: str) -> bool:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
