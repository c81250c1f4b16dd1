"""Measure one large sweep: total time, time to the first result, and overhead beside training."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embrm.bench.caches import synthetic
from embrm.bench.sweeps import cores, swept

_SEEDS = (0, 1, 2, 3, 4)
_VALIDATION = 0.1


def measure_whole(
    folder: Path,
    *,
    runs: int = 240,
    pairs: int = 45_000,
    evaluation_pairs: Sequence[int] = (1_000, 1_400, 1_800, 2_200, 2_600, 3_000),
    width: int = 2048,
    epochs: int = 10,
) -> list[dict[str, Any]]:
    """One row: a sweep of about `runs` runs with five seeds per configuration.

    Five runs in six have a linear head, the others an MLP with one hidden layer of 64.
    pairs: approximate number of training pairs; a tenth as many are used for validation.
    evaluation_pairs: pairs of each evaluation split.
    Times count from the start of the sweep's process, imports included. "before training": until
    the first pack began. "to the first pack": until the first pack's results were written.
    "overhead ms a run": time for evaluation and for compacting all results, per run. "waiting":
    from when the first worker had no pack left until the last worker finished.
    """
    count = cores()
    with tempfile.TemporaryDirectory(dir=folder) as name:
        splits = {"train": round(pairs / (1 - _VALIDATION))}
        splits |= {f"ood/{index}": count for index, count in enumerate(evaluation_pairs)}
        cache = synthetic(Path(name) / "cache", splits, width)
        out = Path(name) / "sweep"
        configurations = max(4, runs // len(_SEEDS))
        mlp = max(1, configurations // 6)
        done = swept(_spec(configurations - mlp, mlp, epochs), cache, out)
        timings = done.results.timings
        runs = timings.height
        total = timings.sum()
        packs = timings.unique("started")
        ends = (packs["started"] + packs["pack_seconds"]).sort()
        compaction = done.ended - ends[-1]
        evaluation = total["evaluate_seconds"][0] / count
        kept = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
        return [
            {
                "runs": runs,
                "training pairs": done.results.ledger["train_pairs"][0],
                "width": width,
                "epochs": epochs,
                "seconds": done.ended - done.started,
                "to the first pack": done.first_ended - done.started,
                "before training": packs["started"].sort()[0] - done.started,
                "training": (total["train_seconds"][0] + total["score_seconds"][0]) / count,
                "overhead ms a run": 1e3 * (evaluation + compaction) / runs,
                "waiting": ends[-1] - ends[-count],
                "results MB": sum(kept) / 1e6,
                "peak RSS MB": done.memory.rss / 1e6,
                "peak PSS MB": done.memory.pss / 1e6,
            }
        ]


def _spec(linear: int, mlp: int, epochs: int) -> str:
    def penalties(count: int) -> list[float]:
        return [1e-6 * (1 + index) for index in range(count)]

    return f"""
baseline = "base"
seeds = {[*_SEEDS]}
validation = {_VALIDATION}
[defaults]
epochs = {epochs}
[[runs]]
name = "base"
[[runs]]
name = "linear"
grid.l2 = {penalties(linear - 1)}
[[runs]]
name = "mlp"
head = {{ kind = "mlp", widths = [64] }}
grid.l2 = {penalties(mlp)}
"""
