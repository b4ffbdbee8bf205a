"""Claims: short seeds with every kind of fault pass all judges, and without faults everything is done.

A seed's history changes with the code, so a seed that found a bug holds nothing afterwards: the bug has a test of its own.
"""

from __future__ import annotations

from typing import Final
from unittest.mock import patch

import pytest

from kvstore import logs
from kvstore.node import Node
from kvstore.sim.scenario import Options
from tools.simulate import judge

SHORT: Final = Options(seconds=4.0, clients=3, ops=20)


def test_without_faults_everything_is_done() -> None:
    verdict = judge(1, Options(seconds=2.0, clients=2, ops=10, faults=False))
    assert verdict.problems == []
    assert verdict.unknown == 0
    assert verdict.operations >= 15


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(101, 111))
def test_a_short_seed_passes(seed: int) -> None:
    verdict = judge(seed, SHORT)
    assert verdict.problems == []
    assert verdict.operations > 0


def test_what_nodes_log_is_heard_by_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """Their warnings stood between the lines of the progress."""
    start = Node.start

    async def loudly(self: Node) -> None:
        logs.logger("kvstore.node").warning("something is damaged")
        await start(self)

    with patch.object(Node, "start", loudly):
        assert judge(1, Options(seconds=1.0, clients=1, ops=2, faults=False)).problems == []
    assert caplog.records == []
