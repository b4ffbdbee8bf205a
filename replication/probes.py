"""Rare paths: `reached` counts that one was taken, `chance` takes one on purpose. Both do nothing outside a simulation.

The lowest module of all, so that every core may import it. A simulator installs a counter and a chooser for the length
of a run; without them a call costs one look at an attribute and a branch.

- B1 a `chance` changes when something happens, how much at once, or by which of two legal ways; never what is right.
  Whatever it answers, every promise of the product holds.
- B2 neither stands where every operation passes; once a batch, a turn or a transaction of several ranges is rare enough.
- B3 names are constants, so that a run can say which were never reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Chooser = Callable[[str], bool]


class _Installed:
    """What the simulator that runs has installed; one at a time in a process."""

    __slots__ = ("chooser", "counts")

    def __init__(self) -> None:
        self.counts: dict[str, int] | None = None
        self.chooser: Chooser | None = None


_installed = _Installed()


def reached(name: str) -> None:
    """A rare path is taken here."""
    counts = _installed.counts
    if counts is not None:
        counts[name] = counts.get(name, 0) + 1


def chance(name: str) -> bool:
    """Whether to take the rare way here: never, unless a simulator chose so."""
    chooser = _installed.chooser
    if chooser is None or not chooser(name):
        return False
    reached(f"chance:{name}")
    return True


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Count what is reached until the end of the block: name -> times. Chances that were taken count too."""
    before = _installed.counts
    counts = _installed.counts = {}
    try:
        yield counts
    finally:
        _installed.counts = before


@contextmanager
def choosing(chooser: Chooser) -> Iterator[None]:
    """Ask `chooser` at every chance until the end of the block."""
    before = _installed.chooser
    _installed.chooser = chooser
    try:
        yield
    finally:
        _installed.chooser = before
