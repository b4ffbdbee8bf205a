"""The command lines: what they read and print, their exit statuses, and the verdict on a cluster. No process is started."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import kvstore
from kvstore import errors
from kvstore.cli import admin, data, server, shape
from kvstore.cli.output import Notation
from kvstore.errors import InvalidArgument, KVError, NoQuorum, WrongCluster
from kvstore.keytext import escape, unescape
from kvstore.operations import (
    AppendIfFits,
    Check,
    CompareAndClear,
    Delete,
    Get,
    Increment,
    Max,
    Min,
    Put,
    PutVersionstampedKey,
    Scan,
    parse_script,
)
from replication.errors import LogFormatError
from tests.unit.kvstore.fake_node import FIRST_VERSION, FakeDatabase, FakeEntry

# --- bytes as text


@pytest.mark.parametrize(
    ("text", "written"),
    [
        (r"plain", b"plain"),
        (r"\x00\xff", b"\x00\xff"),
        (r"a\\b", b"a\\b"),
        (r"\n\t\r\0", b"\n\t\r\x00"),
        ("ключ", "ключ".encode()),
        ("\udcfe", b"\xfe"),  # an argument that is no UTF-8
        ("", b""),
    ],
)
def test_escapes_are_read(text, written):
    assert unescape(text) == written


@pytest.mark.parametrize("text", ["\\", r"\x", r"\x0", r"\q", r"a\\\z"])
def test_what_is_no_escape_is_refused(text):
    with pytest.raises(InvalidArgument):
        unescape(text)


@pytest.mark.parametrize(
    ("data_", "text"),
    [
        (b"a b", "a b"),
        (b"\x00\xff", r"\x00\xff"),
        (b"\\", r"\\"),
        (b"\n", r"\x0a"),
        ("ü".encode(), "ü"),
    ],
)
def test_bytes_are_written_readably(data_, text):
    assert escape(data_) == text


@given(st.binary(max_size=60), st.sampled_from(Notation))
def test_every_notation_reads_back_what_it_writes(data_, notation):
    written = notation.write(data_)
    assert notation.read(written) == data_
    assert written.isprintable()


@pytest.mark.parametrize(
    ("notation", "text"), [(Notation.HEX, "abc"), (Notation.HEX, "zz"), (Notation.BASE64, "%")]
)
def test_a_malformed_notation_is_refused(notation, text):
    with pytest.raises(InvalidArgument):
        notation.read(text)


# --- scripts


def test_a_script_is_statements_between_semicolons_and_lines():
    script = (
        "get a; lock a; put b 1 ;; delete c # no more\nincr n 5; scan p; absent x; check y 'a b;c'"
    )
    assert parse_script(script, unescape) == [
        Get(b"a"),
        Get(b"a", "exclusive"),
        Put(b"b", b"1"),
        Delete(b"c"),
        Increment(b"n", 5),
        Scan(prefix=b"p"),
        Check(b"x"),
        Check(b"y", b"a b;c"),
    ]


def test_scripts_have_the_atomic_operations():
    script = "min a 1; max a -2; append b xy; append b z 9; clear c old; stamp q/ job"
    assert parse_script(script, unescape) == [
        Min(b"a", 1),
        Max(b"a", -2),
        AppendIfFits(b"b", b"xy"),
        AppendIfFits(b"b", b"z", 9),
        CompareAndClear(b"c", b"old"),
        PutVersionstampedKey(b"q/", b"job"),
    ]


@pytest.mark.parametrize(
    ("script", "put"),
    [
        ('put k ""', Put(b"k", b"")),
        (r"put k \x00\\", Put(b"k", b"\x00\\")),
        ("put k a#b", Put(b"k", b"a#b")),
        ('put k a" b "c', Put(b"k", b"a b c")),
        ("PUT k v", Put(b"k", b"v")),
    ],
)
def test_words_are_quoted_and_escaped(script, put):
    assert parse_script(script, unescape) == [put]


@pytest.mark.parametrize(
    "script",
    ["", "  ;; # nothing", "get", "get a b", "jump a", "put k 'open", "incr n x", "scan p 0"],
)
def test_a_malformed_script_is_refused(script):
    with pytest.raises(InvalidArgument):
        parse_script(script, unescape)


def test_a_refusal_names_the_statement():
    with pytest.raises(InvalidArgument, match="statement 2"):
        parse_script("get a; get", unescape)


# --- global options anywhere


@pytest.mark.parametrize(
    ("given_", "hoisted"),
    [
        ("get a -o json", "-o json get a"),
        ("get a --timeout=1s -y", "--timeout=1s -y get a"),
        ("-o table get a", "-o table get a"),
        ("put k -- -o v", "put k -- -o v"),
        ("get a --raw", "get a --raw"),
        ("get a -o", "-o get a"),
        ("get a -ojson", "-ojson get a"),
        ("get -ojson a -y", "-ojson -y get a"),
        ("get a -yes", "get a -yes"),
        ("get - -o json", "-o json get -"),
        ("get -orders", "get -orders"),
        ("scan --prefix -orders/", "scan --prefix -orders/"),
        ("scan --prefix -ojson -otable", "-otable scan --prefix -ojson"),
        ("scan --prefix=a -ojson", "-ojson scan --prefix=a"),
        ("scan --start --timeout", "scan --start --timeout"),
        ("scan --keys-only -ojson", "-ojson scan --keys-only"),
    ],
)
def test_global_options_may_stand_behind_the_command(given_, hoisted):
    known = shape.valued(typer.main.get_group(admin.app))
    assert shape.hoist(given_.split(), shape.ADMIN_OPTIONS, known) == hoisted.split()


# --- kvctl on data


@pytest.fixture
def database():
    return FakeDatabase({b"a": b"1", b"b\x00": b"\xff"})


@pytest.fixture
def kvctl(database, monkeypatch):
    """Run kvctl with a client of `database`."""

    def connect(endpoints, timeout):
        database.connected.append((endpoints, timeout))
        return database

    monkeypatch.setattr(kvstore, "connect", connect, raising=False)

    def run(*arguments, stdin=None, env=None):
        return CliRunner().invoke(admin.app, list(arguments), input=stdin, env=env)

    return run


def test_what_stands_behind_an_option_that_takes_a_value_is_its_value(kvctl, database):
    database.commit({b"-orders/1": b"1", b"-o": b"2"})
    assert kvctl("scan", "--prefix", "-orders/", "--keys-only").stdout.split()[-1] == "-orders/1"
    found = kvctl("scan", "--prefix", "-o", "-ojson", "--keys-only").stdout
    found = kvctl("scan", "--prefix", "-o", "-ojson", "--keys-only").stdout
    assert [item["key"] for item in json.loads(found)["items"]] == ["LW8=", "LW9yZGVycy8x"]


def test_get_prints_the_value_with_escapes(kvctl):
    assert kvctl("get", r"b\x00").stdout == "\\xff\n"
    assert kvctl("get", "a").stdout == "1\n"
    assert kvctl("get", "--hex", "6200").stdout == "ff\n"
    assert kvctl("get", "--base64", "YgA=").stdout == "/w==\n"


def test_what_the_terminal_has_no_character_for_is_escaped(database, monkeypatch):
    monkeypatch.setattr(kvstore, "connect", lambda *_, **__: database)
    database.commit({"é".encode(): "ä€".encode()})
    run = CliRunner(charset="latin-1").invoke
    assert run(admin.app, ["get", "é"]).stdout_bytes == b"\xe4\\xe2\\x82\\xac\n"
    run = CliRunner(charset="ascii").invoke
    told = run(admin.app, ["scan", "--prefix", "é"]).stdout
    assert told == "key\tvalue\n\\xc3\\xa9\t\\xc3\\xa4\\xe2\\x82\\xac\n"
    assert unescape(told.split()[-1]) == "ä€".encode()


def test_get_raw_prints_the_bytes_and_nothing_else(kvctl):
    assert kvctl("get", "--raw", r"b\x00").stdout_bytes == b"\xff"


def test_json_has_base64_and_versions_as_strings(kvctl):
    answer = json.loads(kvctl("get", "a", "-o", "json").stdout)
    assert answer == {"key": "YQ==", "value": "MQ==", "version": str(FIRST_VERSION)}


def test_an_error_is_one_line_and_exit_1(kvctl):
    done = kvctl("get", "zz")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "error: not_found: no such key: zz\n"


def test_an_error_of_the_cluster_keeps_its_code(kvctl, database):
    database.fails = NoQuorum("two of three\nare down")
    done = kvctl("put", "a", "1")
    assert done.exit_code == 1
    assert done.stderr == "error: no_quorum: two of three are down\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["get"],
        ["jump"],
        ["get", "a", "--nonsense"],
        ["get", "a", "-o", "xml"],
        ["get", "a", "--timeout", "5"],
        ["get", "a", "--timeout", "0s"],
        ["put", "a", "1", "--if-version", "x"],
    ],
)
def test_a_command_line_that_is_wrong_exits_2(kvctl, arguments):
    assert kvctl(*arguments).exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["get", r"\q"],
        ["get", "a", "--hex", "--base64"],
        ["put", "a", "1", "--if-absent", "--if-version", "1"],
        ["scan", "--prefix", "a", "--start", "b"],
        ["get", "a", "--endpoints", "nonsense"],
        ["txn", "jump"],
    ],
)
def test_an_argument_that_is_wrong_is_a_typed_error(kvctl, arguments):
    done = kvctl(*arguments)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: invalid_argument: ")


def test_put_takes_the_value_from_standard_input(kvctl, database):
    assert kvctl("put", "k", stdin=b"\x00\xffraw").exit_code == 0
    assert kvctl("put", "l", "-", stdin=b"").exit_code == 0
    assert database.plain()[b"k"] == b"\x00\xffraw"
    assert database.plain()[b"l"] == b""


def test_put_with_conditions(kvctl, database):
    assert kvctl("put", "a", "2", "--if-absent").exit_code == 1
    assert kvctl("put", "a", "2", "--if-version", str(FIRST_VERSION)).exit_code == 0
    assert database.plain()[b"a"] == b"2"


def test_delete_and_incr(kvctl, database):
    assert kvctl("incr", "a", "41").stdout == "42\n"
    assert kvctl("incr", "a", "--", "-2").stdout == "40\n"
    assert kvctl("delete", "a").exit_code == 0
    assert b"a" not in database.rows


def test_scan_prints_rows_in_order_and_says_when_there_are_more(kvctl, database):
    done = kvctl("scan", "--limit", "1")
    assert [line.split() for line in done.stdout.splitlines()] == [["key", "value"], ["a", "1"]]
    assert "more than 1" in done.stderr
    assert kvctl("scan", "--keys-only", "--reverse").stdout == "b\\x00\na\n"


def test_a_table_in_a_pipe_has_tabs_between_its_cells_and_a_line_for_each_row_however_long(
    kvctl, database
):
    database.rows[b"a"] = FakeEntry(b"a", b"x y" * 10_000, 1)
    lines = kvctl("scan").stdout.splitlines()
    assert [line.split("\t") for line in lines] == [
        ["key", "value"],
        ["a", "x y" * 10_000],
        [r"b\x00", r"\xff"],
    ]


def test_scan_as_json(kvctl):
    answer = json.loads(kvctl("scan", "--prefix", "a", "-o", "json").stdout)
    assert answer == {"items": [{"key": "YQ==", "value": "MQ=="}], "more": False}


def test_txn_is_atomic_and_prints_what_it_read(kvctl, database):
    done = kvctl("txn", "get a; put n 5; incr n 2; get n; delete a")
    assert done.exit_code == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows == [
        ["key", "value"],
        ["a", "1"],
        ["n", "7"],
        ["committed", "at", str(FIRST_VERSION + 1)],
    ]
    assert kvctl("txn", "put x 1; absent n").exit_code == 1
    assert b"x" not in database.rows


def test_txn_from_standard_input_as_json(kvctl):
    answer = json.loads(kvctl("txn", "-o", "json", stdin="get a\nget zz\n").stdout)
    assert answer == {"version": None, "results": [{"value": "MQ=="}, {"value": None}]}


def test_a_txn_from_standard_input_may_hold_bytes_that_are_no_text(kvctl, database):
    assert kvctl("txn", stdin=b"put k \xff").exit_code == 0
    assert database.plain()[b"k"] == b"\xff"


@pytest.mark.parametrize(
    ("closed", "words"),
    [
        ("stdin", ("put", "k")),
        ("stdin", ("txn",)),
        ("stdin", ("import",)),
        ("stdout", ("get", "a")),
    ],
)
def test_a_closed_standard_stream_is_told_in_one_line(kvctl, monkeypatch, closed, words):
    real = admin.guarded

    def without(work):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, closed, None)
            return real(work)

    monkeypatch.setattr(admin, "guarded", without)
    done = kvctl(*words)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: io_error: standard ")
    assert done.stderr.count("\n") == 1


def test_a_txn_has_the_time_that_was_given_and_not_that_of_run(kvctl, database):
    kvctl("txn", "get a", "--timeout", "2s")
    assert database.timeouts == [2.0]


def test_an_export_is_imported_again(kvctl, database, tmp_path):
    file = tmp_path / "rows.jsonl"
    before = database.plain()
    assert kvctl("export", str(file)).exit_code == 0
    assert json.loads(file.read_text().splitlines()[0]) == {
        "key": "YQ==",
        "value": "MQ==",
    }
    database.rows.clear()
    done = kvctl("import", str(file))
    assert done.stderr == "2 rows imported\n"
    assert database.plain() == before


def test_an_export_that_fails_leaves_the_earlier_one_alone(kvctl, monkeypatch, tmp_path):
    def failing(*_, **__):
        raise NoQuorum("no leader")

    file = tmp_path / "rows.jsonl"
    file.write_text("earlier")
    monkeypatch.setattr(data, "_rows", failing)
    assert kvctl("export", str(file)).exit_code == 1
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [
        (file.name, "earlier")
    ]


def test_a_reader_that_went_away_is_no_news(tmp_path):
    """As with `kvctl export | head -1`."""
    program = (
        "from kvstore.cli import admin\n"
        "def work():\n    raise BrokenPipeError(32, 'Broken pipe')\n"
        "try:\n    admin.guarded(work)\nexcept BaseException as error:\n    print('lost', error.exit_code, flush=True)\n"
        "    raise SystemExit(error.exit_code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_a_reader_that_went_away_before_what_is_printed_leaves_the_buffer_is_no_news():
    """As with `kvctl get k | true`: the interpreter would flush, and complain, behind everything else."""
    program = (
        "import os, sys\n"
        "from kvstore.cli import admin\n"
        "read, write = os.pipe()\n"
        "os.dup2(write, 1)\nos.close(write)\nos.close(read)\n"
        "try:\n    admin.guarded(lambda: sys.stdout.write('v\\n'))\n"
        "except BaseException as error:\n    raise SystemExit(error.exit_code)\n"
    )
    buffered = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=buffered, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, "")


def test_a_file_that_is_not_there_is_one_line_too(kvctl, tmp_path):
    done = kvctl("import", str(tmp_path / "nowhere"))
    assert done.exit_code == 1
    assert done.stderr.startswith("error: io_error: ")


def test_endpoints_and_timeout_come_from_options_or_the_environment(kvctl, database):
    kvctl("get", "a", "--endpoints", "h:1,h:2", "--timeout", "500ms")
    kvctl("get", "a", env={"KVORUM_ENDPOINTS": "e:9"})
    assert database.connected == [("h:1,h:2", 0.5), ("e:9", 30.0)]


# --- kvstore


def test_the_default_configuration_is_printed_and_valid(tmp_path):
    printed = CliRunner().invoke(server.app, ["config", "print-default"])
    file = tmp_path / "node.conf.toml"
    file.write_text(printed.stdout)
    assert CliRunner().invoke(server.app, ["config", "validate", str(file)]).exit_code == 0


def test_an_unknown_key_is_told_in_one_line(tmp_path):
    file = tmp_path / "node.conf.toml"
    file.write_text("[raft]\nelection_timout = '1s'\n")
    for words in (
        ["config", "validate", str(file)],
        ["start", "--dir", "x", "--config", str(file)],
    ):
        done = CliRunner().invoke(server.app, words)
        assert done.exit_code == 2
        assert done.stderr.count("\n") == 1
        assert "error: config_error:" in done.stderr
        assert "raft.election_timeout" in done.stderr


def test_a_file_with_members_to_join_is_not_valid_as_no_node_would_start_with_it(tmp_path):
    file = tmp_path / "node.conf.toml"
    file.write_text("[node]\njoin = ['h:1']\n")
    done = CliRunner().invoke(server.app, ["config", "validate", str(file)])
    assert done.exit_code == 2
    assert "node.join" in done.stderr


def test_start_without_a_directory_says_what_to_do():
    done = CliRunner().invoke(server.app, ["start"])
    assert done.exit_code == 2
    assert "--dir DIR" in done.stderr


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--listen", "here"], "node.listen: not an address of the form HOST:PORT: 'here'"),
        (["--listen", "127.0.0.1:99999"], "node.listen: not an address"),
        (["--advertise", "a"], "node.advertise: not an address"),
        (["--join", "127.0.0.1"], "node.join: not an address"),
    ],
)
def test_an_address_that_is_none_is_told_in_one_line_before_anything_is_touched(
    tmp_path, words, part
):
    done = CliRunner().invoke(server.app, ["start", "--dir", str(tmp_path / "d"), *words])
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert part in done.stderr
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (OSError(errno.EADDRINUSE, "in use"), "address_in_use", "another --listen"),
        (WrongCluster("x"), "wrong_cluster", "another --dir"),
        (LogFormatError("format 9"), "log_format_error", "version of Kvorum that wrote it"),
        (errors.DataDirectoryError("in use"), "data_directory_error", "--dir"),
        (errors.DiskFull("no space"), "disk_full", "make room"),
        (OSError(errno.EADDRNOTAVAIL, "no such address"), "io_error", "no such address"),
        (RuntimeError("boom"), "runtime_error", "boom"),
    ],
)
def test_what_ends_a_node_is_told_with_what_to_do(error, code, part):
    found, message = server.advice(error)
    assert found == code
    assert part in message


@pytest.mark.parametrize("text", ["format 1, of an older version", "protocol versions 1 to 2 here"])
def test_a_mismatch_of_versions_is_not_taken_for_newer_data(text):
    assert server.advice(errors.VersionMismatch(text)) == ("version_mismatch", text)


def test_what_a_message_says_already_is_not_said_again():
    in_use = errors.DataDirectoryError("d is in use: stop it, or name another --dir")
    assert server.advice(in_use) == ("data_directory_error", str(in_use))
    assert server.advice(errors.KVError("odd", code="odd")) == ("odd", "odd")


def test_a_keyboard_interrupt_exits_130():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as ended:
        admin.guarded(interrupted)
    assert ended.value.exit_code == 130


def test_fail_never_prints_two_lines(capsys):
    def failing():
        raise KVError("one\ntwo", code="odd")

    with pytest.raises(typer.Exit):
        admin.guarded(failing)
    assert capsys.readouterr().err == "error: odd: one two\n"


def test_every_command_has_a_help_text():
    for app, words in [(admin.app, ["status"]), (admin.app, ["txn"]), (server.app, ["start"])]:
        done = CliRunner().invoke(app, [*words, "--help"])
        assert done.exit_code == 0
    hidden = CliRunner().invoke(server.app, ["start", "--help"]).stdout
    assert "--parent-fd" not in hidden


def test_the_address_is_written_whole(tmp_path: Path):
    file = tmp_path / "address"
    server._write_address(file, "127.0.0.1:7400")
    assert file.read_text() == "127.0.0.1:7400"
    assert list(tmp_path.iterdir()) == [file]
