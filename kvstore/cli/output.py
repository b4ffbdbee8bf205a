"""How command lines read and print: keys in a notation, tables for people, JSON for programs, errors as one line.

Into a file or a pipe, a table goes as lines with tabs between the cells.
"""

from __future__ import annotations

import base64
import binascii
import enum
import sys
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO, Final, NoReturn, TextIO

import msgspec
import typer
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from kvstore.errors import InvalidArgument, KVError
from kvstore.keytext import escape, unescape

EXIT_ERROR: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130
WIDTH_WITHOUT_TERMINAL: Final = 10_000  # of lines of text; rows of tables are as long as they are


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
        return escape(data, sys.stdout.encoding or "utf-8")


def console(*, stderr: bool = False) -> Console:
    """A console that does not wrap when nobody watches, and prints text as it is."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else WIDTH_WITHOUT_TERMINAL
    return Console(
        file=stream, width=width, highlight=False, markup=False, soft_wrap=not stream.isatty()
    )


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody is there; a stream that is closed is None."""
    return stream is not None and stream.isatty()


def can_ask(*, stderr: bool = False) -> bool:
    """Whether somebody sees what is printed (and the question, if that goes to standard error), and can answer."""
    return all(
        is_terminal(each) for each in (sys.stdin, sys.stdout, sys.stderr if stderr else sys.stdout)
    )


def confirm(question: str, *, stderr: bool = False) -> None:
    """Ask. Raises KVError (not_confirmed) for whatever is not y or yes."""
    stream = sys.stderr if stderr else sys.stdout
    stream.write(f"{question} [y/N] ")
    stream.flush()
    answer = sys.stdin.readline()
    if not answer:
        stream.write("\n")
    if answer.strip().lower() not in ("y", "yes"):
        raise KVError("nothing was changed", code="not_confirmed")


class Lines:
    """A table for a file or a pipe: a line for each row, its cells with tabs between, nothing folded or filled up."""

    def __init__(self, rows: Iterable[Sequence[object]]) -> None:
        self._rows = rows

    def __rich_console__(self, _console: Console, _options: ConsoleOptions) -> RenderResult:
        for row in self._rows:
            yield Segment("\t".join(str(cell) for cell in row))
            yield Segment.line()


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table | Lines:
    """A plain table, or `Lines` if nobody watches; cells are printed as they are (no markup)."""
    if not sys.stdout.isatty():
        return Lines([columns, *rows])
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return made


def standard_input() -> BinaryIO:
    """Its bytes. Raises KVError (io_error) when there is none."""
    if sys.stdin is None:
        raise KVError("standard input is closed", code="io_error")
    return sys.stdin.buffer


def print_json(value: Any) -> None:
    """One line of JSON: bytes as base64, big integers as they are given."""
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()


def fail(error: KVError) -> NoReturn:
    """`error: code: message` on one line of standard error, and exit 1."""
    message = " ".join(error.message.split())
    sys.stderr.write(f"error: {error.code}: {message}\n")
    raise typer.Exit(EXIT_ERROR)
