"""What a process of Kvorum logs: events with fields, as one JSON object a line, or as text for people.

A module takes `log = logs.logger(__name__)` and says `log.info("range split", range=7, at=key)`: the event is
a constant text, what varies goes into fields. Keys and values of users are not logged at `info` or above.
Records of other libraries (aiohttp, asyncio) pass through the same renderer. The hot path logs nothing per operation.

Only a program sets logging up (`kvstore`, `kvctl`, tools), never the library: who embeds a node decides for himself. Until
then our records are plain ones of the standard library, with the fields as `extra`: nothing below a warning is seen.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

Format = Literal["auto", "json", "console"]
Level = Literal["debug", "info", "warning", "error"]

LIBRARIES_LEVEL: Final = (
    logging.WARNING
)  # of loggers that are not ours: their chatter is not our operators' concern
OURS: Final = ("kvstore", "txn", "replication", "tools")
ERRORS: Final = (
    "error",
    "exception",
    "critical",
    "fatal",
)  # methods whose records say that something is wrong


_chain: Final[list[Processor]] = [
    structlog.stdlib.filter_by_level,
    structlog.stdlib.render_to_log_kwargs,
]


def logger(name: str) -> structlog.stdlib.BoundLogger:
    """The logger of a module. What structlog or the program is configured to does not matter, but for `set_up`."""
    wrapped: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=_chain,
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    return wrapped


def set_up(level: Level = "info", format: Format = "auto", stream: TextIO | None = None) -> None:  # noqa: A002  # the configuration's word
    """Send every log record of this process to `stream` (standard error if None). Calling it again replaces the setup.

    Args: level: the least level of our own records. format: "auto" is "console" on a terminal, else "json".
    """
    target = sys.stderr if stream is None else stream
    is_terminal = target.isatty()
    as_json = format == "json" or (format == "auto" and not is_terminal)

    handler = logging.StreamHandler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_shared(as_json=as_json),
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(as_json=as_json, colors=is_terminal),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(LIBRARIES_LEVEL)
    for name in OURS:
        logging.getLogger(name).setLevel(level.upper())

    _chain[:] = [
        structlog.stdlib.filter_by_level,
        structlog.contextvars.merge_contextvars,
        *_shared(as_json=as_json),
        structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
    ]
    structlog.configure(
        processors=_chain,
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,  # so that a second set_up reaches loggers that exist
    )


@contextmanager
def silenced(*, unless_set: bool = False) -> Iterator[None]:
    """Our records go to nobody meanwhile. `unless_set`: but for loggers whose level somebody has set: he wants them."""
    ours = [logging.getLogger(name) for name in OURS]
    levels = [(each, each.level) for each in ours if not (unless_set and each.level)]
    for each, _ in levels:
        each.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for each, level in levels:
            each.setLevel(level)


@contextmanager
def overheard(tell: Callable[[str], None]) -> Iterator[None]:
    """`tell` hears of each of our records at ERROR or above meanwhile, in words, whoever else sees it or does not."""

    def look(_logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        if method in ERRORS:
            tell(_in_words(event))
        return event

    _chain.insert(0, look)
    try:
        yield
    finally:
        with suppress(ValueError):  # `set_up` was called meanwhile
            _chain.remove(look)


def without_data(error: BaseException | None) -> dict[str, str]:
    """Fields for a record of an exception whose text may hold keys and values: its kind, and where it came from."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    frames = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in _frames(chain)]
    kinds = [type(each).__name__ for each in chain]
    return {"error": " from ".join(kinds) or "unknown", "where": "; ".join(frames)}


def _frames(chain: Sequence[BaseException]) -> Iterator[traceback.FrameSummary]:
    for error in chain:
        yield from traceback.extract_tb(error.__traceback__)


def _in_words(event: EventDict) -> str:
    """Event, fields, and the traceback of the exception, if there is one."""
    fields = {name: value for name, value in event.items() if name not in {"event", "exc_info"}}
    told = " ".join(
        [str(event.get("event")), *(f"{name}={value!r}" for name, value in fields.items())]
    )
    cause = event.get("exc_info")
    error = cause if isinstance(cause, BaseException) else sys.exc_info()[1] if cause else None
    if error is None:
        return told
    return f"{told}: {error!r}\n{''.join(traceback.format_exception(error))}"


def _shared(*, as_json: bool) -> list[Processor]:
    """What every record gets, ours or a library's."""
    time_format = "iso" if as_json else "%H:%M:%S.%f"
    return [
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt=time_format, utc=as_json, key="time"),
        structlog.processors.StackInfoRenderer(),
        _readable_bytes,
    ]


def _renderers(*, as_json: bool, colors: bool) -> list[Processor]:
    if not as_json:
        return [structlog.dev.ConsoleRenderer(colors=colors, timestamp_key="time")]
    return [
        structlog.processors.ExceptionRenderer(),
        structlog.processors.JSONRenderer(default=str),
    ]


def _readable_bytes(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    r"""Keys are bytes: shown as kvctl shows them, printable ASCII as it is and the rest as \xNN."""
    for name, value in event.items():
        if isinstance(value, bytes):
            event[name] = "".join(
                chr(byte) if 0x20 <= byte < 0x7F and byte != 0x5C else f"\\x{byte:02x}"
                for byte in value
            )
    return event
