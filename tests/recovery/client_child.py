"""A client process of the recovery table's tests with real processes.

    python -m tests.recovery.client_child ENDPOINTS hold PHASE ANCHOR PARTICIPANT
    python -m tests.recovery.client_child ENDPOINTS run CRASH_POINT IDEMPOTENCY_KEY TALLY

`hold` commits a transaction and stops at a phase: it prints `reached TOKEN`, waits for a line on standard input, goes on, and
prints `committed VERSION` or `failed CODE MAYBE`. `run` draws a ticket of a tally, exactly once for its key, and prints
`ticket NUMBER`; with the crash point `before-reply` it is gone (SIGKILL) when the answer to its commit arrives and before
anybody has seen it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

import kvstore
from kvstore.client import Database
from kvstore.errors import KVError
from kvstore.transactions import Transaction
from tests.recovery.phases import Held, Phase
from txn.messages import PrepareReply

TIMEOUT_S = 25.0


def say(*words: object) -> None:
    print(*words, flush=True)


async def hold(database: Database, phase: str, anchor: str, participant: str) -> None:
    keys = anchor.encode(), participant.encode()
    await database.get_many(keys)
    held = Held(database, Phase[phase], *keys)
    committing = asyncio.ensure_future(held.commit())
    await held.reached.wait()
    say("reached", held.token)
    await asyncio.to_thread(sys.stdin.readline)
    held.release()
    try:
        say("committed", await committing)
    except KVError as error:
        say("failed", error.code, error.maybe_committed)


def die_before_reply(database: Database) -> None:
    router: Any = database.router
    send = router.send

    def sent(request: Any, key: bytes, end: bytes, deadline: float, **options: Any) -> Any:
        on_reply = options.pop("on_reply", None)

        def killed(answer: Any) -> None:
            if isinstance(answer, PrepareReply):
                os.kill(os.getpid(), signal.SIGKILL)
            on_reply(answer)

        if on_reply is not None:
            options["on_reply"] = killed
        return send(request, key, end, deadline, **options)

    router.send = sent


async def run(database: Database, crash_point: str, key: str, tally: str) -> None:
    async def ticket(tx: Transaction) -> int:
        number = int(await tx.get(tally.encode(), b"0")) + 1
        tx.put(tally.encode(), b"%d" % number)
        return number

    if crash_point == "before-reply":
        die_before_reply(database)
    say("ticket", await database.run(ticket, idempotency_key=key, timeout=TIMEOUT_S))


async def main(endpoints: str, what: str, *words: str) -> None:
    async with kvstore.connect(endpoints, timeout=TIMEOUT_S) as database:
        await {"hold": hold, "run": run}[what](database, *words)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
