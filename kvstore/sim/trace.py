"""What happened in a run, as one hash: two runs of a seed are the same run exactly if their hashes are equal.

A line of the trace is `TIME KIND DETAILS`, in virtual seconds with six digits. The details of what concerns one node or
client begin with its name; those of a fault begin with its number. `kvstore.sim.timeline` makes a table of them.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Final, TextIO

LINES_MAX: Final = 256  # that wait to be hashed: one long update is quicker than many short ones


class Trace:
    """Events in order, each with its virtual time. Args: sink: where to write them as text, too."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sink: TextIO | None = None) -> None:
        self.events = 0
        self._time = loop.time
        self._hash = hashlib.blake2b(digest_size=16)
        self._lines: list[str] = []
        self._sink = sink
        self._frames = 0

    def note(self, kind: str, *details: object) -> None:
        """`details` must print alike in every process: no addresses, no sets."""
        line = f"{self._time():.6f} {kind} {' '.join(map(str, details))}\n"
        self.events += 1
        lines = self._lines
        lines.append(f"{self._frames} {line}")
        if len(lines) >= LINES_MAX:
            self._take_up()
        if self._sink is not None:
            self._sink.write(line)

    def frame(self, number: int, size: int, fingerprint: int) -> None:
        """A frame has arrived; `fingerprint` covers it and all before it, and goes into the hash with the next event.

        Frames are most of what happens: a line for each in the hash would take a few percent of a run's time.
        """
        self.events += 1
        self._frames = fingerprint
        if self._sink is not None:
            self._sink.write(f"{self._time():.6f} frame {number} {size} {fingerprint}\n")

    def digest(self) -> str:
        """The hash of what has happened so far."""
        self._take_up()
        now = self._hash.copy()
        now.update(b"%d" % self._frames)
        return now.hexdigest()

    def _take_up(self) -> None:
        self._hash.update("".join(self._lines).encode())
        self._lines.clear()
