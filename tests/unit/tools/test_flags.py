"""Claims: the command that a run prints plays the same options again; sets of numbers are written short and read back."""

from __future__ import annotations

import argparse
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.config import NodeConfig
from kvstore.sim.scenario import Options
from tools.simulation.flags import (
    add_flags,
    command,
    options_of,
    read_numbers,
    read_places,
    show_numbers,
    show_places,
)

numbers = st.frozensets(st.integers(0, 30))
places = st.frozensets(st.tuples(st.integers(0, 3), st.integers(0, 30)))


def read(line: str) -> Options:
    words = shlex.split(line)
    assert words[:5] == ["python", "-m", "tools.simulate", "--seed", "17"]
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return options_of(parser.parse_args(words[5:]))


@given(
    st.builds(
        Options,
        seconds=st.sampled_from((0.25, 8.0, 20.0)),
        clients=st.integers(1, 5),
        frozen=st.sampled_from(("", "mute", "none")),
        faults=st.booleans(),
        kinds=st.sampled_from(((), ("crash",), ("crash", "flush"))),
        hold_s=st.sampled_from((0.0, 0.7)),
        faults_kept=st.none() | numbers,
        ops_kept=st.none() | places,
    )
)
def test_the_printed_command_has_all_options(options: Options) -> None:
    assert read(command(17, options)) == options


def test_defaults_are_not_printed() -> None:
    assert command(17, Options()) == "python -m tools.simulate --seed 17"


def test_what_a_command_line_cannot_say_is_named() -> None:
    assert command(17, Options(config=NodeConfig())).endswith(
        "# and config, which a command line cannot say"
    )


@pytest.mark.parametrize(
    ("text", "meant"),
    [("none", set()), ("4", {4}), ("1,4-6", {1, 4, 5, 6}), ("0-2,9", {0, 1, 2, 9})],
)
def test_numbers_are_written_as_runs(text: str, meant: set[int]) -> None:
    assert read_numbers(text) == meant
    assert show_numbers(meant) == text


@given(places)
def test_places_are_read_back(meant: frozenset[tuple[int, int]]) -> None:
    assert read_places(show_places(meant)) == meant
