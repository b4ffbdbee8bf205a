"""What all nodes say together: their status, and `kvctl txn locks`. Every node that one of them knows is asked."""

from __future__ import annotations

import binascii
import time
from typing import Any, Final

import msgspec

from kvstore.adapters import http_client
from kvstore.cli import health
from kvstore.errors import Unavailable

STATUS_TIMEOUT_S: Final = 3.0


class Holder(msgspec.Struct, frozen=True):
    transaction: str  # hexadecimal
    exclusive: bool
    lease_s: float  # until it ends, unless its client renews it


class Waiter(msgspec.Struct, frozen=True):
    transaction: str
    exclusive: bool
    committing: bool  # a write, which waits for a bounded time
    waits_s: float


class KeyLock(msgspec.Struct, frozen=True):
    node: int
    range: int
    key: bytes
    holders: list[Holder]
    waiters: list[Waiter]


class Locks(msgspec.Struct, frozen=True):
    locks: list[KeyLock]
    more: bool  # some node has more than it tells
    silent: list[str]  # addresses that did not answer


def reports(addresses: list[str], timeout_s: float) -> dict[str, Any]:
    """The status of every node that the addresses know, by address; None for one that does not answer."""
    deadline = time.monotonic() + timeout_s
    found: dict[str, Any] = {}
    todo = addresses
    while todo:
        left_s = max(0.1, min(STATUS_TIMEOUT_S, deadline - time.monotonic()))
        answers = http_client.request_all(todo, "GET", "/v1/admin/status", timeout_s=left_s)
        found |= {
            address: answer if isinstance(answer, dict) else None
            for address, answer in zip(todo, answers, strict=True)
        }
        named = [
            address
            for report in found.values()
            if report
            for address in health.addresses_of(report)
        ]
        todo = [address for address in dict.fromkeys(named) if address not in found]
    return found


def collect(addresses: list[str], timeout_s: float) -> Locks:
    """Of all nodes, those with waiters first. Raises: Unavailable: no node answers."""
    known = health.distinct(reports(addresses, timeout_s))
    live = [address for address, report in known.items() if report is not None]
    if not live:
        raise Unavailable("no node answers")
    answers = http_client.request_all(live, "GET", "/v1/admin/locks", timeout_s=timeout_s)
    silent = [address for address, report in known.items() if report is None]
    locks: list[KeyLock] = []
    more = False
    for address, answer in zip(live, answers, strict=True):
        if not isinstance(answer, dict):
            silent.append(address)
            continue
        more = more or bool(answer.get("more"))
        for each in answer.get("locks", []):
            try:
                given = {**each, "node": answer.get("node", 0)}
                locks.append(msgspec.convert(given, KeyLock, strict=False))
            except (msgspec.ValidationError, binascii.Error):
                silent.append(address)
                break
    locks.sort(key=lambda lock: (-len(lock.waiters), lock.key))
    return Locks(locks, more, silent)


__all__ = ["KeyLock", "Locks", "collect", "reports"]
