"""Claims of `python -m tools.simulate`: what it prints replays, a planted bug shrinks to what shows it, JSON is JSON."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest

import tools.simulate
from kvstore.sim.scenario import Options
from tests.sim.plants import PLANTS, planted
from tools.simulate import Verdict, judge, main, shrunk_lines, timeline_of
from tools.simulation.fleet import Fleet
from tools.simulation.shrink import Shrinker

SHORT = ("--seconds", "2", "--clients", "2", "--ops", "6")


def test_the_hash_alone_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "3", "--hash", *SHORT]) == 0
    printed = capsys.readouterr().out
    assert printed == judge(3, Options(seconds=2.0, clients=2, ops=6)).digest + "\n"


def test_a_failing_seed_prints_the_command_that_replays_it_with_all_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(seed: int, options: Options, _sink: object) -> tools.simulate.Verdict:
        return tools.simulate.Verdict(seed, [f"V2: with {options.clients} clients"])

    monkeypatch.setattr(tools.simulate, "judge", fails)
    given = ["--seed", "3", *SHORT, "--only", "crash,flush", "--hold-s", "0.5"]
    assert main(given) == 1
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("replay: ")]
    assert lines == [
        "replay: python -m tools.simulate --seed 3 --seconds 2 --clients 2 --ops 6 --only crash,flush --hold-s 0.5"
    ]
    assert main(shlex.split(lines[0])[4:]) == 1
    assert capsys.readouterr().out == printed
    assert main([*given, "-o", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "V2"
    assert found["command"] == lines[0].removeprefix("replay: ")


def test_a_timeline_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "3", "--timeline", *SHORT]) == 0
    assert "leads range 1 in term" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_end_prints_its_totals(
    number: signal.Signals, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def play(_fleet: Fleet, work: Iterable[tuple[int, Options]]) -> Iterator[Verdict | None]:
        for seed, _ in work:
            if seed == 3:
                signal.raise_signal(number)
            yield Verdict(seed, [])

    monkeypatch.setattr(Fleet, "play", play)
    before = signal.signal(number, signal.SIG_IGN)  # as in a shell's background
    try:
        assert main(["--seeds", "9", *SHORT]) == 130
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
    printed = capsys.readouterr().out
    assert "interrupted\n2 seeds, 0 failed" in printed


@pytest.mark.slow
def test_many_seeds_end_with_totals(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "4", "--jobs", "2", *SHORT]) == 0
    printed = capsys.readouterr().out
    assert "4 seeds, 0 failed" in printed
    assert "simulated hours" in printed
    assert main(["--seeds", "2", "--jobs", "1", "-o", "json", *SHORT]) == 0
    assert json.loads(capsys.readouterr().out)["seeds"] == 2


@pytest.mark.slow
def test_probes_that_are_required_and_never_reached_are_a_failure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--seeds", "1", "--jobs", "1", *SHORT, "--require-probes", "no_such_probe"]
    assert main(arguments) == 1
    assert "never reached: no_such_probe" in capsys.readouterr().out


@pytest.mark.slow
def test_a_seed_that_hangs_ends_the_run_with_where_it_hung(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The limit is below what any seed takes, so each of them hangs by that measure."""
    arguments = ["--seeds", "2", "--jobs", "1", "--seed-limit", "0.05", "--seconds", "30"]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert "seed 1 FAILED: hang" in printed
    assert "_run_once" in printed, "it says where"
    assert "2 seeds, 2 failed" in printed


@pytest.mark.slow
def test_a_planted_bug_shrinks_to_fewer_faults_and_operations_that_show_it_still() -> None:
    name = "applied index leads its rows"
    proof = PLANTS[name].seeds
    assert proof is not None
    options = replace(proof.options, seconds=6.0, ops=30)
    with planted(name):
        failed = (judge(seed, options) for seed in range(1, 20))
        verdict = next(each for each in failed if each.problems)
        seed = verdict.seed
        found = Shrinker(
            lambda some: judge(seed, some), options, verdict, runs_max=60, seconds_max=120.0
        ).shrink()
        again = judge(seed, found.options)
        lines = list(shrunk_lines(seed, found, timeline_of(seed, found)))
    assert again.kind == verdict.kind
    assert again.digest == found.verdict.digest
    before = options.clients * options.ops
    assert found.options.clients * found.options.ops <= before / 2
    assert sum(again.faults.values()) <= sum(verdict.faults.values())
    assert any("PROBLEM" in line for line in lines), "the timeline shows when it showed"
    assert len(found.verdict.workloads) == 1 < len(verdict.workloads)
    assert not any("Traceback" in line for line in lines)
    assert lines[-1].startswith(f"replay: python -m tools.simulate --seed {seed} ")
