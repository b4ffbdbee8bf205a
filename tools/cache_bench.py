"""What the read cache is worth: its hit ratio beside that of LRU, and the time of a call.

    python -m tools.cache_bench [--keys 100000] [--reads 1000000]

Rows of 125 bytes, room for a tenth of the keys. The times are CPU of one thread, with an engine below that is a dict: compare
them with each other, and with a get of RocksDB (1.6 to 2 us where a dict look-up of this size takes 0.1 to 0.3).
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from rich.console import Console
from rich.table import Table

from kvstore.read_cache import ROW_OVERHEAD_BYTES, CachedEngine

ROW: Final = b"r" * 125
ROW_BYTES: Final = ROW_OVERHEAD_BYTES + 9 + len(ROW)  # as the cache counts it
HOT: Final = "zipf 0.9, with scans between"


class Ratios(NamedTuple):
    name: str
    own: float
    lru: float


class _Rows:
    """The engine below: every key has a row."""

    def get(self, _key: bytes) -> bytes:
        return ROW

    def write(self, rows: Any) -> None:
        """Nothing to do."""


def lru(rows_max: int) -> Callable[[int], bool]:
    """A cache that keeps what was used last; the call says whether a key was there."""
    rows: OrderedDict[int, None] = OrderedDict()

    def use(number: int) -> bool:
        if number in rows:
            rows.move_to_end(number)
            return True
        rows[number] = None
        if len(rows) > rows_max:
            rows.popitem(last=False)
        return False

    return use


def _zipf(rng: random.Random, keys: int, skew: float, reads: int) -> Iterator[int]:
    sums = list(itertools.accumulate((number + 1) ** -skew for number in range(keys)))
    return iter(rng.choices(range(keys), cum_weights=sums, k=reads))


def workloads(keys: int, reads: int) -> Iterator[tuple[str, Iterator[int]]]:
    """Numbers of keys, in the order in which they are read."""
    rng = random.Random(1)
    yield "zipf 0.9", _zipf(rng, keys, 0.9, reads)
    yield "zipf 1.1", _zipf(rng, keys, 1.1, reads)
    yield HOT, _with_scans(_zipf(rng, keys, 0.9, reads), keys)
    hot = keys // 20
    yield (
        "80 % of reads on 5 % of keys",
        (rng.randrange(hot if rng.random() < 0.8 else keys) for _ in range(reads)),
    )


def _with_scans(reads: Iterator[int], keys: int) -> Iterator[int]:
    """After as many reads as there is room for, a walk through twice as many keys that nobody else reads."""
    rows_max = keys // 10
    for begin in itertools.count(keys, 2 * rows_max):
        part = list(itertools.islice(reads, rows_max))
        if not part:
            return
        yield from part
        yield from range(begin, begin + 2 * rows_max)


def hit_ratios(keys: int, reads: int) -> Iterator[Ratios]:
    """Of the reads of keys that are read more than once: a walk's keys are not counted."""
    rows_max = keys // 10
    for name, numbers in workloads(keys, reads):
        engine = CachedEngine(_Rows(), rows_max * ROW_BYTES * 16 // 15)  # type: ignore[arg-type]
        other = lru(rows_max)
        own_hits = other_hits = counted = 0
        for number in numbers:
            before = engine.hits
            engine.get(b"L%08d" % number)
            was_there = other(number)
            if number < keys:
                counted += 1
                own_hits += engine.hits - before
                other_hits += was_there
        yield Ratios(name, own_hits / counted, other_hits / counted)


def times_ns(keys: int) -> Iterator[tuple[str, float]]:
    """What a call takes, the best of five rounds."""
    rng = random.Random(2)
    names = [b"L%08d" % number for number in range(keys)]
    some = [b"L%08d" % rng.randrange(keys) for _ in range(50_000)]
    stored = dict.fromkeys(names, ROW)
    yield "a dict's get", _best(lambda: [stored.get(key) for key in some], len(some))
    large = CachedEngine(_Rows(), 2 * keys * ROW_BYTES)  # type: ignore[arg-type]
    for key in names:
        large.get(key)
    yield "get, hit", _best(lambda: [large.get(key) for key in some], len(some))
    yield "get, another family", _best(lambda: [large.get(b"H") for _ in some], len(some))
    batch: dict[bytes, bytes | None] = {}
    for key in some[:512]:
        batch |= {b"H" + key[1:]: ROW, key: ROW}
    yield "write, by row (half of them cached)", _best(lambda: large.write(batch), len(batch))
    small = CachedEngine(_Rows(), keys // 10 * ROW_BYTES)  # type: ignore[arg-type]
    yield "get, miss, another row goes", _best(lambda: [small.get(key) for key in names], keys)


def _best(call: Callable[[], object], calls: int) -> float:
    rounds = []
    for _ in range(5):
        began = time.process_time_ns()
        call()
        rounds.append((time.process_time_ns() - began) / calls)
    return min(rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description="The read cache against LRU, and its times.")
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--reads", type=int, default=1_000_000)
    arguments = parser.parse_args()
    console = Console()
    table = Table("workload", "hit ratio", "of LRU")
    for row in hit_ratios(arguments.keys, arguments.reads):
        table.add_row(row.name, f"{row.own:.3f}", f"{row.lru:.3f}")
    console.print(table)
    table = Table("call", "ns")
    for name, taken in times_ns(arguments.keys):
        table.add_row(name, f"{taken:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
