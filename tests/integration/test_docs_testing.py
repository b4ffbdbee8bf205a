"""The page docs/testing.md is true: its buggy shop is caught by a seed that plays again, the mended one passes, and all of its
other code runs and has types."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
BLOCK: Final = re.compile(r"^```python\n# (\S+\.py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REPLAY: Final = re.compile(r"^E +pytest (\S+) --kvorum-seed (\d+)$", re.MULTILINE)


def write(directory: Path, which: int) -> None:
    """The page's files; of one that comes several times, the first (0) or the last (-1)."""
    versions: dict[str, list[str]] = {}
    for name, text in BLOCK.findall(PAGE):
        versions.setdefault(name, []).append(text)
    assert len(versions["shop.py"]) == 2
    assert PAGE.count("```python") == sum(len(texts) for texts in versions.values())
    for name, texts in versions.items():
        (directory / name).write_text(texts[which], encoding="utf-8")


def run(directory: Path, module: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    path = os.pathsep.join((str(directory), str(ROOT)))
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=directory,
        env={**environment, "PYTHONPATH": path, "MYPYPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def play(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (directory / "pytest.ini").write_text(
        "[pytest]\nfilterwarnings = error\nasyncio_default_fixture_loop_scope = function\n"
    )
    return run(directory, "pytest", "-p", "no:cacheprovider", "-q", *words)


@pytest.mark.timeout(60)
def test_the_buggy_shop_is_caught_and_its_seed_plays_again_alone(tmp_path):
    write(tmp_path, 0)
    found = play(tmp_path, "test_shop.py")
    assert found.returncode == 1, found.stdout + found.stderr
    [(test, seed)] = REPLAY.findall(found.stdout)
    assert 1 <= int(seed) <= 100
    assert "assert sum(sold) == 5" in found.stdout
    again = play(tmp_path, test, "--kvorum-seed", seed)
    assert REPLAY.findall(again.stdout) == [(test, seed)]
    story = found.stdout[found.stdout.index("Kvorum: seed") : found.stdout.index("test_shop.py:")]
    assert story in again.stdout


@pytest.mark.slow
def test_the_mended_shop_passes_all_its_seeds_and_so_does_everything_else(tmp_path):
    write(tmp_path, -1)
    done = play(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 passed" in done.stdout


@pytest.mark.slow
def test_the_page_has_types(tmp_path):
    write(tmp_path, -1)
    names = sorted(path.name for path in tmp_path.glob("*.py"))
    done = run(tmp_path, "mypy", "--strict", "--follow-imports=silent", *names)
    assert done.returncode == 0, done.stdout + done.stderr
