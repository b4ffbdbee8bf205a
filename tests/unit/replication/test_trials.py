"""A state that could not be read is tried at leisure: a chunk at a time, seldomer after each failure, told only when whole."""

from __future__ import annotations

from itertools import pairwise

from replication.trials import CHUNK_S, FORGIVEN_S, PAUSE_MAX_S, PAUSE_S, Trials


class Source:
    def __init__(self, chunks: int) -> None:
        self.left, self.closed = chunks, False

    def chunk(self) -> bytes | None:
        if self.left < 0:
            raise OSError
        self.left -= 1
        return b"rows" if self.left >= 0 else None

    def close(self) -> None:
        self.closed = True


class Machine:
    """A state of so many chunks; None: it cannot even be opened."""

    def __init__(self, chunks: int | None) -> None:
        self.chunks, self.opened = chunks, list[Source]()

    def snapshot_open(self, group: int) -> Source:
        if self.chunks is None:
            raise OSError
        self.opened.append(Source(self.chunks))
        return self.opened[-1]


def trials_of(machine: Machine) -> tuple[Trials, list[int]]:
    readable: list[int] = []
    return Trials(machine, readable.append), readable  # type: ignore[arg-type]


def played(trials: Trials, now: float, until: float) -> list[float]:
    """Work from deadline to deadline. Returns when that was."""
    times = []
    while (at := trials.deadline()) is not None and at <= until:
        now = max(now, at)
        trials.work(now)
        times.append(now)
    return times


def test_a_state_is_readable_when_its_last_chunk_was_read_and_not_before():
    machine = Machine(3)
    trials, readable = trials_of(machine)
    trials.failed(7, 100.0)
    trials.work(100.0 + PAUSE_S - 0.001)
    assert not machine.opened
    times = played(trials, 100.0, 100.0 + PAUSE_S + 2.5 * CHUNK_S)
    assert len(times) == 3
    assert not readable
    played(trials, times[-1], 200.0)
    assert readable == [7]
    assert machine.opened[0].closed
    assert not trials
    assert trials.deadline() is None


def test_a_trial_reads_no_faster_than_a_chunk_each_hundredth_of_a_second():
    machine = Machine(100)
    trials, readable = trials_of(machine)
    trials.failed(7, 0.0)
    for _ in range(50):
        trials.work(PAUSE_S)
    assert machine.opened[0].left == 99
    times = played(trials, PAUSE_S, 100.0)
    assert readable == [7]
    assert times[-1] - PAUSE_S >= 100 * CHUNK_S - 1e-6


def test_trials_in_vain_become_seldom_but_never_end():
    trials, readable = trials_of(Machine(None))
    trials.failed(7, 0.0)
    times = played(trials, 0.0, 600.0)
    gaps = [after - before for before, after in pairwise(times)]
    assert gaps[:3] == [2 * PAUSE_S, 4 * PAUSE_S, 8 * PAUSE_S]
    assert set(gaps[4:]) == {PAUSE_MAX_S}
    assert not readable
    assert trials


def test_a_chunk_that_fails_ends_the_trial_and_closes_what_was_open():
    machine = Machine(-1)
    trials, readable = trials_of(machine)
    trials.failed(7, 0.0)
    played(trials, 0.0, PAUSE_S)
    assert machine.opened[0].closed
    assert not readable
    assert trials.deadline() == 3 * PAUSE_S


def test_a_group_that_goes_away_is_not_tried_any_more():
    machine = Machine(3)
    trials, readable = trials_of(machine)
    trials.failed(7, 0.0)
    trials.work(PAUSE_S)
    trials.drop(7)
    assert machine.opened[0].closed
    assert not trials
    trials.failed(8, 0.0)
    trials.drop(8)
    assert not played(trials, 0.0, 100.0)
    assert not readable


def test_two_groups_are_tried_one_after_the_other():
    machine = Machine(2)
    trials, readable = trials_of(machine)
    trials.failed(7, 0.0)
    trials.failed(8, 0.0)
    played(trials, 0.0, 100.0)
    assert readable == [7, 8]
    assert [source.left for source in machine.opened] == [-1, -1]


def test_streams_that_break_off_together_are_one_failure():
    trials, _ = trials_of(Machine(None))
    trials.failed(7, 0.0)
    trials.failed(7, 0.1)
    times = played(trials, 0.1, 3 * PAUSE_S)
    assert times == [PAUSE_S, 3 * PAUSE_S]


def test_a_failure_long_after_a_success_is_a_first_one_and_a_failure_soon_after_it_is_not():
    machine = Machine(None)
    trials, readable = trials_of(machine)
    trials.failed(7, 0.0)
    times = played(trials, 0.0, 300.0)
    machine.chunks = 2
    read_at = played(trials, times[-1], 600.0)[-1]
    assert readable == [7]
    trials.failed(7, read_at + 1.0)
    assert trials.deadline() == read_at + 1.0 + PAUSE_MAX_S
    read_at = played(trials, read_at + 1.0, read_at + 100.0)[-1]
    assert readable == [7, 7]
    trials.failed(7, read_at + FORGIVEN_S)
    assert trials.deadline() == read_at + FORGIVEN_S + PAUSE_S
