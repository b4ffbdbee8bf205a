"""Histories as lines of JSON: one operation a line, in any order. The format: HISTORIES.md.

Reading and writing are streams: a line at a time, so that a history may be larger than memory. Bytes are text in which
what cannot be printed is escaped (kvstore/keytext.py): every key and value comes back as it was. Versions are strings,
because they exceed what JSON's numbers can hold elsewhere. Fields that nobody knows are skipped, blank lines too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, Final, Literal, NamedTuple

import msgspec

from kvstore.errors import InvalidArgument
from kvstore.keytext import escape, unescape
from kvstore.testing.checkers.anomaly import BadHistory
from kvstore.testing.history import FOREVER, History, MicroTxn, Outcome, RegisterOp, TxnOp

LINE_BYTES_MAX: Final = 64 << 20


class Rows(NamedTuple):
    """What was there before any transaction, or at the end."""

    when: Literal["initial", "final"]
    rows: dict[bytes, bytes | None]


class Markers(NamedTuple):
    """Which transactions had left their marker at the end: name -> version."""

    versions: dict[bytes, int]


Record = RegisterOp | TxnOp | MicroTxn | Rows | Markers


def read_jsonl(stream: BinaryIO) -> Iterator[Record]:
    """Every record of the stream, in order. Raises: BadHistory, with the number of the line, when that line is reached."""
    number = 0
    while line := stream.readline(LINE_BYTES_MAX + 1):
        number += 1
        if len(line) > LINE_BYTES_MAX:
            raise BadHistory(f"longer than {LINE_BYTES_MAX} bytes", number)
        if not line.strip():
            continue
        try:
            yield _DECODER.decode(line).to_record()
        except (msgspec.DecodeError, InvalidArgument, BadHistory, RecursionError) as error:
            raise BadHistory(str(error) or type(error).__name__, number) from None
        except UnicodeDecodeError:
            raise BadHistory("not UTF-8", number) from None


def read_history(stream: BinaryIO) -> History:
    """All of it at once; several `initial`, `final` and `markers` add up. Raises: BadHistory."""
    history = History()
    for record in read_jsonl(stream):
        match record:
            case RegisterOp():
                history.registers.append(record)
            case TxnOp():
                history.transactions.append(record)
            case MicroTxn():
                history.micro.append(record)
            case Rows(when="initial"):
                history.initial.update(record.rows)
            case Rows():
                history.final = {**(history.final or {}), **record.rows}
            case Markers():
                history.markers = {**(history.markers or {}), **record.versions}
    return history


def write_record(record: Record, stream: BinaryIO) -> None:
    """One line. An end is written only of an operation that has one."""
    stream.write(_ENCODER.encode(_line(record)) + b"\n")


def write_history(history: History, stream: BinaryIO) -> None:
    """Everything that `read_history` gives back."""
    records: list[Record] = [*history.registers, *history.transactions, *history.micro]
    if history.initial:
        records.append(Rows("initial", history.initial))
    if history.final is not None:
        records.append(Rows("final", history.final))
    if history.markers is not None:
        records.append(Markers(history.markers))
    for record in records:
        write_record(record, stream)


# ---------------------------------------------------------------- lines


class _Line(msgspec.Struct, tag_field="record", omit_defaults=True):
    """What every kind of line can do."""

    def to_record(self) -> Record:
        raise NotImplementedError


class _Operation(_Line):
    """The fields of every operation."""

    client: str
    begin: int
    outcome: Literal["ok", "failed", "unknown"]
    end: int | None = None
    version: str | None = None  # None: not known

    def ended(self) -> int:
        """Raises: BadHistory if it must have an end and has none, or ends before it begins."""
        if self.end is None:
            if self.outcome == "ok":
                raise BadHistory("an operation that is ok has an end")
            return FOREVER
        if not 0 <= self.begin <= self.end <= FOREVER:
            raise BadHistory(f"{self.begin} to {self.end} is no time")
        return self.end


class _Register(_Operation, tag="register", kw_only=True):
    kind: Literal["put", "get", "cas", "delete"]
    key: str
    value: str | None = None
    expected: str | None = None
    swapped: bool = True

    def to_record(self) -> RegisterOp:
        return RegisterOp(
            self.client,
            self.kind,
            unescape(self.key),
            self.begin,
            _optional(self.value),
            _optional(self.expected),
            self.swapped,
            _number(self.version),
            self.ended(),
            Outcome(self.outcome),
        )


class _Transaction(_Operation, tag="transaction", kw_only=True):
    name: str
    reads: dict[str, str | None] = {}
    writes: dict[str, str | None] = {}
    error: str = ""

    def to_record(self) -> TxnOp:
        return TxnOp(
            self.client,
            unescape(self.name),
            self.begin,
            _rows(self.reads),
            _rows(self.writes),
            _number(self.version),
            self.ended(),
            Outcome(self.outcome),
            self.error,
        )


class _Micro(_Operation, tag="micro", kw_only=True):
    steps: list[tuple[Literal["append", "w", "r"], str, int | list[int] | None]]
    error: str = ""

    def to_record(self) -> MicroTxn:
        steps: list[tuple[str, bytes, Any]] = []
        for what, key, value in self.steps:
            if what != "r" and not isinstance(value, int):
                raise BadHistory(f"{what} of {value}: write an integer")
            steps.append((what, unescape(key), value))
        return MicroTxn(
            self.client,
            self.begin,
            steps,
            _number(self.version),
            self.ended(),
            Outcome(self.outcome),
            self.error,
        )


class _Initial(_Line, tag="initial"):
    rows: dict[str, str | None]

    def to_record(self) -> Rows:
        return Rows("initial", _rows(self.rows))


class _Final(_Line, tag="final"):
    rows: dict[str, str | None]

    def to_record(self) -> Rows:
        return Rows("final", _rows(self.rows))


class _Markers(_Line, tag="markers"):
    versions: dict[str, str]

    def to_record(self) -> Markers:
        return Markers({unescape(key): _number(text) for key, text in self.versions.items()})


_ENCODER: Final = msgspec.json.Encoder()
_DECODER: Final = msgspec.json.Decoder(
    _Register | _Transaction | _Micro | _Initial | _Final | _Markers
)


def _line(record: Record) -> _Line:
    match record:
        case RegisterOp():
            return _Register(
                **_operation(record),
                kind=record.kind,  # type: ignore[arg-type]
                key=escape(record.key),
                value=_text(record.value),
                expected=_text(record.expected),
                swapped=record.swapped,
            )
        case TxnOp():
            return _Transaction(
                **_operation(record),
                name=escape(record.name),
                reads=_texts(record.reads),
                writes=_texts(record.writes),
                error=record.error,
            )
        case MicroTxn():
            return _Micro(
                **_operation(record),
                steps=[(what, escape(key), value) for what, key, value in record.steps],  # type: ignore[misc]
                error=record.error,
            )
        case Rows(when="initial"):
            return _Initial(_texts(record.rows))
        case Rows():
            return _Final(_texts(record.rows))
        case Markers():
            return _Markers({escape(name): str(v) for name, v in record.versions.items()})


def _operation(op: RegisterOp | TxnOp | MicroTxn) -> dict[str, Any]:
    return {
        "client": op.client,
        "begin": op.begin,
        "outcome": op.outcome.value,
        "end": op.end if op.end < FOREVER else None,
        "version": str(op.version) if op.version else None,
    }


def _rows(rows: Mapping[str, str | None]) -> dict[bytes, bytes | None]:
    return {unescape(key): _optional(value) for key, value in rows.items()}


def _texts(rows: Mapping[bytes, bytes | None]) -> dict[str, str | None]:
    return {escape(key): _text(value) for key, value in rows.items()}


def _optional(text: str | None) -> bytes | None:
    return None if text is None else unescape(text)


def _text(value: bytes | None) -> str | None:
    return None if value is None else escape(value)


def _number(text: str | None) -> int:
    if text is None:
        return 0
    if not (text.isascii() and text.isdecimal() and len(text) <= 40):
        raise BadHistory(f"{text!r} is no version")
    return int(text)
