"""What follows from a list-append history: which transactions committed, what is wrong at once, and edges.

A read tells the order of all appends before it, so the longest read of a key is the order of its versions. Appends that
no read shows come after all that some read shows: a list forgets nothing.
The part of a read that counts is what the transaction found before its own appends, at its first read of the key; its
later reads must agree with that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from kvstore.testing.checkers.anomaly import Anomaly, BadHistory, Findings, label, quoted, shown
from kvstore.testing.checkers.graph import ONWARD, RW, WR, WW, Graph
from kvstore.testing.history import MicroTxn, Outcome

WW_NEXT: Final = "{0} appended {3} to {2}, and {1} appended {4} right after it"
WW_UNREAD: Final = (
    "{0} appended {3} to {2}, the last that anybody read, and {1} appended {4}, which nobody read"
)
WR_LAST: Final = "{0} appended {4} to {2}, and {1} read {3}"
RW_NEXT: Final = "{0} read {2} as {3}, to which {1} appended {4}"


class Append(NamedTuple):
    """Who appended a value, and as which of its appends to that key, from 0."""

    number: int
    place: int


class Read(NamedTuple):
    """What a transaction found in a key before its own appends."""

    number: int
    found: list[int]


class Facts(Findings):
    """What a history says, key by key, in the order of first mention. Only committed transactions read."""

    def __init__(self, txns: Sequence[MicroTxn]) -> None:
        super().__init__(txns)
        self.appends: dict[bytes, dict[int, Append]] = {}
        self.counts: dict[tuple[int, bytes], int] = {}  # appends by (transaction, key)
        self.reads: dict[bytes, list[Read]] = {}
        for number, txn in enumerate(txns):
            self._take_appends(number, txn)
        self.committed = self._find_committed()
        self.happened = bytearray(len(txns))
        for number in self.committed:
            self.happened[number] = 1

    def _take_appends(self, number: int, txn: MicroTxn) -> None:
        for what, key, value in txn.steps:
            if what == "append" and isinstance(value, int):
                place = self.counts.get((number, key), 0)
                self.counts[number, key] = place + 1
                other = self.appends.setdefault(key, {}).setdefault(value, Append(number, place))
                if other != (number, place):
                    whose = f"{label(other.number)} and {label(number)}"
                    raise BadHistory(
                        f"{value} is appended to {quoted(key)} by {whose}; it must be unique"
                    )
            elif what != "r" or not (value is None or isinstance(value, list)):
                raise BadHistory(
                    f"{label(number)}: {what!r} {quoted(key)} {value!r} is no step of list-append"
                )

    def _find_committed(self) -> list[int]:
        """The acknowledged, and the unknown whose appends a committed one has read."""
        unsure: dict[bytes, set[int]] = {}
        for key, appends in self.appends.items():
            mine = {
                value
                for value, append in appends.items()
                if self.txns[append.number].outcome is Outcome.UNKNOWN
            }
            if mine:
                unsure[key] = mine
        committed = [n for n, txn in enumerate(self.txns) if txn.outcome is Outcome.OK]
        known = bytearray(len(self.txns))
        for number in committed:  # grows while we go
            for what, key, value in self.txns[number].steps:
                mine = unsure.get(key, set())
                if what != "r" or not value or mine.isdisjoint(value):
                    continue
                for element in value:
                    if element in mine:
                        mine.discard(element)
                        writer = self.appends[key][element].number
                        if not known[writer] and writer != number:
                            known[writer] = 1
                            committed.append(writer)
        committed.sort()
        return committed


def infer_list_append(txns: Sequence[MicroTxn], graph: Graph) -> tuple[list[int], list[Anomaly]]:
    """Add the edges of the data to the graph. Returns: committed transactions, sorted; anomalies that need no cycle."""
    facts = Facts(txns)
    for number in facts.committed:
        _take_reads(facts, number)
    for key in sorted(facts.appends.keys() | facts.reads.keys()):
        _KeyOrder(facts, key).infer(graph)
    return facts.committed, list(facts.anomalies.values())


def _take_reads(facts: Facts, number: int) -> None:
    """Keep the transaction's first read of each key; compare the others with it and with its appends."""
    expected: dict[bytes, list[int]] = {}  # what the next read must find
    own: dict[bytes, list[int]] = {}  # appended before the first read
    for what, key, value in facts.txns[number].steps:
        if what == "append":
            if key in expected:
                expected[key] = [*expected[key], value]
            else:
                own.setdefault(key, []).append(value)
        elif value is None:
            continue
        elif key in expected:
            if value != expected[key]:
                why = f"{label(number)} read {quoted(key)} as {shown(value)}, and should have read {shown(expected[key])}"
                facts.report("internal", key, why, number)
                expected[key] = value
        else:
            expected[key] = value
            mine = own.get(key, [])
            before = len(value) - len(mine)
            if before < 0 or value[before:] != mine:
                why = f"{label(number)} appended {shown(mine)} to {quoted(key)} and then read {shown(value)}"
                facts.report("internal", key, why, number)
            elif twice := [each for each in mine if each in value[:before]]:
                why = f"{label(number)} read {quoted(key)} as {shown(value)}, with {twice[0]} more than once"
                facts.report("duplicate-elements", key, why, number)
            else:
                found = value[:before] if mine else value
                facts.reads.setdefault(key, []).append(Read(number, found))


class _KeyOrder:
    """The versions of one key: `order` is the longest read, `writers` who made each of its elements (-1: nobody)."""

    def __init__(self, facts: Facts, key: bytes) -> None:
        self._facts = facts
        self._key = key
        self._appends = facts.appends.get(key, {})
        reads = facts.reads.get(key, [])
        by_length = sorted(reads, key=lambda read: -len(read.found))
        self._longest = next((read for read in by_length if self._sound(read)), Read(-1, []))
        self._order = self._longest.found
        self._places = {value: place for place, value in enumerate(self._order)}
        self._reads = [read for read in reads if self._fits(read)]
        self._writers = [self._writer(value) for value in self._order]

    def infer(self, graph: Graph) -> None:
        """Look at every append and every read of this key."""
        self._check_places()
        last, before = -1, 0
        for value, writer in zip(self._order, self._writers, strict=True):
            if writer < 0:
                continue
            if last >= 0 and writer != last:
                graph.add(last, writer, WW, (WW_NEXT, (self._key, before, value)))
            last, before = writer, value
        unread = list(self._unread())
        end = graph.helper() if unread else -1
        for value, writer in unread:
            graph.add(end, writer, ONWARD, ("", (value,)))
            if last >= 0:
                graph.add(last, writer, WW, (WW_UNREAD, (self._key, before, value)))
        following = self._following()
        for read in self._reads:
            self._add_read(graph, read, following, end)

    def _writer(self, value: int) -> int:
        """The committed transaction that appended it; -1: there is none."""
        append = self._appends.get(value)
        if append is None or not self._facts.happened[append.number]:
            return -1
        return append.number

    def _sound(self, read: Read) -> bool:
        """Whether the elements of a read can tell an order; reports what is wrong with them."""
        facts, key, number = self._facts, self._key, read.number
        saw = f"{label(number)} read {quoted(key)} as {shown(read.found)}"
        if len(set(read.found)) < len(read.found):
            twice = next(value for value in read.found if read.found.count(value) > 1)
            facts.report("duplicate-elements", key, f"{saw}, with {twice} more than once", number)
            return False
        for value in read.found:
            append = self._appends.get(value)
            if append is None:
                facts.report("garbage-read", key, f"{saw}; nobody appended {value}", number)
            elif append.number == number:
                facts.report("internal", key, f"{saw}, before it appended {value} itself", number)
                return False
            elif facts.txns[append.number].outcome is Outcome.FAILED:
                why = f"{saw}, with {value} of {label(append.number)}, which has failed"
                facts.report("G1a", key, why, append.number, number)
        return True

    def _fits(self, read: Read) -> bool:
        """Whether a read is a beginning of the longest one. (Only others are looked at element by element.)"""
        facts, key, size = self._facts, self._key, len(read.found)
        if read.found != self._order[:size]:
            if self._sound(read):
                saw = f"{label(read.number)} read {quoted(key)} as {shown(read.found)}"
                why = f"{saw}, and {label(self._longest.number)} read {shown(self._order)}"
                facts.report("incompatible-order", key, why, read.number, self._longest.number)
            return False
        mine = facts.txns[read.number].steps if (read.number, key) in facts.counts else ()
        return all(
            what != "append" or where != key or self._places.get(value, size) >= size
            for what, where, value in mine
        ) or self._sound(read)

    def _check_places(self) -> None:
        """Each transaction's appends are in its own order."""
        facts, key = self._facts, self._key
        longest = f"{label(self._longest.number)} read {shown(self._order)}"
        places: dict[int, int] = {}
        for value, writer in zip(self._order, self._writers, strict=True):
            if writer < 0:
                continue
            place = self._appends[value].place
            if place < places.get(writer, 0):
                why = f"{label(writer)} appended {value} to {quoted(key)} before others of its own, but {longest}"
                facts.report("incompatible-order", key, why, writer, self._longest.number)
            places[writer] = place

    def _unread(self) -> Iterator[tuple[int, int]]:
        """(value, writer) of committed appends that are in no read, and need not have been; reports those that need."""
        facts, key = self._facts, self._key
        places: dict[int, int] = {}
        for value, writer in zip(self._order, self._writers, strict=True):
            places[writer] = self._appends[value].place if writer >= 0 else 0
        latest = max(self._reads, key=lambda read: facts.txns[read.number].begin, default=None)
        for value, append in self._appends.items():
            writer = append.number
            if value in self._places or not facts.happened[writer]:
                continue
            txn = facts.txns[writer]
            made = f"{label(writer)} appended {value} to {quoted(key)}"
            if append.place < places.get(writer, 0):
                why = f"{made} before others of its own; {label(self._longest.number)} read {shown(self._order)} without it"
                facts.report("lost-append", key, why, writer, self._longest.number)
            elif (
                txn.outcome is Outcome.OK
                and latest is not None
                and txn.end < facts.txns[latest.number].begin
            ):
                why = f"{made}, acknowledged; {label(latest.number)} began later and read {shown(latest.found)}; no read has it"
                facts.report("lost-append", key, why, writer, latest.number)
            else:
                yield value, writer

    def _following(self) -> list[int]:
        """For each length of a read: where the next committed element is; len(order): there is none."""
        size = len(self._order)
        following = [size] * (size + 1)
        for at in range(size - 1, -1, -1):
            following[at] = at if self._writers[at] >= 0 else following[at + 1]
        return following

    def _add_read(self, graph: Graph, read: Read, following: Sequence[int], end: int) -> None:
        facts, key, number = self._facts, self._key, read.number
        at = len(read.found) - 1
        while at >= 0 and self._writers[at] < 0:
            at -= 1
        if at >= 0:
            value, writer = self._order[at], self._writers[at]
            graph.add(writer, number, WR, (WR_LAST, (key, read.found, value)))
            place, count = self._appends[value].place, facts.counts[writer, key]
            if place + 1 < count and at == len(read.found) - 1:
                saw = f"{label(number)} read {quoted(key)} as {shown(read.found)}"
                why = f"{saw}, but {value} was not the last that {label(writer)} appended"
                facts.report("G1b", key, why, writer, number)
                return
        succeeding = following[len(read.found)]
        if succeeding < len(self._order):
            value = self._order[succeeding]
            graph.add(number, self._writers[succeeding], RW, (RW_NEXT, (key, read.found, value)))
        elif end >= 0:
            graph.add(number, end, RW, (RW_NEXT, (key, read.found)))
