"""Work timed in fresh processes, whose threads, environment and memory are their own."""

import multiprocessing
import multiprocessing.connection
import multiprocessing.synchronize
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from embrm.bench.footprint import Footprint, watched
from embrm.core.errors import UserError
from embrm.training.numerics import environment

Prepare = Callable[..., Callable[[], Any]]
"""A module's function: sets everything up, and returns what is to be timed."""


@dataclass(frozen=True)
class Measured:
    """seconds: until the last process had finished, in the fastest round. values: what the work
    returned there, one a process. memory: of all processes, from their start."""

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

    threads: of each process. settings: more of its environment. Every round starts at the same
    moment in all processes, when all are prepared.
    Raises: UserError when a process was killed, and what the work raises.
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
            here.close()  # what a process waits for once it has answered
        for process, _ in started:
            process.join()
    seconds, values, rusage = zip(*outcomes, strict=True)
    slowest = [max(times) for times in zip(*seconds, strict=True)]
    fastest = slowest.index(min(slowest))
    return Measured(
        seconds=slowest[fastest],
        values=[of_rounds[fastest] for of_rounds in values],
        memory=memory if memory.rss else Footprint(rss=sum(rusage)),
    )


def _outcomes(
    ends: Sequence[multiprocessing.connection.Connection],
) -> list[tuple[list[float], list[Any], int]]:
    """What each process sends: seconds and values of its rounds, and its own word on memory."""
    outcomes: dict[Any, tuple[list[float], list[Any], int]] = {}
    while waiting := [here for here in ends if here not in outcomes]:
        # Whoever comes first: one that has failed keeps the others waiting for it.
        ready = multiprocessing.connection.wait(waiting)
        for here in [here for here in waiting if here in ready]:
            try:
                outcome = here.recv()
            except EOFError:
                raise UserError(
                    "a benchmark's process was killed, perhaps for lack of memory: "
                    "close other programs, or measure fewer parts"
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
        there.send((seconds, values, _rusage()))
    except Exception as error:
        there.send(error)
    there.poll(None)  # stay, so that memory can be sampled to the end


def _rusage() -> int:
    """Peak bytes of this process and of its largest child: all that is known off Linux."""
    unit = 1 if sys.platform == "darwin" else 1024
    who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return unit * sum(resource.getrusage(one).ru_maxrss for one in who)
