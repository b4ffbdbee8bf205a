"""Recovery of the log file: what is valid, what is a torn tail, what is rot, and what each group has left.

Let S be the largest `synced_upto` of any valid batch header. From S on, the first batch that is not whole and right
is a torn write: it is cut with all that follows, for good (zeros, and later segments deleted). Before S everything
was durable, so what is not right is damage, and is told: a damaged body is a `Fault` with its place and its group,
index and term; a lost batch or record header is a `Damage`, in which records of any group may be lost.

After a Damage a group is in doubt until a later record shows what it lost. Every ENTRY says the term of the entry
before it; HARD_STATE and HEAD say the last (index, term). By log matching, an entry of ours with the same index and
term proves the log up to there, and so does one with the same term and a smaller index, for one leader wrote both.
Entries above that and above the last known commit are not believed: they are reported as faulty, for they may have
been replaced by records that are lost.

What the disk does not give at all is damage like any other before the cut. Behind it stands what may be torn, or may
be the last durable batches: a block that is not given could be either, so then recovery fails, unless nothing was
ever written there. Segments are read more than once, and a disk may fail any of the times: each counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from replication.errors import LogFormatError, LogUnreadable
from replication.ports import LogFiles
from replication.types import Entry, HardState
from replication.wal_format import (
    BATCH_HEADER_BYTES,
    BLOCK_BYTES,
    FLAG_SUSPECT,
    HARD_BODY,
    HEAD_BODY,
    MAGIC,
    RECORD_HEADER_BYTES,
    BatchHeader,
    Record,
    RecordType,
    aligned,
    decode_batch_header,
    decode_records,
    position,
)
from replication.wal_groups import Damage, Fault, GroupLog, GroupState

_OFFSET_MASK = 0xFFFF_FFFF
_ENTRY = int(RecordType.ENTRY)
_MISSING_MAX = 128  # entries that are missing together and have a stand-in each


@dataclass
class Recovery:
    """What the scan did and saw, for the log and the metrics of the node."""

    cut: tuple[int, int]  # (segment, offset): where the log ends; all behind it is torn
    sizes: dict[int, int]  # the segments that are left -> bytes
    number: int  # largest batch number seen, in the torn tail too
    batches: int = 0
    torn_bytes: int = 0  # what was not zero behind the cut
    damage: list[Damage] = field(default_factory=list)
    bodies: list[tuple[int, int]] = field(default_factory=list)  # (segment, offset): damaged ones
    unreadable: list[tuple[int, int]] = field(default_factory=list)  # (segment, offset): blocks
    unsure: list[BatchHeader] = field(default_factory=list)  # kept batches that no sync is known of


def scan(files: LogFiles) -> tuple[Recovery, dict[int, GroupLog], dict[int, GroupState]]:
    """Read everything, rebuild every group, and say where to cut. Nothing is changed. Raises: LogFormatError, OSError."""
    segments = sorted(files.segments())
    headers: list[BatchHeader] = []
    sizes = {}
    number = 0
    failures: list[tuple[int, LogUnreadable]] = []
    for segment in segments:
        data = _read(files, segment, failures)
        sizes[segment] = len(data)
        for header in _headers(data, segment, number):
            headers.append(header)
            number = header.number
    synced = max((header.synced_upto for header in headers), default=0)
    if segments and segments[0] > 1:  # older segments were deleted: a head was durable
        synced = max(synced, position(segments[0], BLOCK_BYTES))
    replay = _Replay()
    cut = _judge(files, segments, headers, synced, replay, failures)
    for segment, failure in failures:
        if position(segment, failure.holes[-1]) >= cut and not _unused(failure.data, segment, cut):
            raise failure
    replay.finish_doubts()
    logs = {group: log.finish() for group, log in replay.groups.items()}
    recovery = Recovery(
        (cut >> 32, cut & _OFFSET_MASK), sizes, number, replay.batches, damage=replay.damage
    )
    recovery.bodies = replay.bodies
    recovery.unreadable = sorted({(at, hole) for at, failed in failures for hole in failed.holes})
    recovery.unsure = [header for header in headers if synced <= header.start < cut]
    return recovery, logs, {group: log.state for group, log in replay.groups.items()}


def _read(files: LogFiles, segment: int, failures: list[tuple[int, LogUnreadable]]) -> bytes:
    """A segment, with ones where the disk does not give it; then that is added to `failures`."""
    try:
        return files.read(segment)
    except LogUnreadable as failure:
        failures.append((segment, failure))
        return failure.data


def _unused(data: bytes, segment: int, cut: int) -> bool:
    """Whether nothing was ever written behind the cut in this segment: no batch begins there, so none follows."""
    offset = cut & _OFFSET_MASK
    return segment == cut >> 32 and data[offset : offset + BLOCK_BYTES] == bytes(BLOCK_BYTES)


def make_durable(files: LogFiles, recovery: Recovery) -> None:
    """Write the kept batches that no sync is known of again, and sync them.

    After a process crash they may be in the page cache alone, and after a failed sync the cache may hold as clean
    what the disk does not have. Raises: LogUnreadable: the disk gave them before, and does not now; LogWriteFailed.
    """
    for segment in dict.fromkeys(header.segment for header in recovery.unsure):
        failures: list[tuple[int, LogUnreadable]] = []
        data = _read(files, segment, failures)
        for header in recovery.unsure:
            if header.segment == segment:
                end = header.offset + aligned(header.length)
                for _, failure in failures:
                    if any(header.offset <= hole < end for hole in failure.holes):
                        raise failure
                files.write(segment, header.offset, data[header.offset : end])
        files.sync(segment)


def ends_blank(files: LogFiles, recovery: Recovery) -> bool:
    """Whether nothing is behind the cut: the log can go on there, and nothing is destroyed that proves S."""
    segment, offset = recovery.cut
    last = segment == max(recovery.sizes, default=0)
    return bool(offset) and last and _used(_read(files, segment, [])) <= offset


def cut_tail(files: LogFiles, recovery: Recovery) -> None:
    """Destroy what is behind the cut, newest first, so that a second recovery finds no more and no less."""
    cut_segment, cut_offset = recovery.cut
    for segment in sorted(recovery.sizes, reverse=True):
        if segment < cut_segment:
            break
        data = _read(files, segment, [])  # what is behind the cut goes, whatever it is
        used = _used(data)
        if segment > cut_segment or not cut_offset:
            recovery.torn_bytes += used
            files.delete(segment)
            del recovery.sizes[segment]
        elif used > cut_offset:
            recovery.torn_bytes += used - cut_offset
            files.write(segment, cut_offset, bytes(min(aligned(used), len(data)) - cut_offset))
            files.sync(segment)


def _used(data: bytes) -> int:
    """The length without the zeros at the end."""
    zeros = bytes(BLOCK_BYTES)
    end = len(data)
    while end >= BLOCK_BYTES and data[end - BLOCK_BYTES : end] == zeros:
        end -= BLOCK_BYTES
    start = max(0, end - BLOCK_BYTES)
    return start + len(data[start:end].rstrip(b"\0"))


def _headers(data: bytes, segment: int, number: int) -> Iterator[BatchHeader]:
    """The valid headers of a segment with rising numbers above `number`; past damage, every 4 KiB boundary is tried."""
    offset = 0
    while offset + BATCH_HEADER_BYTES <= len(data):
        header = decode_batch_header(data, segment, offset)
        if header is not None and header.number > number:
            yield header
            number = header.number
            offset += aligned(header.length)
            continue
        found = data.find(MAGIC, offset + 1)
        if found < 0:
            return
        offset = max(offset + BLOCK_BYTES, found // BLOCK_BYTES * BLOCK_BYTES)


def _judge(
    files: LogFiles,
    segments: list[int],
    headers: list[BatchHeader],
    synced: int,
    replay: _Replay,
    failures: list[tuple[int, LogUnreadable]],
) -> int:
    """Replay the batches in order; return the position of the cut."""
    expected = position(segments[0], 0) if segments else position(0, 0)
    data, loaded = b"", -1
    for header in headers:
        follows = header.start == expected or (
            header.offset == 0 and header.previous_end == expected
        )
        if not follows:
            if expected >= synced:
                return expected
            replay.lost(expected, min(synced, header.start))
            next_segment = header.offset == 0 and header.previous_end == synced
            if header.start > synced and not next_segment:
                return synced
        if header.segment != loaded:
            data, loaded = _read(files, header.segment, failures), header.segment
        records = decode_records(data, header)
        if header.start >= synced and any(
            record is None or record.body is None for record in records
        ):
            return header.start if header.offset else max(expected, synced)
        replay.batch(header, records)
        expected = header.end
    if expected < synced:
        replay.lost(expected, synced)
        return synced
    return expected


class _Group:
    """One group's log while it is replayed: the bookkeeping, and what is in each slot."""

    def __init__(self, group: int) -> None:
        self.group = group
        self.state = GroupState()
        self.slots: dict[int, Entry | Fault] = {}  # no slot: the entry is missing
        self.sure = 0  # entries up to here are committed: never replaced
        self.commit = 0  # of the last hard state; entries staged behind it may be meant
        self.hard_round = (
            0  # rounds of damage that the hard state, and the log, are known to be past
        )
        self.log_round = 0
        self.suspect = False
        self.place = (0, 0)  # of the damage that took the missing entries

    def restart(self, index: int, term: int) -> None:
        self.state.restart(index, term)
        self.slots.clear()
        self.sure = self.commit = index

    def settle(self, index: int, term: int, place: tuple[int, int]) -> None:
        """A record says that the log ends at (index, term) here: make it so, and believe only what that proves."""
        state = self.state
        if index < state.start_index:
            self.restart(index, term)
        elif index <= state.last_index and state.term_at(index) == term:
            if index < state.last_index:
                self._cut_after(index)
        else:
            proven = max(self.sure, state.start_index, state.last_of_term(term, index))
            self._cut_after(min(proven, state.last_index, index))
            self.place = place
            if index > state.last_index + 1 and state.last_term != term:
                state.push(state.last_index + 1, 0)
            state.push(index, term)

    def push(self, record: Record, segment: int) -> None:
        if record.body is None:
            self.slots[record.index] = Fault(
                self.group,
                record.index,
                record.term,
                record.kind,
                segment,
                record.offset,
                record.length,
                record.crc,
            )
        else:
            self.slots[record.index] = Entry(record.index, record.term, record.kind, record.body)
        self.state.push(record.index, record.term)
        self.state.held[segment] = record.index

    def compact(self, index: int, term: int) -> None:
        if index > self.state.start_index:
            self.state.compact(index)
            self.state.start_term = term
            self.slots = {at: slot for at, slot in self.slots.items() if at > index}

    def finish(self) -> GroupLog:
        """The log from the start on; a missing entry is a fault with a stand-in, like a damaged one, but for very many."""
        state = self.state
        state.suspect = self.suspect
        log = GroupLog(
            state.hard_state,
            (state.start_index, state.start_term),
            [],
            tombstone=state.tombstone,
            suspect=self.suspect,
        )
        before = state.start_index
        for index in sorted(self.slots):
            slot = self.slots[index]
            if index != before + 1:
                self._miss(log, before + 1, index - 1)
            if isinstance(slot, Fault):
                log.faulty.append(slot)
                slot = Entry(slot.index, slot.term, slot.kind, b"")
            log.entries.append(slot)
            before = index
        if before != state.last_index:
            self._miss(log, before + 1, state.last_index)
        return log

    def _miss(self, log: GroupLog, first: int, last: int) -> None:
        """These are missing. After a lost RESET or HEAD they may be all since the beginning of the group."""
        state = self.state
        if last - first >= _MISSING_MAX:
            log.faulty.append(Fault(self.group, first, 0, 0, *self.place, 0, None, last - first))
            log.start, log.entries = (last, state.term_at(last)), []
            return
        for index in range(first, last + 1):
            fault = Fault(self.group, index, state.term_at(index), 0, *self.place, 0, None)
            log.faulty.append(fault)
            log.entries.append(Entry(index, fault.term, 0, b""))

    def _cut_after(self, index: int) -> None:
        state = self.state
        if state.last_index - index > len(self.slots):  # mostly missing ones
            self.slots = {at: slot for at, slot in self.slots.items() if at <= index}
        for at in range(index + 1, min(state.last_index, index + len(self.slots)) + 1):
            self.slots.pop(at, None)
        state.cut_after(index)


class _Replay:
    """All groups while the batches are replayed in order."""

    def __init__(self) -> None:
        self.groups: dict[int, _Group] = {}
        self.damage: list[Damage] = []
        self.bodies: list[tuple[int, int]] = []
        self.batches = 0
        self._place = (0, 0)
        self._segment = 0

    def lost(self, start: int, end: int) -> None:
        """Everything between these positions is gone: from here on every group is in doubt."""
        self._place = (start >> 32, start & _OFFSET_MASK)
        self.damage.append(Damage(*self._place, end >> 32, end & _OFFSET_MASK))

    def batch(self, header: BatchHeader, records: list[Record | None]) -> None:
        self.batches += 1
        self._segment = header.segment
        table = header.start + BATCH_HEADER_BYTES
        for i, record in enumerate(records):
            if record is None:
                at = table + i * RECORD_HEADER_BYTES
                self.lost(at, at + RECORD_HEADER_BYTES)
                continue
            if record.body is None:
                self.bodies.append((header.segment, record.offset))
            if record.type == _ENTRY:
                self._entry(record)
            elif record.type != RecordType.MARK:
                self._record(record)

    def finish_doubts(self) -> None:
        """Whoever is still in doubt is suspect."""
        rounds = len(self.damage)
        for group in self.groups.values():
            group.suspect = group.suspect or group.hard_round < rounds or group.log_round < rounds
            if group.place == (0, 0):  # in a deleted segment: what said it may go is lost
                group.place = self._place

    def _group(self, group: int) -> _Group:
        known = self.groups.get(group)
        if known is None:
            known = self.groups[group] = _Group(group)
        return known

    def _entry(self, record: Record) -> None:
        group = self.groups.get(record.group) or self._group(record.group)
        state = group.state
        if record.index != state.last_index + 1 or record.previous != state.last_term:
            group.settle(record.index - 1, record.previous, self._place)
        group.push(record, self._segment)
        group.log_round = len(self.damage)

    def _record(self, record: Record) -> None:
        group = self._group(record.group)
        match record.type:
            case RecordType.HARD_STATE | RecordType.HEAD:
                self._state_record(group, record)
            case RecordType.RESET | RecordType.CARRY:
                group.restart(record.index, record.term)
                group.log_round = len(self.damage)
            case RecordType.TOMBSTONE:
                group.restart(0, 0)
                group.state.hard_state = HardState()
                group.state.tombstone = max(group.state.tombstone, record.index)
                group.suspect = False
                group.hard_round = group.log_round = len(self.damage)
            case _:
                raise LogFormatError(f"a record of unknown type {record.type}, of a newer version")

    def _state_record(self, group: _Group, record: Record) -> None:
        state = group.state
        vote = commit = tombstone = start_index = start_term = 0
        if record.body is not None and record.type == RecordType.HEAD:
            vote, commit, tombstone, start_index, start_term = HEAD_BODY.unpack(record.body)
            if start_index < state.start_index:  # it began anew, in a record that is lost
                group.restart(start_index, start_term)
        elif record.body is not None:
            vote, commit, tombstone = HARD_BODY.unpack(record.body)
        group.settle(record.index, record.previous, self._place)
        group.log_round = len(self.damage)
        if record.body is None:  # vote and commit are lost with it
            group.suspect = True
            group.place = (self._segment, record.offset)
            return
        group.compact(start_index, start_term)
        state.tombstone = max(state.tombstone, tombstone)
        state.hard_state = HardState(record.term, vote, commit)
        sure = commit if record.type == RecordType.HEAD else group.commit
        group.sure = max(group.sure, min(sure, state.last_index))
        group.commit = commit
        group.suspect = bool(record.flags & FLAG_SUSPECT)
        group.hard_round = len(self.damage)
