"""What follows from a history of reads and writes: which transactions committed, what is wrong at once, and edges.

A register shows one version, so the order of versions must be found: the first is None, before all others; who read v and
wrote w put w after v; a write that began after v was seen or acknowledged is after v in real time (those edges are marked,
and count for anomalies of real time only); and commit versions tell all of it, where they are known.
A transaction's last write of a key is its version of it; its first read of a key, before its own writes, is what counts.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import Final, NamedTuple

from kvstore.testing.checkers.anomaly import Anomaly, BadHistory, Findings, label, quoted
from kvstore.testing.checkers.graph import ONWARD, RW, RW_TIMED, WR, WW, Graph
from kvstore.testing.history import FOREVER, MicroTxn, Outcome

WW_READ: Final = "{0} wrote {2} = {3}, which {1} read before it wrote {4}"
WW_VERSION: Final = "{0} wrote {2} = {3} at version {4}, and {1} wrote {5} next, at version {6}"
WR_READ: Final = "{0} wrote {2} = {3}, and {1} read it"
RW_OVER: Final = "{0} read {2} = {3}, and {1} wrote {4} over it"
RW_LATER: Final = "{0} read {2} = {3}, which had been there before {1} began to write {4}"


class Read(NamedTuple):
    """What a transaction found in a key before its own writes; None: nothing."""

    number: int
    found: int | None


class Facts(Findings):
    """What a history says, key by key. Only committed transactions read."""

    def __init__(self, txns: Sequence[MicroTxn]) -> None:
        super().__init__(txns)
        self.writers: dict[bytes, dict[int, int]] = {}  # value -> transaction
        self.last: dict[tuple[int, bytes], int] = {}  # (transaction, key) -> its version
        self.reads: dict[bytes, list[Read]] = {}
        for number, txn in enumerate(txns):
            self._take_writes(number, txn)
        self.committed = self._find_committed()
        self.happened = bytearray(len(txns))
        for number in self.committed:
            self.happened[number] = 1

    def _take_writes(self, number: int, txn: MicroTxn) -> None:
        for what, key, value in txn.steps:
            if what == "w" and isinstance(value, int):
                writers = self.writers.setdefault(key, {})
                if value in writers:
                    whose = f"{label(writers[value])} and {label(number)}"
                    raise BadHistory(
                        f"{value} is written to {quoted(key)} by {whose}; it must be unique"
                    )
                writers[value] = number
                self.last[number, key] = value
            elif what != "r" or not (value is None or isinstance(value, int)):
                raise BadHistory(
                    f"{label(number)}: {what!r} {quoted(key)} {value!r} is no step of rw-register"
                )

    def _find_committed(self) -> list[int]:
        """The acknowledged, and the unknown whose writes a committed one has read."""
        committed = [n for n, txn in enumerate(self.txns) if txn.outcome is Outcome.OK]
        known = bytearray(len(self.txns))
        for number in committed:  # grows while we go
            for what, key, value in self.txns[number].steps:
                if what != "r" or value is None:
                    continue
                writer = self.writers.get(key, {}).get(value, number)
                if self.txns[writer].outcome is Outcome.UNKNOWN and not known[writer]:
                    if writer != number:
                        known[writer] = 1
                        committed.append(writer)
        committed.sort()
        return committed


def infer_rw_register(
    txns: Sequence[MicroTxn], graph: Graph, *, by_version: bool
) -> tuple[list[int], list[Anomaly]]:
    """Add the edges of the data to the graph. Returns: committed transactions, sorted; anomalies that need no cycle."""
    facts = Facts(txns)
    for number in facts.committed:
        _take_reads(facts, number)
    for key in sorted(facts.writers.keys() | facts.reads.keys()):
        _KeyOrder(facts, key, graph).infer(by_version=by_version)
    return facts.committed, list(facts.anomalies.values())


def _take_reads(facts: Facts, number: int) -> None:
    """Keep the transaction's first read of each key; compare the others with it and with its writes."""
    current: dict[bytes, int | None] = {}
    certain = facts.txns[number].outcome is Outcome.OK  # else None may be a read without an answer
    for what, key, value in facts.txns[number].steps:
        if what == "w":
            current[key] = value
        elif value is None and not certain:
            continue
        elif key not in current:
            current[key] = value
            facts.reads.setdefault(key, []).append(Read(number, value))
        elif current[key] != value:
            why = (
                f"{label(number)} read {quoted(key)} = {value}, and should have read {current[key]}"
            )
            facts.report("internal", key, why, number)
            current[key] = value


class _KeyOrder:
    """The versions of one key, as far as they can be ordered.

    For each version that matters there is a helper, from which edges lead to the writers of later versions.
    """

    def __init__(self, facts: Facts, key: bytes, graph: Graph) -> None:
        self._facts = facts
        self._key = key
        self._graph = graph
        self._writers = facts.writers.get(key, {})
        self._installed = [  # (writer, value) of committed transactions
            (number, value)
            for value, number in self._writers.items()
            if facts.happened[number] and facts.last[number, key] == value
        ]
        self._later: dict[int | None, int] = {}  # version -> its helper
        self._seen: dict[int, int] = {}  # version -> when it was acknowledged, or somebody's read

    def infer(self, *, by_version: bool) -> None:
        """Look at every read and every write of this key."""
        reads = [read for read in self._facts.reads.get(self._key, ()) if self._sound(read)]
        for writer, value in self._installed:
            self._graph.add(self._after(None), writer, ONWARD, ("", (value,)))
            self._saw(value, writer)
        for read in reads:
            self._add_write_after(read)
        if by_version:
            self._order_by_version()
        for read in reads:
            later = self._later.get(read.found)
            if later is not None:
                self._graph.add(read.number, later, RW, (RW_OVER, (self._key, read.found)))
        self._order_by_time(reads)

    def _after(self, value: int | None) -> int:
        if value not in self._later:
            self._later[value] = self._graph.helper()
        return self._later[value]

    def _saw(self, value: int, number: int) -> None:
        txn = self._facts.txns[number]
        if txn.outcome is Outcome.OK:
            self._seen[value] = min(self._seen.get(value, FOREVER), txn.end)

    def _sound(self, read: Read) -> bool:
        """Whether this version is one that can be ordered; reports what is wrong with it, and adds the wr edge."""
        facts, key, number, value = self._facts, self._key, read.number, read.found
        if value is None:
            return True
        saw = f"{label(number)} read {quoted(key)} = {value}"
        writer = self._writers.get(value)
        if writer is None:
            facts.report("garbage-read", key, f"{saw}; nobody wrote it", number)
            return False
        if writer == number:
            facts.report("internal", key, f"{saw} before it wrote that itself", number)
            return False
        if facts.txns[writer].outcome is Outcome.FAILED:
            why = f"{saw}, which {label(writer)} wrote, and it has failed"
            facts.report("G1a", key, why, writer, number)
            return False
        self._graph.add(writer, number, WR, (WR_READ, (key, value)))
        last = facts.last[writer, key]
        if last != value:
            why = f"{saw}, but {label(writer)} wrote {last} over it before it committed"
            facts.report("G1b", key, why, writer, number)
            return False
        self._saw(value, number)
        return True

    def _add_write_after(self, read: Read) -> None:
        """Who read a version and wrote: its version is later."""
        number, before = read
        value = self._facts.last.get((number, self._key))
        if value is None or before is None:
            return  # everything is later than None: that is there
        self._graph.add(self._after(before), number, ONWARD, ("", (value,)))
        self._graph.add(self._writers[before], number, WW, (WW_READ, (self._key, before, value)))

    def _order_by_version(self) -> None:
        facts, key = self._facts, self._key
        ordered = sorted(
            (facts.txns[writer].version, writer, value)
            for writer, value in self._installed
            if facts.txns[writer].version
        )
        for (version, writer, value), (next_version, other, over) in itertools.pairwise(ordered):
            if version == next_version:
                why = f"{label(writer)} and {label(other)} wrote {quoted(key)} at one version {version}"
                facts.report("duplicate-version", key, why, writer, other)
                continue
            self._graph.add(self._after(value), other, ONWARD, ("", (over,)))
            reason = (WW_VERSION, (key, value, version, over, next_version))
            self._graph.add(writer, other, WW, reason)

    def _order_by_time(self, reads: Sequence[Read]) -> None:
        """Readers of a version come before all writes that began after it was there. A chain of helpers, by begin."""
        txns, graph = self._facts.txns, self._graph
        writes = sorted((txns[writer].begin, writer, value) for writer, value in self._installed)
        begins = [begin for begin, _, _ in writes]
        chain = [graph.helper() for _ in writes]
        for at, (_, writer, value) in enumerate(writes):
            graph.add(chain[at], writer, ONWARD, ("", (value,)))
            if at:
                graph.add(chain[at - 1], chain[at], ONWARD)
        for read in reads:
            if read.found is not None and read.found in self._seen:
                at = bisect.bisect_right(begins, self._seen[read.found])
                if at < len(chain):
                    why = (RW_LATER, (self._key, read.found))
                    graph.add(read.number, chain[at], RW_TIMED, why)
