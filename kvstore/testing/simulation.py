"""`@simulate`: a test plays on many seeds of a simulated cluster, and the first seed that fails can be played again alone.

    @simulate(seeds=100)
    async def test_transfers_keep_the_sum(cluster, db): ...

An argument named `cluster` gets a SimCluster, one named `db` its client; whatever else a test takes stays the business of
pytest (fixtures, parametrize). What comes out is a plain function: no plugin for asyncio is needed, and none interferes.
The test runs as a client process of the simulation, while random faults come and, after a while, end. Each seed has a
cluster and an event loop of its own. A test fails with its own exception, to which a note is added: the seed, the command
that plays it again, and what had been done to the cluster.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import traceback
import unittest
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from types import CodeType, TracebackType
from typing import Any, Final, overload

from kvstore import logs
from kvstore.adapters.real_world import kept_out
from kvstore.sim import cluster as internal
from kvstore.sim import loop as simulated
from kvstore.sim.loop import UNSEEN, SimError, SimLoop, SimTimeout
from kvstore.sim.process import Process, ProcessDied
from kvstore.testing import seeds as wishes
from kvstore.testing.simulated_cluster import (
    CALL_TIMEOUT_S,
    RUN,
    TEST,
    Run,
    SimCluster,
    check_faults,
)

Test = Callable[..., Coroutine[Any, Any, None]]
Played = Callable[..., None]

SEEDS: Final = 100
TIMEOUT_S: Final = 120.0
CLUSTER, DB = "cluster", "db"  # the arguments that are ours
OF_THE_CLUSTER: Final = ("faults", "nodes", "splits", "call_timeout_s")  # of the options
FRAMES_MAX: Final = 20
SETTLE_STEPS: Final = (
    5  # of the loop, after which who waits for a task that has just failed has learned of it
)


class SimulationFailed(AssertionError):
    """The test passed, but something else in its simulation did not: the message says what."""


@dataclass(frozen=True)
class Options:
    """As the arguments of `simulate`."""

    seeds: int | tuple[int, ...] = SEEDS
    faults: bool | tuple[str, ...] = True
    nodes: int = 3
    splits: tuple[bytes, ...] = internal.SPLITS
    call_timeout_s: float = CALL_TIMEOUT_S
    timeout_s: float = TIMEOUT_S


@overload
def simulate(test: Test, /) -> Played: ...
@overload
def simulate(
    *,
    seeds: int | Sequence[int] = SEEDS,
    faults: bool | Sequence[str] = True,
    nodes: int = 3,
    splits: Sequence[bytes] = internal.SPLITS,
    call_timeout_s: float = CALL_TIMEOUT_S,
    timeout_s: float = TIMEOUT_S,
) -> Callable[[Test], Played]: ...
def simulate(
    test: Test | None = None,
    /,
    *,
    seeds: int | Sequence[int] = SEEDS,
    faults: bool | Sequence[str] = True,
    nodes: int = 3,
    splits: Sequence[bytes] = internal.SPLITS,
    call_timeout_s: float = CALL_TIMEOUT_S,
    timeout_s: float = TIMEOUT_S,
) -> Played | Callable[[Test], Played]:
    """Play an `async def` test on many seeds; `@simulate` alone takes every default.

    Args:
        seeds: 1 to so many, or exactly these. pytest's --kvorum-seed N goes over both, --kvorum-seeds N over the number
        alone; so do the environment variables KVORUM_SEED and KVORUM_SEEDS.
        faults: True: each seed draws its kinds; False: none; or these kinds (kvstore.testing.FAULTS). They end after at
        most 10 virtual seconds; `await cluster.recover()` ends them before.
        nodes, splits, call_timeout_s: of the cluster, as in SimCluster.
        timeout_s: virtual seconds that one seed may take.

    Raises, at once: ValueError: there is no fault of that name. TypeError: not an `async def`; faults, nodes, splits or
    call_timeout_s for a test that takes neither `cluster` nor `db`.

    Raises, from the test: what the test raises; SimTimeout; SimulationFailed.
    """
    options = Options(
        seeds if isinstance(seeds, int) else tuple(seeds),
        faults if isinstance(faults, bool) else tuple(faults),
        nodes,
        tuple(splits),
        call_timeout_s,
        timeout_s,
    )
    if not isinstance(options.faults, bool):
        check_faults(options.faults)
    if test is None:
        return lambda given: _decorated(given, options)
    return _decorated(test, options)


def _decorated(test: Test, options: Options) -> Played:
    if not inspect.iscoroutinefunction(inspect.unwrap(test)):
        raise TypeError(f"@simulate is for `async def`, which {test!r} is not")
    signature = inspect.signature(test)
    ours = [name for name in (CLUSTER, DB) if name in signature.parameters]
    if not ours:
        _check_clusterless(options)

    @functools.wraps(test)
    def played(*args: Any, **kwargs: Any) -> None:
        __tracebackhide__ = True
        if asyncio._get_running_loop() is not None:  # noqa: SLF001 - the one that does not raise
            raise SimError("a simulated test brings its own event loop: call it from plain code")
        with simulated.heap_set_aside():  # all of pytest
            for seed in wishes.chosen(options.seeds):
                error = _play(seed, options, ours, test, args, kwargs)
                if error is not None:
                    raise error.with_traceback(_of_the_test(error, inspect.unwrap(test).__code__))

    theirs = [each for name, each in signature.parameters.items() if name not in ours]
    played.__signature__ = signature.replace(parameters=theirs)  # type: ignore[attr-defined]
    return played


def _check_clusterless(options: Options) -> None:
    """Raises: TypeError: something of a cluster was asked for. `faults=False` is what such a test has anyway."""
    asked = replace(options, faults=options.faults or True)
    for name in OF_THE_CLUSTER:
        if getattr(asked, name) != getattr(Options, name):
            raise TypeError(
                f"{name}= is of the cluster that @simulate makes, and this test takes neither `cluster` nor `db`"
            )


def _play(
    seed: int, options: Options, ours: list[str], test: Test, args: Any, kwargs: Any
) -> BaseException | None:
    """One seed. Returns what it failed with, with its note."""
    run = Run(seed)
    try:
        with (
            logs.silenced(unless_set=True),
            logs.overheard(lambda text: run.unseen.append(f"Kvorum has logged: {text}")),
            kept_out(f"user/{seed}", SimError),
        ):
            simulated.run(lambda loop: _played(loop, run, options, ours, test, args, kwargs), seed)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the caller raises it
        if not _is_skip(error):
            error.add_note(_note(run))
        return error
    finally:
        gc.collect()  # now, and not in the middle of what comes later
    return None


async def _played(
    loop: SimLoop,
    run: Run,
    options: Options,
    ours: list[str],
    test: Test,
    args: Any,
    kwargs: Any,
) -> None:
    RUN.set(run)
    # a cluster has a handler of its own
    loop.set_exception_handler(lambda _loop, found: _failed_unseen(run, found))
    process = Process(TEST)
    given = dict(kwargs)
    cluster: SimCluster | None = None
    if ours:
        cluster = SimCluster(
            nodes=options.nodes, splits=options.splits, call_timeout_s=options.call_timeout_s
        )
        await cluster.start()
        if CLUSTER in ours:
            given[CLUSTER] = cluster
    stack: list[Coroutine[Any, Any, None]] = []

    async def whole() -> None:
        if cluster is not None:
            db = await cluster.connect(TEST)
            if DB in ours:
                given[DB] = db
            if options.faults:
                kinds = options.faults if isinstance(options.faults, tuple) else ()
                cluster.begin_chaos(kinds)
        stack.append(test(*args, **given))
        await stack[0]

    try:
        async with asyncio.timeout(options.timeout_s) as limit:
            await process.call(whole())
        for _ in range(SETTLE_STEPS):
            await asyncio.sleep(0)
        for error in loop.unseen():
            _failed_unseen(run, {"message": UNSEEN, "exception": error})
        _judge(run)
    except TimeoutError:
        if not limit.expired():
            raise
        at = "".join(f"\n    {line}" for line in _waiting_at(stack[0] if stack else None))
        limit_s = options.timeout_s
        raise SimTimeout(
            f"no end within {limit_s:g} virtual seconds; the test waits at{at}"
        ) from None
    except ProcessDied:
        if not process.dead:
            raise
        raise SimulationFailed("the process of the test was killed") from None
    finally:
        # what tasks of dead processes have failed with is of no interest when they are taken away
        loop.set_exception_handler(lambda _loop, _context: None)


def _failed_unseen(run: Run, context: dict[str, Any]) -> None:
    error = context.get("exception")
    text = f"{context.get('message')}: {error!r}"
    if error is not None:
        text += "\n" + "".join(traceback.format_exception(error))
    run.unseen.append(text)


def _judge(run: Run) -> None:
    if run.unseen:
        raise SimulationFailed("the test passed, but\n" + "\n".join(run.unseen))
    for cluster in run.clusters:
        for failure in cluster.failures():
            failure.add_note(
                "raised in a process that `cluster.spawn` started and nobody waited for"
            )
            raise failure
        if cluster.problems:
            text = "\n".join(cluster.problems)
            raise SimulationFailed(f"the test passed, but in its simulated cluster:\n{text}")


# --- what a failure says --------------------------------------------------------------------------


def _note(run: Run) -> str:
    lines = [
        f"Kvorum: seed {run.seed} fails. To play it again, alone:",
        f"    {wishes.replay_line(run.seed)}",
    ]
    lines += [f"Besides: {text}" for text in run.unseen]
    for cluster in run.clusters:
        story = cluster.story()
        lines.append(
            "What was done to the cluster:" if story else "Nothing was done to the cluster."
        )
        lines += [f"    {event}" for event in story]
        for problem in cluster.problems:
            lines.append(f"Besides, in the cluster: {problem}")
    return "\n".join(lines)


def _of_the_test(error: BaseException, code: CodeType) -> TracebackType | None:
    """The traceback from the test on, without the way to it; none of what was raised here about the test."""
    if isinstance(error, SimTimeout | SimulationFailed):
        return None
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code is not code:
        trace = trace.tb_next
    return trace or error.__traceback__


def _waiting_at(coro: Any) -> list[str]:
    """Where a coroutine is suspended, outermost first."""
    lines: list[str] = []
    while coro is not None and len(lines) < FRAMES_MAX:
        frame = getattr(coro, "cr_frame", None)
        if frame is None:
            break
        name = frame.f_code.co_qualname
        lines.append(f"{frame.f_code.co_filename}:{frame.f_lineno} in {name}")
        coro = coro.cr_await
    return lines


def _is_skip(error: BaseException) -> bool:
    return isinstance(error, unittest.SkipTest) or type(error).__name__ == "Skipped"  # pytest's
