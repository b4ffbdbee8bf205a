"""The child of test_node_crash: an embedded node that writes, flushes, cuts its log, and kills itself at a chosen point.

    python -m tests.crash.node_child DIRECTORY POINT

Prints each acknowledged key on a line of its own, flushed, before anything else happens.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

import kvstore
from kvstore import embedded
from kvstore.node import Node

POINTS = ("before_flush", "after_flush", "after_cut", "in_next_writes")
ROWS = 300
VALUE = b"v" * 2_000
nodes: list[Node] = []


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Watched(Node):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        nodes.append(self)


async def write(db: Any, first: int) -> None:
    for number in range(first, first + ROWS):
        await db.put(b"k%06d" % number, b"%d " % number + VALUE)
        print(number, flush=True)


async def main(directory: str, point: str) -> None:
    setattr(embedded, "Node", Watched)  # noqa: B010  # not an attribute that the module offers
    async with kvstore.open(directory) as db:
        node = nodes[0]
        assert node.host is not None
        assert node.engine is not None
        await write(db, 0)
        if point == "before_flush":
            die()
        if point == "after_flush":
            flush = node.engine.flush

            def flush_and_die() -> None:
                flush()
                die()

            node.engine.flush = flush_and_die  # type: ignore[method-assign]
        await node.flush()
        if point == "after_cut":
            die()
        await write(db, ROWS)
        await node.flush()
        await write(db, 2 * ROWS)
        die()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
