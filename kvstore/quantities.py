"""Durations and sizes as people write them: "500ms", "64MiB". Pure; each pair of functions is exact both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

SIZE_BYTES_MAX: Final = 1 << 44

# unit -> (multiply, divide): milliseconds are divided, so that 50ms is 0.05 and not a neighbour of it
_DURATION_UNITS: Final[Mapping[str, tuple[int, int]]] = {
    "h": (3600, 1),
    "m": (60, 1),
    "s": (1, 1),
    "ms": (1, 1000),
    "us": (1, 1_000_000),
}
_SIZE_UNITS: Final[Mapping[str, int]] = {
    "TiB": 1 << 40,
    "GiB": 1 << 30,
    "MiB": 1 << 20,
    "KiB": 1 << 10,
    "TB": 10**12,
    "GB": 10**9,
    "MB": 10**6,
    "KB": 10**3,
    "kB": 10**3,
    "B": 1,
}
_QUANTITY: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]{1,3})?)\s*([A-Za-z]+)")


def parse_duration(text: str) -> float:
    """Seconds. Raises: ValueError.

    >>> parse_duration("500ms"), parse_duration("2m")
    (0.5, 120.0)
    """
    number, unit = _split(text, _DURATION_UNITS, "a duration, as 500ms, 1s or 2m")
    multiply, divide = _DURATION_UNITS[unit]
    return float(number) * multiply / divide


def parse_size(text: str) -> int:
    """Bytes; without a unit the number is bytes. Raises: ValueError.

    >>> parse_size("64MiB"), parse_size("1.5KB")
    (67108864, 1500)
    """
    text = text.strip()
    number, unit = _split(
        text + "B" if text.isdigit() else text, _SIZE_UNITS, "a size, as 64MiB or 4096"
    )
    if number.isdigit():
        return int(number) * _SIZE_UNITS[unit]
    size = float(number) * _SIZE_UNITS[unit]
    if size != size // 1 or size > SIZE_BYTES_MAX:
        raise ValueError(f"{text!r} is not a whole number of bytes, or too many")
    return int(size)


def format_duration(seconds: float) -> str:
    """The shortest text that `parse_duration` reads back to exactly this."""
    for unit, (multiply, divide) in _DURATION_UNITS.items():
        count = round(seconds * divide / multiply)
        if count and count * multiply / divide == seconds:
            return f"{count}{unit}"
    return f"{seconds!r}s"


def format_size(size_bytes: int) -> str:
    """The shortest text with a binary unit that `parse_size` reads back to exactly this."""
    for unit, factor in _SIZE_UNITS.items():
        if unit.endswith("iB") and size_bytes and size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return f"{size_bytes}B"


def _split(text: str, units: Mapping[str, object], wanted: str) -> tuple[str, str]:
    match = _QUANTITY.fullmatch(text.strip())
    if match is None or match.group(2) not in units:
        raise ValueError(f"{text!r} is not {wanted} (units: {', '.join(units)})")
    return match.group(1), match.group(2)
