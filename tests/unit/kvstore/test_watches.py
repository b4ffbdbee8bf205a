"""Claims of the client's watches: whatever the ranges answer, and when, the stream is the history, commit by commit;
`version` is where to go on; memory is bounded by what was asked for; and wherever it is cancelled nothing is left waiting."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import watches
from kvstore.adapters.http_watch import WatchPolls
from kvstore.client import Database
from kvstore.errors import (
    ClientClosed,
    Compacted,
    DeadlineExceeded,
    EpochMismatch,
    InvalidArgument,
    KeyTooLarge,
    Throttled,
    Unavailable,
)
from kvstore.links import Answer, Call, OnReply
from kvstore.ranges import RangeCache
from kvstore.sim import loop as sim
from kvstore.watches import Event, EventType, Watch, Watches
from tests.unit.kvstore.fake_cluster import FakeCluster
from tests.unit.kvstore.fake_cluster import simulate as simulate_cluster
from txn.messages import Changed, Changes, RangeInfo, Timestamps
from txn.types import TIMESTAMP_MAX

Commit = tuple[int, dict[bytes, bytes | None]]


class FakeRouter:
    """The router that a watch sees. Polls wait until the test answers them; the store is a list of commits."""

    def __init__(self, *splits: bytes) -> None:
        self.ranges = RangeCache()
        self.seen_ts = 0
        self.commits: list[Commit] = []
        self.now_ts = 100
        self.open_calls: dict[int, Call] = {}
        self.asked: list[Changes] = []
        self.silent: list[Changes] = []
        self.refuse = 0  # so many calls are not taken
        self._next_id = 1
        self.split(*splits)

    def split(self, *splits: bytes, version: int = 1) -> None:
        bounds = [b"", *splits, b""]
        self.ranges.update(
            RangeInfo(version * 100 + number, start, end, version, 1, [(1, 1)], 1)
            for number, (start, end) in enumerate(itertools.pairwise(bounds))
        )

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    async def timestamps(self, _deadline: float) -> Timestamps:
        await asyncio.sleep(0.001)
        return Timestamps(0, self.now_ts, 0, 0)

    async def find_out(self, _until: float) -> None:
        await asyncio.sleep(0.001)

    def open(self, key: bytes, end: bytes, now: float, deadline: float, on_reply: OnReply) -> Call:
        if self.refuse:
            self.refuse -= 1
            raise Throttled(0.01)
        self._next_id += 1
        return Call(self._next_id, key, end, deadline, now + 1.0, None, on_reply)

    def submit(self, call: Call, request: Changes, _size: int) -> None:
        call.request, call.sent = request, True
        self.asked.append(request)
        route = self.ranges.find(call.key)
        assert route is not None
        if not route.covers(call.key, call.end):
            self._finish(call, EpochMismatch(1))
            return
        self.open_calls[call.id] = call

    def send(self, request: Changes, *_: Any, silent: bool) -> None:
        assert silent
        self.silent.append(request)

    def forget(self, call: Call) -> None:
        self.open_calls.pop(call.id, None)

    def _finish(self, call: Call, answer: Answer) -> None:
        assert call.on_reply is not None
        call.on_reply(answer)

    # -- the test's side

    def write(self, **rows: bytes | None) -> int:
        self.now_ts += 1
        self.commits.append((self.now_ts, {key.encode(): value for key, value in rows.items()}))
        return self.now_ts

    def answer(self, call_id: int, *, upto: int = 0, commits_max: int = 1 << 30) -> None:
        """As a leader would that has everything up to `upto` (all, if 0), with pages of so many commits."""
        call = self.open_calls.pop(call_id)
        request = call.request
        assert isinstance(request, Changes)
        upto = max(request.since, upto or self.now_ts)
        found = [
            (version, sorted(key for key in rows if request.start <= key < request.end), rows)
            for version, rows in self.commits
            if request.since < version <= upto
        ]
        found = [each for each in found if each[1]]
        if len(found) > commits_max:
            found = found[:commits_max]
            upto = found[-1][0]
        rows = [(version, key, rows[key]) for version, keys, rows in found for key in keys]
        versions, keys, values = ([row[place] for row in rows] for place in range(3))
        self._finish(call, Changed(request.id, upto, versions, keys, values))  # type: ignore[arg-type]

    def answer_all(self) -> None:
        for call_id in list(self.open_calls):
            self.answer(call_id)

    def fail(self, error: Any) -> None:
        for call_id in list(self.open_calls):
            self._finish(self.open_calls.pop(call_id), error)


def watch_of(router: FakeRouter, **wanted: Any) -> Watch:
    every = Watches(lambda: router, random.Random(1), 5.0)  # type: ignore[arg-type,return-value]
    return every.open(
        wanted.get("key"), wanted.get("prefix"), wanted.get("since"), wanted.get("timeout")
    )


def simulate(test: Coroutine[Any, Any, Any]) -> None:
    async def main(_loop: sim.SimLoop) -> None:
        await test

    sim.run(main, 1, time_limit_s=600.0)


def expected(router: FakeRouter, since: int, prefix: bytes = b"") -> list[Event]:
    return [
        Event(EventType.DELETE if value is None else EventType.PUT, key, value, version)
        for version, rows in router.commits
        if version > since
        for key, value in sorted(rows.items())
        if key.startswith(prefix)
    ]


# --- the merge


def test_a_commit_over_ranges_is_handed_out_whole_when_all_of_them_have_come_so_far():
    async def test() -> None:
        router = FakeRouter(b"m")
        watch = watch_of(router, prefix=b"")
        await watch.start()
        version = router.write(a=b"1", z=b"2")
        pulling = asyncio.create_task(watch.pull())
        await asyncio.sleep(0.01)
        first, second = list(router.open_calls)
        router.answer(first)
        await asyncio.sleep(0.01)
        assert not pulling.done()
        assert second not in router.open_calls, "the other range is asked anew"
        (again,) = router.open_calls.values()
        assert isinstance(again.request, Changes)
        assert again.request.at == version
        router.answer(again.id)
        assert [event.key for event in await pulling] == [b"a", b"z"]
        assert watch.version == version
        await watch.close()

    simulate(test())


@settings(max_examples=30)
@given(st.data())
def test_whatever_ranges_answer_and_when_the_stream_is_the_history(data):
    async def test() -> None:
        router = FakeRouter(*data.draw(st.sampled_from([[], [b"m"], [b"d", b"m", b"s"]])))
        rng = random.Random(data.draw(st.integers(0, 1 << 20)))
        watch = watch_of(router, prefix=b"")
        await watch.start()
        since = watch.version
        told: list[Event] = []

        async def consume() -> None:
            while True:
                events = [await anext(watch)] if rng.random() < 0.7 else await watch.pull(2)
                told.extend(events)
                assert told[-1].version >= watch.version
                await asyncio.sleep(rng.choice([0, 0, 0.01, 0.2]))

        consumer = asyncio.create_task(consume())
        for step in range(60):
            if rng.random() < 0.5:
                keys = rng.sample("abdfmnsz", rng.randint(1, 4))
                router.write(**{key: rng.choice([None, b"%d" % step]) for key in keys})
            if router.open_calls and rng.random() < 0.7:
                call_id = rng.choice(list(router.open_calls))
                if rng.random() < 0.15:
                    call = router.open_calls.pop(call_id)
                    router._finish(call, rng.choice([Unavailable(), DeadlineExceeded()]))
                elif rng.random() < 0.05:
                    router.split(*sorted(rng.sample([b"b", b"e", b"n", b"t"], 2)), version=step + 2)
                    router._finish(router.open_calls.pop(call_id), EpochMismatch(1))
                else:
                    upto = rng.randint(since, router.now_ts)
                    router.answer(call_id, upto=upto, commits_max=rng.choice([1, 2, 100]))
            if rng.random() < 0.1:  # cancelled anywhere: nothing is lost
                consumer.cancel()
                await asyncio.gather(consumer, return_exceptions=True)
                consumer = asyncio.create_task(consume())
            await asyncio.sleep(rng.choice([0, 0.01, 0.1]))
        for _ in range(200):
            router.answer_all()
            await asyncio.sleep(0.05)
            if watch.version == router.now_ts:
                break
        assert told == expected(router, since)
        assert watch.version == router.now_ts
        consumer.cancel()
        await asyncio.gather(consumer, return_exceptions=True)
        await watch.close()
        assert not router.open_calls

    simulate(test())


def test_version_within_a_commit_is_the_one_before_it():
    async def test() -> None:
        router = FakeRouter()
        watch = watch_of(router, prefix=b"")
        await watch.start()
        before = watch.version
        first, second = router.write(a=b"1", b=b"2"), router.write(a=None)
        reading = asyncio.create_task(anext(watch))
        await asyncio.sleep(0.01)
        router.answer_all()
        assert (await reading).key == b"a"
        assert watch.version == before
        assert (await anext(watch)).key == b"b"
        assert watch.version == first
        assert await anext(watch) == Event(EventType.DELETE, b"a", None, second)
        assert watch.version == second
        again = watch_of(router, prefix=b"", since=first)
        pulling = asyncio.create_task(again.pull())
        await asyncio.sleep(0.01)
        router.answer_all()
        assert [event.version for event in await pulling] == [second]

    simulate(test())


def test_a_watch_without_since_begins_at_now_and_an_idle_one_moves_on():
    async def test() -> None:
        router = FakeRouter()
        router.write(k=b"old")
        async with watch_of(router, key=b"k") as watch:
            assert watch.version == router.now_ts
            pulling = asyncio.create_task(watch.pull())
            await asyncio.sleep(0.01)
            router.now_ts += 1_000
            router.answer_all()
            await asyncio.sleep(0.01)
            assert watch.version == router.now_ts
            assert not pulling.done()
            version = router.write(k=b"new")
            router.answer_all()
            assert await pulling == [Event(EventType.PUT, b"k", b"new", version)]

    simulate(test())


@pytest.mark.parametrize("wait", ["500ms", "3s", "10s", "60s"])
def test_http_polls_of_an_idle_span_move_on_too(wait):
    async def leader(router: FakeRouter) -> None:
        """Answers a poll when its wait is over."""
        since: dict[int, float] = {}
        while True:
            for call_id, call in list(router.open_calls.items()):
                assert isinstance(call.request, Changes)
                begun = since.setdefault(call_id, router.monotonic())
                if router.monotonic() >= begun + call.request.wait_ms / 1000:
                    router.answer(call_id)
            await asyncio.sleep(0.05)

    class Idle:
        def __init__(self, router: FakeRouter) -> None:
            self._watches = Watches(lambda: router, random.Random(1), 5.0)  # type: ignore[arg-type,return-value]

        def watch(self, *, key: bytes | None, prefix: bytes | None, since: int | None) -> Watch:
            return self._watches.open(key, prefix, since, None)

    async def test() -> None:
        router = FakeRouter(b"m")
        leading = asyncio.create_task(leader(router))
        polls, database = WatchPolls(), Idle(router)
        version = str(router.now_ts)
        for _ in range(3):
            router.now_ts += 1_000
            query = f"prefix=&since={version}&wait={wait}"
            answer = await polls.answer(database, query)  # type: ignore[arg-type]
            assert answer == {"events": [], "version": str(router.now_ts)}
            version = answer["version"]
        leading.cancel()
        assert not router.open_calls

    simulate(test())


def test_a_consumer_that_stops_holds_two_pages_of_each_range_and_asks_for_no_more():
    async def test() -> None:
        router = FakeRouter(b"m")
        watch = watch_of(router, prefix=b"")
        await watch.start()
        for number in range(50):
            router.write(**{f"a{number}": b"v", f"z{number}": b"v"})
        reading = asyncio.create_task(anext(watch))
        for _ in range(50):
            await asyncio.sleep(0.01)
            for call_id in list(router.open_calls):
                router.answer(call_id, commits_max=3)
        await reading
        asked = len(router.asked)
        for _ in range(50):
            await asyncio.sleep(1.0)
            for call_id in list(router.open_calls):
                router.answer(call_id, commits_max=3)
        assert len(router.asked) == asked
        held = sum(len(leg.events) for leg in watch._legs) + len(watch._ready)
        assert 2 * 3 < held <= 2 * 3 * 2
        await watch.close()

    simulate(test())


# --- errors


def test_what_does_not_mend_is_raised_after_what_was_there_and_version_tells_where_to_go_on():
    async def test() -> None:
        router = FakeRouter()
        watch = watch_of(router, prefix=b"")
        await watch.start()
        version = router.write(a=b"1")
        pulling = asyncio.create_task(watch.pull())
        await asyncio.sleep(0.01)
        router.answer_all()
        assert len(await pulling) == 1
        pulling = asyncio.create_task(watch.pull())
        await asyncio.sleep(0.01)
        router.fail(Compacted(500))
        with pytest.raises(Compacted, match="snapshot") as caught:
            await pulling
        assert caught.value.oldest == 500
        assert watch.version == version
        with pytest.raises(Compacted):
            await watch.pull()

    simulate(test())


@pytest.mark.parametrize("timeout", [2.0, 12.0, 60.0, float("inf")])
@pytest.mark.parametrize("error", [Unavailable(), DeadlineExceeded()])
def test_what_mends_is_tried_again_for_ever_or_for_as_long_as_was_said(error, timeout):
    async def test() -> None:
        router = FakeRouter()
        watch, impatient = watch_of(router, key=b"k"), watch_of(router, key=b"k", timeout=timeout)
        pulling, giving_up = (
            asyncio.create_task(watch.pull()),
            asyncio.create_task(impatient.pull()),
        )
        await asyncio.sleep(0.01)
        deadlines = [call.deadline - router.monotonic() for call in router.open_calls.values()]
        assert deadlines == [pytest.approx(15.0, abs=0.01), pytest.approx(timeout, abs=0.01)]
        for _ in range(10):
            router.fail(error)
            await asyncio.sleep(0.1)
        with pytest.raises(type(error)):
            await giving_up
        version = router.write(k=b"v")
        router.answer_all()
        assert (await pulling)[0].version == version

    simulate(test())


def test_throttled_tells_the_user_that_there_are_too_many_watches():
    async def test() -> None:
        router = FakeRouter()
        watch = watch_of(router, key=b"k")
        pulling = asyncio.create_task(watch.pull())
        await asyncio.sleep(0.01)
        router.fail(Throttled(1.0, "too many watches"))
        with pytest.raises(Throttled):
            await pulling

    simulate(test())


def test_a_client_with_too_many_calls_under_way_comes_back_to_it():
    async def test() -> None:
        router = FakeRouter()
        router.refuse = 5
        watch = watch_of(router, key=b"k")
        pulling = asyncio.create_task(watch.pull())
        await asyncio.sleep(1.0)
        version = router.write(k=b"v")
        router.answer_all()
        assert (await pulling)[0].version == version

    simulate(test())


def test_a_timer_that_comes_a_hair_early_does_not_end_the_asking():
    class EarlyTimers(FakeRouter):
        """Of its seconds a timer waits a little less, as one does that counts whole milliseconds."""

        def monotonic(self) -> float:
            return super().monotonic() * 0.99

    async def test() -> None:
        router = EarlyTimers()
        router.refuse = 5
        watch = watch_of(router, key=b"k")
        pulling = asyncio.create_task(watch.pull())
        await asyncio.sleep(1.0)
        assert len(router.open_calls) == 1
        version = router.write(k=b"v")
        router.answer_all()
        assert (await pulling)[0].version == version

    simulate(test())


def test_arguments_are_checked_before_anything_is_sent():
    router = FakeRouter()
    wrong: list[dict[str, Any]] = [
        {},
        {"key": b"a", "prefix": b"b"},
        {"key": b""},
        {"prefix": b"\xff"},
    ]
    for wanted in (*wrong, {"key": b"a", "since": -1}):
        with pytest.raises(InvalidArgument):
            watch_of(router, **wanted)
    with pytest.raises(KeyTooLarge):
        watch_of(router, key=bytes(5_000))

    async def test() -> None:
        with pytest.raises(InvalidArgument, match="not issued yet"):
            await watch_of(router, key=b"k", since=router.now_ts + 1).start()
        many = FakeRouter(*(b"%03d" % number for number in range(watches.LEGS_MAX)))
        with pytest.raises(InvalidArgument, match="at most 128"):
            await watch_of(many, prefix=b"").start()

    simulate(test())


def test_a_client_has_a_bounded_number_of_watches_and_closed_or_lost_ones_do_not_count():
    router = FakeRouter()
    every = Watches(lambda: router, random.Random(1), 5.0)  # type: ignore[arg-type,return-value]
    kept = [every.open(b"k", None, None, None) for _ in range(watches.WATCHES_MAX)]
    with pytest.raises(Throttled, match="close some"):
        every.open(b"k", None, None, None)
    kept.pop()
    assert len(every) == watches.WATCHES_MAX - 1
    asyncio.run(kept[0].close())
    assert len(every) == watches.WATCHES_MAX - 2


def test_one_consumer_at_a_time_and_none_after_the_end():
    async def test() -> None:
        router = FakeRouter()
        watch = watch_of(router, key=b"k")
        pulling = asyncio.create_task(watch.pull())
        await asyncio.sleep(0.01)
        with pytest.raises(InvalidArgument, match="one consumer"):
            await watch.pull()
        await watch.close()
        with pytest.raises(ClientClosed):
            await pulling
        with pytest.raises(ClientClosed):
            await watch.pull()
        await watch.close()

    simulate(test())


# --- nothing is left behind


def test_closing_tells_the_leaders_of_polls_that_wait():
    async def test() -> None:
        router = FakeRouter(b"m")
        async with watch_of(router, prefix=b"") as watch:
            pulling = asyncio.create_task(watch.pull())
            await asyncio.sleep(0.01)
            names = [request.watch for request in router.asked]
            pulling.cancel()
            await asyncio.gather(pulling, return_exceptions=True)
        assert not router.open_calls
        assert [(each.watch, each.since, each.wait_ms) for each in router.silent] == [
            (name, TIMESTAMP_MAX, 0) for name in names
        ]
        assert len(dict.fromkeys(names)) == 2

    simulate(test())


def test_a_leader_that_cannot_be_told_keeps_nobody_from_closing(monkeypatch):
    async def test() -> None:
        router, refused = FakeRouter(b"m"), list[Changes]()

        def refuse(request: Changes, *_: Any, **__: Any) -> Call:
            refused.append(request)
            raise Throttled

        async with watch_of(router, prefix=b"") as watch:
            pulling = asyncio.create_task(watch.pull())
            await asyncio.sleep(0.01)
            monkeypatch.setattr(router, "send", refuse)
        assert [each.since for each in refused] == [TIMESTAMP_MAX] * 2
        with pytest.raises(ClientClosed):
            await pulling

    simulate(test())


def test_closing_the_client_ends_its_watches_and_tells_the_leaders():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.ignore(Changes, times=100)
        waiting, left = db.watch(prefix=b""), db.watch(key=b"k")
        pulling = asyncio.create_task(waiting.pull())
        leaving = asyncio.create_task(left.pull())
        await cluster.settled()
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        asked = cluster.of(Changes)
        assert len(asked) == 2
        await db.close()
        with pytest.raises(ClientClosed):
            await pulling
        told = cluster.of(Changes)[2:]
        assert [each.since for each in told] == [TIMESTAMP_MAX] * 2
        assert {each.watch for each in told} == {each.watch for each in asked}

    simulate_cluster(test)


def test_a_poll_that_is_given_up_for_another_has_its_name():
    async def test() -> None:
        router = FakeRouter(b"m")
        watch = watch_of(router, prefix=b"")
        pulling = asyncio.create_task(watch.pull())
        await asyncio.sleep(0.01)
        router.write(a=b"1")
        first, second = router.open_calls.values()
        router.answer(first.id)
        await asyncio.sleep(0.01)
        (again,) = router.open_calls.values()
        assert isinstance(second.request, Changes)
        assert isinstance(again.request, Changes)
        assert again.request.watch == second.request.watch
        router.answer_all()
        await pulling
        await watch.close()

    simulate(test())


def test_a_poll_may_be_silent_for_as_long_as_it_waits():
    async def test() -> None:
        router = FakeRouter()
        watch = watch_of(router, key=b"k")
        pulling = asyncio.create_task(watch.pull())
        await asyncio.sleep(0.01)
        (call,) = router.open_calls.values()
        assert call.expires == pytest.approx(router.monotonic() - 0.009 + 1.0 + watches.WAIT_S)
        assert call.silence_s(1.0) == 1.0 + watches.WAIT_S
        pulling.cancel()
        await asyncio.gather(pulling, return_exceptions=True)

    simulate(test())
