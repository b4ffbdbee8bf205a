"""Claim: of the commands that are planned for `kvctl`, each one is there, or README says that it is not there yet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from kvstore.cli import admin

README = (Path(__file__).parents[3] / "README.md").read_text()
NOT_YET = README.partition("\nNot yet")[2].partition("\n## ")[0]
PLANNED = """
    status, get, put, delete, scan, txn, watch, import, export, shell, init,
    nodes ls, nodes show, nodes drain, nodes undrain, nodes decommission, nodes recommission,
    ranges ls, ranges show, ranges split, ranges merge, ranges move, ranges transfer-lease, ranges scatter,
    rebalance, txn ls, txn show, txn locks, jobs, repair, check, scrub, backup, top, debug, bench run, cert
"""


def commands(group: TyperGroup, before: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        yield before + name
        if isinstance(command, TyperGroup):
            yield from commands(command, f"{before}{name} ")


def there() -> list[str]:
    group = typer.main.get_command(admin.app)
    assert isinstance(group, TyperGroup)
    return [*commands(group), "txn locks"]  # a script of that name


@pytest.mark.parametrize("command", [each.strip() for each in PLANNED.split(",")])
def test_a_planned_command_is_there_or_said_not_to_be(command):
    assert (command in there()) != (f"`{command}`" in NOT_YET)
