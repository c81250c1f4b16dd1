"""Measure the adoption of a large array as a cache, against copying its file."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from embrm.adoption.run import adopt
from embrm.adoption.spec import AdoptSpec
from embrm.bench.processes import measure

_COPY_BYTES = 1 << 20


def measure_adoption(
    folder: Path, *, prompts: int = 20_000, responses: int = 10, width: int = 2048, rounds: int = 2
) -> list[dict[str, Any]]:
    """Two rows: copying a float32 array [prompts, responses, width], and adopting it as a cache.

    Each runs in a fresh process on two threads and ends once all bytes are on disk. The array has
    just been written, so it is read from the page cache as far as that holds it. The two alternate
    for `rounds` rounds, and the fastest round of each counts. Twice the array's size is needed
    below `folder`.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        states, gold = _write(Path(name), prompts, responses, width)
        size = states.stat().st_size
        out = Path(name) / "out"
        ways = {"copy, fsync": _copy, "embrm cache adopt": _adopt}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        peak = dict.fromkeys(ways, 0)
        for _ in range(rounds):
            for way, prepare in ways.items():
                done = measure(prepare, states, gold, out, threads=2)
                seconds[way].append(done.seconds)
                peak[way] = max(peak[way], done.memory.rss)
                shutil.rmtree(out)
    fastest = {way: min(times) for way, times in seconds.items()}
    return [
        {
            "way": way,
            "array MB": size / 1e6,
            "seconds": own,
            "MB/s": size / 1e6 / own,
            "share of the copy's speed": fastest["copy, fsync"] / own,
            "peak RSS MB": peak[way] / 1e6,
        }
        for way, own in fastest.items()
    ]


def _write(folder: Path, prompts: int, responses: int, width: int) -> tuple[Path, Path]:
    """Write normally distributed states, synced to disk, and gold scores; returns both paths."""
    random = np.random.default_rng(0)
    states, gold = folder / "states.npy", folder / "gold.npy"
    shape = prompts, responses, width
    array = np.lib.format.open_memmap(states, "w+", np.float32, shape)
    at_once = max(1, (64 << 20) // (4 * responses * width))
    for first in range(0, prompts, at_once):
        part = array[first : first + at_once]
        part[:] = random.standard_normal(part.shape, np.float32)
    array.flush()
    np.save(gold, random.standard_normal((prompts, responses)))
    return states, gold


def _copy(states: Path, gold: Path, out: Path) -> Callable[[], None]:
    def work() -> None:
        out.mkdir()
        for path in (states, gold):
            with path.open("rb") as source, (out / path.name).open("wb") as target:
                shutil.copyfileobj(source, target, _COPY_BYTES)
                target.flush()
                os.fsync(target.fileno())

    return work


def _adopt(states: Path, gold: Path, out: Path) -> Callable[[], None]:
    source = {"states": str(states), "gold": str(gold), "split": "train"}
    spec = AdoptSpec.parse({"arrays": [source]}, "bench")

    def work() -> None:
        adopt(spec, out)

    return work
