"""Blocking HTTP to nodes, for command lines and the local cluster: one request, one connection, one deadline.

Deliberately of the standard library: it starts fast, and a request to a hung node ends at its timeout.
"""

from __future__ import annotations

import http.client
import socket
import time
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


class _TimedSocket(socket.socket):
    """A socket on which nothing waits beyond `until` (monotonic): its own timeout would begin anew with every byte."""

    until = 0.0

    def left_s(self) -> float:
        left_s = self.until - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        return left_s

    def connect(self, address: Any) -> None:
        self.settimeout(self.left_s())
        super().connect(address)

    def sendall(self, *args: Any) -> None:
        self.settimeout(self.left_s())  # for all of it
        super().sendall(*args)

    def recv_into(self, *args: Any) -> int:
        self.settimeout(self.left_s())
        return super().recv_into(*args)


class _TimedConnection(http.client.HTTPConnection):
    """A connection whose connecting, request and answer together take `timeout_s` at most; not so the look-up of a name."""

    def __init__(self, host: str, port: int, timeout_s: float) -> None:
        super().__init__(host, port)
        self._until = time.monotonic() + timeout_s

    def connect(self) -> None:
        failure = OSError("the name has no address")
        for family, kind, protocol, _, where in socket.getaddrinfo(
            self.host, self.port, type=socket.SOCK_STREAM
        ):
            connecting = _TimedSocket(family, kind, protocol)
            connecting.until = self._until
            try:
                connecting.connect(where)
            except OSError as error:
                connecting.close()
                failure = error
                continue
            connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sock = connecting
            return
        raise failure


def request(
    address: str, method: str, path: str, body: bytes | None = None, *, timeout_s: float = 5.0
) -> Answer:
    """One request to one node. `path` is sent as it is.

    Raises: Unavailable when nobody answers HTTP there in time; the request may have been received.
    """
    host, port = parse_address(address)
    connection = _TimedConnection(host, port, timeout_s)
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
    except UnicodeError:
        raise Unavailable(f"{address}: no host can have that name") from None
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
