"""What replicas hold: I16, I17, I18, RC1.

- I17: equal entries at equal index have equal effects, row by row, on every replica. A replica that begins, after a
  restart or with a snapshot, holds exactly the rows of its applied index: a sum over the rows' hashes is kept for each
  index. What is in memory is what the rows say.
- I18: an entry writes rows of keys of its own range alone, and looks at no others: a neighbour's differ from node to node.
- I16: ranges partition the key space; ranges of one id and version have one span.
- RC1: a row of a node's read cache is the engine's row.

The rows that the log stands for are kept once for the cluster, as the first replica to apply an entry wrote them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any, Final

from kvstore.read_cache import UNKNOWN
from kvstore.sim.observers.report import Report
from kvstore.snapshots import spans_of
from txn import keycode
from txn.apply import SCAN_BYTES, Overlay
from txn.state import RangeRow, RangeState

Rows = Mapping[bytes, bytes | None]
Spans = dict[bytes, tuple[bytes, bytes]]  # family -> its rows of a range

MASK: Final = (1 << 64) - 1


class EntryRows(Overlay):
    """The rows of one entry, over those of its write batch. `look` sees every key that is asked for."""

    __slots__ = ("_batch", "_spans", "strange")

    def __init__(self, batch: Overlay, spans: Spans) -> None:
        super().__init__(batch)
        self._batch = batch
        self._spans = spans
        self.strange: list[bytes] = []  # rows of other ranges that were looked at

    def get(self, key: bytes, /) -> bytes | None:
        low, high = self._spans.get(key[:1], (b"", b""))
        if not low <= key < high:
            self.strange.append(key)
        if key in self.rows:
            return self.rows[key]
        return self._batch.get(key)

    def scan(
        self, start: bytes, end: bytes | None, *, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        low, high = self._spans.get(start[:1], (b"", b""))
        if not (low <= start and end is not None and end <= high):
            self.strange.append(start)
        self.bytes -= SCAN_BYTES  # the batch below counts the same scan
        return super().scan(start, end, reverse=reverse)

    def close(self) -> None:
        """The entry is applied: its rows go into the batch."""
        self._batch.rows.update(self.rows)
        self._batch.bytes += self.bytes


class StoredRows:
    """The rows of a machine's engine, for `RangeState.load`, past every fault."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows  # a SortedDict

    def get(self, key: bytes, /) -> bytes | None:
        data: bytes | None = self._rows.get(key)
        return data

    def scan(
        self, start: bytes, end: bytes | None, *, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        for key in self._rows.irange(start, end, inclusive=(True, False), reverse=reverse):
            yield key, self._rows[key]


class _Range:
    """The rows of one range as its log has them."""

    __slots__ = ("effects", "hashes", "index", "sums", "total")

    def __init__(self, index: int) -> None:
        self.index = index
        self.hashes: dict[bytes, int] = {}  # of each row
        self.total = 0  # their sum
        self.sums: dict[int, int] = {}  # index -> the sum there
        self.effects: dict[int, int] = {}  # index -> hash of what the entry wrote, in order


class Contents:
    """See the module."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._ranges: dict[int, _Range] = {}
        self._spans: dict[tuple[int, bytes, bytes], Spans] = {}
        self._tiled: list[tuple[int, int, bytes, bytes]] = []

    def spans(self, row: RangeRow) -> Spans:
        key = (row.range_id, row.start, row.end)
        found = self._spans.get(key)
        if found is None:
            oracle = keycode.node_row(keycode.ORACLE, row.range_id)
            spans = {low[:1]: (low, high) for low, high in spans_of(row)}
            found = self._spans[key] = {**spans, keycode.ORACLE: (oracle, oracle + b"\x00")}
        return found

    # -- I17: a replica begins

    def begins(self, node: str, state: RangeState, rows: Any) -> None:
        """A replica that was opened, or got a snapshot. rows: all rows of its machine."""
        row = state.row
        found: dict[bytes, int] = {}
        for key, data in self._own(row, rows):
            found[key] = _hash(key, data)
        total = sum(found.values()) & MASK
        known = self._ranges.get(row.range_id)
        if known is None:
            known = self._ranges[row.range_id] = _Range(row.applied_index)
            known.hashes, known.total = found, total
            known.sums[row.applied_index] = total
            return
        expected = known.sums.get(row.applied_index)
        if expected != total:
            what = "its rows are not those of this index"
            if row.applied_index == known.index:
                odd = [key for key in (*found, *known.hashes) if _odd(key, found, known.hashes)]
                what += f": {sorted(dict.fromkeys(odd))[:4]}"
            self._report.broken("I17", what, group=row.range_id, index=row.applied_index, node=node)

    def _own(self, row: RangeRow, rows: Any) -> Iterable[tuple[bytes, bytes]]:
        stored = StoredRows(rows)
        for low, high in self.spans(row).values():
            yield from stored.scan(low, high)

    # -- I17, I18: an entry is applied

    def applied(
        self, node: str, row: RangeRow, index: int, rows: Rows, strange: list[bytes]
    ) -> bool:
        """One entry's rows. Returns whether this is the first replica that applies it."""
        group = row.range_id
        if strange:
            what = f"applying looks at rows of another range: {strange[0]!r}"
            self._report.broken("I18", what, group=group, index=index, node=node)
        effect = _effect(rows) if rows else 0
        known = self._ranges.get(group)
        if known is None:
            known = self._ranges[group] = _Range(index - 1)
        other = known.effects.setdefault(index, effect)
        if index <= known.index:
            if other != effect:
                what = f"it writes other rows than elsewhere: {list(rows)[:4]}"
                self._report.broken("I17", what, group=group, index=index, node=node)
            return False
        known.index = index
        if rows:
            self._write(node, row, index, known, rows)
        known.sums[index] = known.total
        return True

    def _write(self, node: str, row: RangeRow, index: int, known: _Range, rows: Rows) -> None:
        spans, hashes, total = self.spans(row), known.hashes, known.total
        for key, data in rows.items():
            low, high = spans.get(key[:1], (b"", b""))
            if not low <= key < high:
                what = f"a row of another range is written: {key!r}"
                self._report.broken("I18", what, group=row.range_id, index=index, node=node)
            if data is None:
                total -= hashes.pop(key, 0)
            else:
                new = _hash(key, data)
                total += new - hashes.get(key, 0)
                hashes[key] = new
        known.total = total & MASK

    # -- between turns

    def compare_memory(self, node: str, state: RangeState, rows: Any) -> None:
        """I17: the undecided in memory is what the rows say. Not while a write batch is being built."""
        fresh = RangeState(state.row)
        fresh.load(StoredRows(rows))
        mine, stored = _memory(state), _memory(fresh)
        if mine != stored:
            names = [name for name in mine if mine[name] != stored[name]]
            what = f"memory is not what the rows say: {', '.join(names)}"
            self._report.broken(
                "I17", what, group=state.row.range_id, index=state.row.applied_index, node=node
            )

    def compare_cache(self, node: str, cached: Mapping[bytes, bytes], rows: Any) -> None:
        """RC1. rows: of the node's machine."""
        for key, row in cached.items():
            if row is not UNKNOWN and row != rows.get(key):
                self._report.broken(
                    "RC1", f"the cached row {key!r} is not the stored one", node=node
                )
                return

    def compare_ranges(self, rows: Iterable[RangeRow], ranges: Collection[int] = ()) -> None:
        """I16, over all replicas that are there: each range's newest version. ranges: of more nodes than a range has replicas,
        those that run may have none of some; then only the rest is looked at.
        """
        found = sorted((each.range_id, each.version, each.start, each.end) for each in rows)
        if found == self._tiled:
            return
        self._tiled = found
        newest: dict[int, tuple[int, bytes, bytes]] = {}
        for number, version, start, end in found:
            other = newest.get(number)
            if other is not None and other[0] == version and other != (version, start, end):
                self._report.broken("I16", f"two spans in version {version}", group=number)
            newest[number] = (version, start, end)
        if any(number not in newest for number in ranges):
            return
        at: bytes | None = b""
        for start, end, number in sorted((start, end, n) for n, (_, start, end) in newest.items()):
            if start != at:
                what = f"the range before ends at {at!r}, this one starts at {start!r}"
                self._report.broken("I16", what, group=number)
            at = end or None
        if at is not None and newest:
            self._report.broken("I16", f"nothing holds the keys from {at!r} on")


def _hash(key: bytes, data: bytes) -> int:
    whole = b"%d,%b%b" % (len(key), key, data)
    return int.from_bytes(blake2b(whole, digest_size=8).digest(), "big")


def _effect(rows: Rows) -> int:
    parts: list[bytes] = []
    for key, data in rows.items():
        parts += (b"%d,%d," % (len(key), -1 if data is None else len(data)), key, data or b"")
    return int.from_bytes(blake2b(b"".join(parts), digest_size=8).digest(), "big")


def _odd(key: bytes, one: dict[bytes, int], other: dict[bytes, int]) -> bool:
    return one.get(key) != other.get(key)


def _memory(state: RangeState) -> dict[str, Any]:
    """What `RangeState` mirrors, without what is volatile."""
    parts = {
        (txn_id, locus): part.row
        for txn_id, loci in state.parts.items()
        for locus, part in loci.items()
    }
    return {
        "parts": parts,
        "intents": {key: (part.txn_id, part.locus) for key, part in state.intents.items()},
        "point guards": {key: sorted(each) for key, each in state.point_guards.items()},
        "span guards": {
            (part.txn_id, part.locus): sorted(each.spans)
            for part, each in state.span_guards.items()
        },
        "staged records": dict(state.staged),
        "outbox": dict(state.outbox),
        "the oracle's bound": state.oracle_hi,
    }
