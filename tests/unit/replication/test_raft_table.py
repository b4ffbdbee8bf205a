"""The table (role, message) -> handler: every pair is listed, and each does what it may and nothing else.

Claims: no pair is missing; a message of a past term never changes anything; a message for another replica, or from
oneself, is passed over; what a role ignores changes nothing; two leaders of one term are an assertion.
"""

from __future__ import annotations

import typing

import pytest

from replication.errors import FrameError, LogMismatch
from replication.messages import (
    AppendRequest,
    AppendResponse,
    Heartbeat,
    HeartbeatResponse,
    InstallSnapshot,
    Message,
    SteppedDown,
    TimeoutNow,
    VoteRequest,
    VoteResponse,
)
from replication.raft import RaftConfig, RaftNode, Ready, Role
from replication.types import Entry, EntryKind, HardState, SnapshotMeta
from tests.scripts.raft_cluster import GROUP, FixedDraw, plain

TERM = 5
KINDS: tuple[type[Message], ...] = typing.get_args(Message)
PAIRS = [(role, kind) for role in Role for kind in KINDS]
SECOND_LEADERS = [(Role.LEADER, k) for k in (AppendRequest, Heartbeat, InstallSnapshot)]
PASSED_OVER = [
    (Role.FOLLOWER, VoteResponse),
    (Role.PRE_CANDIDATE, VoteResponse),  # of an election that it gave up: it counts pre-votes now
    (Role.LEADER, VoteResponse),
    (Role.LEADER, TimeoutNow),
    (Role.LEADER, SteppedDown),
    (Role.CANDIDATE, TimeoutNow),
    *[(r, k) for r in Role if r is not Role.LEADER for k in (AppendResponse, HeartbeatResponse)],
]


def drain(raft: RaftNode) -> list[Ready]:
    readies = []
    while raft.has_ready():
        ready = raft.ready()
        if ready.token is not None:
            raft.persisted(ready.token)
        readies.append(ready)
    return readies


def sent(raft: RaftNode) -> list[Message]:
    return [outgoing.message for ready in drain(raft) for outgoing in ready.outgoing]


def replica(entries: int = 2, voters: tuple[int, ...] = (1, 2, 3), **fields) -> RaftNode:
    """Replica 1 in term 5, with entries of term 1, all committed."""
    return RaftNode(
        GROUP,
        1,
        RaftConfig(),
        FixedDraw(0.5),
        hard_state=HardState(TERM, 0, entries),
        membership=plain(voters),
        log_start=(0, 0),
        entries=[Entry(index, 1, 0, b"x") for index in range(1, entries + 1)],
        applied=entries,
        **{"now": 0.0, **fields},
    )


def in_role(role: Role) -> RaftNode:
    """Replica 1 in that role, in term 5, with nothing left to do."""
    raft = replica()
    if role is not Role.FOLLOWER:
        raft.term -= role is not Role.PRE_CANDIDATE  # a candidacy raises it
        raft.campaign(0.0)
        drain(raft)
    if role in {Role.CANDIDATE, Role.LEADER}:
        raft.step(VoteResponse(GROUP, 1, 2, TERM, True, True), 0.0)
        drain(raft)
    if role is Role.LEADER:
        raft.step(VoteResponse(GROUP, 1, 2, TERM, True, False), 0.0)
        drain(raft)
    assert (raft.role, raft.term) == (role, TERM)
    return raft


def message(kind: type[Message], term: int, sender: int = 2, to: int = 1) -> Message:
    head = (GROUP, to, sender, term)
    made: dict[type[Message], Message] = {
        VoteRequest: VoteRequest(*head, 9, 4, False),
        VoteResponse: VoteResponse(*head, True, False),
        AppendRequest: AppendRequest(*head, 2, 1, [Entry(3, min(term, 4), 0, b"y")], 3, 1),
        AppendResponse: AppendResponse(*head, True, 2, 1),
        Heartbeat: Heartbeat(*head, 2, 1),
        HeartbeatResponse: HeartbeatResponse(*head, 1, 2),
        TimeoutNow: TimeoutNow(*head),
        SteppedDown: SteppedDown(*head),
        InstallSnapshot: InstallSnapshot(*head, SnapshotMeta(9, 4, plain([1, 2, 3]))),
    }
    return made[kind]


def picture(raft: RaftNode) -> tuple[object, ...]:
    return (str(raft.status()), raft.deadline(), raft.installing, raft.has_ready())


def ids(value: object) -> str:
    return value.value if isinstance(value, Role) else getattr(value, "__name__", "")


@pytest.mark.parametrize(("role", "kind"), PAIRS, ids=ids)
def test_every_pair_is_in_the_table(role, kind):
    assert callable(RaftNode.HANDLERS[role][kind])
    assert set(RaftNode.HANDLERS[role]) == set(KINDS)


@pytest.mark.parametrize(("role", "kind"), PAIRS, ids=ids)
def test_a_message_of_a_past_term_changes_nothing(role, kind):
    raft = in_role(role)
    before = picture(raft)
    raft.step(message(kind, TERM - 1), 0.0)
    answers = sent(raft)
    assert picture(raft) == before
    for answer in answers:  # whoever leads or campaigns in the past is told so
        assert answer.term == TERM
        assert not getattr(answer, "granted", False)
        assert not getattr(answer, "success", False)
    speaks_up = {VoteRequest, AppendRequest, Heartbeat, InstallSnapshot}
    assert bool(answers) == (kind in speaks_up)


@pytest.mark.parametrize(("role", "kind"), PAIRS, ids=ids)
@pytest.mark.parametrize("ends", [(2, 9), (1, 1)])
def test_a_message_for_another_or_from_oneself_is_passed_over(role, kind, ends):
    raft = in_role(role)
    before = picture(raft)
    raft.step(message(kind, TERM + 1, *ends), 0.0)
    assert picture(raft) == before


@pytest.mark.parametrize(("role", "kind"), SECOND_LEADERS, ids=ids)
def test_a_second_leader_of_the_term_is_an_assertion(role, kind):
    with pytest.raises(AssertionError, match="I1"):
        in_role(role).step(message(kind, TERM), 0.0)


@pytest.mark.parametrize(("role", "kind"), PASSED_OVER, ids=ids)
def test_what_a_role_passes_over_changes_nothing(role, kind):
    raft = in_role(role)
    before = picture(raft)
    raft.step(message(kind, TERM), 0.0)
    assert picture(raft) == before


@pytest.mark.parametrize(
    ("role", "kind"),
    [pair for pair in PAIRS if pair not in PASSED_OVER and pair not in SECOND_LEADERS],
    ids=ids,
)
def test_every_other_pair_answers_or_changes_something(role, kind):
    raft = in_role(role)
    before = picture(raft)
    raft.step(message(kind, TERM), 0.0)
    assert sent(raft) or picture(raft) != before


@pytest.mark.parametrize(("role", "kind"), PAIRS, ids=ids)
def test_a_message_of_a_later_term_makes_a_follower_unless_it_asks_for_a_vote_of_the_leader(
    role, kind
):
    raft = in_role(role)
    raft.step(message(kind, TERM + 2), 0.0)
    if role is Role.LEADER and kind is VoteRequest:
        assert raft.is_leader  # it has a lease: the candidate heard nothing, others do
    elif kind is TimeoutNow:
        assert (raft.role, raft.term) == (Role.CANDIDATE, TERM + 3)
    else:
        assert (raft.role, raft.term) == (Role.FOLLOWER, TERM + 2)


@pytest.mark.parametrize(
    "bad",
    [
        [Entry(4, 1, 0, b"")],  # a gap
        [Entry(3, TERM + 1, 0, b"")],  # from a later term than its leader's
        [Entry(3, 4, 0, b""), Entry(4, 3, 0, b"")],  # a falling term
        [Entry(3, 4, EntryKind.CONFIG, b"rubbish")],
        [Entry(3, 4, EntryKind.CONFIG, b"\x95\x90\x90\x90\x90\x90")],  # no voter
    ],
)
def test_malformed_entries_are_a_frame_error_and_change_nothing(bad):
    raft = in_role(Role.FOLLOWER)
    before = picture(raft)
    with pytest.raises(FrameError):
        raft.step(AppendRequest(GROUP, 1, 2, TERM, 2, 1, bad, 0, 1), 0.0)
    assert picture(raft) == before


@pytest.mark.parametrize(("start", "applied"), [((5, 1), 4), ((0, 0), 3)])
def test_a_state_machine_that_the_log_does_not_reach_is_refused(start, applied):
    with pytest.raises(LogMismatch):
        RaftNode(
            GROUP,
            1,
            RaftConfig(),
            FixedDraw(0.5),
            hard_state=HardState(1, 0, 0),
            membership=plain([1]),
            log_start=start,
            entries=[Entry(start[0] + n, 1, 0, b"") for n in (1, 2)],
            applied=applied,
            now=0.0,
        )
