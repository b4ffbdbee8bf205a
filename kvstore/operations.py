"""Operations as data: what `POST /v1/txn` and `kvctl txn` run atomically, and the one place that runs them.

All operations of a list run in one transaction, in order, each seeing the writes before it. A `check`
that does not hold raises CompareFailed, and then nothing is written. In JSON, bytes are base64.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import msgspec

from kvstore import limits
from kvstore.buffer import NumberFormat
from kvstore.errors import CompareFailed, InvalidArgument, TransactionTooLarge
from kvstore.keytext import escape

if TYPE_CHECKING:
    from kvstore.transactions import Transaction

OPERATIONS_MAX: Final = limits.TXN_ROWS_MAX
SCAN_ROWS_MAX: Final = 10_000
SCAN_ROWS_DEFAULT: Final = 1_000
RESULTS_BYTES_MAX: Final = 16 * limits.MIB  # of one run by a node, which holds them all at once
ROW_OVERHEAD_BYTES: Final = 64  # of a row in a result
WRITES_PER_TURN: Final = 100  # of the loop: they wait for nothing, and others have their turn

_QUOTED: Final = re.compile(r"""\"[^"]*"|'[^']*'""")
_TOKEN: Final = re.compile(
    r"""[^\S\n]*(?:(?P<end>[;\n])|\#[^\n]*|(?P<word>(?:"[^"]*"|'[^']*'|[^\s;"'])+)|\Z)"""
)


class Get(msgspec.Struct, tag_field="op", tag="get", frozen=True, forbid_unknown_fields=True):
    """Result: {"value": bytes or None}. `lock`: the key until the end, and its newest value (`get_for_update`)."""

    key: bytes
    lock: Literal["exclusive", "shared"] | None = None


class Put(msgspec.Struct, tag_field="op", tag="put", frozen=True, forbid_unknown_fields=True):
    key: bytes
    value: bytes


class Delete(msgspec.Struct, tag_field="op", tag="delete", frozen=True, forbid_unknown_fields=True):
    key: bytes


class DeleteRange(
    msgspec.Struct, tag_field="op", tag="delete_range", frozen=True, forbid_unknown_fields=True
):
    """[start, end)."""

    start: bytes
    end: bytes


class Increment(
    msgspec.Struct, tag_field="op", tag="increment", frozen=True, forbid_unknown_fields=True
):
    """The row is a decimal number in ASCII (or 8 bytes: "int64"); an absent one counts as 0. A `get` after it sees the sum."""

    key: bytes
    by: int = 1
    format: NumberFormat = "ascii"


class Min(msgspec.Struct, tag_field="op", tag="min", frozen=True, forbid_unknown_fields=True):
    """Set a number to `value` if that is less, or if there is none."""

    key: bytes
    value: int
    format: NumberFormat = "ascii"


class Max(msgspec.Struct, tag_field="op", tag="max", frozen=True, forbid_unknown_fields=True):
    """Set a number to `value` if that is greater, or if there is none."""

    key: bytes
    value: int
    format: NumberFormat = "ascii"


class AppendIfFits(
    msgspec.Struct, tag_field="op", tag="append_if_fits", frozen=True, forbid_unknown_fields=True
):
    """Append to the value if it has at most `limit` bytes then; else leave it."""

    key: bytes
    value: bytes
    limit: int = limits.VALUE_BYTES_MAX


class CompareAndClear(
    msgspec.Struct, tag_field="op", tag="compare_and_clear", frozen=True, forbid_unknown_fields=True
):
    """Delete the key if it has this value; else leave it."""

    key: bytes
    expected: bytes


class PutVersionstampedKey(
    msgspec.Struct,
    tag_field="op",
    tag="put_versionstamped_key",
    frozen=True,
    forbid_unknown_fields=True,
):
    """Put the key `prefix` + stamp: the commit version (8 bytes, big-endian), then a number (2 bytes). Result: {"number"}."""

    prefix: bytes
    value: bytes


class PutVersionstampedValue(
    msgspec.Struct,
    tag_field="op",
    tag="put_versionstamped_value",
    frozen=True,
    forbid_unknown_fields=True,
):
    """Put the value `head` + stamp. Result: {"number"}."""

    key: bytes
    head: bytes = b""


class Scan(msgspec.Struct, tag_field="op", tag="scan", frozen=True, forbid_unknown_fields=True):
    """[start, end), or the keys with `prefix`. Result: {"items": [{"key", "value"}, ...]}."""

    start: bytes = b""
    end: bytes | None = None
    prefix: bytes | None = None
    limit: int = SCAN_ROWS_DEFAULT
    reverse: bool = False


class Check(msgspec.Struct, tag_field="op", tag="check", frozen=True, forbid_unknown_fields=True):
    """The key must have this value; without `value`, it must be absent."""

    key: bytes
    value: bytes | None = None


Operation: TypeAlias = (
    Get
    | Put
    | Delete
    | DeleteRange
    | Increment
    | Min
    | Max
    | AppendIfFits
    | CompareAndClear
    | PutVersionstampedKey
    | PutVersionstampedValue
    | Scan
    | Check
)


class _Room:
    """What the results of one run may still take."""

    def __init__(self, bytes_max: float, take: Callable[[int], None] | None) -> None:
        self._bytes_max = self._left = bytes_max
        self._take = take

    def take(self, size_bytes: int) -> None:
        if self._take is not None:
            self._take(size_bytes)
        self._left -= size_bytes
        if self._left < 0:
            raise TransactionTooLarge(
                f"the results are longer than {self._bytes_max} bytes: read less in one transaction"
            )


async def run_operations(
    tx: Transaction,
    operations: Sequence[Operation],
    bytes_max: float = float("inf"),
    take: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Run them in order inside `tx`. One result per operation: {} for writes.

    Args: take: is told the bytes of each row that was read, and may raise.
    Raises: CompareFailed for a `check` that does not hold, TransactionTooLarge for results of more than `bytes_max`,
    and whatever the transaction raises.
    """
    room = _Room(bytes_max, take)
    results: list[dict[str, Any]] = []
    for number, operation in enumerate(operations, 1):
        results.append(await _run_one(tx, operation, room))
        # one that reads may have had to look at all that was written, and need not have waited for anything
        if number % WRITES_PER_TURN == 0 or isinstance(operation, Get | Scan | Check):
            await asyncio.sleep(0)
    return results


def check_operations(operations: Sequence[Operation]) -> None:
    """Raises InvalidArgument before anything is sent: too many operations, or bad limits of scans."""
    if len(operations) > OPERATIONS_MAX:
        raise InvalidArgument(f"{len(operations)} operations are more than {OPERATIONS_MAX}")
    for operation in operations:
        if isinstance(operation, Scan):
            if not 1 <= operation.limit <= SCAN_ROWS_MAX:
                raise InvalidArgument(f"limit is 1 to {SCAN_ROWS_MAX}, not {operation.limit}")
            if operation.prefix is not None and (operation.start or operation.end is not None):
                raise InvalidArgument("give a prefix, or start and end, not both")


def parse_script(text: str, unescape: Callable[[str], bytes]) -> list[Operation]:
    """Operations of a script such as `get a; put b 1; delete c`.

    Statements end at `;` or at the end of a line, `#` begins a comment, and words with spaces or `;` are put in quotes
    of either kind. Statements: get KEY | lock KEY | put KEY VALUE | delete KEY | delete_range START END |
    incr KEY [BY] | min KEY NUMBER | max KEY NUMBER | append KEY VALUE [LIMIT] | clear KEY VALUE (if it has this value) |
    stamp PREFIX VALUE | scan PREFIX [LIMIT] | check KEY VALUE | absent KEY.
    Raises: InvalidArgument with the number of the statement.
    """
    operations: list[Operation] = []
    for number, words in enumerate(_statements(text), 1):
        try:
            operations.append(_parse_statement(words, unescape))
        except ValueError as error:  # InvalidArgument is one
            raise InvalidArgument(f"statement {number}, `{' '.join(words)}`: {error}") from None
    if not operations:
        raise InvalidArgument("the script has no statement")
    check_operations(operations)
    return operations


async def _run_one(tx: Transaction, operation: Operation, room: _Room) -> dict[str, Any]:
    match operation:
        case Get(key=key, lock=lock):
            if lock is None:
                found = await tx.get(key)
            else:
                found = await tx.get_for_update(key, shared=lock == "shared")
            room.take(len(found or b""))
            return {"value": found}
        case Put(key=key, value=value):
            tx.put(key, value)
        case Delete(key=key):
            tx.delete(key)
        case DeleteRange(start=start, end=end):
            tx.delete_range(start, end)
        case Increment(key=key, by=by, format=form):
            tx.increment(key, by, format=form)
        case Min(key=key, value=number, format=form):
            tx.min(key, number, format=form)
        case Max(key=key, value=number, format=form):
            tx.max(key, number, format=form)
        case AppendIfFits(key=key, value=value, limit=limit):
            tx.append_if_fits(key, value, limit)
        case CompareAndClear(key=key, expected=expected):
            tx.compare_and_clear(key, expected)
        case PutVersionstampedKey(prefix=prefix, value=value):
            return {"number": tx.put_versionstamped_key(prefix, value)}
        case PutVersionstampedValue(key=key, head=head):
            return {"number": tx.put_versionstamped_value(key, head)}
        case Scan():
            return {"items": await _scan(tx, operation, room)}
        case Check(key=key, value=wanted):
            present = await tx.get(key)
            if present != wanted:
                shown = escape(key)
                if wanted is None:
                    why = f"the key {shown} is not absent"
                else:
                    why = f"the key {shown} does not have the value {escape(wanted[:64])}"
                version = await tx._committed_version(key)  # noqa: SLF001 - one package; no part of the API
                raise CompareFailed(version, f"{why}; nothing was written")
    return {}


async def _scan(tx: Transaction, scan: Scan, room: _Room) -> list[dict[str, bytes]]:
    rows = tx.scan(scan.start, scan.end, prefix=scan.prefix, limit=scan.limit, reverse=scan.reverse)
    items = []
    async for key, value in rows:
        room.take(len(key) + len(value) + ROW_OVERHEAD_BYTES)
        items.append({"key": key, "value": value})
    return items


def _statements(text: str) -> list[list[str]]:
    statements: list[list[str]] = [[]]
    position = 0
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None:
            raise InvalidArgument(f"a quote is not closed: {text[position:][:40].strip()!r}")
        position = found.end()
        if found["end"]:
            statements.append([])
        elif found["word"]:
            statements[-1].append(_QUOTED.sub(lambda quoted: quoted[0][1:-1], found["word"]))
    return [words for words in statements if words]


def _parse_statement(words: Sequence[str], unescape: Callable[[str], bytes]) -> Operation:
    match [words[0].lower(), *words[1:]]:
        case ["get", key]:
            return Get(unescape(key))
        case ["lock", key]:
            return Get(unescape(key), "exclusive")
        case ["put", key, value]:
            return Put(unescape(key), unescape(value))
        case ["delete" | "del", key]:
            return Delete(unescape(key))
        case ["delete_range", start, end]:
            return DeleteRange(unescape(start), unescape(end))
        case ["incr" | "increment", key]:
            return Increment(unescape(key))
        case ["incr" | "increment", key, by]:
            return Increment(unescape(key), int(by))
        case ["min", key, number]:
            return Min(unescape(key), int(number))
        case ["max", key, number]:
            return Max(unescape(key), int(number))
        case ["append", key, value]:
            return AppendIfFits(unescape(key), unescape(value))
        case ["append", key, value, limit]:
            return AppendIfFits(unescape(key), unescape(value), int(limit))
        case ["clear", key, value]:
            return CompareAndClear(unescape(key), unescape(value))
        case ["stamp", prefix, value]:
            return PutVersionstampedKey(unescape(prefix), unescape(value))
        case ["scan", prefix]:
            return Scan(prefix=unescape(prefix))
        case ["scan", prefix, limit]:
            return Scan(prefix=unescape(prefix), limit=int(limit))
        case ["check", key, value]:
            return Check(unescape(key), unescape(value))
        case ["absent", key]:
            return Check(unescape(key))
    raise InvalidArgument("not a statement; see kvctl txn --help")
