"""Every transcript in tests/scripts says what a cluster of Raft cores does, line by line: its name is its claim.

`REWRITE=1 pytest tests/scripts` records them anew; the diff is then read as carefully as code. The language is told in
tests/scripts/raft_script.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.scripts.raft_script import run_transcript

FOLDER = Path(__file__).parent / "replication"
TRANSCRIPTS = sorted(FOLDER.glob("*.txt"))


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_the_transcript_is_what_happens(path):
    recorded = path.read_text(encoding="utf-8")
    happens = run_transcript(recorded)
    if os.environ.get("REWRITE") == "1":
        path.write_text(happens, encoding="utf-8")
    else:
        assert happens == recorded


def test_there_are_transcripts_and_each_begins_with_its_claim():
    assert len(TRANSCRIPTS) >= 25
    for path in TRANSCRIPTS:
        assert path.read_text(encoding="utf-8").startswith("# "), path.name
