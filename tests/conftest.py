"""What every test shares: hypothesis profiles, and the time that a slow test may take.

Nothing here imports the product: a plugin that did would hide lines from coverage.
"""

from __future__ import annotations

import os
from typing import Final

import pytest
from hypothesis import HealthCheck, Phase, settings

SLOW_TIMEOUT_S: Final = 300

# ci: the same examples in every run, on a machine of any speed. dev: new examples each time. deep: by hand, for hours.
settings.register_profile(
    "ci",
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.register_profile("dev", max_examples=100, deadline=None)
settings.register_profile(
    "deep", max_examples=20_000, deadline=None, phases=set(Phase) - {Phase.explain}
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test marked slow, and not with a timeout of its own, gets five minutes instead of one."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))
