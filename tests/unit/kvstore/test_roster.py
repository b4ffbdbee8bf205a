"""Claims: a member that was heard is remembered durably before it counts, is written once, and a damaged file is refused."""

from __future__ import annotations

import pytest

from kvstore.errors import DataDirectoryError
from kvstore.roster import FILE_NAME, Roster
from kvstore.sim.disk import SimDisk


def test_who_was_heard_is_known_after_a_crash():
    disk = SimDisk()
    roster = Roster(disk)
    roster.note(3)
    roster.note(1)
    assert Roster(disk.kill()).heard == [1, 3]


def test_each_member_is_written_once(monkeypatch):
    disk = SimDisk()
    roster = Roster(disk)
    roster.note(3)
    monkeypatch.setattr(disk, "write_file", None)  # another write would fail
    roster.note(3)
    assert roster.heard == [3]


def test_who_could_not_be_written_is_not_heard(monkeypatch):
    disk = SimDisk()
    roster = Roster(disk)

    def fail(name: str, data: bytes) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(disk, "write_file", fail)
    with pytest.raises(OSError, match="no space"):
        roster.note(3)
    assert roster.heard == []


def test_a_damaged_file_is_refused():
    disk = SimDisk()
    disk.write_file(FILE_NAME, b"[1, ")
    with pytest.raises(DataDirectoryError, match="damaged"):
        Roster(disk)
