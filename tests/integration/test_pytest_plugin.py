"""The pytest plugin in runs of its own: it loads by itself and alone, its options choose the seeds, a failure reads well, plain
runs and pytest-asyncio in any mode play simulated tests alike, and the fixtures give what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
INI: Final = "[pytest]\nfilterwarnings = error\naddopts = --strict-markers --strict-config\n"

SIMULATED: Final = """
import asyncio, pytest
from kvstore.testing import simulate

@pytest.fixture
def number():
    return 5

class TestIt:
    @pytest.mark.parametrize("letter", ["a", "b"])
    @simulate(seeds=6, faults=False)
    async def test_all(self, letter, db, number, cluster):
        assert number == 5
        with open(f"seeds_{letter}", "a") as played:
            played.write(f"{cluster.seed} ")

@simulate(seeds=6, faults=False)
async def test_fails(cluster):
    value = cluster.seed
    await asyncio.sleep(60)
    assert value < 3

async def test_of_pytest_asyncio():
    await asyncio.sleep(0)
"""

REAL: Final = """
import asyncio, pytest, kvstore

pytestmark = pytest.mark.kvorum(nodes=1, splits=[b"m"])

def test_embedded(kvorum_embedded, tmp_path):
    kvorum_embedded.put(b"k", b"v")
    assert kvorum_embedded.get(b"k") == b"v"
    assert (tmp_path / "kvorum").is_dir()

def test_first(kvorum_db, kvorum_cluster):
    assert len(kvorum_cluster.nodes) == 1
    kvorum_db.put(b"a", b"1")
    kvorum_cluster.kill(0)

def test_second(kvorum_db, kvorum_cluster):
    assert kvorum_db.scan().to_list() == []
    kvorum_db.put(b"a", b"1")
    kvorum_cluster.stop()

def test_after_a_stop(kvorum_db):
    assert kvorum_db.scan().to_list() == []

async def test_third(kvorum_cluster):
    async with kvstore.connect(kvorum_cluster.endpoints) as db:
        await db.put(b"a", b"1")
"""


def play(directory: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    hidden = ("PYTEST", "KVORUM", "COV_")
    environment = {name: text for name, text in os.environ.items() if not name.startswith(hidden)}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *words],
        cwd=directory,
        env={**environment, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **variables},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def played(directory: Path, letter: str = "a") -> list[int]:
    path = directory / f"seeds_{letter}"
    found = [int(word) for word in path.read_text().split()]
    path.unlink()
    return found


@pytest.fixture
def project(tmp_path: Path) -> Path:
    ini = INI + "asyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"
    (tmp_path / "pytest.ini").write_text(ini)
    (tmp_path / "test_it.py").write_text(SIMULATED)
    return tmp_path


@pytest.mark.timeout(60)
def test_a_failing_seed_reads_well_beside_pytest_asyncio(project):
    done = play(project)
    assert "1 failed, 3 passed" in done.stdout, done.stdout + done.stderr
    assert played(project, "a") == played(project, "b") == [1, 2, 3, 4, 5, 6]
    failure = done.stdout[done.stdout.index("= FAILURES =") :]
    shown = [
        failure.index("assert value < 3"),
        failure.index("E       assert 3 < 3"),
        failure.index("seed 3 fails"),
        failure.index("pytest test_it.py::test_fails --kvorum-seed 3"),
        failure.index(": AssertionError"),
    ]
    assert shown == sorted(shown)
    assert "kvstore/" not in failure  # none of our frames


@pytest.mark.slow
def test_options_and_environment_choose_the_seeds(project):
    assert play(project, "test_it.py::TestIt", "--kvorum-seeds", "2").returncode == 0
    assert played(project) == [1, 2]
    assert play(project, "test_it.py::TestIt", "--kvorum-seed", "17").returncode == 0
    assert played(project) == [17]
    variables = {"KVORUM_SEED": "18"}
    assert play(project, "test_it.py::TestIt", "--kvorum-seeds", "2", **variables).returncode == 0
    assert played(project) == [18]
    done = play(project, "-n", "2", "--kvorum-seed", "17")
    assert "pytest test_it.py::test_fails --kvorum-seed 17" in done.stdout
    assert played(project) == [17]
    assert play(project, "--kvorum-seeds", "0").returncode == 4


@pytest.mark.slow
@pytest.mark.parametrize("other", ["no:asyncio", "no:xdist"])
def test_no_other_plugin_is_needed(project, other):
    (project / "pytest.ini").write_text(INI)
    if other == "no:xdist":
        with (project / "pytest.ini").open("a") as ini:
            ini.write("asyncio_default_fixture_loop_scope = function\n")  # strict mode
    done = play(project, "-p", other, "--deselect", "test_it.py::test_of_pytest_asyncio")
    assert "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr


def test_loading_it_imports_nothing_of_the_product():
    code = "import sys, kvstore.testing.plugin as p; print(sorted(m for m in sys.modules if 'kvstore' in m))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = ["kvstore", "kvstore.testing", "kvstore.testing.plugin", "kvstore.testing.seeds"]
    assert done.stdout.strip() == str(names)


@pytest.mark.slow
def test_the_fixtures_give_whole_and_empty_clusters(project):
    (project / "test_it.py").write_text(REAL)
    done = play(project)
    assert "5 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_a_mark_where_it_would_be_ignored_is_refused(project):
    text = "import pytest\n@pytest.mark.kvorum(nodes=1)\ndef test_x(kvorum_db): ...\n"
    (project / "test_it.py").write_text(text)
    done = play(project)
    assert re.search("kvorum is for a module .*, not for test_x", done.stdout), done.stdout
