"""Claims: a node whose log cannot be synced, or written, ends at once with status 1 and one line that says what to do; what was
acknowledged before is there when it starts again, and nothing was acknowledged after."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import pytest

import kvstore
from kvstore.errors import KVError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import errno, os, pathlib, sys
trigger, name = pathlib.Path(sys.argv.pop(1)), sys.argv.pop(1)
real = getattr(os, name)
def failing(*arguments):
    if trigger.exists():
        raise OSError(errno.EIO, "Input/output error")
    return real(*arguments)
setattr(os, name, failing)
from kvstore.cli.server import main
main()
"""


class LoneNode:
    """One `kvstore start` in which a call of the operating system fails once `trigger` exists."""

    def __init__(self, tmp_path: Path, call: str) -> None:
        self.trigger = tmp_path / "trigger"
        self.errors = tmp_path / "stderr"
        self._address_file = tmp_path / "address"
        self._address_file.unlink(missing_ok=True)
        listen = "127.0.0.1:0"
        self._known = tmp_path / "known"
        if self._known.exists():
            listen = self._known.read_text()
        words = ["start", "--dir", str(tmp_path / "data"), "--listen", listen]
        words += ["--address-file", str(self._address_file)]
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(self.trigger), call, *words],
                cwd=ROOT,
                stderr=errors,
            )
        self.address = self._wait_address()
        self._known.write_text(self.address)

    def _wait_address(self) -> str:
        deadline = time.monotonic() + 30
        while not self._address_file.exists():
            assert time.monotonic() < deadline, self.errors.read_text()
            assert self.process.poll() is None, self.errors.read_text()
            time.sleep(0.02)
        return self._address_file.read_text()

    def init(self) -> None:
        words = ["init", "--nodes", self.address, "--replicas", "1"]
        subprocess.run([sys.executable, "-m", "kvstore.cli.admin", *words], cwd=ROOT, check=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


@pytest.mark.parametrize("call", ["fdatasync", "pwrite"])
def test_a_node_whose_log_fails_ends_and_has_what_it_acknowledged(tmp_path, call):
    acknowledged = []
    with LoneNode(tmp_path, call) as node:
        node.init()
        with kvstore.Client(node.address, timeout=10.0) as db:
            for number in range(20):
                db.put(b"k%d" % number, b"v")
                acknowledged.append(b"k%d" % number)
            node.trigger.touch()
            with pytest.raises(KVError):
                db.put(b"late", b"v", timeout=2.0)
        assert node.process.wait(20) == 1
        last = node.errors.read_text().strip().splitlines()[-1]
        assert last.startswith("error: log_write_failed: ")
        assert "the disk failed" in last
    node.trigger.unlink()
    with (
        LoneNode(tmp_path, call) as again,
        kvstore.Client(again.address, timeout=10.0) as db,
    ):
        assert sorted(db.get_many(acknowledged)) == sorted(acknowledged)
