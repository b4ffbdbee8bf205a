"""Judges for tests of the fleet, in a module of their own since worker processes import them. What one does, the seed says."""

from __future__ import annotations

import os
import signal
import threading
from typing import Final

from kvstore.sim.scenario import Options
from tools.simulation.judging import Verdict

PASSES, FAILS, RAISES, EXITS, DIES, HANGS, STOPS, TALKS = range(8)
SAID: Final = "x" * 50_000


def judge(seed: int, _options: Options) -> Verdict:
    """Seed modulo 10 is one of the names above; tens do not matter."""
    kind = seed % 10
    if kind == RAISES:
        raise ValueError(f"of seed {seed}")
    if kind == EXITS:
        os._exit(7)
    if kind == DIES:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == HANGS:
        threading.Event().wait()
    if kind == STOPS:
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == TALKS:
        return Verdict(seed, [SAID] * 100)
    problems = [f"V2: of seed {seed}"] if kind == FAILS else []
    return Verdict(seed, problems, seconds=2.0, operations=3, faults={"crash": 1})


def process_of(seed: int, _options: Options) -> Verdict:
    """Tells in which process it ran."""
    return Verdict(seed, [], operations=os.getpid())
