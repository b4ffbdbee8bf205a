"""Claims of the gateway's long polls (kvstore/adapters/http_watch.py): who has hung up holds no place."""

from __future__ import annotations

import asyncio
from typing import Self

from aiohttp import web

from kvstore.adapters import http_server, http_watch
from tests.unit.kvstore.fake_node import FakeDatabase, FakeNode


class QuietWatch:
    """A watch of what nobody writes; it knows who waits, and when it is closed."""

    version = 7

    def __init__(self) -> None:
        self.asked, self.closed = asyncio.Event(), asyncio.Event()

    def move_on(self, _every_s: float) -> None:
        pass

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.closed.set()

    async def pull(self, _rows_max: int) -> None:
        self.asked.set()
        await asyncio.get_running_loop().create_future()


async def test_an_http_poll_whose_client_hung_up_gives_its_place_back(monkeypatch):
    database = FakeDatabase()
    watch = QuietWatch()
    database.watch = lambda **_: watch  # type: ignore[attr-defined]
    monkeypatch.setattr(http_watch, "LOOK_S", 0.01)
    app = web.Application()
    http_server.add_routes(app, FakeNode(database))
    runner = web.AppRunner(app)  # as the product's: it does not cancel the handlers of the lost
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        _reader, writer = await asyncio.open_connection(*runner.addresses[0][:2])
        writer.write(b"GET /v1/watch?prefix=&wait=60s HTTP/1.1\r\nHost: here\r\n\r\n")
        async with asyncio.timeout(10.0):
            await watch.asked.wait()
            assert not watch.closed.is_set()
            writer.close()
            await watch.closed.wait()
    finally:
        await runner.cleanup()
