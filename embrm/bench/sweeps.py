"""Run and time a complete `embrm sweep` in its own process, for the benchmarks of sweeps."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from embrm.bench.footprint import Footprint
from embrm.bench.processes import measure
from embrm.results.ledger import Results, open_results
from embrm.sweeps.execute import sweep
from embrm.sweeps.workers import worker_count


@dataclass(frozen=True)
class Swept:
    """Result of `swept`.

    seconds: of the sweep, without the start of its process.
    started, ended: when its process started and ended; first_ended: when its first pack's results
    were written. All three are seconds since the Unix epoch.
    memory: peak of the process and its workers.
    """

    seconds: float
    started: float
    first_ended: float
    ended: float
    memory: Footprint
    results: Results


def cores() -> int:
    """Number of worker processes that a sweep uses on this machine by default."""
    return worker_count(None, "native")


def swept(spec: str, cache: Path, out: Path, *, memory: int | None = None) -> Swept:
    """Run a sweep. spec: text of its TOML file; out: results folder; memory: limit in bytes."""
    path = out.with_suffix(".toml")
    path.write_text(spec)
    start = time.time()
    done = measure(_sweep, path, cache, out, memory, threads=cores())
    end = time.time()
    first = min(ledger.stat().st_mtime for ledger in out.glob("parts/*/ledger.parquet"))
    return Swept(done.seconds, start, first, end, done.memory, open_results(out))


def _sweep(path: Path, cache: Path, out: Path, memory: int | None) -> Callable[[], None]:
    def work() -> None:
        sweep(path, cache, out=out, memory=memory)

    return work
