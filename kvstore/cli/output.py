"""How command lines read and print: bytes as text, tables for people, JSON for programs, errors as one line.

Bytes are written as text with `\\xNN` for what cannot be printed and `\\\\` for a backslash, and read back the same way.
"""

from __future__ import annotations

import base64
import binascii
import enum
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final, NoReturn

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvstore.errors import InvalidArgument, KVError

EXIT_ERROR: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130
WIDTH_WITHOUT_TERMINAL: Final = 10_000  # never wrap or cut what goes to a file or a pipe

_ESCAPE: Final = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|([\\nrt0]))|\\")
_SIMPLE: Final = {"\\": "\\", "n": "\n", "r": "\r", "t": "\t", "0": "\0"}


class Format(enum.StrEnum):
    """What `-o` says."""

    TABLE = "table"
    JSON = "json"


class Notation(enum.StrEnum):
    """How keys and values are written in arguments and in tables."""

    ESCAPED = "escaped"
    HEX = "hex"
    BASE64 = "base64"

    @classmethod
    def of(cls, use_hex: bool, use_base64: bool) -> Notation:
        if use_hex and use_base64:
            raise InvalidArgument("give --hex or --base64, not both")
        return cls.HEX if use_hex else cls.BASE64 if use_base64 else cls.ESCAPED

    def read(self, text: str) -> bytes:
        """Raises InvalidArgument for what this notation does not have."""
        try:
            if self is Notation.HEX:
                return bytes.fromhex(text)
            if self is Notation.BASE64:
                return base64.b64decode(text, validate=True)
        except (ValueError, binascii.Error):
            raise InvalidArgument(f"not {self.value}: {text!r}") from None
        return unescape(text)

    def write(self, data: bytes) -> str:
        if self is Notation.HEX:
            return data.hex()
        if self is Notation.BASE64:
            return base64.b64encode(data).decode()
        return escape(data)


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


def escape(data: bytes) -> str:
    """Text that `unescape` reads back to `data`; printable characters are left as they are."""
    return "".join(_escaped(character) for character in data.decode("utf-8", "surrogateescape"))


def _escaped(character: str) -> str:
    if character == "\\":
        return "\\\\"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))


def console(*, stderr: bool = False) -> Console:
    """A console that does not wrap when nobody watches, and prints text as it is."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else WIDTH_WITHOUT_TERMINAL
    return Console(
        file=stream, width=width, highlight=False, markup=False, soft_wrap=not stream.isatty()
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A plain table; cells are printed as they are (no markup)."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return made


def print_json(value: Any) -> None:
    """One line of JSON: bytes as base64, big integers as they are given."""
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()


def fail(error: KVError) -> NoReturn:
    """`error: code: message` on one line of standard error, and exit 1."""
    message = " ".join(error.message.split())
    sys.stderr.write(f"error: {error.code}: {message}\n")
    raise typer.Exit(EXIT_ERROR)
