"""The front door: `connect`, `open`, `transactional`. Re-exported by the package."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable
from importlib import import_module
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar, overload

from kvstore.client import TIMEOUT_S, Database, over_websockets
from kvstore.errors import InvalidArgument
from kvstore.sync import BlockingTransaction, Client
from kvstore.transactions import Transaction

P = ParamSpec("P")
R = TypeVar("R")


class Opening:
    """`async with connect(...) as db`, or `db = await connect(...)` and `await db.close()` later."""

    def __init__(self, make: Callable[[], Awaitable[Database]]) -> None:
        self._make = make
        self._database: Database | None = None

    async def __aenter__(self) -> Database:
        assert self._database is None, "one opening is for one use"
        self._database = await self._make()
        return self._database

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._database is not None:
            await self._database.close()

    def __await__(self) -> Generator[Any, None, Database]:
        return self._make().__await__()


def parse_addresses(addresses: str | Iterable[str]) -> list[str]:
    """ "host:port,host:port", or several of them. Raises: InvalidArgument."""
    given = addresses.split(",") if isinstance(addresses, str) else list(addresses)
    parsed = [address.strip() for address in given if address.strip()]
    for address in parsed:
        host, _colon, port = address.rpartition(":")
        if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise InvalidArgument(f"not an address (host:port): {address!r}")
    if not parsed:
        raise InvalidArgument("at least one address is needed")
    return parsed


def connect(
    addresses: str | Iterable[str], *, timeout: float = TIMEOUT_S, cluster: str = ""
) -> Opening:
    """A cluster: `async with kvstore.connect("127.0.0.1:7400,127.0.0.1:7401") as db`.

    Args: addresses: nodes to ask first; the others are learned from them. timeout: seconds, of each call without one of
    its own, and of connecting. cluster: refuse any other cluster than the one with this id.
    """
    parsed = parse_addresses(addresses)
    return Opening(lambda: over_websockets(parsed, timeout, cluster))


def open(  # noqa: A001 - the surface's word
    path: str | os.PathLike[str], *, timeout: float = TIMEOUT_S
) -> Opening:
    """Embedded: one node in this process, no ports, the same API: `async with kvstore.open("./data") as db`."""

    async def make() -> Database:
        embedded = import_module("kvstore.embedded")  # the whole node: only when it is wanted
        database: Database = await embedded.open_database(path, timeout_s=timeout)
        return database

    return Opening(make)


@overload
def transactional(
    fn: Callable[Concatenate[Transaction, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Database | Transaction, P], Coroutine[Any, Any, R]]: ...
@overload
def transactional(
    fn: Callable[Concatenate[BlockingTransaction, P], R],
) -> Callable[Concatenate[Client | BlockingTransaction, P], R]: ...
def transactional(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Make `fn(tx, ...)` callable with a client or with a transaction.

    With a client it owns the transaction, and retries as `run` does; with a transaction it joins that one.
    `async def` is for Database and Transaction, `def` for Client and its transactions.
    """
    if inspect.iscoroutinefunction(fn):

        @functools.wraps(fn)
        async def owning(where: Database | Transaction, *args: Any, **kwargs: Any) -> Any:
            if isinstance(where, Transaction):
                return await fn(where, *args, **kwargs)
            if isinstance(where, Database):
                return await where.run(lambda tx: fn(tx, *args, **kwargs))
            raise InvalidArgument("the first argument is a client or a transaction")

        return owning

    @functools.wraps(fn)
    def blocking(where: Client | BlockingTransaction, *args: Any, **kwargs: Any) -> Any:
        if isinstance(where, BlockingTransaction):
            return fn(where, *args, **kwargs)
        if isinstance(where, Client):
            return where.run(lambda tx: fn(tx, *args, **kwargs))
        raise InvalidArgument("the first argument is a client or a transaction")

    return blocking
