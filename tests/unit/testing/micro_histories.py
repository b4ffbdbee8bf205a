"""Histories of small steps for the tests of the cycle checkers: a serial executor, mutations, and a judge that tries all.

The executor runs every transaction at one instant between its begin and its end, so what it records is strictly
serializable by construction. The judge looks for a serial order by brute force, and is meant for five transactions.
"""

from __future__ import annotations

import random
from typing import Any

from kvstore.keytext import unescape
from kvstore.testing.history import MicroTxn, Outcome


def parse(lines: list[str]) -> list[MicroTxn]:
    """Transactions as text: `client begin..end steps`, an end with `?` is unknown, with `!` failed, `@5` is a version.

    Steps are separated by `;`. A read gives an integer, integers with commas, or `-` for nothing; of lists, all are lists.
    """
    lists = any(" append " in line for line in lines) or any("," in line for line in lines)
    return [_parse_txn(line, lists=lists) for line in lines]


def _parse_txn(line: str, *, lists: bool) -> MicroTxn:
    client, time, steps = line.split(" ", 2)
    time, _, version = time.partition("@")
    begin, end = time.rstrip("?!").split("..")
    outcome = {"?": Outcome.UNKNOWN, "!": Outcome.FAILED}.get(time[-1], Outcome.OK)
    txn = MicroTxn(client, int(begin), version=int(version or 0), outcome=outcome)
    if outcome is not Outcome.UNKNOWN:
        txn.end = int(end)
    for step in steps.split("; "):
        what, key, text = step.split(" ")
        value: Any = None if text == "-" else [int(number) for number in text.split(",")]
        if what != "r" or not lists:
            value = value and value[0]
        elif value is None:
            value = []
        txn.steps.append((what, unescape(key), value))
    return txn


class Executor:
    """Clients that run transactions one after the other, interleaved; one of them applies at a time."""

    def __init__(self, rng: random.Random, *, lists: bool, clients: int = 3, keys: int = 2) -> None:
        self._rng = rng
        self._lists = lists
        self._clients = clients
        self._keys = [b"xyzuvw"[n : n + 1] if n < 6 else b"k%d" % n for n in range(keys)]
        self._state: dict[bytes, Any] = {}
        self._next_value: dict[bytes, int] = {}
        self._now = 0
        self._version = 0

    def run(self, count: int) -> list[MicroTxn]:
        """This many transactions, in the order of their begin."""
        rng = self._rng
        history: list[MicroTxn] = []
        waiting: list[MicroTxn | None] = [None] * self._clients  # begun, not yet ended
        done = [False] * self._clients  # whether it has been applied
        names = [0] * self._clients
        late: list[MicroTxn] = []  # unknown, and perhaps applied some time
        while len(history) < count or any(waiting):
            place = rng.randrange(self._clients)
            txn = waiting[place]
            if late and rng.random() < 0.2:
                self._apply(late.pop())
            if txn is None:
                if len(history) < count:
                    txn = self._begin(f"c{place + 1}.{names[place]}")
                    history.append(txn)
                    waiting[place], done[place] = txn, False
            elif not done[place] and rng.random() < 0.1:
                names[place] += 1  # its client dies, and another comes
                waiting[place] = None
                late.append(txn)
            elif not done[place] and rng.random() < 0.1:
                txn.outcome, txn.end = Outcome.FAILED, self._tick()
                waiting[place] = None
            elif not done[place]:
                self._apply(txn)
                done[place] = True
            else:
                if rng.random() < 0.1:  # applied, and the answer is lost
                    names[place] += 1
                    if rng.random() < 0.5:
                        self._forget_reads(txn)
                else:
                    txn.outcome, txn.end = Outcome.OK, self._tick()
                waiting[place] = None
        return history

    def _tick(self) -> int:
        self._now += 1
        return self._now

    def _begin(self, client: str) -> MicroTxn:
        rng = self._rng
        txn = MicroTxn(client, self._tick())
        for _ in range(rng.randint(1, 3)):
            key = rng.choice(self._keys)
            if rng.random() < 0.5:
                txn.steps.append(("r", key, None))
            else:
                value = self._next_value[key] = self._next_value.get(key, 0) + 1
                txn.steps.append(("append" if self._lists else "w", key, value))
        return txn

    def _apply(self, txn: MicroTxn) -> None:
        for place, (what, key, value) in enumerate(txn.steps):
            if what == "append":
                self._state[key] = [*self._state.get(key, []), value]
            elif what == "w":
                self._state[key] = value
            else:
                found = self._state.get(key, [] if self._lists else None)
                txn.steps[place] = (what, key, found)
        self._version += 1
        txn.version = self._version

    def _forget_reads(self, txn: MicroTxn) -> None:
        txn.steps = [(w, key, None if w == "r" else value) for w, key, value in txn.steps]


def mutate(rng: random.Random, history: list[MicroTxn], *, lists: bool) -> None:
    """Change one thing, so that the history stays one that somebody might have recorded."""
    txn = rng.choice(history)
    change = rng.choice(("read", "read", "read", "outcome", "time"))
    if change == "read":
        _change_read(rng, history, txn, lists=lists)
    elif change == "outcome":
        _change_outcome(rng, history, txn)
    else:
        _change_time(rng, history, txn)


def _change_read(
    rng: random.Random, history: list[MicroTxn], txn: MicroTxn, *, lists: bool
) -> None:
    places = [place for place, step in enumerate(txn.steps) if step[0] == "r"]
    if not places:
        return
    place = rng.choice(places)
    what, key, found = txn.steps[place]
    values = [v for other in history for w, k, v in other.steps if w != "r" and k == key]
    reads = [v for other in history for w, k, v in other.steps if w == "r" and k == key]
    if lists:
        found = found or []
        choice = rng.randrange(5)
        if choice == 0 and found:
            found = found[: rng.randrange(len(found))]
        elif choice == 1 and found:
            found = [value for value in found if value != rng.choice(found)]
        elif choice == 2:
            found = rng.sample(found, len(found))
        elif choice == 3 and values:
            found = [*found, rng.choice(values)]
        else:
            found = rng.choice(reads)
    else:
        found = rng.choice([None, *values, *values])
    txn.steps[place] = (what, key, found)


def _change_outcome(rng: random.Random, history: list[MicroTxn], txn: MicroTxn) -> None:
    if txn.outcome is Outcome.UNKNOWN:
        txn.end = max(other.begin for other in history) + 1000 + txn.begin
    txn.outcome = rng.choice((Outcome.OK, Outcome.FAILED))


def _change_time(rng: random.Random, history: list[MicroTxn], txn: MicroTxn) -> None:
    other = rng.choice(history)
    if Outcome.UNKNOWN not in {txn.outcome, other.outcome}:
        txn.begin, txn.end, other.begin, other.end = other.begin, other.end, txn.begin, txn.end


def explained(history: list[MicroTxn], *, by_version: bool = False) -> bool:
    """Whether some serial order of the transactions that happened explains every read, and respects real time.

    by_version: the writes of each key must also be in the order of their versions.
    """
    must = {n for n, txn in enumerate(history) if txn.outcome is Outcome.OK}
    may = [n for n, txn in enumerate(history) if txn.outcome is not Outcome.FAILED]

    def search(done: frozenset[int], state: dict[bytes, Any], last: dict[bytes, int]) -> bool:
        if must <= done:
            return True
        for number in may:
            if number in done or any(
                history[other].end < history[number].begin for other in must - done
            ):
                continue
            after = _execute(history[number], state, last, by_version=by_version)
            if after is not None and search(done | {number}, *after):
                return True
        return False

    return search(frozenset(), {}, {})


def _execute(
    txn: MicroTxn, state: dict[bytes, Any], last: dict[bytes, int], *, by_version: bool
) -> tuple[dict[bytes, Any], dict[bytes, int]] | None:
    state, last = dict(state), dict(last)
    for what, key, value in txn.steps:
        if what == "append":
            state[key] = [*state.get(key, []), value]
        elif what == "w":
            state[key] = value
        elif isinstance(value, list):
            if value != state.get(key, []):
                return None
        elif value is None:
            # Of a list, or of a transaction without an answer, None says nothing.
            lists = any(step[0] == "append" for step in txn.steps) or isinstance(
                state.get(key), list
            )
            if txn.outcome is Outcome.OK and not lists and state.get(key) is not None:
                return None
        elif value != state.get(key):
            return None
        if by_version and what == "w" and txn.version:
            if last.get(key, 0) > txn.version:
                return None
            last[key] = txn.version
    return state, last
