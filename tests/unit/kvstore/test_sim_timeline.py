"""Claims of the timeline: who did what when, without frames and writes; the same trace gives the same table."""

from __future__ import annotations

import io

import pytest

from kvstore.sim.scenario import Options, run
from kvstore.sim.timeline import Event, events, table

TRACE = """\
1000.000100 write n1 1 0 42 123456
1000.000200 frame 17 99 4711
1001.500000 leads n2 1 3
1002.000000 fault crash
1002.000000 crash n2 True 3
1002.250000 crash c1.2
1003.000000 op c3.4 put b'a key' b'v' True  ok 77
1003.100000 op c3.4 get b'a key' None True timeout unknown 0
1003.500000 restart n2
1004.000000 problem V2: n1 applies entry 7, not as others
1004.500000 news of n1 and others
1005.000000 end 12345
"""

TABLE = """\
        time   who      what
 1001.500000   n2       leads range 1 in term 3
 1002.000000   nemesis  fault crash
 1002.000000   n2       loses power, 3 batches of its engine are lost
 1002.250000   c1.2     dies
 1003.000000   c3.4     ok at 77: put b'a key' b'v' True
 1003.100000   c3.4     unknown: get b'a key' None True timeout
 1003.500000   n2       boots
 1004.000000 !          PROBLEM: V2: n1 applies entry 7, not as others
 1004.500000            news of n1 and others"""


def test_a_trace_becomes_a_table() -> None:
    assert table(list(events(TRACE.splitlines()))) == TABLE


@pytest.mark.parametrize(("problem", "first"), [(500, 350), (0, 0), (999, 800), (None, 800)])
def test_of_many_rows_those_around_the_first_problem_are_shown(
    problem: int | None, first: int
) -> None:
    rows = [Event(1000.0 + n, "n1", "flush", f"row-{n}") for n in range(1000)]
    if problem is not None:
        rows[problem] = rows[problem]._replace(kind="problem", what=f"row-{problem}")
    lines = table(rows, rows_max=200).splitlines()
    shown = [line for line in lines if "row-" in line]
    assert len(shown) == 200
    assert shown[0].endswith(f"row-{first}")
    assert any(f"{first} rows before" in line for line in lines) == (first > 0)
    assert any("rows after" in line for line in lines) == (first < 800)


def test_the_timeline_of_a_seed_is_stable_and_tells_of_leaders_faults_and_operations() -> None:
    options = Options(seconds=2.0, clients=2, ops=6, kinds=("crash",), mean_s=0.4, hold_s=0.3)
    tables = []
    for _ in range(2):
        told = io.StringIO()
        result = run(3, options, told)
        tables.append(table(list(events(told.getvalue().splitlines()))))
    assert tables[0] == tables[1]
    assert result.problems == []
    for expected in ("leads range 1 in term", "fault", "loses power", "boots", " ok"):
        assert expected in tables[0]
    assert len(tables[0].splitlines()) < 120
