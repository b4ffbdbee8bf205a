"""Claims: the OpenAPI document and the routes of the gateway are the same; it says which keys there are."""

from __future__ import annotations

import re

from aiohttp import web

from kvstore import limits
from kvstore.adapters import http_openapi, http_server
from tests.unit.kvstore.fake_node import FakeNode


def test_the_document_names_exactly_the_routes():
    app = web.Application()
    http_server.add_routes(app, FakeNode())
    routes = {
        (re.sub(r"\{key:.*\}", "{key}", resource.canonical), route.method.lower())
        for resource in app.router.resources()
        for route in resource
    }
    documented = {
        (path, method) for path, item in http_openapi.document()["paths"].items() for method in item
    }
    assert documented == routes


def test_the_document_says_which_keys_are_refused():
    [key] = [
        each
        for each in http_openapi.document()["paths"]["/v1/kv/{key}"]["put"]["parameters"]
        if each["in"] == "path"
    ]
    assert str(limits.KEY_BYTES_MAX) in key["description"]
    assert "0xFF" in key["description"]
