"""What was committed lately in one range, in the order of commit: (version, keys), kept by every replica from what it applies.

A watch that keeps up is served from here, and so is one that goes on at another leader; one that has fallen behind is served
from the stored versions (txn/changes.py). Bounded: the oldest go, and `low` rises.

V1 every version above `low` that was applied here is in it. `low` begins at the largest version that was ever applied to the
   range, which the range's row keeps (`newest`).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence

ROWS_MAX = 4_096
BYTES_MAX = 1 << 20  # of keys

Commit = tuple[int, Sequence[bytes]]


class Recent:
    """`fresh` collects what is noted while somebody asks for it (else it is None)."""

    __slots__ = ("_bytes", "_commits", "_rows", "fresh", "low", "rows_max")

    def __init__(self, rows_max: int = ROWS_MAX) -> None:
        self.rows_max = rows_max
        self.low = 0
        self.fresh: list[Commit] | None = None
        self._commits: list[Commit] = []
        self._rows = self._bytes = 0

    def begin(self, newest: int) -> None:
        """Nothing above `newest` has been applied, and nothing is known of what is below."""
        self.low = newest
        self.fresh = None
        self._commits = []
        self._rows = self._bytes = 0

    def note(self, version: int, keys: Sequence[bytes]) -> None:
        """These keys were written at `version`: in any order of versions, each part of a commit once."""
        if self.fresh is not None:
            self.fresh.append((version, keys))
        if version <= self.low:
            return
        commits = self._commits
        if not commits or version > commits[-1][0]:
            commits.append((version, keys))
        else:
            insort(commits, (version, keys))
        self._rows += len(keys)
        self._bytes += len(keys[0]) if len(keys) == 1 else sum(map(len, keys))
        if self._rows > self.rows_max or self._bytes > BYTES_MAX:
            self._trim()

    def _trim(self) -> None:
        """The older half goes."""
        rows, size, low, count = self._rows, self._bytes, self.low, 0
        rows_max, bytes_max = self.rows_max // 2, BYTES_MAX // 2
        for version, keys in self._commits:
            if rows <= rows_max and size <= bytes_max and version != low:  # no part of that commit
                break
            low = version
            rows -= len(keys)
            size -= len(keys[0]) if len(keys) == 1 else sum(map(len, keys))
            count += 1
        del self._commits[:count]
        self._rows, self._bytes, self.low = rows, size, low

    def __len__(self) -> int:
        return self._rows

    def last(self, since: int, start: bytes, end: bytes) -> int:
        """The newest version above `since` in [start, end) that is here; 0: none. end b"": to the end."""
        commits = self._commits
        for place in range(len(commits) - 1, -1, -1):
            version, keys = commits[place]
            if version <= since:
                return 0
            if touches(keys, start, end):
                return version
        return 0

    def first(self, since: int, start: bytes, end: bytes) -> int:
        """The oldest version above `since` in [start, end) that is here; 0: none."""
        return next((version for version, _ in self.between(since, 1 << 64, start, end)), 0)

    def between(self, since: int, upto: int, start: bytes, end: bytes) -> Iterator[Commit]:
        """What is here of [start, end) at versions in (since, upto], in order; the keys sorted. A version may come in parts."""
        commits = self._commits
        low = bisect_right(commits, since, key=_version)
        for place in range(low, bisect_right(commits, upto, key=_version)):
            version, keys = commits[place]
            if len(keys) == 1:
                if start <= keys[0] and (not end or keys[0] < end):
                    yield version, keys
                continue
            found = sorted(key for key in keys if start <= key and (not end or key < end))
            if found:
                yield version, found


def touches(keys: Sequence[bytes], start: bytes, end: bytes) -> bool:
    """Whether a key lies in [start, end)."""
    return any(start <= key and (not end or key < end) for key in keys)


def touches_sorted(keys: Sequence[bytes], start: bytes, end: bytes) -> bool:
    """The same of sorted keys, quickly."""
    place = bisect_left(keys, start)
    return place < len(keys) and (not end or keys[place] < end)


def _version(commit: Commit) -> int:
    return commit[0]
