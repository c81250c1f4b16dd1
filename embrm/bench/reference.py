"""Measure how fast sweeps reach the held-out accuracy of a published training protocol."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import polars as pl

from embrm.bench.caches import HELD_OUT, resplit, synthetic
from embrm.bench.loops import protocol
from embrm.bench.processes import measure
from embrm.bench.sweeps import cores, swept
from embrm.core.progress import progress

_HELD_OUT_SHARE = 0.2

_SWEEP = """
baseline = "bt[lr=0.001,l2=0]"
seeds = {seeds}
validation = 0.1
[defaults]
epochs = {epochs}
patience = 3
schedule = "cosine"
"""
_LINEAR = """
[[runs]]
name = "bt"
grid = { lr = [3e-4, 1e-3, 3e-3, 1e-2], l2 = [0.0, 1e-3, 1e-2, 1e-1] }
[[runs]]
name = "smoothing"
label_smoothing = 0.1
grid = { lr = [3e-4, 1e-3, 3e-3, 1e-2], l2 = [0.0, 1e-3, 1e-2, 1e-1] }
[[runs]]
name = "bsr"
bsr = 0.01
grid = { lr = [3e-4, 1e-3, 3e-3, 1e-2], l2 = [0.0, 1e-3, 1e-2, 1e-1] }
[[runs]]
name = "centering"
centering = 0.01
grid = { lr = [3e-4, 1e-3, 3e-3, 1e-2], l2 = [0.0, 1e-3, 1e-2, 1e-1] }
"""
_MLP = """
[[runs]]
name = "bt"
head = {{ kind = "mlp", widths = [{width}] }}
grid = {{ lr = [3e-4, 1e-3], l2 = [0.0, 1e-2] }}
"""
_SWEEPS = {
    "linear": (_LINEAR, [0, 1, 2, 3]),
    "mlp 64": (_MLP.format(width=64), [0, 1]),
    "mlp 256": (_MLP.format(width=256), [0, 1]),
}
"""Runs of a spec and seeds for each head."""


def measure_reference(
    folder: Path,
    cache: Path | None = None,
    *,
    pairs: int = 45_000,
    width: int = 2048,
    epochs: int = 10,
    protocol_seeds: int = 3,
    heads: Sequence[str] = tuple(_SWEEPS),
) -> list[dict[str, Any]]:
    """One row for the published protocol (`loops.protocol`, on all cores), and one for the sweep of
    each of `heads`.

    cache: trained on its split "train"; without it, on `pairs` synthetic pairs with states of
    `width` components. 80 % of the prompts are trained on. Accuracy is that on the other prompts,
    median over seeds. The protocol stops early on these held-out prompts, which favours it; a sweep
    instead keeps a tenth of its training prompts to stop early and to choose the configuration, by
    mean validation NLL. Seconds a run of a sweep are those of the whole sweep, reading and writing
    included, divided by its runs.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        here = Path(name) / "cache"
        if cache is None:
            synthetic(here, {"train": pairs}, width, held_out=_HELD_OUT_SHARE)
        else:
            resplit(here, cache, _HELD_OUT_SHARE)
        rows = [_protocol(here, protocol_seeds)]
        for index, head in enumerate(heads):
            configurations, seeds = _SWEEPS[head]
            spec = _SWEEP.format(seeds=seeds, epochs=epochs) + configurations
            done = swept(spec, here, Path(name) / f"sweep-{index}")
            own = _chosen(done.results.ledger)
            runs = done.results.ledger.height
            rows.append(
                {
                    "way": f"sweep of {head}",
                    "runs": runs,
                    "seconds a run": done.seconds / runs,
                    "to its best epoch": None,
                    "held-out accuracy": own[f"accuracy@{HELD_OUT}"].median(),
                    "times faster": rows[0]["seconds a run"] / (done.seconds / runs),
                    "reaches the protocol": bool(
                        own[f"accuracy@{HELD_OUT}"].median() >= rows[0]["held-out accuracy"]
                    ),
                    "chosen": own["config"][0],
                    "peak RSS MB": done.memory.rss / 1e6,
                }
            )
    return rows


def _protocol(cache: Path, seeds: int) -> dict[str, Any]:
    runs = []
    with progress("published protocol", seeds, "runs") as bar:
        for seed in range(seeds):
            runs.append(measure(protocol, cache, seed, threads=cores()))
            bar.advance()
    return {
        "way": "published protocol, mlp 1024-512",
        "runs": seeds,
        "seconds a run": median(run.seconds for run in runs),
        "to its best epoch": median(run.values[0].best_seconds for run in runs),
        "held-out accuracy": median(run.values[0].accuracy for run in runs),
        "times faster": 1.0,
        "reaches the protocol": True,
        "chosen": f"{median(run.values[0].epochs for run in runs):g} epochs",
        "peak RSS MB": max(run.memory.rss for run in runs) / 1e6,
    }


def _chosen(ledger: pl.DataFrame) -> pl.DataFrame:
    """Ledger rows of the configuration with the lowest mean validation NLL."""
    ok = ledger.filter(pl.col("status") == "ok")
    means = ok.group_by("config").agg(pl.col("validation_nll").mean())
    best = means.sort("validation_nll", "config")["config"][0]
    return ok.filter(pl.col("config") == best)
