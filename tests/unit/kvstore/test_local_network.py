"""Claims: pipes of one process carry frames in order and once, hold a bounded number of bytes, and end on both sides."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.adapters.local_network import HIGH_WATER_BYTES, LocalNetwork, LocalPipe
from kvstore.errors import PipeClosed


async def test_frames_arrive_in_order():
    ours, theirs = LocalPipe.pair()
    for number in range(5):
        assert ours.try_send(b"%d" % number)
    assert [await theirs.receive() for _ in range(5)] == [b"0", b"1", b"2", b"3", b"4"]


async def test_a_full_pipe_refuses_and_a_sender_waits_until_there_is_room():
    ours, theirs = LocalPipe.pair()
    assert ours.try_send(bytes(HIGH_WATER_BYTES))
    assert not ours.try_send(b"x")
    assert ours.buffered_bytes() == HIGH_WATER_BYTES
    sending = asyncio.create_task(ours.send(b"later"))
    await asyncio.sleep(0)
    assert not sending.done()
    await theirs.receive()
    await sending
    assert await theirs.receive() == b"later"


@pytest.mark.parametrize("side", [0, 1])
async def test_abort_ends_both_sides_and_wakes_who_waits(side):
    pair = LocalPipe.pair()
    waiting = asyncio.create_task(pair[0].receive())
    await asyncio.sleep(0)
    pair[side].abort()
    with pytest.raises(PipeClosed):
        await waiting
    for pipe in pair:
        with pytest.raises(PipeClosed):
            pipe.try_send(b"x")


async def test_close_lets_the_other_side_take_what_was_sent():
    ours, theirs = LocalPipe.pair()
    ours.try_send(b"last")
    await ours.close(0.1)
    assert await theirs.receive() == b"last"
    with pytest.raises(PipeClosed):
        await theirs.receive()


async def test_dialling_runs_the_listener_and_nobody_there_is_an_error():
    network = LocalNetwork()
    seen: list[tuple[str, bytes]] = []

    async def listener(path, pipe):
        seen.append((path, await pipe.receive()))

    with pytest.raises(PipeClosed):
        await network.dial("a:1", "/p", 1.0)
    await network.serve("a:1", listener)
    pipe = await network.dial("a:1", "/p", 1.0)
    assert pipe.try_send(b"hello")
    with pytest.raises(PipeClosed):
        await pipe.receive()  # the listener returned: the pipe ended
    assert seen == [("/p", b"hello")]
    await network.close()
