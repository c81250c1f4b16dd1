"""Train the runs of a sweep in worker processes, pack by pack."""

from collections.abc import Sequence
from pathlib import Path

from embrm.core.interrupts import raised_interrupts
from embrm.core.progress import progress
from embrm.sweeps.packs import packs
from embrm.sweeps.prepare import PreparedSweep
from embrm.sweeps.spec import Run
from embrm.sweeps.workers import modules_of, workers
from embrm.training.numerics import on_cpu


def train_runs(
    prepared: PreparedSweep,
    todo: Sequence[Run],
    out: Path,
    *,
    jobs: int,
    memory: int | None,
    label: str = "training",
    done: int = 0,
) -> dict[str, str]:
    """Train `todo` and write what each pack gives below `out`; returns failures with their reason.

    memory: bytes of states that the workers may keep in memory; larger caches are streamed. label:
    of the progress bar, which counts `done` runs as finished before.

    Raises: KeyboardInterrupt after Ctrl-C; what has finished by then is kept.
    """
    if not todo:
        return {}
    from embrm.sweeps.material import laid_out  # it loads torch

    mode = prepared.spec.numerics
    found = packs(todo, jobs=jobs, training_pairs=prepared.training_pairs, gpu=not on_cpu(mode))
    with (
        raised_interrupts(),
        workers(min(jobs, len(found)), mode, modules_of(todo)) as running,
        laid_out(
            prepared.cache, prepared.selection, todo, out, memory=memory, jobs=jobs
        ) as material,
        progress(label, done + len(todo), "runs", done) as bar,
    ):
        return running.run(material, found, out=out, bar=bar)
