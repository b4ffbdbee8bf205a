"""What the gateway's requests may take of a node: places, bytes of bodies and of answers, and waits that a stop cuts short.

Whoever comes when there is no room is told `throttled`, and nothing was done. What is sent after a commit is counted too, but
never refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Final

from aiohttp import web

from kvstore import limits
from kvstore.errors import InvalidArgument, KVError, NodeStopped, Throttled

BODY_BYTES_IN_FLIGHT_MAX: Final = 64 * limits.MIB
ANSWER_BYTES_IN_FLIGHT_MAX: Final = 64 * limits.MIB  # made, and not taken by their clients yet
REQUESTS_IN_FLIGHT_MAX: Final = 1_024  # for data
ADMIN_REQUESTS_IN_FLIGHT_MAX: Final = 32  # beside them, for who looks after a node that is busy
ADMIN_BODIES_IN_FLIGHT_MAX: Final = (
    4  # beside both: a body may be slow, and keeps nobody from looking
)
BODY_TIMEOUT_S: Final = 30.0
ROW_JSON_BYTES: Final = 96  # what stands around a row's key and value in an answer, at most
RESULT_JSON_BYTES: Final = 20  # of the result of an operation that reads nothing, at most
RETRY_AFTER_S: Final = 0.1


class RequestTimeout(KVError):
    """The body did not arrive in time; nothing was done. Send it again."""

    code = "request_timeout"
    retryable = True


class NoRoom(Exception):
    """The answer does not fit beside those that wait to be read. No KVError: a transaction that meets it is not run again."""


class Waits:
    """What requests wait for. `cut`: nobody waits from now on."""

    def __init__(self) -> None:
        self.over = False
        self._open: dict[int, asyncio.Timeout] = {}

    @contextlib.asynccontextmanager
    async def within(self, seconds: float) -> AsyncIterator[None]:
        """Raises: TimeoutError, after `seconds` or when it is cut short."""
        async with asyncio.timeout(0.0 if self.over else seconds) as wait:
            self._open[id(wait)] = wait
            try:
                yield
            finally:
                del self._open[id(wait)]

    def cut(self) -> None:
        self.over = True
        now = asyncio.get_running_loop().time()
        for wait in self._open.values():
            if not wait.expired():
                wait.reschedule(now)


class Places:
    """Requests of one kind that are under way; `most` of them are taken on."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0  # by those that are being refused as well


class Load:
    """Of one gateway, at this moment."""

    def __init__(self) -> None:
        self.data = Places(REQUESTS_IN_FLIGHT_MAX)
        self.admin = Places(ADMIN_REQUESTS_IN_FLIGHT_MAX)
        self.admin_bodies = Places(ADMIN_BODIES_IN_FLIGHT_MAX)
        self.health = Places(sys.maxsize)
        self.body_bytes = 0
        self.answer_bytes = 0
        self.bodies = Waits()
        self._left = asyncio.Event()  # somebody has, since it was cleared

    async def finish(self, timeout_s: float) -> None:
        """Until nothing but health is under way, and what still waits for its body then is ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.data.taken or self.admin.taken or self.admin_bodies.taken:
                    self._left.clear()
                    await self._left.wait()
        self.bodies.cut()

    def left(self, places: Places) -> None:
        """A request has been answered."""
        places.taken -= 1
        self._left.set()


class Held:
    """The bytes of one answer, from when it is known what they are until the client has them."""

    __slots__ = ("_load", "_size_bytes")

    def __init__(self, load: Load) -> None:
        self._load = load
        self._size_bytes = 0

    def grow(self, size_bytes: int) -> None:
        """Raises: NoRoom."""
        if self._load.answer_bytes + size_bytes > ANSWER_BYTES_IN_FLIGHT_MAX:
            raise NoRoom
        self._load.answer_bytes += size_bytes
        self._size_bytes += size_bytes

    def grow_row(self, size_bytes: int) -> None:
        """By a key and a value of so many bytes, as JSON has them. Raises: NoRoom."""
        self.grow(size_bytes * 4 // 3 + ROW_JSON_BYTES)

    def settle(self, size_bytes: int) -> None:
        """This is what it is in the end, whether there is room or not."""
        self._load.answer_bytes += size_bytes - self._size_bytes
        self._size_bytes = size_bytes


class Body:
    """A request's body, at most `bytes_max`, counted while the block runs."""

    def __init__(
        self, load: Load, request: web.Request, bytes_max: int, too_large: KVError
    ) -> None:
        self._load = load
        self._request = request
        self._bytes_max = bytes_max
        self._too_large = too_large
        self._reserved = 0

    async def __aenter__(self) -> bytes:
        """Raises: `too_large`, Throttled, RequestTimeout, NodeStopped, InvalidArgument; ConnectionError: nobody is there."""
        try:
            if (self._request.content_length or 0) > self._bytes_max:
                raise self._too_large
            async with self._load.bodies.within(BODY_TIMEOUT_S):
                return await self._read()
        except TimeoutError:
            self._release()
            raise (NodeStopped if self._load.bodies.over else RequestTimeout) from None
        except web.RequestPayloadError as error:
            self._release()
            raise InvalidArgument(str(error)) from None
        except OSError as error:  # the connection's, such as EHOSTUNREACH: it is none of Python's ConnectionErrors
            self._release()
            raise ConnectionError(str(error)) from error
        except BaseException:
            self._release()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._release()

    async def _read(self) -> bytes:
        body = bytearray()
        async for chunk in self._request.content.iter_any():
            if self._load.body_bytes + len(chunk) > BODY_BYTES_IN_FLIGHT_MAX:
                raise Throttled(RETRY_AFTER_S, "too many bytes of requests are in flight")
            self._load.body_bytes += len(chunk)
            self._reserved += len(chunk)
            body += chunk
            if len(body) > self._bytes_max:
                raise self._too_large
        return bytes(body)

    def _release(self) -> None:
        self._load.body_bytes -= self._reserved
        self._reserved = 0
