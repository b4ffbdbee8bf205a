"""Claims of quantities: units mean what they say, what is written is read back exactly, nonsense is refused."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import quantities
from kvstore.quantities import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("500ms", 0.5),
        ("50ms", 0.05),
        ("1s", 1.0),
        ("1.5s", 1.5),
        ("2m", 120.0),
        ("1h", 3600.0),
        ("250us", 0.00025),
        (" 3 s ", 3.0),
        ("0s", 0.0),
    ],
)
def test_a_duration_is_a_number_and_a_unit(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "1", "s", "-1s", "1 sec", "1S", "1m30s", "1,5s", "infs", "nans", "²s", "0x1s"]
)
def test_what_is_no_duration_is_refused_with_the_units(text):
    with pytest.raises(ValueError, match="is not a duration.*units: h, m, s, ms, us"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("4096", 4096),
        ("0", 0),
        ("1B", 1),
        ("64KiB", 65536),
        ("64 MiB", 67108864),
        ("1.5GiB", 1610612736),
        ("2TiB", 2199023255552),
        ("10MB", 10_000_000),
        ("1.5kB", 1500),
    ],
)
def test_a_size_is_a_number_and_a_unit_or_bytes(text, size_bytes):
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", "1 mib", "1M", "1.5", "1.5B", "0.3KiB", "1e999MiB", "²", "1_000"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="size|whole number"):
        parse_size(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0s"),
        (0.05, "50ms"),
        (1.0, "1s"),
        (90.0, "90s"),
        (120.0, "2m"),
        (3600.0, "1h"),
        (1 / 3, f"{1 / 3}s"),
    ],
)
def test_a_duration_is_written_in_the_largest_unit_that_is_exact(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0B"), (1, "1B"), (1000, "1000B"), (1024, "1KiB"), (3 << 29, "1536MiB")],
)
def test_a_size_is_written_in_the_largest_binary_unit_that_is_exact(size_bytes, text):
    assert format_size(size_bytes) == text


@given(st.floats(min_value=0, max_value=1e9))
def test_every_duration_is_read_back_exactly(seconds):
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.integers(min_value=0, max_value=quantities.SIZE_BYTES_MAX))
def test_every_size_is_read_back_exactly(size_bytes):
    assert parse_size(format_size(size_bytes)) == size_bytes


def test_the_examples_in_the_docstrings_are_true():
    assert doctest.testmod(quantities).failed == 0
