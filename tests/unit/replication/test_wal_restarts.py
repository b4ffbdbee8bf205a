"""Claim: what one start finds in a damaged log, the next ones find again, though nothing was written in between (W7)."""

from __future__ import annotations

import pytest

from replication.wal import Wal
from replication.wal_format import BATCH_HEADER_BYTES, RECORD_HEADER_BYTES
from tests.unit.replication.wal_driver import Node, entry

RECORDS = 3  # of the batch that is damaged


@pytest.mark.parametrize("what", ["hard state", "entry that was replaced"])
def test_a_damaged_body_before_a_torn_tail_is_found_by_every_start(what: str):
    """The torn batch says that all before it was durable: it stays as long as nothing else says so."""
    node = Node()
    node.append(1, entry(1))
    node.commit()
    node.hard(1, 7, vote=3, commit=1)
    node.append(2, entry(1, data=b"replaced"))
    node.append(2, entry(1, 2))
    batch = node.commit()
    node.append(1, entry(2))
    node.append(2, entry(2, 2))
    torn = node.write()
    assert torn is not None
    at = BATCH_HEADER_BYTES + RECORDS * RECORD_HEADER_BYTES
    if what != "hard state":
        at = batch.data.index(b"replaced")
    at += batch.offset
    node.disk.flip(batch.segment, at)
    node.disk.write(torn.segment, torn.offset + BATCH_HEADER_BYTES, bytes(8))
    node.disk.sync(torn.segment)
    found = []
    for _ in range(3):
        wal, logs = Wal.recover(node.disk, segment_bytes=node.segment_bytes)
        assert wal.recovery is not None
        found.append((wal.recovery.bodies, logs))
    bodies, logs = found[0]
    assert found[1:] == found[:1] * 2
    assert bodies == [(batch.segment, at)]
    assert logs[1].suspect == (what == "hard state")
    assert [each.term for each in logs[2].entries] == [2]
