"""What happened in a run, as one hash: two runs of a seed are the same run exactly if their hashes are equal."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TextIO


class Trace:
    """Events in order, each with its virtual time. Args: sink: where to write them as text, too."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sink: TextIO | None = None) -> None:
        self.events = 0
        self._time = loop.time
        self._hash = hashlib.blake2b(digest_size=16)
        self._sink = sink

    def note(self, kind: str, *details: object) -> None:
        """`details` must print alike in every process: no addresses, no sets."""
        line = f"{self._time():.6f} {kind} {' '.join(map(str, details))}\n"
        self.events += 1
        self._hash.update(line.encode())
        if self._sink is not None:
            self._sink.write(line)

    def digest(self) -> str:
        return self._hash.hexdigest()
