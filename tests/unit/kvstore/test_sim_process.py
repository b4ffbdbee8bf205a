"""Claims of simulated processes' fuses: a process dies before the callback that was drawn, and runs nothing after it."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.sim import loop as simulated
from kvstore.sim.process import PROCESS, Process, ProcessDied, world


def steps_until_death(fuse: int) -> list[int]:
    async def main(_loop: simulated.SimLoop) -> list[int]:
        process = Process("p")
        taken: list[int] = []

        async def work() -> None:
            try:
                for step in range(1, 10):
                    taken.append(step)
                    await asyncio.sleep(0.1 if step % 2 else 0)
            finally:
                taken.append(0)

        process.light(fuse, process.kill)
        with pytest.raises(ProcessDied):
            await process.call(work())
        await asyncio.sleep(10.0)
        assert not process.lit
        return list(taken)  # at the very end, when the loop is gone, tasks are closed after all

    return simulated.run(main, 1)


def test_it_dies_at_the_await_that_was_drawn_and_cleans_nothing_up() -> None:
    histories = [steps_until_death(fuse) for fuse in range(1, 9)]
    assert histories[0] == []
    assert histories == sorted(histories, key=len)
    assert {len(history) for history in histories} >= {0, 2, 3, 4}
    assert all(0 not in history for history in histories)


def test_what_burns_down_happens_as_the_world() -> None:
    async def main(_loop: simulated.SimLoop) -> list[Process | None]:
        process = Process("p")
        seen: list[Process | None] = []

        async def work() -> str:
            await asyncio.sleep(0.1)
            return "done"

        process.light(2, lambda: seen.append(PROCESS.get()))
        assert await process.call(work()) == "done"
        return seen

    assert simulated.run(main, 1) == [None]


def test_a_fuse_that_is_put_out_does_nothing() -> None:
    async def main(_loop: simulated.SimLoop) -> bool:
        process = Process("p")
        process.light(3, process.kill)
        process.unlight()
        await process.call(asyncio.sleep(0.1))
        return process.dead

    assert simulated.run(main, 1) is False


def test_the_worlds_context_has_no_process() -> None:
    async def main(_loop: simulated.SimLoop) -> Process | None:
        process = Process("p")

        async def work() -> Process | None:
            return world().run(PROCESS.get)

        return await process.call(work())

    assert simulated.run(main, 1) is None
