"""The log's lane: what is staged, the batch under way, and what may leave when it is durable. No asyncio, no threads.

The host decides when; the lane knows what. One batch fills (`stage`, `when_durable`), at most one is written
(`take` -> `write`, in whatever thread -> `done`), so results come in order, and whatever turns bring while the disk is
busy becomes one batch. `done` is the only place that makes a `Durable`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from replication.durability import Durable, Gate, Released
from replication.measures import Measures
from replication.ports import Clock, LogFiles
from replication.probes import reached
from replication.ready import Token
from replication.turns import SyncPolicy
from replication.types import Entry, HardState
from replication.wal import Wal, WalBatch

Then = Callable[[], None]


class Job(NamedTuple):
    """A batch to be written, and who waits for it."""

    batch: WalBatch
    waiting: list[Then]
    entries: int  # in the batch


class Written(NamedTuple):
    """Seconds that the disk took for a batch; the creation of a segment is not in them."""

    write_s: float
    sync_s: float


class LogLane:
    """See the module."""

    def __init__(
        self, wal: Wal, files: LogFiles, clock: Clock, policy: SyncPolicy, measures: Measures
    ) -> None:
        self.gate = Gate()
        self.policy = policy
        self.staged = False  # something waits to be taken
        self.syncing = False
        self.began_s = 0.0
        self._wal, self._files, self._clock = wal, files, clock
        self._measures = measures
        self._entries = 0  # staged
        self._waiting: list[Then] = []
        self._deleting: list[int] = []
        self._counters = {"synced_bytes": 0, "segments_created": 0, "segments_deleted": 0}

    # ------------------------------------------------------------ staging

    def begin_group(
        self, group: int, state: HardState, last: tuple[int, int], *, reset: bool
    ) -> None:
        """A group as its core begins with it: durable already, unless the log must be told (`reset`)."""
        self.gate.begin_group(group, Token(state.term, state.vote, *last))
        if reset:
            self._wal.reset(group, *last)
            self._wal.set_hard_state(group, state)
            self.staged = True

    def save(
        self, group: int, state: HardState | None, entries: Sequence[Entry], token: Token
    ) -> None:
        """What `token` stands for. The state first: a torn batch must not hold entries of an unknown term."""
        if state is not None:
            self._wal.set_hard_state(group, state)
        if entries:
            self._wal.append(group, entries)
            self._entries += len(entries)
        self.gate.stage(group, token)
        self.staged = True

    def reset(self, group: int, last: tuple[int, int]) -> None:
        """The group's log is empty now and begins behind `last`: a snapshot was installed. The hard state stays."""
        reached("log_reset_for_a_snapshot")
        self._wal.reset(group, *last)
        self.gate.stage_reset(group, last)
        self.staged = True

    def remove_group(self, group: int, replica: int) -> None:
        self.gate.forget(group)
        self._wal.tombstone(group, replica)
        self.staged = True

    def compact(self, group: int, index: int) -> None:
        self._wal.compact(group, index)

    def mark(self) -> None:
        """An idle log says how far it is durable; once is enough."""
        if self._wal.needs_mark and not self.staged:
            self._wal.sync_mark()
            self.staged = True

    def when_durable(self, then: Then) -> None:
        """Call `then` when all that is staged so far is durable: with the batch that fills, or at once."""
        if self.syncing and not self.staged:
            self._wal.sync_mark()  # wait for one more batch: simpler than joining the one under way
            self.staged = True
        if self.staged:
            self._waiting.append(then)
        else:
            then()

    # ------------------------------------------------------------ writing

    def take(self, now: float) -> Job | None:
        """The batch that filled. None: nothing to write."""
        assert not self.syncing
        self.staged = False
        batch = self._wal.take()
        if batch is None:
            assert not self._waiting
            return None
        self.gate.seal(batch.number)
        waiting, self._waiting = self._waiting, []
        entries, self._entries = self._entries, 0
        self.syncing, self.began_s = True, now
        return Job(batch, waiting, entries)

    def write(self, job: Job) -> Written:
        """Write and sync. In whatever thread. Raises: LogWriteFailed; the host must stop."""
        batch = job.batch
        if batch.create_bytes:
            self._files.create(batch.segment, batch.create_bytes)
        began_s = self._clock.monotonic()
        self._files.write(batch.segment, batch.offset, batch.data)
        written_s = self._clock.monotonic()
        self._files.sync(batch.segment)
        return Written(written_s - began_s, self._clock.monotonic() - written_s)

    def done(self, job: Job, written: Written, *, threaded: bool) -> Released:
        """`write` has returned: the batch is durable. The caller passes on what is released, then calls who waited."""
        batch = job.batch
        self.syncing = False
        took_s, waited_s = sum(written), self._clock.monotonic() - self.began_s
        self.policy.note(took_s, waited_s, threaded=threaded)
        self._measures.log_write_seconds.note(written.write_s)
        self._measures.log_sync_seconds.note(written.sync_s)
        if job.entries:
            self._measures.turn_entries.note(job.entries)
        self._counters["synced_bytes"] += len(batch.data)
        self._counters["segments_created"] += batch.create_bytes > 0
        self._wal.synced(batch.number)
        return self.gate.release(Durable(batch.number))

    def stats(self, now: float) -> dict[str, float]:
        """Figures for metrics. `sync_age_s`: of the sync under way, 0.0 if there is none."""
        policy = self.policy
        return {
            **self._counters,
            "syncs": policy.count,
            "sync_p99_s": policy.p99_s(),
            "sync_threaded": float(policy.threaded),
            "sync_mode_switches": policy.switches,
            "sync_age_s": now - self.began_s if self.syncing else 0.0,
            "messages_held": self.gate.held_messages,
        }

    # ------------------------------------------------------------ segments

    def pinned(self) -> list[int]:
        """Groups that keep old segments; ask when a segment was begun."""
        return self._wal.pinned()

    def carry(self, group: int, entries: Sequence[Entry]) -> int:
        """Write a group's live log again, so that old segments may go. Returns its bytes, about."""
        self._wal.carry(group, entries)
        self.staged = True
        return sum(len(entry.data) for entry in entries)

    def obsolete(self) -> bool:
        """Whether `delete`, then `deleted`, have something to do."""
        if not self._deleting:
            self._deleting = self._wal.obsolete()
            return bool(self._deleting)
        return False

    def delete(self) -> None:
        """In whatever thread. Raises as `write`."""
        for segment in self._deleting:
            self._files.delete(segment)

    def deleted(self) -> None:
        for segment in self._deleting:
            self._wal.forget(segment)
        self._counters["segments_deleted"] += len(self._deleting)
        self._deleting = []
