"""Blocking HTTP to nodes, for command lines and the local cluster: one request, one connection, one deadline.

Deliberately of the standard library: it starts fast, and a request to a hung node ends at its timeout.
"""

from __future__ import annotations

import http.client
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import msgspec

from kvstore.bootstrap import parse_address
from kvstore.errors import KVError, Unavailable, from_wire

ANSWER_BYTES_MAX: Final = 64 << 20
CONCURRENCY_MAX: Final = 16


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes


def request(
    address: str, method: str, path: str, body: bytes | None = None, *, timeout_s: float = 5.0
) -> Answer:
    """One request to one node. `path` is sent as it is.

    Raises: Unavailable when nobody answers HTTP there in time; the request may have been received.
    """
    host, port = parse_address(address)
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        headers = {} if body is None else {"Content-Type": "application/json"}
        connection.request(method, path, body=body, headers=headers)
        response = connection.getresponse()
        content = response.read(ANSWER_BYTES_MAX + 1)
        if len(content) > ANSWER_BYTES_MAX:
            raise Unavailable(f"{address}: the answer is longer than {ANSWER_BYTES_MAX} bytes")
        return Answer(
            response.status, {name.lower(): value for name, value in response.getheaders()}, content
        )
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(f"{address}: {str(error) or type(error).__name__}") from None
    finally:
        connection.close()


def request_json(
    address: str, method: str, path: str, body: Any = None, *, timeout_s: float = 5.0
) -> Any:
    """The same, with JSON in and out; a msgspec struct may be the body.

    Raises: Unavailable as `request`, and the node's typed error when it refuses.
    """
    encoded = None if body is None else msgspec.json.encode(body)
    answer = request(address, method, path, encoded, timeout_s=timeout_s)
    try:
        decoded = msgspec.json.decode(answer.body)
    except (msgspec.DecodeError, RecursionError):
        raise Unavailable(
            f"{address}: HTTP {answer.status} without JSON; is it a Kvorum node?"
        ) from None
    if answer.status >= 400:
        raise _error_of(address, answer.status, decoded)
    return decoded


def request_all(
    addresses: list[str],
    method: str,
    path: str,
    bodies: list[Any] | None = None,
    *,
    timeout_s: float = 5.0,
) -> list[Any | KVError]:
    """`request_json` to each address at once; in the order of `addresses`, its JSON or its error."""

    def one(index: int) -> Any | KVError:
        try:
            body = bodies[index] if bodies is not None else None
            return request_json(addresses[index], method, path, body, timeout_s=timeout_s)
        except KVError as error:
            return error

    with ThreadPoolExecutor(max_workers=min(CONCURRENCY_MAX, max(1, len(addresses)))) as pool:
        return list(pool.map(one, range(len(addresses))))


def _error_of(address: str, status: int, decoded: Any) -> KVError:
    if not isinstance(decoded, dict) or not isinstance(decoded.get("code"), str):
        return Unavailable(f"{address}: HTTP {status}")
    flags = {name: decoded.get(name) for name in ("retryable", "maybe_committed")}
    details = decoded.get("details")
    fields = details if isinstance(details, dict) else {}
    return from_wire(
        decoded["code"], f"{address}: {decoded.get('message', '')}", {**fields, **flags}
    )
