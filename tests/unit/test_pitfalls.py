"""Claim: tests/PITFALLS.md names, for each known mistake, tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.sim.plants import PLANTS

TESTS = Path(__file__).resolve().parents[1]
TABLES = (TESTS / "PITFALLS.md").read_text().partition("## Transactions")
ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+) \|$", re.MULTILINE)
NOT_YET = ("do not exist yet", "do not sleep yet")
LINES = [
    pytest.param(line, id=f"{name} {line[0]}")
    for name, text in (("replication", TABLES[0]), ("transactions", TABLES[2]))
    for line in ROW.findall(text)
]


def exists(name: str) -> bool:
    if name.startswith("plant "):
        return name.removeprefix("plant ") in PLANTS
    if name.endswith(".txt"):
        return (TESTS / "scripts" / "replication" / name).is_file()
    module, _, test = name.partition("::")
    definition = re.compile(rf"^(async )?def {re.escape(test)}\(", re.MULTILINE)
    return any(definition.search(path.read_text()) for path in TESTS.rglob(f"{module}.py"))


@pytest.mark.parametrize("line", LINES)
def test_each_mistake_is_held_by_tests_that_exist(line):
    _, mistake, held_by = line
    names = re.findall(r"`([^`]+)`", held_by)
    assert names or any(words in held_by for words in NOT_YET), f"nothing holds: {mistake}"
    assert [name for name in names if not exists(name)] == []


def test_no_mistake_is_left_out():
    for text, count in ((TABLES[0], 28), (TABLES[2], 15)):
        assert [int(number) for number, _, _ in ROW.findall(text)] == list(range(1, count + 1))


@pytest.mark.parametrize(
    "name", ["plant nothing", "nothing.txt", "test_wal::test_nothing", "test_nothing::test_a"]
)
def test_what_does_not_exist_is_noticed(name):
    assert not exists(name)
