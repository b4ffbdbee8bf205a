"""Scenarios of what is kept: an open snapshot reads what it read, however long it stays open."""

from __future__ import annotations

import asyncio
from typing import Final

from msgspec import structs

from kvstore.config import NodeConfig, TxnSection
from kvstore.errors import SnapshotTooOld
from kvstore.holds import LEASE_S
from kvstore.sim.cluster import small_logs
from tests.sim.directed import HIGH, KEYS, LOW, META, Stage, play

KEY: Final = KEYS[HIGH]
RETENTION_S: Final = 2.0
WRITES: Final = 30
BETWEEN_S: Final = 0.3


def forgetful() -> NodeConfig:
    """What is older than two seconds goes, unless somebody holds it."""
    config = small_logs(NodeConfig())
    txn: TxnSection = structs.replace(config.txn, retention_s=RETENTION_S)
    return structs.replace(config, txn=txn)


def what_is_open_is_kept() -> list[str]:
    """A snapshot is open while its key is overwritten for longer than the retention, and older versions of it go."""

    async def scenario(stage: Stage) -> None:
        writer, reader = await stage.client("writer"), await stage.client("reader")
        await stage.until_led_by("n1", META, HIGH)
        await asyncio.sleep(LEASE_S)  # now the oracle knows what is held
        for value in (b"older", b"what is read"):
            await stage.put(writer, KEY, value)
        await stage.put(writer, KEYS[LOW], b"")  # it reads later than at the version that it sees

        async def reads() -> None:
            async with reader.database.snapshot() as snapshot:
                before = await snapshot.get(KEY)
                for number in range(WRITES):
                    await stage.put(writer, KEY, b"%d" % number)
                    await asyncio.sleep(BETWEEN_S)
                try:
                    after = await snapshot.get(KEY)
                except SnapshotTooOld:
                    stage.claim(False, "an open snapshot was collected from")
                else:
                    stage.claim(before == after, f"a snapshot read {before!r}, and then {after!r}")

        await reader.process.call(reads())

    return play(scenario, config=forgetful())
