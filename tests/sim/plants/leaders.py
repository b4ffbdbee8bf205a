"""Bugs of Raft: who leads, what a leader may say, and which entries count."""

from __future__ import annotations

from typing import Any, Final

from kvstore.closing import Closer
from kvstore.store import Store
from replication.codec import decode_membership
from replication.errors import NotLeader, ProposalDropped
from replication.leading import Leader
from replication.quorum import agreed_value
from replication.raft import NOTHING_TO_ACKNOWLEDGE, RaftNode
from replication.ready import RaftConfig
from replication.types import Entry, EntryKind
from tests.sim import directed_leaders
from tests.sim.plants.base import PARTITIONS, Directed, Patches, Plant, Seeds
from txn.commands import encode_batch


def _reads_not_confirmed() -> Patches:
    def confirm(self: Store, replica: Any) -> None:
        answers, replica.output.confirm = replica.output.confirm, []
        for origin, reply in answers:
            self.answer(origin, reply)

    return [(Store, "_confirm", confirm)]


def _oracle_not_confirmed() -> Patches:
    return [(Store, "lease_valid", lambda _self, _group: True), *_reads_not_confirmed()]


def _lease_too_long() -> Patches:
    valid = Leader.lease_valid
    return [(Leader, "lease_valid", lambda self, now: valid(self, now - 3.0))]


def _lease_without_drift() -> Patches:
    return [(RaftConfig, "lease_s", property(lambda self: self.election_timeout_s))]


def _late_append_truncates() -> Patches:
    def append(self: RaftNode, entries: list[Entry]) -> None:
        log = self.log
        first, changed = entries[0].index, False
        if first <= log.last_index:
            assert first > self.commit_index, f"I3: {first} would replace what is committed"
            log.truncate_after(first - 1)
            changed = self.history.truncate_after(first - 1)
        for entry in entries:
            log.append(entry)
            if entry.kind == EntryKind.CONFIG:
                self.history.append(entry.index, decode_membership(entry.data))
                changed = True
        if changed:
            self._membership_changed()

    return [(RaftNode, "_append_theirs", append)]


def _old_terms_are_counted() -> Patches:
    def commit(self: Leader) -> None:
        state = self._state
        index = agreed_value(
            [voter.match for voter in self._incoming], [voter.match for voter in self._outgoing]
        )
        if index <= state.commit_index:
            return
        for entry in state.log.slice(state.commit_index + 1, index):
            self.uncommitted_bytes -= len(entry.data)
        state.commit_index = index

    return [(Leader, "_try_commit", commit)]


def _probe_outlives_its_term() -> Patches:
    def forget(self: RaftNode) -> None:
        self._ack_index = NOTHING_TO_ACKNOWLEDGE

    return [(RaftNode, "_forget_acknowledgement", forget)]


def _replaced_leader_closes() -> Patches:
    return [(Closer, "_confirmed", lambda _self, _range_id: True)]


def _proposed_again() -> Patches:
    """What a term lost is proposed as it is, when this node leads again."""
    leadership, propose = Store.leadership, Store._propose

    def change(self: Store, group: int, term: int, is_leader: bool) -> None:
        replica: Any = self.replicas[group]
        lost = vars(replica).setdefault("lost", [])
        lost += [batch for batch, _ in replica.inflight.values()]
        leadership(self, group, term, is_leader)

    def again(self: Store, replica: Any, evaluator: Any) -> None:
        lost, replica.lost = vars(replica).get("lost", []), []
        for batch in lost:
            try:
                self._host.propose(replica.range_id, evaluator.term, encode_batch(batch))
            except (NotLeader, ProposalDropped):
                break
        propose(self, replica, evaluator)

    return [(Store, "leadership", change), (Store, "_propose", again)]


LEADERS: Final[dict[str, Plant]] = {
    "reads not confirmed": Plant(
        "whoever thinks that it leads answers reads, without lease and without read index",
        _reads_not_confirmed,
        ("I11",),
        directed=Directed(directed_leaders.a_slow_clock_keeps_no_lease),
    ),
    "oracle not confirmed": Plant(
        "timestamps are handed out by whoever thinks that it leads the meta range",
        _oracle_not_confirmed,
        ("I9",),
        directed=Directed(directed_leaders.a_stopped_leader_reads_nothing_old),
        model=("stale_tso",),
    ),
    "lease too long": Plant(
        "the lease outlives the election timeout",
        _lease_too_long,
        ("lease",),
        directed=Directed(directed_leaders.a_stopped_leader_reads_nothing_old),
    ),
    "lease without drift": Plant(
        "the lease is as long as the election timeout, as if all clocks went alike",
        _lease_without_drift,
        ("lease",),
        directed=Directed(directed_leaders.a_slow_clock_keeps_no_lease),
    ),
    "replaced leader closes": Plant(
        "a leader tells what it closed without a lease",
        _replaced_leader_closes,
        ("I11",),
        directed=Directed(directed_leaders.a_replaced_leader_closes_nothing),
        model=("deposed_leader_closes",),
    ),
    "late append truncates": Plant(
        "an append replaces what follows it, though it is held already",
        _late_append_truncates,
        ("quorum",),
        directed=Directed(directed_leaders.a_late_append_changes_nothing),
    ),
    "old terms are counted": Plant(
        "a leader commits entries of earlier terms by counting",
        _old_terms_are_counted,
        ("leader completeness",),
        directed=Directed(directed_leaders.an_old_entry_is_not_committed_by_counting),
    ),
    "probe outlives its term": Plant(
        "the probe of a former leader is answered to the next one, which takes it for its own",
        _probe_outlives_its_term,
        ("probe",),
        Seeds(PARTITIONS, 20),
    ),
    "proposed again": Plant(
        "what a term lost is proposed in the next one as it was",
        _proposed_again,
        ("M1",),
        directed=Directed(directed_leaders.what_a_term_lost_is_lost),
        model=("propose_again_in_later_term",),
    ),
}
