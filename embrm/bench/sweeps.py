"""One whole sweep, as `embrm sweep` runs it, timed in a process of its own."""

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
    """seconds: of the sweep. Its process started and ended at these times since the epoch, and its
    first pack was finished at first_ended. memory: of it and its workers."""

    seconds: float
    started: float
    first_ended: float
    ended: float
    memory: Footprint
    results: Results


def cores() -> int:
    """Cores that a sweep uses here."""
    return worker_count(None, "native")


def swept(spec: str, cache: Path, out: Path, *, memory: int | None = None) -> Swept:
    """Run the sweep that `spec`, the text of a TOML file, asks for; its results go to `out`."""
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
