"""Watchers of the simulated cluster: each polls one span of one range, from version to version, until long after the end.

What each answer says is judged when it leaves (Checker.told); here, that the answers make one stream: none missed or doubled.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

from tests.stateful.txn_ranges import Violation
from txn.messages import Changed, Changes, Failure, Reply
from txn.types import point_end

if TYPE_CHECKING:
    from tests.stateful.txn_harness import World

STOPS_AT_S: Final = 12.0
WAITS_MS: Final = (5, 20, 250)  # below the time of a call
Event = tuple[int, bytes, bytes | None]


class Watcher:
    def __init__(self, world: World, number: int, rng: random.Random) -> None:
        self.world, self.number, self.rng = world, number, rng
        group = rng.choice(world.groups)
        keys = world.keys_of[group.number]
        self.start, self.end = rng.choice(
            [
                (group.start, group.end),
                (group.start, group.end),
                (key := rng.choice(keys), point_end(key)),
                (min(keys), max(keys)),
            ]
        )
        self.group = group
        self.since = self.began = 0
        self.events: list[Event] = []
        self.lazy_s = rng.choice([0.0, 0.0, 0.05, 0.6])
        self.rows_max = rng.choice([1, 2, 5, 100])

    def begin(self) -> None:
        """From now, or from a while ago."""
        self.since = self.began = max(1, self.world.oracle_last - self.rng.choice([0, 0, 40]))
        self.poll()

    def poll(self) -> None:
        world, rng = self.world, self.rng
        if world.now > STOPS_AT_S:
            return
        at = 0
        if rng.random() < 0.4:
            at = rng.choice([world.oracle_last, rng.randint(self.since, world.oracle_last)])
        wait_ms = (
            0 if rng.random() < 0.05 else WAITS_MS[-1] if world.quiet else rng.choice(WAITS_MS)
        )
        request = Changes(
            0, 0, 0, self.since, self.start, self.end, self.rows_max, 1 << 20, at, wait_ms, self.number
        )  # fmt: skip
        world.call(self.start, request, self.answered)

    def answered(self, reply: Reply) -> None:
        world, pause_s = self.world, self.lazy_s * self.rng.random()
        if isinstance(reply, Changed):
            if self.events and reply.versions and reply.versions[0] <= self.events[-1][0]:
                raise Violation(f"W1: version {reply.versions[0]} comes after {self.events[-1][0]}")
            self.events += zip(reply.versions, reply.keys, reply.values, strict=True)
            self.since = reply.upto
            pause_s = pause_s or 0.001
        elif isinstance(reply, Failure) and reply.code == "compacted":
            world.probe("a watcher came too late")
            if reply.details["oldest"] <= self.since:
                raise Violation(f"W3: {reply} to a watcher at {self.since}")
            self.since = self.began = reply.details["oldest"]
            self.events.clear()
        elif isinstance(reply, Failure) and reply.code == "invalid_argument":
            raise AssertionError(f"a watcher was refused: {reply}")
        else:
            pause_s += 0.005
        world.after(pause_s, self.poll)

    def check(self) -> None:
        """At the end: the stream is what the log says, up to where it came; and it came to the end."""
        told = self.world.checker.changes(self.start, self.end or b"\xff", self.began, self.since)
        if self.events != told:
            odd = [each for each in told if each not in self.events] or self.events
            raise Violation(f"W1: watcher {self.number} was told other things, such as {odd[:2]}")
        left = self.world.checker.changes(self.start, self.end or b"\xff", self.since, 1 << 62)
        if left and self.world.settled_at < STOPS_AT_S - 2:
            raise Violation(f"W2: watcher {self.number} never came to {left[:2]}")
