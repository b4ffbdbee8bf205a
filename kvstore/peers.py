"""The streams between nodes: one for Raft's messages, a second one for snapshots, each dialled by its sender.

Every node dials every other; what arrives on an accepted stream goes to the host. Nothing here waits: what a stream's
bounded queue does not take is dropped and counted, and Raft sends it again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from kvstore.link import Hello, LinkLimits
from kvstore.ports import Clock, Network
from kvstore.streams import Backoff, PeerLink
from replication.codec import encode_messages
from replication.messages import AppendRequest, Message

RAFT_MESSAGES = b"\x01"
CLOSED_TIMESTAMPS = b"\x02"  # kvstore/closing.py
PAYLOAD_BYTES_MAX = 4 << 20
PEER_PATH = "/v1/peer"
SNAPSHOT_PATH = "/v1/snapshot"


def _ignore(_payload: bytes) -> None:
    """Nothing is said on a stream by the side that accepted it."""


class PeerSet:
    """The links of one node to the others."""

    def __init__(
        self,
        *,
        network: Network,
        hello: Callable[[str, int], Hello],
        rng: random.Random,
        clock: Clock,
        limits: LinkLimits,
        backoff: Backoff,
        dial_timeout_s: float,
    ) -> None:
        self._network, self._hello, self._rng, self._clock = network, hello, rng, clock
        self._limits, self._backoff, self._dial_timeout_s = limits, backoff, dial_timeout_s
        self._raft: dict[int, PeerLink] = {}
        self._snapshots: dict[int, PeerLink] = {}
        self.on_snapshot_link_lost: Callable[[int], None] = lambda _node: None
        self.counters = {"messages_sent": 0, "frames_sent": 0, "frames_dropped": 0}

    def add(self, node: int, address: str) -> None:
        self._raft[node] = self._link(node, address, PEER_PATH, "peer")
        self._snapshots[node] = self._link(node, address, SNAPSHOT_PATH, "snapshot")

    def _link(self, node: int, address: str, path: str, kind: str) -> PeerLink:
        link = PeerLink(
            self._network,
            address,
            path,
            lambda: self._hello(kind, node),
            rng=self._rng,
            on_message=_ignore,
            on_down=None if path == PEER_PATH else lambda _error: self.on_snapshot_link_lost(node),
            limits=self._limits,
            backoff=self._backoff,
            dial_timeout_s=self._dial_timeout_s,
            monotonic=self._clock.monotonic,
        )
        link.start()
        return link

    def send(self, node: int, messages: Sequence[Message]) -> None:
        link = self._raft.get(node)
        if link is None:
            return
        self.counters["messages_sent"] += len(messages)
        if len(messages) == 1:  # of bounded size, whatever it is
            self._send(link, messages)
            return
        size = 0
        part: list[Message] = []
        for message in messages:
            cost = 0
            if type(message) is AppendRequest:
                cost = sum(len(entry.data) for entry in message.entries)
            if part and size + cost > PAYLOAD_BYTES_MAX:  # one may be nearly a message by itself
                self._send(link, part)
                size, part = 0, []
            part.append(message)
            size += cost
        if part:
            self._send(link, part)

    def _send(self, link: PeerLink, messages: Sequence[Message]) -> None:
        self.counters["frames_sent"] += 1
        if not link.send(RAFT_MESSAGES + encode_messages(messages)):
            self.counters["frames_dropped"] += 1

    def send_closed(self, node: int, payload: bytes) -> None:
        """Closed timestamps of ranges that are led here; said again after a while if they do not arrive."""
        link = self._raft.get(node)
        if link is not None and not link.send(CLOSED_TIMESTAMPS + payload):
            self.counters["frames_dropped"] += 1

    def send_snapshot_chunk(self, node: int, payload: bytes) -> bool:
        link = self._snapshots.get(node)
        return link is not None and link.send(payload)

    def heard_from(self, node: int) -> None:
        """The node dialled us, so it is there: dial it now rather than after a pause."""
        for links in (self._raft, self._snapshots):
            link = links.get(node)
            if link is not None and not link.up:
                link.wake()

    def status(self) -> list[dict[str, object]]:
        return [
            {
                "node": node,
                "address": link.address,
                "up": link.up,
                "error": "" if link.up or link.last_error is None else str(link.last_error),
                "dials": link.dials,
                "drops": link.drops,
                "queue_bytes": link.stream.queue_bytes if link.stream is not None else 0,
            }
            for node, link in self._raft.items()
        ]

    def gauges(self) -> dict[str, int]:
        """Of all of them together; what waits to be sent, snapshots included."""
        links = [*self._raft.values(), *self._snapshots.values()]
        queued = sum(link.stream.queue_bytes for link in links if link.stream is not None)
        return {"up": sum(link.up for link in self._raft.values()), "queue_bytes": queued}

    async def close(self) -> None:
        for link in (*self._raft.values(), *self._snapshots.values()):
            await link.close(0.2)
