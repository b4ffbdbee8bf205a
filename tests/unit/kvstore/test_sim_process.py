"""Claims of simulated processes: a fuse kills one before the callback that was drawn, and nothing of it runs afterwards;
one that waits within a callback does nothing else meanwhile, sees the time pass, and is heard of only when it goes on."""

from __future__ import annotations

import asyncio
import random

import pytest

from kvstore.ports import FramePipe
from kvstore.sim import loop as simulated
from kvstore.sim.adapters import DRIFT_MAX, Machine, SimFiles
from kvstore.sim.network import SimNetwork, SimPipe
from kvstore.sim.process import PROCESS, Process, ProcessDied, world
from kvstore.sim.trace import Trace


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


class Waiting:
    """Process p on a machine, connected to q. It writes a log file, whose syncs take so long, sends, and sets a timer."""

    def __init__(self, sync_s: float) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, simulated.SimLoop)
        self.loop, self.start = loop, loop.time()
        self.process = Process("p")
        self.machine = Machine("p", random.Random(1), Trace(loop))
        self.machine.boot(self.process)
        self.machine.call_s = (sync_s, sync_s)
        self.network = SimNetwork(random.Random(1), delay_s=(0.001, 0.001))
        self.took: list[float] = []  # by the machine's clock, from before to after the work
        self.arrived: list[tuple[bytes, float]] = []
        self.rang: list[float] = []

    def since(self) -> float:
        return round(self.loop.time() - self.start, 2)

    async def connect(self) -> SimPipe:
        server = self.network.host("q")

        async def attend(_path: str, pipe: FramePipe) -> None:
            while True:
                self.arrived.append((await pipe.receive(), self.since()))

        address = await server.serve("q:1", attend)
        pipe = await self.network.host("p").dial(address, "/", 1.0)
        self.start = self.loop.time()
        return pipe

    async def work(self, pipe: SimPipe, syncs: int = 1) -> None:
        files, began = SimFiles(self.machine), self.machine.monotonic()
        wall = self.machine.wall_ms()
        pipe.try_send(b"before")
        files.create(1, 100)
        for _ in range(syncs):
            files.sync(1)
        assert self.machine.wall_ms() - wall == pytest.approx(
            1000 * (self.machine.monotonic() - began), rel=DRIFT_MAX, abs=1
        )
        self.took.append(round(self.machine.monotonic() - began, 2))
        pipe.try_send(b"after")
        self.loop.call_later(0.5, lambda: self.rang.append(self.since()))

    def do(self, pipe: SimPipe, syncs: int = 1) -> None:
        self.task = self.process.spawn(self.work(pipe, syncs))


@pytest.mark.parametrize(("syncs", "seconds"), [(1, 3.0), (2, 6.0)])
def test_who_waits_within_a_callback_sees_time_pass_and_sends_what_follows_when_it_is_over(
    syncs: int, seconds: float
) -> None:
    async def main(_loop: simulated.SimLoop) -> None:
        waiting = Waiting(3.0)
        pipe = await waiting.connect()
        waiting.do(pipe, syncs)
        await asyncio.sleep(1.0)
        moments: list[float] = []
        waiting.loop.call_soon(
            lambda: moments.append(waiting.since()), context=waiting.process.context()
        )
        await asyncio.sleep(10.0)
        assert waiting.took == [seconds]
        assert waiting.arrived == [(b"before", 0.0), (b"after", seconds)]
        assert waiting.rang == [seconds + 0.5]
        assert moments == [seconds]

    simulated.run(main, 1)


def test_who_dies_while_it_waits_has_sent_nothing_that_follows() -> None:
    async def main(_loop: simulated.SimLoop) -> None:
        waiting = Waiting(3.0)
        waiting.do(await waiting.connect())
        await asyncio.sleep(2.9)
        waiting.process.kill()
        await asyncio.sleep(10.0)
        assert waiting.arrived == [(b"before", 0.0)]
        assert waiting.rang == []

    simulated.run(main, 1)


@pytest.mark.parametrize("stopped_s", [1.0, 5.0])
def test_who_is_stopped_while_it_waits_goes_on_when_both_are_over(stopped_s: float) -> None:
    async def main(_loop: simulated.SimLoop) -> None:
        waiting = Waiting(3.0)
        waiting.do(await waiting.connect())
        await asyncio.sleep(0.5)
        waiting.process.pause()
        await asyncio.sleep(stopped_s)
        waiting.loop.resume(waiting.process)
        await asyncio.sleep(10.0)
        over = max(3.0, 0.5 + stopped_s)
        assert waiting.arrived == [(b"before", 0.0), (b"after", over)]
        assert waiting.rang == [max(over, 3.5)]

    simulated.run(main, 1)


def test_the_clock_does_not_go_back_whatever_rate_it_gets_while_its_process_waits() -> None:
    async def main(_loop: simulated.SimLoop) -> None:
        waiting = Waiting(3.0)
        machine = waiting.machine
        machine.drift(0.97)
        waiting.do(await waiting.connect())
        seen = [machine.monotonic()]
        for number in range(40):
            await asyncio.sleep(0.1)
            if number == 10:
                machine.drift(1.03)
            seen.append(machine.monotonic())
        assert seen == sorted(seen)

    simulated.run(main, 1)


def test_a_frame_that_waits_to_leave_is_lost_with_its_connection() -> None:
    async def main(_loop: simulated.SimLoop) -> None:
        waiting = Waiting(3.0)
        pipe = await waiting.connect()
        waiting.do(pipe)
        await asyncio.sleep(1.0)
        waiting.network.reset(pipe)
        await asyncio.sleep(10.0)
        assert waiting.arrived in ([(b"before", 0.0)], [])

    simulated.run(main, 1)
