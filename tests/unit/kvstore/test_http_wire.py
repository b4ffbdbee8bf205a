"""Claim: every error has an HTTP status of its own kind."""

from __future__ import annotations

from kvstore.adapters import http_wire
from kvstore.errors import CODES, InvalidArgument


def test_every_code_has_a_status_of_its_own_kind():
    for code, cls in CODES.items():
        if not cls.__module__.startswith("kvstore"):
            continue
        status = http_wire.STATUS.get(code, 503 if cls.retryable else 500)
        assert (status in (400, 401, 403, 404, 410, 412, 413, 421)) <= (not cls.retryable), code
        assert issubclass(cls, InvalidArgument) == (status in (400, 413)), code
