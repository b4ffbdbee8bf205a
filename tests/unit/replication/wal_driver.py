"""What the tests of the log file share: a host in small, and a model that remembers what each batch made true.

The model is the dumb second implementation: plain dicts, one deep copy per batch, no bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore.sim.disk import SimDisk
from replication.types import Entry, HardState
from replication.wal import GroupLog, Wal, WalBatch
from replication.wal_format import BATCH_HEADER_BYTES, RECORD_HEADER_BYTES

SEGMENT_BYTES = 64 << 10
BODY = BATCH_HEADER_BYTES + RECORD_HEADER_BYTES  # where the body of a batch's only record begins


def entry(index: int, term: int = 1, data: bytes = b"", kind: int = 0) -> Entry:
    return Entry(index, term, kind, data or b"%d.%d" % (index, term))


@dataclass
class ModelGroup:
    """One group as it should be. `entries` keeps the compacted ones too: a recovered start may be older."""

    hard_state: HardState = HardState()  # noqa: RUF009  # frozen
    base: int = 0  # the last RESET or CARRY: nothing at or below it can come back
    start: int = 0  # compacted up to here
    last: int = 0
    terms: dict[int, int] = field(default_factory=lambda: {0: 0})
    entries: dict[int, Entry] = field(default_factory=dict)
    tombstone: int = 0


class Node:
    """Writes what the log says, and knows what every batch made true."""

    def __init__(self, disk: SimDisk | None = None, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.disk = disk or SimDisk()
        self.wal, logs = Wal.recover(self.disk, segment_bytes=segment_bytes, segments_max=2)
        assert not logs
        self.segment_bytes = segment_bytes
        self.model: dict[int, ModelGroup] = {}
        self.history: dict[int, dict[int, ModelGroup]] = {0: {}}  # after batch number
        self.unsynced: list[WalBatch] = []
        self.synced = 0

    def group(self, group: int) -> ModelGroup:
        return self.model.setdefault(group, ModelGroup())

    def append(self, group: int, *entries: Entry) -> None:
        self.wal.append(group, entries)
        known = self.group(group)
        for index in range(entries[0].index, known.last + 1):
            del known.entries[index], known.terms[index]
        for one in entries:
            known.entries[one.index], known.terms[one.index] = one, one.term
        known.last = entries[-1].index

    def hard(self, group: int, term: int, vote: int = 0, commit: int = 0) -> None:
        self.wal.set_hard_state(group, HardState(term, vote, commit))
        self.group(group).hard_state = HardState(term, vote, commit)

    def reset(self, group: int, index: int, term: int) -> None:
        self.wal.reset(group, index, term)
        known = self.group(group)
        known.base = known.start = known.last = index
        known.entries, known.terms = {}, {index: term}

    def tombstone(self, group: int, replica: int) -> None:
        self.wal.tombstone(group, replica)
        self.model[group] = ModelGroup(tombstone=max(replica, self.group(group).tombstone))

    def compact(self, group: int, index: int) -> None:
        self.wal.compact(group, index)
        known = self.group(group)
        known.start = max(known.start, min(index, known.last))

    def carry(self, group: int) -> None:
        known = self.group(group)
        self.wal.carry(group, [known.entries[i] for i in range(known.start + 1, known.last + 1)])
        known.base = known.start

    def write(self) -> WalBatch | None:
        """Take a batch and write it, without a sync."""
        batch = self.wal.take()
        if batch is None:
            return None
        if batch.create_bytes:
            self.disk.create(batch.segment, batch.create_bytes)
        self.disk.write(batch.segment, batch.offset, batch.data)
        self.unsynced.append(batch)
        self.history[batch.number] = copy.deepcopy(self.model)
        return batch

    def sync(self) -> None:
        """Make durable what is written, and delete what may go."""
        for segment in dict.fromkeys(batch.segment for batch in self.unsynced):
            self.disk.sync(segment)
        if self.unsynced:
            self.synced = self.unsynced[-1].number
            self.wal.synced(self.synced)
            self.unsynced.clear()
        for segment in self.wal.obsolete():
            self.disk.delete(segment)
            self.wal.forget(segment)

    def commit(self) -> WalBatch:
        batch = self.write()
        assert batch is not None
        self.sync()
        return batch

    def mark(self) -> None:
        """Write until everything is known to be durable, as an idle node does."""
        self.wal.sync_mark()
        self.commit()

    def restart(self, disk: SimDisk) -> dict[int, GroupLog]:
        """Recover from a disk, go on with it, and believe what was recovered if one moment explains it."""
        self.disk = disk
        self.wal, logs = Wal.recover(disk, segment_bytes=self.segment_bytes, segments_max=2)
        numbers = [n for n in sorted(self.history) if n >= self.synced]
        why = {n: difference(self.history[n], logs) for n in numbers}
        matching = [n for n in numbers if not why[n]]
        assert matching, f"no moment since the last sync explains what was recovered: {why}"
        self.model = copy.deepcopy(self.history[matching[-1]])
        for group, log in logs.items():
            self.model[group].start = log.start[0]
        number = self.wal.recovery.number if self.wal.recovery else 0
        self.history = {number: copy.deepcopy(self.model)}
        self.synced = number
        self.unsynced.clear()
        return logs


def difference(model: dict[int, ModelGroup], logs: dict[int, GroupLog]) -> str:
    """Why what was recovered is not this moment of the model; empty if it is."""
    if sorted(model) != sorted(logs):
        return f"groups {sorted(model)} against {sorted(logs)}"
    for group, known in model.items():
        log = logs[group]
        start = log.start[0]
        if log.suspect or log.faulty:
            return f"group {group}: damage"
        if (log.hard_state, log.tombstone) != (known.hard_state, known.tombstone):
            return f"group {group}: {log.hard_state}, {log.tombstone} against {known}"
        if not known.base <= start <= known.start or log.start[1] != known.terms[start]:
            return f"group {group}: start {log.start} against {known}"
        if log.entries != [known.entries[i] for i in range(start + 1, known.last + 1)]:
            return f"group {group}: entries {log.entries} against {known}"
    return ""


def check_told(model: dict[int, ModelGroup], logs: Sequence[tuple[int, GroupLog]]) -> None:
    """Of a damaged log: what is not right is told. A group that is not suspect has all its entries or names them."""
    for group, log in logs:
        if log.suspect:
            continue
        known = model[group]
        start = log.start[0]
        assert (log.hard_state, log.tombstone) == (known.hard_state, known.tombstone)
        faulty = {fault.index: fault for fault in log.faulty}
        assert start <= known.start
        assert start + len(log.entries) == known.last, "silently shortened"
        for offset, one in enumerate(log.entries):
            index = start + 1 + offset
            assert one.index == index
            fault = faulty.get(index)
            if fault is None:
                assert one == known.entries[index], "an entry that is not what was written"
            elif index > known.start:
                assert fault.term in {0, known.terms[index]}
                assert fault.segment > 0


def node_of(*indices: int) -> tuple[Node, list[WalBatch]]:
    """One group, one entry a batch, all of it durable and known to be."""
    node = Node()
    batches = []
    for index in indices:
        node.append(1, entry(index))
        batches.append(node.commit())
    node.mark()
    node.mark()
    return node, batches


def place(batch: WalBatch) -> tuple[int, int]:
    return batch.segment, batch.offset
