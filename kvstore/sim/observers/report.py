"""How a broken invariant is told: its number or name, and where it broke."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

MISTAKES_MAX: Final = 10  # told in one run; the first ones say what the matter is


class Report:
    """Args: tell: takes one text for each broken invariant, at most MISTAKES_MAX in a run."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.mistakes = 0
        self._tell = tell

    def broken(
        self,
        invariant: str,
        what: str,
        *,
        group: int = 0,
        index: int = 0,
        node: str = "",
        txn_id: bytes = b"",
    ) -> None:
        """Tell it. invariant: its number, or the Raft paper's name. The run goes on."""
        self.mistakes += 1
        if self.mistakes > MISTAKES_MAX:
            return
        places = []
        if group:
            places.append(f"range {group}")
        if index:
            places.append(f"entry {index}")
        if node:
            places.append(f"node {node}")
        if txn_id:
            places.append(f"transaction {txn_id.hex()}")
        self._tell(f"{invariant} is broken ({', '.join(places)}): {what}")
