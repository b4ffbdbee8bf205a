"""Claims: two failures are of one kind if the same rule was broken, whatever the names, numbers and values."""

from __future__ import annotations

import pytest

from tools.simulation.judging import kind_of


@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        ("V2: n1 applies entry 7 of range 2", "V2"),
        ("at 1003.250000: V2: n3 applies entry 19 of range 4", "V2"),
        ("G1c: c1 -> c2 -> c1", "G1c"),
        ("G-single: a cycle of 3", "G-single"),
        ("lost-append: T12 appended 5 to 'x', acknowledged; T40 began later", "lost-append"),
        ("lost-append: T3 appended 9 to 'y', acknowledged; T7 began later", "lost-append"),
        ("lost-update-realtime: two transactions read the same version", "lost-update-realtime"),
        ("internal: T5 read 'x' = 7, and should have read 8 (rw-register)", "internal"),
        ("SimDeadlock: nothing is ready", "SimDeadlock"),
        ("hang: no end within 120 s; it was here:\n  File", "hang"),
        ("died: the process of this seed ended, killed by SIGKILL", "died"),
        ("at 1.5: n1 failed: AssertionError('I10: a second intent on a key')\nTraceback", "I10"),
        ('n1 failed: AssertionError("I10: it is not 7")', "I10"),
        ("at 1.5: n1 failed: AssertionError('below commit')\nTraceback", "# failed AssertionError"),
        ("n2 does not start: LogCorrupt('segment 7')", "# does not start LogCorrupt"),
        ("n3 does not start: LogCorrupt('segment 9')", "# does not start LogCorrupt"),
        (
            "for 60 s in peace transactions stay undecided: n1 {'prepared': 1}",
            "for # s in peace transactions stay undecided",
        ),
        ("b'a-reg': read b'c1.2-3', which nobody wrote", "#: read #, which nobody wrote"),
        ("b'z-reh': read b\"c1'2\", which nobody wrote", "#: read #, which nobody wrote"),
    ],
)
def test_the_kind_is_the_rule_without_names_numbers_and_values(problem: str, kind: str) -> None:
    assert kind_of(problem) == kind
