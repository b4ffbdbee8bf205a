"""Claims: leadership goes to the preferred node of a range only while that node answers and has nearly everything; a
process that is stopped, whose streams still look alive, is handed nothing, neither by the balance nor by a drain."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest

from kvstore.config import RaftSection
from kvstore.leadership import (
    CAUGHT_UP_ENTRIES,
    DRAIN_TERMS_MAX,
    LEADERLESS_ELECTIONS,
    Leadership,
)
from kvstore.sim.loop import SimLoop, run
from replication.errors import ProposalDropped
from replication.progress import NEVER, Progress
from tests.unit.replication.host_driver import Node, World

NOW = 100.0
GRACE_S = LEADERLESS_ELECTIONS * RaftSection().election_timeout_s
RANGE, OURS, THEIRS = 7, 1, 2  # replica ids are those of their nodes


class Host:
    """Leads RANGE; the follower stands where the test says."""

    failure = None
    refused: ClassVar[dict[int, str]] = {}

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
            transferring=False,
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
        cast("Any", SimpleNamespace(replicas={RANGE: replica}, leader_node=lambda _: OURS)),
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


async def test_what_is_handed_back_while_a_stop_waits_for_something_else_is_handed_over_again(
    monkeypatch,
):
    monkeypatch.setattr("kvstore.leadership.DRAIN_AGAIN_S", 0.001)
    host = Host(5, 5, NOW)
    leading = leader(host)
    (replica,) = leading._store.replicas.values()

    transfers: asyncio.Queue[int] = asyncio.Queue()

    def transfer(_group: int, to: int) -> None:
        transfers.put_nowait(to)
        replica.evaluator = None

    monkeypatch.setattr(host, "transfer_leadership", transfer)
    work = asyncio.get_running_loop().create_future()
    draining = asyncio.ensure_future(leading.drain_during(work))
    for _ in range(2 * DRAIN_TERMS_MAX):
        assert await asyncio.wait_for(transfers.get(), GRACE_S) == THEIRS
        host.term += 2
        replica.evaluator = cast("Any", object())
    await asyncio.wait_for(transfers.get(), GRACE_S)
    assert not draining.done()
    work.set_result(None)
    await draining


class Led:
    """Group 1 at a node of a `World`, as its store would have it."""

    range_id = 1

    def __init__(self, node: Node) -> None:
        self._node = node
        self.membership = node.host.raft(1).membership

    @property
    def evaluator(self) -> object | None:
        return self._node.machine.led.get(1)


def test_a_draining_node_asks_another_one_when_the_first_does_not_take_over():
    async def main(_loop: SimLoop) -> None:
        world = World(nodes=3)
        unable, other, leader = world.nodes.values()
        leader.host.campaign(1)
        world.advance(0.5)
        assert leader.machine.led
        unable.host._installer.unreadable(1)  # it follows as well as any
        leading = Leadership(
            leader.host,
            cast("Any", SimpleNamespace(replicas={1: Led(leader)})),
            cast("Any", SimpleNamespace(status=lambda: [{"node": n, "up": True} for n in (1, 2)])),
            cast("Any", world.clock),
            world.config.election_timeout_s,
        )
        draining = asyncio.ensure_future(leading.drain())
        while not draining.done():
            await asyncio.sleep(0.05)
            world.advance(0.05)
        assert other.machine.led

    run(main, seed=1, time_limit_s=100.0)


class Watched:
    """Leaders of ranges as a node sees them, in the course of time."""

    def __init__(self, *ranges: int) -> None:
        self.now = NOW
        self.leaders: dict[int, int] = {}
        self.host = SimpleNamespace(refused={})
        replicas = {number: SimpleNamespace(range_id=number, evaluator=None) for number in ranges}
        self.store = SimpleNamespace(
            replicas=replicas, leader_node=lambda each: self.leaders.get(each.range_id, 0)
        )
        self.leadership = Leadership(
            cast("Any", self.host),
            cast("Any", self.store),
            cast("Any", SimpleNamespace(status=list)),
            cast("Any", SimpleNamespace(monotonic=lambda: self.now)),
            RaftSection().election_timeout_s,
        )

    def after(self, seconds: float) -> list[int]:
        self.now += seconds
        return self.leadership.leaderless()


def test_a_range_that_never_had_a_leader_is_leaderless_at_once():
    watched = Watched(7, 8)
    assert watched.after(0.0) == [7, 8]
    watched.leaders = {7: OURS}
    assert watched.after(0.0) == [8]


def test_a_range_whose_leaders_change_is_not_leaderless_but_one_that_stays_without_is():
    watched = Watched(7)
    watched.leaders = {7: OURS}
    assert watched.after(0.0) == []
    watched.leaders = {}
    assert watched.after(GRACE_S / 2) == []
    watched.leaders = {7: THEIRS}
    assert watched.after(GRACE_S / 2) == []
    watched.leaders = {}
    assert watched.after(0.1) == []
    assert watched.after(GRACE_S) == []
    assert watched.after(0.1) == [7]


def test_a_loss_counts_from_when_it_was_seen_and_not_from_the_last_look_that_found_a_leader():
    """Else a change of leaders in the very moment of a look would be one that takes longer than the looks are apart."""
    watched = Watched(7)
    watched.leaders = {7: OURS}
    assert watched.after(0.0) == []
    watched.leaders = {}
    assert watched.after(2 * GRACE_S) == []
    watched.leaders = {7: OURS}
    assert watched.after(GRACE_S) == []


def test_the_balance_looks_too_so_that_nobody_need_ask_to_be_told_the_truth():
    watched = Watched(7)
    watched.leaders = {7: OURS}
    for _ in range(20):
        watched.now += 1.0
        watched.leadership.balance()
    watched.leaders = {}
    watched.now += 1.0
    watched.leadership.balance()
    assert watched.after(GRACE_S) == []
    assert watched.after(0.1) == [7]


def test_a_range_that_is_refused_here_is_led_by_others():
    watched = Watched(7)
    watched.host.refused[7] = "damaged"
    assert watched.after(2 * GRACE_S) == []
