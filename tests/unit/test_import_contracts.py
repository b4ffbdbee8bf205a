"""Claims of the import contracts: what architecture allows is kept, and each contract is seen to break.

A contract that nothing can break looks exactly like one that holds. So one copy of the tree gets a bad import
planted for every contract, and lint-imports must name each of them; a small tree of allowed imports must pass.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
LINT_IMPORTS: Final = Path(sys.executable).with_name("lint-imports")
PACKAGES: Final = ("kvstore", "txn", "replication")

ALLOWED: Final[Mapping[str, str]] = {
    "replication/__init__.py": "",
    "replication/core.py": "import random\nimport msgspec\n",
    "replication/host.py": "import asyncio\nfrom replication import core\n",
    "txn/__init__.py": "",
    "txn/core.py": "from replication import core\n",
    "kvstore/__init__.py": "",
    "kvstore/adapters/__init__.py": "",
    "kvstore/adapters/rocks_engine.py": "import rocksdict\n",
    "kvstore/adapters/ws_transport.py": "import aiohttp\nfrom kvstore.adapters import other\n",
    "kvstore/adapters/other.py": "import os, socket, time, uvloop\n",
    "kvstore/api.py": "import os\n",
    "kvstore/cli/__init__.py": "",
    "kvstore/cli/server.py": "import os, time\nfrom kvstore import node\nfrom kvstore.adapters import other\n",
    "kvstore/client.py": "import asyncio, random, sys\nfrom kvstore.adapters import ws_transport\n",
    "kvstore/config.py": "from pathlib import Path\n",
    "kvstore/embedded.py": "import os, secrets\nfrom kvstore import config, loop_thread\n",
    "kvstore/loop_thread.py": "import concurrent.futures, os, threading\n",
    "kvstore/node.py": "import kvstore.adapters.rocks_engine, replication.host, txn.core\n",
    "kvstore/opening.py": "import os, threading\n",
    "kvstore/sim/__init__.py": "",
    "kvstore/sim/loop.py": "import threading\n",
    "kvstore/sim/world.py": "from kvstore.adapters import other\n",
    "kvstore/sync.py": "import os\n",
    "kvstore/testing/__init__.py": "",
    "kvstore/testing/cluster.py": "import subprocess, time\n",
    "kvstore/testing/plugin.py": "import pytest\nfrom kvstore import client\n",
}

# contract id -> planted file, bad line, and the link that the report must name
PLANTED: Final[Mapping[str, list[tuple[str, str, str]]]] = {
    "layers": [
        ("replication/planted_up.py", "import txn.types", "replication.planted_up -> txn.types"),
        ("txn/planted_up.py", "from kvstore import errors", "txn.planted_up -> kvstore.errors"),
    ],
    "sans-io": [
        ("replication/planted_io.py", "import asyncio", "replication.planted_io -> asyncio"),
        (
            "replication/planted_clock.py",
            "from time import time",
            "replication.planted_clock -> time",
        ),
        ("txn/session.py", "import asyncio", "txn.session -> asyncio"),  # txn has no shell
        ("txn/planted_io.py", "import socket", "txn.planted_io -> socket"),
        ("txn/planted_file.py", "import os.path", "txn.planted_file -> os"),
        (
            "txn/planted_thread.py",
            "def f():\n    import threading",
            "txn.planted_thread -> threading",
        ),
    ],
    "shells": [
        (
            "replication/planted_shell.py",
            "from replication import host",
            "replication.planted_shell -> replication.host",
        ),
        (
            "txn/planted_shell.py",
            "import replication.host",
            "txn.planted_shell -> replication.host",
        ),
    ],
    "adapters": [
        (
            "kvstore/planted_adapter.py",
            "from kvstore.adapters import planted_rocks",
            "kvstore.planted_adapter -> kvstore.adapters.planted_rocks",
        ),
    ],
    "world": [
        ("kvstore/planted_socket.py", "import socket", "kvstore.planted_socket -> socket"),
        (
            "kvstore/planted_clock.py",
            "from time import monotonic",
            "kvstore.planted_clock -> time",
        ),
        ("kvstore/planted_date.py", "import datetime", "kvstore.planted_date -> datetime"),
        ("kvstore/planted_file.py", "import pathlib", "kvstore.planted_file -> pathlib"),
        ("kvstore/planted_id.py", "import uuid", "kvstore.planted_id -> uuid"),
        ("kvstore/planted_web.py", "import http.client", "kvstore.planted_web -> http"),
        (
            "kvstore/sim/planted_process.py",
            "def f():\n    import subprocess",
            "kvstore.sim.planted_process -> subprocess",
        ),
    ],
    "rocksdict": [
        (
            "kvstore/adapters/planted_rocks.py",
            "import rocksdict",
            "kvstore.adapters.planted_rocks -> rocksdict",
        ),
    ],
    "aiohttp": [
        ("kvstore/planted_http.py", "from aiohttp import web", "kvstore.planted_http -> aiohttp"),
        ("kvstore/planted_loop.py", "import uvloop", "kvstore.planted_loop -> uvloop"),
    ],
    "tests": [
        ("kvstore/planted_tool.py", "import tools.tidy", "kvstore.planted_tool -> tools"),
        ("kvstore/planted_test.py", "import pytest", "kvstore.planted_test -> pytest"),
    ],
}


def lint(root: Path, contract: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run lint-imports in this tree, on one contract or all."""
    only = ["--contract", contract] if contract else []
    return subprocess.run(
        [str(LINT_IMPORTS), "--no-cache", "--no-logo", *only],
        cwd=root,
        env={"COLUMNS": "400"},
        capture_output=True,
        text=True,
        check=False,
    )


def write(root: Path, files: Mapping[str, str]) -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + "\n")


@pytest.fixture(scope="module")
def broken_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This repository's packages with every bad import planted."""
    root = tmp_path_factory.mktemp("broken")
    shutil.copy(ROOT / "pyproject.toml", root)
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, root / package, ignore=ignored)
    write(root, {path: line for plants in PLANTED.values() for path, line, _ in plants})
    return root


def test_what_the_architecture_allows_is_kept(tmp_path: Path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    write(tmp_path, ALLOWED)
    result = lint(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(PLANTED)} kept, 0 broken" in result.stdout


@pytest.mark.parametrize("contract", PLANTED)
def test_a_planted_import_breaks_its_contract_and_is_named(broken_tree, contract):
    result = lint(broken_tree, contract)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "0 kept, 1 broken" in result.stdout
    for _, _, link in PLANTED[contract]:
        assert link in result.stdout
