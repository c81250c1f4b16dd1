"""Worker processes that train packs and return bytes; only their parent process writes files.

On the CPU a worker has one thread and fixed numerics, and a run's bits depend on the run alone, so
results depend neither on the number of workers nor on which runs shared a pack.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from embrm.core.errors import UserError
from embrm.core.files import write_bytes
from embrm.core.progress import Progress
from embrm.core.threads import usable_cpus
from embrm.sweeps.packs import Pack
from embrm.sweeps.spec import Run
from embrm.training.extensions import import_modules, refuse_unimportable
from embrm.training.numerics import Numerics, begin, environment, on_cpu, settings, why_unavailable

if TYPE_CHECKING:
    from embrm.sweeps.material import Material
    from embrm.sweeps.pack_trainer import Trainer


def worker_count(jobs: int | None, mode: Numerics) -> int:
    """The number of workers: `jobs`, or by default one per usable core, or one for a GPU.

    Raises: UserError for less than one, and for numerics that this machine lacks.
    """
    lacking = why_unavailable(mode)
    if lacking:
        raise UserError(f"numerics = {mode!r}: {lacking}: use native numerics")
    if jobs is None:
        if not on_cpu(mode):
            return 1
        return usable_cpus()
    if jobs < 1:
        raise UserError(f"jobs = {jobs}: at least one worker is needed")
    return jobs


class Workers:
    """Processes that train packs. Create them with `workers`."""

    def __init__(self, pool: ProcessPoolExecutor, mode: Numerics) -> None:
        self._pool, self._mode = pool, mode

    def run(
        self, material: Material, packs: Sequence[Pack], *, out: Path, bar: Progress
    ) -> dict[str, str]:
        """Run `packs`, writing each below `out` as it finishes.

        A pack that fails is tried again run by run. Returns the runs that failed, with the reason.
        Raises: UserError when a worker was killed or the disk is full; what is finished is kept.
        """
        failures: dict[str, str] = {}
        waiting: dict[Future[dict[str, bytes]], Pack] = {}

        def submit(pack: Pack) -> None:
            waiting[self._pool.submit(_run, material, self._mode, pack)] = pack

        try:
            for pack in packs:
                submit(pack)
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    pack = waiting.pop(future)
                    try:
                        files = future.result()
                    except BrokenProcessPool:
                        raise
                    except Exception as error:
                        if len(pack.runs) > 1:
                            for run in pack.runs:
                                submit(Pack((run,)))
                            continue
                        run = pack.runs[0]
                        failures[run.title] = _one_line(error)
                    else:
                        for name, content in files.items():
                            write_bytes(out / name, content)
                    bar.advance(len(pack.runs))
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for lack of memory: finished "
                "runs are kept; run the same command again with fewer jobs (--jobs)"
            ) from None
        return failures


def modules_of(runs: Sequence[Run]) -> tuple[str, ...]:
    """The modules that register the user-defined parts of these runs.

    Raises: UserError for one that a worker process could not import.
    """
    used = {name: part for run in runs for name, part in run.spec.extensions().items()}
    refuse_unimportable(used)
    return tuple(sorted({part.module for part in used.values() if part.module}))


@contextmanager
def workers(jobs: int, mode: Numerics, modules: tuple[str, ...] = ()) -> Iterator[Workers]:
    """`jobs` worker processes, which load their libraries while this process goes on.

    modules: what they import first, because it registers losses and heads of the user's own.
    """
    context = multiprocessing.get_context("spawn")
    # Workers watch the other end, which closes when this process closes it or dies.
    watched, lifeline = context.Pipe(duplex=False)
    with (
        environment(settings(mode)),
        ProcessPoolExecutor(jobs, context, _start_worker, (watched, mode, modules)) as pool,
    ):
        try:
            # Workers inherit that they ignore interrupts: this process handles Ctrl-C.
            with _ignoring_interrupts(), _without_main():
                for _ in range(jobs):
                    pool.submit(_nothing)
            yield Workers(pool, mode)
        except BaseException:
            lifeline.close()
            raise
    lifeline.close()


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread may set signal handlers.
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide the caller's main module from the processes that are started meanwhile.

    A process that multiprocessing spawns runs the main script again, to find what was defined
    there. Workers need nothing of it, and a script without an `if __name__ == "__main__"` guard
    would start its sweep again in each of them.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start_worker(
    lifeline: multiprocessing.connection.Connection, mode: Numerics, modules: tuple[str, ...]
) -> None:
    begin(mode)
    import_modules(modules)

    def follow() -> None:
        lifeline.poll(None)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _nothing() -> None:
    """Do nothing. Submitting this task makes the pool start a worker."""


_trainer: tuple[Material, Trainer] | None = None
"""The trainer of this worker process, and the material that it was made for."""


def _run(material: Material, mode: Numerics, pack: Pack) -> dict[str, bytes]:
    from embrm.sweeps.pack_trainer import Trainer

    global _trainer
    if _trainer is None or _trainer[0] != material:
        _trainer = material, Trainer(material, mode)
    return _trainer[1].run(pack)
