"""Network over WebSockets of aiohttp: one binary message is one frame.

Nothing of aiohttp waits for a peer on our behalf: its heartbeat and its compression are off, `close` runs only under
a timeout, and the transport is kept from connect time, so that `abort` ends a connection whose peer has stalled.
What this process buffers for a connection is bounded by BUFFER_BYTES_MAX; what comes in is paused by aiohttp beyond a
few frames that nobody has received yet.

A node's one port serves these paths beside its HTTP routes: `serve` makes an application with the stream paths alone,
or takes one that has other routes already; `attach` only adds the paths, for whoever runs the application.
Requests that carry an Origin header are refused: a web page must not speak to a node on its reader's machine.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import sys
from collections.abc import Awaitable, Callable
from socket import gaierror
from typing import Final, cast

import aiohttp
from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.client import ClientTimeout
from aiohttp.client_reqrep import ClientRequest
from aiohttp.connector import Connection
from aiohttp.tracing import Trace

from kvstore.adapters.http_protocol import ServerProtocol
from kvstore.adapters.http_wire import error_body
from kvstore.errors import KVError, PipeClosed, Throttled
from kvstore.limits import BOUND_BYTES_MAX
from kvstore.link import WIRE_BYTES_MAX, MalformedFrame
from kvstore.ports import FramePipe
from replication.errors import FrameError

STREAM_PATHS: Final = ("/v1/stream", "/v1/peer", "/v1/snapshot")
# Two bounds of a scan, each of its bytes as %NN, and whatever stands around them.
REQUEST_LINE_BYTES_MAX: Final = 2 * 3 * BOUND_BYTES_MAX + 1024
HIGH_WATER_BYTES: Final = 256 * 1024  # in the transport's buffer: from there on `try_send` refuses
# What `try_send` alone cannot reach, so that only `send` ever meets a paused transport, and waits.
PAUSE_BYTES: Final = HIGH_WATER_BYTES + WIRE_BYTES_MAX + 64
BUFFER_BYTES_MAX: Final = (
    PAUSE_BYTES + HIGH_WATER_BYTES + WIRE_BYTES_MAX + 64
)  # and what `send` adds before it waits
MESSAGE_BYTES_MAX: Final = WIRE_BYTES_MAX + 1
CLOSE_TIMEOUT_S: Final = 1.0  # for aiohttp to end a connection that we gave up already
SHUTDOWN_TIMEOUT_S: Final = 0.5  # for open requests to end, when everything is closed
BACKLOG: Final = 128  # connections that the system has taken and we have not
ACCEPTED_S: Final = (
    0.001  # by a timer of the loop, which comes after what the sockets brought in the same turn
)
# For the next request, or the rest of its head, to come; longer than proxies keep idle connections to us (60 s).
KEEPALIVE_TIMEOUT_S: Final = 75.0

# What aiohttp tells a peer whose WebSocket it could not read, by the code with which it closes (RFC 6455, 7.4.1).
_REPROACHES: Final = {
    aiohttp.WSCloseCode.PROTOCOL_ERROR: "not a WebSocket message",
    aiohttp.WSCloseCode.INVALID_TEXT: "text that is not UTF-8",
    aiohttp.WSCloseCode.MESSAGE_TOO_BIG: "a frame that is too large",
}

OnPipe = Callable[[str, FramePipe], Awaitable[None]]
Socket = aiohttp.ClientWebSocketResponse[bool] | web.WebSocketResponse[bool]

_dialled: contextvars.ContextVar[list[asyncio.Transport]] = contextvars.ContextVar("dialled")


class _Connector(aiohttp.TCPConnector):
    """Notes the transport of each connection for the task that dials it: aiohttp does not give it away later."""

    async def connect(
        self, req: ClientRequest, traces: list[Trace], timeout: ClientTimeout
    ) -> Connection:
        connection = await super().connect(req, traces, timeout)
        if connection.transport is not None:
            _dialled.get([]).append(connection.transport)
        return connection


class _Refused(asyncio.Protocol):
    """One connection too many: told so before it has said anything, and ended."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        wire = cast("asyncio.Transport", transport)  # uvloop's are none by their class
        body = error_body(Throttled(1.0, "the node has as many connections as it can have"))
        head = (
            "HTTP/1.1 429 Too Many Requests\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        wire.write(head.encode() + body)
        wire.close()


def connections_max() -> int:
    """Of all kinds together: three quarters of the files that the process may have open; log and rows have the rest."""
    try:
        import resource
    except ImportError:  # a system that has no such limit
        return sys.maxsize
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if files == resource.RLIM_INFINITY else files * 3 // 4


class WsPipe:
    """One WebSocket as a FramePipe, of either side."""

    __slots__ = (
        "_closed",
        "_finishing",
        "_network",
        "_protocol",
        "_socket",
        "_transport",
        "path",
        "remote",
    )

    def __init__(
        self, network: WsNetwork, socket: Socket, transport: asyncio.Transport, path: str
    ) -> None:
        protocol = transport.get_protocol()
        assert isinstance(protocol, BaseProtocol)
        transport.set_write_buffer_limits(high=PAUSE_BYTES, low=HIGH_WATER_BYTES - 1)
        self.path = path
        self.remote = str(transport.get_extra_info("peername"))
        self._network = network
        self._socket = socket
        self._transport = transport
        self._protocol = protocol
        self._finishing = False
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def try_send(self, frame: bytes) -> bool:
        transport = self._transport
        if self._finishing or transport.is_closing():
            raise PipeClosed("the connection is closed")
        if transport.get_write_buffer_size() >= HIGH_WATER_BYTES or self._protocol.writing_paused:
            return False
        sending = self._socket.send_bytes(frame)
        try:
            sending.send(None)  # writes; it would wait only for a paused transport
        except StopIteration:
            return True
        except (ConnectionError, RuntimeError) as error:
            raise PipeClosed(f"the connection is closed: {error}") from error
        raise AssertionError("a write to a transport that is not paused waits")

    async def send(self, frame: bytes) -> None:
        if self._finishing or self._transport.is_closing():
            raise PipeClosed("the connection is closed")
        try:
            await self._socket.send_bytes(frame)
        except (ConnectionError, RuntimeError) as error:
            raise PipeClosed(f"the connection is closed: {error}") from error

    async def receive(self) -> bytes:
        if self._finishing:
            raise PipeClosed("the connection is closed")
        try:
            message = await self._socket.receive()
        except (ConnectionError, RuntimeError) as error:
            self.abort()
            raise PipeClosed(f"the connection is closed: {error}") from error
        if message.type is aiohttp.WSMsgType.BINARY:
            data = message.data
            return data if type(data) is bytes else bytes(data)
        if message.type is aiohttp.WSMsgType.TEXT:
            raise FrameError("a text message; frames are binary")
        self.abort()
        if message.type is aiohttp.WSMsgType.ERROR:
            if isinstance(message.data, aiohttp.WebSocketError):
                raise FrameError(f"not a frame: {message.data}")  # aiohttp has told the other side
            raise PipeClosed(f"the connection failed: {message.data}")
        if message.type is aiohttp.WSMsgType.CLOSE and message.data in _REPROACHES:
            raise MalformedFrame(f"the other side could not read it: {_REPROACHES[message.data]}")
        raise PipeClosed("the other side closed the connection")

    def buffered_bytes(self) -> int:
        return 0 if self._transport.is_closing() else self._transport.get_write_buffer_size()

    def abort(self) -> None:
        if self._finishing:
            return
        self._finishing = True
        self._transport.abort()
        self._network.spawn(self._finish(CLOSE_TIMEOUT_S))

    async def close(self, timeout_s: float) -> None:
        if self._finishing:
            return
        self._finishing = True
        await self._finish(timeout_s)

    async def wait_closed(self) -> None:
        await asyncio.shield(self._closed)

    async def _finish(self, timeout_s: float) -> None:
        """Let aiohttp tidy up. On an aborted transport nothing of this waits for the peer."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._socket.close()
        except (TimeoutError, ConnectionError, RuntimeError):
            pass  # it was closing already, or the peer does not answer: the abort ends it
        finally:
            self._transport.abort()
            self._network.forget(self)
            if not self._closed.done():
                self._closed.set_result(None)


class WsNetwork:
    """The Network port over WebSockets. Made and closed on the loop that uses it; `close` before the loop ends."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None
        self._serving: list[tuple[asyncio.Server, web.AppRunner]] = []
        self._pipes: dict[int, WsPipe] = {}  # by id(): every pipe that is not finished
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._closed = False

    async def dial(self, address: str, path: str, timeout_s: float) -> WsPipe:
        if self._closed:
            raise PipeClosed("the network is closed")
        slot: list[asyncio.Transport] = []
        token = _dialled.set(slot)
        try:
            async with asyncio.timeout(timeout_s):
                socket = await self._client().ws_connect(
                    f"http://{address}{path}",
                    compress=0,
                    heartbeat=None,
                    autoclose=False,
                    max_msg_size=MESSAGE_BYTES_MAX,
                    timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_TIMEOUT_S),
                )
        except TimeoutError:
            raise PipeClosed(f"no connection to {address} within {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise PipeClosed(f"no connection to {address}: {_reason(error)}") from error
        finally:
            _dialled.reset(token)
        return self._keep(WsPipe(self, socket, slot[-1], path))

    async def serve(
        self,
        address: str,
        on_pipe: OnPipe,
        app: web.Application | None = None,
    ) -> str:
        """Listen, beside the routes that `app` has already.

        Raises: OSError: the address is not to be had.
        """
        if app is None:
            app = web.Application()
        self.attach(app, on_pipe)
        runner = web.AppRunner(app, shutdown_timeout=SHUTDOWN_TIMEOUT_S, handle_signals=False)
        await runner.setup()
        loop = asyncio.get_running_loop()
        server, most = runner.server, connections_max()
        assert server is not None

        def connected() -> asyncio.Protocol:
            if len(server.connections) >= most:
                return _Refused()
            return ServerProtocol(
                server,
                loop=loop,
                access_log=None,  # type: ignore[arg-type]  # it may be; only its annotation says otherwise
                max_line_size=REQUEST_LINE_BYTES_MAX,
                keepalive_timeout=KEEPALIVE_TIMEOUT_S,
                auto_decompress=False,  # a value is kept as it was sent, and no few bytes become many
            )

        host, port = split_address(address)
        try:
            listener = await loop.create_server(connected, host, port, backlog=BACKLOG)
        except OSError:
            await runner.cleanup()
            raise
        self._serving.append((listener, runner))
        real_host, real_port = listener.sockets[0].getsockname()[:2]
        return f"[{real_host}]:{real_port}" if ":" in real_host else f"{real_host}:{real_port}"

    def attach(self, app: web.Application, on_pipe: OnPipe) -> None:
        """Add the stream paths to an application that someone else runs; its shutdown closes their WebSockets."""
        app.add_routes(self.routes(on_pipe))
        app.on_shutdown.append(self._close_pipes)

    def routes(self, on_pipe: OnPipe) -> list[web.RouteDef]:
        async def handle(request: web.Request) -> web.StreamResponse:
            return await self._upgraded(request, on_pipe)

        return [web.get(path, handle) for path in STREAM_PATHS]

    async def close(self) -> None:
        """Stop listening, end every connection, and give up what aiohttp holds."""
        self._closed = True
        serving, self._serving = self._serving, []
        if serving:  # asyncio loses what it has just accepted if the listener goes before it is made a connection
            await asyncio.sleep(ACCEPTED_S)
        for listener, runner in serving:
            listener.close()
            await runner.cleanup()
        await self._close_pipes(None)
        if self._session is not None:
            await self._session.close()
            self._session = None

    def spawn(self, work: Awaitable[None]) -> None:
        async def run() -> None:
            await work

        task = asyncio.get_running_loop().create_task(run())
        self._tasks[id(task)] = task
        task.add_done_callback(lambda done: self._tasks.pop(id(done), None))

    def forget(self, pipe: WsPipe) -> None:
        self._pipes.pop(id(pipe), None)

    def _keep(self, pipe: WsPipe) -> WsPipe:
        self._pipes[id(pipe)] = pipe
        return pipe

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=_Connector(limit=0, force_close=True),
                timeout=ClientTimeout(total=None),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
            )
        return self._session

    async def _upgraded(self, request: web.Request, on_pipe: OnPipe) -> web.StreamResponse:
        if "Origin" in request.headers:
            raise web.HTTPForbidden(text="streams are not for web pages")
        socket: web.WebSocketResponse[bool] = web.WebSocketResponse(
            compress=False,
            heartbeat=None,
            autoclose=False,
            max_msg_size=MESSAGE_BYTES_MAX,
            timeout=CLOSE_TIMEOUT_S,
        )
        try:
            await socket.prepare(request)
        except (
            ConnectionError
        ):  # gone before it was answered; aiohttp cannot finish a socket that was not begun
            return web.Response()
        transport = request.transport
        if transport is None or self._closed:
            return socket
        pipe = self._keep(WsPipe(self, socket, transport, request.path))
        try:
            await on_pipe(request.path, pipe)
            await pipe.wait_closed()
        except (KVError, FrameError):
            pass  # a refused handshake, or the end of the connection; on_pipe has said what it wanted to
        finally:
            pipe.abort()
        return socket

    async def _close_pipes(self, _: web.Application | None) -> None:
        for pipe in list(self._pipes.values()):
            pipe.abort()
        if self._tasks:
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)


def _reason(error: Exception) -> str:
    """In the system's words where there are any: aiohttp's say the address twice and speak of TLS."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else None
    if isinstance(cause, gaierror):  # its numbers are not those of errno
        return str(cause.strerror).lower()
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number).lower() if number else str(error)


def split_address(address: str) -> tuple[str, int]:
    """("host", port) of "host:port" or "[v6]:port". Raises: ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        raise ValueError(f"not an address of the form host:port: {address!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)
