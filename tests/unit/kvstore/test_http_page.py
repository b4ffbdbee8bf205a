"""Claims of the status page: the verdict, the nodes and the ranges come first and in words, the rest is folded away."""

from __future__ import annotations

import re

from kvstore.adapters import http_page

PICTURE = {
    "node": 1,
    "cluster": "c0ffee",
    "address": "h:1",
    "version": "0.1.0",
    "uptime_s": 4000.25,
    "state": "ready",
    "nodes": [{"node_id": number, "address": f"h:{number}"} for number in (1, 2, 3)],
    "peer_links": [{"node": 2, "up": True}, {"node": 3, "up": False}],
    "ranges": [
        {"id": 1, "start": "/wA=", "end": "/wE=", "role": "leader", "leader_node": 1, "term": 2},
        {"id": 2, "start": "", "end": "Zw==", "role": "refused", "leader_node": 0, "term": 0},
    ],
    "refused_ranges": {"2": "1 damaged entries; <b>"},
    "engine": {"sst_bytes": 12457.0, "share": 0.00424978},
    "host": {"turns": 11681},
}


def words_of(page):
    return " ".join(re.sub(r"<[^>]*>", " ", page.partition("</style>")[2]).split())


def test_the_page_says_who_is_connected_and_which_range_is_refused_and_why():
    words = words_of(http_page.render(PICTURE, True, "ready"))
    assert "1 h:1 this node 2 h:2 connected 3 h:3 not connected" in words
    assert r"1 \xff\x00 \xff\x01 leader 1 2" in words
    assert "2 (start) g refused : 1 damaged entries; &lt;b&gt; none 0" in words
    assert "uptime 4,000 s" in words


def test_the_page_shows_what_operators_look_for_first_and_folds_the_other_figures():
    page = http_page.render(PICTURE, False, "draining")
    assert (
        page.index("not ready") < page.index("Nodes") < page.index("Ranges") < page.index("Figures")
    )
    folded = words_of("</style>" + page[page.index("<details>") : page.index("</details>")])
    assert folded == "Figures (3) engine.sst_bytes 12,457 engine.share 0.00425 host.turns 11,681"


def test_the_page_of_a_node_without_a_cluster_is_a_page():
    waiting = {"node": 0, "cluster": "", "address": "h:1", "uptime_s": 1.0, "state": "waiting"}
    words = words_of(http_page.render(waiting, False, "waiting"))
    assert words.startswith(
        "Kvorum node without a cluster not ready : waiting cluster - address h:1"
    )
