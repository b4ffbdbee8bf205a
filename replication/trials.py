"""Whether a state that could not be read can be read again: it is read whole, at leisure, and told to nobody.

A replica whose state could not be read for a snapshot does not lead: what it begins to send costs the follower the
state that it has (T2 in `replication/transfer.py`), and then breaks off again. A disk that failed for a second would
keep it out for good, though, and with it the range when the others wait for a state. So the state is read from its
first row to its last before anybody's is given up for it; only then the replica may lead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from replication.ports import Machine, SnapshotSource
from replication.probes import reached

PAUSE_S: Final = 5.0  # from a failure to the next trial; twice that after each further one
PAUSE_MAX_S: Final = 60.0
FORGIVEN_S: Final = 600.0  # after a success: a failure before that goes on with the longer pauses
CHUNK_S: Final = 0.01  # between two chunks of a trial: at most 25 MiB/s


class Trials:
    """The trials of a node, one at a time. Args: readable: hears of a group that was read whole."""

    def __init__(self, machine: Machine, readable: Callable[[int], None]) -> None:
        self._machine, self._readable = machine, readable
        self._due: dict[int, float] = {}  # by group: when to try
        self._pauses: dict[int, float] = {}  # by group: before the next one, should it fail again
        self._read_at: dict[int, float] = {}  # by group: when it was read whole, since it failed
        self._reading: tuple[int, SnapshotSource] | None = None
        self._chunk_at = 0.0

    def __bool__(self) -> bool:
        return bool(self._due) or self._reading is not None

    def failed(self, group: int, now: float) -> None:
        """The group's state could not be read: try again after a pause, which is longer each time.

        Streams that break off together are one failure. After a success the pause stays long for a while, since a
        state that only a trial can read would cost a follower its own every few seconds.
        """
        if group in self._due:
            return
        if now >= self._read_at.pop(group, now) + FORGIVEN_S:
            del self._pauses[group]
        pause = self._pauses.get(group, PAUSE_S)
        self._pauses[group] = min(2 * pause, PAUSE_MAX_S)
        self._due[group] = now + pause

    def drop(self, group: int) -> None:
        """The group goes away, or has another state now."""
        self._due.pop(group, None)
        self._pauses.pop(group, None)
        self._read_at.pop(group, None)
        if self._reading is not None and self._reading[0] == group:
            self.close()

    def close(self) -> None:
        if self._reading is not None:
            self._reading[1].close()
            self._reading = None

    def deadline(self) -> float | None:
        """When `work` has something to do."""
        if self._reading is not None:
            return self._chunk_at
        return min(self._due.values(), default=None)

    def work(self, now: float) -> None:
        """At most one chunk."""
        if self._reading is None:
            group = next((group for group, at in self._due.items() if at <= now), None)
            if group is None:
                return
            del self._due[group]
        elif now < self._chunk_at:
            return
        else:
            group = self._reading[0]
        try:
            if self._reading is None:
                self._reading = group, self._machine.snapshot_open(group)
            whole = self._reading[1].chunk() is None
        except Exception:  # noqa: BLE001  # whatever it is, it is no state to send
            reached("unreadable_still")
            self.close()
            self.failed(group, now)
            return
        self._chunk_at = now + CHUNK_S
        if whole:
            reached("readable_again")
            self.close()
            self._read_at[group] = now
            self._readable(group)
