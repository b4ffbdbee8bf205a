"""The node's write-ahead log: one log for all groups, one batch per turn, sans-I/O.

The host stages what a turn changed, takes it as one batch, writes and syncs it, and reports it durable:

    wal.append(group, entries); wal.set_hard_state(group, state); batch = wal.take()
    files.create / files.write / files.sync ...; wal.synced(batch.number)

Batches may be several in flight, written in order; `synced(n)` says that all up to n are durable, in whatever
segments they lie. The format is in wal_format.py, recovery in wal_scan.py, invariants W1.. in DESIGN.md, section 6.

How old segments go. The first batch of a segment holds a HEAD record of every group. When a segment is begun, what
no group needs any more is known (live logs start above it), and that batch records it. Once it is durable, and not
before, everything older than the oldest segment still needed is `obsolete`. A group that keeps more than
`segments_max` segments alive is `pinned`: the host carries its live log into the current segment.

A suspect group (see GroupLog) stays suspect through anything that is written, until `trust`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from crc32c import crc32c

from replication.errors import LogMismatch
from replication.ports import LogFiles
from replication.probes import chance, reached
from replication.types import Entry, HardState
from replication.wal_format import (
    BATCH_BYTES_MAX,
    BATCH_HEADER_BYTES,
    CRC,
    FLAG_SUSPECT,
    HARD_BODY,
    HEAD_BODY,
    RECORD,
    RECORD_HEADER_BYTES,
    BatchHeader,
    RecordType,
    aligned,
    encode_batch_header,
    position,
    seed_of,
)
from replication.wal_groups import Damage, Fault, GroupLog, GroupState
from replication.wal_scan import Recovery, cut_tail, ends_blank, make_durable, scan

__all__ = ["Damage", "Fault", "GroupLog", "Recovery", "Wal", "WalBatch"]

SEGMENT_BYTES: Final = 64 << 20
SEGMENTS_MAX: Final = 4


class WalBatch(NamedTuple):
    """Bytes to write. `create_bytes` > 0: files.create(segment, create_bytes) comes first."""

    number: int
    segment: int
    offset: int
    data: bytes
    create_bytes: int


class Wal:
    """The log of one node. Every method is quick and does no I/O, but for the class method `recover`."""

    def __init__(
        self, *, segment_bytes: int = SEGMENT_BYTES, segments_max: int = SEGMENTS_MAX
    ) -> None:
        """An empty log. segment_bytes: size of a segment, exceeded only by a batch that is larger."""
        assert segment_bytes == aligned(segment_bytes) > 0
        self._segment_bytes = segment_bytes
        self._segments_max = segments_max
        self._groups: dict[int, GroupState] = {}
        self._sizes: dict[int, int] = {}  # live segments, ascending -> bytes
        self._segment = 0  # where the next batch goes, unless it begins a new segment
        self._offset = 0
        self._begin_segment = True
        self._number = 0  # of the last batch taken
        self._durable = 0  # position: all before it is durable
        self._last_is_mark = True
        self._in_flight: deque[tuple[int, int]] = deque()  # (number, end position)
        self._releases: deque[tuple[int, int]] = (
            deque()
        )  # (number, segments below this go when it is durable)
        self._needed = 0  # segments below this are obsolete
        self._heads: list[bytes] = []  # staged record headers, two pieces each
        self._bodies: list[bytes] = []
        self._body_bytes = 0
        self._touched: dict[int, GroupState] = {}  # groups with entries staged
        self.recovery: Recovery | None = None

    @classmethod
    def begin(cls, files: LogFiles, *, segment_bytes: int = SEGMENT_BYTES) -> Wal:
        """Where there is none: a log that holds nothing, durable when this returns. Raises: LogDiskFull, LogWriteFailed."""
        wal = cls(segment_bytes=segment_bytes)
        wal._write(files, wal._take(1))
        return wal

    @classmethod
    def recover(
        cls,
        files: LogFiles,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        segments_max: int = SEGMENTS_MAX,
        begun: bool = False,
    ) -> tuple[Wal, dict[int, GroupLog]]:
        """Read the log, cut its torn tail for good, and go on after it.

        What is returned is durable: the tail beyond the last known sync is written and synced again. `wal.recovery`
        tells what was cut and what is damaged; a group that is not in the result is suspect if there is damage.
        begun: a batch of it was durable, which is known from elsewhere (`begin`).
        Raises: LogMismatch (it was begun, and there is none), LogFormatError, or OSError if what may be durable cannot be
        read (nothing was changed); LogWriteFailed.
        """
        recovery, logs, groups = scan(files)
        if begun and not recovery.number:
            raise LogMismatch(
                "it was begun, but nothing of the log is left: put its directory back"
            )
        wal = cls(segment_bytes=segment_bytes, segments_max=segments_max)
        wal.recovery = recovery
        wal._groups = groups
        wal._number = recovery.number
        make_durable(files, recovery)
        if recovery.unsure:
            reached("log_written_again")
        if recovery.damage or recovery.bodies or any(log.faulty for log in logs.values()):
            reached("rot_found")
            if not ends_blank(files, recovery):
                wal._go_on_behind(files, recovery)
                return wal, logs
        else:
            cut_tail(files, recovery)
        if recovery.torn_bytes:
            reached("torn_tail_cut")
        wal._sizes = recovery.sizes
        if recovery.sizes:
            wal._segment, wal._offset = recovery.cut
            wal._durable = position(*recovery.cut)
            wal._begin_segment = wal._last_is_mark = False
        return wal, logs

    # -- staging ---------------------------------------------------------------------------------------------------

    def append(self, group: int, entries: Sequence[Entry]) -> None:
        """Stage entries, contiguous, the first at most one after the last: a smaller index replaces the suffix."""
        if not entries:
            return
        state = self._state(group)
        index = entries[0].index
        if index <= state.last_index:
            assert index > state.start_index, "entries at or below the log's start are settled"
            state.cut_after(index - 1)
        assert index == state.last_index + 1, "a gap in the log"
        self._touched[group] = state
        stage_head, stage_body = self._heads.append, self._bodies.append
        pack, pack_crc = RECORD.pack, CRC.pack
        seed = seed_of(self._number + 1)
        previous = state.last_term
        size = 0
        for entry in entries:
            data, term = entry.data, entry.term
            assert entry.index == index
            length = len(data)
            head = pack(_ENTRY, entry.kind, 0, length, group, index, term, previous, crc32c(data))
            stage_head(head)
            stage_head(pack_crc(crc32c(head, seed)))
            stage_body(data)
            size += length
            if term != previous or not state.runs:
                state.runs.append((index, term))
                previous = term
            index += 1
        self._body_bytes += size
        state.last_index, state.last_term = index - 1, previous

    def set_hard_state(self, group: int, state: HardState) -> None:
        """Stage a group's term, vote and commit."""
        known = self._state(group)
        known.hard_state = state
        self._stage(
            RecordType.HARD_STATE,
            group,
            flags=FLAG_SUSPECT if known.suspect else 0,
            index=known.last_index,
            term=state.term,
            previous=known.last_term,
            body=HARD_BODY.pack(state.vote, state.commit, known.tombstone),
        )

    def reset(self, group: int, index: int, term: int) -> None:
        """Stage: the log of the group is empty now and starts after (index, term). The hard state stays."""
        state = self._state(group)
        state.restart(index, term)
        self._stage(RecordType.RESET, group, index=index, term=term)

    def tombstone(self, group: int, replica: int) -> None:
        """Stage: this replica is removed for good. Its hard state and log are void; a later replica starts anew."""
        state = self._state(group)
        state.restart(0, 0)
        state.hard_state = HardState()
        state.tombstone = max(state.tombstone, replica)
        state.suspect = False
        self._stage(RecordType.TOMBSTONE, group, index=state.tombstone)

    def compact(self, group: int, index: int) -> None:
        """Entries up to `index` are durable in the engine: the log need not keep them. Recorded with the next head."""
        state = self._groups.get(group)
        if state is not None:
            state.compact(index)

    def carry(self, group: int, entries: Sequence[Entry]) -> None:
        """Stage the whole live log of a group again, so that older segments need not keep it.

        It replaces, and is not an append: `entries` end at the group's last entry and may begin anywhere from the
        one after its start on (what lies below is compacted). Also how an entry repaired from a peer is written.
        """
        state = self._state(group)
        last = (state.last_index, state.last_term)
        if entries:
            assert (entries[-1].index, entries[-1].term) == last, (
                "a carried log ends where the log ends"
            )
            index = entries[0].index - 1
            term = state.term_at(index)
        else:
            index, term = last
        state.restart(index, term)
        self._stage(RecordType.CARRY, group, index=index, term=term)
        self.append(group, entries)

    def doubt(self, group: int) -> GroupLog:
        """A group that recovery did not find though records are lost, and had been here: suspect, until `trust`.

        Staged, since the damage that tells of it goes with its segment.
        """
        state = self._state(group)
        state.suspect = True
        self.set_hard_state(group, state.hard_state)
        return GroupLog(state.hard_state, (0, 0), [], suspect=True)

    def trust(self, group: int) -> None:
        """The host has made sure of a suspect group (its replica joined anew, say): what is staged now counts."""
        state = self._state(group)
        state.suspect = False
        self.set_hard_state(group, state.hard_state)

    def sync_mark(self) -> None:
        """Stage a batch that only records how far the log is durable, so that later damage there is known for rot."""
        self._stage(RecordType.MARK, 0)

    def rotate(self) -> None:
        """Begin a new segment with the next batch, so that older ones become obsolete (tests, shrinking)."""
        self._begin_segment = True

    # -- taking and reporting --------------------------------------------------------------------------------------

    def take(self) -> WalBatch | None:
        """Everything staged as one batch, None if nothing is. It must be written; batches are written in order."""
        if not self._heads:
            return None
        full = (
            self._begin_segment
            or self._offset + aligned(self._staged_bytes()) > self._sizes[self._segment]
            or chance("segment_begun_early")
        )
        return self._take(self._segment + 1 if full else self._segment)

    def _take(self, segment: int) -> WalBatch:
        number, previous_end = self._number + 1, position(self._segment, self._offset)
        create_bytes = self._begin(segment, number) if segment != self._segment else 0
        offset = 0 if create_bytes else self._offset
        for state in self._touched.values():
            if state.last_index > state.start_index:
                state.held[segment] = state.last_index
        length = self._staged_bytes()
        assert length <= BATCH_BYTES_MAX
        header = BatchHeader(
            number, segment, offset, length, len(self._heads) // 2, previous_end, self._durable
        )
        padding = aligned(length) - length
        data = b"".join((encode_batch_header(header), *self._heads, *self._bodies, bytes(padding)))
        self._last_is_mark = self._heads[0][0] == RecordType.MARK and len(self._heads) == 2
        self._heads.clear()
        self._bodies.clear()
        self._body_bytes = 0
        self._touched.clear()
        self._number = number
        self._segment, self._offset = segment, offset + len(data)
        self._in_flight.append((number, position(segment, self._offset)))
        return WalBatch(number, segment, offset, data, create_bytes)

    def synced(self, number: int) -> None:
        """Batches up to `number` are durable, those in older segments included."""
        while self._in_flight and self._in_flight[0][0] <= number:
            self._durable = self._in_flight.popleft()[1]
        while self._releases and self._releases[0][0] <= number:
            self._needed = self._releases.popleft()[1]

    # -- segments --------------------------------------------------------------------------------------------------

    def pinned(self) -> list[int]:
        """The groups whose live log keeps segments older than the newest `segments_max`. Looks at every group when
        there are such segments: ask after a batch with create_bytes, not every turn."""
        if len(self._sizes) <= self._segments_max:
            return []
        floor = self._segment - self._segments_max + 1
        oldest = ((group, state.oldest_segment()) for group, state in self._groups.items())
        return [group for group, segment in oldest if segment is not None and segment < floor]

    def obsolete(self) -> list[int]:
        """Segments to delete now, oldest first and in this order; `forget` each when it is gone."""
        return [segment for segment in self._sizes if segment < self._needed]

    def forget(self, segment: int) -> None:
        """The segment is deleted."""
        reached("segment_deleted")
        assert segment < self._needed
        assert segment == next(iter(self._sizes)), "segments go oldest first"
        del self._sizes[segment]

    @property
    def segments(self) -> list[int]:
        """Ids of the segments that exist, ascending."""
        return list(self._sizes)

    @property
    def bytes_live(self) -> int:
        """What the segments take on disk."""
        return sum(self._sizes.values())

    @property
    def needs_mark(self) -> bool:
        """The last batch is not a mark: on an idle node a torn tail and rot in it could not be told apart."""
        return not self._last_is_mark

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _go_on_behind(self, files: LogFiles, recovery: Recovery) -> None:
        """There is damage, and a tail to cut: begin a new segment and make it durable before anything is destroyed.

        Its head knows who is suspect, and how far the log was durable: what is cut now may be the only other proof.
        """
        self._sizes = dict(recovery.sizes)
        self._segment, self._offset = recovery.cut
        self._durable = position(*recovery.cut)
        batch = self._take(max(recovery.sizes) + 1)
        self._write(files, batch)
        cut_tail(files, recovery)
        self._sizes = recovery.sizes | {batch.segment: batch.create_bytes}

    def _write(self, files: LogFiles, batch: WalBatch) -> None:
        """The first batch of a segment, at once."""
        files.create(batch.segment, batch.create_bytes)
        files.write(batch.segment, batch.offset, batch.data)
        files.sync(batch.segment)
        self.synced(batch.number)

    def _state(self, group: int) -> GroupState:
        state = self._groups.get(group)
        if state is None:
            state = self._groups[group] = GroupState()
        return state

    def _staged_bytes(self) -> int:
        return BATCH_HEADER_BYTES + len(self._heads) // 2 * RECORD_HEADER_BYTES + self._body_bytes

    def _begin(self, segment: int, number: int) -> int:
        """Stage the head of a new segment behind what is staged; return the segment's size.

        One batch holds both, so that the head never speaks of entries that a torn write has lost.
        """
        before = self._staged_bytes()
        needed = segment
        for group, state in self._groups.items():
            self._stage_head_of(group, state)
            oldest = state.oldest_segment()
            if oldest is not None:
                needed = min(needed, oldest)
        if not self._groups:
            self.sync_mark()
        total = self._staged_bytes()
        size = max(self._segment_bytes, aligned(total + 4 * (total - before)))
        self._releases.append((number, needed))
        self._sizes[segment] = size
        self._begin_segment = False
        return size

    def _stage_head_of(self, group: int, state: GroupState) -> None:
        hard = state.hard_state
        self._stage(
            RecordType.HEAD,
            group,
            flags=FLAG_SUSPECT if state.suspect else 0,
            index=state.last_index,
            term=hard.term,
            previous=state.last_term,
            body=HEAD_BODY.pack(
                hard.vote, hard.commit, state.tombstone, state.start_index, state.start_term
            ),
        )

    def _stage(
        self,
        kind: RecordType,
        group: int,
        *,
        flags: int = 0,
        index: int = 0,
        term: int = 0,
        previous: int = 0,
        body: bytes = b"",
    ) -> None:
        head = RECORD.pack(kind, 0, flags, len(body), group, index, term, previous, crc32c(body))
        self._heads.append(head)
        self._heads.append(CRC.pack(crc32c(head, seed_of(self._number + 1))))
        self._bodies.append(body)
        self._body_bytes += len(body)


_ENTRY: Final = int(RecordType.ENTRY)
