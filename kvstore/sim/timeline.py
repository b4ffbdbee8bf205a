"""A run as a table that people read: virtual time, who, what. Made from the lines of a trace, without its frames and writes.

`events` is pure and takes any lines of the form that kvstore.sim.trace describes; a kind that it does not know is shown
as it stands. Equal traces give equal tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

NOISE: Final = ("frame", "write", "sync", "create", "delete", "file", "end")
WHAT_MAX: Final = 120
ROWS_MAX: Final = 200
PLACE: Final = re.compile(r"(?:[nc]\d+(?:\.\d+)?|(?:setup|reader)\.\d+)$")
NEMESIS: Final = "nemesis"


class Event(NamedTuple):
    """One row. `at`: virtual seconds. `who`: a node, a client, the nemesis, or nobody."""

    at: float
    who: str
    kind: str
    what: str

    @property
    def is_problem(self) -> bool:
        return self.kind == "problem"


def events(lines: Iterable[str]) -> Iterator[Event]:
    """What a reader wants to see of these lines of a trace, in their order."""
    for line in lines:
        at, _, rest = line.rstrip("\n").partition(" ")
        kind, _, details = rest.partition(" ")
        if kind in NOISE:
            continue
        first, _, others = details.partition(" ")
        who = first if PLACE.match(first) else ""
        if not who and kind.startswith(("fault", "frozen", "heal", "peace")):
            who = NEMESIS
        told = others if who == first else details
        tell = WORDS.get(kind)
        what = tell(told.split(" ")) if tell is not None else f"{kind} {told}"
        yield Event(float(at), who, kind, what.strip())


def table(rows: Sequence[Event], *, rows_max: int = ROWS_MAX) -> str:
    """Rows under a head. Of more than `rows_max`, those around the first problem; else the last ones."""
    shown, before, after = _window(rows, rows_max)
    width = max((len(row.who) for row in shown), default=0)
    width = max(width, len("who"))
    lines = [f"{'time':>12}   {'who':<{width}}  what"]
    if before:
        lines.append(f"{'...':>12}   {before} rows before")
    for row in shown:
        mark = "!" if row.is_problem else " "
        what = row.what if len(row.what) <= WHAT_MAX else row.what[: WHAT_MAX - 4] + " ..."
        lines.append(f"{row.at:12.6f} {mark} {row.who:<{width}}  {what}".rstrip())
    if after:
        lines.append(f"{'...':>12}   {after} rows after")
    return "\n".join(lines)


def _window(rows: Sequence[Event], rows_max: int) -> tuple[Sequence[Event], int, int]:
    if len(rows) <= rows_max:
        return rows, 0, 0
    first = next((n for n, row in enumerate(rows) if row.is_problem), len(rows))
    end = min(len(rows), first + rows_max // 4)
    begin = max(0, end - rows_max)
    end = min(len(rows), begin + rows_max)
    return rows[begin:end], begin, len(rows) - end


def _crash(words: list[str]) -> str:
    if len(words) < 2:
        return "dies"
    lost = f", {words[1]} batches of its engine are lost" if words[1] != "0" else ""
    return f"loses power{lost}" if words[0] == "True" else f"is killed{lost}"


def _op(words: list[str]) -> str:
    """`put b'k' b'v' True  ok 7`: the last two are the outcome and the version."""
    if len(words) < 2:
        return " ".join(words)
    outcome, version = words[-2:]
    at = f" at {version}" if version != "0" else ""
    told = " ".join(word for word in words[:-2] if word)
    return f"{outcome}{at}: {told}"


WORDS: Final[Mapping[str, Callable[[list[str]], str]]] = {
    "crash": _crash,
    "restart": lambda _: "boots",
    "pause": lambda _: "stops (paused)",
    "resume": lambda _: "goes on",
    "trap": lambda words: f"dies at its disk: {' '.join(words)}",
    "flush": lambda _: "engine flushed",
    "frozen": lambda words: f"stays so, and the others must go on: {' '.join(words)}",
    "leads": lambda words: f"leads range {words[0]} in term {words[1]}",
    "follows": lambda words: f"no longer leads range {words[0]}, in term {words[1]}",
    "problem": lambda words: f"PROBLEM: {' '.join(words)}",
    "op": _op,
}
