"""Claims of the picture that a node gives of itself: the fake node of the unit tests tells nothing that a real one does not,
and metrics look for nothing that is not there."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvstore import metrics
from kvstore.bootstrap import mint_cluster_id, plan
from kvstore.embedded import ADDRESS
from tests.unit.kvstore.fake_node import FakeDatabase, FakeNode

REQUEST = plan(mint_cluster_id(1_700_000_000_000, 1, [ADDRESS], []), [ADDRESS])[0]


@pytest.fixture
async def member(waiting):
    """The same, as a cluster of one; it has its own client by then."""
    await waiting.initialize(REQUEST)
    async with asyncio.timeout(20):
        while waiting.database is None:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
    return waiting


def strangers(fake: Any, real: Any, where: str = "status") -> list[str]:
    """What the fake one has and the real one has not, or has as another kind of value."""
    if isinstance(fake, dict) and isinstance(real, dict):
        unknown = [f"{where}.{name}" for name in fake if name not in real]
        both = [name for name in fake if name in real]
        return unknown + [
            each for name in both for each in strangers(fake[name], real[name], f"{where}.{name}")
        ]
    if isinstance(fake, list) and isinstance(real, list):
        return [each for item in fake for each in strangers(item, real[0], f"{where}[]")]
    numbers = isinstance(fake, int | float) and isinstance(real, int | float)
    return [] if numbers or type(fake) is type(real) else [where]


def test_a_stranger_is_noticed():
    assert strangers({"a": 1, "b": [{"c": ""}]}, {"a": 2.5, "b": [{"c": "x"}], "d": 1}) == []
    assert strangers({"a": {"b": 1}}, {"a": {}}) == ["status.a.b"]
    assert strangers({"a": [[1]]}, {"a": [{"b": 1}]}) == ["status.a[]"]


async def test_the_fake_node_tells_what_a_member_tells(member):
    assert strangers(FakeNode(FakeDatabase()).status(), member.status()) == []


async def test_the_fake_node_tells_what_a_node_tells_that_waits(waiting):
    assert strangers(FakeNode().status(), waiting.status()) == []


async def test_metrics_look_for_nothing_that_a_node_does_not_tell(member):
    status = member.status()
    assert [group for group in metrics._GROUPS if group not in status] == []
    for group, names in metrics._COUNTERS.items():
        assert names - status[group].keys() == set()
    assert any(name.startswith(metrics._FENCES) for name in status["outcomes"])
