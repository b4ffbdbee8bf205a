"""Claims of the probes: inert by themselves; counted and chosen within a block, and no longer."""

from __future__ import annotations

from replication.probes import chance, choosing, counting, reached


def test_without_a_simulator_nothing_is_counted_and_nothing_is_chosen() -> None:
    reached("here")
    assert chance("there") is False


def test_what_is_reached_within_a_block_is_counted() -> None:
    with counting() as outer:
        reached("here")
        reached("here")
        with counting() as inner:
            reached("there")
        reached("here")
    reached("here")
    assert outer == {"here": 3}
    assert inner == {"there": 1}


def test_chances_are_chosen_within_a_block_and_counted_when_taken() -> None:
    with counting() as counts, choosing(lambda name: name == "taken"):
        assert chance("taken") is True
        assert chance("left") is False
    assert chance("taken") is False
    assert counts == {"chance:taken": 1}


def test_an_exception_ends_the_block_all_the_same() -> None:
    try:
        with counting(), choosing(lambda _name: True):
            raise ValueError
    except ValueError:
        pass
    assert chance("any") is False
