"""Watches at a leader: what was written in a span after a version, in the order of commit (DESIGN.md section 15).

Story. A poll asks for the versions of a span above `since`. It is answered as a scan would be, at a timestamp: the latched
writers are waited for, undecided intents are asked about, leadership is confirmed after the look; so the answer is complete
up to there (I11), and the next poll goes on where it ends. A poll that finds nothing waits until something is written in its
span, then it is answered at the timestamp of the newest such commit, which has been issued and needs no oracle; or until its
time is over, then at a fresh timestamp, so that the place of an idle watch keeps ahead of garbage collection.

What is new comes from the range's `Recent`. A poll from further back has the stored versions looked through: in slices, for
the oldest of them (`Search`), and what was found serves the following polls too (`Backlog`).

W1 an answer holds every version of the span in (since, upto], and whole commits only: pages end between versions.
W2 no version at or below an answer's `upto` appears later: it is a read's timestamp, with all that holds of those.
W3 versions above gc_threshold are all stored. A poll from below it is refused, unless `Recent` shows that nothing is missing.
W4 bounded: a poll is one object, of POLLS_MAX on a node; one search at a time, SLICE_ROWS in a step, fewer if they are large;
   BACKLOGS_MAX are kept.
   One commit, or one moment, may concern all polls: LOOKS of them look in one turn, the others in the next ones.
W5 a search ends with an answer to the poll it was made for, or with that poll elsewhere: never with a search for the same.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import msgspec

from replication.probes import chance, reached
from txn import keycode
from txn.latches import Waiter
from txn.messages import Changed, Changes, Failure, Reply
from txn.mvcc import decode_history, decode_latest, latest_ts
from txn.recent import touches_sorted
from txn.types import TIMESTAMP_MAX, point_end

if TYPE_CHECKING:
    from txn.evaluate import Evaluator
    from txn.ports import Rows

POLLS_MAX: Final = 10_000
WAIT_S_MAX: Final = 30.0
PAGE_ROWS_MAX: Final = 1_000
PAGE_BYTES_MAX: Final = 256 << 10  # beyond both goes only what one commit holds
LOOKS: Final = 500  # polls that look again in one turn
LOOK_BYTES: Final = 4 << 10  # read for a poll, that count for one more
LOOK_S: Final = 0.5  # between two looks for polls whose time is over
PAGE_READ_BYTES_MAX: Final = 1 << 20  # of rows, told or not; likewise
SLICE_ROWS: Final = 512  # one of more than a KiB counts for more
STEP_S: Final = 0.002  # between two slices of a search
BACKLOG_ROWS_MAX: Final = 8_192  # above what one commit may write into a range
BACKLOG_BYTES_MAX: Final = 5 << 20  # of keys; above what one commit may write
BACKLOGS_MAX: Final = 2
SERVED_MAX: Final = (
    1_000  # polls that wait for a search, and are compared with what another has found
)
BACKLOG_KEPT_S: Final = 30.0  # unused
SEEK_COST: Final = 4  # rows that one seek counts for
COUNTERS: Final = (
    "compacted_total",
    "events_total",
    "polls_total",
    "refused_total",
    "searches_total",
)

Item = tuple[int, bytes]  # version, key


class Polls:
    """Of a whole node: how many are in flight, whose they are, and what became of others."""

    def __init__(self, polls_max: int = POLLS_MAX) -> None:
        self.open = 0
        self.askers: dict[Any, int] = {}  # how many each has in flight; none has 0
        self.polls_max = polls_max
        self.counters = dict.fromkeys(COUNTERS, 0)

    def began(self, asker: Any) -> None:
        self.open += 1
        self.askers[asker] = self.of(asker) + 1

    def ended(self, asker: Any) -> None:
        self.open -= 1
        left = self.askers.pop(asker) - 1
        if left:
            self.askers[asker] = left

    def of(self, asker: Any) -> int:
        return self.askers.get(asker, 0)


class Poll(Waiter):
    """A question in flight: one object for its life, which waits in one place at a time."""

    __slots__ = ("above", "listens", "until")

    def __init__(self, request: Changes, origin: Any, now: float, sequence: int) -> None:
        super().__init__(request, origin, now, sequence)
        self.until = now + min(request.wait_ms / 1000, WAIT_S_MAX)
        self.listens = False  # nothing above its `since` had been written when it began to
        # Nothing in its span is in (`since`, `above`]: while it listens, what is written there is told to it.
        self.above = request.since

    def until_s(self, wait_s: float) -> float:
        return max(self.until, self.since) + wait_s

    def copy(self) -> Poll:
        return self


class Backlog:
    """Every version of [start, end) in (since, upto], in order, as a search found them."""

    __slots__ = ("end", "items", "since", "start", "upto", "used_at")

    def __init__(self, start: bytes, end: bytes, since: int, upto: int, items: list[Item]) -> None:
        self.start, self.end, self.since, self.upto = start, end, since, upto
        self.items = items
        self.used_at = 0.0

    def serves(self, request: Changes) -> bool:
        return self.since <= request.since < self.upto and (
            self.start <= request.start
            and (not self.end or (request.end != b"" and request.end <= self.end))
        )


class Search:
    """Looks through the stored versions of [start, end) for the oldest above `since`, at most BACKLOG_ROWS_MAX of them.

    All versions at or below `upto` are there when it begins, and none appears later (W2); so it may take its time. Writers
    move versions from LATEST to HISTORY meanwhile, and a key is looked at in both.
    """

    def __init__(
        self,
        rows: Rows,
        request: Changes,
        rows_max: int = BACKLOG_ROWS_MAX,
    ) -> None:
        self.start, self.end, self.since, self.upto = (
            request.start,
            request.end,
            request.since,
            request.at,
        )
        self.done = False
        self._rows, self._rows_max = rows, rows_max
        self._position, self._stop = keycode.family_span(keycode.LATEST, self.start, self.end)
        self._walked = b""  # the row whose key's HISTORY was being walked when a slice was used up
        self._walked_upto = 0
        self._heap: list[tuple[int, bytes]] = []  # (-version, key): the newest is on top
        self._bytes = 0

    def step(self, slice_rows: int) -> int:
        """Look at one slice, or at what is left (`done`). Returns for how many rows that counts: one at least."""
        looked = 0
        for row_key, data in self._rows.scan(self._position, self._stop):
            if looked >= slice_rows:
                return looked
            again = row_key == self._walked
            looked += 1 if again else _cost(data)
            newest = latest_ts(data)
            if newest > self.since:
                looked += SEEK_COST
                key = row_key[1:]
                above = self._walked_upto if again else self.since
                for version, cost in self._older(key, above):
                    if version > self.upto:
                        break
                    looked += cost
                    self._add(version, key)
                    if looked >= slice_rows:
                        self._walked, self._walked_upto = row_key, version
                        return looked
                if newest <= self.upto:
                    self._add(newest, key)
            self._position = row_key + b"\x00"
        self.done = True
        return looked + SEEK_COST

    def _older(self, key: bytes, above: int) -> Iterator[tuple[int, int]]:
        """The key's HISTORY versions in (above, upto], rising, and for how many rows each counts."""
        low, high = keycode.history_row(key, self.upto), keycode.history_row(key, above)
        for row_key, data in self._rows.scan(low, high, reverse=True):
            yield keycode.history_ts(row_key), _cost(data)

    def _add(self, version: int, key: bytes) -> None:
        heap = self._heap
        heapq.heappush(heap, (-version, key))
        self._bytes += len(key)
        if len(heap) > self._rows_max or self._bytes > BACKLOG_BYTES_MAX:
            newest, gone = (
                heap[0][0],
                [],
            )  # the whole commit goes, if there are others, which are older
            while heap and heap[0][0] == newest:
                gone.append(heapq.heappop(heap))
            if not heap:
                self._heap = gone  # equal versions, keys rising: a heap
                return
            self._bytes -= sum(len(item[1]) for item in gone)
            self.upto = -newest - 1

    def backlog(self) -> Backlog:
        items = sorted((-minus, key) for minus, key in self._heap)
        return Backlog(self.start, self.end, self.since, self.upto, items)


def _cost(data: bytes) -> int:
    """For how many rows one counts."""
    return 1 + (len(data) >> 10)


class Feed:
    """The watching part of an evaluator: one leader's term of it."""

    def __init__(self, owner: Evaluator) -> None:
        self._ev = owner
        self.node = Polls()  # the store puts its own here, one for all ranges
        self.slice_rows, self.backlog_rows_max = SLICE_ROWS, BACKLOG_ROWS_MAX
        self._open: dict[Poll, None] = {}
        self._by_watch: dict[int, Poll] = {}
        self._parked: dict[Poll, None] = {}  # nothing to tell them yet
        self._points: dict[bytes, dict[Poll, None]] = {}  # those that listen, by key
        self._spans: dict[Poll, None] = {}  # those that listen, of more than one key
        self._looks_left = LOOKS
        self._put_off: list[Poll] = []  # by this turn: they look in the next one
        self._look_at: float | None = None
        self._search: Search | None = None
        self._step_at = 0.0
        self._searching: dict[Poll, None] = {}  # they wait for the search, or for the next one
        self._backlogs: list[Backlog] = []

    # -- life

    def waiters(self) -> list[Waiter]:
        """Polls that wait here and nowhere else."""
        return [*self._parked, *self._searching]

    def stop(self) -> None:
        for poll in self._open:
            self.node.ended(poll.origin)
        self._ev.state.recent.fresh = None

    def ask(self, request: Changes, origin: Any, now: float) -> None:
        ev, node = self._ev, self.node
        node.counters["polls_total"] += 1
        earlier = self._by_watch.get(request.watch) if request.watch else None
        if earlier is not None:
            self._tell(earlier, Changed(earlier.request.id, earlier.request.since, [], [], []))
        if node.open >= node.polls_max:
            node.counters["refused_total"] += 1
            message = "too many watches wait at this node: close some, or raise limits.watches"
            failure = Failure(request.id, "throttled", message, {"retry_after": 1.0})
            ev.out.reply(origin, failure, False)
            return
        if not request.end:  # to the end of the range: what lies beyond is for others to tell
            request = msgspec.structs.replace(request, end=ev.state.row.end)
        poll = Poll(request, origin, now, ev.latches.sequence)
        node.began(origin)
        self._open[poll] = None
        if request.watch:
            self._by_watch[request.watch] = poll
        self.again(poll, now)

    def refuse(self, poll: Poll, failure: Failure) -> None:
        self._tell(poll, failure)

    def give_up(self, poll: Poll) -> None:
        """What it asks for cannot be learned now: nothing is claimed, and its watch asks again."""
        reached("poll_given_up")
        self._tell(poll, Changed(poll.request.id, poll.request.since, [], [], []))

    def again_in_turn(self, poll: Poll, now: float) -> None:
        """Look, unless others have taken what one turn has for it."""
        if self._looks_left > 0 and not chance("poll_put_off"):
            self._looks_left -= 1
            self.again(poll, now)
        else:
            poll.done = False
            self._put_off.append(poll)

    def end_turn(self) -> list[Poll]:
        """Who was put off. The next turn has looks for them."""
        put_off, self._put_off, self._looks_left = self._put_off, [], LOOKS
        return put_off

    def again(self, poll: Poll, now: float) -> None:
        """Look, from the start."""
        if poll not in self._open:
            return
        poll.done = False
        request: Changes = poll.request
        refusal = self._refusal(poll)
        if refusal is not None:
            self._tell(poll, refusal)
        elif request.at:
            self._look(poll, now)
        elif not self._reaches_back(poll):
            self._ev.reader.ask_read_ts(poll)
        elif newest := self._ev.state.recent.last(poll.above, request.start, request.end):
            poll.request = msgspec.structs.replace(request, at=newest)
            poll.sequence = self._ev.latches.sequence
            self._look(poll, now)
        elif not request.wait_ms:
            self._tell(poll, Changed(request.id, request.since, [], [], []))
        elif now >= poll.until:
            self._ev.reader.ask_read_ts(poll)
        else:
            self._park(poll)

    def _refusal(self, poll: Poll) -> Failure | None:
        request, state = poll.request, self._ev.state
        row = state.row
        if request.version and request.version != row.version:
            return Failure(request.id, "epoch_mismatch")
        if not state.has_span(request.start, request.end):
            return Failure(request.id, "epoch_mismatch")
        if request.since < row.gc_threshold:
            first = state.recent.first(poll.above, request.start, request.end)
            if not self._reaches_back(poll) or 0 < first <= row.gc_threshold:
                self.node.counters["compacted_total"] += 1
                return Failure(request.id, "compacted", "", {"oldest": row.gc_threshold})
        return None

    def _reaches_back(self, poll: Poll) -> bool:
        """Whether `Recent` has every version of the poll's span that was applied above its `since`."""
        return self._ev.state.recent.low <= poll.above

    def _tell(self, poll: Poll, reply: Reply, *, confirm: bool = False) -> None:
        """Answer, and forget."""
        poll.done = True
        del self._open[poll]
        self.node.ended(poll.origin)
        self._parked.pop(poll, None)
        self._searching.pop(poll, None)
        self._ev.untimed.pop(poll, None)
        request = poll.request
        if self._by_watch.get(request.watch) is poll:
            del self._by_watch[request.watch]
        if poll.listens:
            if request.end == point_end(request.start):
                listeners = self._points[request.start]
                del listeners[poll]
                if not listeners:
                    del self._points[request.start]
            else:
                del self._spans[poll]
            if not self._points and not self._spans:
                self._ev.state.recent.fresh = None
        self._ev.out.reply(poll.origin, reply, confirm)

    # -- nothing yet

    def _park(self, poll: Poll) -> None:
        request = poll.request
        self._parked[poll] = None
        if not poll.listens:
            poll.listens, poll.above = True, TIMESTAMP_MAX
            if request.end == point_end(request.start):
                self._points.setdefault(request.start, {})[poll] = None
            else:
                self._spans[poll] = None
            recent = self._ev.state.recent
            if recent.fresh is None:
                recent.fresh = []
        if self._look_at is None or poll.until < self._look_at:
            self._look_at = poll.until

    def wake(self) -> None:
        """Entries were applied: whose span was written?"""
        recent = self._ev.state.recent
        fresh = recent.fresh
        if not fresh:
            return
        recent.fresh = []
        versions: dict[bytes, list[int]] = {}  # rising
        commits = [(version, sorted(keys)) for version, keys in fresh]
        commits.sort()
        for version, keys in commits:
            for key in keys:
                versions.setdefault(key, []).append(version)
        if self._points:
            for key, written in versions.items():
                for poll in self._points.get(key, ()):
                    place = bisect_right(written, poll.request.since)
                    if place < len(written):
                        self._hit(poll, written[place])
        if self._spans:
            ordered = sorted(versions)
            for poll in self._spans:
                start, end = poll.request.start, poll.request.end
                if not touches_sorted(ordered, start, end):
                    continue
                for version, keys in commits:
                    if version > poll.request.since and touches_sorted(keys, start, end):
                        self._hit(poll, version)
                        break

    def _hit(self, poll: Poll, version: int) -> None:
        """Written in its span, above its `since`, in this turn."""
        poll.above = min(poll.above, version - 1)
        if poll in self._parked:
            del self._parked[poll]
            self._ev.runnable.append(poll)

    # -- looking

    def _look(self, poll: Poll, now: float) -> None:
        """As a scan at `at` does; then tell what there is up to it."""
        request, ev = poll.request, self._ev
        start, end, at = request.start, request.end, request.at
        if at <= request.since:
            self._tell(poll, Changed(request.id, request.since, [], [], []))
            return
        if now > poll.until_s(ev.limits.read_wait_s):
            self.give_up(poll)
            return
        point = end == point_end(start)
        blocker = (
            ev.latches.blocker_of_read(start, poll.sequence)
            if point
            else ev.latches.blocker_of_scan(start, end, poll.sequence)
        )
        if blocker is not None:
            blocker.waiters.append(poll)
            return
        for _, part in ev.state.intents_in(start, end):
            if ev.reader.undecided(part, at, poll):
                return
        for part in ev.state.stamped_in(start, end):
            if ev.reader.undecided(part, at, poll):
                return
        if self._reaches_back(poll):
            recent = ev.state.recent.between(poll.above, at, start, end)
            self._page(poll, at, ((version, key) for version, keys in recent for key in keys))
            return
        for backlog in self._backlogs:
            if backlog.serves(request):
                backlog.used_at = now
                items = (
                    (version, key)
                    for version, key in backlog.items
                    if version > request.since and start <= key and (not end or key < end)
                )
                self._page(poll, backlog.upto, items)
                return
        self._await_search(poll, now)

    def _page(self, poll: Poll, upto: int, items: Iterator[Item]) -> None:
        """Items in order of versions, all there are up to `upto`."""
        request = poll.request
        rows_max = max(1, min(request.rows_max, 3 if chance("page_small") else PAGE_ROWS_MAX))
        bytes_max = max(1, min(request.bytes_max, PAGE_BYTES_MAX))
        versions: list[int] = []
        keys: list[bytes] = []
        values: list[bytes | None] = []
        size = read = 0
        for version, key in items:
            if versions and version != versions[-1]:
                if len(versions) >= rows_max or size >= bytes_max or read >= PAGE_READ_BYTES_MAX:
                    upto = versions[-1]
                    break
            value, read_bytes = self._value(key, version)
            read += read_bytes
            versions.append(version)
            keys.append(key)
            values.append(value)
            size += len(key) + 16 + (len(value) if value is not None else 0)
        self._looks_left -= read // LOOK_BYTES
        self.node.counters["events_total"] += len(versions)
        self._tell(poll, Changed(request.id, upto, versions, keys, values), confirm=True)

    def _value(self, key: bytes, version: int) -> tuple[bytes | None, int]:
        """And how many bytes of rows were read for it."""
        rows = self._ev.rows
        latest = rows.get(b"L" + key)
        if latest is not None and latest_ts(latest) == version:
            return decode_latest(latest).value, len(latest)
        row_key = keycode.history_row(key, version)
        data = rows.get(row_key)
        assert data is not None, "W3: a version above gc_threshold is stored"
        return decode_history(row_key, data).value, len(data) + len(latest or b"")

    # -- from further back

    def _await_search(self, poll: Poll, now: float) -> None:
        self._searching[poll] = None
        if self._look_at is None or poll.until < self._look_at:
            self._look_at = poll.until
        if self._search is None:
            self._step_at = now
            self._begin_search(poll)

    def _begin_search(self, poll: Poll) -> None:
        reached("watch_falls_back")
        self.node.counters["searches_total"] += 1
        self._search = Search(self._ev.rows, poll.request, self.backlog_rows_max)

    def _step_search(self, now: float) -> None:
        """One slice, which may be enough for several small searches."""
        left = 8 if chance("search_slice_small") else self.slice_rows
        while self._search is not None and left > 0:
            left -= self._search.step(left)
            if self._search.done:
                self._serve(self._search.backlog(), now)
        self._step_at = now + STEP_S

    def _serve(self, backlog: Backlog, now: float) -> None:
        """A search is over: whom it was made for goes on, and whoever else finds all that it needs in it.

        They look at once, before another search drops it; the others wait, and the next search is for the first of them. If
        they looked as well, each would find nothing, search, and drop what was found for those before it: without end.
        """
        self._search = None
        backlog.used_at = now
        self._backlogs = [backlog, *self._backlogs[: BACKLOGS_MAX - 1]]
        if self._look_at is None:
            self._look_at = now + LOOK_S
        first = islice(self._searching, SERVED_MAX)
        served = [poll for poll in first if backlog.serves(poll.request)]
        for poll in served:
            del self._searching[poll]
        for poll in served:
            self.again(poll, now)
        if self._search is None and self._searching:
            self._begin_search(next(iter(self._searching)))

    # -- time

    def deadline(self) -> float | None:
        if self._search is not None and (self._look_at is None or self._step_at < self._look_at):
            return self._step_at
        return self._look_at

    def tick(self, now: float) -> None:
        if self._search is not None and now >= self._step_at:
            self._step_search(now)
        if self._look_at is None or now < self._look_at:
            return
        self._look_at = None
        for poll in [poll for poll in self._parked if poll.until <= now]:
            del self._parked[poll]
            self._ev.reader.ask_read_ts(poll)
        for poll in [poll for poll in self._searching if poll.until <= now]:
            self._tell(poll, Changed(poll.request.id, poll.request.since, [], [], []))
        self._backlogs = [each for each in self._backlogs if now < each.used_at + BACKLOG_KEPT_S]
        waiting = [poll.until for poll in (*self._parked, *self._searching)]
        if waiting or self._backlogs:
            latest = now + BACKLOG_KEPT_S if self._backlogs else float("inf")
            self._look_at = max(now + LOOK_S, min([latest, *waiting]))


__all__ = ["COUNTERS", "Feed", "Poll", "Polls"]
