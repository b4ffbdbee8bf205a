"""aiohttp's end of a connection to a node, with what its own does not do: it tells whoever reads a body that the rest of it is
malformed, and logs neither what clients sent nor that they went away.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from kvstore import logs

_THEIRS = (ConnectionError, HttpProcessingError, web.RequestPayloadError)  # of the other side

log = logs.logger(__name__)


class ServerProtocol(web.RequestHandler):
    """Of one connection."""

    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        """What does not parse aiohttp queues as a message that is an error; but a body that it stands in would wait for ever.

        Nothing else comes behind a body that has not ended.
        """
        queued = len(self._messages)
        super().data_received(data)
        if len(self._messages) > queued:
            current = self._current_request
            bodies = [payload for _, payload in self._messages]
            if current is not None:
                bodies.insert(0, current.content)
            for body in bodies[:-1]:
                if not body.is_eof():
                    body.set_exception(web.RequestPayloadError("the body is malformed"))

    def log_exception(self, *_: Any, exc_info: BaseException | None = None, **__: Any) -> None:
        """Every line that aiohttp logs as an error comes here; its words may hold a request, and so may the exception's."""
        if isinstance(exc_info, _THEIRS):
            log.debug("http request broken off", exc_info=exc_info)
        else:
            log.error("http connection failed", **logs.without_data(exc_info))
