"""The log of one group in memory: everything after the last compaction.

L1. `entries[i].index == start_index + 1 + i`; terms never fall along the log, and none is below start_term.
L2. durable_index <= last_index. What is at or below durable_index is on disk exactly as it is here. Truncation lowers
    it, and only the token of a later write raises it again (pitfall 14).
L3. Entries above handed_index have not been given to the host for writing since they last changed.
L4. Entries at or below the commit index are never replaced (the caller asserts it, see raft.py).

Lookups are O(1): an index is a position in a list.
"""

from __future__ import annotations

from collections.abc import Sequence

from replication.errors import LogMismatch
from replication.types import Entry

ENTRY_OVERHEAD_BYTES = 24  # what an entry costs on the wire and on disk beside its data, about


class RaftLog:
    """Entries (start_index, last_index], the term before them, and what of them is durable."""

    __slots__ = (
        "_entries",
        "bytes",
        "durable_index",
        "handed_index",
        "last_index",
        "last_term",
        "start_index",
        "start_term",
    )

    def __init__(self, start_index: int, start_term: int, entries: Sequence[Entry] = ()) -> None:
        """A log found on disk: all of `entries` are durable. Raises LogMismatch if they have a gap or falling terms."""
        self.start_index = start_index
        self.start_term = start_term
        index, term, size = start_index, start_term, 0
        for entry in entries:
            if entry.index != index + 1 or entry.term < term:
                raise LogMismatch(
                    f"entry ({entry.index}, term {entry.term}) does not follow ({index}, term {term})"
                )
            index, term = entry.index, entry.term
            size += len(entry.data)
        self._entries: list[Entry] = list(entries)
        self.bytes = size
        self.last_index = index
        self.last_term = term
        self.durable_index = index
        self.handed_index = index

    @property
    def first_index(self) -> int:
        """The index of the first entry that is (or will be) held."""
        return self.start_index + 1

    def __len__(self) -> int:
        return len(self._entries)

    def term(self, index: int) -> int | None:
        """The term at an index; None if it is compacted away or beyond the end."""
        position = index - self.start_index - 1
        if position == -1:
            return self.start_term
        if position < 0 or index > self.last_index:
            return None
        return self._entries[position].term

    def matches(self, index: int, term: int) -> bool:
        """Whether the entry at `index` is held (or is the start) and has this term."""
        return self.term(index) == term

    def entry(self, index: int) -> Entry:
        """The entry at an index that is held."""
        assert self.start_index < index <= self.last_index, f"{index} is not held"
        return self._entries[index - self.start_index - 1]

    def slice(self, first: int, last: int) -> list[Entry]:
        """Entries first..last, both included; all must be held."""
        assert self.start_index < first, f"{first} is compacted away"
        assert last <= self.last_index, f"{last} is beyond the end"
        return self._entries[first - self.start_index - 1 : last - self.start_index]

    def slice_bounded(
        self, first: int, entries_max: int, bytes_max: int
    ) -> tuple[list[Entry], int]:
        """Entries from `first` on within both limits, but at least one if there is one; and their size in bytes."""
        begin = first - self.start_index - 1
        assert begin >= 0, f"{first} is compacted away"
        entries = self._entries[begin : begin + max(entries_max, 1)]
        size = 0
        for count, entry in enumerate(entries):
            entry_bytes = len(entry.data) + ENTRY_OVERHEAD_BYTES
            if size + entry_bytes > bytes_max and count:
                return entries[:count], size
            size += entry_bytes
        return entries, size

    def lowest_within(self, bytes_max: int) -> int:
        """The lowest index behind which at most `bytes_max` are held; 0 if that is so of the whole log."""
        if self.bytes <= bytes_max:
            return 0
        index, behind_bytes = self.start_index, self.bytes
        for entry in self._entries:
            index, behind_bytes = entry.index, behind_bytes - len(entry.data)
            if behind_bytes <= bytes_max:
                break
        return index

    def append(self, entry: Entry) -> None:
        """Append the next entry."""
        assert entry.index == self.last_index + 1, f"{entry.index} after {self.last_index}"
        assert entry.term >= self.last_term, f"term {entry.term} after {self.last_term}"
        self._entries.append(entry)
        self.last_index = entry.index
        self.last_term = entry.term
        self.bytes += len(entry.data)

    def truncate_after(self, index: int) -> None:
        """Drop every entry above `index`; whoever calls appends others at once."""
        assert self.start_index <= index, f"{index} is compacted away"
        if index >= self.last_index:
            return
        position = index - self.start_index
        for entry in self._entries[position:]:
            self.bytes -= len(entry.data)
        del self._entries[position:]
        self.last_index = index
        self.last_term = self._entries[-1].term if self._entries else self.start_term
        self.durable_index = min(self.durable_index, index)
        self.handed_index = min(self.handed_index, index)

    def take_unwritten(self) -> list[Entry]:
        """Entries to be written to disk; each change of the log is handed out once (L3)."""
        if self.handed_index == self.last_index:
            return []
        entries = self._entries[self.handed_index - self.start_index :]
        self.handed_index = self.last_index
        return entries

    def durable(self, index: int, term: int) -> bool:
        """A write that ended at (index, term) is durable. True if that is news; a stale one changes nothing (L2)."""
        if (
            index <= self.durable_index
            or index > self.handed_index
            or not self.matches(index, term)
        ):
            return False
        self.durable_index = index
        return True

    def last_index_within_term(self, index: int, term: int) -> tuple[int, int]:
        """The largest (index, term) at or below both bounds: where another log with `term` at `index` may agree.

        Returns the start (with its term) if everything held is above. Whole terms are skipped at once (section 5.3
        of the Raft paper, last paragraph).
        """
        index = min(index, self.last_index)
        while index > self.start_index and self._entries[index - self.start_index - 1].term > term:
            index -= 1
        if index <= self.start_index:
            return self.start_index, self.start_term
        return index, self._entries[index - self.start_index - 1].term

    def compact(self, index: int) -> None:
        """Drop entries at or below `index` from memory."""
        if index <= self.start_index:
            return
        assert index <= self.durable_index, f"compaction to {index} above {self.durable_index}"
        term = self.term(index)
        assert term is not None
        count = index - self.start_index
        for entry in self._entries[:count]:
            self.bytes -= len(entry.data)
        del self._entries[:count]
        self.start_index, self.start_term = index, term

    def reset(self, index: int, term: int) -> None:
        """The log is empty and starts after (index, term): a snapshot was installed and is durable."""
        self._entries.clear()
        self.bytes = 0
        self.start_index = self.last_index = self.durable_index = self.handed_index = index
        self.start_term = self.last_term = term
