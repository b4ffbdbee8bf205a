"""What a node's ranges note of time, once a batch or a round; the other half is `replication.measures`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from replication.measures import COUNTS, SECONDS, Distribution, Measures
from txn.commands import Commit, PreparePart
from txn.latches import Pending


class StoreMeasures:
    """Of all ranges that are led here."""

    def __init__(self) -> None:
        self.turn_requests = Distribution(COUNTS)  # evaluated in one turn, where there were any
        self.oracle_seconds = Distribution(SECONDS)  # of rounds that did not end in their own turn
        self.single_range_seconds = Distribution(SECONDS)  # evaluation begins to answered
        self.cross_range_seconds = Distribution(SECONDS)  # the same, of a part that became PREPARED

    def applied(self, pendings: Sequence[Pending], commits: int, parts: int, now: float) -> None:
        """An own entry with so many commits of one range and prepared parts was applied.

        The first of each kind stands for all of its kind: it was evaluated first, so its time is the longest, about.
        """
        if commits:
            self._note(self.single_range_seconds, Commit, pendings, commits, now)
        if parts:
            self._note(self.cross_range_seconds, PreparePart, pendings, parts, now)

    @staticmethod
    def _note(
        into: Distribution, kind: type, pendings: Sequence[Pending], times: int, now: float
    ) -> None:
        for pending in pendings:
            if type(pending.command) is kind:
                into.note(now - pending.since, times)
                return


class NodeMeasures(NamedTuple):
    """All that a node notes."""

    host: Measures
    store: StoreMeasures
