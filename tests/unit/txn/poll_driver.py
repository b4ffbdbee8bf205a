"""Polls of a range under test (txn_driver.py)."""

from __future__ import annotations

from tests.unit.txn.txn_driver import Asked, Range
from txn.messages import Changed, Changes


def poll(place: Range, since: int, start: bytes = b"", end: bytes = b"", **fields) -> Asked:
    wait_ms = fields.pop("wait_ms", 10_000)
    request = Changes(
        fields.pop("id", 0), 0, fields.pop("version", 0), since, start, end, fields.pop("rows_max", 100),
        fields.pop("bytes_max", 1 << 20), fields.pop("at", 0), wait_ms, fields.pop("watch", 0),
    )  # fmt: skip
    assert not fields
    return place.ask(request)


def events(asked: Asked) -> list[tuple[int, bytes, bytes | None]]:
    reply = asked.reply
    assert isinstance(reply, Changed), reply
    return list(zip(reply.versions, reply.keys, reply.values, strict=True))


def nothing_left(place: Range) -> bool:
    feed = place.evaluator.feed
    kept = (feed._open, feed._by_watch, feed._parked, feed._points, feed._spans, feed._searching)
    waiting = feed.node.open or feed.node.askers
    return not waiting and not any(kept) and place.state.recent.fresh is None
