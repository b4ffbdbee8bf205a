"""The HTTP gateway of a node: keys, transactions, administration, health, metrics, a status page.

It adds routes to the application that serves the node's one port, and holds nothing but counters: every request is
answered by the node's own client, so a gateway may be asked on any node. What arrives is checked before anything is
done, every refusal is JSON with a stable code, and bodies and answers are held within budgets of bytes (http_load.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, exposition

from kvstore import limits, logs, operations
from kvstore.adapters import http_load, http_openapi, http_page
from kvstore.adapters.http_load import Body, Held, Load
from kvstore.adapters.http_watch import WatchPolls
from kvstore.adapters.http_wire import (
    VERSION_HEADER,
    VERSION_MAX,
    Query,
    error_body,
    is_own_host,
    json_bytes,
    plain,
    rows_bytes,
    status_of,
    unquote,
)
from kvstore.bootstrap import InitRequest, check
from kvstore.config import HttpSection
from kvstore.errors import (
    ClientClosed,
    DeadlineExceeded,
    EngineClosed,
    InvalidArgument,
    KVError,
    NodeStopped,
    NotFound,
    NotReady,
    PermissionDenied,
    Throttled,
    TransactionTooLarge,
    ValueTooLarge,
)
from kvstore.follower_reads import STALENESS_S_MAX, checked_staleness

if TYPE_CHECKING:
    from kvstore.client import Database
    from kvstore.transactions import Transaction

ANSWER_TIMEOUT_S: Final = 30.0
REQUEST_TIMEOUT_S_MAX: Final = 300.0
READ_GRACE_S: Final = 0.25
PAGE_BYTES_MAX: Final = 4 * limits.MIB
JOINED_BYTES_MAX: Final = 64 * limits.KIB  # a longer body is not copied behind its head
_HEALTH: Final = ""  # requests that are not for data
_ADMIN: Final = "admin"
_ADMIN_BODY: Final = "admin_body"
_STOPPING: Final = ("draining", "stopped")  # states in which it takes no data, nor becomes a member
_STOPPED: Final = ("stopped",)  # and in which it answers for its health alone
_KV_PATH: Final = "/v1/kv/"
_REFUSALS: Final = {404: "unknown_path", 405: "method_not_allowed"}
_SAFE_METHODS: Final = ("GET", "HEAD", "OPTIONS")
_UNREAD: Final = "too many bytes of answers wait to be read by their clients"

_T = TypeVar("_T")
Observe = Callable[[str, str, float], None]  # (operation, outcome, seconds)
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_Answerer = Callable[[web.Request, Held], Awaitable[web.Response]]

log = logs.logger(__name__)


class NodeSurface(Protocol):
    """What the gateway needs of a node."""

    @property
    def database(self) -> Database | None: ...
    @property
    def cluster_id(self) -> str: ...
    @property
    def node_id(self) -> int: ...
    @property
    def state(self) -> str: ...
    @property
    def names(self) -> Collection[str]: ...  # hosts under which it is known, in lower case
    @property
    def registry(self) -> CollectorRegistry: ...
    def status(self) -> dict[str, Any]: ...
    def locks(self) -> dict[str, Any]: ...
    def live(self) -> bool: ...
    def ready(self) -> tuple[bool, str]: ...
    async def initialize(self, request: InitRequest) -> None: ...


class TransactionRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /v1/txn."""

    operations: list[operations.Operation]
    idempotency_key: str | None = None


def add_routes(
    app: web.Application,
    node: NodeSurface,
    observe: Observe | None = None,
    settings: HttpSection | None = None,
) -> Gateway:
    """Serve `node` on `app`. `observe` is told of every request for data, for metrics."""
    gateway = Gateway(node, observe, settings or HttpSection())
    app.middlewares.append(_typed_refusals)
    add = app.router.add_route
    for method, path, operation, handler in gateway.routes():
        add(method, path, gateway.answering(operation, handler))
    return gateway


@web.middleware
async def _typed_refusals(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """What aiohttp refuses by itself (no such path, another method, no upgrade) is JSON with a code, as all else."""
    try:
        return await handler(request)
    except web.HTTPClientError as error:
        code = _REFUSALS.get(error.status, "invalid_argument")
        text = f"{request.method} {request.path}: {error.reason.lower()}; see /v1/openapi.json"
        response = _error_response(KVError(text, code=code))
        response.set_status(error.status)
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return await _sent(request, response)


class Gateway:
    """A node's routes, and what is under way on them. Made by `add_routes`."""

    def __init__(self, node: NodeSurface, observe: Observe | None, settings: HttpSection) -> None:
        self._node = node
        self._observe = observe
        self._body_bytes_max = settings.body_bytes_max
        self._timeout_s = settings.request_timeout_s
        self._load = Load()
        self._watch_polls = WatchPolls()

    async def finish(self, timeout_s: float) -> None:
        """The node stops, as its state says: watches are answered now, what else is under way within the time."""
        self._watch_polls.waits.cut()
        await self._load.finish(timeout_s)

    def routes(self) -> list[tuple[str, str, str, _Answerer]]:
        key = _KV_PATH + r"{key:[\s\S]*}"
        return [
            ("GET", key, "get", self._get),
            ("HEAD", key, "get", self._get),
            ("PUT", key, "put", self._put),
            ("DELETE", key, "delete", self._delete),
            ("GET", "/v1/kv", "scan", self._scan),
            ("POST", "/v1/txn", "txn", self._txn),
            ("GET", "/v1/watch", "watch", self._watch),
            ("GET", "/v1/admin/identity", _ADMIN, self._identity),
            ("POST", "/v1/admin/init", _ADMIN_BODY, self._init),
            ("GET", "/v1/admin/status", _ADMIN, self._status),
            ("GET", "/v1/admin/ranges", _ADMIN, self._ranges),
            ("GET", "/v1/admin/nodes", _ADMIN, self._nodes),
            ("GET", "/v1/admin/locks", _ADMIN, self._locks),
            ("GET", "/v1/openapi.json", _ADMIN, self._openapi),
            ("GET", "/health/live", _HEALTH, self._live),
            ("HEAD", "/health/live", _HEALTH, self._live),
            ("GET", "/health/ready", _HEALTH, self._ready),
            ("HEAD", "/health/ready", _HEALTH, self._ready),
            ("GET", "/metrics", _ADMIN, self._metrics),
            ("GET", "/", _ADMIN, self._page),
        ]

    def answering(self, operation: str, handler: _Answerer) -> _Handler:
        """`handler` with its errors turned into answers, counted, and within the limits of what may be under way.

        Health is answered however busy the node is; administration and metrics have places of their own, and of them those that
        bring a body others again.
        """
        load = self._load
        others: dict[str, tuple[http_load.Places, tuple[str, ...]]] = {
            _HEALTH: (load.health, ()),
            _ADMIN: (load.admin, _STOPPED),
            _ADMIN_BODY: (load.admin_bodies, _STOPPING),
        }
        of_data = operation not in others
        places, refusing = others.get(operation, (load.data, _STOPPING))

        @functools.wraps(handler)
        async def answer(request: web.Request) -> web.StreamResponse:
            held = Held(load)
            taken = load.health if self._node.state in refusing else places  # a stop awaits none
            taken.taken += 1
            try:
                response = await respond(request, held)
                held.settle(_body_bytes(response))
                if of_data and self._node.state in _STOPPING:
                    response.force_close()  # the next one goes to another node
                return await _sent(request, response)
            finally:
                held.settle(0)
                load.left(taken)

        async def respond(request: web.Request, held: Held) -> web.Response:
            clock = asyncio.get_running_loop().time
            began, outcome = clock(), "ok"
            try:
                if self._node.state in refusing:
                    raise NodeStopped
                if places.taken > places.most:
                    raise Throttled(http_load.RETRY_AFTER_S, "too many requests are under way")
                _refuse_foreign_origin(request, self._node.names)
                return await handler(request, held)
            except http_load.NoRoom:
                outcome = Throttled.code
                return _error_response(Throttled(http_load.RETRY_AFTER_S, _UNREAD))
            except KVError as error:
                told = NodeStopped() if self._lost_by_stop(error) else error
                outcome = told.code
                return _error_response(told)
            except (asyncio.CancelledError, ConnectionError, web.HTTPException):
                outcome = "gone"  # the caller went away, or aiohttp has its own answer
                raise
            except Exception as error:  # a bug of ours is logged, at debug in words that may hold data, and answered
                outcome = "internal_error"
                resource = request.match_info.route.resource
                route = (
                    resource.canonical if resource is not None else ""
                )  # the path would have the user's key
                fields = {"route": route, "method": request.method, **logs.without_data(error)}
                log.error("http request failed", **fields)
                log.debug("http request failed", exc_info=error)
                return _error_response(_internal_error(request, error))
            finally:
                if of_data and self._observe is not None:
                    self._observe(f"http_{operation}", outcome, clock() - began)

        return answer

    def _lost_by_stop(self, error: KVError) -> bool:
        """Whether it says no more than that the node's own client or engine is closed."""
        closed = isinstance(error, ClientClosed | EngineClosed) and not error.maybe_committed
        return closed and self._node.state in _STOPPED

    # --- keys and transactions

    async def _get(self, request: web.Request, held: Held) -> web.Response:
        key = _key_of(request)
        query = Query(request.rel_url.raw_query_string, ("at", "max_staleness", "timeout"))
        database, at = self._database(), query.integer("at", 1, VERSION_MAX)
        timeout_s, bound_s = self._timeout(query), _staleness(query)
        async with _reading(timeout_s):
            if at is None:
                entry = await database.get_entry(key, max_staleness=bound_s, timeout=timeout_s)
            else:
                entry = await database.snapshot(at, timeout=timeout_s).get_entry(key)
        if entry is None:
            raise NotFound("no such key")
        held.grow(len(entry.value))
        return web.Response(
            body=entry.value,
            content_type="application/octet-stream",
            headers={VERSION_HEADER: str(entry.version)},
        )

    async def _put(self, request: web.Request, _held: Held) -> web.Response:
        key = _key_of(request)
        query = Query(request.rel_url.raw_query_string, ("if_version", "if_absent", "timeout"))
        if_version, if_absent = query.integer("if_version", 0, VERSION_MAX), query.flag("if_absent")
        if if_version is not None and if_absent:
            raise InvalidArgument("give if_version or if_absent, not both")
        database, timeout_s = self._database(), self._timeout(query)
        too_large = ValueTooLarge(f"the value is longer than {limits.VALUE_BYTES_MAX} bytes")
        async with Body(self._load, request, limits.VALUE_BYTES_MAX, too_large) as value:
            if if_version is not None:
                version = await database.put(key, value, if_version=if_version, timeout=timeout_s)
            else:
                version = await database.put(key, value, if_absent=if_absent, timeout=timeout_s)
        return _json({"version": str(version)}, headers={VERSION_HEADER: str(version)})

    async def _delete(self, request: web.Request, _held: Held) -> web.Response:
        key = _key_of(request)
        query = Query(request.rel_url.raw_query_string, ("timeout",))
        version = await self._database().delete(key, timeout=self._timeout(query))
        return _json({"version": str(version)}, headers={VERSION_HEADER: str(version)})

    async def _scan(self, request: web.Request, held: Held) -> web.Response:
        names = (
            "prefix", "start", "end", "limit", "reverse", "keys_only", "at", "max_staleness", "timeout",
        )  # fmt: skip
        query = Query(request.rel_url.raw_query_string, names)
        database, timeout_s = self._database(), self._timeout(query)
        async with _reading(timeout_s):
            return _rows(await _scan_page(database, query, timeout_s, held))

    async def _txn(self, request: web.Request, held: Held) -> web.Response:
        query = Query(request.rel_url.raw_query_string, ("timeout",))
        database = self._database()
        too_large = TransactionTooLarge(f"the body is longer than {self._body_bytes_max} bytes")
        async with Body(self._load, request, self._body_bytes_max, too_large) as body:
            wanted = _decode(body, TransactionRequest)
            operations.check_operations(wanted.operations)
            answer = await _run(database, wanted, self._timeout(query), held)
        return _rows(answer)

    async def _watch(self, request: web.Request, held: Held) -> web.Response:
        raw_query = request.rel_url.raw_query_string
        answer = await self._watch_polls.answer(
            self._database(), raw_query, lambda: request.transport is None
        )
        for event in answer["events"]:  # who is refused asks again from the same version
            held.grow_row(len(event["key"]) + len(event["value"] or b""))
        return _rows(answer)

    # --- administration

    async def _identity(self, _request: web.Request, _held: Held) -> web.Response:
        node, status = self._node, self._node.status()
        state = str(status.get("state", ""))
        empty = not node.cluster_id and state == "waiting"
        identity = {
            "cluster_id": node.cluster_id,
            "node_id": node.node_id,
            "address": status.get("address", ""),
            "state": state,
            "empty": empty,
            "heard": status.get("heard", []),  # members that were ever connected
        }
        return _json(identity)

    async def _init(self, request: web.Request, held: Held) -> web.Response:
        too_large = InvalidArgument(f"the body is longer than {self._body_bytes_max} bytes")
        async with Body(self._load, request, self._body_bytes_max, too_large) as body:
            wanted = _decode(body, InitRequest)
        check(wanted)
        await self._node.initialize(wanted)
        return await self._identity(request, held)

    async def _status(self, _request: web.Request, _held: Held) -> web.Response:
        return _json(self._node.status())

    async def _ranges(self, _request: web.Request, _held: Held) -> web.Response:
        return _json({"node": self._node.node_id, "ranges": self._node.status().get("ranges", [])})

    async def _nodes(self, _request: web.Request, _held: Held) -> web.Response:
        status = self._node.status()
        return _json(
            {
                "node": self._node.node_id,
                "nodes": status.get("nodes", []),
                "peers": status.get("peers", {}),
            }
        )

    async def _locks(self, _request: web.Request, _held: Held) -> web.Response:
        return _json(self._node.locks())

    # --- health, metrics, pages

    async def _live(self, _request: web.Request, _held: Held) -> web.Response:
        live = self._node.live()
        return _json({"live": live}, status=200 if live else 503)

    async def _ready(self, _request: web.Request, _held: Held) -> web.Response:
        ready, reason = self._node.ready()
        answer = {"ready": ready, "reason": reason, "state": self._node.state}
        return _json(answer, status=200 if ready else 503)

    async def _metrics(self, request: web.Request, _held: Held) -> web.Response:
        try:
            encode, content_type = exposition.choose_encoder(request.headers.get("Accept", ""))
        except (TypeError, ValueError):  # a version that is none
            encode, content_type = exposition.choose_encoder("")
        return web.Response(
            body=encode(self._node.registry), headers={"Content-Type": content_type}
        )

    async def _openapi(self, _request: web.Request, _held: Held) -> web.Response:
        return _json(http_openapi.document())

    async def _page(self, _request: web.Request, _held: Held) -> web.Response:
        ready, reason = self._node.ready()
        page = http_page.render(self._node.status(), ready, reason)
        headers = {
            "Content-Security-Policy": http_page.SECURITY_POLICY,
            "X-Content-Type-Options": "nosniff",
        }
        return web.Response(text=page, content_type="text/html", headers=headers)

    # --- what handlers share

    def _database(self) -> Database:
        database = self._node.database
        if database is None:
            if self._node.cluster_id:
                raise NotReady("the node looks for the ranges of its cluster: try again")
            raise NotReady("the node is not part of a cluster yet: run `kvctl init`")
        return database

    def _timeout(self, query: Query) -> float:
        """The request's own, or the configured one."""
        return query.seconds("timeout", REQUEST_TIMEOUT_S_MAX) or self._timeout_s


def _staleness(query: Query) -> float | None:
    """Raises: InvalidArgument."""
    return checked_staleness(
        query.seconds("max_staleness", STALENESS_S_MAX), query.integer("at", 1, VERSION_MAX)
    )


async def _scan_page(
    database: Database, query: Query, timeout_s: float, held: Held
) -> dict[str, Any]:
    """One page, all of it at one version, bounded in rows and in bytes.

    {"items", "more", "next", "version"}: ask on with start=next (end=next if reverse) and at=version.
    """
    start, end, prefix = (query.bytes_of(name) for name in ("start", "end", "prefix"))
    if prefix is not None and (start is not None or end is not None):
        raise InvalidArgument("give a prefix, or start and end, not both")
    asked = query.integer("limit", 1, operations.SCAN_ROWS_MAX)
    limit = operations.SCAN_ROWS_DEFAULT if asked is None else asked
    reverse, keys_only = query.flag("reverse"), query.flag("keys_only")
    items: list[dict[str, bytes]] = []
    size_bytes, more = 0, False
    snapshot = database.snapshot(
        query.integer("at", 1, VERSION_MAX), max_staleness=_staleness(query), timeout=timeout_s
    )
    async with snapshot as view:
        async for key, value in view.scan(
            start or b"",
            end,
            prefix=prefix,
            limit=limit + 1,
            reverse=reverse,
            keys_only=keys_only,
        ):
            if len(items) >= limit or size_bytes >= PAGE_BYTES_MAX:
                more = True
                break
            held.grow_row(len(key) + len(value))
            items.append({"key": key} if keys_only else {"key": key, "value": value})
            size_bytes += len(key) + len(value)
        version = await view.version()
    last = items[-1]["key"] if more else None
    following = last if last is None or reverse else last + b"\x00"
    return {
        "items": items,
        "more": more,
        "next": following,
        "version": str(version),
    }


async def _run(
    database: Database, wanted: TransactionRequest, timeout_s: float, held: Held
) -> dict[str, Any]:
    """Raises: NoRoom, before anything is sent to be committed."""
    last: list[Transaction] = []

    async def attempt(tx: Transaction) -> list[dict[str, Any]]:
        last[:] = [tx]
        held.settle(0)  # an earlier attempt's results are gone
        held.grow(http_load.RESULT_JSON_BYTES * len(wanted.operations))
        return await operations.run_operations(
            tx, wanted.operations, operations.RESULTS_BYTES_MAX, held.grow_row
        )

    results = await database.run(attempt, timeout=timeout_s, idempotency_key=wanted.idempotency_key)
    version = last[0].commit_version if last else None
    if version is None and wanted.idempotency_key:
        results = plain(results)  # kept by an earlier run, and perhaps another program's
    return {"version": str(version) if version else None, "results": results}


@contextlib.asynccontextmanager
async def _reading(timeout_s: float) -> AsyncIterator[None]:
    """All reads of a request together have its `timeout`; a little more, for each one's own error says more than ours."""
    try:
        async with asyncio.timeout(timeout_s + READ_GRACE_S):
            yield
    except TimeoutError as error:
        raise error if isinstance(error, KVError) else DeadlineExceeded from None


def _key_of(request: web.Request) -> bytes:
    # routes match what is unescaped, but for slashes: `/v1/%6Bv/` is the path as well, and longer
    key = unquote(request.rel_url.raw_path.split("/", 3)[3], "the key")
    limits.validate_key(key)
    return key


def _decode(body: bytes, type_: type[_T]) -> _T:
    try:
        return msgspec.json.decode(body, type=type_)
    except (
        msgspec.DecodeError,
        RecursionError,
        UnicodeDecodeError,
    ) as error:  # ValidationError is a DecodeError
        raise InvalidArgument(f"malformed body: {error}") from None


def _refuse_foreign_origin(request: web.Request, names: Collection[str]) -> None:
    """A page of another site changes nothing through its reader's browser, whatever name it reaches us by.

    Its GETs are answered. Of another site's the browser shows the page nothing; but to the browser a site is a name, and who
    owns a name can let it point at us (DNS rebinding): such a page reads all that its reader's machine could. To change
    something, a request of a page must come by a name of ours. GETs are not held to that: proxies and services have names that
    we do not know.
    """
    origin = request.headers.get("Origin")
    if origin is None or request.method in _SAFE_METHODS:
        return
    host = request.headers.get("Host", "")
    if origin.partition("://")[2] != host or not is_own_host(host, names):
        raise PermissionDenied("requests of other web sites are refused")


def _internal_error(request: web.Request, error: Exception) -> KVError:
    may_have_written = request.method not in _SAFE_METHODS
    message = f"internal error ({type(error).__name__}); the node's log has more"
    return KVError(message, code="internal_error", maybe_committed=may_have_written)


def _error_response(error: KVError) -> web.Response:
    headers = {}
    if isinstance(error, Throttled):
        headers["Retry-After"] = str(max(1, round(error.retry_after)))
    return web.Response(
        status=status_of(error),
        body=error_body(error),
        content_type="application/json",
        headers=headers,
    )


async def _sent(request: web.Request, response: web.Response) -> web.Response:
    """Hand the whole answer to the system, within ANSWER_TIMEOUT_S: who does not read it must not make us keep it for ever.

    aiohttp would write it by itself, but wait without end, and not at all for the last few kilobytes.
    """
    transport = request.transport
    if transport is None:
        return response
    transport.set_write_buffer_limits(high=0)  # `write_eof` waits until nothing is left here
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            writer = await response.prepare(request)
            if writer is not None and _body_bytes(response) > JOINED_BYTES_MAX:
                writer.send_headers()
            await response.write_eof()
    except TimeoutError:
        transport.abort()
    except ConnectionError:
        pass  # the caller went away; aiohttp, which looks at it next, finds that out as well
    return response


def _body_bytes(response: web.Response) -> int:
    return len(response.body) if isinstance(response.body, bytes) else 0


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        status=status, body=json_bytes(value), content_type="application/json", headers=headers
    )


def _rows(answer: dict[str, Any]) -> web.Response:
    return web.Response(body=rows_bytes(answer), content_type="application/json")
