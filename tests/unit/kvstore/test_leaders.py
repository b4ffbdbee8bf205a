"""Claims: leadership goes to the preferred node of a range only while that node answers and has nearly everything; a
process that is stopped, whose streams still look alive, is handed nothing, neither by the balance nor by a drain."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvstore.config import RaftSection
from kvstore.leadership import CAUGHT_UP_ENTRIES, DRAIN_TERMS_MAX, Leadership
from replication.errors import ProposalDropped
from replication.progress import NEVER, Progress

NOW = 100.0
RANGE, OURS, THEIRS = 7, 1, 2  # replica ids are those of their nodes


class Host:
    """Leads RANGE; the follower stands where the test says."""

    failure = None

    def __init__(self, match: int, last: int, answered_at: float) -> None:
        self.peer = Progress(last + 1)
        self.peer.match, self.peer.acked_sent_at = match, answered_at
        self.last = last
        self.term = 3
        self.transfers: list[tuple[int, int]] = []
        self.busy = False

    def raft(self, group: int) -> SimpleNamespace:
        assert group == RANGE
        return SimpleNamespace(
            term=self.term,
            status=lambda: {"last": self.last, "peers": {THEIRS: self.peer.status()}},
        )

    def transfer_leadership(self, group: int, to: int) -> None:
        if self.busy:
            raise ProposalDropped("another transfer is under way")
        self.transfers.append((group, to))


def leader(host: Host, *, up: bool = True) -> Leadership:
    """Of a node that leads RANGE, which prefers the other one."""
    replica = SimpleNamespace(
        range_id=RANGE,
        evaluator=object(),
        membership=SimpleNamespace(nodes=((OURS, OURS), (THEIRS, THEIRS))),
    )
    made = Leadership(
        cast("Any", host),
        cast("Any", SimpleNamespace(replicas={RANGE: replica})),
        cast("Any", SimpleNamespace(status=lambda: [{"node": THEIRS, "up": up}])),
        cast("Any", SimpleNamespace(monotonic=lambda: NOW)),
        RaftSection().election_timeout_s,
    )
    made.preferred = {RANGE: THEIRS}
    return made


@pytest.mark.parametrize(
    ("match", "last", "silent_s", "handed"),
    [
        (1_000, 1_000, 0.1, True),
        (1_000, 1_000 + CAUGHT_UP_ENTRIES, 0.1, True),
        (1_000, 1_001 + CAUGHT_UP_ENTRIES, 0.1, False),  # it would keep the range waiting
        (1_000, 1_000, 1.0, False),  # silent for an election timeout
        (0, 12, NOW - NEVER, False),  # never heard of by this leader, and the log is short
    ],
)
async def test_the_preferred_node_leads_if_it_answers_and_has_caught_up(
    match, last, silent_s, handed
):
    host = Host(match, last, NOW - silent_s)
    leader(host).balance()
    assert host.transfers == ([(RANGE, THEIRS)] if handed else [])


async def test_a_node_without_streams_is_handed_nothing():
    host = Host(5, 5, NOW)
    leader(host, up=False).balance()
    assert host.transfers == []


async def test_a_transfer_under_way_is_left_alone():
    host = Host(5, 5, NOW)
    host.busy = True
    leader(host).balance()
    assert host.transfers == []


@pytest.mark.parametrize(("silent_s", "handed"), [(0.1, True), (NOW - NEVER, False)])
async def test_a_draining_node_hands_over_to_who_answers(silent_s, handed):
    host = Host(5, 5, NOW - silent_s)
    draining = asyncio.ensure_future(leader(host).drain())
    await asyncio.sleep(0)
    draining.cancel()
    assert host.transfers == ([(RANGE, THEIRS)] if handed else [])


async def test_a_range_that_is_handed_back_by_another_draining_node_stays():
    """Nodes that stop together would else hand it to and fro, an election each time, until their time is up."""
    host = Host(5, 5, NOW)
    draining = asyncio.ensure_future(leader(host).drain())
    await asyncio.sleep(0)
    for _ in range(9):  # handed over, and back
        host.term += 2
        await asyncio.sleep(0.06)
    await draining
    assert len(host.transfers) == DRAIN_TERMS_MAX
