"""Claim: the OpenAPI document and the routes of the gateway are the same."""

from __future__ import annotations

import re

from aiohttp import web

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
