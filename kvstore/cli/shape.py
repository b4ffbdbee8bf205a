"""Global options that may stand anywhere on the command line: `kvctl get a -o json` means `kvctl -o json get a`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from typer.core import TyperGroup

ADMIN_OPTIONS: Final[Mapping[str, bool]] = {  # option -> whether a value follows
    "--endpoints": True,
    "--output": True,
    "-o": True,
    "--timeout": True,
    "--yes": False,
    "-y": False,
}


def hoist(arguments: Sequence[str], options: Mapping[str, bool]) -> list[str]:
    """The arguments with these options (and their values) in front, in their order; what follows `--` stays."""
    front: list[str] = []
    rest: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if argument == "--":
            rest += arguments[position:]
            break
        name, attached, _ = argument.partition("=")
        if not argument.startswith("--"):
            name, attached = argument[:2], argument[2:]  # as in -ojson
        takes_value = options.get(name)
        if takes_value is None or (attached and not takes_value):
            rest.append(argument)
            position += 1
            continue
        count = 2 if takes_value and not attached else 1
        front += arguments[position : position + count]
        position += count
    return front + rest


def hoisting(options: Mapping[str, bool]) -> type[TyperGroup]:
    """A command group that does so."""

    class HoistingGroup(TyperGroup):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            return super().parse_args(ctx, hoist(args, options))

    return HoistingGroup
