"""Global options that may stand anywhere on the command line: `kvctl get a -o json` means `kvctl -o json get a`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from typer.core import TyperGroup, TyperOption

from kvstore.cli.output import Format

ADMIN_OPTIONS: Final[Mapping[str, bool]] = {  # option -> whether a value follows
    "--endpoints": True,
    "--output": True,
    "-o": True,
    "--timeout": True,
    "--yes": False,
    "-y": False,
}
ATTACHED: Final = tuple(Format)  # values that may stand in one word with their option, as in -ojson


def hoist(
    arguments: Sequence[str], options: Mapping[str, bool], others: Collection[str] = ()
) -> list[str]:
    """The arguments with these options (and their values) in front, in their order; what follows `--` stays.

    others: options that take a value, too: what stands behind one is its value, whatever it looks like.
    """
    front: list[str] = []
    rest: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if argument == "--":
            rest += arguments[position:]
            break
        if argument in others:
            rest += arguments[position : position + 2]
            position += 2
            continue
        name, attached, _ = argument.partition("=")
        if not argument.startswith("--"):
            name, attached = argument[:2], argument[2:]
            if attached not in ("", *ATTACHED):
                name = argument
        takes_value = options.get(name)
        if takes_value is None or (attached and not takes_value):
            rest.append(argument)
            position += 1
            continue
        count = 2 if takes_value and not attached else 1
        front += arguments[position : position + count]
        position += count
    return front + rest


def valued(group: TyperGroup) -> frozenset[str]:
    """The options of a group's commands that take a value, but for those of the group itself."""
    found: list[str] = []
    for command in group.commands.values():
        if isinstance(command, TyperGroup):
            found += valued(command)
        for each in command.params:
            if isinstance(each, TyperOption) and not each.is_flag:
                found += each.opts
    return frozenset(found)


def hoisting(options: Mapping[str, bool]) -> type[TyperGroup]:
    """A command group that does so."""

    class HoistingGroup(TyperGroup):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            return super().parse_args(ctx, hoist(args, options, valued(self)))

    return HoistingGroup
