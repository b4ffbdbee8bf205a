"""Claims: a web page of another site changes nothing, whatever name it points at us; pages and programs of our own may."""

from __future__ import annotations

import pytest
from aiohttp import test_utils, web

from kvstore.adapters import http_server
from tests.unit.kvstore.fake_node import FakeDatabase, FakeNode


@pytest.fixture
def database():
    return FakeDatabase()


@pytest.fixture
async def http(database):
    app = web.Application()
    http_server.add_routes(app, FakeNode(database))
    async with test_utils.TestClient(test_utils.TestServer(app)) as client:
        yield client


@pytest.mark.parametrize(
    ("origin", "status"), [("http://evil.example", 403), ("null", 403), (None, 200)]
)
async def test_web_pages_of_other_sites_change_nothing(http, database, origin, status):
    headers = {} if origin is None else {"Origin": origin}
    assert (await http.put("/v1/kv/n", data=b"", headers=headers)).status == status
    assert (b"n" in database.rows) == (status == 200)


async def test_our_own_page_may_write(http):
    origin = f"http://{http.host}:{http.port}"
    assert (await http.put("/v1/kv/n", data=b"", headers={"Origin": origin})).status == 200


@pytest.mark.parametrize(("host", "status"), [("x:7400", 403), ("DB1.example:7400", 200)])
async def test_a_name_that_only_points_at_the_node_is_another_site(http, database, host, status):
    headers = {"Host": host, "Origin": f"http://{host}"}
    assert (await http.put("/v1/kv/n", data=b"", headers=headers)).status == status
    assert (b"n" in database.rows) == (status == 200)
