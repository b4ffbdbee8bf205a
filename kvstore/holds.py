"""Who keeps old versions: clients with a snapshot, a scan or a transaction open tell the oracle, which tells the collectors.

Policy. `retention` is what everybody may count on without asking: versions and outcomes stay for so long. A client whose
oldest open view gets older than HOLD_AFTER_S says so with its next question to the oracle, and again every RENEW_S: a hold.
Each answer of the oracle has a floor, the oldest timestamp that is held; a range's leader collects nothing that can be seen
from there on (txn/gc.py), judging by the retention and the floor of one and the same answer. So a view that is open can be
read until it is closed, however long that takes, but for two bounds: a hold counts at most `snapshot_hold` into the past,
since somebody's forgotten snapshot must not fill every disk; and it ends LEASE_S after its client was last heard of. How old
a timestamp is, is how long ago a larger one was issued: a view of an idle cluster is not old, whatever the clocks show when
timestamps move on. What was before its own term, an oracle can only take for as long as the timestamps say.

Holds are in the memory of the oracle's leader. A new one says "not known" (0) for LEASE_S: nothing is collected before each
client that lives has told it. The same holds after timestamps have leapt by half of the retention or more: a view that was
opened a moment ago is old then at once, and not held yet. They leap with the first write after an idle time, since reads
issue none. And it holds after the oracle has stood still for a lease (its process was stopped, its machine slept): it has
heard nobody, and each lease seems to be over. A hold that comes too late, or is lost with its client, costs
`SnapshotTooOld`, never a wrong answer.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from replication.probes import reached
from txn.types import TIMESTAMP_SHIFT

LEASE_S: Final = 10.0
RENEW_S: Final = 3.0
HOLD_AFTER_S: Final = 1.0  # short reads are held by nothing but the retention
SESSIONS_MAX: Final = 20_000  # beyond it, new ones are not held
RECKON_S: Final = 0.5  # a hold that has ended is felt so much later
PLACES: Final = 64  # of the time that a hold counts, at which it is known what was issued


class Holds:
    """Of one oracle.

    Args: hold_s: how far into the past a hold counts, and up to 1/PLACES more. retention: in units of timestamps; 0: for ever.
    """

    def __init__(self, hold_s: float, retention: int = 0) -> None:
        self._hold_s = hold_s
        self._hold = int(hold_s * 1000) << TIMESTAMP_SHIFT
        self._leap_ms = (retention >> TIMESTAMP_SHIFT) / 2
        # Of the last answer: its timestamp, less the time of the oracle's node; and that time.
        self._ahead_ms = self._answered_at = float("inf")
        self._passed: deque[tuple[float, int]] = deque()  # a time, and the last timestamp then
        self._sessions: dict[int, tuple[int, float]] = {}  # -> oldest timestamp, end of the lease
        self._known_from = float("inf")
        self._lowest = 0
        self._reckoned_at = float("-inf")

    def __len__(self) -> int:
        return len(self._sessions)

    def start_term(self, now: float) -> None:
        self._sessions.clear()
        self._passed.clear()
        self._known_from, self._reckoned_at = now + LEASE_S, float("-inf")
        self._ahead_ms = self._answered_at = float("inf")

    def hold(self, session: int, oldest: int, now: float) -> None:
        """The session's oldest open view is at `oldest`; 0: it has none any more."""
        if not oldest:
            self._sessions.pop(session, None)
        elif session in self._sessions or len(self._sessions) < SESSIONS_MAX:
            self._sessions[session] = oldest, now + LEASE_S
            self._lowest = min(self._lowest, oldest)
        else:
            reached("holds_are_full")

    def floor(self, issued: int, now: float) -> int:
        """Nothing that can be seen from there on is to be collected; 0: not known. issued: the last timestamp."""
        ahead_ms = (issued >> TIMESTAMP_SHIFT) - now * 1000
        if self._leap_ms and ahead_ms - self._ahead_ms >= self._leap_ms:
            reached("timestamps_leapt")
            self._known_from = max(self._known_from, now + LEASE_S)
        self._ahead_ms = ahead_ms
        if now - self._answered_at > LEASE_S:  # each node asks once a second
            self._known_from = max(self._known_from, now + LEASE_S)
        self._answered_at = now
        reach = self._reach(issued, now)
        if now < self._known_from:
            return 0
        if now >= self._reckoned_at + RECKON_S:
            self._reckoned_at = now
            ended = [number for number, (_, until) in self._sessions.items() if until < now]
            for number in ended:
                reached("hold_ended")
                del self._sessions[number]
            self._lowest = min((oldest for oldest, _ in self._sessions.values()), default=issued)
        return max(1, min(issued, max(self._lowest, reach)))

    def _reach(self, issued: int, now: float) -> int:
        """Nothing older is held: a larger timestamp was issued `hold_s` ago, and timestamps say that it is so old."""
        passed, long_ago = self._passed, now - self._hold_s
        if not passed or now >= passed[-1][0] + self._hold_s / PLACES:
            passed.append((now, issued))
        while len(passed) > 1 and passed[1][0] <= long_ago:
            passed.popleft()
        at, last = passed[0]
        before_ms = int(max(0.0, at - long_ago) * 1000)  # the term
        return min(issued - self._hold, last - (before_ms << TIMESTAMP_SHIFT))
