"""Claims: a request of the command line ends in time, whatever the other side does, and in a typed error."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from kvstore.adapters import http_client
from kvstore.errors import Unavailable

TIMEOUT_S = 0.3
ENDED_WITHIN_S = 20.0
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"


@pytest.fixture
def dripping():
    """Serves one caller, byte by byte, each well within the timeout: first the head's, then as many as are read."""
    listening = socket.create_server(("127.0.0.1", 0))
    paused = threading.Event()  # never set: its wait is the pause
    heads: list[bytes] = []
    ended = threading.Event()

    def serve() -> None:
        caller, _ = listening.accept()
        with caller:
            caller.recv(65536)
            try:
                caller.sendall(heads[0])
                until = time.monotonic() + ENDED_WITHIN_S
                while time.monotonic() < until:
                    caller.sendall(b"x")
                    paused.wait(TIMEOUT_S / 10)
            except OSError:
                ended.set()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    host, port = listening.getsockname()
    yield f"{host}:{port}", heads, ended
    thread.join(2 * ENDED_WITHIN_S)
    listening.close()


@pytest.mark.parametrize("head", [b"", HEAD[:20], HEAD])
def test_an_answer_that_comes_byte_by_byte_is_given_up_in_time(dripping, head):
    address, heads, ended = dripping
    heads.append(head)
    with pytest.raises(Unavailable, match="timed out"):
        http_client.request(address, "GET", "/", timeout_s=TIMEOUT_S)
    assert ended.wait(ENDED_WITHIN_S)


@pytest.mark.parametrize("name", ["a..b", "a" * 64 + ".example"])
def test_a_name_that_no_host_can_have_is_unavailable(name):
    with pytest.raises(Unavailable, match="no host can have"):
        http_client.request(f"{name}:7400", "GET", "/")
