"""The status page at `/`: what a node knows, as one plain HTML page without scripts. Pure."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any, Final

from kvstore.keytext import escape

SECURITY_POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"
)
REFRESH_S: Final = 5
RANGES_SHOWN_MAX: Final = 200

_STYLE: Final = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #8884; }
.good { color: #1a7f37; } .bad { color: #cf222e; } code { font-family: ui-monospace, monospace; }
@media (prefers-color-scheme: dark) { .good { color: #3fb950; } .bad { color: #ff7b72; } }
"""
_LINKS: Final = (
    "<p><a href='/v1/admin/status'>status as JSON</a> · <a href='/metrics'>metrics</a> · "
    "<a href='/v1/openapi.json'>OpenAPI</a></p>"
)
_RANGE_COLUMNS: Final = ("id", "start", "end", "role", "leader_node", "term", "commit", "applied")


def render(status: Mapping[str, Any], ready: bool, reason: str) -> str:
    """The page for a `Node.status()`. Whatever it holds is escaped."""
    verdict = (
        '<span class="good">ready</span>'
        if ready
        else f'<span class="bad">not ready</span>: {_text(reason)}'
    )
    ranges = status.get("ranges") or []
    sections = [
        f"<h1>Kvorum node {_text(status.get('node', '?'))}</h1><p role='status'>{verdict}</p>",
        _facts(status),
        f"<h2>Ranges ({len(ranges)})</h2>",
        _range_table(ranges[:RANGES_SHOWN_MAX]),
        _LINKS,
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<meta http-equiv='refresh' content='{REFRESH_S}'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>Kvorum node {_text(status.get('node', '?'))}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(sections)}</body></html>"
    )


def _facts(status: Mapping[str, Any]) -> str:
    rows = [
        (name, value)
        for name, value in status.items()
        if isinstance(value, str | int | float) and name != "node"
    ]
    for group in ("wal", "engine", "host", "peers", "refused"):
        inner = status.get(group)
        if isinstance(inner, Mapping):
            rows += [
                (f"{group}.{name}", value)
                for name, value in inner.items()
                if not isinstance(value, Mapping)
            ]
    cells = "".join(
        f"<tr><th scope='row'>{_text(name)}</th><td>{_text(value)}</td></tr>"
        for name, value in rows
    )
    return f"<table>{cells}</table>"


def _range_table(ranges: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(
        f"<th scope='col'>{_text(name.replace('_', ' '))}</th>" for name in _RANGE_COLUMNS
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td><code>{_cell(name, each.get(name, ''))}</code></td>" for name in _RANGE_COLUMNS
        )
        + "</tr>"
        for each in ranges
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(name: str, value: object) -> str:
    """Keys are base64 in a status; people get them as text."""
    if name not in ("start", "end") or not isinstance(value, str):
        return _text(value)
    try:
        return _text(escape(base64.b64decode(value, validate=True)))
    except ValueError:
        return _text(value)


def _text(value: object) -> str:
    return html.escape(str(value))
