"""`kvctl`: administer a cluster and look at its data.

Global options may stand before or behind the command. Errors are one line, `error: code: message`, and exit 1; a
command line that cannot be understood exits 2; `status` exits 0, 10 (degraded) or 11 (unavailable); Ctrl-C exits 130.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, TypeVar

import typer
from rich.live import Live

from kvstore import bootstrap
from kvstore.cli import data, health, locks, views
from kvstore.cli.init import Plan, initialize
from kvstore.cli.output import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    Format,
    Notation,
    can_ask,
    confirm,
    console,
    fail,
    print_json,
)
from kvstore.cli.shape import ADMIN_OPTIONS, hoisting
from kvstore.errors import KVError, Unavailable
from kvstore.quantities import parse_duration

ENDPOINTS_DEFAULT: Final = "127.0.0.1:7400"
STATUS_TIMEOUT_S: Final = 3.0

T = TypeVar("T")

app = typer.Typer(
    name="kvctl",
    help="Administer a Kvorum cluster, and look at its data. Keys and values are text with \\xNN for other bytes.",
    cls=hoisting(ADMIN_OPTIONS),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
nodes_app = typer.Typer(help="The nodes of the cluster.", no_args_is_help=True)
ranges_app = typer.Typer(help="The ranges of the key space.", no_args_is_help=True)
app.add_typer(nodes_app, name="nodes")
app.add_typer(ranges_app, name="ranges")


class Globals(NamedTuple):
    endpoints: str
    format: Format
    timeout_s: float
    yes: bool

    @property
    def addresses(self) -> list[str]:
        return bootstrap.parse_addresses(self.endpoints)

    @property
    def target(self) -> data.Target:
        bootstrap.parse_addresses(self.endpoints)
        return data.Target(self.endpoints, self.timeout_s, self.format)


def guarded(work: Callable[[], T]) -> T:
    """`work()`, with its errors as one line and Ctrl-C as exit 130."""
    try:
        if sys.stdout is None:
            raise KVError("standard output is closed", code="io_error")
        done = work()
        sys.stdout.flush()  # here, where a failure is met
        return done
    except KVError as error:
        fail(error)
    except (
        BrokenPipeError
    ):  # `| head` has what it wanted; the interpreter's own flush must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_ERROR) from None
    except (OSError, EOFError, UnicodeEncodeError) as error:
        fail(KVError(str(error), code="io_error"))
    except ImportError as error:
        fail(KVError(str(error), code="import_error"))
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _duration(text: str) -> float:
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not 0 < seconds <= 86_400:
        raise typer.BadParameter("a timeout is above 0 and at most a day")
    return seconds


@app.callback()
def _options(
    context: typer.Context,
    endpoints: Annotated[
        str,
        typer.Option("--endpoints", envvar="KVORUM_ENDPOINTS", help="HOST:PORT,... of some nodes."),
    ] = ENDPOINTS_DEFAULT,
    output: Annotated[
        Format, typer.Option("-o", "--output", help="For people, or for programs.")
    ] = Format.TABLE,
    timeout: Annotated[
        str, typer.Option("--timeout", help="Time for one request (init: for all), such as 500ms.")
    ] = "30s",
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask before init.")] = False,
) -> None:
    context.obj = Globals(endpoints, output, _duration(timeout), yes)


DryRun = Annotated[bool, typer.Option("--dry-run", help="Change nothing.")]
UseHex = Annotated[
    bool, typer.Option("--hex", help="Keys and values in hexadecimal; JSON has base64.")
]
UseBase64 = Annotated[bool, typer.Option("--base64", help="Keys and values in base64.")]
Key = Annotated[
    str, typer.Argument(help="The key; \\xNN for bytes that cannot be typed.", show_default=False)
]
Bound = Annotated[str | None, typer.Option(show_default=False)]


# --- the cluster


@app.command()
def init(
    context: typer.Context,
    nodes: Annotated[
        str, typer.Option("--nodes", help="HOST:PORT,... of all nodes, numbered in this order.")
    ],
    split: Annotated[
        list[str] | None, typer.Option("--split", help="A key at which to cut; repeat it.")
    ] = None,
    replicas: Annotated[
        int, typer.Option(min=1, max=9, help="Copies of each range.")
    ] = bootstrap.REPLICAS_DEFAULT,
    dry_run: DryRun = False,
    use_hex: UseHex = False,
    use_base64: UseBase64 = False,
) -> None:
    """Make waiting nodes a cluster, once. Idempotent; refuses nodes that hold other data.

    On a terminal it shows its plan and asks, unless -y; scripts and pipes are not asked. With --dry-run it shows its plan and
    ends. (A cluster's id is drawn anew at each call.)
    """
    given: Globals = context.obj
    aside = given.format is Format.JSON  # standard output is for the JSON

    def approve(plan: Plan) -> None:
        if dry_run and aside:
            missing = [address for address, _ in plan.missing]
            print_json({"missing": missing, "ranges": len(plan.requests[0].ranges)})
        else:
            console(stderr=aside).print(views.plan(plan))
        if dry_run:
            raise typer.Exit
        if not given.yes:
            confirm("These nodes become one cluster, for good. Go on?", stderr=aside)

    def work() -> None:
        notation = Notation.of(use_hex, use_base64)
        done = initialize(
            bootstrap.parse_addresses(nodes),
            [notation.read(key) for key in split or []],
            replicas=replicas,
            timeout_s=given.timeout_s,
            approve=approve if dry_run or can_ask(stderr=aside) else None,
        )
        if given.format is Format.JSON:
            print_json(done._asdict())
            return
        said = "is initialized already" if done.already else "is initialized"
        console().print(
            f"cluster {done.cluster_id} {said}: {len(done.nodes)} nodes, {done.ranges} ranges"
        )

    guarded(work)


@app.command()
def status(
    context: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until Ctrl-C.")] = False,
    interval: Annotated[str, typer.Option(help="Time between two looks of --watch.")] = "1s",
) -> None:
    """Is the cluster well? Exits 0 if so, 10 if degraded, 11 if a part of it is unavailable."""
    given: Globals = context.obj
    pause_s = _duration(interval)

    def once() -> health.Health:
        return health.assess(_reports(given))

    def work() -> int:
        if not watch:
            found = once()
            if given.format is Format.JSON:
                print_json(found)
            else:
                console().print(views.status(found))
            return health.EXIT_CODES[found.verdict]
        if given.format is Format.JSON:
            while True:
                print_json(once())
                time.sleep(pause_s)
        with Live(views.status(once()), console=console(), auto_refresh=False) as live:
            while True:
                time.sleep(pause_s)
                live.update(views.status(once()), refresh=True)

    raise typer.Exit(guarded(work))


@nodes_app.command("ls")
def nodes_ls(context: typer.Context) -> None:
    """Every node, with its state and how much it holds."""
    given: Globals = context.obj

    def work() -> None:
        found = health.assess(_some(_reports(given)))
        if given.format is Format.JSON:
            print_json(found.nodes)
        else:
            console().print(views.nodes(found.nodes))

    guarded(work)


@ranges_app.command("ls")
def ranges_ls(
    context: typer.Context,
    node: Annotated[
        int | None, typer.Option("--node", help="Only ranges with a replica on this node id.")
    ] = None,
    problem: Annotated[
        bool, typer.Option("--problem", help="Only ranges that have a problem.")
    ] = False,
) -> None:
    """Every range: its span, leader, replicas and problem."""
    given: Globals = context.obj

    def work() -> None:
        found = health.assess(_some(_reports(given))).ranges
        shown = [
            each
            for each in found
            if (node is None or node in each.nodes) and (each.problem or not problem)
        ]
        if given.format is Format.JSON:
            print_json(shown)
        else:
            console().print(views.ranges(shown))

    guarded(work)


# --- data


@app.command()
def get(
    context: typer.Context,
    key: Key,
    raw: Annotated[bool, typer.Option("--raw", help="The value's bytes and nothing else.")] = False,
    use_hex: UseHex = False,
    use_base64: UseBase64 = False,
) -> None:
    """Read a key. Exits 1 with not_found if it is absent."""

    def work() -> None:
        notation = Notation.of(use_hex, use_base64)
        data.get(context.obj.target, notation.read(key), notation, raw)

    guarded(work)


@app.command()
def put(
    context: typer.Context,
    key: Key,
    value: Annotated[
        str | None, typer.Argument(help="Absent or `-`: the bytes of standard input.")
    ] = None,
    if_version: Annotated[
        int | None, typer.Option(min=0, help="Only over this version; 0: absent.")
    ] = None,
    if_absent: Annotated[
        bool, typer.Option("--if-absent", help="Only if the key is absent.")
    ] = False,
    use_hex: UseHex = False,
    use_base64: UseBase64 = False,
) -> None:
    """Write a key."""

    def work() -> None:
        notation = Notation.of(use_hex, use_base64)
        content = data.read_value(value) if value in (None, "-") else notation.read(value)
        data.put(context.obj.target, notation.read(key), content, if_version, if_absent)

    guarded(work)


@app.command()
def delete(
    context: typer.Context, key: Key, use_hex: UseHex = False, use_base64: UseBase64 = False
) -> None:
    """Delete a key; it may be absent."""
    guarded(lambda: data.delete(context.obj.target, Notation.of(use_hex, use_base64).read(key)))


@app.command()
def incr(
    context: typer.Context,
    key: Key,
    by: Annotated[int, typer.Argument(help="What to add; negative ones behind `--`.")] = 1,
    use_hex: UseHex = False,
    use_base64: UseBase64 = False,
) -> None:
    """Add to a decimal number, and print the sum."""
    guarded(
        lambda: data.increment(context.obj.target, Notation.of(use_hex, use_base64).read(key), by)
    )


@app.command()
def scan(
    context: typer.Context,
    prefix: Bound = None,
    start: Bound = None,
    end: Bound = None,
    limit: Annotated[int, typer.Option(min=0, help="At most so many rows; 0: all.")] = 100,
    reverse: Annotated[bool, typer.Option("--reverse")] = False,
    keys_only: Annotated[bool, typer.Option("--keys-only")] = False,
    use_hex: UseHex = False,
    use_base64: UseBase64 = False,
) -> None:
    """Print keys and values in order."""

    def work() -> None:
        notation = Notation.of(use_hex, use_base64)
        data.scan(
            context.obj.target,
            _span(notation, start, end, prefix, limit, reverse, keys_only),
            notation,
        )

    guarded(work)


@app.command()
def watch(
    context: typer.Context,
    key: Annotated[str | None, typer.Argument(help="The key; or give --prefix.")] = None,
    prefix: Bound = None,
    since: Annotated[
        int | None, typer.Option(min=0, help="Events above this version; absent: from now on.")
    ] = None,
    count: Annotated[
        int,
        typer.Option(
            min=0, help="Stop after so many events (and the rest of their commit); 0: never."
        ),
    ] = 0,
    use_hex: UseHex = False,
    use_base64: UseBase64 = False,
) -> None:
    """Print every change of a key, or of the keys with a prefix, in the order of commit.

    One line each: version, `put` or `delete`, key, value, with tabs between; with `-o json`, one object a line. The last
    version printed is the --since to go on from.
    """

    def work() -> None:
        notation = Notation.of(use_hex, use_base64)
        data.watch(
            context.obj.target,
            None if key is None else notation.read(key),
            None if prefix is None else notation.read(prefix),
            since,
            count,
            notation,
        )

    guarded(work)


@app.command()
def txn(
    context: typer.Context,
    script: Annotated[
        str | None, typer.Argument(help='Such as "get a; put b 1"; absent or `-`: from stdin.')
    ] = None,
    use_hex: UseHex = False,
    use_base64: UseBase64 = False,
) -> None:
    """Run statements in one transaction: all of them, or none.

    get KEY | lock KEY (a get that keeps others from writing it) | put KEY VALUE | delete KEY | delete_range START END |
    incr KEY [BY] | min KEY NUMBER | max KEY NUMBER | append KEY VALUE [LIMIT] | clear KEY VALUE (if it has that value) |
    stamp PREFIX VALUE | scan PREFIX [LIMIT] |
    check KEY VALUE | absent KEY. A `check` or `absent` that does not hold stops it, and nothing is written.

    `kvctl txn locks` lists the locks of all transactions: who holds them, who waits.
    """

    def list_locks() -> None:
        found = locks.collect(context.obj.addresses, context.obj.timeout_s)
        if context.obj.format is Format.JSON:
            print_json(found)
        else:
            console().print(views.locks(found, Notation.of(use_hex, use_base64)))

    def work() -> None:
        text = script or ""
        if script in (None, "-"):
            text = data.read_value(script).decode("utf-8", "surrogateescape")
        data.transact(context.obj.target, text, Notation.of(use_hex, use_base64))

    guarded(list_locks if script == "locks" else work)


@app.command("export")
def export_(
    context: typer.Context,
    file: Annotated[Path | None, typer.Argument(help="Absent or `-`: standard output.")] = None,
    prefix: Bound = None,
    start: Bound = None,
    end: Bound = None,
    limit: Annotated[int, typer.Option(min=0, help="At most so many rows; 0: all.")] = 0,
    use_hex: UseHex = False,
    use_base64: UseBase64 = False,
) -> None:
    """Write keys and values as JSON lines, in base64, all of one version. --hex and --base64: of the bounds."""

    def work() -> None:
        notation = Notation.of(use_hex, use_base64)
        count = data.export(context.obj.target, _span(notation, start, end, prefix, limit), file)
        console(stderr=True).print(f"{count} rows exported")

    guarded(work)


@app.command("import")
def import_(
    context: typer.Context,
    file: Annotated[Path | None, typer.Argument(help="Absent or `-`: standard input.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Put every line of an export. Batches are atomic, the whole is not; it may be run again.

    With --dry-run every line is checked, and no node is asked.
    """

    def work() -> None:
        if dry_run:
            said = f"{data.check_import(file)} rows can be imported"
        else:
            said = f"{data.import_(context.obj.target, file)} rows imported"
        console(stderr=True).print(said)

    guarded(work)


def _span(
    notation: Notation,
    start: str | None,
    end: str | None,
    prefix: str | None,
    limit: int,
    reverse: bool = False,
    keys_only: bool = False,
) -> data.Span:
    low, high, head = (
        None if text is None else notation.read(text) for text in (start, end, prefix)
    )
    return data.Span(low, high, head, limit, reverse, keys_only)


def _reports(given: Globals) -> dict[str, Any]:
    """The status of every node that the endpoints know, by address; None for one that does not answer."""
    return locks.reports(given.addresses, given.timeout_s)


def _some(reports: dict[str, Any]) -> dict[str, Any]:
    """Raises Unavailable: nobody answered, so nothing is known (`status` has an exit status of its own for that)."""
    if not any(reports.values()):
        raise Unavailable(
            f"no node answers at {', '.join(reports)}: name nodes that run by --endpoints or KVORUM_ENDPOINTS"
        )
    return reports


def main() -> None:
    """The entry point of `kvctl`."""
    app()


if __name__ == "__main__":
    main()
