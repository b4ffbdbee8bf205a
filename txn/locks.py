"""The lock table of a range's leader: who holds which key, who waits for it, in which order. Pure; time comes in.

A lock is a hint in memory: losing it (a leader change, a lease that ends) costs its owner a conflict at commit, never an
anomaly, because what was read under it is validated like every other read (DESIGN.md section 16).

L1 a key has one exclusive holder, or any number of shared ones. An owner that asks again keeps the stronger of the two.
L2 who waits is served in the order of arrival; those who came within TIE_S of each other in the order of their age. Nobody
passes a waiter, not even a reader past a waiting writer, so nobody starves. An upgrade goes first: it holds the key already.
L3 each waiter has a holder, or a waiter before it, that is in its way (I21). Checked by `check`.
L4 an owner that is not renewed loses everything when its lease ends; a waiter that is not asked for any more leaves.
L5 an owner that was released takes no lock again: late copies of its requests would hold a key for nobody.
"""

from __future__ import annotations

import enum
import heapq
from bisect import insort
from typing import Any, Final

from txn.spans import Ordered

TIE_S: Final = 0.01
WAIT_LEASE_S: Final = 2.0  # a waiter whose client asks no more
ENDED_MAX: Final = 4_096
BLOCKERS_MAX: Final = 16  # told of one waiter; the rest are found when these are gone


class Verdict(enum.Enum):
    GRANTED = "granted"
    BUSY = "busy"  # and it was not to be queued
    FULL = "full"
    ENDED = "ended"


class Owner:
    """One transaction, by the id under which it locks."""

    __slots__ = ("age", "cycle", "expires", "held", "id", "until", "waits")

    def __init__(self, owner_id: bytes, age: int) -> None:
        self.id = owner_id
        self.age = age  # begin_ts of its first attempt: the smaller, the older
        self.held: dict[bytes, Lock] = {}
        self.waits: dict[bytes, Wait] = {}
        self.expires = 0.0
        self.until = 0.0  # of a Prepare that waits for locks: it is refused then; 0: none waits
        self.cycle: list[bytes] = []  # it has to give way, and has not been told yet


class Wait:
    """One owner in one key's queue. `askers` are the requests that want to hear of it."""

    __slots__ = (
        "askers", "committing", "exclusive", "expires", "key", "number", "order", "owner", "since",
    )  # fmt: skip

    def __init__(
        self, owner: Owner, key: bytes, exclusive: bool, committing: bool, number: int, now: float
    ) -> None:
        self.owner = owner
        self.key = key
        self.exclusive = exclusive
        self.committing = (
            committing  # a Prepare: it waits for a bounded time, and is nobody's victim
        )
        self.number = number
        self.since = now
        self.expires = now + WAIT_LEASE_S
        self.askers: list[Any] = []
        self.order: tuple[bool, int, int, int] = (True, int(now / TIE_S), owner.age, number)


class Lock:
    """Of one key."""

    __slots__ = ("holders", "key", "queue")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.holders: dict[Owner, bool] = {}  # -> exclusive
        self.queue: list[Wait] = []

    def free_for(self, owner: Owner, exclusive: bool) -> bool:
        for holder, held_exclusive in self.holders.items():
            if holder is not owner and (exclusive or held_exclusive):
                return False
        return True


def _order(wait: Wait) -> tuple[bool, int, int, int]:
    return wait.order


class LockTable:
    """Args: size_max: locks held and waited for, over all keys. lease_s: of an owner.

    Whoever changes the table then takes `granted` (waits that hold their key now) and `dropped` (waits that ended with
    nothing), and tells their askers.
    """

    def __init__(self, size_max: int, lease_s: float) -> None:
        self.locks: dict[bytes, Lock] = {}
        self.owners: dict[bytes, Owner] = {}
        self.waiting: dict[int, Wait] = {}  # by number, the longest waiting first
        self.held = 0
        self.granted: list[Wait] = []
        self.dropped: list[Wait] = []
        self._size_max, self._lease_s = size_max, lease_s
        self._ended: dict[bytes, float] = {}  # owner -> forgotten then
        self._number = self._made = 0  # waits and owners; locks
        self._ordered = Ordered()
        self._leases: list[tuple[float, int, Owner | Wait]] = []

    # -- taking

    def acquire(
        self,
        owner_id: bytes,
        age: int,
        key: bytes,
        exclusive: bool,
        now: float,
        *,
        queue: bool = True,
        committing: bool = False,
        lease_s: float = 0.0,
    ) -> Verdict | Wait:
        """Hold the key, or the place in its queue; asked again, the same place. lease_s: 0: the table's."""
        if owner_id in self._ended:
            return Verdict.ENDED
        owner, lock = self.owners.get(owner_id), self.locks.get(key)
        if owner is not None and lock is not None:
            before = lock.holders.get(owner)
            if before is not None and (before or not exclusive):
                self._renew(owner, now, lease_s)
                return Verdict.GRANTED
            known = owner.waits.get(key)
            if known is not None and (known.exclusive or not exclusive):
                known.committing = known.committing or committing
                known.expires = now + WAIT_LEASE_S
                self._renew(owner, now, lease_s)
                return known
        upgrade = lock is not None and owner is not None and owner in lock.holders
        if lock is not None:
            free = lock.free_for(owner or _NOBODY, exclusive) and (upgrade or not lock.queue)
            if not free and not queue:
                return Verdict.BUSY
        if self.held + len(self.waiting) >= self._size_max and not upgrade:
            return Verdict.FULL
        if owner is None:
            owner = self.owners[owner_id] = Owner(owner_id, age)
            heapq.heappush(self._leases, (now + (lease_s or self._lease_s), self._next(), owner))
        self._renew(owner, now, lease_s)
        if lock is None:
            lock = self.locks[key] = Lock(key)
            self._made += 1
            free = True
        if free:
            self._hold(lock, owner, exclusive)
            return Verdict.GRANTED
        if key in owner.waits:  # it wants more than it waited for
            self._leave(owner.waits[key], now)
        wait = Wait(owner, key, exclusive, committing, self._next(), now)
        if upgrade:
            wait.order = (False, *wait.order[1:])
        owner.waits[key] = self.waiting[wait.number] = wait
        insort(lock.queue, wait, key=_order)
        self._advance(lock)  # an older reader may have come in before a writer, beside the readers
        if wait.number not in self.waiting:
            self.granted.remove(wait)
            return Verdict.GRANTED
        heapq.heappush(self._leases, (wait.expires, wait.number, wait))
        return wait

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _renew(self, owner: Owner, now: float, lease_s: float = 0.0) -> None:
        owner.expires = max(owner.expires, now + (lease_s or self._lease_s))

    def _hold(self, lock: Lock, owner: Owner, exclusive: bool) -> None:
        if owner not in lock.holders:
            self.held += 1
        lock.holders[owner] = exclusive or lock.holders.get(owner, False)
        owner.held[lock.key] = lock

    # -- giving back

    def release(self, owner_id: bytes, now: float, *, ended: bool = True) -> bool:
        """Everything of this owner. `ended` (L5): for good. Whether it had anything."""
        if ended:
            if len(self._ended) >= ENDED_MAX:
                del self._ended[next(iter(self._ended))]
            self._ended[owner_id] = now + self._lease_s
        owner = self.owners.get(owner_id)
        if owner is None:
            return False
        self._release(owner)
        return True

    def _release(self, owner: Owner) -> None:
        del self.owners[owner.id]
        for wait in list(owner.waits.values()):
            self._remove(wait)
            self.dropped.append(wait)
        for lock in owner.held.values():
            del lock.holders[owner]
            self.held -= 1
            self._advance(lock)
        owner.held.clear()

    def leave(self, wait: Wait) -> None:
        """Out of the queue, for whatever reason; its askers are the caller's."""
        if self.waiting.get(wait.number) is wait:
            self._remove(wait)

    def _leave(self, wait: Wait, now: float) -> None:
        self._remove(wait)
        self.dropped.append(wait)
        wait.expires = now

    def _remove(self, wait: Wait) -> None:
        del self.waiting[wait.number]
        del wait.owner.waits[wait.key]
        lock = self.locks[wait.key]
        lock.queue.remove(wait)
        self._advance(lock)

    def _advance(self, lock: Lock) -> None:
        """Let those in front have the key, as many as may have it together."""
        queue = lock.queue
        while queue and lock.free_for(queue[0].owner, queue[0].exclusive):
            wait = queue.pop(0)
            del self.waiting[wait.number]
            del wait.owner.waits[wait.key]
            self._hold(lock, wait.owner, wait.exclusive)
            self.granted.append(wait)
        if not queue and not lock.holders:
            self.locks.pop(lock.key, None)

    # -- time

    def renew(self, owner_ids: list[bytes], now: float) -> list[bytes]:
        """Leases begin anew. Returns those who hold nothing here any more."""
        lost = []
        for owner_id in owner_ids:
            owner = self.owners.get(owner_id)
            if owner is None:
                lost.append(owner_id)
            else:
                self._renew(owner, now)
        return lost

    def due(self) -> float | None:
        """When to call `expire`."""
        while self._leases and not self._lives(self._leases[0][2]):
            heapq.heappop(self._leases)
        return self._leases[0][0] if self._leases else None

    def _lives(self, what: Owner | Wait) -> bool:
        if isinstance(what, Owner):
            return self.owners.get(what.id) is what
        return self.waiting.get(what.number) is what

    def expire(self, now: float) -> int:
        """Drop what nobody renewed (L4). Returns how many owners that were."""
        lost = 0
        while self._leases and self._leases[0][0] <= now:
            _, number, what = heapq.heappop(self._leases)
            if not self._lives(what):
                continue
            if what.expires > now:
                heapq.heappush(self._leases, (what.expires, number, what))
            elif isinstance(what, Owner):
                self._release(what)
                lost += 1
            else:
                self._leave(what, now)
        while self._ended and next(iter(self._ended.values())) <= now:
            del self._ended[next(iter(self._ended))]
        return lost

    # -- looking

    def foreign(self, key: bytes, owner_id: bytes) -> Owner | None:
        """Another owner that holds the key, in whichever way."""
        lock = self.locks.get(key)
        if lock is not None:
            for holder in lock.holders:
                if holder.id != owner_id:
                    return holder
        return None

    def foreign_in(self, start: bytes, end: bytes, owner_id: bytes) -> tuple[bytes, Owner] | None:
        """The same for [start, end): a key with its holder."""
        for key in self._ordered.within(self.locks, (self._made, len(self.locks)), start, end):
            holder = self.foreign(key, owner_id)
            if holder is not None:
                return key, holder
        return None

    def blockers_of(self, wait: Wait) -> list[Owner]:
        """Who has to give way before this one gets its key: holders, and those before it in the queue.

        Of the queue, only what does not follow from the others: an exclusive waiter waits itself for all before it.
        """
        lock = self.locks[wait.key]
        gate: Wait | None = None
        readers: list[Wait] = []
        for other in lock.queue[: lock.queue.index(wait)]:
            if other.exclusive:
                gate, readers = other, []
            else:
                readers.append(other)
        return _blockers(lock, wait, gate, readers)

    def long_waits(self, since_max: float, limit: int) -> list[tuple[Wait, list[Owner]]]:
        """Waits that began by then, with their blockers: as `blockers_of` says, in one pass over each queue.

        If there are more than `limit`: first those whose owner holds something here, since others are in no cycle of this
        table; then those at the front of their queues.
        """
        ranked = [
            (not wait.owner.held, place, wait.number)
            for lock in self.locks.values()
            for place, wait in enumerate(lock.queue)
            if wait.since <= since_max
        ]
        if len(ranked) > limit:
            ranked = heapq.nsmallest(limit, ranked)
        chosen = {number for _, _, number in ranked}
        found: list[tuple[Wait, list[Owner]]] = []
        for lock in self.locks.values():
            gate: Wait | None = None  # the last exclusive waiter
            readers: list[Wait] = []  # since then
            for wait in lock.queue:
                if wait.number in chosen:
                    found.append((wait, _blockers(lock, wait, gate, readers)))
                if wait.exclusive:
                    gate, readers = wait, []
                else:
                    readers.append(wait)
        return found

    def check(self) -> None:
        """L1, L3 and that everything is in its place; for tests and simulations. Raises: AssertionError."""
        held = 0
        for key, lock in self.locks.items():
            held += len(lock.holders)
            assert lock.holders, f"L3: {key!r} is held by nobody, and {len(lock.queue)} wait"
            exclusive = [owner for owner, mode in lock.holders.items() if mode]
            assert not exclusive or len(lock.holders) == 1, f"L1: {key!r} has several holders"
            assert lock.queue == sorted(lock.queue, key=_order), f"L2: the queue of {key!r}"
            for wait in lock.queue:
                assert self.blockers_of(wait), f"L3: nobody is in the way of a waiter for {key!r}"
                assert wait.owner.waits[key] is wait, "a waiter that its owner does not know"
            for owner in lock.holders:
                assert self.owners.get(owner.id) is owner, "I21: a holder that is gone"
                assert owner.held[key] is lock, "a lock that its holder does not know"
        assert held == self.held == sum(len(each.held) for each in self.owners.values())
        waits = [wait for lock in self.locks.values() for wait in lock.queue]
        assert sorted(w.number for w in waits) == sorted(self.waiting), "a waiter in no queue"
        assert sum(len(each.waits) for each in self.owners.values()) == len(waits)


def _blockers(lock: Lock, wait: Wait, gate: Wait | None, readers: list[Wait]) -> list[Owner]:
    """Args: gate: the last exclusive waiter before it. readers: the shared ones since then."""
    found = [gate.owner] if gate is not None else []
    for holder, exclusive in lock.holders.items():
        if len(found) >= BLOCKERS_MAX:
            return found
        if holder is not wait.owner and (wait.exclusive or exclusive):
            found.append(holder)
    if wait.exclusive:
        found += [reader.owner for reader in readers[: BLOCKERS_MAX - len(found)]]
    return found


_NOBODY: Final = Owner(b"", 0)
