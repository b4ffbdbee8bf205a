"""Claims of what `@simulate` keeps out: the real world's clocks, sleeps, threads, processes and sockets are refused to a test,
libraries may read clocks, and afterwards all is as it was."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import site
import socket
import subprocess
import threading
import time

import pytest

from kvstore import Client
from kvstore.adapters.real_world import INSTALLED
from kvstore.sim.loop import SimError
from kvstore.testing import seeds, simulate


@pytest.fixture(autouse=True)
def _no_wishes(monkeypatch):
    """What this run of pytest was told is not for these tests."""
    monkeypatch.setattr(seeds, "command_lines", [])
    monkeypatch.delenv("KVORUM_SEED", raising=False)
    monkeypatch.delenv("KVORUM_SEEDS", raising=False)


@pytest.mark.parametrize(
    "asked",
    [
        "time.time()",
        "time.monotonic()",
        "time.perf_counter_ns()",
        "time.sleep(0.01)",
        "threading.Thread(target=print).start()",
        "subprocess.run(['true'], check=False)",
        "os.system('true')",
        "os.fork() or os._exit(0)",
        "socket.create_connection(('127.0.0.1', 9), 0.1)",
        "Client('127.0.0.1:9').get(b'k')",
    ],
)
def test_the_real_world_is_refused(asked):
    names = {
        "Client": Client,
        "os": os,
        "socket": socket,
        "subprocess": subprocess,
        "threading": threading,
        "time": time,
    }

    @simulate(seeds=1, faults=False)
    async def asks() -> None:
        eval(asked, names)

    before = (time.time, threading.Thread.start, socket.socket.connect, os.urandom)
    with pytest.raises(SimError, match="has no place in a simulated test"):
        asks()
    assert before == (time.time, threading.Thread.start, socket.socket.connect, os.urandom)


def test_a_connection_of_asyncio_is_refused():
    @simulate(seeds=1)
    async def asks() -> None:
        await asyncio.open_connection("127.0.0.1", 9)

    with pytest.raises(SimError, match="no sockets"):
        asks()


def test_a_datagram_is_refused_and_whose_socket_it_is_keeps_it():
    with socket.socket(type=socket.SOCK_DGRAM) as own:

        @simulate(seeds=1)
        async def asks() -> None:
            own.sendto(b"x", ("127.0.0.1", 9))

        with pytest.raises(SimError, match="socket.sendto has no place"):
            asks()
        assert own.fileno() >= 0


def test_libraries_may_read_clocks_and_random_goes_on_as_if_nothing_had_been():
    drawn: list[float] = []
    names = {"random": random}  # the module's own generator, which users' code draws from

    @simulate(seeds=[5, 5, 6], faults=False)
    async def draws() -> None:
        logging.getLogger("mine").info("it is %s", "some time")
        drawn.append(eval("random.random()", names))

    state = eval("random.getstate()", names)
    draws()
    assert eval("random.getstate()", names) == state
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_clock_that_a_fixture_has_replaced_is_left_alone(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 5.0)
    names = {"time": time}  # the module as users' code sees it

    @simulate(seeds=1)
    async def asks() -> None:
        assert eval("time.time()", names) == 5.0
        with pytest.raises(SimError, match="time.monotonic"):
            eval("time.monotonic()", names)

    asks()


def test_packages_are_libraries_wherever_they_are_installed():
    assert {os.path.realpath(path) + os.sep for path in site.getsitepackages()} <= {*INSTALLED}
    assert os.path.realpath(site.getusersitepackages()) + os.sep in INSTALLED
