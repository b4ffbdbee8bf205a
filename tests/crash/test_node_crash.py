"""Claims: a node that is killed (SIGKILL) before its engine's flush, right after it, right after the log was cut below it, or
later, has every write that it acknowledged when it opens again; and goes on from there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import kvstore
from tests.crash.node_child import POINTS, VALUE

ROOT = Path(__file__).resolve().parents[2]


def run_until_it_dies(directory: Path, point: str) -> list[int]:
    """The numbers that the child acknowledged before it killed itself."""
    child = subprocess.run(
        [sys.executable, "-m", "tests.crash.node_child", str(directory), point],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=False,
    )
    assert child.returncode == -9, child.stdout[-500:]
    return [int(line) for line in child.stdout.split() if line.isdigit()]


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("point", POINTS)
async def test_acknowledged_writes_survive_a_kill(tmp_path, point):
    for _ in range(2):  # the second time it starts from what the first crash left
        acknowledged = run_until_it_dies(tmp_path / "data", point)
        assert len(acknowledged) >= 300
        async with kvstore.open(tmp_path / "data") as db:
            rows = dict(await db.scan(prefix=b"k").to_list())
            missing = [n for n in acknowledged if rows.get(b"k%06d" % n) != b"%d " % n + VALUE]
            assert not missing
            await db.put(b"after", b"1")
