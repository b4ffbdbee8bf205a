"""Kvorum: a distributed transactional key-value store.

    import kvstore

    async with kvstore.connect("127.0.0.1:7400,127.0.0.1:7401") as db:
        await db.put(b"k", b"v")

The names below are loaded at first use, so that a tool that needs one module does not pay for all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from kvstore import errors
    from kvstore.api import connect, open, transactional  # noqa: A004 - the surface's word
    from kvstore.batch import Batch
    from kvstore.client import ANY, Database
    from kvstore.errors import KVError
    from kvstore.reads import Entry
    from kvstore.sync import BlockingTransaction, Client
    from kvstore.transactions import Aborted, Committed, Snapshot, Transaction
    from kvstore.watches import Event, EventType, Watch

__all__ = [
    "ANY",
    "Aborted",
    "Batch",
    "BlockingTransaction",
    "Client",
    "Committed",
    "Database",
    "Entry",
    "Event",
    "EventType",
    "KVError",
    "Snapshot",
    "Transaction",
    "Watch",
    "connect",
    "errors",
    "open",
    "transactional",
]

_HOME: Final = {
    "ANY": "client",
    "Aborted": "transactions",
    "Batch": "batch",
    "BlockingTransaction": "sync",
    "Client": "sync",
    "Committed": "transactions",
    "Database": "client",
    "Entry": "reads",
    "Event": "watches",
    "EventType": "watches",
    "KVError": "errors",
    "Snapshot": "transactions",
    "Transaction": "transactions",
    "Watch": "watches",
    "connect": "api",
    "open": "api",
    "transactional": "api",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "errors":
        return import_module("kvstore.errors")
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'kvstore' has no attribute {name!r}")
    value = getattr(import_module(f"kvstore.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
