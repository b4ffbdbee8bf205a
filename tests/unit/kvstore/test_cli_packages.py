"""Claim: a command that would get hold of another distribution's package says so, before it does anything."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kvstore.cli.packages import check_packages

ROOT = Path(__file__).parents[3]


def test_our_packages_are_recognized():
    check_packages()


def test_our_packages_are_recognized_in_an_archive(tmp_path):
    archive = tmp_path / "all.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("kvstore", "replication", "txn"):
            for path in sorted((ROOT / name).rglob("*.py")):
                file.write(path, path.relative_to(ROOT))
    program = (
        "from kvstore.cli import packages; packages.check_packages(); print(packages.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(archive)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith(str(archive)), done.stderr


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("server start --dir data", 2),
        ("server demo --exit", 2),
        ("admin --endpoints 127.0.0.1:1 get k", 1),
    ],
)
def test_a_foreign_replication_package_is_told_in_one_line(tmp_path, command, status):
    """Whatever it does when it is imported, and none of our modules is in it."""
    foreign = tmp_path / "elsewhere" / "replication" / "__init__.py"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("import a_library_of_theirs\n")
    module, *words = command.split()
    environment = os.environ | {"PYTHONPATH": f"{foreign.parents[1]}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", f"kvstore.cli.{module}", *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(f"error: import_error: the package `replication` at {foreign} is")
    assert done.stderr.endswith("environment of its own\n")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "data").exists()
