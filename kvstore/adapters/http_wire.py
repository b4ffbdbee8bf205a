"""The gateway's plain translations: keys in paths and queries, errors to HTTP, values to JSON. Pure.

Keys are bytes and a path is text, so keys are percent-encoded, and decoded from the raw path: %2F,
%00 and bytes that are no UTF-8 arrive as they were sent. In a query, `+` means a space, as in forms.
"""

from __future__ import annotations

import base64
import ipaddress
import re
import urllib.parse
from collections.abc import Collection, Mapping
from typing import Any, Final

import msgspec

from kvstore.errors import InvalidArgument, KVError, to_wire
from kvstore.quantities import parse_duration

VERSION_HEADER: Final = "X-Kvorum-Version"
VERSION_MAX: Final = (1 << 64) - 1

STATUS: Final[
    Mapping[str, int]
] = {  # code of a KVError -> HTTP status; a code not listed: 503 if retryable, else 500
    "invalid_argument": 400,
    "config_error": 400,
    "authentication_error": 401,
    "permission_denied": 403,
    "not_found": 404,
    "request_timeout": 408,
    "refused": 409,
    "conflict": 409,
    "deadlock": 409,
    "lock_timeout": 409,
    "transaction_too_old": 409,
    "transaction_closed": 409,
    "version_mismatch": 409,
    "snapshot_too_old": 410,
    "compacted": 410,
    "outcome_expired": 410,
    "compare_failed": 412,
    "key_too_large": 413,
    "value_too_large": 413,
    "transaction_too_large": 413,
    "wrong_cluster": 421,
    "throttled": 429,
    "unavailable": 503,
    "no_quorum": 503,
    "node_stopped": 503,
    "not_ready": 503,
    "not_leader": 503,
    "epoch_mismatch": 503,
    "client_closed": 503,
    "pipe_closed": 503,
    "deadline_exceeded": 504,
    "commit_unknown": 504,
    "disk_full": 507,
}

_VERSIONS: Final = ("version", "their_version", "oldest")  # fields of errors that are versions
_BAD_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_TRUE: Final = ("", "1", "true", "yes")
_FALSE: Final = ("0", "false", "no")


def status_of(error: KVError) -> int:
    return STATUS.get(error.code, 503 if error.retryable else 500)


def error_body(error: KVError) -> bytes:
    """{"code", "message", "retryable", "maybe_committed", "details"}: details are the error's fields, versions as strings."""
    code, message, details = to_wire(error)
    flags = {name: details.pop(name) for name in ("retryable", "maybe_committed")}
    details |= {name: str(details[name]) for name in _VERSIONS if name in details}
    return json_bytes({"code": code, "message": message, **flags, "details": details})


def json_bytes(value: Any) -> bytes:
    """JSON with bytes as base64 and integers beyond 2^53 as strings. For our own plain values."""
    return msgspec.json.encode(plain(value))


def rows_bytes(value: Any) -> bytes:
    """The same of what may hold very many rows, at a twentieth of the time. All versions in it are strings already."""
    return msgspec.json.encode(value)


def plain(value: Any) -> Any:
    """The same value with bytes as base64 and integers that JavaScript would round as strings."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 53:
        return str(value)
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, str) else str(plain(key)): plain(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def unquote(text: str, what: str) -> bytes:
    """The bytes of percent-encoded text. Raises InvalidArgument for a `%` that no two hex digits follow."""
    if _BAD_ESCAPE.search(text):
        raise InvalidArgument(f"{what}: a % must be followed by two hexadecimal digits")
    return urllib.parse.unquote_to_bytes(text.encode("utf-8", "surrogateescape"))


def quote(key: bytes) -> str:
    """A key as it is written in a path. Dots are escaped in `.` and `..`, which clients would take for directories."""
    quoted = urllib.parse.quote_from_bytes(key, safe="")
    return quoted.replace(".", "%2E") if quoted in (".", "..") else quoted


def is_own_host(header: str, names: Collection[str]) -> bool:
    """Whether a Host header says an IP address, localhost, or one of these names."""
    host = header if header.endswith("]") else header.rpartition(":")[0] or header
    name = host.lower().rstrip(".")
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return name == "localhost" or name in names
    return True


class Query:
    """The parameters of a raw query, as bytes. Unknown and repeated ones are refused: no typo passes."""

    def __init__(self, raw: str, allowed: tuple[str, ...]) -> None:
        self._values: dict[str, bytes] = {}
        for part in filter(None, raw.split("&")):
            quoted_name, _, value = part.partition("=")
            name = urllib.parse.unquote_plus(quoted_name)
            if name not in allowed:
                raise InvalidArgument(
                    f"unknown parameter {name!r}; known here: {', '.join(allowed)}"
                )
            if name in self._values:
                raise InvalidArgument(f"the parameter {name!r} is given twice")
            self._values[name] = unquote(value.replace("+", " "), name)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def bytes_of(self, name: str) -> bytes | None:
        return self._values.get(name)

    def flag(self, name: str) -> bool:
        """`name`, `name=1` and `name=true` mean yes; absent means no."""
        value = self._values.get(name)
        if value is None:
            return False
        text = value.decode("ascii", "replace").lower()
        if text in _TRUE:
            return True
        if text in _FALSE:
            return False
        raise InvalidArgument(f"{name} is true or false")

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self._values.get(name)
        if value is None:
            return None
        if not re.fullmatch(rb"[0-9]{1,20}", value) or not low <= int(value) <= high:
            raise InvalidArgument(f"{name} is a whole number from {low} to {high}")
        return int(value)

    def seconds(self, name: str, high: float) -> float | None:
        """A duration such as `500ms` or `2s`, in seconds."""
        value = self._values.get(name)
        if value is None:
            return None
        try:
            seconds = parse_duration(value.decode("ascii", "replace"))
        except (ValueError, OverflowError):
            seconds = 0.0
        if not 0 < seconds <= high:
            raise InvalidArgument(f"{name} is a duration such as 500ms or 2s, at most {high:g}s")
        return seconds
