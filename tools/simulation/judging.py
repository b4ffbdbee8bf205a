"""One seed, judged: it is played, and checked by its observers and workloads.

A verdict is small and can be sent between processes once `result` is dropped. `kind_of` says in what way a run failed,
so that two failures can be told to be the same: by the name of the invariant or checker, or else by the words of the
problem without its names, numbers and values.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import Final, TextIO

from kvstore.sim.scenario import Options, Result, run

CODE: Final = (  # V2:, G1c:, G-single:, SimDeadlock:, lost-append:
    r"([A-Z][A-Za-z]*[0-9]*[a-z]?(?:-[a-z]+)*|[a-z]+(?:-[a-z]+)+|internal|hang|died):"
)
CODED: Final = re.compile(CODE)
ASSERTED: Final = re.compile(rf"\bAssertionError\(['\"]{CODE}")
BROKEN: Final = re.compile(
    r"([\w ]+?) is broken\b"
)  # an observer: "I4 is broken", "durable vote is broken"
ERROR: Final = re.compile(r"\b([A-Z]\w*)\(")
VALUES: Final = re.compile(r"b?'(?:[^'\\]|\\.)*'|b?\"(?:[^\"\\]|\\.)*\"|\[.*\]|\{.*\}|\(.*\)")
PLACES: Final = re.compile(r"\b[a-z]\d+(?:\.\d+)?\b")
NUMBERS: Final = re.compile(r"\b(?:[0-9a-f]{8,}|\d+(?:\.\d+)*)\b")
KIND_WORDS_MAX: Final = 8


@dataclass(frozen=True)
class Verdict:
    """`problems` empty: it passed. `operations` are done, `failed` did not happen, `unknown` may have.

    `fault_numbers`: of the faults that took place; draws that found nobody to harm have numbers, too, and are not among them.
    `in_vain`: how many of `faults` waited for a moment that never came (the n-th write of a node, a client's next commit).
    `workloads`: names, as they were drawn or given. `seconds` are simulated, `cpu_s` were spent on it. `probes`: rare
    paths, and how often each was taken.
    """

    seed: int
    problems: list[str]
    seconds: float = 0.0
    operations: int = 0
    unknown: int = 0
    failed: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    in_vain: dict[str, int] = field(default_factory=dict)
    frozen: str = (
        ""  # in what a minority stayed while the others had to go on; empty: there was none
    )
    fault_numbers: tuple[int, ...] = ()
    probes: dict[str, int] = field(default_factory=dict)
    workloads: tuple[str, ...] = ()
    digest: str = ""
    cpu_s: float = 0.0
    result: Result | None = None

    @property
    def kind(self) -> str:
        """In what way it failed; empty if it passed."""
        return kind_of(self.problems[0]) if self.problems else ""


def judge(seed: int, options: Options | None = None, sink: TextIO | None = None) -> Verdict:
    """Run a seed; what its clients saw is checked by their workloads. Args: sink: where the trace is written."""
    began = time.process_time()
    result = run(seed, options, sink)
    return Verdict(
        seed,
        result.problems,
        seconds=result.seconds,
        operations=result.operations,
        unknown=result.unknown,
        failed=result.failed,
        faults=dict(result.faults),
        in_vain=result.in_vain,
        frozen=result.frozen,
        fault_numbers=tuple(result.happened),
        probes=dict(result.probes),
        workloads=tuple(workload.name for workload in result.workloads),
        digest=result.digest,
        cpu_s=time.process_time() - began,
        result=result,
    )


def kind_of(problem: str) -> str:
    """`at 1003.2: V2: n1 applies entry 7` is V2, `n1 failed: AssertionError('I10: a second intent')` is I10, and
    `n3 does not start: LogCorrupt('x')` is `# does not start LogCorrupt`."""
    line = re.sub(r"^at [\d.]+: ", "", problem.partition("\n")[0])
    coded = CODED.match(line) or BROKEN.match(line) or ASSERTED.search(line)
    if coded:
        return coded[1]
    raised = ERROR.search(line)
    words = VALUES.sub("#", line.partition(": ")[0] if raised else line)
    words = NUMBERS.sub("#", PLACES.sub("#", words))
    head = " ".join(words.split()[:KIND_WORDS_MAX]).rstrip(":,;")
    return f"{head} {raised[1]}" if raised else head
