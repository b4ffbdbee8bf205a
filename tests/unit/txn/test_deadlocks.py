"""Claims of the deadlock detector (txn/deadlocks.py): a cycle is found within its bound whatever ranges it goes through, only
one that existed at one instant is, and its victim is the youngest that is not committing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from txn import deadlocks
from txn.deadlocks import CYCLE_S, DETECTOR_KEY, REPORT_S, STALE_S, Detector, _cycle_in
from txn.messages import LockEdge, LockWaits


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def edge(number: int, waiter: int, *blockers: int, age: int = 0, committing: bool = False):
    return LockEdge(
        number, name(waiter), age or waiter, committing, [name(each) for each in blockers]
    )


class Source:
    """A range that reports its waits, one report at a time."""

    def __init__(self, detector: Detector, range_id: int, term: int = 1) -> None:
        self.detector, self.range_id, self.term = detector, range_id, term
        self.number = 0
        self.edges: list[LockEdge] = []

    def report(self, now: float, *, after: int | None = None) -> dict[int, list[bytes]]:
        before, self.number = self.number, self.number + 1
        after = before if after is None else after
        waits = LockWaits(
            0, 0, 0, DETECTOR_KEY, self.range_id, self.term, self.number, after, self.edges
        )
        return {each.number: each.cycle for each in self.detector.report(waits, now)}


def test_a_cycle_within_one_range_is_told_to_the_youngest():
    source = Source(Detector(), 1)
    source.edges = [edge(1, 10, 11), edge(2, 11, 10)]
    assert source.report(0.0) == {}
    assert source.report(REPORT_S) == {2: [name(11), name(10)]}


def test_a_cycle_through_three_ranges_is_found_within_its_bound():
    detector = Detector()
    sources = [Source(detector, number) for number in (1, 2, 3)]
    for number, source in enumerate(sources):
        source.edges = [edge(7, 10 + number, 10 + (number + 1) % 3)]
    told: dict[tuple[int, int], list[bytes]] = {}
    now = 0.0
    while not told:
        for place, source in enumerate(sources):
            told |= {(place, number): cycle for number, cycle in source.report(now).items()}
            now += REPORT_S / 3
    assert told == {(2, 7): [name(12), name(10), name(11)]}
    assert now < CYCLE_S


def pair(detector: Detector) -> tuple[Source, Source]:
    """Two ranges through which a cycle goes: 11 waits for 10 in the second, and 10 for 11 in the first."""
    one, two = Source(detector, 1), Source(detector, 2)
    one.edges, two.edges = [edge(7, 10, 11)], [edge(7, 11, 10)]
    return one, two


def test_waits_in_ranges_that_report_once_do_not_hide_a_cycle_of_others():
    """Each 0.1 s somebody waits in a range where nobody did before, and no more when that would report again."""
    detector = Detector()
    one, two = pair(detector)
    told: dict[int, list[bytes]] = {}
    step, now = 0, 0.0
    while not told and now < 10 * CYCLE_S:
        if step % 2 == 0:
            brief = Source(detector, 100 + step)
            brief.edges = [edge(1, 1_000 + step, 2_000 + step)]
            brief.report(now)
        told = one.report(now + 0.01) | two.report(now + 0.02)
        step, now = step + 1, now + REPORT_S
    assert told == {7: [name(11), name(10)]}
    assert now < CYCLE_S


def test_a_range_whose_reports_take_long_does_not_hide_a_cycle_of_others():
    """What it confirms is nearly two of its reports old."""
    detector = Detector()
    slow = Source(detector, 9)
    slow.edges = [edge(1, 20, 21)]
    one, two = pair(detector)
    told: dict[int, list[bytes]] = {}
    began, now, step = 1.0, 0.0, 0
    while not told and now < began + 10 * CYCLE_S:
        if step % 4 == 0:
            slow.report(now - 0.01)
        if now >= began:
            told = one.report(now) | two.report(now + 0.01)
        step, now = step + 1, now + REPORT_S * 0.99
    assert told == {7: [name(11), name(10)]}
    assert now - began < 0.6 * CYCLE_S


def test_a_cycle_is_found_though_each_of_its_reports_takes_long():
    detector = Detector()
    one, two = pair(detector)
    told: dict[int, list[bytes]] = {}
    now = 0.0
    while not told and now < 10 * CYCLE_S:
        told = one.report(now) | two.report(now + 0.4 * STALE_S)
        now += 0.9 * STALE_S
    assert told == {7: [name(11), name(10)]}
    assert now < 2 * CYCLE_S


def test_a_verdict_ends_with_its_leaders_term():
    """Waits are numbered anew in each term: the number may be an innocent's."""
    detector = Detector()
    one, two = pair(detector)
    for now in (0.0, REPORT_S):
        assert one.report(now) == two.report(now + 0.02) == {}
    assert one.report(2 * REPORT_S) == {}
    assert detector.cycles == 1, "the other range has a victim, and has not heard of it"
    next_leader = Source(detector, 2, term=2)
    next_leader.edges = [edge(7, 90, 91)]
    for now in (0.11, 0.16, 0.21):
        assert next_leader.report(now) == {}


def test_waits_that_never_were_at_one_time_are_no_cycle():
    """10 waits for 11 and is served; only then 11 waits for 10's other lock. A report of each is not enough."""
    detector = Detector()
    one, two = Source(detector, 1), Source(detector, 2)
    one.edges = [edge(1, 10, 11)]
    one.report(0.0)
    two.edges = [edge(1, 11, 10)]
    two.report(1 * REPORT_S)
    two.report(2 * REPORT_S)
    one.edges = []
    assert one.report(3 * REPORT_S) == {}
    assert two.report(4 * REPORT_S) == {}
    assert detector.cycles == 0


class Lived(NamedTuple):
    """A wait, in the truth."""

    range_id: int
    edge: LockEdge
    since: float
    until: float


def reports_of(
    range_id: int, waits: list[Lived], rng: random.Random
) -> Iterator[tuple[float, LockWaits]]:
    """When they arrive, and what. Some take long, some answers are lost, and what was given up may arrive all the same."""
    made, after = 0.0, 0
    for number in range(1, 50):
        edges = [
            each.edge
            for each in waits
            if each.range_id == range_id and each.since <= made < each.until
        ]
        arrives = made + rng.choice((0.001, 0.02, 0.02, 0.09))
        answered = rng.random() < 0.9
        if not answered:
            arrives += rng.choice((0.0, 0.25))
        yield arrives, LockWaits(0, 0, 0, DETECTOR_KEY, range_id, 1, number, after, edges)
        if answered:
            made, after = max(made + REPORT_S, arrives + rng.choice((0.001, 0.05))), number
        else:
            made += 0.2


def test_whatever_is_called_a_cycle_was_one_at_some_instant():
    rng = random.Random(7)
    called = 0
    for _ in range(100):
        waits = []
        for number in range(60):
            since = rng.random() * 2.5
            until = since + rng.choice((0.1, 0.2, 0.4, 0.8))
            one = edge(number, *rng.sample(range(6), 2), age=1)
            waits.append(Lived(rng.randrange(4), one, since, until))
        arrivals = [each for range_id in range(4) for each in reports_of(range_id, waits, rng)]
        detector = Detector()
        for now, report in sorted(arrivals, key=lambda each: each[0]):
            for victim in detector.report(report, now):
                called += 1
                cycle = victim.cycle
                steps = set(zip(cycle, cycle[1:] + cycle[:1], strict=True))
                assert any(
                    steps
                    <= {
                        (each.edge.waiter, each.edge.blockers[0])
                        for each in waits
                        if each.since <= instant.since < each.until
                    }
                    for instant in waits
                )
    assert called > 300


def test_a_report_that_says_not_when_it_was_made_confirms_nothing():
    """Its answer was not waited for, so it may be as old as the one before."""
    source = Source(Detector(), 1)
    source.edges = [edge(1, 10, 11), edge(2, 11, 10)]
    source.report(0.0)
    assert source.report(1 * REPORT_S, after=0) == {}
    assert source.report(2 * REPORT_S, after=0) == {}
    assert 2 in source.report(3 * REPORT_S)


def test_a_deposed_leader_and_an_overtaken_report_say_nothing():
    detector = Detector()
    old, new = Source(detector, 1, term=1), Source(detector, 1, term=2)
    new.edges = []
    new.report(0.0)
    new.edges = [edge(1, 10, 12)]
    new.report(1 * REPORT_S)
    old.edges = [edge(1, 10, 11), edge(2, 11, 10)]
    for now in (0.02, 0.03, 0.04):
        assert old.report(now) == {}
    new.number -= 1
    assert new.report(5 * REPORT_S) == {}


def test_who_commits_is_no_victim():
    source = Source(Detector(), 1)
    source.edges = [edge(1, 10, 11), edge(2, 11, 10, committing=True)]
    source.report(0.0)
    assert list(source.report(1 * REPORT_S)) == [1]
    source.edges = [edge(3, 20, 21, committing=True), edge(4, 21, 20, committing=True)]
    source.report(2 * REPORT_S)
    assert source.report(3 * REPORT_S) == {}


def test_of_one_age_the_larger_id_gives_way_and_everybody_agrees():
    source = Source(Detector(), 1)
    source.edges = [edge(1, 10, 11, age=5), edge(2, 11, 10, age=5)]
    source.report(0.0)
    assert list(source.report(1 * REPORT_S)) == [2]


def test_two_cycles_have_two_victims_and_one_may_break_two():
    source = Source(Detector(), 1)
    source.edges = [edge(1, 10, 11), edge(2, 11, 10), edge(3, 20, 21), edge(4, 21, 20)]
    source.report(0.0)
    assert list(source.report(1 * REPORT_S)) == [2, 4]
    source.edges = [edge(5, 30, 32), edge(6, 31, 32), edge(7, 32, 30, 31)]
    source.report(2 * REPORT_S)
    assert list(source.report(3 * REPORT_S)) == [7]


def test_many_ranges_share_a_search_and_each_hears_of_its_victim(monkeypatch):
    searches, search = [], Detector._search

    def counted(self: Detector, now: float) -> None:
        searches.append(self)
        search(self, now)

    monkeypatch.setattr(Detector, "_search", counted)
    detector = Detector()
    sources = [Source(detector, number) for number in range(1, 101)]
    for number, source in enumerate(sources):
        source.edges = [edge(1, 10 + number, 500 + number), edge(2, 500 + number, 10 + number)]
    told: list[int] = []
    for number in range(400):  # each of them every REPORT_S
        told += sources[number % 100].report(number * REPORT_S / 100)
    assert told == [2] * 100
    assert len(searches) <= 9


def test_many_cycles_are_found_in_one_walk(monkeypatch):
    steps, walk = [], deadlocks._steps

    def counted(waits):
        for step in walk(waits):
            steps.append(step)
            yield step

    monkeypatch.setattr(deadlocks, "_steps", counted)
    source = Source(Detector(), 1)
    for number in range(0, 1_000, 2):
        source.edges += [edge(number, number, number + 1), edge(number + 1, number + 1, number)]
    source.report(0.0)
    assert len(source.report(REPORT_S)) == 500
    assert len(steps) < 3_000


def test_a_range_that_reports_no_more_is_forgotten():
    detector = Detector()
    one, two = Source(detector, 1), Source(detector, 2)
    one.edges, two.edges = [edge(1, 10, 11)], [edge(1, 11, 10)]
    one.report(0.0)
    for step in range(1, 6):
        two.report(STALE_S + step * REPORT_S)
    assert detector.cycles == 0


def test_a_search_finds_a_cycle_exactly_when_there_is_one():
    """Against a dumb oracle: remove whoever waits for nobody that waits, until nothing changes."""
    rng = random.Random(5)
    found = 0
    for _ in range(3_000):
        count = rng.randint(1, 7)
        waits: dict[bytes, list[tuple[int, LockEdge]]] = {}
        for number in range(rng.randint(1, 9)):
            waiter = rng.randrange(count)
            blockers = rng.sample(range(count), rng.randint(0, min(count, 2)))
            one = edge(number, waiter, *[each for each in blockers if each != waiter])
            waits.setdefault(name(waiter), []).append((0, one))
        left = {
            waiter: [to for _, each in edges for to in each.blockers]
            for waiter, edges in waits.items()
        }
        while gone := [
            waiter for waiter, to in left.items() if not any(each in left for each in to)
        ]:
            left = {waiter: to for waiter, to in left.items() if waiter not in gone}
        cycle = _cycle_in(waits, list(waits), {})
        assert bool(cycle) == bool(left)
        for place, (_, each) in enumerate(cycle):
            assert cycle[(place + 1) % len(cycle)][1].waiter in each.blockers
        found += bool(cycle)
    assert found > 300
