"""Claims of logging: one JSON object a line, text for people on a terminal, levels, bytes as \\xNN, libraries alike."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import structlog

from kvstore import logs


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Logging is of the whole process: give it back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    chain = logs._chain[:]
    yield
    logs._chain[:] = chain
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in logs.OURS:
        logging.getLogger(name).setLevel(logging.NOTSET)


class Terminal(io.StringIO):
    """A stream that a person looks at."""

    def isatty(self) -> bool:
        return True


def objects(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_is_one_object_a_line_with_time_level_logger_and_fields():
    stream = io.StringIO()
    logs.set_up("info", "json", stream)
    structlog.get_logger("kvstore.node").info("range split", range=7, took_s=0.5)
    (record,) = objects(stream)
    time = str(record.pop("time"))
    assert time.endswith("Z")
    assert "T" in time
    assert record == {
        "event": "range split",
        "level": "info",
        "logger": "kvstore.node",
        "range": 7,
        "took_s": 0.5,
    }


def test_an_exception_stays_on_its_line():
    stream = io.StringIO()
    logs.set_up("info", "json", stream)
    try:
        raise ValueError("boom\nbang")
    except ValueError:
        structlog.get_logger("kvstore.node").exception("failed")
    (record,) = objects(stream)
    assert "ValueError: boom\nbang" in str(record["exception"])


def test_bytes_are_shown_as_kvctl_shows_them():
    stream = io.StringIO()
    logs.set_up("info", "json", stream)
    structlog.get_logger("txn").warning("met", key=b"a\\b\x00\xff")
    assert objects(stream)[0]["key"] == "a\\x5cb\\x00\\xff"


@pytest.mark.parametrize(
    ("level", "written"), [("debug", "diwe"), ("info", "iwe"), ("warning", "we"), ("error", "e")]
)
def test_only_the_level_and_above_is_written(level, written):
    stream = io.StringIO()
    logs.set_up(level, "json", stream)
    log = structlog.get_logger("replication.host")
    log.debug("d")
    log.info("i")
    log.warning("w")
    log.error("e")
    assert "".join(str(record["event"]) for record in objects(stream)) == written


def test_libraries_are_rendered_alike_and_only_their_warnings():
    stream = io.StringIO()
    logs.set_up("debug", "json", stream)
    logging.getLogger("aiohttp.access").info("GET / 200")
    logging.getLogger("asyncio").warning("took %s seconds", 3)
    (record,) = objects(stream)
    assert (record["event"], record["level"], record["logger"]) == (
        "took 3 seconds",
        "warning",
        "asyncio",
    )


def test_auto_is_text_on_a_terminal_and_json_elsewhere():
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        logs.set_up("info", "auto", stream)
        structlog.get_logger("kvstore").info("hello", node=3)
    assert "hello" in terminal.getvalue()
    assert not terminal.getvalue().startswith("{")
    assert objects(pipe)[0]["node"] == 3


def test_console_without_a_terminal_has_no_colours():
    stream = io.StringIO()
    logs.set_up("info", "console", stream)
    structlog.get_logger("kvstore").info("hello", node=3)
    assert "\x1b" not in stream.getvalue()
    assert "node=3" in stream.getvalue()


def test_a_second_set_up_replaces_the_first_even_for_loggers_that_exist():
    first, second = io.StringIO(), io.StringIO()
    log = structlog.get_logger("kvstore")
    logs.set_up("info", "json", first)
    log.info("one")
    logs.set_up("info", "json", second)
    log.info("two")
    assert [record["event"] for record in objects(first)] == ["one"]
    assert [record["event"] for record in objects(second)] == ["two"]


def test_a_modules_logger_follows_set_up_and_needs_nothing_else():
    log = logs.logger("kvstore.node")
    stream = io.StringIO()
    logs.set_up("info", "json", stream)
    log.bind(node=3).info("ready", ranges=5)
    log.debug("too little")
    (record,) = objects(stream)
    assert (record["event"], record["node"], record["ranges"]) == ("ready", 3, 5)
    assert record["logger"] == "kvstore.node"


def test_before_set_up_a_module_logs_as_the_standard_library_does(caplog, capsys):
    log = logs.logger("kvstore.node")
    log.info("nobody asked")
    with caplog.at_level(logging.INFO, "kvstore"):
        log.info("ready", ranges=5)
    (record,) = caplog.records
    assert (record.getMessage(), record.ranges) == ("ready", 5)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("unless_set", "heard"), [(False, []), (True, ["during"])])
def test_silenced_records_go_to_nobody_unless_their_level_was_set_and_that_counts(
    unless_set, heard, caplog
):
    logging.getLogger("kvstore").setLevel(logging.WARNING)
    with logs.silenced(unless_set=unless_set):
        logs.logger("kvstore.node").warning("during")
        logs.logger("replication.wal").critical("its level was not set")
    logs.logger("kvstore.node").warning("after")
    logs.logger("replication.wal").warning("after, too")
    said = [record.getMessage() for record in caplog.records]
    assert said == [*heard, "after", "after, too"]


def test_importing_the_module_sets_nothing_up():
    program = "import logging, structlog, kvstore.logs; print(logging.getLogger().handlers, structlog.is_configured())"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[] False\n"


@pytest.mark.parametrize("is_set_up", [False, True])
def test_errors_are_overheard_whether_they_are_silenced_or_not_and_nothing_else_is(
    is_set_up: bool,
) -> None:
    if is_set_up:
        logs.set_up("debug", "json", io.StringIO())
    log = logs.logger("kvstore.somewhere")
    told: list[str] = []
    with logs.silenced(), logs.overheard(told.append):
        log.warning("foreseen", address="n1")
        log.error("not foreseen", address="n1", exc_info=KeyError("this"))
        try:
            raise ValueError("that")
        except ValueError:
            log.exception("nor was this")
    log.error("nobody listens")
    assert [each.splitlines()[0] for each in told] == [
        "not foreseen address='n1': KeyError('this')",
        "nor was this: ValueError('that')",
    ]


def test_a_failure_is_told_without_what_its_text_may_hold():
    try:
        try:
            raise KeyError("secret")
        except KeyError as error:
            raise ValueError("of secret") from error
    except ValueError as error:
        fields = logs.without_data(error)
    assert fields["error"] == "ValueError from KeyError"
    assert "test_logs.py:" in fields["where"]
    assert "secret" not in str(fields)
    assert logs.without_data(None)["error"] == "unknown"
