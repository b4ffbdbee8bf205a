"""What `kvctl` does with data: get, put, delete, incr, scan, watch, txn, import, export. Each opens a client and closes it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import msgspec

from kvstore import limits, operations
from kvstore.cli.output import Format, Notation, console, print_json, standard_input, table
from kvstore.cli.packages import check_packages
from kvstore.errors import InvalidArgument, NotFound, TransactionTooLarge

if TYPE_CHECKING:
    from kvstore.client import Database
    from kvstore.transactions import Transaction
    from kvstore.watches import Event

IMPORT_ROWS: Final = 500  # of one transaction
IMPORT_BYTES: Final = 1 << 20
IMPORT_LINE_BYTES_MAX: Final = 4 << 20
IMPORT_CONCURRENCY: Final = 4

T = TypeVar("T")


class Target(NamedTuple):
    """Where to ask, for how long, and how to print."""

    endpoints: str
    timeout_s: float
    format: Format


class Row(msgspec.Struct, forbid_unknown_fields=True):
    """One line of an export: bytes as base64."""

    key: bytes
    value: bytes


def run(target: Target, work: Callable[[Database], Awaitable[T]]) -> T:
    """`work` with a client that is closed afterwards. Raises ImportError if its packages are not ours."""
    check_packages()

    async def connected() -> T:
        async with _connect(target) as database:
            return await work(database)

    return asyncio.run(connected())


def get(target: Target, key: bytes, notation: Notation, raw: bool) -> None:
    """Print the value. Raises NotFound if there is none."""
    entry = run(target, lambda database: database.get_entry(key))
    if entry is None:
        raise NotFound(f"no such key: {notation.write(key)}")
    if target.format is Format.JSON:
        print_json({"key": entry.key, "value": entry.value, "version": str(entry.version)})
    elif raw:
        sys.stdout.buffer.write(entry.value)
        sys.stdout.buffer.flush()
    else:
        sys.stdout.write(notation.write(entry.value) + "\n")


def put(target: Target, key: bytes, value: bytes, if_version: int | None, if_absent: bool) -> None:
    if if_version is not None and if_absent:
        raise InvalidArgument("give --if-version or --if-absent, not both")

    async def work(database: Database) -> int:
        if if_version is not None:
            return await database.put(key, value, if_version=if_version)
        return await database.put(key, value, if_absent=if_absent)

    _print_version(target, run(target, work))


def delete(target: Target, key: bytes) -> None:
    _print_version(target, run(target, lambda database: database.delete(key)))


def increment(target: Target, key: bytes, by: int) -> None:
    total = run(target, lambda database: database.increment(key, by))
    if target.format is Format.JSON:
        print_json({"value": str(total)})
    else:
        sys.stdout.write(f"{total}\n")


class Span(NamedTuple):
    """What a scan or an export covers; `limit` 0 means all."""

    start: bytes | None
    end: bytes | None
    prefix: bytes | None
    limit: int
    reverse: bool
    keys_only: bool


def scan(target: Target, span: Span, notation: Notation) -> None:
    """Print rows in order; says on standard error when the limit left some out."""

    async def work(database: Database) -> list[tuple[bytes, bytes]]:
        most = span.limit + 1 if span.limit else None
        return [row async for row in _rows(database, span, most)]

    rows = run(target, work)
    more = bool(span.limit) and len(rows) > span.limit
    rows = rows[: span.limit] if more else rows
    if target.format is Format.JSON:
        items = [
            {"key": key} if span.keys_only else {"key": key, "value": value} for key, value in rows
        ]
        print_json({"items": items, "more": more})
        return
    if span.keys_only:
        sys.stdout.writelines(notation.write(key) + "\n" for key, _ in rows)
    else:
        cells = ((notation.write(key), notation.write(value)) for key, value in rows)
        console().print(table(("key", "value"), cells))
    if more:
        console(stderr=True).print(f"(more than {span.limit}; see --limit)")


def watch(
    target: Target,
    key: bytes | None,
    prefix: bytes | None,
    since: int | None,
    count: int,
    notation: Notation,
) -> None:
    """Print one line for each event, whole commits at once: until there were `count` (0: for ever), or it is interrupted."""

    async def work(database: Database) -> None:
        printed = 0
        async with database.watch(key=key, prefix=prefix, since=since) as events:
            while not count or printed < count:
                some = await events.pull(count - printed if count else 0)
                sys.stdout.writelines(_line_of(target, event, notation) for event in some)
                sys.stdout.flush()
                printed += len(some)

    run(target, work)


def _line_of(target: Target, event: Event, notation: Notation) -> str:
    if target.format is Format.JSON:
        line = {**event._asdict(), "version": str(event.version)}
        return msgspec.json.encode(line).decode() + "\n"
    words = [str(event.version), event.type.value, notation.write(event.key)]
    if event.value is not None:
        words.append(notation.write(event.value))
    return "\t".join(words) + "\n"


def transact(target: Target, script: str, notation: Notation) -> None:
    """Run a script of operations in one transaction, and print what it read."""
    wanted = operations.parse_script(script, notation.read)
    last: list[Transaction] = []

    async def attempt(tx: Transaction) -> list[dict[str, Any]]:
        last[:] = [tx]
        return await operations.run_operations(tx, wanted)

    # `run` tries for half a minute of its own accord, whatever the time of the client's other calls
    results = run(target, lambda database: database.run(attempt, timeout=target.timeout_s))
    version = last[0].commit_version if last else None
    if target.format is Format.JSON:
        print_json({"version": str(version) if version else None, "results": results})
        return
    rows = [
        row
        for operation, result in zip(wanted, results, strict=True)
        for row in _read(operation, result)
    ]
    if rows:
        written = (
            (notation.write(key), "(none)" if value is None else notation.write(value))
            for key, value in rows
        )
        console().print(table(("key", "value"), written))
    sys.stdout.write(f"committed at {version}\n" if version else "done; nothing was written\n")


def export(target: Target, span: Span, path: Path | None) -> int:
    """Write one JSON object a line, all of one version; the number of rows."""

    async def work(database: Database) -> int:
        count = 0
        with _writing(path) as file:
            async for key, value in _rows(database, span, span.limit or None):
                file.write(msgspec.json.encode(Row(key, value)) + b"\n")
                count += 1
        return count

    return run(target, work)


def import_(target: Target, path: Path | None) -> int:
    """Put every line of an export; the number of rows. Each batch is atomic, the whole is not; running it again is right.

    Of a key that stands there twice the later line wins.
    Raises: InvalidArgument and its kin with the line's number; what came before it has been written.
    """

    async def work(database: Database) -> int:
        count = 0
        with _reading(path) as file:
            batches = _batches(file)
            refusal: InvalidArgument | None = None
            while refusal is None:
                group, refusal = _group(batches)
                if not group and refusal is None:
                    break
                count += sum(len(batch) for batch in group)
                await asyncio.gather(*(_write(database, rows) for rows in _last_of_each(group)))
        if refusal is not None:
            raise refusal
        return count

    return run(target, work)


def check_import(path: Path | None) -> int:
    """The number of rows that `import_` would put. Raises: as `import_`, for what is wrong with a line."""
    with _reading(path) as file:
        return sum(len(batch) for batch in _batches(file))


def read_value(text: str | None) -> bytes:
    """The raw bytes of standard input, for an absent value or `-`."""
    assert text in (None, "-")
    return standard_input().read()


@asynccontextmanager
async def _connect(target: Target) -> AsyncIterator[Database]:
    import kvstore

    async with kvstore.connect(target.endpoints, timeout=target.timeout_s) as database:
        yield database


async def _rows(
    database: Database, span: Span, limit: int | None
) -> AsyncIterator[tuple[bytes, bytes]]:
    if span.prefix is not None and (span.start is not None or span.end is not None):
        raise InvalidArgument("give --prefix, or --start and --end, not both")
    async for row in database.scan(
        span.start or b"",
        span.end,
        prefix=span.prefix,
        limit=limit,
        reverse=span.reverse,
        keys_only=span.keys_only,
    ):
        yield row


def _group(batches: Iterator[list[Row]]) -> tuple[list[list[Row]], InvalidArgument | None]:
    """What is written together, and what is wrong with the line behind it; nothing at the end."""
    group: list[list[Row]] = []
    try:
        for batch in batches:
            group.append(batch)
            if len(group) == IMPORT_CONCURRENCY:
                break
    except InvalidArgument as error:
        return group, error
    return group, None


def _last_of_each(group: list[list[Row]]) -> list[list[Row]]:
    """Each key in the last of its batches alone: they are not written in their order."""
    kept: list[list[Row]] = []
    later: dict[bytes, None] = {}
    for batch in reversed(group):
        kept.append([row for row in batch if row.key not in later])
        later |= dict.fromkeys(row.key for row in batch)
    return kept[::-1]


async def _write(database: Database, rows: list[Row]) -> None:
    """In one transaction; in halves where it would touch more ranges than one may."""
    try:
        async with database.batch() as batch:
            for row in rows:
                batch.put(row.key, row.value)
    except TransactionTooLarge:
        if len(rows) == 1:
            raise
        middle = len(rows) // 2
        await _write(database, rows[:middle])
        await _write(database, rows[middle:])


def _batches(file: IO[bytes]) -> Iterator[list[Row]]:
    """Raises: InvalidArgument and its kin, behind the batch of what comes before the line."""
    batch: list[Row] = []
    size_bytes = 0
    for number, line in enumerate(iter(lambda: file.readline(IMPORT_LINE_BYTES_MAX), b""), 1):
        if not line.strip():
            continue
        try:
            row = _row(line)
        except InvalidArgument as error:
            if batch:
                yield batch
            raise type(error)(f"line {number}: {error}") from None
        batch.append(row)
        size_bytes += len(row.key) + len(row.value)
        if len(batch) >= IMPORT_ROWS or size_bytes >= IMPORT_BYTES:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch


def _row(line: bytes) -> Row:
    """Raises: InvalidArgument, KeyTooLarge, ValueTooLarge."""
    try:
        row = msgspec.json.decode(line, type=Row)
    except (msgspec.DecodeError, RecursionError, binascii.Error) as error:
        raise InvalidArgument(str(error)) from None
    limits.validate_key(row.key)
    limits.validate_value(row.value)
    return row


@contextmanager
def _writing(path: Path | None) -> Iterator[IO[bytes]]:
    """A file gets its name when it is whole: an export that fails leaves an earlier one of that name as it was."""
    if path is None or str(path) == "-":
        with open(sys.stdout.fileno(), "wb", closefd=False) as file:
            yield file
        return
    if path.exists() and not path.is_file():  # a pipe or a device is written as it is
        with path.open("wb") as file:
            yield file
        return
    target = path.resolve()  # a link stays a link
    partial = target.with_name(target.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _reading(path: Path | None) -> IO[bytes]:
    if path is None or str(path) == "-":
        return open(standard_input().fileno(), "rb", closefd=False)
    return path.open("rb")


def _read(
    operation: operations.Operation, result: dict[str, Any]
) -> list[tuple[bytes, bytes | None]]:
    if isinstance(operation, operations.Get):
        return [(operation.key, result["value"])]
    return [(item["key"], item["value"]) for item in result.get("items", [])]


def _print_version(target: Target, version: int) -> None:
    if target.format is Format.JSON:
        print_json({"version": str(version)})
    else:
        sys.stdout.write(f"version {version}\n")


def base64_text(data: bytes) -> str:
    return base64.b64encode(data).decode()
