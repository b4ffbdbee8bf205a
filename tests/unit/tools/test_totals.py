"""Claims of totals and progress: sums, probes that were never reached, plain lines where there is no terminal."""

from __future__ import annotations

import io
import json

from kvstore.sim.points import EXPECTED
from tools.simulation.judging import Verdict
from tools.simulation.totals import LINE_S, Progress, Totals


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def filled() -> Totals:
    totals = Totals(expected=("torn_tail",))
    totals.add(
        Verdict(
            3,
            [],
            seconds=1800.0,
            operations=7,
            unknown=2,
            failed=1,
            faults={"crash": 2},
            in_vain={"crash": 1},
            probes={"snapshot": 1, "rare": 0},
            cpu_s=30.0,
        )
    )
    totals.add(Verdict(4, ["V2: n1"], seconds=1800.0, faults={"crash": 1, "clog": 1}, cpu_s=6.0))
    totals.elapsed_s = 18.0
    return totals


def test_everything_is_summed_up() -> None:
    lines = "\n".join(filled().lines())
    assert "2 seeds, 1 failed, in 18 s" in lines
    assert (
        "1.00 simulated hours: 200 simulated seconds per real one, 100 per second of one core"
        in (lines)
    )
    assert "operations: ok 7, failed 1, unknown 2" in lines
    assert "faults: clog 1, crash 3 (2 went off)" in lines
    assert "probes reached: snapshot 1" in lines
    assert "kinds of failures: V2 1" in lines
    assert "failed seeds: 4" in lines


def test_a_probe_is_missed_if_it_was_expected_or_told_of_and_never_reached() -> None:
    assert filled().missed() == ["rare", "torn_tail"]


def test_a_path_that_many_seeds_should_have_taken_is_missed() -> None:
    totals = filled()
    totals.probes.update(dict.fromkeys(EXPECTED, 1))
    totals.seeds = 150
    assert totals.missed() == ["rare", "torn_tail"]
    totals.probes["chance:flush_early"] = 0
    del totals.probes[EXPECTED[0]]
    assert totals.missed() == sorted(["rare", "torn_tail", "chance:flush_early", EXPECTED[0]])


def test_programs_can_read_it() -> None:
    found = json.loads(json.dumps(filled().as_json()))
    assert found["failed_seeds"] == [4]
    assert found["probes_missed"] == ["rare", "torn_tail"]
    assert (found["faults"], found["faults_went_off"]) == ({"clog": 1, "crash": 3}, {"crash": 2})


def test_without_a_terminal_progress_is_a_line_now_and_then() -> None:
    stream = io.StringIO()
    progress = Progress(stream, 100)
    for _ in range(50):
        progress.show(filled())
    assert stream.getvalue() == ""
    progress._shown_at -= LINE_S
    progress.show(filled())
    progress.show(filled())
    assert stream.getvalue().count("\n") == 1
    assert "2 of 100 seeds, 1 failed" in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_on_a_terminal_it_is_one_line_that_goes_before_anything_else_is_printed() -> None:
    stream = Terminal()
    progress = Progress(stream, 100)
    progress.show(filled())
    progress.show(filled())
    assert "\n" not in stream.getvalue()
    progress.clear()
    assert stream.getvalue().endswith(" \r")
