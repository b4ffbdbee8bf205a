"""Claims of messages in several frames (L2 of kvstore/link.py): half of one is kept for a bounded time, and one that goes on,
however slowly, is kept."""

from __future__ import annotations

import pytest

from kvstore import link
from kvstore.link import BODY_BYTES_MAX, LANES, MORE, PONG, LinkCore, LinkState, encode_frame
from tests.unit.kvstore.test_link import LIMITS, due, opened, said, shuttle, silent_end

PART_TIMEOUT_S = link.PART_STALLS * LIMITS.stall_timeout_s


def begun(core: LinkCore, now: float, lanes: range = range(LANES)) -> None:
    """Messages begin, or go on, in these lanes."""
    for lane in lanes:
        core.receive(encode_frame(MORE, lane, bytes(BODY_BYTES_MAX)), now)


@pytest.mark.parametrize("lane", range(LANES))
def test_a_message_that_does_not_go_on_is_given_up(lane):
    """Half of one is kept for it, up to 9 MiB: a thousand connections that answer pings held gigabytes for good."""
    near, far = opened()
    begun(near, 0.0, range(lane, lane + 1))

    def talk(core: LinkCore, now: float) -> None:
        core.receive(encode_frame(PONG, 0, bytes(8)), now)
        if not lane:
            return
        assert core.receive(said(far, now), now) == b"x"  # the other lane goes on

    at = silent_end(near, on_frame=talk)
    assert PART_TIMEOUT_S <= at <= PART_TIMEOUT_S + LIMITS.ping_interval_s
    assert near.state is LinkState.CLOSED
    assert not any(near._parts)


def test_a_message_whose_parts_take_turns_with_those_of_the_other_lane_is_kept():
    """However slow the wire is: each frame just comes before the peer is taken for silent."""
    near, _ = opened()
    now, apart = 0.0, 2 * LIMITS.stall_timeout_s - 0.1
    begun(near, now)
    for number in range(8):
        until = now + apart
        while (now := due(near)) < until:
            near.receive(encode_frame(PONG, 0, bytes(8)), now)
            near.tick(now)
            while near.take(now) is not None:
                near.unblocked(now)
        now = until
        near.receive(encode_frame(MORE, number % LANES, bytes(link.MORE_BYTES_MIN)), now)
        near.tick(now)
    assert near.state is LinkState.OPEN


def test_a_pause_of_our_own_process_gives_up_no_message():
    near, far = opened()
    near.tick(due(near))
    shuttle(near, far, 1.0)
    begun(near, 1.0)
    near.tick(500.0)  # its next parts are in the socket
    begun(near, 500.0)
    near.tick(due(near))
    assert near.state is LinkState.OPEN


def test_a_message_that_has_ended_is_waited_for_no_more():
    near, _ = opened()
    begun(near, 0.0)
    for lane in range(LANES):
        assert near.receive(encode_frame(0, lane, b"end"), 0.0) == bytes(BODY_BYTES_MAX) + b"end"

    def answer(core: LinkCore, now: float) -> None:
        if now < 5 * PART_TIMEOUT_S:
            core.receive(encode_frame(PONG, 0, bytes(8)), now)

    assert silent_end(near, on_frame=answer) > 5 * PART_TIMEOUT_S
