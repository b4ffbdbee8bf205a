"""Where leadership goes: to the node that the plan prefers for a range, and away from a node that stops; and where it lacks.

It is handed only to one that would take over at once: another hand-over stops the range's writes in vain.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Container
from typing import Final

from kvstore.peers import PeerSet
from kvstore.ports import Clock
from kvstore.replica import Replica
from kvstore.store import Store
from replication.errors import NotLeader, ProposalDropped
from replication.host import Host
from replication.probes import chance, reached

BALANCE_S: Final = 1.0
DRAIN_S: Final = 2.0
DRAIN_AGAIN_S: Final = 0.25
DRAIN_TERMS_MAX: Final = 3
HANDOVER_DOUBLINGS: Final = 6  # of the pause between two hand-overs in vain
CAUGHT_UP_ENTRIES: Final = 64
LEADERLESS_ELECTIONS: Final = (
    5  # election timeouts: a leader that died is replaced within two or three
)


class Leadership:
    """Of the ranges of one node. `preferred`: the node that the plan prefers, by range."""

    def __init__(
        self, host: Host, store: Store, peers: PeerSet, clock: Clock, election_timeout_s: float
    ) -> None:
        self.preferred: dict[int, int] = {}
        self._host = host
        self._store = store
        self._peers = peers
        self._clock = clock
        self._election_timeout_s = election_timeout_s
        # range -> (in vain so far, not again before)
        self._handovers: dict[int, tuple[int, float]] = {}
        # range -> the first look without a leader since it had one; infinity: it has one
        self._lost_at: dict[int, float] = {}

    async def balance_forever(self) -> None:
        """Lead where the plan prefers it: hand a range to its preferred node when that is up and has caught up.

        A replica that follows well may still be unable to lead (its state is lost or damaged, its disk stuck). Each
        hand-over to it in vain stops the range for an election timeout, so the next one waits twice as long.
        """
        while True:
            await asyncio.sleep(BALANCE_S)
            self.balance()

    def balance(self) -> None:
        """One round of it."""
        self.leaderless()
        up = {each["node"] for each in self._peers.status() if each["up"]}
        now = self._clock.monotonic()
        for number, preferred in self.preferred.items():
            replica = self._store.replicas.get(number)
            if replica is None or replica.evaluator is None:
                self._handovers.pop(number, None)
                continue
            in_vain, not_before = self._handovers.get(number, (0, 0.0))
            if now < not_before:
                continue
            if chance("leadership_handed_on"):
                preferred = next((n for _, n in replica.membership.nodes if n in up), preferred)
            if preferred not in up:
                continue
            for replica_id, node in replica.membership.nodes:
                if node == preferred and self._may_lead(number, replica_id):
                    reached("leadership_balanced")
                    pause_s = BALANCE_S * (1 << min(in_vain, HANDOVER_DOUBLINGS))
                    self._handovers[number] = in_vain + 1, now + pause_s
                    self._transfer(number, replica_id)

    def leaderless(self) -> list[int]:
        """Ranges here of which no leader was known for longer than a change of leaders takes, or none ever.

        A range that is refused here is left out: the others lead it, and tell us nothing.
        """
        now, lost_at = self._clock.monotonic(), {}
        for number, replica in self._store.replicas.items():
            led = number in self._host.refused or self._store.leader_node(replica)
            lost_at[number] = math.inf if led else min(now, self._lost_at.get(number, -math.inf))
        self._lost_at = lost_at
        oldest = now - LEADERLESS_ELECTIONS * self._election_timeout_s
        return [number for number, at in lost_at.items() if at < oldest]

    async def drain_during(self, work: asyncio.Future[None]) -> None:
        """`drain`, and again until `work` is done: nodes that prefer this one hand ranges back as long as it answers."""
        while True:
            await self.drain()
            if work.done():
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_AGAIN_S):
                    await asyncio.shield(work)

    async def drain(self) -> None:
        """Leadership goes to others while we are still here to help them.

        A range that keeps coming back is kept: the others are stopping too, and it would go to and fro until time is up.
        Who was asked and did not take over is asked again only after the others.
        """
        up = {each["node"] for each in self._peers.status() if each["up"]}
        until = self._clock.monotonic() + DRAIN_S
        # range -> terms in which it is handed over -> replica -> how often it was asked
        asked: dict[int, dict[int, dict[int, int]]] = {}
        while self._clock.monotonic() < until:
            led = [each for each in self._store.replicas.values() if each.evaluator is not None]
            led = [each for each in led if any(n in up for _, n in each.membership.nodes)]
            for each in led:
                terms = asked.setdefault(each.range_id, {})
                terms.setdefault(self._host.raft(each.range_id).term, {})
            led = [each for each in led if len(asked[each.range_id]) <= DRAIN_TERMS_MAX]
            if not led:
                return
            for replica in led:
                raft = self._host.raft(replica.range_id)
                if not raft.transferring:
                    self._hand_on(replica, up, asked[replica.range_id][raft.term])
            await asyncio.sleep(0.05)

    def _hand_on(self, replica: Replica, up: Container[object], asked: dict[int, int]) -> None:
        """Hand a range to one that may lead, on a node that is up: to who was asked the least often so far."""
        able = [
            replica_id
            for replica_id, node in replica.membership.nodes
            if node in up and self._may_lead(replica.range_id, replica_id)
        ]
        if able:
            to = min(able, key=lambda each: asked.get(each, 0))
            asked[to] = asked.get(to, 0) + 1
            self._transfer(replica.range_id, to)

    def _may_lead(self, number: int, replica_id: int) -> bool:
        """Whether a follower would take over at once: it answered lately, and has all but the newest entries.

        A stopped process keeps its streams up for a stall timeout; a transfer to it stops the range's writes in vain.
        """
        status = self._host.raft(number).status()
        peer = status["peers"].get(replica_id)
        if peer is None:
            return False
        silent_s = self._clock.monotonic() - float(peer["acked_sent_at"])
        lags = int(status["last"]) - int(peer["match"])
        return silent_s < self._election_timeout_s and lags <= CAUGHT_UP_ENTRIES

    def _transfer(self, number: int, replica_id: int) -> None:
        try:
            self._host.transfer_leadership(number, replica_id)
        except (NotLeader, ProposalDropped):
            pass  # the next round looks again
