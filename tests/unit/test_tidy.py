"""Claims of tidy: each rule sees a planted violation, tells its file and line, and leaves what is allowed alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import tidy

STORY = '"""What it is for."""\n'


def broken(path: str, body: str) -> list[tuple[int, str]]:
    """(line, rule) of what tidy finds in one file, dead-file left out; line 1 is its docstring."""
    found = tidy.check_files({path: STORY + body})
    assert all(violation.path == path for violation in found)
    return [(v.line, v.rule) for v in found if v.rule != "dead-file"]


@pytest.mark.parametrize(
    ("path", "lines", "is_broken"),
    [
        ("kvstore/node.py", 600, False),
        ("kvstore/node.py", 601, True),
        ("tests/unit/test_node.py", 601, True),
        ("replication/raft.py", 900, False),
        ("replication/raft.py", 901, True),
        ("txn/evaluate.py", 900, False),
        ("kvstore/raft.py", 601, True),
    ],
)
def test_a_file_has_at_most_600_lines_and_the_two_exceptions_900(path, lines, is_broken):
    assert broken(path, "x = 1\n" * (lines - 1)) == ([(lines, "file-length")] if is_broken else [])


@pytest.mark.parametrize("keyword", ["def", "async def"])
def test_a_function_has_at_most_70_lines(keyword):
    head = f"{keyword} f():\n"
    assert broken("txn/a.py", head + "    x = 1\n" * 69) == []
    assert broken("txn/a.py", head + "    x = 1\n" * 70) == [(2, "function-length")]


def test_a_method_is_a_function_too():
    assert broken("txn/a.py", "class A:\n    def f(self):\n" + "        x = 1\n" * 70) == [
        (3, "function-length")
    ]


@pytest.mark.parametrize(
    "body",
    [
        "import time\nx = time.time()\n",
        "import time as t\nx = t.time()\n",
        "from time import time\nx = time()\n",
        "import time\nclock = time.time\n",
        "import time\nx = time.time_ns()\n",
        "import datetime\nx = datetime.datetime.now()\n",
        "from datetime import datetime\nx = datetime.now(None)\n",
        "from datetime import datetime\nx = datetime.utcnow()\n",
        "import random\nx = random.random()\n",
        "import random\nx = random.Random()\n",
        "import random\nx = random.SystemRandom()\n",
        "from random import randint\nx = randint(1, 2)\n",
        "import random as r\nr.shuffle([])\n",
        "import asyncio\nasyncio.wait([])\n",
        "from asyncio import TaskGroup\nTaskGroup()\n",
        "import asyncio\nasyncio.all_tasks()\n",
        "import asyncio\nasyncio.as_completed([])\n",
    ],
)
@pytest.mark.parametrize(
    "path", ["replication/a.py", "txn/a.py", "kvstore/a.py", "kvstore/sim/a.py"]
)
def test_the_product_neither_reads_the_wall_clock_nor_draws_unseeded_nor_awaits_sets(path, body):
    assert broken(path, body) == [(3, "banned-call")]


@pytest.mark.parametrize(
    "path", ["kvstore/adapters/system.py", "kvstore/cli/server.py", "tools/bench.py"]
)
def test_adapters_command_lines_and_tools_may_read_clocks_and_draw(path):
    body = "import random, time, asyncio\nx = time.time(), random.random()\nasyncio.all_tasks()\n"
    assert broken(path, body) == []


@pytest.mark.parametrize(
    "body",
    [
        "import io\nopen('a')\n",
        "import builtins\nbuiltins.open('a')\n",
        "import builtins\nreader = open\n",
        "import asyncio\nasyncio.open_connection('a', 1)\n",
        "from asyncio import start_server\nstart_server(print)\n",
        "import asyncio\nasyncio.create_subprocess_exec('a')\n",
        "import asyncio\nasyncio.to_thread(print)\n",
    ],
)
def test_only_adapters_command_lines_and_testing_open_files_sockets_processes_and_threads(body):
    for path in ("replication/a.py", "txn/a.py", "kvstore/a.py", "kvstore/sim/a.py"):
        assert broken(path, body) == [(3, "banned-call")]
    for path in ("kvstore/adapters/a.py", "kvstore/cli/a.py", "kvstore/testing/a.py"):
        assert broken(path, body) == []
    assert broken("tools/a.py", body) == []
    assert broken("tests/unit/test_a.py", body) == []


def test_what_only_looks_alike_is_allowed():
    body = """
import asyncio
import random
import time


def f(rng: random.Random, now: float) -> None:
    rng.random()
    random.Random(7).shuffle([])
    time.monotonic()
    asyncio.wait_for(None, 1)
    tx.time.time()
    tx.open(b"a")


def open(path: str) -> None: ...
"""
    assert broken("kvstore/a.py", body) == []


@pytest.mark.parametrize(
    "body",
    [
        "import time\ntime.sleep(1)\n",
        "import random\nrandom.random()\n",
        "import random\nrandom.Random()\n",
    ],
)
def test_tests_neither_sleep_nor_draw_unseeded_unless_they_run_the_real_thing(body):
    assert broken("tests/unit/test_a.py", body) == [(3, "banned-call")]
    assert broken("tests/sim/test_a.py", body) == [(3, "banned-call")]
    assert broken("tests/crash/test_a.py", body) == []
    assert broken("tests/integration/test_a.py", body) == []


@pytest.mark.parametrize("word", ["TO" + "DO", "FIX" + "ME", "X" * 3])
def test_notes_to_ourselves_are_not_left_in_any_text(word):
    assert broken("txn/a.py", f"x = 1  # {word}: later\n") == [(2, "todo")]
    assert [v.rule for v in tidy.check_files({"README.md": f"# A\n\n{word}\n"})] == ["todo"]
    assert broken("txn/a.py", f"x = 1  # {word.lower()}s, and {word}_LIST\n") == []


@pytest.mark.parametrize(
    ("mark", "is_broken"),
    [
        ("@pytest.mark.skip\n", True),
        ("@pytest.mark.skip()\n", True),
        ("@pytest.mark.skip(reason='')\n", True),
        ("@pytest.mark.skip('needs a disk')\n", False),
        ("@pytest.mark.skip(reason='needs a disk')\n", False),
        ("@pytest.mark.skipif(True)\n", True),
        ("@pytest.mark.skipif(True, reason='Linux only')\n", False),
        ("@pytest.mark.xfail\n", True),
        ("@pytest.mark.xfail(reason='issue 7')\n", False),
    ],
)
def test_a_skip_mark_has_a_reason(mark, is_broken):
    body = f"import pytest\n{mark}def test_a():\n    pass\n"
    assert broken("tests/unit/test_a.py", body) == ([(3, "skip-reason")] if is_broken else [])


def test_a_skip_call_has_a_reason():
    head = "import pytest\n"
    assert broken("tests/unit/test_a.py", head + "pytest.skip()\n") == [(3, "skip-reason")]
    assert broken("tests/unit/test_a.py", head + "pytest.skip('  ')\n") == [(3, "skip-reason")]
    assert broken("tests/unit/test_a.py", head + "pytest.skip(why())\n") == []
    assert broken("tests/unit/test_a.py", head + "pytest.importorskip('x')\n") == [
        (3, "skip-reason")
    ]


@pytest.mark.parametrize(
    "path", ["kvstore/__init__.py", "kvstore/a.py", "tools/a.py", "tests/unit/test_a.py"]
)
@pytest.mark.parametrize("text", ["", "x = 1\n", '"""  """\n', "# a comment is no story\n"])
def test_every_module_begins_with_its_story(path, text):
    found = tidy.check_files({path: text})
    assert (path, 1, "docstring") in [(v.path, v.line, v.rule) for v in found]


def test_no_file_names_a_home_directory():
    for home in ("/ho" + "me/ann/x", "/Us" + "ers/ann", "/ro" + "ot/.cache"):
        assert broken("txn/a.py", f"x = {home!r}\n") == [(2, "home-path")]
        assert [v.rule for v in tidy.check_files({"Makefile": f"cd {home}\n"})] == ["home-path"]
    for other in ("~/x", "/v1/ro" + "ot/", "./ho" + "me/x", "/ho" + "me", "/var/lib/kvorum"):
        assert broken("txn/a.py", f"x = {other!r}\n") == []


def test_a_module_that_nothing_imports_starts_or_names_is_dead():
    files = {
        "kvstore/used.py": STORY,
        "kvstore/user.py": STORY + "from kvstore import used\n",
        "kvstore/started.py": STORY + 'if __name__ == "__main__":\n    pass\n',
        "kvstore/named.py": STORY,
        "tests/unit/test_user.py": STORY + "import kvstore.user\nrun('-m', 'tools.asked')\n",
        "tools/asked.py": STORY,
        "pyproject.toml": 'kvstore = "kvstore.named:main"\n',
        "txn/dead.py": STORY,
    }
    assert [(v.path, v.rule) for v in tidy.check_files(files)] == [("txn/dead.py", "dead-file")]


def test_a_file_that_does_not_parse_is_told_with_its_line():
    assert broken("txn/a.py", "x = 1\ndef f(:\n") == [(3, "syntax")]


def test_hidden_and_generated_directories_are_not_looked_at(tmp_path: Path):
    for directory in (".venv/lib", "build", "kvstore/__pycache__", "kvorum.egg-info"):
        (tmp_path / directory).mkdir(parents=True)
        (tmp_path / directory / "a.py").write_text("x = 1\n")
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_text("exit\n")
    (tmp_path / "kvstore" / "data.bin").write_bytes(b"\xff")
    assert list(tidy.read_tree(tmp_path)) == [".ci/run"]


def run_tidy(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.tidy", str(root)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(tidy.__file__).parent.parent,
    )


def test_the_program_prints_file_line_rule_and_fails(tmp_path: Path):
    (tmp_path / "txn").mkdir()
    (tmp_path / "txn" / "__init__.py").write_text(STORY)
    assert run_tidy(tmp_path).returncode == 0
    (tmp_path / "txn" / "__init__.py").write_text(STORY + "import time\nx = time.time()\n")
    result = run_tidy(tmp_path)
    assert result.returncode == 1
    assert result.stdout == "txn/__init__.py:3 banned-call: time.time: the time is passed in\n"
