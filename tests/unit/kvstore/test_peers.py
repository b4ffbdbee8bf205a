"""Claims of the streams between nodes: whatever Raft hands over fits into messages that a stream takes."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

from kvstore import limits
from kvstore.link import LinkLimits
from kvstore.peers import PAYLOAD_BYTES_MAX, PeerSet
from kvstore.streams import Backoff
from replication.codec import decode_messages
from replication.messages import AppendRequest
from replication.types import Entry, EntryKind


class KeptLink:
    """A link that takes everything, and refuses what a stream would."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []

    def send(self, payload: bytes) -> bool:
        assert len(payload) <= limits.MESSAGE_BYTES_MAX
        self.payloads.append(payload)
        return True


def peer_set(link: Any) -> PeerSet:
    nobody: Any = None
    peers = PeerSet(
        network=SimpleNamespace(),
        hello=nobody,
        rng=random.Random(1),
        clock=SimpleNamespace(monotonic=lambda: 0.0),
        limits=LinkLimits(),
        backoff=Backoff(),
        dial_timeout_s=1.0,
    )
    peers._raft[2] = link
    return peers


def append(group: int, size_bytes: int) -> AppendRequest:
    entry = Entry(1, 1, EntryKind.COMMAND, bytes(size_bytes))
    return AppendRequest(group, 2, 1, 1, 0, 0, [entry], 0, 0)


def test_the_largest_entry_behind_those_of_other_ranges_still_fits_into_a_message():
    link = KeptLink()
    largest = limits.ENTRY_BYTES_MAX  # that Raft takes
    messages = [append(1, PAYLOAD_BYTES_MAX - 1), append(2, largest), append(3, 10), append(4, 10)]
    peer_set(link).send(2, messages)
    assert [each for payload in link.payloads for each in decode_messages(payload[1:])] == messages
    assert len(link.payloads) == 3


def test_what_waits_for_all_nodes_is_told_in_one_number_snapshots_included():
    def link(queue_bytes: int | None, *, up: bool) -> Any:
        stream = None if queue_bytes is None else SimpleNamespace(queue_bytes=queue_bytes)
        return SimpleNamespace(stream=stream, up=up)

    peers = peer_set(link(100, up=True))
    peers._raft[3] = link(None, up=False)
    peers._snapshots[2] = link(7, up=True)
    assert peers.gauges() == {"up": 1, "queue_bytes": 107}
