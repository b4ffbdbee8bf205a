"""A range's rows as a snapshot: read from an engine view in slices, installed by ordinary batches (replication/DESIGN.md,
section 7).

Installation: the range row is marked `installing`, then the span is wiped; rows come in; then one batch writes the range row
of the snapshot, the configuration and no marker; then flush. A crash in between leaves the marker, which means: no state,
ask again. The host writes RESET to the log after the flush, and only then acknowledges.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import msgspec

from kvstore.errors import CorruptionError
from kvstore.ports import Engine
from replication.codec import encode_membership
from replication.probes import chance
from replication.types import Membership, SnapshotMeta
from txn import keycode
from txn.state import RangeRow, decode_range_row, encode_row

if TYPE_CHECKING:
    from kvstore.replica import Replica

SLICE_ROWS_MAX = 256
SLICE_BYTES_MAX = 192 << 10

Rows = list[tuple[bytes, bytes]]
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Rows).decode


def spans_of(row: RangeRow) -> list[tuple[bytes, bytes]]:
    """The row spans that belong to a range, family by family."""
    families = (*keycode.RAW_FAMILIES, *keycode.ESCAPED_FAMILIES)
    return [keycode.family_span(family, row.start, row.end) for family in families]


class RangeSource:
    """Chunks of one range's rows at its applied index; the range row comes first."""

    def __init__(self, engine: Engine, row: RangeRow, membership: Membership) -> None:
        self.meta = SnapshotMeta(row.applied_index, row.applied_term, membership)
        self._view = engine.snapshot()
        self._chunks = self._read(row)

    def _read(self, row: RangeRow) -> Iterator[bytes]:
        own = [
            keycode.node_row(keycode.RANGE, row.range_id),
            keycode.node_row(keycode.ORACLE, row.range_id),
        ]
        head: Rows = []
        for key in own:
            data = self._view.get(key)
            if data is not None:
                head.append((key, data))
        yield _encode(head)
        rows_max = 3 if chance("snapshot_chunks_small") else SLICE_ROWS_MAX
        for start, end in spans_of(row):
            cursor = self._view.scan(start, end)
            while rows := cursor.take(rows_max, SLICE_BYTES_MAX):
                yield _encode(rows)
            cursor.close()

    def chunk(self) -> bytes | None:
        return next(self._chunks, None)

    def close(self) -> None:
        self._chunks.close()  # type: ignore[attr-defined]  # a generator
        self._view.close()


class SinkHome(Protocol):
    """What a sink needs of the store."""

    engine: Engine

    def installed(self, replica: Replica) -> None:
        """The rows are in: what is kept outside the replica follows."""


class RangeSink:
    """Where a snapshot of one range arrives. See the module for the order of things."""

    def __init__(self, store: SinkHome, replica: Replica, meta: SnapshotMeta) -> None:
        self._store, self._replica, self._meta = store, replica, meta
        self._row: RangeRow | None = None
        row = replica.state.row
        row.installing = True
        replica.receiving = True
        engine = store.engine
        engine.write({keycode.node_row(keycode.RANGE, row.range_id): encode_row(row)})
        for start, end in spans_of(row):
            engine.delete_range(start, end)

    def chunk(self, data: bytes) -> None:
        rows = dict(_decode(data))
        if self._row is None:
            key = keycode.node_row(keycode.RANGE, self._replica.range_id)
            head = rows.pop(key, None)
            if head is None:
                raise CorruptionError("a snapshot does not begin with its range's row")
            self._row = decode_range_row(head)
        if rows:
            self._store.engine.write(rows)

    def finish(self) -> None:
        replica, meta, row = self._replica, self._meta, self._row
        assert row is not None
        row.applied_index, row.applied_term, row.installing = meta.index, meta.term, False
        config = replica.config
        config.membership = encode_membership(meta.membership)
        config.installed_index, config.installed_term = meta.index, meta.term
        self._store.engine.write(
            {
                keycode.node_row(keycode.RANGE, row.range_id): encode_row(row),
                keycode.node_row(keycode.CONFIG, row.range_id): encode_row(config),
            }
        )
        replica.membership = meta.membership
        replica.state.row = row
        replica.state.load(self._store.engine)
        replica.receiving = False
        self._store.installed(replica)

    def flush(self) -> None:
        self._store.engine.flush()

    def abort(self) -> None:
        """The marker stays; the replica has no state until another snapshot is in."""
        self._replica.receiving = False
