"""Nodes that several files begin with."""

from __future__ import annotations

import pytest

from kvstore.config import NodeConfig, RaftSection
from kvstore.embedded import ADDRESS, EmbeddedAdapters
from kvstore.node import Node


@pytest.fixture
async def waiting(tmp_path):
    """A node over an empty directory."""
    config = NodeConfig(raft=RaftSection(election_timeout_s=0.2, heartbeat_s=0.05))
    node = Node(str(tmp_path), ADDRESS, "", config, EmbeddedAdapters(config))
    await node.start()
    yield node
    await node.stop(drain=False)
