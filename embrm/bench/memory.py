"""Measure a sweep on a cache that is larger than its memory limit, with and without the limit."""

import tempfile
from pathlib import Path
from typing import Any

from embrm.bench.caches import synthetic
from embrm.bench.sweeps import swept


def measure_memory(
    folder: Path,
    *,
    pairs: int = 375_000,
    width: int = 2048,
    runs: int = 64,
    epochs: int = 2,
    memory: int = 1_500_000_000,
) -> list[dict[str, Any]]:
    """Two rows: a sweep of `runs` linear heads in memory, and streamed within `memory` bytes.

    The cache has `pairs` pairs, 99 % of them in the split "train". The cache and the sweep's copy
    of its states take twice the cache's size below `folder`.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        cache = synthetic(
            Path(name) / "cache", {"train": pairs - pairs // 100, "id": pairs // 100}, width
        )
        size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        rows: list[dict[str, Any]] = []
        for limit in (None, memory):
            out = Path(name) / f"sweep-{limit}"
            done = swept(_spec(runs, epochs), cache, out, memory=limit)
            rows.append(
                {
                    "memory": "no limit" if limit is None else f"{limit / 1e9:g} GB",
                    "cache MB": size / 1e6,
                    "runs": runs,
                    "seconds": done.seconds,
                    "times in memory": 1.0 if limit is None else done.seconds / rows[0]["seconds"],
                    "peak RSS MB": done.memory.rss / 1e6,
                    "peak PSS MB": done.memory.pss / 1e6,
                }
            )
    return rows


def _spec(runs: int, epochs: int) -> str:
    return f"""
baseline = "base"
seeds = [0]
[defaults]
epochs = {epochs}
[[runs]]
name = "base"
[[runs]]
name = "l2"
grid.l2 = {[1e-6 * (1 + index) for index in range(runs - 1)]}
"""
