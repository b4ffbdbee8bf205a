"""The OpenAPI 3.1 document of the gateway. Pure; a test holds it against the routes."""

from __future__ import annotations

import functools
from typing import Any, Final

from kvstore import limits, operations
from kvstore.adapters import http_watch

API_VERSION: Final = "1"
_Json = dict[str, Any]

_BASE64: Final[_Json] = {"type": "string", "contentEncoding": "base64"}
_VERSION: Final[_Json] = {
    "type": "string",
    "pattern": "^[0-9]+$",
    "description": "A commit version: a 64-bit number, as a string because it exceeds 2^53.",
}
_ERROR: Final[_Json] = {
    "type": "object",
    "required": ["code", "message", "retryable", "maybe_committed"],
    "properties": {
        "code": {"type": "string", "description": "Stable; match on it, never on the message."},
        "message": {"type": "string"},
        "retryable": {
            "type": "boolean",
            "description": "The same request may well succeed if sent again.",
        },
        "maybe_committed": {
            "type": "boolean",
            "description": "What was asked for may have happened.",
        },
        "details": {"type": "object"},
    },
}
_TIMEOUT: Final[_Json] = {
    "name": "timeout",
    "in": "query",
    "schema": {"type": "string"},
    "description": "Such as 500ms or 2s.",
}
_AT: Final[_Json] = {
    "name": "at",
    "in": "query",
    "schema": _VERSION,
    "description": "Read as of this version.",
}
_STALENESS: Final[_Json] = {
    "name": "max_staleness",
    "in": "query",
    "schema": {"type": "string"},
    "description": "Such as 2s: any replica may answer, and what was acknowledged so long ago is seen.",
}
_KEY: Final[_Json] = {
    "name": "key",
    "in": "path",
    "required": True,
    "schema": {"type": "string"},
    "description": f"1 to {limits.KEY_BYTES_MAX} bytes, not 0xFF first, percent-encoded; %2F and %00 are kept as they are.",
}


@functools.cache
def document() -> _Json:
    """The document, as plain JSON values. Do not change what it returns."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "Kvorum", "version": API_VERSION, "description": _DESCRIPTION},
        "paths": {
            "/v1/kv/{key}": {"get": _get(), "head": _get(), "put": _put(), "delete": _delete()},
            "/v1/kv": {"get": _scan()},
            "/v1/txn": {"post": _txn()},
            "/v1/watch": {"get": _watch()},
            "/v1/admin/identity": {
                "get": _plain(
                    "Which cluster and node this is, whether it is empty, and which members it ever heard."
                )
            },
            "/v1/admin/init": {"post": _init()},
            "/v1/admin/status": {"get": _plain("Everything the node knows of itself.")},
            "/v1/admin/ranges": {"get": _plain("The ranges of which the node holds a replica.")},
            "/v1/admin/nodes": {"get": _plain("The nodes that this one knows.")},
            "/v1/admin/locks": {
                "get": _plain(
                    "Locks of transactions in ranges that are led here: holders and waiters."
                )
            },
            "/v1/openapi.json": {"get": _plain("This document.")},
            "/health/live": _health("The process works; restart it if this fails."),
            "/health/ready": _health("The node serves; send it requests only while it does."),
            "/metrics": {"get": _text("Metrics of Prometheus.", "text/plain")},
            "/": {"get": _text("A status page for people.", "text/html")},
        },
        "components": {
            "schemas": {"Error": _ERROR, "Version": _VERSION, "Operation": _operation()}
        },
    }


_DESCRIPTION: Final = (
    "A strictly serializable key-value store. Any node answers for any key. Keys are percent-encoded in paths and "
    "queries, values are raw bodies; in JSON, bytes are base64 and versions are strings. Every error is an Error, "
    "but for what is not well-formed HTTP: that is 400 with plain text."
)


def _answer(description: str, content: _Json | None = None, headers: _Json | None = None) -> _Json:
    answer: _Json = {"description": description}
    if content is not None:
        answer["content"] = content
    if headers is not None:
        answer["headers"] = headers
    return answer


def _json_content(schema: _Json) -> _Json:
    return {"application/json": {"schema": schema}}


def _object(**properties: _Json) -> _Json:
    return {"type": "object", "properties": properties}


def _with_errors(answers: _Json) -> _Json:
    error = _answer(
        "Refused or failed; the body says why.",
        _json_content({"$ref": "#/components/schemas/Error"}),
    )
    return {**answers, "default": error}


_VERSION_HEADERS: Final[_Json] = {"X-Kvorum-Version": {"schema": _VERSION}}
_RAW: Final[_Json] = {"application/octet-stream": {}}


def _get() -> _Json:
    return {
        "summary": "Read a key; linearizable, or as of a version.",
        "parameters": [_KEY, _AT, _STALENESS, _TIMEOUT],
        "responses": _with_errors(
            {"200": _answer("The value.", _RAW, _VERSION_HEADERS), "404": _answer("No such key.")}
        ),
    }


def _put() -> _Json:
    conditions = [
        {
            "name": "if_version",
            "in": "query",
            "schema": _VERSION,
            "description": "Only over this version.",
        },
        {
            "name": "if_absent",
            "in": "query",
            "schema": {"type": "boolean"},
            "description": "Only if absent.",
        },
    ]
    return {
        "summary": "Write a key.",
        "parameters": [_KEY, *conditions, _TIMEOUT],
        "requestBody": {"required": True, "content": _RAW},
        "responses": _with_errors(
            {
                "200": _answer(
                    "Written.", _json_content(_object(version=_VERSION)), _VERSION_HEADERS
                ),
                "412": _answer("The condition does not hold; details.version is the present one."),
            }
        ),
    }


def _delete() -> _Json:
    answer = _answer(
        "Deleted, or was absent.", _json_content(_object(version=_VERSION)), _VERSION_HEADERS
    )
    return {
        "summary": "Delete a key.",
        "parameters": [_KEY, _TIMEOUT],
        "responses": _with_errors({"200": answer}),
    }


def _scan() -> _Json:
    texts = {
        "prefix": "Keys that begin with it.",
        "start": "The first key; with end, instead of prefix.",
        "end": "The key before which to stop.",
    }
    parameters = [
        {"name": name, "in": "query", "schema": {"type": "string"}, "description": text}
        for name, text in texts.items()
    ]
    limit = {
        "type": "integer",
        "maximum": operations.SCAN_ROWS_MAX,
        "default": operations.SCAN_ROWS_DEFAULT,
    }
    parameters += [
        {"name": "limit", "in": "query", "schema": limit},
        {"name": "reverse", "in": "query", "schema": {"type": "boolean"}},
        {"name": "keys_only", "in": "query", "schema": {"type": "boolean"}},
        _AT,
        _STALENESS,
        _TIMEOUT,
    ]
    page = _object(
        items={"type": "array", "items": _object(key=_BASE64, value=_BASE64)},
        more={"type": "boolean"},
        next={
            "anyOf": [_BASE64, {"type": "null"}],
            "description": "The next page's start (end, if reverse), beside the other bound; not beside a prefix.",
        },
        version=_VERSION,
    )
    return {
        "summary": "A page of keys in order, all at one version; go on with `next` and `at=version`.",
        "parameters": parameters,
        "responses": _with_errors({"200": _answer("A page.", _json_content(page))}),
    }


def _txn() -> _Json:
    body = _object(
        operations={"type": "array", "items": {"$ref": "#/components/schemas/Operation"}},
        idempotency_key={
            "type": "string",
            "description": "A second run gives the first one's results.",
        },
    )
    result = _object(
        version={
            "anyOf": [_VERSION, {"type": "null"}],
            "description": "null if nothing was written, or by an earlier run with this idempotency_key.",
        },
        results={
            "type": "array",
            "items": {"type": "object"},
            "description": f"At most {operations.RESULTS_BYTES_MAX >> 20} MiB of keys and values; 413 if there would be more.",
        },
    )
    return {
        "summary": "Run operations in order in one transaction: all of them or none.",
        "requestBody": {"required": True, "content": _json_content(body)},
        "parameters": [_TIMEOUT],
        "responses": _with_errors({"200": _answer("Committed.", _json_content(result))}),
    }


def _watch() -> _Json:
    texts = {
        "key": "Watch this key; or a prefix.",
        "prefix": "Watch the keys that begin with it; empty: all.",
        "wait": f"How long to wait for events, such as 500ms; {http_watch.WAIT_S:g}s, at most {http_watch.WAIT_S_MAX:g}s.",
    }
    parameters = [
        {"name": name, "in": "query", "schema": {"type": "string"}, "description": text}
        for name, text in texts.items()
    ]
    limit = {
        "type": "integer",
        "maximum": http_watch.EVENTS_MAX,
        "default": http_watch.EVENTS_DEFAULT,
        "description": "No further commit is begun beyond it; a commit comes whole.",
    }
    parameters += [
        {
            "name": "since",
            "in": "query",
            "schema": _VERSION,
            "description": "Events above this version; absent: from now on. 410 if they are no longer kept.",
        },
        {"name": "limit", "in": "query", "schema": limit},
    ]
    event = _object(
        type={"enum": ["put", "delete"]},
        key=_BASE64,
        value={"anyOf": [_BASE64, {"type": "null"}]},
        version=_VERSION,
    )
    answer = _object(events={"type": "array", "items": event}, version=_VERSION)
    return {
        "summary": "What was written after `since`, in the order of commit; waits for something. Go on with since=version.",
        "parameters": parameters,
        "responses": _with_errors({"200": _answer("Events, maybe none.", _json_content(answer))}),
    }


def _operation() -> _Json:
    def shape(op: str, required: list[str], **properties: _Json) -> _Json:
        return {
            "type": "object",
            "required": ["op", *required],
            "properties": {"op": {"const": op}, **properties},
            "additionalProperties": False,
        }

    maybe = {"anyOf": [_BASE64, {"type": "null"}]}
    yes_no, whole = {"type": "boolean"}, {"type": "integer"}
    form = {"enum": ["ascii", "int64"]}
    lock = {"enum": ["exclusive", "shared", None]}
    return {
        "oneOf": [
            shape("get", ["key"], key=_BASE64, lock=lock),
            shape("put", ["key", "value"], key=_BASE64, value=_BASE64),
            shape("delete", ["key"], key=_BASE64),
            shape("delete_range", ["start", "end"], start=_BASE64, end=_BASE64),
            shape("increment", ["key"], key=_BASE64, by=whole, format=form),
            shape("min", ["key", "value"], key=_BASE64, value=whole, format=form),
            shape("max", ["key", "value"], key=_BASE64, value=whole, format=form),
            shape("append_if_fits", ["key", "value"], key=_BASE64, value=_BASE64, limit=whole),
            shape("compare_and_clear", ["key", "expected"], key=_BASE64, expected=_BASE64),
            shape("put_versionstamped_key", ["prefix", "value"], prefix=_BASE64, value=_BASE64),
            shape("put_versionstamped_value", ["key"], key=_BASE64, head=_BASE64),
            shape("scan", [], start=_BASE64, end=maybe, prefix=maybe, limit=whole, reverse=yes_no),
            shape("check", ["key"], key=_BASE64, value=maybe),
        ]
    }


def _init() -> _Json:
    return {
        "summary": "Make this empty node a member of a new cluster; `kvctl init` sends it to each.",
        "requestBody": {"required": True, "content": _json_content({"type": "object"})},
        "responses": _with_errors({"200": _answer("Done, or was done before.")}),
    }


def _plain(summary: str) -> _Json:
    content = _json_content({"type": "object"})
    return {"summary": summary, "responses": _with_errors({"200": _answer("JSON.", content)})}


def _health(summary: str) -> _Json:
    answers = {"200": _answer("Yes."), "503": _answer("No.")}
    return {method: {"summary": summary, "responses": answers} for method in ("get", "head")}


def _text(summary: str, content_type: str) -> _Json:
    return {"summary": summary, "responses": {"200": _answer("OK.", {content_type: {}})}}
