"""aiohttp's end of a connection to a node, with what its own does not do: it tells whoever reads a body that the rest of it is
malformed, and logs neither what clients sent nor that they went away; but at debug the words of errors, which may hold the one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from aiohttp import StreamReader, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import EMPTY_PAYLOAD

from kvstore import logs

_THEIRS = (ConnectionError, HttpProcessingError, web.RequestPayloadError)  # of the other side

log = logs.logger(__name__)


class _Messages(deque[Any]):
    """Requests of a connection that were parsed and wait for their turn, each with its body.

    What does not parse aiohttp queues as a message that is an error; but a body that it stands in would wait for ever. Nothing
    else comes behind a body that has not ended, be it queued or read by now.
    """

    __slots__ = ("_body",)

    def __init__(self) -> None:
        super().__init__()
        self._body: StreamReader = EMPTY_PAYLOAD  # the last one that began

    def append(self, message: Any, /) -> None:
        if not self._body.is_eof():
            self._body.set_exception(web.RequestPayloadError("the body is malformed"))
        _, self._body = message
        super().append(message)


class ServerProtocol(web.RequestHandler):
    """Of one connection."""

    __slots__ = ()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._messages = _Messages()
        super().connection_made(transport)

    def log_exception(self, *_: Any, exc_info: BaseException | None = None, **__: Any) -> None:
        """Every line that aiohttp logs as an error comes here; its words may hold a request, and so may the exception's."""
        if isinstance(exc_info, _THEIRS):
            log.debug("http request broken off", exc_info=exc_info)
        else:
            log.error("http connection failed", **logs.without_data(exc_info))
