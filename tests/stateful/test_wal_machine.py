"""Random histories of the log file, with crashes at any point and with rot, against a model of plain dicts.

Claims: after a crash that keeps any subset of unsynced sectors, what is recovered is exactly what the log said after
some batch, none older than the last synced one. Damage before the last known sync is always told: a group that is
not suspect has every entry or names the missing ones, and its hard state is right. Nothing is ever invented.
"""

from __future__ import annotations

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from replication.types import Entry
from replication.wal import Wal
from replication.wal_format import BLOCK_BYTES
from tests.unit.replication.wal_driver import ModelGroup, Node, check_told

GROUPS = st.integers(1, 3)
SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.sampled_from([0, 5, 40, 600, 5000])
SEGMENT_BLOCKS = 6


def entry_of(group: int, index: int, term: int, size: int) -> Entry:
    """In Raft, (index, term) names one entry for ever; here it also says what its data begins with."""
    return Entry(index, term, index % 3, b"%d.%d.%d" % (group, index, term) + b"z" * size)


class Leaders:
    """Which entries of a group can exist: one leader per term, whose log in that term only grows."""

    def __init__(self) -> None:
        self.before: dict[tuple[int, int], int] = {}  # (index, term) -> the term before it
        self.top: dict[int, int] = {}  # term -> its largest index

    def may_follow(self, index: int, before: int, term: int) -> bool:
        known = self.before.get((index, term))
        if known is not None:
            return known == before
        return term >= before and (
            term not in self.top or (term == before and self.top[term] == index - 1)
        )

    def note(self, index: int, before: int, term: int) -> None:
        self.before[index, term] = before
        self.top[term] = max(index, self.top.get(term, 0))


class WalMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.node = Node(segment_bytes=SEGMENT_BLOCKS * BLOCK_BYTES)
        self.leaders: dict[int, Leaders] = {}

    def known(self, group: int) -> ModelGroup:
        return self.node.model.get(group) or ModelGroup()

    @rule(
        group=GROUPS,
        back=st.integers(0, 3),
        rise=st.integers(0, 4),
        sizes=st.lists(SIZES, min_size=1, max_size=4),
    )
    def append(self, group: int, back: int, rise: int, sizes: list[int]) -> None:
        """At the end, or over a suffix that is not committed."""
        known = self.known(group)
        leaders = self.leaders.setdefault(group, Leaders())
        index = max(known.last - back, known.hard_state.commit, known.start, known.base) + 1
        index = min(index, known.last + 1)
        before = known.terms[index - 1]
        terms = [t for t in range(before, before + 6) if t and leaders.may_follow(index, before, t)]
        if not terms:
            return
        term = terms[rise % len(terms)]
        entries = []
        for size in sizes:
            if not leaders.may_follow(index, before, term):
                break
            leaders.note(index, before, term)
            entries.append(entry_of(group, index, term, size))
            index, before = index + 1, term
        if entries and self.is_new(known, entries):
            self.node.append(group, *entries)

    @staticmethod
    def is_new(known: ModelGroup, entries: list[Entry]) -> bool:
        """Raft truncates at a real conflict only."""
        first = entries[0]
        return first.index > known.last or known.terms[first.index] != first.term

    @rule(group=GROUPS, vote=st.integers(0, 3), ahead=st.integers(0, 3))
    def hard_state(self, group: int, vote: int, ahead: int) -> None:
        known = self.known(group)
        old = known.hard_state
        commit = max(old.commit, min(old.commit + ahead, known.last))
        self.node.hard(group, old.term + 1, vote, commit)

    @rule(group=GROUPS, ahead=st.integers(1, 5))
    def reset(self, group: int, ahead: int) -> None:
        """A snapshot was installed: it stands beyond all that this log has."""
        known = self.known(group)
        index, term = known.last + ahead, known.terms[known.last] + 1
        leaders = self.leaders.setdefault(group, Leaders())
        while term in leaders.top:
            term += 1
        leaders.note(index, term, term)
        self.node.reset(group, index, term)
        self.node.hard(group, known.hard_state.term + 1, 0, index)

    @rule(group=GROUPS)
    def tombstone(self, group: int) -> None:
        self.node.tombstone(group, self.known(group).tombstone + 1)

    @rule(group=GROUPS, ahead=st.integers(1, 9))
    def compact(self, group: int, ahead: int) -> None:
        known = self.known(group)
        index = min(known.start + ahead, known.hard_state.commit, known.last)
        if index > known.start:
            self.node.compact(group, index)

    @rule()
    def carry_pinned(self) -> None:
        for group in self.node.wal.pinned():
            self.node.carry(group)

    @rule(group=GROUPS)
    def carry(self, group: int) -> None:
        self.node.carry(group)

    @rule()
    def rotate(self) -> None:
        self.node.wal.rotate()

    @rule()
    def write(self) -> None:
        self.node.write()

    @rule()
    def sync(self) -> None:
        self.node.write()
        self.node.sync()

    @rule()
    def mark(self) -> None:
        self.node.mark()

    @rule(seed=SEEDS)
    def lose_power(self, seed: int) -> None:
        self.node.restart(self.node.disk.crash(random.Random(seed)))

    @rule()
    def kill(self) -> None:
        self.node.restart(self.node.disk.kill())

    @rule(seed=SEEDS)
    def rot(self, seed: int) -> None:
        """On a copy of the disk: up to three flipped bits or lost blocks in what is known to be durable."""
        rng = random.Random(seed)
        self.node.mark()
        self.node.mark()
        disk = self.node.disk.fork()
        for _ in range(rng.choice((1, 1, 2, 3))):
            segment = rng.choice(disk.segments())
            used = len(disk.read(segment).rstrip(b"\0")) // BLOCK_BYTES * BLOCK_BYTES
            if segment < disk.segments()[-1]:
                used += BLOCK_BYTES  # the newest segment's last block is the last mark
            if not used:
                continue
            if rng.random() < 0.5:
                disk.flip(segment, rng.randrange(used), rng.randrange(8))
            else:
                at = rng.randrange(used) // BLOCK_BYTES * BLOCK_BYTES
                disk.write(segment, at, bytes(BLOCK_BYTES))
        _, logs = Wal.recover(disk, segment_bytes=self.node.segment_bytes)
        check_told(self.node.model, list(logs.items()))
        for group, log in logs.items():
            faulty = {fault.index for fault in log.faulty}
            for one in log.entries:
                if one.index not in faulty:
                    assert one == entry_of(group, one.index, one.term, one.data.count(b"z"))
        assert Wal.recover(disk.kill(), segment_bytes=self.node.segment_bytes)[1] == logs

    def teardown(self) -> None:
        self.node.restart(self.node.disk.kill())


WalMachine.TestCase.settings = settings(
    max_examples=50,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestWalMachine = WalMachine.TestCase
