"""Claims of `kvctl import`: rows go in batches, what is wrong is named by its line, what comes before it is written, and of a
key's lines the last one wins."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
import pytest
from typer.testing import CliRunner

import kvstore
from kvstore import errors
from kvstore.cli import admin, data
from tests.unit.kvstore.fake_node import FIRST_VERSION, FakeDatabase


@pytest.fixture
def database():
    return FakeDatabase({b"a": b"1", b"b\x00": b"\xff"})


@pytest.fixture
def kvctl(database, monkeypatch):
    """Run kvctl with a client of `database`."""
    monkeypatch.setattr(kvstore, "connect", lambda _endpoints, timeout: database, raising=False)
    return lambda *arguments: CliRunner().invoke(admin.app, list(arguments))


def test_an_import_of_many_rows_goes_in_batches(kvctl, database, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [data.Row(b"k%04d" % n, b"v") for n in range(data.IMPORT_ROWS * 5 + 1)]
    file.write_bytes(b"\n".join(msgspec.json.encode(row) for row in rows))
    assert kvctl("import", str(file)).exit_code == 0
    assert len(database.rows) == len(rows) + 2
    assert database.version == FIRST_VERSION + 6


def test_an_import_names_the_line_that_is_wrong(kvctl, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"key":"YQ==","value":""}\n\n{"key":1}\n')
    done = kvctl("import", str(file))
    assert done.exit_code == 1
    assert done.stderr.startswith("error: invalid_argument: line 3: ")


def lines_of(rows):
    return b"".join(msgspec.json.encode(data.Row(*row)) + b"\n" for row in rows)


@pytest.mark.parametrize("before", range(6))
def test_what_comes_before_a_line_that_is_wrong_is_imported(
    kvctl, database, monkeypatch, tmp_path, before
):
    """Be it a part of a batch, or of the batches that are written together."""
    monkeypatch.setattr(data, "IMPORT_ROWS", 2)
    database.rows.clear()
    file = tmp_path / "rows.jsonl"
    rows = [(b"k%d" % number, b"v") for number in range(before)]
    file.write_bytes(lines_of(rows) + b"{}\n" + lines_of([(b"behind", b"v")]))
    done = kvctl("import", str(file))
    assert done.stderr.startswith(f"error: invalid_argument: line {before + 1}: ")
    assert database.plain() == dict(rows)


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        (b"", b"", "invalid_argument"),
        (b"\xff", b"", "invalid_argument"),
        (bytes(4097), b"", "key_too_large"),
        (b"k", bytes((1 << 20) + 1), "value_too_large"),
    ],
)
def test_an_import_names_the_line_whose_key_or_value_is_refused(
    kvctl, database, tmp_path, key, value, code
):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines_of([(b"good", b"v"), (key, value)]))
    done = kvctl("import", str(file))
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {code}: line 2: ")
    assert database.plain()[b"good"] == b"v"


def test_what_is_too_large_for_one_transaction_is_imported_in_halves(
    kvctl, database, monkeypatch, tmp_path
):
    """A batch whose rows lie in more ranges than a transaction may touch."""
    batches = []
    batch = database.batch

    @contextlib.asynccontextmanager
    async def limited():
        async with batch() as tx:
            yield tx
            batches.append(len(tx._writes))
            if len(tx._writes) > rows_max:
                raise errors.TransactionTooLarge

    rows_max = 3
    monkeypatch.setattr(database, "batch", limited)
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines_of([(b"k%02d" % number, b"v") for number in range(10)]))
    assert kvctl("import", str(file)).stderr == "10 rows imported\n"
    assert len(database.rows) == 10 + 2
    assert batches == [10, 5, 2, 3, 5, 2, 3]
    rows_max = 0
    assert kvctl("import", str(file)).stderr.startswith("error: transaction_too_large: ")


def test_of_a_key_that_is_imported_twice_the_later_line_wins(
    kvctl, database, monkeypatch, tmp_path
):
    """Also where the two stand in batches that are written together, of which the later may be done first."""
    batch = database.batch
    begun = 0

    @contextlib.asynccontextmanager
    async def late():
        nonlocal begun
        begun += 1
        turns = 10 - begun
        async with batch() as tx:
            yield tx
            for _ in range(turns):
                await asyncio.sleep(0)

    monkeypatch.setattr(data, "IMPORT_ROWS", 2)
    monkeypatch.setattr(database, "batch", late)
    database.rows.clear()
    file = tmp_path / "rows.jsonl"
    rows = [(b"%d" % (number % 3), b"line %d" % number) for number in range(8)]
    file.write_bytes(lines_of(rows))
    assert kvctl("import", str(file)).stderr == "8 rows imported\n"
    assert database.plain() == dict(rows)


def test_a_dry_run_of_an_import_checks_every_line_and_writes_nothing(kvctl, database, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [(b"k%d" % number, b"v") for number in range(data.IMPORT_ROWS + 1)]
    file.write_bytes(lines_of(rows))
    before = dict(database.rows)
    done = kvctl("import", "--dry-run", str(file))
    assert (done.exit_code, done.stderr) == (0, f"{len(rows)} rows can be imported\n")
    file.write_bytes(lines_of(rows) + b'{"key":1}\n')
    done = kvctl("import", "--dry-run", str(file))
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: invalid_argument: line {len(rows) + 1}: ")
    assert database.rows == before
