"""Claims: each invariant that is watched while a simulation runs bites, and nothing else does at the same event.

Here events are forged: what a product with the mistake would do is told to the observer. That the observers are attached
where these events happen: test_observers_attached.py.
"""

from __future__ import annotations

from typing import Any

import pytest
from sortedcontainers import SortedDict

from kvstore.read_cache import UNKNOWN
from kvstore.sim.observers.consensus import Consensus, NodeDisk
from kvstore.sim.observers.contents import Contents, EntryRows
from kvstore.sim.observers.oracle import Timestamps
from kvstore.sim.observers.report import MISTAKES_MAX, Report
from replication.log import RaftLog
from replication.messages import (
    AppendRequest,
    AppendResponse,
    Heartbeat,
    HeartbeatResponse,
    Message,
    VoteRequest,
    VoteResponse,
)
from replication.reads import ReadState
from replication.ready import Ready
from replication.types import Entry, Membership
from txn import keycode
from txn.apply import SCAN_BYTES, Overlay
from txn.messages import Timestamps as TimestampsReply
from txn.state import Part, PreparedRow, RangeRow, RangeState, encode_row

GROUP = 7


class Told(list[str]):
    """What was reported: names of invariants in order."""

    def __init__(self) -> None:
        super().__init__()
        self.report = Report(lambda text: self.append(text.partition(" is broken")[0]))


# ---------------------------------------------------------------- the report


def test_a_report_says_where_and_stops_at_its_limit() -> None:
    texts: list[str] = []
    report = Report(texts.append)
    for _ in range(MISTAKES_MAX + 5):
        report.broken("I4", "why", group=2, index=9, node="n1", txn_id=b"\x01\x02")
    assert texts == ["I4 is broken (range 2, entry 9, node n1, transaction 0102): why"] * (
        MISTAKES_MAX
    )
    assert report.mistakes == MISTAKES_MAX + 5


# ---------------------------------------------------------------- Raft


class Core:
    """What the observer sees of a RaftNode."""

    def __init__(self, replica: int, *entries: Entry, term: int = 1, vote: int = 0) -> None:
        self.group, self.replica, self.term, self.vote = GROUP, replica, term, vote
        self.log = RaftLog(0, 0, entries)
        self.commit_index = 0
        self.is_leader = False
        self.membership = Membership(voters=(1, 2, 3))

    def status(self) -> dict[str, int]:
        return {"vote": self.vote}


class Cluster:
    """Three replicas, each with its disk."""

    def __init__(self) -> None:
        self.told = Told()
        self.consensus = Consensus(self.told.report)
        self.cores = {replica: Core(replica) for replica in (1, 2, 3)}
        self.disks = {replica: NodeDisk() for replica in (1, 2, 3)}
        for core in self.cores.values():
            self.consensus.opened(f"n{core.replica}", 1, core)

    def write(self, replica: int, *entries: Entry, unsynced: int = 0) -> None:
        """Append, and sync."""
        core, disk = self.cores[replica], self.disks[replica]
        core.log.truncate_after(entries[0].index - 1)
        for entry in entries:
            core.log.append(entry)
        self.consensus.ready(f"n{replica}", disk, core, Ready(entries=list(entries)))
        self.consensus.sealed(disk)
        self.consensus.synced(f"n{replica}", disk, 1, unsynced)

    def step(self, replica: int, *, commit: int | None = None, leads: int = 0) -> None:
        core = self.cores[replica]
        if commit is not None:
            core.commit_index = commit
        if leads:
            core.is_leader, core.term = True, leads
        self.consensus.ready(f"n{replica}", self.disks[replica], core, Ready())

    def restart(self, core: Core) -> None:
        self.cores[core.replica] = core
        self.consensus.opened(f"n{core.replica}", 2, core)

    def apply(self, replica: int, *entries: Entry) -> None:
        self.consensus.apply(f"n{replica}", self.cores[replica], entries)


def entry(index: int, term: int, data: bytes = b"x") -> Entry:
    return Entry(index, term, 0, data)


def committed(*, upto: int = 1) -> Cluster:
    """Replica 1 leads term 1 and has committed, with replica 2; replica 3 has nothing."""
    cluster = Cluster()
    entries = [entry(index, 1) for index in range(1, upto + 1)]
    cluster.write(1, *entries)
    cluster.write(2, *entries)
    cluster.step(1, leads=1, commit=upto)
    assert cluster.told == []
    return cluster


def test_a_run_as_it_should_be_is_silent() -> None:
    cluster = committed(upto=2)
    cluster.apply(1, entry(1, 1), entry(2, 1))
    cluster.write(3, entry(1, 1), entry(2, 1))
    cluster.step(3, commit=2)
    cluster.apply(3, entry(1, 1), entry(2, 1))
    again = Core(3, entry(1, 1), entry(2, 1))
    cluster.restart(again)
    cluster.step(3, leads=2)
    assert cluster.told == []


def test_two_leaders_of_a_term() -> None:
    cluster = Cluster()
    cluster.step(1, leads=4)
    cluster.step(2, leads=4)
    assert cluster.told == ["one leader"]


def test_a_leadership_that_outlives_a_restart() -> None:
    cluster = Cluster()
    cluster.step(1, leads=4)
    cluster.restart(Core(1, term=4))
    cluster.step(1, leads=4)
    assert cluster.told == ["one leader"]


@pytest.mark.parametrize(
    "other", [[entry(1, 1), entry(2, 3, b"y")], [entry(1, 2), entry(2, 3)]], ids=["data", "before"]
)
def test_one_index_and_term_with_two_entries_or_two_pasts(other: list[Entry]) -> None:
    cluster = Cluster()
    cluster.write(1, entry(1, 1), entry(2, 3))
    cluster.write(2, *other)
    assert cluster.told == ["log matching"]


def test_a_recovered_log_that_does_not_match() -> None:
    cluster = Cluster()
    cluster.write(1, entry(1, 1))
    cluster.restart(Core(2, entry(1, 1, b"rotten")))
    assert cluster.told == ["log matching"]


def test_a_commit_index_that_falls() -> None:
    cluster = committed(upto=2)
    cluster.step(1, commit=1)
    assert cluster.told == ["commit"]


def test_a_commit_without_a_quorum_on_disk() -> None:
    cluster = Cluster()
    cluster.write(1, entry(1, 1))
    core, disk = cluster.cores[2], cluster.disks[2]
    core.log.append(entry(1, 1))
    cluster.consensus.ready("n2", disk, core, Ready(entries=[entry(1, 1)]))  # and never synced
    cluster.step(1, leads=1, commit=1)
    assert cluster.told == ["quorum"]


def test_a_truncation_of_what_is_committed() -> None:
    cluster = committed()
    cluster.write(2, entry(1, 2, b"z"))
    assert cluster.told == ["truncation"]


def test_an_uncommitted_suffix_may_go() -> None:
    cluster = committed()
    cluster.write(3, entry(1, 1), entry(2, 1))
    cluster.write(3, entry(2, 2))
    assert cluster.told == []


def test_a_leader_without_a_committed_entry() -> None:
    cluster = committed()
    cluster.step(3, leads=2)
    assert cluster.told == ["leader completeness"]


def test_a_leader_of_an_earlier_term_that_hears_of_its_votes_late() -> None:
    """It may lack what a later leader committed."""
    cluster = Cluster()
    cluster.write(1, entry(1, 5))
    cluster.write(2, entry(1, 5))
    cluster.step(1, leads=5, commit=1)
    cluster.step(3, leads=4)
    assert cluster.told == []


def test_an_index_that_is_committed_with_two_entries() -> None:
    cluster = committed()
    cluster.write(3, entry(1, 2))
    cluster.step(3, commit=1)
    assert cluster.told == ["state machine safety"]


def test_a_commit_index_that_a_restart_invents() -> None:
    cluster = committed()
    core = Core(3, entry(1, 1), entry(2, 1))
    core.commit_index = 2
    cluster.restart(core)
    assert cluster.told == ["state machine safety"]


@pytest.mark.parametrize(
    "applied",
    [entry(2, 1), entry(1, 2), entry(1, 1, b"else")],
    ids=["not committed", "of another term", "in no log"],
)
def test_an_entry_is_applied_that_should_not_be(applied: Entry) -> None:
    cluster = committed()
    cluster.apply(1, applied)
    assert cluster.told == ["state machine safety"]


def test_an_entry_is_applied_that_is_not_durable_here() -> None:
    cluster = committed()
    cluster.apply(3, entry(1, 1))
    assert cluster.told == ["state machine safety"]


def test_two_votes_in_a_term() -> None:
    cluster = Cluster()
    cluster.consensus.told("n3", [VoteResponse(GROUP, 1, 3, 2, True, False)])
    cluster.consensus.told("n3", [VoteResponse(GROUP, 2, 3, 2, True, True)])  # a pre-vote is none
    assert cluster.told == []
    cluster.consensus.told("n3", [VoteResponse(GROUP, 2, 3, 2, True, False)])
    assert cluster.told == ["durable vote"]


def test_a_candidate_that_votes_for_another() -> None:
    cluster = Cluster()
    cluster.consensus.told("n3", [VoteRequest(GROUP, 1, 3, 2, 0, 0, False)])
    cluster.consensus.told("n3", [VoteResponse(GROUP, 2, 3, 2, True, False)])
    assert cluster.told == ["durable vote"]


def test_a_vote_that_a_restart_forgets() -> None:
    cluster = Cluster()
    cluster.consensus.told("n3", [VoteResponse(GROUP, 1, 3, 2, True, False)])
    cluster.restart(Core(3, term=2))
    assert cluster.told == ["durable vote"]


def test_a_term_that_a_restart_forgets() -> None:
    cluster = Cluster()
    cluster.consensus.told("n3", [AppendResponse(GROUP, 1, 3, 4, True, 0, 0)])
    cluster.restart(Core(3, term=3))
    assert cluster.told == ["durable term"]


def test_an_entry_that_is_acknowledged_before_it_is_durable() -> None:
    cluster = Cluster()
    cluster.write(3, entry(1, 1))
    cluster.consensus.told("n3", [AppendResponse(GROUP, 1, 3, 1, True, 1, 0)])
    assert cluster.told == []
    cluster.consensus.told("n3", [AppendResponse(GROUP, 1, 3, 1, True, 2, 0)])
    assert cluster.told == ["durable log"]


@pytest.mark.parametrize(
    "answer",
    [
        AppendResponse(GROUP, 1, 3, 2, True, 0, 4),
        AppendResponse(GROUP, 1, 3, 2, False, 0, 4),
        HeartbeatResponse(GROUP, 1, 3, 2, 4, 0),
    ],
)
def test_an_answer_to_a_probe_of_another_term(answer: Message) -> None:
    cluster = Cluster()
    cluster.consensus.told("n2", [AppendRequest(GROUP, 3, 2, 1, 0, 0, [], 0, 4)])
    cluster.consensus.told("n1", [AppendRequest(GROUP, 3, 1, 2, 0, 0, [], 0, 3)])
    assert cluster.told == []
    cluster.consensus.told("n3", [answer])
    assert cluster.told == ["probe"]
    cluster.consensus.told("n1", [Heartbeat(GROUP, 3, 1, 2, 0, 4)])
    cluster.consensus.told("n3", [answer])
    assert cluster.told == ["probe"]


def test_a_lease_that_holds_while_somebody_leads_a_later_term() -> None:
    cluster = committed()
    cluster.consensus.lease_holds("n1", cluster.cores[1])
    cluster.step(2, leads=2)
    assert cluster.told == []
    cluster.consensus.lease_holds("n1", cluster.cores[1])
    assert cluster.told == ["lease"]
    cluster.consensus.lease_holds("n2", cluster.cores[2])
    assert cluster.told == ["lease"]


def test_a_read_that_is_confirmed_though_somebody_led_a_later_term_when_it_was_asked() -> None:
    cluster = committed()
    leader = cluster.cores[1]
    for context in (1, 2):
        cluster.consensus.read_asked(leader, context)
    cluster.step(2, leads=2)
    for context in (3, 4):
        cluster.consensus.read_asked(leader, context)
    ready = Ready(read_states=[ReadState(1, 1)], reads_failed=[2, 3])
    cluster.consensus.ready("n1", cluster.disks[1], leader, ready)
    assert cluster.told == []
    ready = Ready(read_states=[ReadState(4, 1)])
    cluster.consensus.ready("n1", cluster.disks[1], leader, ready)
    assert cluster.told == ["read index"]


def test_a_batch_that_the_disk_has_not_synced() -> None:
    cluster = Cluster()
    cluster.write(3, entry(1, 1), unsynced=1)
    assert cluster.told == ["durable log"]


@pytest.mark.parametrize("found", [[], [entry(1, 2)]], ids=["shorter", "another"])
def test_a_restart_that_lost_what_was_durable(found: list[Entry]) -> None:
    cluster = committed()
    cluster.step(2, commit=1)
    cluster.restart(Core(2, *found))
    assert cluster.told == ["durable log"]


def test_a_snapshot_of_what_nobody_committed() -> None:
    cluster = committed()
    core = cluster.cores[3]
    cluster.consensus.reset(cluster.disks[3], core, (5, 1))
    core.log.reset(5, 1)
    cluster.step(3, commit=2)
    assert cluster.told == ["state machine safety"]


# ---------------------------------------------------------------- what replicas hold


def row_of(number: int = 2, start: bytes = b"a", end: bytes = b"m", index: int = 3) -> RangeRow:
    return RangeRow(number, start, end, 1, 1, index, 1)


class Replicas:
    def __init__(self) -> None:
        self.told = Told()
        self.contents = Contents(self.told.report)
        self.rows: SortedDict[bytes, bytes] = SortedDict({b"Lb": b"1", b"Lz": b"a neighbour's"})
        self.state = RangeState(row_of())
        self.contents.begins("n1", self.state, self.rows)

    def apply(self, node: str, index: int, rows: dict[bytes, bytes | None]) -> None:
        self.contents.applied(node, self.state.row, index, rows, [])


def test_equal_replicas_are_silent() -> None:
    here = Replicas()
    for node in ("n1", "n2"):
        here.apply(node, 4, {b"Lb": b"2", b"Lc": b"3"})
        here.apply(node, 5, {b"Lc": None})
    here.rows[b"Lb"] = b"2"
    here.contents.begins("n3", RangeState(row_of(index=5)), here.rows)
    here.rows[b"Lc"] = b"3"
    here.contents.begins("n3", RangeState(row_of(index=4)), here.rows)
    assert here.told == []


@pytest.mark.parametrize("rows", [{b"Lb": b"3"}, {b"Lb": None}, {}, {b"Lb": b"2", b"Lc": b"2"}])
def test_i17_unequal_effects_of_one_entry(rows: dict[bytes, bytes | None]) -> None:
    here = Replicas()
    here.apply("n1", 4, {b"Lb": b"2"})
    here.apply("n2", 4, rows)
    assert here.told == ["I17"]


@pytest.mark.parametrize(("key", "data"), [(b"Lb", b"9"), (b"Lc", b"9"), (b"Hb\x00\x01", b"9")])
def test_i17_a_replica_that_begins_with_other_rows(key: bytes, data: bytes) -> None:
    here = Replicas()
    here.rows[key] = data
    here.contents.begins("n2", RangeState(row_of()), here.rows)
    assert here.told == ["I17"]


def test_i17_an_index_that_leads_its_rows() -> None:
    here = Replicas()
    here.apply("n1", 4, {b"Lb": b"2"})
    here.contents.begins("n2", RangeState(row_of(index=4)), here.rows)
    assert here.told == ["I17"]


def test_i17_memory_that_is_not_what_the_rows_say() -> None:
    here = Replicas()
    prepared = PreparedRow(b"b", 5, 1, [b"b"], [b"v"], [])
    here.rows[keycode.part_row(keycode.PREPARED, b"b", b"t" * 16)] = encode_row(prepared)
    here.state.add_part(Part(b"b", b"t" * 16, prepared))
    here.contents.compare_memory("n1", here.state, here.rows)
    assert here.told == []
    del here.state.intents[b"b"]
    here.contents.compare_memory("n1", here.state, here.rows)
    assert here.told == ["I17"]


def test_i18_a_row_of_another_range_is_written() -> None:
    here = Replicas()
    here.apply("n1", 4, {b"Lz": b"2"})
    assert here.told == ["I18"]


@pytest.mark.parametrize("key", [b"Lz", keycode.part_row(keycode.DECIDED, b"z", b"t" * 16)])
def test_i18_a_row_of_another_range_is_looked_at(key: bytes) -> None:
    here = Replicas()
    spans = here.contents.spans(here.state.row)
    own = EntryRows(Overlay(RangeRows()), spans)
    own.get(b"Lb")
    assert own.strange == []
    own.get(key)
    here.contents.applied("n1", here.state.row, 4, own.rows, own.strange)
    assert here.told == ["I18"]


class RangeRows:
    """Nothing is stored."""

    def get(self, key: bytes, /) -> bytes | None:
        return None

    def scan(self, start: bytes, end: bytes | None, *, reverse: bool = False) -> Any:
        return iter(())


def test_rows_of_an_entry_are_those_of_its_batch_and_apart_from_them() -> None:
    batch = Overlay(RangeRows())
    batch.put(b"Lb", b"before")
    own = EntryRows(batch, Contents(Told().report).spans(row_of()))
    assert own.get(b"Lb") == b"before"
    own.put(b"Lb", b"now")
    own.put(b"Lc", b"new")
    assert list(own.scan(b"La", b"Lm")) == [(b"Lb", b"now"), (b"Lc", b"new")]
    assert batch.get(b"Lb") == b"before"
    own.close()
    assert batch.rows == {b"Lb": b"now", b"Lc": b"new"}
    assert own.rows == {b"Lb": b"now", b"Lc": b"new"}
    assert batch.bytes == 8 + 10 + SCAN_BYTES


@pytest.mark.parametrize(
    "rows",
    [
        [row_of(1, b"", b"m"), row_of(2, b"n", b"")],  # a gap
        [row_of(1, b"", b"m"), row_of(2, b"k", b"")],  # an overlap
        [row_of(1, b"", b"m"), row_of(2, b"m", b"z")],  # no end
        [row_of(1, b"", b"m"), row_of(1, b"", b"k"), row_of(2, b"m", b"")],  # two spans
    ],
)
def test_i16_ranges_that_do_not_partition_the_keys(rows: list[RangeRow]) -> None:
    told = Told()
    contents = Contents(told.report)
    contents.compare_ranges([row_of(1, b"", b"m"), row_of(2, b"m", b"")])
    assert told == []
    contents.compare_ranges(rows)
    assert set(told) == {"I16"}


def test_i16_says_nothing_while_no_replica_of_some_range_runs() -> None:
    told = Told()
    contents = Contents(told.report)
    contents.compare_ranges([row_of(2, b"m", b"")], [1, 2])
    assert told == []
    contents.compare_ranges([row_of(1, b"", b"n"), row_of(2, b"m", b"")], [1, 2])
    assert set(told) == {"I16"}


def test_rc1_a_cached_row_is_not_the_stored_one() -> None:
    told = Told()
    contents = Contents(told.report)
    rows = SortedDict({b"La": b"1", b"Lb": b"2"})
    contents.compare_cache("n1", {b"La": b"1", b"Lb": UNKNOWN, b"Lc": UNKNOWN}, rows)
    assert told == []
    for cached in ({b"La": b"2"}, {b"La": b"1", b"Lc": b"3"}, {b"Lb": b"unknown"}):
        told.clear()
        contents.compare_cache("n1", cached, rows)
        assert told == ["RC1"]


# ---------------------------------------------------------------- the oracle


def oracle() -> tuple[Told, Timestamps]:
    told = Told()
    timestamps = Timestamps(told.report)
    timestamps.found(100)
    timestamps.bound_applied(200)
    timestamps.issued("n1", 110, 5)
    timestamps.handed("n1", TimestampsReply(1, 114, 110, 5), 0)
    assert told == []
    return told, timestamps


def test_i9_a_value_is_issued_twice() -> None:
    told, timestamps = oracle()
    timestamps.issued("n2", 112, 1)
    assert told == ["I9"]


def test_i9_a_value_at_the_bound_is_issued() -> None:
    told, timestamps = oracle()
    timestamps.issued("n1", 195, 5)
    assert told == []
    timestamps.issued("n1", 200, 1)
    assert told == ["I9"]


def test_i9_a_deposed_leader_issues_in_vain_and_must_not_hand_out() -> None:
    told, timestamps = oracle()
    timestamps.issued("n1", 105, 2)
    assert told == []
    timestamps.handed("n1", TimestampsReply(1, 120, 105, 2), 0)
    assert told == ["I9"]


def test_i9_a_value_is_handed_out_that_was_not_issued() -> None:
    told, timestamps = oracle()
    timestamps.handed("n1", TimestampsReply(1, 150, 150, 1), 0)
    assert told == ["I9"]


def test_i9_a_read_timestamp_of_the_past() -> None:
    told, timestamps = oracle()
    timestamps.handed("n2", TimestampsReply(1, 113, 0, 0), asked_at=114)
    assert told == ["I9"]


def test_i9_a_bound_that_falls() -> None:
    told, timestamps = oracle()
    timestamps.bound_applied(150)
    assert told == ["I9"]
