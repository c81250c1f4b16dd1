"""Time work in fresh processes, so that no benchmark inherits another's threads or memory."""

import multiprocessing
import multiprocessing.connection
import multiprocessing.synchronize
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from embrm.bench.footprint import Footprint, watched
from embrm.core.errors import UserError
from embrm.training.numerics import environment

Prepare = Callable[..., Callable[[], Any]]
"""A module-level function that sets everything up and returns the function to be timed."""


@dataclass(frozen=True)
class Measured:
    """Result of `measure`.

    seconds: of the fastest round, until its last process had finished.
    values: what the work returned in that round, one value per process.
    memory: peak of all processes together, from their start. It is sampled rather than taken from
    `resource.getrusage`: processes reach their own peaks at different times, so a sum of those
    would overstate what they need together.
    """

    seconds: float
    values: list[Any]
    memory: Footprint


def measure(
    prepare: Prepare,
    *arguments: Any,
    processes: int = 1,
    threads: int = 1,
    rounds: int = 1,
    settings: Mapping[str, str] | None = None,
) -> Measured:
    """Time `prepare(*arguments)()` in `processes` processes at once, `rounds` times.

    threads: number of threads of each process.
    settings: environment variables of the processes, beside those that set the threads.
    A round starts at the same moment in all processes, once all are prepared.
    Raises: UserError if a process was killed, and whatever the work raises.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    own = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS")}
    started = []
    try:
        with environment(own | {**(settings or {})}):
            for _ in range(processes):
                here, there = context.Pipe()
                process = context.Process(
                    target=_work, args=(there, barrier, rounds, threads, prepare, arguments)
                )
                process.start()
                there.close()
                started.append((process, here))
        with watched([process.pid for process, _ in started if process.pid]) as memory:
            outcomes = _outcomes([here for _, here in started])
    except BaseException:
        for process, _ in started:
            process.terminate()
        raise
    finally:
        for _, here in started:
            here.close()  # a process that has answered waits for this before it ends
        for process, _ in started:
            process.join()
    seconds, values = zip(*outcomes, strict=True)
    slowest = [max(times) for times in zip(*seconds, strict=True)]
    fastest = slowest.index(min(slowest))
    return Measured(
        seconds=slowest[fastest],
        values=[of_rounds[fastest] for of_rounds in values],
        memory=memory,
    )


def _outcomes(
    ends: Sequence[multiprocessing.connection.Connection],
) -> list[tuple[list[float], list[Any]]]:
    """Receive seconds and values of all rounds from each process."""
    outcomes: dict[Any, tuple[list[float], list[Any]]] = {}
    while waiting := [here for here in ends if here not in outcomes]:
        # In order of arrival: the others may be waiting at the barrier for one that has failed.
        ready = multiprocessing.connection.wait(waiting)
        for here in [here for here in waiting if here in ready]:
            try:
                outcome = here.recv()
            except EOFError:
                raise UserError(
                    "a process of the benchmark was killed, perhaps for lack of memory: "
                    "close other programs, or use a machine with more memory"
                ) from None
            if isinstance(outcome, Exception):
                raise outcome
            outcomes[here] = outcome
    return [outcomes[here] for here in ends]


def _work(
    there: multiprocessing.connection.Connection,
    barrier: multiprocessing.synchronize.Barrier,
    rounds: int,
    threads: int,
    prepare: Prepare,
    arguments: Sequence[Any],
) -> None:
    try:
        torch.set_num_threads(threads)
        work = prepare(*arguments)
        seconds, values = [], []
        for _ in range(rounds):
            barrier.wait()
            start = time.perf_counter()
            values.append(work())
            seconds.append(time.perf_counter() - start)
        there.send((seconds, values))
    except Exception as error:
        there.send(error)
    there.poll(None)  # stay alive until memory has been sampled for the last time
