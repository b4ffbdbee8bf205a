"""The status page at `/`: what a node knows, as one plain HTML page without scripts. Pure.

What an operator looks for comes first: the verdict, who is there, the ranges. All other figures are folded away.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
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
h1 { font-size: 1.4rem; margin-bottom: 0; } h2 { font-size: 1.05rem; margin-top: 2rem; }
section, details { overflow-x: auto; } summary { cursor: pointer; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #8884; }
.good { color: #1a7f37; } .bad { color: #cf222e; } .faint { opacity: .65; }
code { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) { .good { color: #3fb950; } .bad { color: #ff7b72; } }
"""
_LINKS: Final = (
    "<p><a href='/v1/admin/status'>status as JSON</a> · <a href='/metrics'>metrics</a> · "
    "<a href='/v1/openapi.json'>OpenAPI</a></p>"
)
_FACTS: Final = ("cluster", "address", "version", "uptime_s", "state")
_APART: Final = ("nodes", "ranges", "refused_ranges", "peer_links")  # shown in tables of their own
_RANGE_COLUMNS: Final = ("range", "start", "end", "role", "leader", "term", "commit", "applied")


def render(status: Mapping[str, Any], ready: bool, reason: str) -> str:
    """The page for a `Node.status()`. Whatever it holds is escaped."""
    name = _text(status.get("node") or "without a cluster")
    ranges = status.get("ranges") or []
    sections = [
        f"<h1>Kvorum node {name}</h1><p role='status'>{_verdict(ready, reason)}</p>",
        _facts(status),
        "<h2>Nodes</h2>",
        _node_table(status),
        f"<h2>Ranges ({len(ranges)})</h2>",
        _range_table(ranges[:RANGES_SHOWN_MAX], status.get("refused_ranges") or {}),
        _more(len(ranges) - RANGES_SHOWN_MAX),
        _figures(status),
        _LINKS,
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<meta http-equiv='refresh' content='{REFRESH_S}'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>Kvorum node {name}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(sections)}</body></html>"
    )


def _verdict(ready: bool, reason: str) -> str:
    if ready:
        return '<span class="good">ready</span>'
    return f'<span class="bad">not ready</span>: {_text(reason)}'


def _facts(status: Mapping[str, Any]) -> str:
    rows = []
    for name in _FACTS:
        if name in status:
            value = status[name]
            shown = f"{value:,.0f} s" if name == "uptime_s" else _text(value or "-")
            rows.append((f"<th scope='row'>{name.removesuffix('_s')}</th>", f"<td>{shown}</td>"))
    return _section("", rows)


def _node_table(status: Mapping[str, Any]) -> str:
    """Every node that this one knows, and whether it is connected to it."""
    links = {link.get("node"): link for link in status.get("peer_links") or []}
    rows = []
    for node in status.get("nodes") or []:
        number = node.get("node_id")
        if number == status.get("node"):
            state = '<span class="faint">this node</span>'
        elif links.get(number, {}).get("up"):
            state = '<span class="good">connected</span>'
        else:
            state = '<span class="bad">not connected</span>'
        rows.append(
            (
                f"<td>{_text(number)}</td>",
                f"<td><code>{_text(node.get('address'))}</code></td>",
                f"<td>{state}</td>",
            )
        )
    return _section(_head(("node", "address", "state")), rows)


def _range_table(ranges: Sequence[Mapping[str, Any]], refused: Mapping[str, Any]) -> str:
    rows = []
    for each in ranges:
        why = refused.get(str(each.get("id")))
        role = _text(each.get("role", ""))
        if why is not None:
            role = f'<span class="bad">refused</span>: {_text(why)}'
        leader = each.get("leader_node")
        cells = (
            _text(each.get("id", "")),
            f"<code>{_key(each.get('start', ''), '(start)')}</code>",
            f"<code>{_key(each.get('end', ''), '(end)')}</code>",
            role,
            _text(leader) if leader else '<span class="bad">none</span>',
            *(_text(each.get(name, "")) for name in ("term", "commit", "applied")),
        )
        rows.append(tuple(f"<td>{cell}</td>" for cell in cells))
    return _section(_head(_RANGE_COLUMNS), rows)


def _more(left_out: int) -> str:
    return f"<p>and {left_out} more: see the status as JSON</p>" if left_out > 0 else ""


def _figures(status: Mapping[str, Any]) -> str:
    """Everything else that is a number or a text, by group; folded, for who looks for it."""
    rows = []
    for group, inner in status.items():
        if group in _FACTS or group in _APART or group == "node":
            continue
        named = inner.items() if isinstance(inner, Mapping) else [("", inner)]
        for name, value in named:
            if isinstance(value, str | int | float):
                label = f"{group}.{name}" if name else group
                shown = _number(value) if isinstance(value, int | float) else _text(value)
                rows.append((f"<th scope='row'>{_text(label)}</th>", f"<td>{shown}</td>"))
    if not rows:
        return ""
    table = f"<table>{_body(rows)}</table>"
    return f"<details><summary>Figures ({len(rows)})</summary>{table}</details>"


def _section(head: str, rows: Sequence[Iterable[str]]) -> str:
    return f"<section><table>{head}{_body(rows)}</table></section>"


def _head(names: Iterable[str]) -> str:
    cells = "".join(f"<th scope='col'>{_text(name)}</th>" for name in names)
    return f"<thead><tr>{cells}</tr></thead>"


def _body(rows: Iterable[Iterable[str]]) -> str:
    return "<tbody>" + "".join(f"<tr>{''.join(row)}</tr>" for row in rows) + "</tbody>"


def _key(value: object, absent: str) -> str:
    """Keys are base64 in a status; people get them as text."""
    if not isinstance(value, str):
        return _text(value)
    try:
        return _text(escape(base64.b64decode(value, validate=True)) or absent)
    except ValueError:
        return _text(value)


def _number(value: float) -> str:
    """Whole numbers without a decimal point, others with four digits that count."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def _text(value: object) -> str:
    return html.escape(str(value))
