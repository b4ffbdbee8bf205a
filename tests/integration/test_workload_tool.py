"""Claims of `tools.workload`: it runs workloads on real processes and kills them; what is found is its exit status."""

from __future__ import annotations

import json

import pytest

from kvstore.testing.workloads import WORKLOADS
from tools import workload

SHORT = ["--clients", "4", "-o", "json"]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_all_workloads_hold_on_real_processes_that_are_killed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert workload.main([*SHORT, "--seconds", "7", "--kill-every", "3"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["broken"] == []
    assert result["kills"] >= 1
    assert all(figures["ok"] > 0 for figures in result["workloads"].values())
    assert list(result["workloads"]) == list(WORKLOADS)


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_what_a_workload_finds_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(WORKLOADS["ring"], "inspect", lambda _: ["Broken-ring: planted"])
    arguments = ["ring", "--seconds", "1", "--kill-every", "0", "--nodes", "1", *SHORT]
    assert workload.main(arguments) == 1
    assert json.loads(capsys.readouterr().out)["broken"] == ["Broken-ring: planted"]


def test_an_unknown_name_is_told_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        workload.main(["bonk"])
    assert "there are registers, mixed, bank" in capsys.readouterr().err
