"""A client's locks: what each open transaction has locked and read, and the one timer that keeps all of them alive.

The leader of a key's range holds the lock in its memory (txn/locking.py); what decides is the guard that each locking read
leaves here, and that the commit validates. So a lock that is lost costs a Conflict.

C1 A lock's client asks again within LOCK_POLL_S while it waits, and renews its lease every third of it while the
transaction is open and somebody has it (but for what is only reserved), with one message for each range, whatever the
number of transactions and locks.
C2 A transaction that ends without a commit gives everything back, keys included whose answer it never saw; a wait that is
cancelled leaves its queue. A message of these that gets lost is made good by the lease.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from kvstore import limits
from kvstore.errors import (
    Conflict,
    KVError,
    LockTimeout,
    TransactionClosed,
    TransactionTooLarge,
)
from kvstore.links import Answer
from kvstore.router import Router
from replication.probes import chance, reached
from txn.messages import (
    LOCK_POLL_S,
    NAMED_MAX,
    KeepLocks,
    LockLeases,
    LockPending,
    LockRead,
    ReadReply,
    Unlock,
)
from txn.types import Guard, point_end

KEEP_S: Final = 1.0  # between renewals until the lease is known, and at least
GRACE_S: Final = 1.0  # for the answer that says that a lock was not free in time
LAST_SHARE: Final = 0.1  # of a transaction's time, in which it does not wait for locks any more
UNLOCK_TIMEOUT_S: Final = 5.0  # given back for so long; then the lease does it


class Locked(NamedTuple):
    """What a key had when it was locked. Nothing newer came up to `at`."""

    value: bytes | None
    version: int
    at: int
    exclusive: bool


def lock_until(now: float, timeout_s: float, wanted_s: float | None, deadline: float) -> float:
    """When to give up waiting for a lock: early enough before the transaction's deadline to be told so.

    Raises: InvalidArgument.
    """
    if wanted_s is not None:
        timeout_s = limits.validate_timeout(wanted_s, zero=True)
    until = now + timeout_s
    if deadline == float("inf"):
        return until
    return min(until, deadline - LAST_SHARE * max(0.0, deadline - now))


class TransactionLocks:
    """Of one transaction, until `deadline`. `owner`: the id under which it locks; empty before the first."""

    def __init__(self, keeper: LockKeeper, deadline: float) -> None:
        self.owner = b""
        self.age = 0
        self.found: dict[bytes, Locked] = {}
        self._asked: dict[bytes, None] = {}  # keys of which an answer is missing, or never came
        self._keeper = keeper
        self._deadline = deadline
        self._router = keeper.router
        self.begun_at = self._router.monotonic()
        self._ended = False

    def begin(self, owner: bytes, age: int) -> None:
        if self.owner:  # another task of the transaction was first
            return
        self.owner, self.age = owner, age or int.from_bytes(owner[:8], "big")

    async def lock(self, key: bytes, shared: bool, until: float) -> Locked:
        """Lock one key and read it; again, what it had then.

        Args: until: when to give up waiting (monotonic seconds).
        Raises: LockTimeout, Deadlock, Conflict (it had to be locked anew and is not what it was), TransactionClosed, and as any
        read.
        """
        if self._ended:  # another task has ended it: nobody would give this lock back
            raise TransactionClosed("the transaction has ended")
        known = self.found.get(key)
        if known is not None and (known.exclusive or shared):
            return known
        if len(self.found) + len(self._asked) >= limits.TXN_LOCKS_MAX:
            raise TransactionTooLarge(f"a transaction locks at most {limits.TXN_LOCKS_MAX} keys")
        self._asked[key] = None
        self._keeper.add(self)
        reply = await self._wait(key, shared, until)
        locked = Locked(reply.values[0], reply.versions[0], reply.at, not shared)
        known = self.found.get(key)  # another task may have locked it meanwhile
        if known is not None:
            if (known.value, known.version) != (locked.value, locked.version):
                reached("upgraded_lock_was_lost")
                raise Conflict(key, b"", locked.version)
            locked = locked._replace(at=known.at, exclusive=known.exclusive or locked.exclusive)
        self.found[key] = locked
        self._asked.pop(key, None)
        return locked

    async def reserve(self, key: bytes, *, shared: bool, until: float) -> ReadReply:
        """Lock a key for FRESH_LEASE_S, not longer, and read it at a fresh timestamp; nothing is noted to be validated. `end`
        gives it back if the commit did not.

        Raises: as `lock`.
        """
        self._asked[key] = None
        return await self._wait(key, shared, until, fresh=True)

    async def _wait(
        self, key: bytes, shared: bool, until: float, *, fresh: bool = False
    ) -> ReadReply:
        router = self._router
        waiting = False
        try:
            while True:
                left_s = max(0.0, until - router.monotonic())
                wait_s = float(min(left_s, LOCK_POLL_S))  # messages hold no subclass of it
                request = LockRead(0, 0, 0, key, self.owner, self.age, shared, wait_s, fresh)
                deadline = min(router.monotonic() + left_s + GRACE_S, self._deadline)
                waiting = True
                reply = await router.ask(request, key, b"", deadline)
                if isinstance(reply, ReadReply):
                    return reply
                assert isinstance(reply, LockPending)
                waiting = bool(wait_s)
                if router.monotonic() >= until:
                    raise LockTimeout(key, reply.holder)
        except BaseException:
            if waiting:
                self._give_back(Unlock(0, 0, 0, key, self.owner, True))
            raise

    @property
    def first(self) -> bytes:
        """The key that was locked first: what a transaction without writes is anchored at."""
        return next(iter(self.found))

    def guards(self) -> list[Guard]:
        """What the commit has to validate."""
        return [Guard(key, point_end(key), locked.at) for key, locked in self.found.items()]

    def keys(self) -> Iterable[bytes]:
        yield from self.found
        yield from self._asked

    def end(
        self, *, committed: bool = False, touched: Callable[[bytes], bool] = lambda _: False
    ) -> None:
        """The transaction is over. After a commit the ranges have let go by themselves of what it validated, read or wrote.

        Args: touched: whether a key was among what it read or wrote.
        """
        ended, self._ended = self._ended, True
        if ended or not self.owner:
            return
        self._keeper.remove(self)
        left = [key for key in self._asked if not touched(key)] if committed else self.keys()
        for _, key in self._keeper.by_range(left):
            self._give_back(Unlock(0, 0, 0, key, self.owner))

    def _give_back(self, request: Unlock) -> None:
        if chance("unlock_dropped"):
            return
        try:
            until = self._router.monotonic() + UNLOCK_TIMEOUT_S
            self._router.send(request, request.key, b"", until, silent=True)
        except KVError:
            pass  # the lease ends


class LockKeeper:
    """All transactions of one client that hold locks. Lives on the router's loop. A transaction that nobody has any more may be
    dropped on another thread: what is here is looked through by copies that are made at once.
    """

    def __init__(self, router: Router) -> None:
        self.router = router
        self._open: weakref.WeakKeyDictionary[TransactionLocks, None] = weakref.WeakKeyDictionary()
        self._timer: asyncio.TimerHandle | None = None
        self._period_s = KEEP_S

    def __len__(self) -> int:
        return len(self._open)

    def add(self, locks: TransactionLocks) -> None:
        self._open[locks] = None
        if self._timer is None:
            self._arm()

    def remove(self, locks: TransactionLocks) -> None:
        self._open.pop(locks, None)
        if not self._open and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """Give everything back."""
        for locks in self._living():
            locks.end()

    def _living(self) -> list[TransactionLocks]:
        """In the order in which they locked first."""
        found = [reference() for reference in self._open.keyrefs()]
        return [locks for locks in found if locks is not None]

    def by_range(self, keys: Iterable[bytes]) -> Sequence[tuple[int, bytes]]:
        """One key for each range; a key whose range is unknown stands for itself."""
        found: dict[int, bytes] = {}
        strangers: list[tuple[int, bytes]] = []
        for key in keys:
            route = self.router.ranges.find(key)
            if route is None:
                strangers.append((0, key))
            else:
                found.setdefault(route.range_id, key)
        return [*found.items(), *strangers]

    def _arm(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._period_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = self.router.monotonic()
        owners: dict[int, tuple[bytes, list[bytes]]] = {}
        for locks in self._living():
            if now - locks.begun_at > limits.TXN_AGE_S_MAX:
                locks.end()  # nobody will commit it
                continue
            for range_id, key in self.by_range(locks.keys()):
                owners.setdefault(range_id, (key, []))[1].append(locks.owner)
        for key, several in owners.values():
            if chance("locks_not_kept"):
                continue
            until = now + self._period_s
            for first in range(0, len(several), NAMED_MAX):
                request = KeepLocks(0, 0, 0, key, several[first : first + NAMED_MAX])
                try:
                    self.router.send(request, key, b"", until, on_reply=self._on_leases)
                except KVError:
                    pass  # the next round asks again; a lease is three of them
        if self._open:
            self._arm()

    def _on_leases(self, answer: Answer) -> None:
        if isinstance(answer, LockLeases):
            self._period_s = max(KEEP_S, answer.lease_s / 3)
