"""`kvstore`: run a node, try a cluster, look at the configuration.

A node that cannot start says so in one line that tells what to do, and exits with a status of its own:
1 for whatever is wrong with the machine or the data, 2 for a command line or a configuration that is wrong.
SIGTERM and SIGINT drain the node and stop it; a second one stops it without draining. Exit 0 after an orderly stop.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple

import structlog
import typer

from kvstore import config as configuration
from kvstore import logs
from kvstore.cli.output import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_USAGE
from kvstore.cli.packages import check_packages
from kvstore.errors import ConfigError, KVError

if TYPE_CHECKING:
    from kvstore.node import Node

PARENT_FD_VARIABLE: Final = "KVORUM_PARENT_FD"
ORPHAN_GRACE_S: Final = 10.0  # a node whose parent is gone has this long to stop by itself
OPEN_FILES_WANTED: Final = 65_536
GC_ALLOCATIONS: Final = 50_000
SWITCH_INTERVAL_S: Final = 0.000_5

log = structlog.get_logger("kvstore.cli")

app = typer.Typer(
    name="kvstore",
    help="Run a node of Kvorum, a distributed transactional key-value store.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
config_app = typer.Typer(help="The configuration.", no_args_is_help=True)
app.add_typer(config_app, name="config")


class Start(NamedTuple):
    """What `kvstore start` was asked for, besides the configuration."""

    address_file: Path | None
    parent_fd: int | None


@app.command()
def start(
    directory: Annotated[
        Path | None, typer.Option("--dir", help="The data directory.", show_default=False)
    ] = None,
    listen: Annotated[
        str | None, typer.Option("--listen", help="HOST:PORT; one port serves all.")
    ] = None,
    advertise: Annotated[
        str | None, typer.Option("--advertise", help="HOST:PORT at which others reach it.")
    ] = None,
    join: Annotated[
        str | None, typer.Option("--join", help="HOST:PORT,... of members. Not possible yet.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="A TOML file.", show_default=False)
    ] = None,
    address_file: Annotated[Path | None, typer.Option("--address-file", hidden=True)] = None,
    parent_fd: Annotated[
        int | None, typer.Option("--parent-fd", envvar=PARENT_FD_VARIABLE, hidden=True)
    ] = None,
) -> None:
    """Run a node until SIGTERM. An empty directory waits for `kvctl init`."""
    flags = {
        "node.dir": directory and str(directory),
        "node.listen": listen,
        "node.advertise": advertise,
    }
    try:
        check_packages()
        settings = configuration.load(
            config, environment=os.environ, flags={**flags, "node.join": join}
        )
        if not settings.node.dir:
            raise ConfigError("say where the data shall be: --dir DIR")
        logs.set_up(settings.logging.level, settings.logging.format)
    except (KVError, ImportError) as error:
        _end(error, EXIT_USAGE)
    raise typer.Exit(_run(settings, Start(address_file, parent_fd)))


@app.command()
def demo(
    nodes: Annotated[int, typer.Option("--nodes", min=1, max=9, help="How many processes.")] = 3,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Keep the data here.", show_default=False)
    ] = None,
    leave: Annotated[
        bool, typer.Option("--exit", help="End when it is done, even on a terminal.")
    ] = False,
) -> None:
    """Start a cluster on this machine and try it: writes, transfers across ranges, a killed node."""
    from kvstore.cli.demo import run as run_demo

    try:
        check_packages()
    except ImportError as error:
        _end(error, EXIT_USAGE)
    stay = sys.stdout.isatty() and not leave
    try:
        raise typer.Exit(run_demo(nodes, directory, stay=stay))
    except (KVError, OSError) as error:
        _end(error, EXIT_ERROR)
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None


@config_app.command("print-default")
def print_default() -> None:
    """Every key with its meaning, unit and default, as a file to begin with."""
    sys.stdout.write(configuration.print_default())


@config_app.command()
def validate(file: Annotated[Path, typer.Argument(help="A TOML file.")]) -> None:
    """Exit 0 if the file is right, 2 with the reason if not. A node also needs a directory: node.dir, or --dir."""
    try:
        if configuration.validate(file).node.join:
            raise ConfigError("node.join: an empty node cannot join a cluster yet: leave it out")
    except KVError as error:
        _end(error, EXIT_USAGE)
    sys.stdout.write(f"{file}: ok\n")


def advice(error: BaseException) -> tuple[str, str]:
    """(code, what happened and what to do), for an error that ends a node."""
    if (
        isinstance(error, OSError)
        and not isinstance(error, KVError)
        and error.errno == errno.EADDRINUSE
    ):
        return (
            "address_in_use",
            "another process listens there: stop it, or choose another --listen",
        )
    hints = {
        "data_directory_error": "choose another --dir, or stop the process that uses it",
        "wrong_cluster": "this directory belongs to another cluster: choose another --dir",
        "LogFormatError": "start it with the version of Kvorum that wrote it",
        "LogMismatch": "`wal` and `rocks` in --dir do not belong together: put both back as they were",
        "LogWriteFailed": "the disk failed: look after it, then start the node again",
        "disk_full": "make room, then start the node again",
        "config_error": "see `kvstore config print-default`",
    }
    if isinstance(error, KVError):
        code = error.code
    else:  # the kinds of OSError are many; kvctl says io_error as well
        code = "io_error" if isinstance(error, OSError) else type(error).__name__
    text = error.message if isinstance(error, KVError) else str(error) or repr(error)
    hint = hints.get(code, "")
    told = hint in text or ("--dir" in hint and "--dir" in text)
    return _snake(code), text if told else f"{text}: {hint}"


def _run(settings: configuration.NodeConfig, asked: Start) -> int:
    from kvstore.adapters.loop import new_event_loop
    from replication.errors import LogFormatError, LogMismatch  # not before the check

    os.environ.setdefault(
        "PROMETHEUS_DISABLE_CREATED_SERIES", "True"
    )  # else each counter is told twice
    _raise_open_files_limit()
    _tune_interpreter()
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(_serve(settings, asked))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        # whatever ends a node is told in one line; the traceback is in the log
        code, message = advice(error)
        if not isinstance(error, KVError | OSError | LogMismatch | LogFormatError):
            log.exception("node failed")
        sys.stderr.write(f"error: {code}: {' '.join(message.split())}\n")
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_ERROR


def _tune_interpreter() -> None:
    """For a process that does nothing but serve: what the modules made is never collected, collections are rare (a turn
    leaves few cycles), and a thread that comes back from the disk does not wait 5 ms for the interpreter.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_ALLOCATIONS, 20, 50)
    sys.setswitchinterval(SWITCH_INTERVAL_S)


async def _serve(settings: configuration.NodeConfig, asked: Start) -> int:
    from kvstore.node import Node, production_adapters

    loop = asyncio.get_running_loop()
    stop: asyncio.Future[str] = loop.create_future()
    drain = _watch_signals(loop, stop)
    if asked.parent_fd is not None:
        _watch_parent(asked.parent_fd, loop, lambda: _resolve(stop, "parent ended"))
    where = settings.node
    node = Node(
        where.dir,
        where.listen,
        where.advertise,
        settings,
        production_adapters(settings),
        join=where.join,
    )
    if not await _started(node, stop):
        return 0
    log.info("listening", address=node.address, directory=where.dir, pid=os.getpid())
    if asked.address_file is not None:
        _write_address(asked.address_file, node.address)
    node.fatal.add_done_callback(lambda _: _resolve(stop, "fatal"))
    reason = await stop
    log.info("stopping", reason=reason)
    if node.fatal.done():
        return await _die(node)
    stopping = asyncio.ensure_future(node.stop(drain=True))
    drain.add_done_callback(lambda _: _end_drain(node, stopping))
    node.fatal.add_done_callback(lambda _: stopping.cancel())
    try:
        await stopping
    except asyncio.CancelledError:  # a second signal, or the node failed
        if not node.fatal.done():
            await node.stop(drain=False)
    if node.fatal.done():
        return await _die(node)
    log.info("stopped")
    return 0


def _end_drain(node: Node, stopping: asyncio.Future[None]) -> None:
    """What comes after the drain is needed in any case: it would not be begun again."""
    if node.state != "stopped":
        stopping.cancel()


async def _started(node: Node, stop: asyncio.Future[str]) -> bool:
    """Start it, unless `stop` comes first: a node may wait long for others, and must still end when it is told to."""
    starting = asyncio.ensure_future(node.start())
    stop.add_done_callback(lambda _: starting.cancel())
    try:
        await starting
    except asyncio.CancelledError:
        if not stop.done():
            raise
        log.info("stopping", reason=stop.result())
        await node.stop(drain=False)
        return False
    return True


async def _die(node: Node) -> int:
    """A log whose outcome is unknown: end at once, without flushing or draining anything."""
    error = node.fatal.exception() or KVError("the node ended", code="internal_error")
    code, message = advice(error)
    log.error("fatal", code=code, message=message)
    sys.stderr.write(f"error: {code}: {' '.join(message.split())}\n")
    sys.stderr.flush()
    os._exit(EXIT_ERROR)


def _watch_signals(
    loop: asyncio.AbstractEventLoop, stop: asyncio.Future[str]
) -> asyncio.Future[str]:
    """The first signal resolves `stop`, the second one the future that is returned."""
    again: asyncio.Future[str] = loop.create_future()

    def on_signal(number: signal.Signals) -> None:
        _resolve(again if stop.done() else stop, number.name)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return again


def _watch_parent(fd: int, loop: asyncio.AbstractEventLoop, on_end: Callable[[], None]) -> None:
    """A thread, so that it works however busy or stuck the loop is, waits for the other end of the pipe to close."""

    def wait() -> None:
        while os.read(fd, 4096):
            pass
        try:
            loop.call_soon_threadsafe(on_end)
        except RuntimeError:  # the loop has ended already
            return
        threading.Event().wait(ORPHAN_GRACE_S)
        os._exit(EXIT_ERROR)

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()


def _resolve(future: asyncio.Future[str], value: str) -> None:
    if not future.done():
        future.set_result(value)


def _write_address(path: Path, address: str) -> None:
    """Whole or not at all, for who polls it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(address)
    partial.replace(path)


def _raise_open_files_limit() -> None:
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES_WANTED if hard == resource.RLIM_INFINITY else min(OPEN_FILES_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _end(error: BaseException, status: int) -> None:
    code, message = advice(error)
    sys.stderr.write(f"error: {code}: {' '.join(message.split())}\n")
    raise typer.Exit(status)


def _snake(name: str) -> str:
    return "".join(f"_{each.lower()}" if each.isupper() else each for each in name).lstrip("_")


def main() -> None:
    """The entry point of `kvstore`."""
    app()


if __name__ == "__main__":
    main()
