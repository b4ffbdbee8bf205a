"""What the log file knows about one group without its entries' bytes, and what recovery says about it.

`GroupState` is kept by the running `Wal` and rebuilt by recovery: the same few numbers that a segment's head holds,
the terms of the live log as runs, and which segments hold how much of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from replication.types import Entry, HardState


@dataclass(frozen=True, slots=True)
class Fault:
    """An entry that was durable and is damaged now. `crc` None: the record's header is lost too; `term` 0: unknown.

    `more`: so many that follow it are missing as well, whatever their terms are.
    """

    group: int
    index: int
    term: int
    kind: int
    segment: int
    offset: int  # of the damaged body, or of the damage that took the record
    length: int
    crc: int | None
    more: int = 0

    @property
    def last_index(self) -> int:
        return self.index + self.more


class Damage(NamedTuple):
    """A stretch of the log that was durable and in which records of any group may be lost."""

    segment: int
    offset: int
    end_segment: int
    end_offset: int


@dataclass
class GroupLog:
    """What recovery found of one group.

    `entries` follow `start` without a gap; where `faulty` names an index, the entry there is a stand-in with empty
    data (term 0 if even that is lost). Where very many are missing together, the log starts behind them, and `faulty`
    names them and what is damaged before. `tombstone` is the largest removed replica id, 0 for none. `suspect`: records
    of this group may be lost without a trace, its hard state and its last entries included; it must not vote as its
    old self.
    """

    hard_state: HardState
    start: tuple[int, int]
    entries: list[Entry]
    faulty: list[Fault] = field(default_factory=list)
    tombstone: int = 0
    suspect: bool = False

    @property
    def damaged(self) -> int:
        """How many entries `faulty` names."""
        return sum(1 + fault.more for fault in self.faulty)


_FRESH = HardState()


@dataclass(slots=True)
class GroupState:
    """The bookkeeping of one group's log: (start, last], hard state, tombstone.

    Invariants: start_index <= last_index; `runs` are (first index, term), ascending, and cover start+1..last;
    `held` maps segments, ascending, to the last live index that each one holds, and is not decreasing.
    """

    hard_state: HardState = _FRESH
    start_index: int = 0
    start_term: int = 0
    last_index: int = 0
    last_term: int = 0
    tombstone: int = 0
    suspect: bool = False
    runs: list[tuple[int, int]] = field(default_factory=list)
    held: dict[int, int] = field(default_factory=dict)

    def term_at(self, index: int) -> int:
        """The term of an index from start to last."""
        assert self.start_index <= index <= self.last_index
        for first, term in reversed(self.runs):
            if first <= index:
                return term
        return self.start_term

    def last_of_term(self, term: int, upto: int) -> int:
        """The largest index, at most `upto`, of a live entry with this term; 0 if there is none."""
        end = min(self.last_index, upto)
        for first, run in reversed(self.runs):
            if run == term and first <= end:
                return end
            end = min(end, first - 1)
        return 0

    def push(self, index: int, term: int) -> None:
        """One more entry at the end."""
        if term != self.last_term or not self.runs:
            self.runs.append((index, term))
        self.last_index, self.last_term = index, term

    def cut_after(self, index: int) -> None:
        """Drop the entries above `index`."""
        assert self.start_index <= index <= self.last_index
        self.last_term = self.term_at(index)
        self.last_index = index
        while self.runs and self.runs[-1][0] > index:
            self.runs.pop()
        for segment, last in self.held.items():
            if last > index:
                self.held[segment] = index

    def restart(self, index: int, term: int) -> None:
        """An empty log that starts after (index, term)."""
        self.start_index = self.last_index = index
        self.start_term = self.last_term = term
        self.runs.clear()
        self.held.clear()

    def compact(self, index: int) -> None:
        """Move the start up to `index`, never beyond the last entry, never back."""
        index = min(index, self.last_index)
        if index <= self.start_index:
            return
        self.start_term = self.term_at(index)
        self.start_index = index
        keep = 0
        while keep + 1 < len(self.runs) and self.runs[keep + 1][0] <= index + 1:
            keep += 1
        del self.runs[:keep]
        if index == self.last_index:
            self.runs.clear()

    def oldest_segment(self) -> int | None:
        """The oldest segment with a live entry of this group."""
        for segment in list(self.held):
            if self.held[segment] > self.start_index:
                return segment
            del self.held[segment]
        return None
