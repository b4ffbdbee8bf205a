"""Keeps the real world out of a simulated test: clocks, sleeping, threads, processes and sockets are refused there.

A simulated seed is worth something only if it plays alike again. While `kept_out` is entered, the calling thread gets an
error that says what to use instead; other threads (of a debugger, say) are left alone. The module `random` and
`os.urandom` (so `uuid4`) draw from the seed, and go on afterwards as if nothing had been.

Clocks are refused to the code under test only: the standard library and installed packages (logging, the test runner)
may read them. One that somebody has replaced already (a fixture that freezes time) is left as it is. What has been bound
before (`from time import time`), `datetime.now`, clocks that are not listed here (`time.localtime`, `process_time`), and what
asks the system for random bits by itself (`random.Random()`, `secrets`) cannot be seen from here.
"""

from __future__ import annotations

import os
import random
import site
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import BuiltinFunctionType, FrameType
from typing import Any, Final

CLOCKS: Final = (
    "time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns",
)  # fmt: skip
CLOCK_ADVICE: Final = "use asyncio.get_running_loop().time(), which is virtual"
SLEEP_ADVICE: Final = "await asyncio.sleep(...), which takes no real time"
SOCKET_ADVICE: Final = "use `db`, the simulated cluster's client; there is no other network"
THREAD_ADVICE: Final = (
    "use tasks (asyncio.gather); the blocking client needs a thread and so a real cluster"
)
PROCESS_ADVICE: Final = "there are no processes in it; cluster.spawn(...) makes a simulated one"
REFUSED: Final[tuple[tuple[Any, str, str], ...]] = (
    (socket.socket, "connect", SOCKET_ADVICE),
    (socket.socket, "connect_ex", SOCKET_ADVICE),
    (socket.socket, "bind", SOCKET_ADVICE),
    (socket.socket, "sendto", SOCKET_ADVICE),
    (threading.Thread, "start", THREAD_ADVICE),
    (subprocess.Popen, "__init__", PROCESS_ADVICE),
    (os, "fork", PROCESS_ADVICE),
    (os, "system", PROCESS_ADVICE),
)
OPENING: Final = ("connect", "connect_ex", "bind")

OURS: Final = str(Path(__file__).resolve().parents[1]) + os.sep
INSTALLED: Final = tuple(
    dict.fromkeys(
        os.path.realpath(path) + os.sep
        for path in (
            *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")),
            *site.getsitepackages(),
            site.getusersitepackages(),
        )
        if path
    )
)


@contextmanager
def kept_out(seed: str, error: Callable[[str], Exception]) -> Iterator[None]:
    """Until the block ends. Args: seed: of what `random` and `os.urandom` give. error: makes what is raised."""
    with ExitStack() as undo:
        for name in CLOCKS:
            if not isinstance(getattr(time, name), BuiltinFunctionType):
                continue
            _replace(undo, time, name, _refused(time, name, CLOCK_ADVICE, error, of_tests=True))
        _replace(undo, time, "sleep", _refused(time, "sleep", SLEEP_ADVICE, error, of_tests=False))
        for owner, name, advice in REFUSED:
            _replace(undo, owner, name, _refused(owner, name, advice, error, of_tests=False))
        _replace(undo, os, "urandom", random.Random(f"{seed}/urandom").randbytes)
        undo.callback(random.setstate, random.getstate())
        random.seed(f"{seed}/random")
        yield


def _replace(undo: ExitStack, owner: Any, name: str, new: object) -> None:
    """For a while. A class may have inherited the attribute: then it has none of its own afterwards."""
    inherited = isinstance(owner, type) and name not in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, new)
    if inherited:
        undo.callback(delattr, owner, name)
    else:
        undo.callback(setattr, owner, name, before)


def _refused(
    owner: Any, name: str, advice: str, error: Callable[[str], Exception], *, of_tests: bool
) -> Callable[..., Any]:
    real, thread = getattr(owner, name), threading.get_ident()
    title = f"{owner.__name__}.{name}"

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread or (of_tests and _is_installed(sys._getframe(1))):  # noqa: SLF001
            return real(*args, **kwargs)
        if name in OPENING:
            args[0].close()  # its owner expects an OSError, and would leave it open
        raise error(f"{title} has no place in a simulated test: {advice}")

    return refuse


def _is_installed(frame: FrameType) -> bool:
    """Whether this frame runs code of Kvorum, the standard library or an installed package."""
    path = os.path.realpath(frame.f_code.co_filename)
    return path.startswith((OURS, *INSTALLED)) or frame.f_code.co_filename.startswith("<frozen")
