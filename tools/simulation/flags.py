"""Options of a seed as words of a command line, both ways: whatever a run was, its command plays it again.

One row of FLAGS for each field of `Options` that a command line can set. `command` prints what differs from the
defaults; fields without a row (a whole configuration, a planted bug) are named in a remark behind it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, Final, NamedTuple

from kvstore.sim.core import DISKS, FROZEN, NEVER
from kvstore.sim.scenario import Options

NONE: Final = "none"
Place = tuple[int, int]


def read_names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def show_names(names: Iterable[str]) -> str:
    return ",".join(names)


def read_numbers(text: str) -> frozenset[int]:
    """`1,4-6` is 1, 4, 5, 6; `none` is nothing."""
    numbers: list[int] = []
    for part in [] if text == NONE else text.split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return frozenset(numbers)


def show_numbers(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or NONE


def read_places(text: str) -> frozenset[Place]:
    """`0:1,4-6;2:3` are operations 1, 4, 5, 6 of the client at place 0, and 3 of the one at place 2."""
    places: list[Place] = []
    for part in [] if text == NONE else text.split(";"):
        place, _, numbers = part.partition(":")
        places += [(int(place), number) for number in read_numbers(numbers)]
    return frozenset(places)


def show_places(places: Iterable[Place]) -> str:
    by_place: dict[int, list[int]] = {}
    for place, number in sorted(places):
        by_place.setdefault(place, []).append(number)
    return ";".join(f"{place}:{show_numbers(mine)}" for place, mine in by_place.items()) or NONE


class Flag(NamedTuple):
    """How one field is given and shown. `name` is the word behind the two dashes."""

    name: str
    field: str
    read: Callable[[str], Any]
    show: Callable[[Any], str]
    help: str


FLAGS: Final = (
    Flag("seconds", "seconds", float, "{:g}".format, "of faults"),
    Flag("clients", "clients", int, str, "at once"),
    Flag("ops", "ops", int, str, "of each client"),
    Flag("nodes", "nodes", int, str, "of the cluster"),
    Flag("workloads", "workloads", read_names, show_names, "names, with commas; else as drawn"),
    Flag("only", "kinds", read_names, show_names, "kinds of faults, with commas; else as drawn"),
    Flag("mean-s", "mean_s", float, "{:g}".format, "between two faults; 0: as drawn"),
    Flag("hold-s", "hold_s", float, "{:g}".format, "how long a fault lasts, about; 0: as drawn"),
    Flag(
        "frozen",
        "frozen",
        str,
        str,
        f"what a minority stays in: {', '.join((*FROZEN, *DISKS))}, or {NEVER}",
    ),
    Flag("faults-kept", "faults_kept", read_numbers, show_numbers, "numbers of faults, as 1,4-6"),
    Flag("ops-kept", "ops_kept", read_places, show_places, "operations, as PLACE:1,4-6;PLACE:2"),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    defaults = Options()
    group = parser.add_argument_group("options of a seed")
    for flag in FLAGS:
        default = getattr(defaults, flag.field)
        shown = "" if default is None or not flag.show(default) else f" ({flag.show(default)})"
        group.add_argument(
            f"--{flag.name}",
            dest=flag.field,
            type=flag.read,
            default=default,
            metavar=flag.name.upper(),
            help=flag.help + shown,
        )
    group.add_argument("--calm", action="store_true", help="no faults")


def options_of(given: argparse.Namespace) -> Options:
    values = {flag.field: getattr(given, flag.field) for flag in FLAGS}
    return Options(faults=not given.calm, **values)


def command(seed: int, options: Options) -> str:
    """The command that plays this seed with these options."""
    defaults = Options()
    words = [f"python -m tools.simulate --seed {seed}"]
    for flag in FLAGS:
        value = getattr(options, flag.field)
        if value != getattr(defaults, flag.field):
            shown = flag.show(value)
            words.append(f"--{flag.name} '{shown}'" if ";" in shown else f"--{flag.name} {shown}")
    if not options.faults:
        words.append("--calm")
    known = {"faults", *(flag.field for flag in FLAGS)}
    others = [
        each.name
        for each in fields(Options)
        if each.name not in known and getattr(options, each.name) != getattr(defaults, each.name)
    ]
    if others:
        words.append(f" # and {', '.join(others)}, which a command line cannot say")
    return " ".join(words)
